"""Models whose layers the host keeps as int8 or as fp8 with a scale."""

from __future__ import annotations

from typing import Any

import pytest
from comfyhost import ComfyUI
from graphs import base, difference, drawn, forget, node
from test_patches import QUICK, nonces, report, words


@pytest.mark.parametrize("kind", ["int8_tensorwise", "float8_e4m3fn"])
@pytest.mark.parametrize("method", ["uce", "forget_me_not"])
def test_a_quantised_model_forgets_and_is_left_as_it_was(comfyui: ComfyUI, kind: str, method: str) -> None:
    if "ProbeQuantised" not in comfyui.get("/object_info"):
        pytest.skip("this ComfyUI has no layers in int8")
    wanted: dict[str, Any] = {"method": method} if method == "uce" else {"method": method, "settings": QUICK}
    graph = base() | {"quantised": node("ProbeQuantised", model=["load", 0], format=kind)}
    graph["before"] = node("ProbeHash", model=["quantised", 0], nonce=next(nonces))
    graph["forget"] = forget(model=["before", 0], **wanted)
    graph["after"] = node("ProbeHash", model=["quantised", 0], after=["forget", 0], nonce=next(nonces))
    graph |= drawn("plain", ["quantised", 0]) | drawn("full", ["load", 0]) | drawn("without", ["forget", 0])
    graph |= {"moved": difference("plain", "without"), "rounded": difference("plain", "full")}
    outputs = (entry := comfyui.run(report(graph, "forget")))["outputs"]
    assert "forgotten: star" in words(entry, "forget")
    assert outputs["before"]["hash"] == outputs["after"]["hash"]
    assert outputs["rounded"]["difference"][0] > 0  # quantised indeed
    assert outputs["moved"]["finite"][0]
    assert outputs["moved"]["difference"][0] > (20 if method == "uce" else 0)
