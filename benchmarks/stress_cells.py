"""The stress tests of a row of `methods.py`: other wordings, lower strengths, a second classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from forget_concept.core.evaluation import UNEDITED, Score, Variant
from forget_concept.core.evaluation.drawing import LabeledImage, SampleCache
from forget_concept.core.evaluation.metrics import ProbeFeatures, features_of, kid
from forget_concept.core.evaluation.outcomes import disagreement, outcome
from forget_concept.core.evaluation.retention import lowest
from forget_concept.core.evaluation.scores import PATCHED, EvaluationPlan
from forget_concept.core.evaluation.stress import StressSettings, stress_plan, stress_scores
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.images import from_bytes
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept

KEPT_CELLS = ("kept_wordings", "n_kept_wordings", "lowest", "lowest_kept", "lowest_wording")
CELLS = (
    *("shown_unedited", "shown_wordings", "n_wordings", *KEPT_CELLS, "ua_0.5", "ira_0.5", "ua_0.7", "ira_0.7"),
    *("drawn_replacement", "drawn_nothing", "drawn_other", "image_named", "image_empty"),
    *("ua_second", "differ_second", "kid_retrained"),
)
# pictures: 13 of the concept in each of eight wordings, and one of every other concept in each
SETTINGS = StressSettings(target=13, kept=1)


def stress_cells(
    cache: SampleCache,
    plan: EvaluationPlan,
    patches: Sequence[tuple[Patch, float]],
    concept: Concept,
    judge: Any,
    second: Any,
    retrained: Variant | None,
    settings: StressSettings = SETTINGS,
    progress: Any = None,
) -> dict[str, Any]:
    """Measure the cells of one row.

    Args:
        cache: Holds the images of the plan.
        plan: The plan of UA, IRA and CRA, whose variant :data:`PATCHED` is measured.
        patches: That variant's patches; a row without any has no lower strengths.
        concept: The concept with its replacement, if the row has one.
        judge: Judge that labelled the images.
        second: A second classifier; ``None``: its cells stay empty.
        retrained: The model that never knew the concept, for the distance to it; ``None``: the cell stays empty.
        settings: How much to draw.
        progress: Receives progress.
    """
    cells: dict[str, Any] = dict.fromkeys(CELLS)
    names = {kind: [word.name for word in found if word.name != concept.name] for kind, found in CATEGORIES.items()}
    if not patches:
        settings = replace(settings, strengths=())
    tests = stress_plan(plan, patches, names, settings)
    found = stress_scores(cache, tests, settings, {}, progress)
    before, after = (plan.variants[name] for name in (UNEDITED, PATCHED))

    def images(variant: Variant, questions: Sequence[Any]) -> list[LabeledImage]:
        return cache.get(variant, [question.picture for question in questions])

    def correct(variant: Variant, questions: Sequence[Any]) -> list[bool]:
        return [q.is_correct(one) for q, one in zip(questions, images(variant, questions), strict=True)]

    was, now = (correct(variant, tests.kept) for variant in (before, after))
    cells |= {
        "shown_unedited": Score.share(correct(before, tests.target)).value,
        "shown_wordings": Score.share(correct(after, tests.target)).value,
        "n_wordings": len(tests.target),
        "kept_wordings": Score.ratio(now, was).value if any(was) else None,
        "n_kept_wordings": len(tests.kept),
    }
    least = lowest(found.retained, enough=1)
    if least is not None and least.kept is not None:
        cells |= {"lowest": least.name, "lowest_kept": least.kept.value, "lowest_wording": least.wording}
    for one in found.strengths:
        if one.strength in settings.strengths:
            cells |= {f"ua_{one.strength}": one.ua.value, f"ira_{one.strength}": one.ira.value}
    target = plan.cells.target
    drawn = outcome(concept.name, concept.kind, images(after, target), judge, concept.replacement)
    cells |= {"drawn_nothing": drawn.nothing.value, "drawn_other": drawn.other.value}
    if drawn.replacement is not None:
        cells["drawn_replacement"] = drawn.replacement.value
    cells |= {f"image_{one.prompt}": one.after.value for one in found.image_to_image}
    pictures = torch.stack([one.picture for one in images(after, target)])
    if second is not None:
        again = [
            LabeledImage(picture, labels)
            for picture, labels in zip(pictures, second.classify(from_bytes(pictures)), strict=True)
        ]
        other = disagreement(concept.name, concept.kind, PATCHED, images(after, target), again)
        cells |= {"ua_second": other.ua.value, "differ_second": other.differ.value}
    if retrained is not None:
        cache.request(retrained, [question.picture for question in target])
        cache.generate(progress)
        reference = torch.stack([one.picture for one in images(retrained, target)])
        extractor = ProbeFeatures(judge.probe)
        cells["kid_retrained"] = kid(features_of(extractor, pictures), features_of(extractor, reference)).value
    return cells


def filled(row: Mapping[str, Any]) -> bool:
    """Whether a row's cells were measured."""
    return bool(row["shown_wordings"])
