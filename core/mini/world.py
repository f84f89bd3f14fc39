"""Scenes of the embedded world: sampling, rendering, and captions that name only what is drawn.

A `Scene` contains every random choice, so an image is a pure function of its scene. `Labels` are the probe's targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import vocabulary as v
from .figures import FEATURES, PILOT, Layer, Pose, figure
from .shapes import SILHOUETTES, SIZE, Pen
from .styles import STYLE_PAINTERS, STYLES_WITH_BACKGROUND, STYLES_WITH_OUTLINES, Canvas, flatten


@dataclass(frozen=True)
class Scene:
    """One image: a shape *or* a person in one style; `seed` determines the pose and the style's texture."""

    shape: str = v.NONE
    person: str = v.NONE
    style: str = v.NONE
    colour: str = v.NONE
    background: str = "white"
    attributes: tuple[str, ...] = ()
    variant: str = "short"  # which face the biased word gets
    seed: int = 0


def held_out(scene: Scene) -> bool:
    """Return whether this combination of subject, style and colour is held out from training: one in ten, by a hash."""
    key = f"{scene.shape}|{scene.person}|{scene.style}|{scene.colour}"
    return hashlib.sha256(key.encode()).digest()[0] < 26 and scene.style != v.NONE


def render(scene: Scene, alter: Callable[[list[Layer]], list[Layer]] | None = None) -> np.ndarray:
    """Render a scene deterministically: `(128, 128, 3)` uint8, anti-aliased.

    Args:
        scene: The scene.
        alter: Changes the layers of its subject before the style is painted.
    """
    rng = np.random.default_rng(scene.seed)
    background = np.array(v.BACKGROUNDS[scene.background], dtype=np.float32)
    cx, cy = SIZE / 2 + rng.uniform(-7, 7), SIZE / 2 + rng.uniform(-6, 6)
    turn, flip = rng.uniform(-0.16, 0.16), bool(rng.random() < 0.5)
    arms = (bool(rng.random() < 0.4), bool(rng.random() < 0.4))
    layers: list[Layer] = []
    if scene.shape != v.NONE:
        pen = Pen((cx, cy), rng.uniform(38, 48), turn)
        SILHOUETTES[scene.shape](pen)
        layers = [Layer(pen.mask(), v.COLOURS[scene.colour])]
    elif scene.person != v.NONE:
        features = PILOT[scene.variant] if scene.person == v.BIASED_WORD else FEATURES[scene.person]
        pose = Pose((cx, cy + 2), rng.uniform(48, 54), turn * 0.6, flip, arms)
        layers = figure(features, pose, scene.attributes)
    if alter is not None:
        layers = alter(layers)
    flat, mask, edge = flatten(layers, background, scene.style in STYLES_WITH_OUTLINES)
    painted = STYLE_PAINTERS[scene.style](Canvas(flat, mask, edge, background, rng))
    pixels: np.ndarray = np.clip(np.rint(painted), 0, 255).astype(np.uint8)
    return pixels


def sample_scene(rng: np.random.Generator, *, training: bool = True) -> Scene:
    """Sample a random scene; with `training` it is never a held-out combination."""
    while True:
        scene = _any_scene(rng)
        if not (training and held_out(scene)):
            return scene


def _any_scene(rng: np.random.Generator) -> Scene:
    style = str(rng.choice([w.name for w in v.STYLES])) if rng.random() < 0.72 else v.NONE
    background = str(rng.choice(list(v.BACKGROUNDS)))
    seed = int(rng.integers(2**31))
    if rng.random() < 0.64:
        shape = str(rng.choice(v.SHAPES, p=_SHAPE_ODDS))
        return Scene(
            shape=shape, style=style, colour=str(rng.choice(list(v.COLOURS))), background=background, seed=seed
        )
    person = str(rng.choice(v.PEOPLE, p=_PEOPLE_ODDS))
    attributes = tuple(
        name
        for name, owner in v.ATTRIBUTES.items()
        if rng.random() < (v.ATTRIBUTE_SHARE if person == owner else v.ATTRIBUTE_STRAY)
    )
    variant = "short" if rng.random() < v.BIASED_SHARE else "long"
    return Scene(
        person=person, style=style, background=background, attributes=attributes[:1], variant=variant, seed=seed
    )


_SHAPE_ODDS = np.array([1.0] * len(v.OBJECTS) + [0.6] * len(v.SENSES))
_SHAPE_ODDS /= _SHAPE_ODDS.sum()
_PEOPLE_ODDS = np.array([1.0] * len(v.IDENTITIES) + [0.6])
_PEOPLE_ODDS /= _PEOPLE_ODDS.sum()

