"""Patches as files: there and back in every naming, in a real loader, and files that are none."""

from __future__ import annotations

import os
import pickle
import stat

import pytest
import torch
from configs import SDXL
from safetensors.torch import load_file, save_file
from tiny import fit, forward, rand, random_patch, tiny_unet

from forget_concept.core.errors import PatchError
from forget_concept.core.files.safetensors_io import read_metadata, read_safetensors, write_safetensors
from forget_concept.core.formats import context_map, kohya, load_patch
from forget_concept.core.models.survey import survey
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest


def same(first: Patch, second: Patch, **tolerance) -> None:
    assert set(first.factors) == set(second.factors)
    for key, factor in first.factors.items():
        torch.testing.assert_close(factor.delta(), second.factors[key].delta(), **tolerance)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def patch(unet):
    return random_patch(
        survey(unet), rank=3, metadata={"forget_concept.method": "test", "forget_concept.family": "other"}
    )


@pytest.fixture(scope="module")
def sdxl():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return survey(UNet2DConditionModel(**SDXL))


def test_kohya_there_and_back(patch, tmp_path):
    path = tmp_path / "forget star.safetensors"
    kohya.save(patch, path)
    loaded = kohya.load(path)
    assert all(
        torch.equal(f.up, loaded.factors[k].up) and torch.equal(f.down, loaded.factors[k].down)
        for k, f in patch.factors.items()
    )
    said = loaded.metadata
    assert said["forget_concept.method"] == "test" and said["ss_output_name"] == "forget star"
    assert said["ss_v2"] == "False" and said["ss_network_dim"] == "3"
    raw = load_file(path)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    assert raw[f"{name}.lora_up.weight"].shape == (32, 3) and float(raw[f"{name}.alpha"]) == 3
    assert len(raw) == 3 * len(patch) and all(k.startswith("lora_unet_") for k in raw)


def test_half_precision_round_trip_is_measured(patch, tmp_path):
    path = tmp_path / "half.safetensors"
    kohya.save(patch, path, dtype=torch.float16)
    same(patch, kohya.load(path), rtol=5e-3, atol=1e-4)
    huge = Patch({key: LowRank(1e9 * factor.up, factor.down) for key, factor in patch.factors.items()})
    with pytest.raises(PatchError, match="float16"):
        kohya.save(huge, path, dtype=torch.float16)


@pytest.mark.parametrize(
    ("family", "version", "v2"), [("sd1", "sd_v1", "False"), ("sd2", "sd_v2", "True"), ("sdxl", "sdxl_", "False")]
)
def test_metadata_tells_hosts_the_family(patch, tmp_path, family, version, v2):
    path = tmp_path / "p.safetensors"
    kohya.save(patch.with_metadata(family=family), path)
    said = read_metadata(path)
    assert said["ss_base_model_version"].startswith(version) and said["ss_v2"] == v2


def test_sdxl_is_written_in_ldm_naming(sdxl, tmp_path):
    factors = {
        s.key("to_v"): LowRank(rand(*s.projection("to_v").weight.shape[:1], 1), rand(1, 2048)) for s in sdxl.sites[3::8]
    }
    patch = Patch(factors, {"forget_concept.family": "sdxl"})
    for given in (sdxl, None):
        path = tmp_path / "xl.safetensors"
        kohya.save(patch, path, given)
        names = set(load_file(path))
        assert "lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_v.lora_up.weight" in names
        assert "lora_unet_middle_block_1_transformer_blocks_3_attn2_to_v.lora_down.weight" in names
        same(patch, kohya.load(path))
        same(patch, kohya.load(path, sdxl))


