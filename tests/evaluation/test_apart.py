"""What a fit uses by default and what is measured are apart, so that no figure measures what was fitted by name."""

from __future__ import annotations

import re

import pytest

from forget_concept.core.evaluation.questions import CATEGORIES, retain_questions, target_questions
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.methods.text_columns import common_prompts
from forget_concept.core.mini import vocabulary
from forget_concept.core.prompts.everyday import COMMON, CONTEXTS
from forget_concept.core.prompts.pairs import GRAMMARS, mentions, prompt_pairs
from forget_concept.core.request.concept import Concept, templates
from forget_concept.core.request.request import ForgetRequest

MEASURED = (*vocabulary.MEASURED_PLAIN, *vocabulary.MEASURED_STYLED)
WORDS = [name for found in vocabulary.CATEGORIES.values() for word in found for name in (word.name, word.synonym)]
TARGETS = {"object": "star", "style": "neon", "identity": "Ivy Stone"}


def forms() -> list[re.Pattern[str]]:
    """What a prompt of each measured template looks like; a subject has no comma, and a style at most two words."""
    found = []
    for template in MEASURED:
        parts = re.split(r"(\{np\}|\{style\})", template)
        shapes = {"{np}": r"[^,]+", "{style}": r"[^,]+"}
        found.append(re.compile("".join(shapes.get(part, re.escape(part)) for part in parts) + r"(, [^,]+)?"))
    return found


def test_everyday_words_are_no_measured_concept():
    for text in (*(w for words in COMMON.values() for w in words), *(c for found in CONTEXTS.values() for c in found)):
        assert not [word for word in WORDS if mentions(word, text)], text


def test_everyday_words_are_many_and_different():
    for kind, words in COMMON.items():
        assert len(words) == len(set(words)) >= 20, kind


@pytest.mark.parametrize("category", CATEGORIES)
def test_questions_have_templates_that_no_fit_uses(category):
    asked = [q.prompt.text for q in (*target_questions(TARGETS[category], 200), *retain_questions(category, 200))]
    assert all(any(form.fullmatch(text) for form in forms()) for text in asked)
    fitted = [template.format(TARGETS[category]) for template in (*templates(category), *CONTEXTS[category])]
    concept = Concept(TARGETS[category], category)
    for method in all_methods().values():
        for preset in method.presets.values():
            if hasattr(preset, "contexts"):
                fitted += common_prompts(ForgetRequest((concept,)), preset)
    for grammar in GRAMMARS:
        fitted += [
            text for pair in prompt_pairs(concept, 60, 0, grammar=grammar) for text in (pair.forget, pair.retain)
        ]
    assert len(fitted) > 300
    assert not [text for text in fitted if any(form.fullmatch(text) for form in forms())]
    assert not set(asked) & set(fitted)


def test_measured_templates_are_of_the_world():
    """The unedited model was trained on them, so that they measure forgetting and not reading."""
    assert set(vocabulary.MEASURED_PLAIN) < set(vocabulary.TEMPLATES_PLAIN)
    assert set(vocabulary.MEASURED_STYLED) < set(vocabulary.TEMPLATES_STYLED)
