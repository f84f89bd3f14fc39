"""A patch through peft is the patch: on a pipeline, on a raw UNet and as an adapter folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from ldm_unet import ldm_unet
from tiny import rand, random_patch, tiny_unet

from forget_concept.core.errors import PatchError
from forget_concept.core.formats import load_patch, peft
from forget_concept.core.models.survey import survey
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch

pytest.importorskip("peft", "0.17", reason="peft 0.17 or later is a dependency of the package, and a host may lack it")

# the same sums in another order, float32; measured 0 to 2e-6 on outputs near 1
TOLERANCE = 1e-5


def uneven_patch(unet, seed=0, size=0.3):
    """A patch whose ranks differ by layer, of attention and feed-forward layers."""
    factors = {}
    for n, (key, layer) in enumerate(survey(unet).layers.items()):
        if n % 3 == seed % 3:
            d_out, d_in = layer.module.weight.shape
            rank = 1 + n % 4
            up, down = rand(d_out, rank, seed=n + seed), rand(rank, d_in, seed=n + seed + 999)
            factors[key] = LowRank(size * up, size * down)
    return Patch(factors, {"forget_concept.method": "test", "forget_concept.family": "other"})


def forward(unet):
    """The prediction of a tiny UNet of either naming on one fixed input."""
    dtype = next(unet.parameters()).dtype
    x, context, t = rand(1, 4, 8, 8).to(dtype), rand(1, 77, 32, seed=9).to(dtype), torch.tensor([100])
    with torch.no_grad():
        if survey_layout(unet) == "ldm":
            return unet(x, timesteps=t, context=context)
        return unet(x, t, encoder_hidden_states=context).sample


def survey_layout(unet) -> str:
    return "ldm" if hasattr(unet, "input_blocks") else "diffusers"


def difference(first, second) -> float:
    return float((first - second).abs().max())


def pipeline(unet):
    """A diffusers pipeline around a UNet: its adapter functions are what is tested."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def unet():
    return tiny_unet()


def test_an_adapter_is_our_own_application(unet):
    patch, base = uneven_patch(unet), forward(unet)
    for strength in (1.0, 0.4, -0.5, 0.0):
        with patch.applied(unet, strength):
            ours = forward(unet)
        handle = patch.apply(unet, strength, name="one")
        assert difference(forward(unet), ours) < TOLERANCE
        assert strength == 0 or difference(ours, base) > 100 * TOLERANCE
        handle.remove()
        assert torch.equal(forward(unet), base)


def test_a_pipeline_stacks_weighs_and_deletes_patches(unet):
    pipe, base = pipeline(unet), forward(unet)
    first, second = uneven_patch(unet), uneven_patch(unet, seed=1)
    with first.applied(unet), second.applied(unet):
        both = forward(unet)
    with first.applied(unet, 0.8), second.applied(unet, -0.3):
        weighed = forward(unet)
    with second.applied(unet, 0.5):
        alone = forward(unet)
    first.apply(pipe, name="first")
    second.apply(pipe, name="second")
    # the second one does not switch the first off
    assert difference(forward(unet), both) < TOLERANCE
    assert pipe.get_list_adapters() == {"unet": ["first", "second"]}
    pipe.set_adapters(["first", "second"], [0.8, -0.3])
    assert difference(forward(unet), weighed) < TOLERANCE
    pipe.set_adapters(["second"], [0.5])
    assert difference(forward(unet), alone) < TOLERANCE
    pipe.delete_adapters("first")
    assert difference(forward(unet), alone) < TOLERANCE
    pipe.delete_adapters("second")
    assert torch.equal(forward(unet), base)
    # and on again, where peft's layers without an adapter are still there
    second.apply(pipe, name="second", strength=0.5)
    assert difference(forward(unet), alone) < TOLERANCE
    pipe.unload_lora_weights()
    assert torch.equal(forward(unet), base) and survey(unet).layers


def test_removing_leaves_weights_layers_and_random_numbers_as_they_were(unet):
    first, second = uneven_patch(unet), uneven_patch(unet, seed=1)
    modules = {name: id(module) for name, module in unet.named_modules()}
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    pipe = pipeline(unet)
    state = torch.get_rng_state()
    with first.apply(pipe, name="a") as handle, second.apply(unet, name="b"):
        assert pipe.get_active_adapters() == ["a", "b"]
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: id(module) for name, module in unet.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == trainable
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    handle.remove()  # twice does no harm
    assert pipe.get_list_adapters() == {}
    with uneven_patch(unet).applied(unet):  # hooks need the UNet's own layers
        pass