@pytest.mark.parametrize(
    "rename",
    [
        lambda s, w: (f"lora_unet_{s.ldm_name}.{w}".replace(".", "_"), "lora_up.weight", "lora_down.weight"),
        lambda s, w: (f"diffusion_model.{s.ldm_name}.{w}", "lora_B.weight", "lora_A.weight"),
        lambda s, w: (f"diffusion_model.{s.ldm_name}.{w}", "lora_up.weight", "lora_down.weight"),
        lambda s, w: (f"unet.{s.name}.{w}", "lora_B.weight", "lora_A.weight"),
        lambda s, w: (f"base_model.model.{s.name}.{w}", "lora_B.default.weight", "lora_A.default.weight"),
        lambda s, w: (f"{s.name}.{w}", "lora.up.weight", "lora.down.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_every_naming_is_read(unet, patch, rename, alpha):
    found = survey(unet)
    state = {}
    for site in found:
        for which in ("to_q", "to_k", "to_v", "to_out"):
            layer = which + (".0" if which == "to_out" else "")
            name, up, down = rename(site, layer)
            name = name.replace(".", "_") if name.startswith("lora_unet_") else name
            factor = patch.factors[site.key(which)]
            state[f"{name}.{up}"], state[f"{name}.{down}"] = factor.up, factor.down
            if alpha is not None:
                state[f"{name}.alpha"] = torch.tensor(alpha)
    same(patch.scaled(1 if alpha is None else alpha / 3), kohya.from_state(state))


def test_an_ldm_file_of_other_depth_needs_the_survey():
    found = survey(tiny_unet(layers_per_block=3))
    patch = random_patch(found, which=("to_k",))
    state = kohya.to_state(patch, found, dotted=True)
    assert all(k.startswith("diffusion_model.") for k in state)
    same(patch, kohya.from_state(state, survey=found))


def test_diffusers_loads_the_file_and_draws_the_same(patch, tmp_path):
    pytest.importorskip("peft", reason="diffusers reads LoRA files through peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet = tiny_unet()
    base = forward(unet)
    with patch.applied(unet):
        ours = forward(unet)
    kohya.save(patch, tmp_path / "p.safetensors")
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path / "p.safetensors"), unet_config=unet.config)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet)
    assert float((ours - base).abs().max()) > 1e-3
    torch.testing.assert_close(forward(unet), ours, atol=2e-5, rtol=1e-3)


def whole_patch(found, rank=2):
    """A patch of every linear layer of the transformer blocks."""
    factors = {}
    for n, (key, layer) in enumerate(found.layers.items()):
        d_out, d_in = layer.module.weight.shape
        factors[key] = LowRank(0.1 * rand(d_out, rank, seed=n), 0.1 * rand(rank, d_in, seed=n + 500))
    return Patch(factors)


def test_the_whole_unet_there_and_back(unet, tmp_path):
    found = survey(unet)
    patch = whole_patch(found)
    assert len(patch) == 110
    kohya.save(patch, tmp_path / "p.safetensors")
    names = set(load_file(tmp_path / "p.safetensors"))
    for inner in ("attn1_to_q", "attn1_to_out_0", "attn2_to_k", "ff_net_0_proj", "ff_net_2"):
        assert f"lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_{inner}.lora_down.weight" in names
    same(patch, kohya.load(tmp_path / "p.safetensors"), rtol=0, atol=0)
    for survey_given in (None, found):
        for dotted in (False, True):
            as_sdxl = patch.with_metadata(family="sdxl")
            state = kohya.to_state(as_sdxl, survey_given, dotted=dotted)
            assert any("input_blocks" in name and "ff" in name for name in state)
            same(patch, kohya.from_state(state, survey=survey_given), rtol=0, atol=0)
    deep = survey(tiny_unet(layers_per_block=3))
    same(whole_patch(deep), kohya.from_state(kohya.to_state(whole_patch(deep), deep, dotted=True), survey=deep))


def test_diffusers_loads_the_whole_unets_file_and_draws_the_same(tmp_path):
    pytest.importorskip("peft", reason="diffusers reads LoRA files through peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet = tiny_unet()
    patch = whole_patch(survey(unet))
    base = forward(unet)
    with patch.applied(unet):
        ours = forward(unet)
    assert torch.equal(forward(unet), base) and float((ours - base).abs().max()) > 1e-3
    kohya.save(patch, tmp_path / "p.safetensors")
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path / "p.safetensors"), unet_config=unet.config)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet)
    torch.testing.assert_close(forward(unet), ours, atol=2e-5, rtol=1e-3)


def test_the_whole_unet_merged_is_the_whole_unet_patched(unet):
    patch = whole_patch(survey(unet))
    with patch.applied(unet):
        patched = forward(unet)
    twin = tiny_unet()
    merged = patch.merged_state(twin)
    assert len(merged) == 110 and not twin.load_state_dict(merged, strict=False).unexpected_keys
    torch.testing.assert_close(forward(twin), patched, atol=2e-5, rtol=1e-3)


def test_context_map_there_and_back_is_the_lora(model, tmp_path):
    patch = fit(model, ForgetRequest((Concept("star", replacement="circle"),), settings={"projections": ("to_v",)}))
    path = tmp_path / "map.safetensors"
    context_map.save(patch, path)
    loaded = load_patch(path, model.survey)
    same(patch, loaded, rtol=0, atol=0)
    assert loaded.metadata == patch.metadata
    kohya.save(patch, tmp_path / "lora.safetensors")
    assert path.stat().st_size * 5 < (tmp_path / "lora.safetensors").stat().st_size
    same(patch, load_patch(tmp_path / "lora.safetensors"), rtol=0, atol=0)
    with pytest.raises(PatchError, match="needs a model"):
        load_patch(path)
    with pytest.raises(PatchError, match=r"width 32.*takes 48"):
        load_patch(path, survey(tiny_unet(cross_attention_dim=48)))
    with pytest.raises(PatchError, match="no context map"):
        context_map.save(Patch(patch.factors), path)
    with pytest.raises(PatchError, match="not a context map"):
        context_map.load(tmp_path / "lora.safetensors")


