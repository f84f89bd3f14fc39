"""Contents of a report: plain values in dataclasses, independent of how they were measured.

Every part is optional; the report lists the parts that were not measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import RequestError
from ...mini.vocabulary import NONE
from ...models.latent_diffusion import LatentDiffusion
from ...patch.patch import Patch
from ...version import VERSION
from ..attention_pictures import AttentionPair
from ..intervals import Score
from ..outcomes import Disagreement, Outcome
from ..scores import PATCHED, Evaluation
from ..stress import ImageToImage, StrengthScores, WordingScores

__all__ = [
    "Attack",
    "Drift",
    "ErosionStep",
    "Grid",
    "KindScores",
    "MScore",
    "Metric",
    "Pair",
    "PatchFacts",
    "Provenance",
    "Report",
    "grids",
]

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images ``(3, H, W)``, uint8, of the same prompt and seed, without and with the patch.

    ``before_seen`` and ``after_seen`` are the judge's labels as text, ``None`` if the images were not classified.
    """

    prompt: str
    before: Tensor
    after: Tensor
    seed: int | None = None
    before_seen: str | None = None
    after_seen: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "before_seen": self.before_seen,
            "after_seen": self.after_seen,
        }


@dataclass(frozen=True, eq=False)
class Grid:
    """Image pairs of one concept, with target prompts (``about="target"``) or retain prompts (``about="kept"``)."""

    concept: str
    about: Literal["target", "kept"]
    pairs: tuple[Pair, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"concept": self.concept, "about": self.about, "pairs": [pair.as_dict() for pair in self.pairs]}


def grids(evaluation: Evaluation) -> tuple[Grid, ...]:
    """Return the examples of an evaluation as grids; an empty group is omitted."""
    groups: tuple[tuple[Literal["target", "kept"], Sequence[Any]], ...] = (
        ("target", evaluation.target_examples),
        ("kept", evaluation.kept_examples),
    )
    return tuple(
        Grid(
            evaluation.concept,
            about,
            tuple(
                Pair(
                    example.prompt,
                    example.before.picture,
                    example.after.picture,
                    example.seed,
                    _seen(example.before.labels),
                    _seen(example.after.labels),
                )
                for example in examples
            ),
        )
        for about, examples in groups
        if examples
    )


def _seen(labels: Any) -> str:
    """A judge's labels as text."""
    found = labels if isinstance(labels, Mapping) else vars(labels)
    words = [str(name) for name in found.values() if name not in (None, NONE)]
    return ", ".join(words) or "nothing known"


@dataclass(frozen=True)
class KindScores:
    """UA of one concept over prompts of one ``kind`` (plain, compositional, paraphrased, indirect), by variant."""

    concept: str
    kind: str
    ua: Mapping[str, Score]

    def as_dict(self) -> dict[str, Any]:
        return {"concept": self.concept, "kind": self.kind, "ua": {k: s.as_dict() for k, s in self.ua.items()}}


@dataclass(frozen=True)
class Attack:
    """Success of an attack on the unedited model (``before``, if measured) and on the patched model (``after``).

    ``budget`` describes its cost as text; ``prompts`` are its strongest prompts.
    """

    name: str
    concept: str
    before: Score | None
    after: Score
    budget: str
    prompts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "concept": self.concept,
            "before": None if self.before is None else self.before.as_dict(),
            "after": self.after.as_dict(),
            "budget": self.budget,
            "prompts": list(self.prompts),
        }


@dataclass(frozen=True)
class MScore:
    """M-Score (Forget-Me-Not, arXiv 2303.17591) of one concept; ``forgotten`` is false for a retained concept."""

    concept: str
    before: float
    after: float
    forgotten: bool = True

    def __post_init__(self) -> None:
        _finite(f"M-Score of '{self.concept}'", self.before, self.after)

    def as_dict(self) -> dict[str, Any]:
        return {"concept": self.concept, "before": self.before, "after": self.after, "forgotten": self.forgotten}


