"""LoRA files of other programs in the command line: inspected whatever they are, and outputs under a fitting name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import random_patch

from forget_concept.core.formats import kohya

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def test_an_adapter_that_cannot_be_applied_is_inspected(run, tiny):
    state = kohya.to_state(random_patch(tiny.survey, rank=3))
    layers = len(state) // 3
    loha = {f"{LAYER.replace('to_k', 'to_v')}.hada_{n}": torch.ones(4, 4) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
    state = {name: tensor for name, tensor in state.items() if "blocks_0_attn2_to_v" not in name} | loha
    state |= {f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{n}.weight": torch.ones(5, 5) for n in ("up", "down")}
    save_file(state, "mixed.safetensors")
    assert run("inspect", "mixed.safetensors") == 0
    assert "LoHa of 1 layers" in run.out and "text encoder (1)" in run.out and "rank 3, 4, 5" in run.out
    assert "it cannot be applied" in run.out and "LoHa in 4 tensors" in run.out
    assert run("inspect", "mixed.safetensors", "--json") == 0
    assert run.json["kind"] == "unsupported" and run.json["kinds"]["LoHa"] == 1
    assert run.json["layers"] == sum(run.json["kinds"].values()) <= layers + 2
    assert run.json["ranks"] == [3, 4, 5] and "LoHa" in run.json["why_not"]
    for command in (
        ("inspect", "mixed.safetensors", "--model", "tiny"),
        ("generate", "--prompt", "a star", "--out", "x.png", "--patch", "mixed.safetensors", "--steps", "1"),
    ):
        assert run(*command) == 1
        assert "plain LoRA" in run.err and not (run.left - {"mixed.safetensors"})


def test_inspect_shows_the_dtype_of_the_file(run, tiny):
    for dtype, name in ((torch.float16, "float16"), (torch.float8_e5m2, "float8_e5m2"), (torch.bfloat16, "bfloat16")):
        kohya.save(random_patch(tiny.survey), "p.safetensors", dtype=dtype)
        assert run("inspect", "p.safetensors", "--json") == 0
        assert run.json["dtype"] == name and run.json["kind"] == "lora" and run.json["why_not"] is None


def test_an_alpha_in_the_metadata_is_the_strength_of_the_pictures(run, tiny):
    """A LoRA whose alpha is in its metadata draws what the same LoRA with alpha tensors draws."""
    state = kohya.to_state(random_patch(tiny.survey, rank=4, scale=0.05))
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    config = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 16})}
    save_file(plain, "metadata.safetensors", config)
    save_file(plain | {n: torch.tensor(16.0) for n in state if n.endswith(".alpha")}, "tensors.safetensors", config)
    save_file(plain, "neither.safetensors")
    pictures = []
    for name in ("metadata", "tensors", "neither"):
        args = ("generate", "--prompt", "a star", "--out", f"{name}.png", "--patch", f"{name}.safetensors")
        # a timed choice of precision could differ from call to call
        assert run(*args, "--steps", "2", "--precision", "float32") == 0
        with Image.open(f"{name}.png") as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("name", ["star.ckpt", "star.sft", "star.pt", "star"])
def test_an_output_of_another_ending_is_refused_before_the_work(run, tiny, name, monkeypatch):
    assert run("forget", "--concept", "star", "--out", "p.safetensors") == 0

    def loaded(*_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("forget_concept.core.cli.options.load_model", loaded)
    for command in (
        ("forget", "--concept", "star", "--out", name),
        ("forget", "--concept", "star", "--out", "q.safetensors", "--context-map", name),
        ("restore", "p.safetensors", "--concept", "star", "--out", name),
    ):
        assert run(*command) == 1
        assert "call it 'star.safetensors'" in run.err
        assert run.left == {"p.safetensors"}


@pytest.mark.parametrize("name", ["mini.safetensors", "mini.ckpt"])
def test_export_takes_no_file_for_its_folder(run, tmp_path, name):
    assert run("export", "--out", name) == 1
    assert "--out is a folder" in run.err and not Path(name).exists()


@pytest.mark.parametrize("name", ["UP.SAFETENSORS", "p.sft", "p.ckpt"])
def test_a_patch_is_read_by_its_content(run, tiny, name):
    kohya.save(random_patch(tiny.survey), "p.safetensors")
    Path("p.safetensors").rename(name)
    assert run("inspect", name, "--model", "tiny", "--json") == 0 and run.json["kind"] == "lora"
    for strength in ("", ":0.5"):
        args = ("generate", "--prompt", "a star", "--out", "x.png", "--patch", name + strength)
        assert run(*args, "--steps", "1") == 0
    Path(name).unlink()
    torch.save({"a": torch.ones(1)}, name)
    assert run("inspect", name) == 1 and "pickle" in run.err
