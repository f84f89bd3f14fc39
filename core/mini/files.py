"""Names and files of the embedded models. Imports only the standard library, because hosts may lack other packages."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["NAMES", "WEIGHTS_VARIABLE", "weights_folder"]

# those that come with the package; `mini-xl` and `mini-flow` can be trained, and have no weights yet
NAMES = ("mini",)
WEIGHTS_VARIABLE = "FORGET_CONCEPT_MINI_WEIGHTS"


def weights_folder(name: str = "mini") -> Path:
    """Return an embedded model's folder; ``FORGET_CONCEPT_MINI_WEIGHTS`` overrides that of ``mini``.

    ``mini``'s is a whole diffusers folder. The others hold what they do not share with it.
    """
    named = os.environ.get(WEIGHTS_VARIABLE)
    if name == "mini":
        return Path(named) if named else Path(__file__).with_name("weights")
    return Path(__file__).with_name("weights_" + name.removeprefix("mini-"))
