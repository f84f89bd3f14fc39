"""The families of diffusion transformers, in the order in which a model is compared with them."""

from __future__ import annotations

from torch import nn

from .chroma import CHROMA
from .family import Family, submodules
from .flux import FLUX
from .flux2 import FLUX2
from .hunyuan import HUNYUAN
from .lumina2 import LUMINA2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import WAN
from .z_image import Z_IMAGE

__all__ = ["FAMILIES", "family_of"]

# a family whose marks another one's models have, too, stands behind that one
FAMILIES: tuple[Family, ...] = (CHROMA, FLUX2, HUNYUAN, FLUX, SD3, QWEN_IMAGE, Z_IMAGE, LUMINA2, WAN)


def family_of(module: nn.Module) -> tuple[Family, str] | None:
    """The family of a raw diffusion transformer, and the naming that it is in; ``None`` for anything else."""
    paths = submodules(module)
    for family in FAMILIES:
        if (layout := family.layout_of(paths)) is not None:
            return family, layout
    return None
