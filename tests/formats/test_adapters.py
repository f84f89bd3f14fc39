"""LoRA files of every naming, dtype, rank and alpha: read as their programs mean them, written as all programs read."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaders import diffusers_changes
from safetensors.torch import load_file, save_file
from tiny import fit, rand, random_patch, tiny_model, tiny_unet

from forget_concept.core.errors import PatchError, UnsupportedAdapterError
from forget_concept.core.files.safetensors_io import read_metadata, read_safetensors, write_safetensors
from forget_concept.core.formats import context_map, kohya
from forget_concept.core.formats.contents import contents_of
from forget_concept.core.formats.lora_state import LoraState, contents_of_lora, patch_of, state_of
from forget_concept.core.models.survey import survey
from forget_concept.core.models.text_entries import TOKENS
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

UNET = tiny_unet()
FOUND = survey(UNET)
KEYS = sorted(FOUND.layers)
ATTENTION = [key for key in KEYS if ".attn" in key]
CONFIG = "lora_adapter_metadata"
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def mixed_patch(ranks: dict[str, int], scale: float = 0.1) -> Patch:
    factors = {}
    for n, (key, rank) in enumerate(ranks.items()):
        d_out, d_in = FOUND.linear(key).weight.shape
        factors[key] = LowRank(scale * rand(d_out, rank, seed=n), scale * rand(rank, d_in, seed=n + 500))
    return Patch(factors, {"forget_concept.family": "other"})


def close(first: Patch, second: Patch, **tolerance) -> None:
    assert set(first.factors) == set(second.factors)
    for key, factor in first.factors.items():
        torch.testing.assert_close(second.factors[key].delta(), factor.delta(), **tolerance)


ranks_of_layers = st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9), min_size=1, max_size=8)


# -- one alpha ----------------------------------------------------------------------------------------------------


def read_by_hosts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of each layer as ComfyUI and A1111 compute it: each layer's own alpha over its own rank."""
    names = [name.removesuffix(".alpha") for name in state if name.endswith(".alpha")]
    changes = {}
    for name in names:
        up, down = (state[f"{name}.lora_{part}.weight"].float() for part in ("up", "down"))
        changes[name] = float(state[f"{name}.alpha"]) / down.shape[0] * (up @ down)
    return changes


