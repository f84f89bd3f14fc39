"""A method file dropped into the pack is in a real ComfyUI: a settings node that works, and the choice of methods."""

from __future__ import annotations

import json
from pathlib import Path

from comfyhost import ComfyUI
from overlay import overlay

NODE = "ForgetConceptThrowawaySettings"


def test_a_dropped_in_method_has_a_settings_node_that_works(comfyui: ComfyUI, tmp_path: Path) -> None:
    host = ComfyUI(comfyui.host, tmp_path / "host", "with_throwaway", overlay(tmp_path / "pack"))
    host.start()
    try:
        known = host.get("/object_info")
        required = known[NODE]["input"]["required"]
        assert list(required)[:4] == ["preset", "rank", "dial", "rounds"]
        kind, given = required["dial"]
        assert kind == "FLOAT" and {"default": 0.75, "min": 0.25, "max": 2, "step": 0.05}.items() <= given.items()
        assert given["tooltip"] == "How far the throwaway dial is turned."
        methods = known["ForgetConcept"]["input"]["required"]["method"]
        assert "throwaway" in (methods[0] if isinstance(methods[0], list) else methods[1]["options"])
        defaults = {name: spec[1]["default"] for name, spec in required.items()}
        asked = {"concept": "star", "kind": "object", "replacement": "", "preserve": ""}
        asked |= {"method": "uce", "preset": "tuned", "strength": 1.0, "seed": 0}
        wires = {"model": ["model", 0], "clip": ["model", 1], "method_settings": ["settings", 0]}
        graph = {
            "settings": {"class_type": NODE, "inputs": defaults | {"dial": 1.5}},
            "model": {"class_type": "ForgetConceptLoadEmbeddedModel", "inputs": {}},
            "forget": {"class_type": "ForgetConcept", "inputs": asked | wires},
            "report": {"class_type": "PreviewAny", "inputs": {"source": ["forget", 2]}},
        }
        entry = host.run(graph)
        assert "execution_success" in host.statuses(entry)
        assert "throwaway" in json.dumps(entry["outputs"]["report"])
    finally:
        host.stop()
