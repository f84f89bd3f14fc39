"""Stress tests of the default method on the embedded model: `python benchmarks/stress.py`.

Each concept is forgotten by `uce` with its preset `tuned`, with a replacement and without one, and without a preserve
list: what is kept, is kept by the preset's everyday words, none of which the world has. A row of `stress.csv` is one
patch at one strength. Prompts are held-out wordings (`core/evaluation/wordings.py`), whose words no fit uses.

- `shown`, `shown_second`: share of the `n` pictures of prompts that name the concept which show it, by the probe and by
  the second probe (`core/mini/second_probe.py`); `shown_unedited`: by the probe, of the unedited model's;
- `kept`: retain accuracy relative to the unedited model over the `n_kept` pictures of prompts about all others;
- `lowest`, `lowest_kept`: the concept that is kept least, and its share; `lowest_n`: its pictures;
- `lowest_wording`, `lowest_wording_kept`: the same of the wordings, except those that the unedited model follows in
  less than one picture of ten;
- `kept_of_its_kind`, `lowest_wording_of_its_kind`: of the concepts of its category alone.

Pictures of the retain set are drawn at strength 1 alone. Existing rows are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import SharedSampleCache, Table
from rich.console import Console

from forget_concept.core import mini
from forget_concept.core.evaluation import Question, SamplingSettings, Score, Variant
from forget_concept.core.evaluation.retention import lowest, retained_scores
from forget_concept.core.evaluation.wordings import WORDINGS, wording_questions
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini.second_probe import load_second_probe
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.images import from_bytes
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

CONCEPTS = (
    Concept("Ivy Stone", "identity", "Mira Vale"),
    Concept("crown", "object", "heart"),
    Concept("comic", "style", "striped"),
    Concept("Zuri Okoye", "identity", "Lena Frost"),
    Concept("cup", "object", "house"),
    Concept("star", "object", "circle"),
)
STRENGTHS = (1.0, 0.7, 0.5)
KEY = ["model", "method", "preset", "concept", "replacement", "strength", "n", "n_kept"]
COLUMNS = ["model", "method", "preset", "category", "concept", "replacement", "strength"]
COLUMNS += ["shown_unedited", "shown", "shown_second", "n", "kept", "n_kept", "lowest", "lowest_kept", "lowest_n"]
COLUMNS += ["lowest_wording", "lowest_wording_kept", "kept_of_its_kind", "lowest_wording_of_its_kind"]
FOLLOWED = 0.1


def questions(concept: Concept, target: int, kept: int) -> tuple[list[Question], list[Question]]:
    """Those that name the concept, and those about every other one."""
    names = {kind: [word.name for word in found if word.name != concept.name] for kind, found in CATEGORIES.items()}
    about = wording_questions(concept.name, concept.kind, target, 0, names)
    others = [q for kind in names for name in names[kind] for q in wording_questions(name, kind, kept, 0, names)]
    return about, others


def by_wording(asked: Sequence[Question], before: Sequence[Any], after: Sequence[Any]) -> tuple[float, str, float]:
    """Retention over all wordings, and the wording that keeps least with its share."""
    rows = [(q.kind, q.is_correct(was), q.is_correct(now)) for q, was, now in zip(asked, before, after, strict=True)]
    shares = {}
    for wording in WORDINGS:
        found = [(was, now) for kind, was, now in rows if kind == wording]
        if sum(was for was, _ in found) >= FOLLOWED * len(found) and any(was for was, _ in found):
            shares[wording] = sum(now for _, now in found) / sum(was for was, _ in found)
    least = min(shares, key=lambda wording: shares[wording])
    return Score.ratio([now for *_, now in rows], [was for _, was, _ in rows]).value, least, shares[least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, default=13, help="pictures of the concept in each of eight wordings")
    parser.add_argument("--kept", type=int, default=1, help="pictures of every other concept in each wording")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps")
    parser.add_argument("--concept", action="append", help="only this concept; repeatable")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("stress.csv"))
    options = parser.parse_args()
    console = Console(stderr=True)
    table = Table(options.out, COLUMNS, KEY)
    model, probe, second = mini.load(), mini.load_probe(), load_second_probe()
    cache = SharedSampleCache(model, probe, SamplingSettings(steps=options.steps))

    def images(variant: Variant, asked: Sequence[Question]) -> list[Any]:
        return cache.get(variant, [question.picture for question in asked])

    for concept in CONCEPTS:
        if options.concept and concept.name not in options.concept:
            continue
        target, others = questions(concept, options.target, options.kept)
        for replacement in (concept.replacement, None):
            patch = fit(model, plan_request(ForgetRequest((Concept(concept.name, concept.kind, replacement),))))
            for strength in STRENGTHS:
                row: dict[str, Any] = {
                    "model": model.name,
                    "method": "uce",
                    "preset": "tuned",
                    "category": concept.kind,
                    "concept": concept.name,
                    "replacement": replacement or "",
                    "strength": strength,
                    "n": len(target),
                    "n_kept": len(others) if strength == 1 else 0,
                }
                if table.has(row):
                    continue
                variant, unedited = Variant(((patch, strength),)), Variant()
                asked = [*target, *(others if strength == 1 else ())]
                for one in (variant, unedited):
                    cache.request(one, [question.picture for question in asked])
                cache.generate()
                seen = second.classify(from_bytes(torch.stack([image.picture for image in images(variant, target)])))
                row |= {name: None for name in COLUMNS if name not in row}
                row |= {
                    "shown_unedited": _share(target, images(unedited, target)),
                    "shown": _share(target, images(variant, target)),
                    "shown_second": Score.share([getattr(one, concept.kind) == concept.name for one in seen]).value,
                }
                if strength == 1:
                    was, now = images(unedited, others), images(variant, others)
                    kept, wording, share = by_wording(others, was, now)
                    same = [i for i, question in enumerate(others) if question.category == concept.kind]
                    own = by_wording(*([part[i] for i in same] for part in (others, was, now)))
                    least = lowest(retained_scores(others, was, now), enough=1)
                    row |= {
                        "kept": kept,
                        "lowest_wording": wording,
                        "lowest_wording_kept": share,
                        "kept_of_its_kind": own[0],
                        "lowest_wording_of_its_kind": own[2],
                    }
                    if least is not None and least.kept is not None:
                        row |= {"lowest": least.name, "lowest_kept": least.kept.value, "lowest_n": least.n}
                table.append(row)
                console.print({name: value for name, value in row.items() if name not in ("model", "method", "preset")})
            cache.release()


def _share(asked: Sequence[Question], found: Sequence[Any]) -> float:
    return Score.share([question.is_correct(image) for question, image in zip(asked, found, strict=True)]).value


if __name__ == "__main__":
    main()