@dataclass(frozen=True)
class Metric:
    """One metric of image quality or similarity (FID, KID, CLIP score, LPIPS, ...) by variant, over ``n`` images.

    ``better`` tells whether lower or higher values are better, ``note`` describes what is compared, and ``errors`` are
    standard errors, if known.
    """

    name: str
    values: Mapping[str, float]
    n: int
    better: Literal["lower", "higher"]
    note: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _finite(self.name, *self.values.values(), *self.errors.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "values": dict(self.values),
            "n": self.n,
            "better": self.better,
            "note": self.note,
            "errors": dict(self.errors),
        }


@dataclass(frozen=True)
class Drift:
    """Weight change of a patch: ``values`` by site or projection, and the ``measure`` as text."""

    measure: str
    values: Mapping[str, float]

    def __post_init__(self) -> None:
        _finite(self.measure, *self.values.values())

    def as_dict(self) -> dict[str, Any]:
        return {"measure": self.measure, "values": dict(self.values)}


@dataclass(frozen=True)
class ErosionStep:
    """Retention after the ``step``-th request (from 1), which forgot ``concept``, and erasure by all so far."""

    step: int
    concept: str
    kept: Score
    forgotten: Score | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "concept": self.concept,
            "kept": self.kept.as_dict(),
            "forgotten": None if self.forgotten is None else self.forgotten.as_dict(),
        }


@dataclass(frozen=True)
class PatchFacts:
    """Metadata of a patch; ``request`` and ``settings`` are empty for patches of other programs."""

    strength: float
    layers: int
    rank: int
    nbytes: int
    file: str | None = None
    concepts: tuple[str, ...] = ()
    method: str | None = None
    preset: str | None = None
    seed: int | None = None
    version: str | None = None
    base_model: str | None = None
    text_layer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, patch: Patch, strength: float = 1.0, file: str | None = None) -> PatchFacts:
        """Read the metadata of a patch; ``file`` is its file name without the folder."""
        about = patch.about
        return cls(
            strength,
            len(patch),
            patch.rank,
            patch.nbytes,
            file,
            about.concepts or (),
            about.method,
            about.preset,
            about.seed,
            about.version,
            about.base_model,
            about.text_layer,
            about.settings or {},
            {} if about.request is None else json.loads(about.request.to_json()),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "strength": self.strength,
            "concepts": list(self.concepts),
            "method": self.method,
            "preset": self.preset,
            "seed": self.seed,
            "version": self.version,
            "base_model": self.base_model,
            "text_layer": self.text_layer,
            "layers": self.layers,
            "rank": self.rank,
            "bytes": self.nbytes,
            "settings": dict(self.settings),
            "request": dict(self.request),
        }


@dataclass(frozen=True)
class Provenance:
    """Provenance of a measurement: model, patches, versions and date (ISO 8601), sufficient to reproduce it.

    ``measured`` contains the evaluation's settings (images per cell, seed, steps, ...).
    """

    model: str
    model_hash: str
    patches: tuple[PatchFacts, ...]
    measured: Mapping[str, str | int | float | bool | None]
    versions: Mapping[str, str]
    date: str

    @classmethod
    def of(
        cls,
        model: LatentDiffusion,
        patches: Sequence[PatchFacts],
        measured: Mapping[str, str | int | float | bool | None],
        date: datetime | None = None,
    ) -> Provenance:
        """Create the provenance of a measurement on this machine, now or at ``date``."""
        moment = (date or datetime.now(timezone.utc)).isoformat(timespec="seconds")
        return cls(model.name, model.model_hash, tuple(patches), dict(measured), _versions(model), moment)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_hash": self.model_hash,
            "patches": [patch.as_dict() for patch in self.patches],
            "measured": dict(self.measured),
            "versions": dict(self.versions),
            "date": self.date,
        }


