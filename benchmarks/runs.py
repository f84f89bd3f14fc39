"""The runs of `methods.py`: which methods, presets and concepts, and the request of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forget_concept.core.errors import Cancelled, RequestError
from forget_concept.core.evaluation import NEGATIVE, SAFE
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import get, plan_request
from forget_concept.core.mini import world
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.progress import ProgressEvent
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings

NOTHING, RETRAINED = "none", "retrained"
SCALED = "published_scaled"
BASELINES = (NOTHING, NEGATIVE, SAFE, RETRAINED)
PRESETS = ("published", SCALED, "tuned")
# screening uses the first of each category
CONCEPTS = (
    Concept("star", "object", "circle"),
    Concept("neon", "style", "sketch"),
    Concept("Lena Frost", "identity", "Nadia Pell"),
    Concept("fish", "object", "arrow"),
    Concept("watercolour", "style", "dotted"),
    Concept("Bruno Finch", "identity", "Otto Brand"),
    Concept("key", "object", "cup"),
    Concept("comic", "style", "striped"),
    Concept("Zuri Okoye", "identity", "Ivy Stone"),
)
SCREENING = CONCEPTS[:3]
IMAGES = 8
KEY = ["model", "method", "preset", "gradient", "category", "concept", "replacement", "seed", "n"]


@dataclass(frozen=True)
class Run:
    """The run of one row: a method's preset with a gradient rule (``""`` if it has none), a concept and a seed."""

    method: str
    preset: str
    gradient: str
    concept: Concept
    seed: int
    replaced: bool = True

    @property
    def forgets(self) -> bool:
        return self.method not in BASELINES

    def key(self, model: str, count: int) -> dict[str, Any]:
        return {
            "model": model,
            "method": self.method,
            "preset": self.preset,
            "gradient": self.gradient,
            "category": self.concept.kind,
            "concept": self.concept.name,
            "replacement": (self.concept.replacement or "") if self.forgets and self.replaced else "",
            "seed": self.seed,
            "n": count,
        }

    def __str__(self) -> str:
        without = "" if self.replaced else "without a replacement"
        words = (self.method, self.preset, self.gradient, self.concept.name, without, f"seed {self.seed}")
        return " ".join(word for word in words if word)


def planned(
    methods: Sequence[str],
    presets: Sequence[str],
    gradients: Sequence[str],
    concepts: Sequence[Concept],
    seeds: Sequence[int],
) -> list[Run]:
    """All combinations as runs; without ``gradients``, each preset uses its own rule.

    Raises:
        RequestError: If a method or preset is unknown, or a rule is invalid.
    """
    kinds: list[tuple[str, str, str]] = []
    for method in methods:
        if method in BASELINES:
            kinds.append((method, "", ""))
            continue
        for preset in presets:
            if preset == SCALED and preset not in get(method).presets:  # it has no learning rate
                continue
            own = getattr(resolve_settings(get(method), preset, {}), "gradient", "")
            kinds += [(method, preset, rule) for rule in ((gradients or [own]) if own else [""])]
    return [
        Run(*kind, concept, seed, replaced)
        for seed in seeds
        for kind in kinds
        for replaced in ((True, False) if kind[1] == "tuned" else (True,))
        for concept in concepts
        if kind[0] != RETRAINED or concept in SCREENING
    ]


# -- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullestRequest:
    """A request that a method accepts, its inputs, and a note on what was left out or added."""

    request: ForgetRequest
    inputs: Inputs
    note: str


def fullest_request(model: LatentDiffusion, run: Run, preserve: Sequence[str] | None = None) -> FullestRequest:
    """The request with the most options that the method accepts.

    A fit is started and cancelled when it first reports progress, because by then it has validated its inputs. (A
    closed form reports none and completes.)

    Args:
        preserve: The retain set. Default: the other concepts of the category.

    Raises:
        RequestError: The first one, if the method accepts no request.
    """
    first: RequestError | None = None
    for images in (False, True) if get(run.method).takes_images else (False,):
        for replaced, preserved in ((True, True), (False, True), (True, False), (False, False)):
            if replaced and not run.replaced:
                continue
            found = _request_with(run, replaced, preserved, images, preserve)
            try:
                fit(model, plan_request(found.request), _stop, found.inputs)
            except RequestError as error:
                first = first or error
                continue
            except Cancelled:
                pass
            return found
    assert first is not None
    raise first


def _request_with(
    run: Run, replaced: bool, preserved: bool, images: bool, preserve: Sequence[str] | None
) -> FullestRequest:
    concept = run.concept
    names = [word.name for word in CATEGORIES[concept.kind]] if preserve is None else preserve
    others = tuple(name for name in names if name != concept.name)
    request = ForgetRequest(
        (concept if replaced else dataclasses.replace(concept, replacement=None),),
        preserve=others if preserved else (),
        method=run.method,
        preset=run.preset,
        settings={"gradient": run.gradient} if run.gradient else {},
        seed=run.seed,
    )
    inputs = Inputs(images={concept.name: pictures_of(concept, IMAGES, run.seed)} if images else {})
    parts = ((replaced or not run.replaced, "a replacement"), (preserved, "a preserve list"))
    without = [words for kept, words in parts if not kept]
    note = f"without {' and '.join(without)}" if without else ""
    return FullestRequest(request, inputs, "; ".join(filter(None, (note, f"with {IMAGES} pictures" if images else ""))))


def _stop(event: ProgressEvent) -> None:
    raise Cancelled


def pictures_of(concept: Concept, count: int, seed: int) -> torch.Tensor:
    """Rendered pictures ``(count, 3, 128, 128)`` in [-1, 1] of a concept in the embedded model's vocabulary."""
    draws = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = world.sample_scene(draws)
        if concept.kind == "style":
            scene = dataclasses.replace(scene, style=concept.name)
        elif concept.kind == "object":
            colour = scene.colour if scene.colour != NONE else "red"
            scene = dataclasses.replace(scene, shape=concept.name, person=NONE, attributes=(), colour=colour)
        else:
            scene = dataclasses.replace(scene, person=concept.name, shape=NONE, colour=NONE, attributes=())
        found.append(torch.from_numpy(world.render(scene).copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1
