"""A training that was cut short goes on to the same bits, wherever it was cut; fixed prompts are encoded beforehand."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, clip_parts, fit, rand, tiny_model
from trained_cases import CASES, SMALL, clip_model, made, same

from forget_concept.core.errors import Cancelled
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.training import loop
from forget_concept.core.training.fisher import FisherSettings, fisher_information
from forget_concept.core.training.textual_inversion import PLACEHOLDER, InversionSettings, InvertedText, invert

each_case = pytest.mark.parametrize("case", list(CASES))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


def cut(after):
    """A progress callback that cancels once this step of this work, ``(message, step)``, has been made."""

    def progress(event):
        if event.terms and (event.message, event.step) == after:
            raise Cancelled

    return progress


def test_every_trained_method_is_cut_here():
    assert {case[0] for case in CASES.values()} == {name for name, method in all_methods().items() if method.trained}


@each_case
def test_cut_at_any_step_a_training_goes_on_to_the_same_bits(case, parts, tmp_path):
    model, request, inputs = made(case, parts)
    seen = []
    whole = fit(model, request, seen.append, Inputs(**inputs))
    steps = [(event.message, event.step) for event in seen if event.terms]
    assert len(steps) >= 2

    # the last step is made, and then cut before its result is there
    for n, after in enumerate(steps):
        space = Workspace(tmp_path / str(n))
        with pytest.raises(Cancelled):
            fit(model, request, cut(after), Inputs(workspace=space, **inputs))
        later = []
        patch = fit(model, request, later.append, Inputs(workspace=space, **inputs))
        assert [(event.message, event.step) for event in later if event.terms] == steps[n + 1 :]
        same(patch, whole)


@pytest.mark.parametrize("case", ["duge, site by site", "forget_me_not, inversion", "selective_amnesia"])
def test_cut_at_every_step_a_training_goes_on_to_the_same_bits(case, parts, tmp_path):
    model, request, inputs = made(case, parts)
    seen = []
    whole = fit(model, request, seen.append, Inputs(**inputs))
    inputs["workspace"] = Workspace(tmp_path)
    for after in [(event.message, event.step) for event in seen if event.terms]:
        with pytest.raises(Cancelled):
            fit(model, request, cut(after), Inputs(**inputs))
    same(fit(model, request, inputs=Inputs(**inputs)), whole)


@pytest.mark.parametrize("case", ["duge, restricted step", "forget_me_not", "selective_amnesia, noise, restricted"])
def test_broken_off_while_the_parameters_move_a_training_goes_on_to_the_same_bits(case, parts, tmp_path, monkeypatch):
    """Ctrl-C or a full memory may come between the parameters of one step: that state is of no step."""
    model, request, inputs = made(case, parts)
    whole = fit(model, request, inputs=Inputs(**inputs))
    inputs["workspace"] = Workspace(tmp_path)

    with pytest.raises(Cancelled):
        fit(model, request, cut((all_methods()[request.method].message, 1)), Inputs(**inputs))
    plain = loop._optimiser

    def fragile(parameters, settings):
        optimiser = plain(parameters, settings)
        step, calls = optimiser.step, []

        def broken():
            step()
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        optimiser.step = broken
        return optimiser

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_optimiser", fragile)
        with pytest.raises(KeyboardInterrupt):
            fit(model, request, inputs=Inputs(**inputs))
    later = []
    same(fit(model, request, later.append, Inputs(**inputs)), whole)
    # the second step was whole and the third was not: what was saved after the first is what is left
    assert [event.step for event in later if event.terms] == [2, 3]


# -- fixed prompts -------------------------------------------------------------------------------------------------


@pytest.fixture()
def encodings(monkeypatch):
    """The prompts that text encoders are given, by way of any of their methods; ``""`` only fills up a batch."""
    found = []

    def watched(plain):
        def encode(self, prompts, *more):
            found.extend(prompt for prompt in prompts if prompt)
            return plain(self, prompts, *more)

        return encode

    for encoder, method in ((TinyText, "encode"), (CLIPText, "encode"), (InvertedText, "states")):
        monkeypatch.setattr(encoder, method, watched(getattr(encoder, method)))
    return found


@each_case
def test_no_fixed_prompt_is_encoded_after_the_first_step(case, parts, encodings):
    model, request, inputs = made(case, parts)
    counts = []

    def progress(event):
        if event.terms:
            counts.append((event.message, len(encodings)))

    fit(model, request, progress, Inputs(**inputs))
    message = all_methods()[request.method].message
    training = [count for said, count in counts if said == message]
    assert training and set(training) == {len(encodings)} and encodings
    # before it, vectors may have been learned: then all that is encoded at a step says them
    learning = [count for said, count in counts if said != message]
    if learning:
        assert all(PLACEHOLDER in prompt for prompt in encodings[learning[0] : learning[-1]])


def test_an_inversion_encodes_only_what_says_its_vectors(parts, encodings):
    model, counts = clip_model(parts), []

    def count(event):
        if event.terms:
            counts.append(len(encodings))

    settings = InversionSettings(tokens=2, steps=3, batch_size=2, templates=("a photo of {}", "{}"))
    invert(model, rand(3, 4, 8, 8), settings, progress=count)
    # batches of one shape at every step
    assert counts == [2, 4, 6] and all(PLACEHOLDER in prompt for prompt in encodings)


@pytest.mark.parametrize("given", [True, False], ids=["given latents", "own pictures"])
def test_fisher_information_encodes_its_prompts_before_the_first_sample(given, encodings, tmp_path):
    model, prompts = tiny_model(**SMALL), ["a boat", "a key", "a tree"]
    keys = [site.key("to_k") for site in model.survey][:2]
    settings = FisherSettings("pairs", 10, draws=1, sample_steps=1)
    latents = rand(10, 4, 8, 8) if given else None
    whole = fisher_information(model, keys, prompts, settings, latents)
    assert sorted(encodings) == prompts  # each once, however many samples and chunks of pictures
    for after in (1, 8, 9):
        space = Workspace(tmp_path / str(after))

        def after_some(event, after=after):
            if event.message == "measuring Fisher information" and event.step == after:
                raise Cancelled

        with pytest.raises(Cancelled):
            fisher_information(model, keys, prompts, settings, latents, space, after_some)
        found = fisher_information(model, keys, prompts, settings, latents, space)
        assert all(torch.equal(value, found.values[key]) for key, value in whole.values.items())
