"""Forget a concept: the package itself, and ComfyUI's door to it.

ComfyUI imports this folder as a custom node pack and calls :func:`comfy_entrypoint`. Nothing of a host, and not torch
either, is imported before that: this file is also the root of an ordinary Python package.
"""

from __future__ import annotations

from typing import Any

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The pack's V3 extension."""
    from .nodes.extension import ForgetConceptExtension

    return ForgetConceptExtension()
