"""A concept that names no replacement is gone all the same, and what is of its kind stays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.evaluation import PATCHED, UNEDITED, EvaluationTarget, SamplingSettings, Variant, evaluate
from forget_concept.core.evaluation.drawing import draw
from forget_concept.core.evaluation.questions import target_questions
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.images import from_bytes
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest


def _others(name: str, kind: str) -> Sequence[str]:
    return [word.name for word in CATEGORIES[kind] if word.name != name]


def test_a_person_is_gone_without_a_replacement_and_a_preserve_list() -> None:
    """Mapped to the prompt without her name, she was still drawn: one person of eight is her by chance."""
    model, probe = mini.load(), mini.load_probe()
    patch = fit(model, ForgetRequest((Concept("Lena Frost", "identity"),)))
    asked = [question.picture for question in target_questions("Lena Frost", 24)]
    shown = []
    for variant in (Variant(), Variant(((patch, 1.0),))):
        pictures = draw(model, asked, variant, SamplingSettings(steps=8, threads=1))
        labels = [label for batch in pictures for label in probe.classify(from_bytes(batch))]
        shown.append(sum(label.identity == "Lena Frost" for label in labels))
    assert shown[0] >= 22 and shown[1] <= 1


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), [("Lena Frost", "identity"), ("Ivy Stone", "identity"), ("star", "object")])
def test_of_a_hundred_pictures_three_at_most_show_it_and_the_rest_stays(name: str, kind: str) -> None:
    model = mini.load()
    patch = fit(model, ForgetRequest((Concept(name, kind),), preserve=tuple(_others(name, kind))))
    target = EvaluationTarget(name, ((patch, 1.0),))
    (found,) = evaluate(model, mini.load_probe(), [target], 100, 0, SamplingSettings(threads=1), baselines=(UNEDITED,))
    scores = found.scores[PATCHED]
    assert scores.ua.value >= 0.97 and scores.ira.value >= 0.97 and scores.cra.value >= 0.97