@few
@given(ranks_of_layers, st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_a_file_has_one_alpha_and_every_layer_its_own_effect(ranks, dtype):
    patch = mixed_patch(ranks)
    state = kohya.to_state(patch, dtype=dtype)
    assert len({float(tensor) for name, tensor in state.items() if name.endswith(".alpha")}) == 1
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    close(patch, kohya.from_state(state), rtol=tolerance, atol=tolerance, check_dtype=False)
    changes = read_by_hosts(state)
    for key, factor in patch.factors.items():
        name = "lora_unet_" + (key + ".0" if key.endswith("to_out") else key).replace(".", "_")
        torch.testing.assert_close(changes[name], factor.delta(), rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:  # whatever the ranks, a file holds the very factors
        again = kohya.from_state(state)
        for key, factor in patch.factors.items():
            assert torch.equal(factor.up, again.factors[key].up) and torch.equal(factor.down, again.factors[key].down)


def fitted(kind: str) -> Patch:
    model = tiny_model()
    star = fit(model, ForgetRequest((Concept("star", replacement="circle"),)))
    if kind == "truncated by energy":
        return mixed_patch({key: 3 + n % 5 for n, key in enumerate(KEYS[:20])}).truncated(energy=0.8)
    trained = random_patch(model.survey, rank=4, which=("to_q", "to_k", "to_v", "to_out"))
    return Patch.combined([(star, 0.7), (trained.with_metadata(family=star.about.family), -1.3)])


@pytest.mark.parametrize("kind", ["truncated by energy", "closed form and trained"])
def test_diffusers_reads_every_layers_effect(tmp_path, kind):
    patch = fitted(kind)
    assert len({factor.rank for factor in patch.factors.values()}) > 1
    kohya.save(patch, tmp_path / "p.safetensors")
    changes = diffusers_changes(tmp_path / "p.safetensors")
    assert set(changes) == set(patch.factors)
    for key, factor in patch.factors.items():
        torch.testing.assert_close(changes[key], factor.delta(), rtol=1e-5, atol=1e-6)
    described = read_metadata(tmp_path / "p.safetensors")
    alphas = {float(t) for n, t in load_file(tmp_path / "p.safetensors").items() if n.endswith(".alpha")}
    assert alphas == {float(described["ss_network_alpha"])}
    assert patch.rank <= int(described["ss_network_dim"]) < 2 * patch.rank


# -- alpha in the metadata ----------------------------------------------------------------------------------------


def test_the_alpha_that_diffusers_writes_is_read(tmp_path):
    pytest.importorskip("peft", reason="diffusers writes LoRA files through peft")
    pytest.importorskip("diffusers", "0.35", reason="an older diffusers writes LoRA files in other ways")
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = tiny_unet()
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["to_q", "to_k", "to_out.0"],
        rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 2},
        alpha_pattern={"attn1.to_q": 3, "to_out.0": 5},
        init_lora_weights=False,
    )
    unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    patch = kohya.load(tmp_path / "pytorch_lora_weights.safetensors")
    theirs = {n: m.get_delta_weight("default") for n, m in unet.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(theirs) == len(patch) > 10
    for key, factor in patch.factors.items():
        name = key + ".0" if key.endswith("to_out") else key
        torch.testing.assert_close(factor.delta(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
    # diffusers refuses a file with both alphas and a configuration
    kohya.save(patch, tmp_path / "again.safetensors")
    changes = diffusers_changes(tmp_path / "again.safetensors")
    close(patch, kohya.load(tmp_path / "again.safetensors"), rtol=1e-5, atol=1e-6)
    for key, factor in patch.factors.items():
        torch.testing.assert_close(changes[key], factor.delta(), rtol=1e-5, atol=1e-6)


numbers = st.one_of(st.integers(1, 64), st.floats(0.25, 64))


@few
@given(
    rank=st.integers(1, 6),
    alpha=numbers,
    pattern=st.one_of(st.none(), numbers),
    rslora=st.booleans(),
    prefix=st.sampled_from(["unet.", ""]),
    stated=st.one_of(st.none(), numbers),
)
def test_adapter_configurations(rank, alpha, pattern, rslora, prefix, stated):
    keys = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ]
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "alpha_pattern": {}}
    if pattern is not None:
        config["alpha_pattern"] = {"attn2.to_k": pattern, ".*to_k": 1000}
    state = {}
    for key in keys:
        state[f"unet.{key}.lora_B.weight"], state[f"unet.{key}.lora_A.weight"] = rand(32, rank), rand(rank, 32)
        if stated is not None:
            state[f"unet.{key}.alpha"] = torch.tensor(stated)
    metadata = {CONFIG: json.dumps({prefix + name: value for name, value in config.items()})}
    patch = kohya.from_state(state, metadata)
    assert CONFIG not in patch.metadata
    plain = kohya.from_state(kohya.with_alphas(state, metadata, "a file"))
    for key in keys:
        wanted = alpha if pattern is None or "to_k" not in key else pattern
        scale = wanted / (math.sqrt(rank) if rslora else rank) if stated is None else stated / rank
        change = scale * state[f"unet.{key}.lora_B.weight"] @ state[f"unet.{key}.lora_A.weight"]
        torch.testing.assert_close(patch.factors[key].delta(), change, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain.factors[key].delta(), change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"lora_alpha": NaN}',
        '{"lora_alpha": "8"}',
        '{"unet.lora_alpha": true}',
        '{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}',
        '{"lora_alpha": 1, "alpha_pattern": {"a*a*a*a*a*": 2}}',
        '{"lora_alpha": 1, "alpha_pattern": {"to_(k": 2}}',
        '{"lora_alpha": 1, "alpha_pattern": {"to_k": null}}',
    ],
)
def test_a_configuration_that_cannot_be_read_is_no_alpha_of_one(config):
    state = {f"{LAYER}.lora_up.weight": torch.ones(4, 1), f"{LAYER}.lora_down.weight": torch.ones(1, 4)}
    with pytest.raises(PatchError, match=r"lora_adapter_metadata' in the metadata of 'x'.* cannot be read"):
        kohya.from_state(state, {CONFIG: config}, source="x")


# -- namings, dtypes and alphas -----------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NAMINGS = {
    "kohya": ("lora_unet_{flat}", ".lora_up.weight", ".lora_down.weight"),
    "lycoris": ("lycoris_{flat}", ".lora_up.weight", ".lora_down.weight"),
    "lycoris_unet": ("lycoris_unet_{flat}", ".lora_up.weight", ".lora_down.weight"),
    "processor": ("{path}", "up", "down"),
    "unet processor": ("unet.{path}", "up", "down"),
    "linear layer": ("unet.{dotted}", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "old peft": ("unet.{dotted}", ".lora.up.weight", ".lora.down.weight"),
    "peft": ("base_model.model.{dotted}", ".lora_B.weight", ".lora_A.weight"),
    "default adapter": ("base_model.model.{dotted}", ".lora_B.default.weight", ".lora_A.default.weight"),
    "named adapter": ("unet.{dotted}", ".lora_B.my-style_2.weight", ".lora_A.my-style_2.weight"),
    "comfyui": ("diffusion_model.{ldm}", ".lora_up.weight", ".lora_down.weight"),
}


