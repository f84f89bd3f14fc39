"""Patches in every picture: the same as the LoRA typed by hand, told in the infotext, and nothing left behind."""

from __future__ import annotations

import base64
import statistics
import time

import pytest
from webuihost import WebUI

PROMPT = "a photo of a red star"


def always(names: list[str], strength: float = 1.0) -> dict[str, object]:
    return {"alwayson_scripts": {"Forget Concept": {"args": [names, strength]}}}


@pytest.fixture(scope="module")
def patch(webui: WebUI) -> str:
    webui.probe("forget", name="no_star")
    webui.probe("forget", name="no_moon", concepts=[["moon", "circle"]], preserve=["star"])
    return "no_star"


def test_the_picture_is_that_of_the_lora_typed_by_hand(webui: WebUI, patch: str) -> None:
    before, plain = webui.probe("state"), webui.draw(PROMPT)
    typed = webui.draw(f"{PROMPT} <lora:{patch}:0.8>")
    chosen = webui.draw(PROMPT, **always([patch], 0.8))
    assert chosen.pixels == typed.pixels != plain.pixels
    assert "<lora:" not in chosen.infotext
    assert f'Forget Concept: "{patch}:0.8:' in chosen.infotext
    assert webui.draw(PROMPT).pixels == plain.pixels
    after = webui.probe("state")
    assert (after["weights"], after["state"]) == (before["weights"], before["state"])


def test_what_is_typed_in_the_prompt_goes_in_once(webui: WebUI, patch: str) -> None:
    typed = webui.draw(f"{PROMPT} <lora:{patch}:0.5>")
    both = webui.draw(f"{PROMPT} <lora:{patch}:0.5>", **always([patch], 1.0))
    assert both.pixels == typed.pixels


def test_several_at_once_in_a_batch(webui: WebUI, patch: str) -> None:
    batches: dict[str, object] = {"batch_size": 2, "n_iter": 2, "steps": 1}
    typed = webui.draw(f"{PROMPT} <lora:{patch}:1><lora:no_moon:1>", **batches)
    chosen = webui.draw(PROMPT, **batches, **always([patch, "no_moon"]))
    assert chosen.all_pixels == typed.all_pixels
    assert len(set(chosen.all_pixels)) == 4


def test_image_to_image_too(webui: WebUI, patch: str) -> None:
    start = base64.b64encode(webui.draw(PROMPT).png).decode()
    way = {"way": "img2img", "init_images": [start], "denoising_strength": 0.9}
    typed = webui.draw(f"{PROMPT} <lora:{patch}:1>", **way)
    chosen = webui.draw(PROMPT, **way, **always([patch]))
    assert chosen.pixels == typed.pixels != webui.draw(PROMPT, **way).pixels


def test_both_passes_of_a_hires_fix(webui: WebUI, patch: str) -> None:
    way: dict[str, object] = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.8}
    if webui.kind == "forge":
        way["hr_additional_modules"] = ["Use same choices"]  # without it Forge's own API breaks off
    typed = webui.draw(f"{PROMPT} <lora:{patch}:1>", **way)
    chosen = webui.draw(PROMPT, **way, **always([patch]))
    assert chosen.pixels == typed.pixels != webui.draw(PROMPT, **way).pixels


def test_the_infotext_brings_it_back(webui: WebUI, patch: str) -> None:
    infotext = webui.draw(PROMPT, **always([patch, "no_moon"], 0.6)).infotext
    assert webui.probe("pasted", infotext=infotext) == {"_pasted_names": [patch, "no_moon"], "_pasted_strength": 0.6}
    # a file that was renamed is known by its hash
    (webui.loras / f"{patch}.safetensors").rename(webui.loras / "renamed.safetensors")
    try:
        webui.post("/sdapi/v1/refresh-loras", {}) if webui.kind == "webui" else None
        webui.draw(PROMPT, **always(["renamed"]))
        assert webui.probe("pasted", infotext=infotext)["_pasted_names"] == ["renamed", "no_moon"]
    finally:
        (webui.loras / "renamed.safetensors").rename(webui.loras / f"{patch}.safetensors")
    # an infotext without one changes nothing of what is chosen
    assert webui.probe("pasted", infotext=webui.draw(PROMPT).infotext) == {
        "_pasted_names": None,
        "_pasted_strength": None,
    }


def test_a_patch_that_is_not_there_is_told(webui: WebUI, patch: str) -> None:
    drawn = webui.draw(PROMPT, **always([patch, "gone"]))
    assert "Forget Concept missing: gone" in drawn.infotext
    assert f'Forget Concept: "{patch}:1:' in drawn.infotext
    odd = webui.draw(PROMPT, alwayson_scripts={"Forget Concept": {"args": [[patch], "much"]}})
    assert f"Forget Concept missing: {patch}" in odd.infotext
    assert odd.pixels == webui.draw(PROMPT).pixels
    no_list = webui.draw(PROMPT, alwayson_scripts={"Forget Concept": {"args": [5, 1]}})
    assert "Forget Concept missing: 5" in no_list.infotext


@pytest.mark.long
def test_what_it_costs_in_time(webui: WebUI, patch: str, record_property: object) -> None:
    """A picture with one against the same without, in turns; the host's own LoRA is all there is to it."""

    def seconds(**options: object) -> float:
        began = time.perf_counter()
        webui.draw(PROMPT, steps=4, **options)
        return time.perf_counter() - began

    seconds(**always([patch]))
    pairs = [(seconds(**always([patch])), seconds()) for _ in range(3)]
    ratio = statistics.median(with_it / without for with_it, without in pairs)
    print(f"time ratio with an always-on patch: {ratio:.2f}")
    assert ratio < 1.5
