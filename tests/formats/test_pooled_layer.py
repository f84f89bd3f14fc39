"""The layer that reads SDXL's pooled vector, in every format: its names, and whose loader knows them."""

from __future__ import annotations

import pytest
import torch
from loaders import diffusers_changes
from safetensors.torch import load_file
from tiny import fit, tiny_xl_model

from forget_concept.core.errors import PatchError
from forget_concept.core.formats import load_patch
from forget_concept.core.formats.lora_state import state_of
from forget_concept.core.models.survey import survey
from forget_concept.core.models.text_entries import POOLED, TOKENS
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

KEY = "add_embedding.linear_1"


@pytest.fixture(scope="module")
def model():
    return tiny_xl_model()


@pytest.fixture(scope="module")
def patch(model) -> Patch:
    found = fit(model, ForgetRequest((Concept("star", replacement="circle"),), ("moon",)))
    assert KEY in found.factors and len({factor.rank for factor in found.factors.values()}) > 1
    return found


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft", "context-map"])
def test_there_and_back(patch, model, tmp_path, form):
    if form == "peft":
        pytest.importorskip("peft", "0.17", reason="peft is a dependency of the package, and a host may lack it")
    path = tmp_path / ("p" if form == "peft" else "p.safetensors")
    patch.save(path, form, survey=model.survey)
    again = load_patch(path, model.survey)
    assert set(again.factors) == set(patch.factors) and again.about.method == "uce"
    for key, factor in patch.factors.items():
        torch.testing.assert_close(again.factors[key].delta(), factor.delta(), rtol=1e-5, atol=1e-6)
    again.check_fits(model.survey)


def test_a_kohya_file_has_the_name_that_comfyui_and_the_webuis_know(patch, model, tmp_path):
    """Theirs is made of the original layout; of diffusers' name the webui makes nothing."""
    for given in (model.survey, None):
        patch.save(tmp_path / "p.safetensors", survey=given)
        names = {name.partition(".")[0] for name in load_file(tmp_path / "p.safetensors")}
        assert "lora_unet_label_emb_0_0" in names and len(names) == len(patch)
        assert all(
            name.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_", "lora_unet_label_"))
            for name in names
        )
    assert "diffusion_model.label_emb.0.0.lora_up.weight" in state_of(patch, model.survey)


def test_diffusers_reads_its_own_file_and_peft_puts_the_patch_on(patch, model, tmp_path):
    patch.save(tmp_path / "p.safetensors", "diffusers")
    unet = tiny_xl_model().unet
    changes = diffusers_changes(tmp_path / "p.safetensors", unet)
    assert set(changes) == set(patch.factors)
    for key, factor in patch.factors.items():
        torch.testing.assert_close(changes[key], factor.delta(), rtol=1e-5, atol=1e-6)


def test_a_map_of_the_pooled_vector_needs_a_model_that_reads_one(patch, model, tmp_path):
    patch.save(tmp_path / "m.safetensors", "context-map")
    assert set(load_patch(tmp_path / "m.safetensors", model.survey).context_maps) == {TOKENS, POOLED}
    from tiny import tiny_unet

    with pytest.raises(PatchError, match=r"'pooled' text states, and this model .*reads none"):
        load_patch(tmp_path / "m.safetensors", survey(tiny_unet()))
    with pytest.raises(PatchError, match=r"for another architecture.*add_embedding\.linear_1"):
        patch.check_fits(tiny_unet())


def test_it_is_applied_and_taken_off(patch, model):
    states, x, t = model.text.encode(["a star"]), torch.ones(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        before = model.predict_noise(x, t, states)
        with patch.applied(model.survey):
            whole = model.predict_noise(x, t, states)
        with Patch({KEY: patch.factors[KEY]}).applied(model.survey):
            alone = model.predict_noise(x, t, states)
        after = model.predict_noise(x, t, states)
    assert torch.equal(before, after)
    assert not torch.equal(alone, before) and not torch.equal(alone, whole)
