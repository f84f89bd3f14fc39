"""Patches in the loaded model's weights, beside the webui's own LoRAs: in force if they say so, out without a trace."""

from __future__ import annotations

import threading

import pytest
from webuihost import ProbeError, WebUI

PROMPT = "a photo of a red star"


@pytest.fixture(scope="module")
def patches(webui: WebUI) -> list[str]:
    made = {"star": "no_star", "moon": "no_moon", "heart": "no_heart"}
    for concept, name in made.items():
        webui.probe("forget", name=name, concepts=[[concept, "circle"]], preserve=["house"])
    return list(made.values())


@pytest.fixture(autouse=True)
def clean(webui: WebUI, patches: list[str]):
    """Each test begins with the checkpoint as it is on the disk, and leaves it so."""
    webui.draw("")  # so that no LoRA of the test before is left in the weights
    before, model = webui.probe("state"), webui.probe("model")
    yield
    for name, _, _ in webui.probe("active")["active"]:
        webui.probe("remove", name=name)
    webui.draw("")
    after = webui.probe("state")
    assert after["weights"] == before["weights"]
    if webui.probe("model")["object"] == model["object"]:
        assert after["state"] == before["state"]


def names(told: dict[str, object]) -> list[list[object]]:
    return told["active"]  # type: ignore[return-value]


def distance(a: bytes, b: bytes) -> float:
    """The mean difference of two pictures, in 1/255."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def test_it_is_in_force_at_once_and_out_without_a_trace(webui: WebUI, patches: list[str]) -> None:
    plain, typed = webui.draw(PROMPT), webui.draw(f"{PROMPT} <lora:no_star:1>")
    webui.draw("")
    assert names(webui.probe("apply", patch="no_star")) == [["no_star", 1.0, True]]
    applied = webui.draw(PROMPT)
    apart, changed = distance(applied.pixels, typed.pixels), distance(applied.pixels, plain.pixels)
    print(f"{apart:.4f} of 255 from the typed one, {changed:.4f} from the one without")
    # the same edit, but for the rounding of the last bits
    assert apart < 0.02 * changed
    assert names(webui.probe("remove", name="no_star")) == []
    assert webui.draw(PROMPT).pixels == plain.pixels


def test_strengths_stack_and_come_out_in_any_order(webui: WebUI, patches: list[str]) -> None:
    webui.probe("apply", patch="no_moon", strength=0.7)
    moon = webui.draw(PROMPT)
    webui.probe("apply", patch="no_star")
    webui.probe("apply", patch="no_heart", strength=-0.4)
    assert [name for name, _, _ in names(webui.probe("active"))] == ["no_moon", "no_star", "no_heart"]
    three = webui.draw(PROMPT)
    assert three.pixels != moon.pixels
    # the same name again replaces it
    webui.probe("apply", patch="no_star", strength=0.5)
    assert ["no_star", 0.5, True] in names(webui.probe("active"))
    assert webui.draw(PROMPT).pixels != three.pixels
    webui.probe("remove", name="no_star")
    webui.probe("remove", name="no_heart")
    assert webui.draw(PROMPT).pixels == moon.pixels


@pytest.mark.parametrize("when", ["around", pytest.param("between", marks=pytest.mark.long)])
def test_a_lora_in_the_prompt_neither_loses_it_nor_is_baked_in(webui: WebUI, patches: list[str], when: str) -> None:
    """The LoRA's leftovers are in the weights when the patch comes and when it goes, or only in between."""
    plain = webui.draw(PROMPT)
    with_lora = webui.draw(f"{PROMPT} <lora:no_moon:1>")
    if when == "between":
        webui.draw("")
    webui.probe("apply", patch="no_star")
    both = webui.draw(f"{PROMPT} <lora:no_moon:1>")
    alone = webui.draw(PROMPT)
    assert names(webui.probe("active")) == [["no_star", 1.0, True]]
    # a LoRA came and went, and the patch is still what it was
    webui.draw(f"{PROMPT} <lora:no_heart:1>")
    assert names(webui.probe("active")) == [["no_star", 1.0, True]]
    assert webui.draw(PROMPT).pixels == alone.pixels
    assert both.pixels not in (alone.pixels, with_lora.pixels, plain.pixels)
    if when == "around":
        webui.draw(f"{PROMPT} <lora:no_moon:1>")
    webui.probe("remove", name="no_star")
    assert webui.draw(f"{PROMPT} <lora:no_moon:1>").pixels == with_lora.pixels
    assert webui.draw(PROMPT).pixels == plain.pixels


def test_a_hundred_times_in_and_out_among_random_pictures(webui: WebUI, patches: list[str]) -> None:
    """``clean`` holds the weights to what they were, bit for bit."""
    told = webui.probe("cycles", count=100, patches=patches, tags=patches[:2], seed=0)
    assert told["active"] == 0
    assert told["applied"] == 100 and told["removed"] > 50
    assert told["drawn"] > 12


