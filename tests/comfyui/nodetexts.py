"""The texts of the nodes that a running ComfyUI lists, as a locale."""

from __future__ import annotations

from typing import Any

from forget_concept.nodes.generate import escaped

__all__ = ["english", "ours"]


def english(info: dict[str, Any]) -> dict[str, Any]:
    """What the nodes of an ``/object_info`` say, as a locale."""
    found: dict[str, Any] = {}
    for name, node in sorted(info.items()):
        inputs = {key: spec for part in ("required", "optional") for key, spec in node["input"].get(part, {}).items()}
        found[name] = {
            "display_name": escaped(node["display_name"]),
            "description": escaped(node["description"]),
            "inputs": {
                key: {"name": escaped(key), "tooltip": escaped((spec[1] if len(spec) > 1 else {}).get("tooltip", ""))}
                for key, spec in inputs.items()
            },
            "outputs": {
                str(i): {"name": escaped(label), "tooltip": escaped(words or "")}
                for i, (label, words) in enumerate(
                    zip(node["output_name"], node["output_tooltips"], strict=True), start=0
                )
            },
        }
    return found


def ours(info: dict[str, Any]) -> dict[str, Any]:
    """This pack's nodes of an ``/object_info``."""
    return {name: node for name, node in info.items() if name.startswith("ForgetConcept")}
