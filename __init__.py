"""Make a text-to-image diffusion model forget a concept: a library, and ComfyUI's entry to this node pack.

    import forget_concept as fc

    model = fc.load_model("mini")
    patch = fc.fit(model, "star", replacement="circle", preserve=["moon"])

The library's names are imported from :mod:`.core.api` when they are first used. ComfyUI imports this folder as a custom
node pack and calls :func:`comfy_entrypoint`. Importing the package imports neither torch nor a host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.version import VERSION as __version__

if TYPE_CHECKING:
    from .core.api import Concept, ForgetRequest, Patch, evaluate, fit, load_model, load_patch

__all__ = [
    "WEB_DIRECTORY",
    "Concept",
    "ForgetRequest",
    "Patch",
    "__version__",
    "comfy_entrypoint",
    "evaluate",
    "fit",
    "load_model",
    "load_patch",
]

WEB_DIRECTORY = "./web"
_LIBRARY = ("Concept", "ForgetRequest", "Patch", "evaluate", "fit", "load_model", "load_patch")


async def comfy_entrypoint() -> Any:
    """The pack's V3 extension."""
    from .nodes.extension import ForgetConceptExtension

    return ForgetConceptExtension()


def __getattr__(name: str) -> Any:
    # ComfyUI looks for names of its older interface here (NODE_CLASS_MAPPINGS): only known ones may be found
    if name not in _LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .core import api

    value = globals()[name] = getattr(api, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARY})
