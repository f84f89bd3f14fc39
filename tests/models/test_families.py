"""Diffusion transformers: where the text enters each family, and that a closed form is stored there exactly."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, fit, rand
from torch import nn
from transformers_of_diffusers import POOLED_WIDTH, SMALL, TEXT, TOKENS_READ, Small

from forget_concept.core.errors import ModelError
from forget_concept.core.formats import context_map, load_patch
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.methods.text_columns import aligned_positions, collect_columns
from forget_concept.core.methods.uce_settings import UCESettings
from forget_concept.core.models.families.registry import FAMILIES, family_of
from forget_concept.core.models.latent_diffusion import LatentDiffusion, hash_of_unet
from forget_concept.core.models.model_survey import PROJECTIONS, ModelSurvey
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.survey import survey
from forget_concept.core.models.text_entries import MEAN, POOLED, TOKENS
from forget_concept.core.models.transformer import entries_alone
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

pytestmark = pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="diffusers' transformers need torch 2.4 or later")
each = pytest.mark.parametrize("small", SMALL, ids=str)
# widths of the published models' text states, by stream
PUBLISHED = {
    "FluxTransformer2DModel": {TOKENS: 4096, POOLED: 768},
    "ChromaTransformer2DModel": {TOKENS: 4096},
    "Flux2Transformer2DModel": {TOKENS: 15360},
    "SD3Transformer2DModel": {TOKENS: 4096, POOLED: 2048},
    "QwenImageTransformer2DModel": {TOKENS: 3584},
    "ZImageTransformer2DModel": {TOKENS: 2560},
    "Lumina2Transformer2DModel": {TOKENS: 2304},
    "WanTransformer3DModel": {TOKENS: 4096},
    "HunyuanImageTransformer2DModel": {TOKENS: 3584, MEAN: 3584},
    "HunyuanVideoTransformer3DModel": {TOKENS: 4096, MEAN: 4096, POOLED: 768},
}


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return rand(TOKENS_READ, TEXT, seed=seed), rand(POOLED_WIDTH, seed=seed + 50)


def maps_of(model: nn.Module, rank: int = 3) -> dict[str, LowRank]:
    """Any maps of a model's streams; the mean's is the tokens', as a map of every token maps their mean."""
    found = survey(model)
    maps = {
        stream: LowRank(0.3 * rand(width, rank, seed=n), 0.3 * rand(rank, width, seed=n + 9))
        for n, stream in enumerate((TOKENS, POOLED))
        if (width := found.width(stream)) is not None
    }
    if found.width(MEAN) is not None:
        maps[MEAN] = LowRank(maps[TOKENS].up.clone(), maps[TOKENS].down.clone())
    return maps


def patch_of_every_layer(found: ModelSurvey, family: str) -> Patch:
    """A patch of the text entries and of every layer of the blocks that trained methods change."""
    factors = dict(context_map.expand(maps_of(found.unet), found).factors)
    for n, key in enumerate(key for key in found.trained_keys(PROJECTIONS) if key not in factors):
        d_out, d_in = found.linear(key).weight.shape
        factors[key] = LowRank(rand(d_out, 3, seed=n + 30), rand(3, d_in, seed=n + 60))
    return Patch(factors, {}).with_metadata(family=family)


@each
def test_the_published_shape_is_recognised_with_its_text_entries(small: Small) -> None:
    model = small.full()
    family, layout = family_of(model)
    found = survey(model)
    assert (family.id, found.family) == (small.family, small.family)
    assert {entry.stream: entry.width for entry in found.entries} == PUBLISHED[small.name]
    assert found.context_dim == PUBLISHED[small.name][TOKENS] and layout in ("original", "diffusers")
    for entry in found.entries:
        assert found.linear(entry.key) is entry.module and found.layer(entry.key).path in dict(model.named_modules())


