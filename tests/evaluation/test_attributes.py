"""Attributes that the probe does not see are told right on drawn pictures, before and after the autoencoder."""

from __future__ import annotations

import pytest
import torch

from forget_concept.core import mini
from forget_concept.core.evaluation.attributes import ATTRIBUTE_CUES, shows_attribute
from forget_concept.core.mini import vocabulary, world


@pytest.fixture(scope="module")
def scenes():
    wearing = [(), ("hat",), ("balloon",)]
    return [
        world.Scene(
            person=vocabulary.PEOPLE[i % 9],
            background=list(vocabulary.BACKGROUNDS)[i % 4],
            attributes=wearing[i // 9 % 3],
            variant=("short", "long")[i // 27 % 2],
            seed=5000 + i,
        )
        for i in range(108)
    ]


@pytest.fixture(scope="module")
def drawn(scenes):
    return torch.stack([torch.from_numpy(world.render(scene)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])


def wrong(sign, scenes, pictures):
    """How many pictures are told wrong, of those the sign is about."""
    seen = shows_attribute(sign, pictures)
    if sign == "short hair":
        return sum(
            s.variant != ("short" if said else "long")
            for s, said in zip(scenes, seen, strict=True)
            if s.person == vocabulary.BIASED_WORD
        )
    return sum((sign in s.attributes) != said for s, said in zip(scenes, seen, strict=True))


@pytest.mark.parametrize("sign", ATTRIBUTE_CUES)
def test_known_attributes_are_told_right(sign, scenes, drawn):
    assert wrong(sign, scenes, drawn) == 0


def test_and_after_the_autoencoder(scenes, drawn):
    model, few = mini.load(), slice(0, 108, 2)
    latents = torch.cat([model.vae.encode(part) for part in drawn[few].split(9)])
    shown = model.decode(latents, batch=9)
    assert {sign: wrong(sign, scenes[few], shown) for sign in ATTRIBUTE_CUES} == dict.fromkeys(ATTRIBUTE_CUES, 0)
