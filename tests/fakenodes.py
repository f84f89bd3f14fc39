"""The ComfyUI nodes that forget, imported beside a stand-in for the host that only lends a model."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

import forget_concept
from forget_concept.core.models.latent_diffusion import LatentDiffusion

NAMES = ("common", "forget_concept", "forget_in_sequence", "forget_by_request", "settings_nodes")


def loaded_nodes(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Yield the modules of the nodes by name, and remove them afterwards; for a fixture."""

    class Node:
        hidden = SimpleNamespace(unique_id=None)

    io = MagicMock(name="io", ComfyNode=Node, NodeOutput=lambda *outputs, ui=None: outputs)
    latest: Any = ModuleType("comfy_api.latest")
    latest.io = io
    package = forget_concept.__name__ + ".nodes"
    host: Any = MagicMock(name="host")
    host.latent_diffusion = lambda *given: contextlib.nullcontext(model)
    host.progress = lambda *given: None
    host.patched_weights = lambda model: 0
    host.surviving_share = lambda model, patch: None
    for name in NAMES:
        monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    monkeypatch.setitem(sys.modules, f"{package}.host", host)
    monkeypatch.setattr(importlib.import_module(package), "host", host, raising=False)
    found = {name: importlib.import_module(f"{package}.{name}") for name in NAMES}
    yield SimpleNamespace(**found)
    for name in NAMES:
        sys.modules.pop(f"{package}.{name}", None)
        delattr(importlib.import_module(package), name)
