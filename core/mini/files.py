"""Where the embedded model's files lie. Nothing is imported here that a host might lack."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["WEIGHTS_VARIABLE", "weights_folder"]

WEIGHTS_VARIABLE = "FORGET_CONCEPT_MINI_WEIGHTS"


def weights_folder() -> Path:
    """The diffusers folder of the embedded model, or the one that ``FORGET_CONCEPT_MINI_WEIGHTS`` names instead."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    return Path(named) if named else Path(__file__).with_name("weights")