def _versions(model: LatentDiffusion) -> dict[str, str]:
    found = {"forget-concept": VERSION, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not every host has diffusers
    device = model.device
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found


@dataclass(frozen=True, eq=False)
class Report:
    """All results of one evaluation.

    ``timings`` are seconds by stage. ``left_out`` gives the reason for each requested part that could not be measured.

    Raises:
        RequestError: If nothing was measured, the title is empty, or a value is not finite.
    """

    title: str
    provenance: Provenance
    evaluations: tuple[Evaluation, ...] = ()
    by_kind: tuple[KindScores, ...] = ()
    attacks: tuple[Attack, ...] = ()
    m_scores: tuple[MScore, ...] = ()
    metrics: tuple[Metric, ...] = ()
    drift: Drift | None = None
    erosion: tuple[ErosionStep, ...] = ()
    pictures: tuple[Grid, ...] = ()
    attention: tuple[AttentionPair, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    second_judge: tuple[Disagreement, ...] = ()
    wordings: tuple[WordingScores, ...] = ()
    strengths: tuple[StrengthScores, ...] = ()
    image_to_image: tuple[ImageToImage, ...] = ()

    # names of the parts in the list of missing ones
    PARTS = {
        "evaluations": "what is forgotten and kept (UA, IRA, CRA)",
        "by_kind": "kinds of prompts",
        "outcomes": "what is drawn in the concept's place",
        "second_judge": "a second judge",
        "wordings": "held-out wordings",
        "strengths": "lower strengths",
        "image_to_image": "image to image",
        "attacks": "attacks",
        "m_scores": "M-Score",
        "metrics": "picture quality (FID, KID, CLIP score, LPIPS)",
        "drift": "drift of the weights",
        "erosion": "erosion over a sequence of requests",
        "pictures": "pictures before and after",
        "attention": "attention pictures",
    }

    def __post_init__(self) -> None:
        if not self.measured:
            raise RequestError("There is nothing to report because nothing was measured: measure at least one part.")
        if not self.title.strip():
            raise RequestError("The report has no title: give it one.")
        for evaluation in self.evaluations:
            if PATCHED not in evaluation.scores:
                raise RequestError(f"The evaluation of '{evaluation.concept}' has no scores of the patched model.")
            _finite(f"drift of '{evaluation.concept}'", *evaluation.drift.values())
        for where, score in self._scores():
            _finite(where, score.value, score.low, score.high)
        _finite("timings", *self.timings.values())

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the parts that were measured."""
        return tuple(name for name in self.PARTS if getattr(self, name))

    @property
    def not_measured(self) -> tuple[str, ...]:
        """Names of the parts that were not measured."""
        return tuple(name for name in self.PARTS if not getattr(self, name))

    def _scores(self) -> list[tuple[str, Score]]:
        found = [
            (f"{variant} of '{one.concept}'", score)
            for one in self.evaluations
            for variant, scores in one.scores.items()
            for score in (scores.ua, scores.ira, scores.cra, scores.cra_target)
        ]
        found += [(f"{one.kind} of '{one.concept}'", s) for one in self.by_kind for s in one.ua.values()]
        found += [(f"attack '{one.name}'", s) for one in self.attacks for s in (one.before, one.after) if s is not None]
        found += [
            (f"wording '{one.wording}' of '{one.concept}'", s)
            for one in self.wordings
            for s in (one.shown, one.forgotten, one.kept)
            if s is not None
        ]
        found += [(f"strength {one.strength:g}", s) for one in self.strengths for s in (one.ua, one.ira)]
        found += [
            (f"'{one.name}' kept beside '{target.concept}'", one.kept)
            for target in self.evaluations
            for one in target.retained
            if one.kept is not None
        ]
        found += [(f"step {one.step}", s) for one in self.erosion for s in (one.kept, one.forgotten) if s is not None]
        return found


def _finite(where: str, *values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise RequestError(f"The report cannot hold {value} as the value of {where}: measure it again.")