def test_removing_one_switches_no_other_on(unet):
    base = forward(unet)
    second = uneven_patch(unet, seed=1)
    first = uneven_patch(unet).apply(unet, name="first")
    second.apply(unet, name="second")
    unet.set_adapters(["first"])
    first.remove()
    assert torch.equal(forward(unet), base)


def test_a_raw_unet_in_ldm_naming_takes_an_adapter():
    unet = ldm_unet()
    for n, p in enumerate(unet.parameters()):
        if not p.any():  # the original code starts its last layers at zero
            p.data = 0.1 * rand(*p.shape, seed=n)
    patch, base = random_patch(survey(unet), rank=2, scale=0.3), forward(unet)
    with patch.applied(unet):
        ours = forward(unet)
    first = patch.apply(unet, 0.5, name="one half")
    second = patch.apply(unet, 0.5, name="other half")
    assert difference(forward(unet), ours) < TOLERANCE < difference(base, ours)
    first.remove()
    second.remove()
    assert torch.equal(forward(unet), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_keep_their_precision_on_a_model_of_another_dtype(dtype):
    unet = tiny_unet().to(dtype)
    patch = uneven_patch(unet)
    with patch.applied(unet):
        ours = forward(unet)
    before = {key: (factor.up.clone(), factor.down.clone()) for key, factor in patch.factors.items()}
    patch.apply(unet, name="one")
    kept = [p for name, p in unet.named_parameters() if ".lora_" in name]
    assert kept and all(p.dtype == torch.float32 and not p.requires_grad for p in kept)
    assert forward(unet).dtype == dtype
    assert difference(forward(unet).double(), ours.double()) < (0.05 if dtype == torch.bfloat16 else TOLERANCE)
    for _, p in unet.named_parameters():
        p.data.zero_()
    assert all(torch.equal(patch.factors[key].up, up) for key, (up, _) in before.items())


def test_what_cannot_be_an_adapter_is_refused_and_changes_nothing(unet):
    patch, base = uneven_patch(unet), forward(unet)
    for name in ("", "a.b", "keys"):
        with pytest.raises(PatchError, match="cannot be called"):
            patch.apply(unet, name=name)
    absent = "mid_block.attentions.7.transformer_blocks.0.attn2.to_k"
    wrong = Patch({**patch.factors, absent: LowRank(rand(4, 1), rand(1, 4))})
    with pytest.raises(PatchError, match="another architecture"):
        wrong.apply(unet, name="one")
    with pytest.raises(PatchError, match="finite number"):
        patch.apply(unet, float("nan"), name="one")
    with pytest.raises(PatchError, match="has no UNet"):
        patch.apply(object(), name="one")
    assert not getattr(unet, "peft_config", None) and torch.equal(forward(unet), base)
    patch.apply(pipeline(unet))
    with pytest.raises(PatchError, match="'forget-concept' already"):
        patch.apply(unet, name="forget-concept")
    with pytest.raises(PatchError, match="another architecture"):
        wrong.apply(unet, name="two")
    assert difference(forward(unet), base) > TOLERANCE and list(unet.peft_config) == ["forget-concept"]


def test_nothing_is_added_where_it_would_have_no_effect(unet):
    first, second = uneven_patch(unet), uneven_patch(unet, seed=1)
    handle = first.apply(unet, name="first")
    unet.disable_adapters()
    with pytest.raises(PatchError, match="switched off"):
        second.apply(unet, name="second")
    unet.enable_adapters()
    unet.fuse_lora()
    with pytest.raises(PatchError, match="fused"):
        second.apply(unet, name="second")
    with pytest.raises(PatchError, match="fused"):
        handle.remove()
    unet.unfuse_lora()
    second.apply(unet, name="second")
    assert list(unet.peft_config) == ["first", "second"]


def test_a_folder_there_and_back_in_every_dtype(unet, tmp_path):
    patch = uneven_patch(unet)
    for dtype, tolerance in ((torch.float32, 0.0), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        folder = tmp_path / str(dtype)
        patch.save(folder, format="peft", dtype=dtype)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        loaded = load_patch(folder)
        assert loaded.metadata == patch.metadata and set(loaded.factors) == set(patch.factors)
        for key, factor in patch.factors.items():
            assert loaded.factors[key].rank == factor.rank
            assert difference(loaded.factors[key].delta(), factor.delta()) <= tolerance
    huge = Patch({key: LowRank(1e9 * factor.up, factor.down) for key, factor in patch.factors.items()})
    with pytest.raises(PatchError, match="float16"):
        huge.save(tmp_path / "no", format="peft", dtype=torch.float16)
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*"))


def test_peft_loads_the_folder_and_draws_the_same(unet, tmp_path):
    from peft import PeftModel

    patch = uneven_patch(unet)
    with patch.applied(unet):
        ours = forward(unet)
    patch.save(tmp_path / "adapter", format="peft")
    loaded = PeftModel.from_pretrained(unet, str(tmp_path / "adapter"))
    assert difference(forward(loaded.base_model.model), ours) < TOLERANCE


@pytest.mark.parametrize(("alpha", "stabilised"), [(6, False), (3, True)])
def test_an_adapter_that_peft_saved_is_the_patch_it_applies(unet, tmp_path, alpha, stabilised):
    from peft import LoraConfig, get_peft_model

    base = forward(unet)
    config = LoraConfig(
        r=3,
        lora_alpha=alpha,
        target_modules=["attn2.to_k", "attn2.to_v", "attn2.to_out.0"],
        rank_pattern={"attn2.to_v": 2},
        alpha_pattern={"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 9},
        use_rslora=stabilised,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs = get_peft_model(unet, config)
    wanted = forward(theirs.base_model.model)
    theirs.save_pretrained(str(tmp_path))
    plain = tiny_unet()
    assert torch.equal(forward(plain), base)
    with load_patch(tmp_path).applied(plain):
        assert difference(forward(plain), wanted) < TOLERANCE < difference(base, wanted)


def test_folders_that_are_none_or_more_are_refused(unet, tmp_path):
    patch = uneven_patch(unet)
    patch.save(tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def changed(**entries):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | entries))

    for entries in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["conv_in"]}):
        changed(**entries)
        with pytest.raises(PatchError, match=f"'{next(iter(entries))}' is set"):
            load_patch(tmp_path / "a")
    changed(peft_type="LOHA")
    with pytest.raises(PatchError, match="only LoRA"):
        load_patch(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(PatchError, match="cannot be read"):
        load_patch(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(PatchError, match="only adapters saved as safetensors"):
        load_patch(tmp_path / "a")
    with pytest.raises(PatchError, match="not a peft adapter"):
        load_patch(tmp_path)


def test_a_folder_of_other_files_is_not_written_into(unet, tmp_path):
    patch = uneven_patch(unet)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PatchError, match="holds other files"):
        patch.save(tmp_path, format="peft")
    with pytest.raises(PatchError, match="a folder"):
        patch.save(tmp_path / "p.safetensors", format="peft")
    with pytest.raises(PatchError, match="is a file"):
        patch.save(tmp_path / "notes.txt", format="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    for size in (0.3, 0.1):  # an adapter in its place is replaced
        uneven_patch(unet, size=size).save(tmp_path / "a", format="peft")
        again = load_patch(tmp_path / "a")
        assert again.max_abs() == pytest.approx(uneven_patch(unet, size=size).max_abs(), rel=1e-6)


def test_saving_names_its_formats_and_what_is_missing(unet, tmp_path):
    patch = uneven_patch(unet)
    with pytest.raises(PatchError, match="choose one of context-map, diffusers, kohya, peft"):
        patch.save(tmp_path / "p", format="onnx")
    with pytest.raises(PatchError, match="no context map"):
        patch.save(tmp_path / "p.safetensors", format="context-map")
    patch.save(tmp_path / "p.safetensors")
    assert set(load_patch(tmp_path / "p.safetensors").factors) == set(patch.factors)


def test_peft_is_imported_only_when_it_is_needed():
    code = (
        "import sys; import forget_concept.core.api; "
        "assert not {'peft', 'transformers', 'diffusers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_peft_the_error_says_what_to_install(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PatchError, match="pip install peft"):
        peft.attach(uneven_patch(unet), unet, "one")