def test_the_list_holds_while_pictures_are_drawn(webui: WebUI, patches: list[str]) -> None:
    """The host then writes LoRAs into the very weights that are compared, and takes them out."""
    webui.probe("apply", patch="no_star")
    drawn: list[bytes] = []

    def draw() -> None:
        for prompt in (f"{PROMPT} <lora:no_moon:1>", PROMPT, f"{PROMPT} <lora:no_heart:0.5>"):
            drawn.append(webui.draw(prompt).pixels)

    drawing = threading.Thread(target=draw)
    drawing.start()
    told = []
    while drawing.is_alive():
        told.append(names(webui.probe("active")))
    drawing.join()
    assert len(drawn) == 3 and len(told) > 5
    assert all(one == [["no_star", 1.0, True]] for one in told)


def test_training_sees_the_model_without_it(webui: WebUI, patches: list[str]) -> None:
    plain = webui.probe("forget")
    webui.draw(f"{PROMPT} <lora:no_heart:1>")
    webui.probe("apply", patch="no_star")
    before = webui.probe("state")
    again = webui.probe("forget")
    after = webui.probe("state")
    assert (again["hash"], again["norm"]) == (plain["hash"], plain["norm"])
    assert after == before
    assert names(webui.probe("active")) == [["no_star", 1.0, True]]


def test_weights_changed_by_something_else_are_told(webui: WebUI, patches: list[str]) -> None:
    webui.probe("apply", patch="no_star")
    webui.probe("spoil")
    try:
        assert names(webui.probe("active")) == [["no_star", 1.0, False]]
        if webui.kind == "webui":  # Forge writes from originals of its own
            with pytest.raises(ProbeError, match=r"(?s)PatchError.*Something else has changed.*'no_star'"):
                webui.probe("apply", patch="no_moon")
        # what is not there is only struck off
        assert names(webui.probe("remove", name="no_star")) == []
    finally:
        webui.probe("reload_checkpoint")


def test_weights_changed_in_part_are_not_made_worse(webui: WebUI, patches: list[str]) -> None:
    webui.probe("apply", patch="no_star")
    webui.probe("spoil", sites=1)
    try:
        assert names(webui.probe("active")) == [["no_star", 1.0, False]]
        if webui.kind == "forge":  # it writes from originals of its own
            assert names(webui.probe("remove", name="no_star")) == []
            return
        with pytest.raises(ProbeError, match="cannot be removed exactly: reload the checkpoint"):
            webui.probe("remove", name="no_star")
        with pytest.raises(ProbeError, match="reload the checkpoint"):
            webui.probe("forget")
    finally:
        webui.probe("reload_checkpoint")
    assert names(webui.probe("active")) == []


def test_what_cannot_be_applied_changes_nothing(webui: WebUI, patches: list[str]) -> None:
    webui.probe("apply", patch="no_moon")
    before = webui.probe("state")["weights"]
    with pytest.raises(ProbeError, match="No patch 'no_star' was applied"):
        webui.probe("remove", name="no_star")
    with pytest.raises(ProbeError, match="changes nothing here"):
        webui.probe("apply", patch="no_star", strength=1e-40)
    with pytest.raises(ProbeError, match="must be a finite number"):
        webui.probe("apply", patch="no_star", strength=1e400)
    with pytest.raises(ProbeError, match="another architecture"):
        webui.probe("apply", patch="no_star", wrong="layers")
    with pytest.raises(ProbeError, match="NaN"):
        webui.probe("apply", patch="no_star", wrong="nan")
    assert webui.probe("state")["weights"] == before
    assert names(webui.probe("active")) == [["no_moon", 1.0, True]]


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.long)])
def test_another_checkpoint_is_another_model(webui: WebUI, patches: list[str], in_place: bool) -> None:
    """In an object of its own, and in the same one, which the webui fills with other weights where it can."""
    plain, first = webui.draw(PROMPT), webui.probe("model")
    webui.probe("apply", patch="no_star")
    try:
        webui.probe("checkpoint", name="turned", in_place=in_place)
        second = webui.probe("model")
        assert second["key"] != first["key"] and "turned" in second["title"]
        if webui.kind == "webui":
            assert (second["object"] == first["object"]) is in_place
        assert names(webui.probe("active")) == []
        turned = webui.draw(PROMPT)
        webui.probe("apply", patch="no_star")
        assert names(webui.probe("active")) == [["no_star", 1.0, True]]
        webui.probe("remove", name="no_star")
        assert webui.draw(PROMPT).pixels == turned.pixels
    finally:
        webui.probe("checkpoint", name="forget-concept-mini", in_place=in_place)
    # the weights came from the disk again
    assert names(webui.probe("active")) == []
    assert webui.draw(PROMPT).pixels == plain.pixels
