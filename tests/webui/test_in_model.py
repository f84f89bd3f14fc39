"""Patches in the weights and the pictures drawn with them: in the infotext, restored from it, never lost in silence."""

from __future__ import annotations

import base64
import json
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest
from webuihost import PREFIX, Drawn, WebUI

PROMPT = "a photo of a red star"
STAR, MOON = "in_model_star", "in_model_moon"


def always(names: list[str], strength: float = 1.0) -> dict[str, object]:
    return {"alwayson_scripts": {"Forget Concept": {"args": [names, strength]}}}


def distance(a: bytes, b: bytes) -> float:
    """The mean difference of two pictures, in 1/255."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def plot(webui: WebUI, *axes: tuple[str, str], **options: Any) -> list[bytes]:
    """The pixels of the cells of an X/Y/Z plot, in the webui's order."""
    labels = webui.probe("plot_axes")["labels"]
    kinds: list[Any] = []
    for label, values in [*axes, *[("Nothing", "")] * 3][:3]:
        kinds += [labels.index(label), values, []]
    # legend, lone images, sub grids, seeds, margin, values as text
    arguments = [*kinds, False, True, False, False, False, False, False, 0, True]
    asked = {"prompt": PROMPT, "width": 128, "height": 128, "steps": 2, "cfg_scale": 2.5, "sampler_name": "Euler"}
    asked |= {"seed": 1, "script_name": "x/y/z plot", "script_args": arguments, **options}
    return Drawn(webui.post("/sdapi/v1/txt2img", asked, timeout=600)).all_pixels


@pytest.fixture(scope="module")
def patches(webui: WebUI) -> tuple[str, str]:
    webui.probe("forget", name=STAR)
    webui.probe("forget", name=MOON, concepts=[["moon", "circle"]], preserve=["star"])
    return STAR, MOON


@pytest.fixture(autouse=True)
def clean(webui: WebUI, patches: tuple[str, str]) -> Iterator[None]:
    """Each test begins and ends without a patch, and with the webui's own settings."""
    yield
    webui.probe("options", forget_concept_reapply=False)
    webui.probe("checkpoint", name="forget-concept-mini")
    webui.post(f"{PREFIX}/dropped/dismiss", {})
    for one in webui.get(f"{PREFIX}/active"):
        webui.post(f"{PREFIX}/patches/{one['name']}/remove", {})


def put(webui: WebUI, name: str, strength: float) -> None:
    assert webui.post(f"{PREFIX}/patches/{name}/apply", {"strength": strength})[-1]["in_force"]


def entries(drawn: Drawn) -> dict[str, float]:
    """Name and weight of the patches in an infotext."""
    _, found, rest = drawn.infotext.partition('Forget Concept: "')
    if not found:
        _, found, rest = drawn.infotext.partition("Forget Concept: ")
        rest = rest.partition(",")[0]
    parts = [part.strip().split(":") for part in rest.partition('"')[0].split(",") if found]
    return {name: float(weight) for name, weight, _ in parts}


def comments(webui: WebUI) -> str:
    """What the webui showed below the pictures since this was last asked."""
    return "\n".join(webui.probe("comments")["comments"])


def test_the_infotext_names_what_is_in_the_weights_and_restores_it(webui: WebUI) -> None:
    plain = webui.draw(PROMPT)
    put(webui, STAR, 0.9)
    drawn = webui.draw(PROMPT)
    assert entries(drawn) == {STAR: 0.9}
    # it is still in the model: nothing is needed beside it
    assert webui.probe("pasted", infotext=drawn.infotext)["_pasted_names"] == []
    both = webui.draw(PROMPT, **always([STAR, MOON], 0.5))
    assert entries(both) == {STAR: 1.4, MOON: 0.5}
    webui.post(f"{PREFIX}/patches/{STAR}/remove", {})
    assert webui.draw(PROMPT).pixels == plain.pixels
    # it no longer is: the picture comes back through the prompt
    pasted = webui.probe("pasted", infotext=drawn.infotext)
    assert pasted == {"_pasted_names": [STAR], "_pasted_strength": 0.9}
    again = webui.draw(PROMPT, **always(pasted["_pasted_names"], pasted["_pasted_strength"]))
    assert distance(again.pixels, drawn.pixels) < 0.02 * distance(drawn.pixels, plain.pixels)
    # several strengths: each patch with its own
    pasted = webui.probe("pasted", infotext=both.infotext)
    assert pasted["_pasted_names"] == [f"{STAR}:1.4", f"{MOON}:0.5"]
    again = webui.draw(PROMPT, **always(pasted["_pasted_names"], pasted["_pasted_strength"]))
    assert entries(again) == entries(both)
    assert distance(again.pixels, both.pixels) < 0.02 * distance(both.pixels, plain.pixels)


