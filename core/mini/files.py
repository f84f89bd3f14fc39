"""Location of the embedded model's files. Imports only the standard library, because hosts may lack other packages."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["WEIGHTS_VARIABLE", "weights_folder"]

WEIGHTS_VARIABLE = "FORGET_CONCEPT_MINI_WEIGHTS"


def weights_folder() -> Path:
    """Return the embedded model's diffusers folder; ``FORGET_CONCEPT_MINI_WEIGHTS`` overrides it."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    return Path(named) if named else Path(__file__).with_name("weights")
