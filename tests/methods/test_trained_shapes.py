"""Trained methods on models that are no SD1: a diffusion transformer, and SDXL with its pooled vector."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, fit, state_hash, tiny_xl_model
from torch import nn
from transformers_of_diffusers import POOLED_WIDTH, SMALL, TEXT

from forget_concept.core.models.families.flux import BLOCKS
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.unet import POOLED_KEY
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

QUICK = {"steps": 12, "lr": 1e-2, "n_images": 2, "sample_steps": 2, "contexts": False, "batch_size": 2}
FORGETTING = {"forget_me_not": "steering", "selective_amnesia": "tuned"}
QUICK_OF = {"forget_me_not": {}, "selective_amnesia": {"fisher_samples": 2, "replay_images": 2, "keep_common": False}}
needs_rms_norm = pytest.mark.skipif(
    not hasattr(nn, "RMSNorm"), reason="diffusers' transformers need torch 2.4 or later"
)


def flux() -> LatentDiffusion:
    text = TinyText(TEXT, POOLED_WIDTH, max_length=16)
    return LatentDiffusion(SMALL[0].make(), text, None, "flow", latent_shape=(2, 4, 4), name="flux", guidance=1.0)


def request(method: str, preset: str = "tuned", **settings) -> ForgetRequest:
    return ForgetRequest(
        (Concept("star", replacement="circle"),),
        preserve=("tree",),
        method=method,
        preset=preset,
        settings=QUICK | QUICK_OF.get(method, {}) | settings,
    )


@needs_rms_norm
@pytest.mark.parametrize("method", list(FORGETTING))
def test_the_blocks_of_a_flow_model_are_trained_and_its_weights_stay_what_they_were(method: str) -> None:
    model = flux()
    before = state_hash(model.unet)
    patch = fit(model, request(method, FORGETTING[method]))
    assert state_hash(model.unet) == before
    known = {block.original.split(".")[-1] for block in BLOCKS}
    assert {key.rpartition(".")[2] for key in patch.factors} == known | {"txt_in", "in_layer"}
    assert all(float(factor.up.abs().max()) > 0 for factor in patch.factors.values()) and patch.about.note is None


@needs_rms_norm
def test_a_flow_model_is_steered_to_the_replacement() -> None:
    model = flux()
    patch = fit(model, request("forget_me_not", "steering"))
    noise, times = model.initial_noise([1, 2, 3, 4]), torch.tensor([200, 500, 800, 950])
    name, other = (model.text.encode([f"a picture of a {word}"] * 4) for word in ("star", "circle"))
    with torch.no_grad():
        wanted, plain = model.predict_noise(noise, times, other), model.predict_noise(noise, times, name)
        with patch.applied(model.survey):
            patched = model.predict_noise(noise, times, name)
    assert float((patched - wanted).square().mean()) < 0.8 * float((plain - wanted).square().mean())


@pytest.mark.parametrize("method", list(FORGETTING))
def test_the_pooled_vector_is_unlearnt_too_and_the_sizes_beside_it_do_not_matter(method: str) -> None:
    model = tiny_xl_model()
    patch = fit(model, request(method, FORGETTING[method]))
    change = patch.factors[POOLED_KEY].delta()
    (entry,) = (one for one in model.survey.entries if one.key == POOLED_KEY)
    assert float(change[:, : entry.width].abs().max()) > 0
    assert float(change[:, entry.width :].abs().max()) < 1e-7 * float(change.abs().max())
    assert patch.about.note is None


@pytest.mark.parametrize(
    ("method", "preset", "settings"),
    [("forget_me_not", "steering", {"pooled": False}), ("duge", "tuned", {"bank": 4, "keep_common": False})],
)
def test_a_patch_says_that_the_pooled_vector_still_tells_the_concept(method: str, preset: str, settings) -> None:
    patch = fit(tiny_xl_model(), request(method, preset, **settings))
    assert POOLED_KEY not in patch.factors and "the whole prompt's vector" in (patch.about.note or "")
