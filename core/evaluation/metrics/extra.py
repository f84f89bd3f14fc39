"""Libraries that only the evaluation needs: found when they are asked for, and missed in words."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import ModelError

__all__ = ["EXTRA", "require"]

EXTRA = 'pip install "forget-concept[evaluation]"'


def require(module: str, what: str, line: str = EXTRA) -> Any:
    """The module ``module``. Raises :class:`ModelError`, naming the pip line, where it cannot be imported.

    ``what`` is what needs it, as the beginning of a sentence. A module that is there and fails to import for the want
    of another one, or because it was built for another torch, is missed as well, and that is said.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"{what} needs the package '{module.partition('.')[0]}' ({error}): {line}") from error