@each
def test_the_entries_read_the_text_and_nothing_else_does(small: Small) -> None:
    """With every entry's answer to the text put to zero, the prediction no longer depends on the text."""
    model = small.make()
    found = survey(model)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str):
        return lambda module, args: seen.setdefault(key, args[0].detach())

    hooks = [entry.module.register_forward_pre_hook(keep(entry.key)) for entry in found.entries]
    hidden, pooled = states()
    plain = small.call(model, hidden, pooled)
    for hook in hooks:
        hook.remove()
    for entry in found.entries:
        wanted = {TOKENS: hidden, POOLED: pooled[None], MEAN: hidden.mean(0, keepdim=True)}[entry.stream]
        read = wanted if entry.norm is None else entry.norm(wanted)
        torch.testing.assert_close(seen[entry.key].reshape(-1, entry.width)[: len(read)], read, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, small.call(model, *states(seed=5)))
    with torch.no_grad():
        for entry in found.entries:
            entry.module.weight.zero_()
    assert torch.equal(small.call(model, hidden, pooled), small.call(model, *states(seed=5)))


@each
def test_a_patch_is_the_map_of_the_text_states(small: Small) -> None:
    """Exactly, whatever stands behind: the patched model says of a text what the model says of the mapped one."""
    model = small.make()
    found, maps = survey(model), maps_of(model)
    patch = context_map.expand(maps, found)
    assert set(patch.factors) == {entry.key for entry in found.entries}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hidden, pooled = states()
    mapped = [hidden + hidden @ maps[TOKENS].delta().T, pooled]
    if POOLED in maps:
        mapped[1] = pooled + pooled @ maps[POOLED].delta().T
    norm = found.entries[0].norm
    plain = small.call(model, hidden, pooled)
    with patch.applied(found):
        patched = small.call(model, hidden, pooled)
    assert (patched - plain).abs().max() > 1e-4
    if norm is None:
        wanted = small.call(model, *mapped)
    else:  # the map is of what the norm leaves
        hook = norm.register_forward_hook(lambda module, args, out: out + out @ maps[TOKENS].delta().T)
        wanted = small.call(model, hidden, pooled)
        hook.remove()
    torch.testing.assert_close(patched, wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def diffusion(small: Small) -> LatentDiffusion:
    text = TinyText(TEXT, POOLED_WIDTH if small.pooled else None)
    return LatentDiffusion(small.make(), text, sd_alphas_cumprod(), name=small.name)


@each
def test_the_closed_form_meets_its_equation_at_every_entry(small: Small) -> None:
    model = diffusion(small)
    settings = {"ridge": 1e-3, "templates": ("{}",), "keep_common": False, "contexts": False, "tolerance": 1e-6}
    settings |= {"overshoot": 1.0, "reach": None}
    request = ForgetRequest((Concept("star", replacement="circle"),), settings=settings)
    patch = fit(model, request)
    assert set(patch.context_maps) == {entry.stream for entry in model.survey.entries}
    assert patch.about.family == small.family and patch.about.note is None
    columns = collect_columns(model.text, request, UCESettings(**settings), streams=tuple(patch.context_maps))
    for entry in model.survey.entries:
        read = columns[entry.stream].through(entry.norm)
        c, g, k = (part.double() for part in (read.target, read.guide, read.preserved))
        ridge = settings["ridge"] * c.square().mean()
        normal = ridge * torch.eye(len(c)).double() + c @ c.T + k @ k.T
        # ΔW N = W (G − C) Cᵀ
        change = patch.factors[entry.key].delta().double()
        wanted = entry.weight.double() @ (g - c) @ c.T
        torch.testing.assert_close(change @ normal, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@each
def test_diffusers_loads_its_file_with_every_layer(small: Small, tmp_path) -> None:
    """Through the pipeline's own reader of files, which converts other programs' names."""
    pytest.importorskip("peft", "0.17", reason="diffusers reads LoRA files through peft")
    if small.pipeline is None:
        pytest.skip("diffusers loads no LoRA into this model")
    import diffusers

    found = survey(small.make())
    patch = patch_of_every_layer(found, small.family)
    patch.save(tmp_path / "p.safetensors", "diffusers")
    state = getattr(diffusers, small.pipeline).lora_state_dict(str(tmp_path / "p.safetensors"))
    model = small.make()
    model.load_lora_adapter(state[0] if isinstance(state, tuple) else state, prefix="transformer")
    loaded = {
        name: module.get_delta_weight("default_0").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(loaded) == {found.layer(key).path for key in patch.factors}
    for key, factor in patch.factors.items():
        torch.testing.assert_close(loaded[found.layer(key).path], factor.delta(), rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("form", ["kohya", "diffusers", "context-map", "peft"])
def test_there_and_back(small: Small, form: str, tmp_path) -> None:
    if form == "peft":
        pytest.importorskip("peft")
    model = small.make()
    patch = patch_of_every_layer(survey(model), small.family)
    if form == "context-map":
        patch = context_map.expand(maps_of(model), survey(model)).with_metadata(family=small.family)
    path = tmp_path / ("p" if form == "peft" else "p.safetensors")
    patch.save(path, form, survey=survey(model))
    again = load_patch(path, survey(model))
    assert set(again.factors) == set(patch.factors)
    for key, factor in patch.factors.items():
        torch.testing.assert_close(again.factors[key].delta(), factor.delta(), rtol=1e-5, atol=1e-6)
    again.check_fits(survey(model))


@pytest.mark.parametrize("method", ["forget_me_not", "duge"])
def test_what_reads_cross_attention_says_that_there_is_none(method: str) -> None:
    with pytest.raises(ModelError, match="the cross-attention of a UNet, and a model of the family flux has none"):
        fit(diffusion(SMALL[0]), ForgetRequest((Concept("star", replacement="circle"),), method=method))


@pytest.mark.parametrize("method", [name for name, kind in all_methods().items() if kind.trained])
def test_methods_that_train_say_it_where_they_know_no_layer_of_the_blocks(method: str) -> None:
    small = next(one for one in SMALL if one.family == "wan")
    with pytest.raises(
        ModelError, match=f"'{method}' trains layers .*family wan are not known.*choose the method 'uce'"
    ):
        fit(diffusion(small), ForgetRequest((Concept("star", replacement="circle"),), method=method))


def test_an_encoder_that_is_not_causal_is_edited_before_the_concept_too() -> None:
    text = TinyText(TEXT)
    target, guide = ("star", "a red star on blue"), ("circle", "a red circle on blue")
    positions, _ = aligned_positions(text, target, guide)
    assert positions[0] == 3
    text.causal = False
    positions, aligned = aligned_positions(text, target, guide)
    assert positions == list(range(text.max_length)) and aligned[:3] == [0, 1, 2]


def test_every_familys_names_are_its_own() -> None:
    assert len({family.id for family in FAMILIES}) == len(FAMILIES)
    flat = [entry.original.replace(".", "_") for family in FAMILIES for entry in family.entries]
    meant = {entry.original for family in FAMILIES for entry in family.entries}
    assert len(set(flat)) == len(meant)


@pytest.mark.parametrize("small", SMALL, ids=str)
def test_the_layers_that_read_text_alone_are_the_same_model_to_a_closed_form(small: Small) -> None:
    model = small.make()
    found = survey(model)
    alone = survey(entries_alone(found, lambda path: model.get_submodule(path).weight.detach().clone()))
    assert (alone.family, alone.layout, alone.fingerprint()) == (found.family, found.layout, found.fingerprint())
    assert hash_of_unet(alone) == hash_of_unet(found)
    for own, other in zip(found.entries, alone.entries, strict=True):
        assert (own.stream, own.norm is None) == (other.stream, other.norm is None)
        if own.norm is not None and other.norm is not None:
            states = rand(3, own.width)
            assert torch.equal(own.norm(states), other.norm(states))
    with pytest.raises(ModelError, match="quantised"):
        entries_alone(found, lambda path: torch.zeros(4, dtype=torch.uint8))
