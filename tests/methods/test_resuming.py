"""A training that was cut short goes on to the same bits, wherever it was cut; fixed prompts are encoded beforehand."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, clip_parts, fit, rand, random_patch, tiny_model, tiny_unet

from forget_concept.core.errors import Cancelled
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training import loop
from forget_concept.core.training.fisher import FisherSettings, fisher_information
from forget_concept.core.training.textual_inversion import PLACEHOLDER, InversionSettings, InvertedText, invert

# one block down and up, with a cross-attention in each: many trainings are made here
SMALL = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
}
COMMON = {"steps": 3, "batch_size": 2, "n_images": 1, "sample_steps": 1, "rank": 2, "lr": 1e-2}
DUGE = {"bank": 3, "pixels": 8, "memory": 2, "contexts": False, "keep_common": False}
NETWORK = DUGE | {"local": False}
AMNESIA = {"contexts": False, "keep_common": False, "replay_images": 3, "fisher_samples": 2, "fisher_draws": 1}
AMNESIA |= {"fisher_prompts": ("a boat", "a key", "a tree")}
REPLACED = (Concept("star", replacement="circle"),)
SEVERAL = (Concept("star"), Concept("watercolour wash", "style", replacement="an oil painting"))

# method, concepts, settings, whether it starts from an earlier patch
CASES = {
    "duge, site by site": ("duge", REPLACED, DUGE, True),
    "duge, site by site, concepts dropped": ("duge", SEVERAL, DUGE | {"no_replacement": "dropped"}, False),
    "duge, whole network": (
        "duge",
        REPLACED,
        NETWORK | {"prior_weight": 0.5, "anchor_weight": 2.0, "no_replacement": "empty"},
        True,
    ),
    "duge, attention maps, null space": (
        "duge",
        SEVERAL,
        NETWORK | {"compare": "maps", "project": 0.8, "train": ("to_q", "to_k"), "optimiser": "sgd"},
        False,
    ),
    "duge, restricted step": ("duge", REPLACED, DUGE | {"gradient": "restricted_step", "lr": 0.5}, True),
    "forget_me_not": ("forget_me_not", SEVERAL, {"contexts": False}, True),
    "forget_me_not, restricted step": (
        "forget_me_not",
        REPLACED,
        {"contexts": False, "gradient": "restricted_step", "lr": 0.5},
        False,
    ),
    "forget_me_not, correction": (
        "forget_me_not",
        (Concept("star"),),
        {"wanted": ("film star",), "unwanted": ("sea star", "gold star"), "contrast": 0.5, "attention_weight": 1.0},
        True,
    ),
    "forget_me_not, dense, whole unet": ("forget_me_not", REPLACED, {"scope": "unet", "rank": None, "steps": 2}, False),
    "forget_me_not, inversion": (
        "forget_me_not",
        (Concept("star"),),
        {"concept_source": "inversion", "latents": "images", "inversion_steps": 2, "tokens": 2, "contexts": False},
        False,
    ),
    "selective_amnesia": ("selective_amnesia", REPLACED, AMNESIA, True),
    "selective_amnesia, noise, restricted": (
        "selective_amnesia",
        (Concept("star"),),
        AMNESIA | {"surrogate": "noise", "gradient": "restricted", "optimiser": "sgd", "clip_norm": 0.1},
        False,
    ),
}
each_case = pytest.mark.parametrize("case", list(CASES))


class Pixels:
    """Pictures as latents an eighth as large; only the way in is needed."""

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([small, small[:, :1]], 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


def clip_model(parts):
    text = CLIPText(*parts)
    return LatentDiffusion(
        tiny_unet(**SMALL), text, sd_alphas_cumprod(), vae=Pixels(), latent_shape=(4, 8, 8), name="tiny"
    )


def made(case, parts):
    """The model, the request and the inputs of a case."""
    method, concepts, settings, later = CASES[case]
    inverted = settings.get("concept_source") == "inversion"
    model = clip_model(parts) if inverted else tiny_model(**SMALL)
    request = ForgetRequest(concepts, ("moon", "key"), method, "tuned", COMMON | settings, seed=3)
    earlier = None
    if later:
        change = random_patch(model.survey, which=("to_k", "to_v"), scale=0.05)
        earlier = change.with_metadata(request=ForgetRequest((Concept("fish"),)))
    images = {"star": rand(3, 3, 64, 64).clamp(-1, 1)} if inverted else {}
    return model, request, {"earlier": earlier, "images": images}


def cut(after):
    """A progress callback that cancels once this step of this work, ``(message, step)``, has been made."""

    def progress(event):
        if event.terms and (event.message, event.step) == after:
            raise Cancelled

    return progress


def same(patch, whole):
    assert patch.metadata == whole.metadata
    assert patch.factors.keys() == whole.factors.keys()
    for key, factor in whole.factors.items():
        assert torch.equal(factor.up, patch.factors[key].up), key
        assert torch.equal(factor.down, patch.factors[key].down), key


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
    settings = InversionSettings(tokens=2, steps=3, batch_size=2, templates=("a photo of {}", "{}"))
    invert(model, rand(3, 4, 8, 8), settings, progress=lambda event: counts.append(len(encodings)))
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
