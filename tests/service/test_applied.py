"""Patches that a checkpoint lost when it was loaded again: named, and restored on request."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakewebui import FakeWebui
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.formats.kohya import save
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service import html
from forget_concept.core.service.applied import AppliedPatches, DroppedPatch
from forget_concept.core.service.errors import NotFoundError
from forget_concept.core.service.host_interface import ActivePatch
from forget_concept.core.service.patch_store import PatchStore

FIRST, SECOND = "embedded.safetensors [0000]", "other.safetensors [1111]"


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return mini.load()


@pytest.fixture(scope="module")
def patch(model: LatentDiffusion) -> Patch:
    return fit(model, ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon",)))


@pytest.fixture()
def host(model: LatentDiffusion, tmp_path: Path) -> FakeWebui:
    return FakeWebui(model, tmp_path)


@pytest.fixture()
def store(host: FakeWebui, patch: Patch) -> PatchStore:
    for name in ("no_star", "another"):
        save(patch, host.lora_folder() / f"{name}.safetensors")
    return PatchStore(host)


def dropped(store: PatchStore) -> list[tuple[str, float, bool]]:
    return [(one.name, one.strength, one.same) for one in store.dropped()]


def test_a_checkpoint_that_is_loaded_again_has_lost_its_patches(host: FakeWebui, store: PatchStore) -> None:
    store.apply("no_star", 0.5)
    store.apply("another", 1.0)
    assert dropped(store) == []
    host.load(SECOND)
    assert dropped(store) == [("no_star", 0.5, False), ("another", 1.0, False)]
    host.load(FIRST)
    assert dropped(store) == [("no_star", 0.5, True), ("another", 1.0, True)]
    assert [one.name for one in store.apply_again()] == ["no_star", "another"]
    assert [(one.name, one.strength) for one in host.active()] == [("no_star", 0.5), ("another", 1.0)]
    assert dropped(store) == []
    for name in ("no_star", "another"):
        store.remove(name)


def test_what_the_user_removed_is_not_dropped(host: FakeWebui, store: PatchStore) -> None:
    store.apply("no_star", 0.5)
    store.remove("no_star")
    host.load(FIRST)
    assert dropped(store) == []
    store.apply("no_star", 0.5)
    host.load(FIRST)
    store.remove("no_star")  # it is no longer in the weights: struck off
    assert dropped(store) == []
    with pytest.raises(NotFoundError, match="'no_star' is not in the loaded model"):
        store.remove("no_star")
    store.apply("no_star", 0.5)
    host.load(FIRST)
    store.dismiss_dropped()
    assert dropped(store) == [] and host.active() == []


def test_a_dropped_patch_follows_its_file(host: FakeWebui, store: PatchStore) -> None:
    store.apply("no_star", 0.5)
    store.apply("another", 0.5)
    host.load(FIRST)
    store.rename("no_star", "renamed")
    store.delete("another")
    assert dropped(store) == [("renamed", 0.5, True)]
    store.apply_again()
    assert [one.name for one in host.active()] == ["renamed"]
    store.remove("renamed")


def test_before_a_picture_only_the_checkpoint_s_own_return(host: FakeWebui, store: PatchStore) -> None:
    store.apply("no_star", 0.5)
    host.load(SECOND)
    store.apply("another", 0.7)
    host.load(SECOND)
    assert [one.name for one in store.apply_again_for_picture()] == ["another"]
    assert dropped(store) == [("no_star", 0.5, False)]
    # to another checkpoint on request only
    store.apply_again()
    assert [one.name for one in host.active()] == ["another", "no_star"]
    for name in ("no_star", "another"):
        store.remove(name)


def test_nothing_is_dropped_while_no_checkpoint_is_loaded(host: FakeWebui, store: PatchStore) -> None:
    store.apply("no_star", 0.5)
    host.load(FIRST)
    host.loaded = None
    assert dropped(store) == []


def test_a_patch_that_something_else_overwrote_is_dropped_too() -> None:
    applied = AppliedPatches()
    applied.put("a", "no_star", 0.5)
    applied.put("b", "no_star", 0.8)
    assert applied.dropped("a", [ActivePatch("no_star", 0.5, True)]) == []
    assert applied.dropped("a", [ActivePatch("no_star", 0.5, False)]) == [DroppedPatch("no_star", 0.5, "a", True)]
    assert applied.dropped("b", []) == [DroppedPatch("no_star", 0.8, "b", True)]


def test_the_badge_says_what_is_in_the_model_and_what_was_lost() -> None:
    lost = DroppedPatch("no_<moon>", 1.0, "a", True)
    shown = html.badge([ActivePatch("no_star", 0.5, True), ActivePatch("gone", 1.0, False)], [lost], False)
    assert "no_star 0.5" in shown and "gone" not in shown
    assert "no_&lt;moon&gt;" in shown and 'data-press="forget_concept_again"' in shown
    assert "without it until you apply it again" in shown
    assert "The next picture applies it again" in html.badge([], [lost], True)
    empty = html.badge([], [], False)
    assert "Forget Concept" not in empty and "button" not in empty