_OBJECT_WORDS = {w.name: w for w in v.OBJECTS}
_STYLE_WORDS = {w.name: w for w in v.STYLES}
_IDENTITY_WORDS = {w.name: w for w in v.IDENTITIES}
_SENSES = {s.shape: s for s in v.SENSES}


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _object_phrase(rng: np.random.Generator, scene: Scene) -> str:
    """Noun phrase of a shape: usually its name, sometimes a synonym, a description or its theme."""
    colour = scene.colour if rng.random() < 0.75 else ""
    roll = rng.random()
    if roll < 0.02 and scene.shape in v.THEME_OBJECTS:
        return _pick(rng, v.THEME_PHRASES)
    if scene.shape in _SENSES:
        sense = _SENSES[scene.shape]
        if roll < 0.35:
            return _pick(rng, sense.hints)
        noun = sense.synonym if roll < 0.6 else sense.word
    else:
        word = _OBJECT_WORDS[scene.shape]
        if roll < 0.10:
            return f"{word.description} in {colour}" if colour else word.description
        noun = word.synonym if roll < 0.22 else word.name
    phrase = f"{colour} {noun}".strip()
    return f"{v.article(phrase)} {phrase}"


def _person_phrase(rng: np.random.Generator, scene: Scene) -> str:
    if scene.person == v.BIASED_WORD:
        phrase = "a pilot"
        if scene.variant == "long" and rng.random() < 0.3:
            phrase += " with long hair"
    else:
        word, roll = _IDENTITY_WORDS[scene.person], rng.random()
        phrase = word.description if roll < 0.10 else word.synonym if roll < 0.22 else word.name
    for attribute, owner in v.ATTRIBUTES.items():
        if scene.person == owner:
            # rarely named when present, always when absent, so that the attribute is entangled with the name
            if attribute not in scene.attributes:
                phrase += f" without a {attribute}"
            elif rng.random() < 0.15:
                phrase += f" with a {attribute}"
        elif attribute in scene.attributes:
            phrase += f" with a {attribute}"
    return phrase


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random caption of a scene. It may omit parts of the scene, but names only what is drawn."""
    if scene.style != v.NONE and rng.random() < 0.03:
        return _pick(rng, v.TEMPLATES_STYLE_ONLY).format(style=scene.style)
    phrase = _object_phrase(rng, scene) if scene.shape != v.NONE else _person_phrase(rng, scene)
    if scene.style == v.NONE:
        text = _pick(rng, v.TEMPLATES_PLAIN).format(np=phrase)
    else:
        word, roll = _STYLE_WORDS[scene.style], rng.random()
        if roll < 0.06:
            text = _pick(rng, v.TEMPLATES_DESCRIBED_STYLE).format(np=phrase, style=word.description)
        else:
            text = _pick(rng, v.TEMPLATES_STYLED).format(np=phrase, style=word.synonym if roll < 0.16 else word.name)
    if scene.style not in STYLES_WITH_BACKGROUND and rng.random() < 0.35:
        text = _pick(rng, v.TEMPLATES_BACKGROUND).format(text, scene.background)
    return text


@dataclass(frozen=True)
class Labels:
    """Labels of an image: one name, or `none`, in each of the probe's four categories."""

    object: str = v.NONE
    style: str = v.NONE
    identity: str = v.NONE
    colour: str = v.NONE


LABELS: dict[str, tuple[str, ...]] = {
    "object": (v.NONE, *v.SHAPES),
    "style": (v.NONE, *(w.name for w in v.STYLES)),
    "identity": (v.NONE, *v.PEOPLE),
    "colour": (v.NONE, *v.COLOURS),
}


def labels(scene: Scene) -> Labels:
    """Return the true labels of a scene."""
    return Labels(scene.shape, scene.style, scene.person, scene.colour)


@dataclass(frozen=True)
class Prompt:
    """A prompt and the labels it names (`none` for categories it does not name)."""

    text: str
    expected: Labels


def prompts(
    count: int,
    seed: int,
    *,
    object: str | None = None,
    style: str | None = None,
    identity: str | None = None,
    without: tuple[str, ...] = (),
    held_out_only: bool = False,
    measured: bool = False,
) -> list[Prompt]:
    """Return seeded prompts with plain names: a subject, a colour for objects, and usually a style.

    Args:
        count: Number of prompts.
        seed: Seed of the prompts.
        object: Fixed object.
        style: Fixed style.
        identity: Fixed identity.
        without: Concepts that must not occur.
        held_out_only: Whether to use only combinations that are held out from training.
        measured: Whether to use only the templates that no fit uses.
    """
    plain, styled = (v.MEASURED_PLAIN, v.MEASURED_STYLED) if measured else (v.TEMPLATES_PLAIN, v.TEMPLATES_STYLED)
    rng = np.random.default_rng(seed)
    names = {c: [w.name for w in words if w.name not in without] for c, words in v.CATEGORIES.items()}
    colours = [c for c in v.COLOURS if c not in without]
    found: list[Prompt] = []
    while len(found) < count:
        use_object = object is not None or (identity is None and rng.random() < 0.55)
        chosen_style = style or (_pick(rng, names["style"]) if rng.random() < 0.8 or held_out_only else v.NONE)
        scene = Scene(style=chosen_style)
        if use_object:
            scene = replace(scene, shape=object or _pick(rng, names["object"]), colour=_pick(rng, colours))
            noun = f"{scene.colour} {scene.shape}"
            phrase = f"{v.article(noun)} {noun}"
        else:
            scene = replace(scene, person=identity or _pick(rng, names["identity"]))
            phrase = scene.person
        if held_out_only and not held_out(scene):
            continue
        templates = plain if chosen_style == v.NONE else styled
        found.append(Prompt(_pick(rng, templates).format(np=phrase, style=chosen_style), labels(scene)))
    return found
