"""What a concept without a replacement is mapped to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TinyText, fit, tiny_model

from forget_concept.core.methods.mean_phrases import (
    CANDIDATES,
    MEAN_OF,
    NAMED,
    mean_candidates,
    mean_note,
    mean_phrases,
)
from forget_concept.core.methods.registry import get
from forget_concept.core.methods.text_columns import guide_means
from forget_concept.core.methods.uce import UCESettings
from forget_concept.core.patch.patch import Patch
from forget_concept.core.prompts.everyday import COMMON
from forget_concept.core.request.concept import Concept, templates
from forget_concept.core.request.request import ForgetRequest

# the published equation and nothing else
PLAIN = {"overshoot": 1.0, "reach": None, "contexts": False, "keep_common": False, "tolerance": 1e-6, "ridge": 0.01}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def same_factors(one: Patch, other: Patch) -> bool:
    pairs = [(one.factors[key], other.factors[key]) for key in one.factors]
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in pairs
    )


PRESERVED = tuple(f"word{letter}" for letter in "abcdefghijklmnop")


@pytest.mark.parametrize("columns", ["tail", "last"])
def test_a_mean_is_that_of_a_patch_for_each_of_its_phrases(model, columns):
    """The closed form is linear in its guide states."""
    changed = PLAIN | {"columns": columns, "overshoot": 1.5, "overshoot_mean": 1.5, "tolerance": 0}
    request = ForgetRequest((Concept("star"),), PRESERVED, settings=changed | {"no_replacement": "mean"})
    found = fit(model, request)
    phrases = mean_phrases(model.text, request, ["star"])["star"]
    assert len(set(phrases)) == MEAN_OF and set(phrases) < set(PRESERVED)
    each = [fit(model, ForgetRequest((Concept("star", replacement=p),), PRESERVED, settings=changed)) for p in phrases]
    for key, factors in found.factors.items():
        mean = torch.stack([one.factors[key].delta() for one in each]).mean(0)
        torch.testing.assert_close(factors.delta(), mean, rtol=1e-4, atol=1e-5)


def test_a_mean_is_of_the_phrases_that_are_farthest_from_the_concept():
    text = TinyText()
    request = ForgetRequest((Concept("star"), Concept("tree"), Concept("charcoal", "style", "oil painting")), PRESERVED)
    found = guide_means(text, request, UCESettings(no_replacement="mean"))
    assert set(found) == {"star", "tree"}  # the third has a replacement
    template = templates("object")[0]
    for name, phrases in found.items():
        own = text.encode([template.format(name)]).hidden[0].mean(0)
        far = {p: float((text.encode([template.format(p)]).hidden[0].mean(0) - own).norm()) for p in PRESERVED}
        assert list(phrases) == sorted(far, key=lambda p: -far[p])[:MEAN_OF]
    assert guide_means(text, request, UCESettings(no_replacement="mean", neutral_object="thing")) == {}
    assert guide_means(text, request, UCESettings()) == {}


def test_the_candidates_of_a_mean_are_preserved_phrases_of_the_kind_and_everyday_words():
    star = Concept("star")
    assert mean_candidates("object", ForgetRequest((star,), PRESERVED)) == PRESERVED
    many = mean_candidates("object", ForgetRequest((star,), tuple(f"{p} {q}" for p in PRESERVED for q in "xyz")))
    assert len(set(many)) == CANDIDATES and {phrase.split()[0] for phrase in many} == set(PRESERVED)
    # a style and a person have no place in prompts about objects
    few = mean_candidates("object", ForgetRequest((star,), ("tree", "Charcoal", "a farmer", "the moon")))
    assert few[:2] == ("tree", "the moon") and len(few) == CANDIDATES and set(few[2:]) <= set(COMMON["object"])
    assert mean_candidates("object", ForgetRequest((star,), ("tree", *PRESERVED[:3]))) == ("tree", *PRESERVED[:3])
    # nor has what is to be forgotten, alone or in a longer name
    for names in (("sun",), ("red sun", "sunny street")):
        found = mean_candidates("object", ForgetRequest(tuple(Concept(name) for name in names)))
        assert len(found) == CANDIDATES and "sun" not in found


def test_without_any_phrase_for_a_mean_the_concept_is_dropped(model):
    text = TinyText()
    request = ForgetRequest(tuple(Concept(word, "style") for word in COMMON["style"]))
    assert mean_phrases(text, request, [concept.name for concept in request.concepts]) == {}
    changed = [PLAIN | {"no_replacement": choice} for choice in ("mean", "dropped")]
    mean, dropped = (fit(model, dataclasses.replace(request, settings=one)) for one in changed)
    assert mean.about.note is None and same_factors(mean, dropped)


@pytest.mark.parametrize("method", ["duge", "forget_me_not", "selective_amnesia"])
def test_a_trained_method_takes_the_phrases_in_turn(model, method):
    found = get(method)()
    request = ForgetRequest((Concept("star"), Concept("tree", replacement="circle")), PRESERVED, method)
    settings = dataclasses.replace(found.presets["tuned"], no_replacement="mean", contexts=False)
    targets, _ = found.prompts(model.text, request, settings)
    phrases = mean_phrases(model.text, request, ["star"])["star"]
    of_star = [target for target in targets if target.concept == "star"]
    assert len(of_star) == len(templates("object"))
    assert [target.replacement_text for target in of_star] == [
        template.format(phrases[i % MEAN_OF]) for i, template in enumerate(templates("object"))
    ]
    assert all("circle" in target.replacement_text for target in targets if target.concept == "tree")
    settings = dataclasses.replace(settings, no_replacement="farthest")
    targets, _ = found.prompts(model.text, request, settings)
    wanted = [template.format(phrases[0]) for template in templates("object")]
    assert [target.replacement_text for target in targets if target.concept == "star"] == wanted
    assert found.presets["tuned"].no_replacement in ("mean", "farthest")
    assert found.presets["published"].no_replacement != "mean"


@pytest.mark.parametrize("method", ["uce", "duge", "forget_me_not", "selective_amnesia"])
def test_the_patch_says_what_the_concept_was_mapped_to(model, method):
    quick = {} if method == "uce" else {"steps": 1, "n_images": 1, "sample_steps": 1}
    quick |= {"bank": 2} if method == "duge" else {}
    quick |= {"replay_images": 1, "fisher_samples": 1} if method == "selective_amnesia" else {}
    request = ForgetRequest((Concept("star"),), PRESERVED, method, settings=quick)
    phrases = mean_phrases(model.text, request, ["star"])["star"]
    one = get(method).presets["tuned"].no_replacement == "farthest"
    mapped = phrases[0] if one else f"a mix of {', '.join(phrases)}"
    assert f"'star' becomes {mapped}." in (fit(model, request).about.note or "")
    replaced = dataclasses.replace(request, concepts=(Concept("star", replacement="moon"),))
    assert "becomes" not in (fit(model, replaced).about.note or "")


def test_the_note_of_many_concepts_is_short():
    means = {f"concept {i}": ("tree", "moon") for i in range(NAMED + 2)}
    note = mean_note(means)
    assert "'concept 0' becomes a mix of tree, moon;" in note and note.endswith("2 more likewise.")
    assert mean_note({"star": ("tree",)}) == "Without a replacement, 'star' becomes tree."
    assert "likewise" not in mean_note({"star": ("tree",)}) and mean_note({}) is None
