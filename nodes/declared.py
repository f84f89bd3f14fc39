"""Reads the schemas of the pack's nodes without a ComfyUI.

A stand-in for ``comfy_api`` records the schema of each node. Locales and help pages are generated from the schemas, and
tests inspect them. ComfyUI itself does not use this module.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["DeclaredNode", "DeclaredSocket", "declared_nodes"]


@dataclass
class DeclaredSocket:
    """An input or output: its ``kind`` (``Int``, ``Model``), ``id``, ``tooltip`` and all other arguments."""

    kind: str
    id: str
    display_name: str | None = None
    tooltip: str | None = None
    optional: bool = False
    extra_dict: dict[str, Any] = field(default_factory=dict)


@dataclass
class DeclaredNode:
    """A node's schema. Hosts list required inputs first; so does ``inputs`` once :func:`declared_nodes` returns it."""

    node_id: str
    display_name: str
    category: str
    description: str = ""
    inputs: list[DeclaredSocket] = field(default_factory=list)
    outputs: list[DeclaredSocket] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False


def _socket(kind: str) -> Any:
    def declared(
        id: str, display_name: str | None = None, *, tooltip: str | None = None, optional: bool = False, **extra: Any
    ) -> DeclaredSocket:
        return DeclaredSocket(kind, id, display_name, tooltip, optional, extra)

    def option(key: str, inputs: list[DeclaredSocket]) -> tuple[str, list[DeclaredSocket]]:
        return key, inputs

    sockets = {"Input": staticmethod(declared), "Output": staticmethod(declared)}
    return type(kind, (), {**sockets, "Option": staticmethod(option)})


class _IO(ModuleType):
    """Stand-in for ``comfy_api.latest.io``: every type name that the nodes use is a kind of socket."""

    Schema = DeclaredNode
    NodeOutput = tuple
    Custom = staticmethod(_socket)

    class ComfyNode:
        hidden: Any = None

    class Hidden:
        unique_id, prompt, extra_pnginfo = "unique_id", "prompt", "extra_pnginfo"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _socket(name)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Replace the host's modules by stand-ins; modules imported with them are unloaded afterwards."""
    api, latest, host = ModuleType("comfy_api"), ModuleType("comfy_api.latest"), ModuleType(f"{__package__}.host")
    latest.__dict__.update(io=_IO("io"), ui=ModuleType("ui"), ComfyExtension=object)
    host.__dict__.update(lora_files=list, theme_folders=list)  # the only calls that schemas make
    stand_ins = {"comfy_api": api, "comfy_api.latest": latest, f"{__package__}.host": host}
    before = dict(sys.modules)
    if taken := before.keys() & stand_ins.keys():
        raise RuntimeError(f"{', '.join(sorted(taken))} is already imported: this is for processes without a ComfyUI.")
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        package = sys.modules[str(__package__)]
        for name in sys.modules.keys() - before.keys():
            parent, _, child = name.rpartition(".")
            if name in stand_ins or parent == __package__:
                del sys.modules[name]
                package.__dict__.pop(child, None)


def declared_nodes() -> dict[str, DeclaredNode]:
    """The schemas of all nodes of the pack by node id, sorted."""
    with _stand_ins():
        extension = importlib.import_module(".extension", __package__).ForgetConceptExtension()
        found = [node.define_schema() for node in asyncio.run(extension.get_node_list())]
    for node in found:
        node.inputs.sort(key=lambda socket: socket.optional)
    return {node.node_id: node for node in sorted(found, key=lambda node: node.node_id)}