def test_image_to_image_names_it_too(webui: WebUI) -> None:
    put(webui, STAR, 0.9)
    start = base64.b64encode(webui.draw(PROMPT).png).decode()
    assert entries(webui.draw(PROMPT, way="img2img", init_images=[start], denoising_strength=0.9)) == {STAR: 0.9}


def test_a_checkpoint_chosen_and_chosen_back_says_what_it_lost(webui: WebUI) -> None:
    plain = webui.draw(PROMPT)
    put(webui, STAR, 0.9)
    patched = webui.draw(PROMPT)
    webui.probe("checkpoint", name="turned")
    comments(webui)
    assert webui.get(f"{PREFIX}/active") == []
    lost = webui.get(f"{PREFIX}/dropped")
    assert [(one["name"], one["strength"], one["same"]) for one in lost] == [(STAR, 0.9, False)]
    # another checkpoint's pictures are not short of it
    assert "missing" not in webui.draw(PROMPT).infotext
    webui.probe("checkpoint", name="forget-concept-mini")
    assert [one["same"] for one in webui.get(f"{PREFIX}/dropped")] == [True]
    drawn = webui.draw(PROMPT)
    assert drawn.pixels == plain.pixels and entries(drawn) == {}
    assert f"Forget Concept missing: {STAR}" in drawn.infotext
    told = comments(webui)
    assert f"generated without '{STAR}'" in told and "Apply it again" in told
    active = webui.post(f"{PREFIX}/dropped/apply", {})
    assert active == [{"name": STAR, "strength": 0.9, "in_force": True, "warning": ""}]
    restored = webui.draw(PROMPT)
    assert restored.pixels == patched.pixels and "missing" not in restored.infotext
    assert webui.get(f"{PREFIX}/dropped") == []


def test_a_setting_applies_it_again_with_the_next_picture(webui: WebUI) -> None:
    put(webui, STAR, 0.9)
    patched = webui.draw(PROMPT)
    webui.probe("options", forget_concept_reapply=True)
    webui.probe("checkpoint", name="turned")
    turned = webui.draw(PROMPT)
    assert entries(turned) == {}
    webui.probe("checkpoint", name="forget-concept-mini", load=False)
    drawn = webui.draw(PROMPT)
    assert drawn.pixels == patched.pixels and entries(drawn) == {STAR: 0.9}
    assert f"'{STAR}' was applied to the model again" in comments(webui)
    webui.draw(PROMPT)
    assert comments(webui) == ""


@pytest.mark.parametrize("where", ["prompt", "model"])
def test_a_plot_over_strengths_gives_a_picture_for_each(webui: WebUI, where: str) -> None:
    """Of the patch in every picture and of that in the weights, where the plot's strength is that of the whole."""
    if where == "model":
        put(webui, STAR, 0.25)
    options = always([STAR]) if where == "prompt" else {}
    cells = plot(webui, ("[Forget Concept] Strength", "0, 1"), **options)
    assert len(cells) >= 2
    *_, without, with_it = cells
    assert without != with_it
    for one in webui.get(f"{PREFIX}/active"):
        webui.post(f"{PREFIX}/patches/{one['name']}/remove", {})
    plain, whole = webui.draw(PROMPT), webui.draw(PROMPT, **always([STAR], 1.0))
    change = distance(plain.pixels, whole.pixels)
    assert distance(without, plain.pixels) < 0.02 * change
    assert distance(with_it, whole.pixels) < 0.02 * change


def test_a_plot_over_patches(webui: WebUI) -> None:
    *_, without, star, moon = plot(webui, ("[Forget Concept] Patch", f"None, {STAR}, {MOON}"))
    assert without == webui.draw(PROMPT).pixels
    assert star == webui.draw(PROMPT, **always([STAR])).pixels
    assert moon == webui.draw(PROMPT, **always([MOON])).pixels


@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("Strength", "0, 1", "has no patch"),
        ("Strength", "0, 11", "must be from -10 to 10"),
        ("Patch", "nothing", "There is no patch 'nothing'"),
    ],
)
def test_a_plot_that_cannot_be_drawn_says_why(webui: WebUI, axis: str, values: str, words: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        plot(webui, (f"[Forget Concept] {axis}", values))
    # Forge calls it message
    assert words in " ".join(map(str, json.loads(raised.value.read()).values()))