def names_in(naming: str, key: str) -> tuple[str, str, str]:
    """The names of up, down and alpha of a layer."""
    start, up, down = NAMINGS[naming]
    dotted = key + ".0" if key.endswith("to_out") else key
    ldm = FOUND.layer(key).ldm_key + (".0" if key.endswith("to_out") else "")
    if "{path}" in start:
        site, _, which = key.rpartition(".")
        layer = start.format(path=f"{site}.processor.{which}_lora")
        return f"{layer}.up.weight", f"{layer}.down.weight", f"{layer}.alpha"
    layer = start.format(flat=dotted.replace(".", "_"), dotted=dotted, ldm=ldm)
    return layer + up, layer + down, layer + ".alpha"


alphas = st.one_of(
    st.none(),
    st.floats(-64, 64).map(torch.tensor),
    st.integers(0, 64).map(torch.tensor),
    st.floats(0, 8).map(lambda value: torch.tensor([value], dtype=torch.float16)),
    st.floats(0, 8).map(lambda value: torch.tensor([[value]], dtype=torch.bfloat16)),
).filter(lambda alpha: alpha is None or abs(float(alpha)) > 1e-6)  # one of 0 is refused


@few
@given(
    naming=st.sampled_from(sorted(NAMINGS)),
    dtype=st.sampled_from(FLOATS),
    ranks=st.dictionaries(st.sampled_from(ATTENTION), st.integers(1, 5), min_size=1, max_size=4),
    alpha=alphas,
)
def test_every_naming_dtype_rank_and_alpha_is_read(tmp_path_factory, naming, dtype, ranks, alpha):
    patch = mixed_patch(ranks, 1.0).to(dtype)
    state = {}
    for key, factor in patch.factors.items():
        up, down, name = names_in(naming, key)
        state[up], state[down] = factor.up.contiguous(), factor.down.contiguous()
        if alpha is not None:
            state[name] = alpha.clone()
    path = tmp_path_factory.mktemp("read") / "p.safetensors"
    save_file(state, path)
    loaded = kohya.load(path)
    assert set(loaded.factors) == set(ranks)
    for key, factor in patch.factors.items():
        scale = 1.0 if alpha is None else float(alpha) / factor.rank
        read = loaded.factors[key]
        torch.testing.assert_close(read.delta(), scale * factor.delta(), rtol=1e-5, atol=1e-5, check_dtype=False)
        assert read.up.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert contents_of(read_safetensors(path)[0]).ranks == tuple(sorted(set(ranks.values())))
    # and what is made of several files of any dtypes
    combined = Patch.combined([(loaded, 1.0), (mixed_patch(ranks), 1.0)])
    kohya.save(combined, path)
    close(combined, kohya.load(path), rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("part", ["up", "down"])
def test_integers_are_refused_by_name(tmp_path, dtype, part):
    state = kohya.to_state(random_patch(FOUND, rank=2))
    state[f"{LAYER}.lora_{part}.weight"] = state[f"{LAYER}.lora_{part}.weight"].to(dtype)
    save_file(state, tmp_path / "p.safetensors")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(PatchError, match=rf"{LAYER}.lora_{part}.weight in .*{name} values"):
        kohya.load(tmp_path / "p.safetensors")
    with pytest.raises(PatchError, match=LAYER):
        patch_of(state)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_context_maps_of_every_dtype(tmp_path, dtype):
    state = {"context_map.up": rand(32, 2).to(dtype), "context_map.down": rand(2, 32).to(dtype)}
    write_safetensors(state, tmp_path / "m.safetensors", {"forget_concept.format": "context_map"})
    loaded, metadata = context_map.load(tmp_path / "m.safetensors")
    wide = LowRank(*(tensor.double() for tensor in state.values())).delta()
    torch.testing.assert_close(loaded[TOKENS].delta().double(), wide, rtol=1e-5, atol=1e-5)
    assert len(context_map.expand(loaded, FOUND, metadata)) == 2 * len(FOUND.sites)
    write_safetensors({n: t.to(torch.int8) for n, t in state.items()}, tmp_path / "m.safetensors")
    with pytest.raises(PatchError, match=r"context_map\.up in .*int8"):
        context_map.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "alpha",
    [
        torch.ones(2),
        torch.ones(0),
        torch.ones(2, 1),
        torch.tensor(math.nan),
        torch.tensor([math.inf]),
        torch.tensor(True),
        torch.tensor(1j),
    ],
    ids=lambda alpha: f"{list(alpha.shape)}{alpha.dtype}",
)
def test_an_alpha_is_one_finite_number(alpha):
    state = kohya.to_state(random_patch(FOUND, rank=2)) | {f"{LAYER}.alpha": alpha}
    with pytest.raises(PatchError, match=rf"alpha {LAYER}\.alpha in .*one finite number"):
        patch_of(state)


