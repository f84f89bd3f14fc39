"""Themes are requests that can be made, and the embedded world's own is the one its pictures are measured by."""

from __future__ import annotations

import pytest
from tiny import fit

from forget_concept.core.errors import RequestError
from forget_concept.core.mini import vocabulary
from forget_concept.core.prompts.themes import THEMES, theme
from forget_concept.core.request.request import ForgetRequest


@pytest.mark.parametrize("name", THEMES)
def test_every_theme_is_a_request_that_makes_sense(name):
    ForgetRequest(theme(name, "tree"), (), "forget_me_not", "theme").check()
    assert len(theme(name)) > 3


def test_the_embedded_worlds_theme_is_whole():
    assert set(vocabulary.THEME_OBJECTS) | {vocabulary.THEME} == {concept.name for concept in theme("sea")}


def test_an_unknown_theme_is_said():
    with pytest.raises(RequestError, match=r"'fun' is not known.*nudity"):
        theme("fun")


def test_a_theme_goes_in_one_training(model):
    quick = {"steps": 2, "n_images": 1, "sample_steps": 1, "batch_size": 2, "rank": 2}
    patch = fit(model, ForgetRequest(theme("sea", "star"), ("tree",), "forget_me_not", "theme", quick))
    assert patch.rank == 2 and patch.max_abs() > 0
    with pytest.raises(RequestError, match=r"'fish'.*replacement"):
        fit(model, ForgetRequest(theme("sea"), ("tree",), "forget_me_not", "theme", quick))