# -- files that are none -------------------------------------------------------------------------------------------


def write(path, data):
    path.write_bytes(data)
    return path


def test_bad_files_are_refused_in_words(patch, tmp_path):
    good = tmp_path / "good.safetensors"
    kohya.save(patch, good)
    data = good.read_bytes()
    at = tmp_path / "bad.safetensors"
    header = int.from_bytes(data[:8], "little")
    for content, words in [
        (data[:-10], "cut off: it should have"),
        (data[: 8 + header // 2], "cut off: .* header alone"),
        (data[:5], "has only 5 bytes"),
        (b"", "has only 0 bytes"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"hello, this is plain text and no more", "not a safetensors"),
        (b"\x20" + bytes(7) + b"[1, 2" + b" " * 27, "header is invalid"),
        (b"\x02" + bytes(7) + b"{}", "holds no LoRA"),
    ]:
        with pytest.raises(PatchError, match=words):
            kohya.load(write(at, content))
    torch.save({"a": torch.zeros(1)}, at)
    with pytest.raises(PatchError, match="pickle"):
        read_safetensors(at)
    with pytest.raises(PatchError, match="There is no file"):
        kohya.load(tmp_path / "absent")
    with pytest.raises(PatchError, match="folder"):
        kohya.load(tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, protocol):
    """The length's first bytes, 0x80 and the protocol's number, open a pickle too."""
    length = protocol * 256 + 0x80
    path = tmp_path / "p.safetensors"
    save_file({"a": torch.ones(1)}, path, {"k": "v"})
    data = path.read_bytes()
    padding = length - int.from_bytes(data[:8], "little")
    header = data[8 : len(data) - 4] + b" " * padding
    path.write_bytes(length.to_bytes(8, "little") + header + data[-4:])
    assert torch.equal(read_safetensors(path)[0]["a"], torch.ones(1)) and read_metadata(path) == {"k": "v"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, n: s.pop(f"{n}.lora_up.weight"), "incomplete.*only a part"),
        (lambda s, n: s.update({f"{n}.lora_up.weight": s[f"{n}.lora_up.weight"] * float("nan")}), "NaN"),
        (
            lambda s, n: s.update({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}),
            "more than the UNet's attention",
        ),
        (lambda s, n: s.update({f"{n}.dora_scale": torch.ones(3)}), "plain LoRA has not .DoRA in 1 tensor"),
        (
            lambda s, n: s.update({n.replace("attn2_to_q", "ff_net_1") + ".lora_up.weight": torch.ones(3, 3)}),
            "more than the UNet's attention",
        ),
        (
            lambda s, n: s.update({n.replace("attn2", "attn1") + ".lora_up.weight": torch.ones(3, 3)}),
            "incomplete.*attn1",
        ),
        (lambda s, n: s.update({f"{n}.lora_down.weight": torch.ones(2, 32)}), "fit together"),
        (lambda s, n: [s.pop(k) for k in list(s)] and s.update({"x": torch.ones(3)}), "holds no LoRA"),
        (lambda s, n: s.update({f"{n}.lora_B.weight": torch.ones(32, 3)}), "twice"),
    ],
)
def test_bad_contents_are_refused_in_words(patch, tmp_path, change, words):
    state = kohya.to_state(patch)
    change(state, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q")
    save_file(state, tmp_path / "p.safetensors")
    with pytest.raises(PatchError, match=words):
        kohya.load(tmp_path / "p.safetensors")


def test_writing_is_whole_or_not_at_all(patch, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    write_safetensors({"a": torch.ones(3)}, path, {"k": "v"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~(os.umask(os.umask(0o022)) or 0) or os.name == "nt"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("forget_concept.core.files.safetensors_io.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kohya.save(patch, path)
    monkeypatch.undo()
    assert list(read_safetensors(path)[0]) == ["a"] and [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(PatchError, match="cannot be written"):
        kohya.save(patch, tmp_path / "absent" / "p.safetensors")
    with pytest.raises(PatchError, match="folder"):
        kohya.save(patch, tmp_path)
    with pytest.raises(PatchError, match="NaN"):
        write_safetensors({"a": torch.tensor([float("nan")])}, tmp_path / "n.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
