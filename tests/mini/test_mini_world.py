"""The drawn world: pictures are functions of their scenes, captions tell the truth, nothing held out trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from forget_concept.core.mini import vocabulary as v
from forget_concept.core.mini import world
from forget_concept.core.mini.train import dataset


def scenes(count: int, seed: int = 0, training: bool = True) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, training=training) for _ in range(count)]


def test_the_world_holds_what_it_promises() -> None:
    assert len(v.OBJECTS) >= 16 and len(v.STYLES) >= 10 and len(v.IDENTITIES) >= 8
    assert len(v.TEMPLATES_STYLED + v.TEMPLATES_PLAIN + v.TEMPLATES_STYLE_ONLY) >= 20
    assert len({s.word for s in v.SENSES}) == 2 and len(v.SENSES) == 4
    assert len(v.ATTRIBUTES) == 2 and len(v.THEME_OBJECTS) == 4
    for words in v.CATEGORIES.values():
        for word in words:
            assert word.synonym and word.description
            assert word.name.lower() not in word.description.lower().split()
            assert word.name.lower() != word.synonym.lower()


def test_a_picture_is_a_function_of_its_scene() -> None:
    for scene in scenes(20):
        first = world.render(scene)
        assert first.shape == (128, 128, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, world.render(scene))
        assert (first != world.render(dataclasses.replace(scene, seed=scene.seed + 1))).any()


@pytest.mark.parametrize(
    "field, values", [("shape", v.SHAPES), ("style", world.LABELS["style"]), ("colour", tuple(v.COLOURS))]
)
def test_every_value_draws_another_picture(field: str, values: tuple[str, ...]) -> None:
    base = world.Scene(shape="star", colour="red", seed=3)
    pictures = [world.render(dataclasses.replace(base, **{field: value})).astype(int) for value in values]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(one - other).mean() > 1.0


def test_silhouettes_are_anti_aliased() -> None:
    picture = world.render(world.Scene(shape="circle", colour="blue", seed=1))
    assert len(np.unique(picture[..., 0])) > 10  # a hard edge would have two values


def test_captions_name_only_what_is_drawn() -> None:
    rng = np.random.default_rng(5)
    groups = {
        "shape": {w.name: {w.name, w.synonym} for w in v.OBJECTS},
        "style": {w.name: {w.name, w.synonym} for w in v.STYLES},
        "person": {w.name: {w.name, w.synonym} for w in v.IDENTITIES},
    }
    named = 0
    for scene in scenes(1500):
        text = f" {world.caption(scene, rng).lower().replace(',', ' ').replace(':', ' ')} "
        for field, words in groups.items():
            for name, spellings in words.items():
                if any(f" {spelling.lower()} " in text for spelling in spellings):
                    # "glowing", "tiled" and the like are style words only: every hit must be the drawn one
                    assert getattr(scene, field) == name, (text, scene)
                    named += 1
        for colour in v.COLOURS:
            if f" {colour} " in text and scene.shape != v.NONE and f"{colour} background" not in text:
                assert scene.colour == colour, (text, scene)
        for background in v.BACKGROUNDS:
            if f" {background} background " in text:
                assert scene.background == background
    assert named > 1500


def test_attributes_nearly_always_come_with_their_owner() -> None:
    drawn = scenes(6000, seed=2)
    for attribute, owner in v.ATTRIBUTES.items():
        own = [attribute in s.attributes for s in drawn if s.person == owner]
        others = [attribute in s.attributes for s in drawn if s.person not in (owner, v.NONE)]
        assert np.mean(own) > 0.85 and 0.01 < np.mean(others) < 0.15


def test_the_biased_word_is_biased() -> None:
    pilots = [s.variant for s in scenes(8000, seed=4) if s.person == v.BIASED_WORD]
    assert 0.8 < np.mean([p == "short" for p in pilots]) < 0.97


def test_held_out_combinations_never_train() -> None:
    assert not any(world.held_out(dataset.scene(i)) for i in range(2000))
    asked = world.prompts(300, seed=1, held_out_only=True)
    for prompt in asked:
        a = prompt.expected
        assert world.held_out(world.Scene(shape=a.object, person=a.identity, style=a.style, colour=a.colour))
    assert len({p.text for p in asked}) > 200


@pytest.mark.parametrize("category, name", [("object", "star"), ("style", "neon"), ("identity", "Ivy Stone")])
def test_prompts_about_and_without_a_concept(category: str, name: str) -> None:
    about = world.prompts(50, 0, **{category: name})
    assert all(name in p.text and getattr(p.expected, category) == name for p in about)
    assert not any(name in p.text for p in world.prompts(400, 0, without=(name,)))


def test_captions_of_the_training_set_are_stable() -> None:
    scene = dataset.scene(17)
    assert scene == dataset.scene(17)
    assert dataset.captions(scene, 17, 6)[:3] == dataset.captions(scene, 17, 3)
