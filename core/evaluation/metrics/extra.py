"""Lazy imports of the optional libraries of the evaluation, with errors that name the package to install."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import ModelError

__all__ = ["EXTRA", "require"]

EXTRA = 'pip install "forget-concept[evaluation]"'


def require(module: str, what: str, line: str = EXTRA) -> Any:
    """Import an optional module.

    Args:
        module: Name of the module.
        what: What needs it, as the subject of the error's sentence.
        line: The pip command that installs it.

    Raises:
        ModelError: If the module is missing or fails to import, for example because it was built for another torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"{what} needs the package '{module.partition('.')[0]}' ({error}): {line}") from error