# -- what cannot be applied ---------------------------------------------------------------------------------------


def lora(layer: str, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_up.weight": torch.ones(8, rank), f"{layer}.lora_down.weight": torch.ones(rank, 6)}


UNSUPPORTED = {
    "LoHa": {f"{LAYER}.hada_{n}": torch.ones(3, 3) for n in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "LoKr": {f"{LAYER}.lokr_{n}": torch.ones(3, 3) for n in ("w1", "w2_a", "w2_b")},
    "DoRA": lora(LAYER, 3) | {f"{LAYER}.dora_scale": torch.ones(8, 1)},
    "DoRA of peft": lora(LAYER, 3) | {f"{LAYER}.lora_magnitude_vector.default.weight": torch.ones(8)},
    "OFT": {f"{LAYER}.oft_blocks": torch.ones(2, 2, 2)},
    "GLoRA": {f"{LAYER}.{n}.weight": torch.ones(3, 3) for n in ("a1", "a2", "b1", "b2")},
    "full weights": {f"{LAYER}.diff": torch.ones(8, 6)},
    "bias": lora(LAYER, 3) | {f"{LAYER}.lora_B.bias": torch.ones(8)},
    "text encoder": lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 3),
    "text encoder of diffusers": {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{n}.weight": torch.ones(3, 3)
        for n in ("up", "down")
    },
    "other layers of the UNet": lora("lora_unet_down_blocks_0_resnets_0_conv1", 3),
    "another model": lora("transformer.transformer_blocks.0.attn.to_q", 3),
}


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED))
@pytest.mark.parametrize("beside", [False, True])
def test_what_cannot_be_applied_is_refused_whole_and_inspected(kind, beside):
    state = dict(UNSUPPORTED[kind])
    other = LAYER.replace("to_k", "to_v")
    if beside:  # sound layers beside it are not applied without it
        state |= lora(other, 2)
    with pytest.raises(UnsupportedAdapterError, match="load it with the host's own LoRA loader"):
        kohya.from_state(state)
    with pytest.raises(UnsupportedAdapterError):
        patch_of(LoraState(state))
    contents = contents_of_lora(LoraState(state))
    assert contents.layers == 1 + beside
    stated = f"{dict(contents.kinds)} {dict(contents.places)}"
    assert kind.split(" of ")[0] in stated
    assert contents.why_not is not None and "plain LoRA" in contents.why_not
    if kind not in ("OFT", "GLoRA", "full weights"):
        assert contents.ranks == ((2, 3) if beside else (3,))


def test_a_dora_by_its_metadata_alone_is_refused():
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        kohya.from_state(lora(LAYER), {CONFIG: '{"unet.lora_alpha": 4, "unet.use_dora": true}'})


def test_tensors_of_unknown_meaning_are_refused_and_named():
    state = lora(LAYER) | {f"{LAYER}.something_new": torch.ones(1)}
    with pytest.raises(UnsupportedAdapterError, match=r"unknown meaning .*something_new"):
        kohya.from_state(state)
    assert contents_of(state).unknown == (f"{LAYER}.something_new",)


def test_what_is_no_adapter_is_not_inspected():
    for state in ({}, {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}):
        with pytest.raises(PatchError, match="holds no LoRA"):
            contents_of(state)
    with pytest.raises(PatchError, match="incomplete"):
        contents_of({f"{LAYER}.lora_up.weight": torch.ones(8, 1)})
    with pytest.raises(PatchError, match="is not a tensor"):
        patch_of({f"{LAYER}.lora_up.weight": torch.ones(8, 1), "reshape": (1, 2)})


# -- endings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.ckpt", "p.sft", "p", "p.safetensors.pt", "p.v1.5"])
def test_only_safetensors_files_are_written(tmp_path, name):
    patch = random_patch(FOUND, rank=2)
    with pytest.raises(PatchError, match=r"call it 'p(\.safetensors|\.v1\.5)?\.safetensors'"):
        kohya.save(patch, tmp_path / name)
    assert not list(tmp_path.iterdir())
    kohya.save(patch, tmp_path / "P.SafeTensors")


@pytest.mark.parametrize("name", ["UP.SAFETENSORS", "p.sft", "p.ckpt", "p.pt", "p"])
def test_content_decides_how_a_file_is_read(tmp_path, name):
    patch = random_patch(FOUND, rank=2)
    kohya.save(patch, tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").rename(tmp_path / name)
    close(patch, kohya.load(tmp_path / name))
    torch.save(state_of(patch), tmp_path / name)
    with pytest.raises(PatchError, match="pickle"):
        kohya.load(tmp_path / name)
