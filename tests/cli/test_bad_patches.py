"""A bad patch, through every command that reads one: one sentence, nothing written."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import flags, random_patch, state_hash, tiny_unet

from forget_concept.core.formats import kohya
from forget_concept.core.models.survey import survey


def _pickled(path, good):
    path.write_bytes(pickle.dumps({"x": 1}, 4))


def _torch_saved(path, good):
    torch.save({"x": torch.ones(2)}, path)


def _cut_off(path, good):
    path.write_bytes(good.read_bytes()[:-100])


def _cut_off_in_the_header(path, good):
    path.write_bytes(good.read_bytes()[:50])


def _words(path, good):
    path.write_text("this is no patch at all, only words", encoding="utf-8")


def _empty(path, good):
    path.touch()


def _not_a_number(path, good):
    tensors = load_file(good)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)


def _another_architecture(path, good):
    kohya.save(random_patch(survey(tiny_unet(cross_attention_dim=64))), path)


def _no_matching_layer(path, good):
    layer = "lora_unet_down_blocks_9_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {"lora_up.weight": torch.ones(4, 1), "lora_down.weight": torch.ones(1, 4), "alpha": torch.ones(())}
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, path)


def _another_kind_of_lora(path, good):
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 1)}, path)


def _folder(path, good):
    path.mkdir()


def _missing(path, good):
    pass


BAD_PATCHES = [
    (_pickled, "pickle"),
    (_torch_saved, "pickle"),
    (_cut_off, "cut off"),
    (_cut_off_in_the_header, "cut off"),
    (_words, "not a safetensors file"),
    (_empty, "not a safetensors file"),
    (_not_a_number, "NaN"),
    (_another_architecture, "another architecture"),
    (_no_matching_layer, "No layer of this model matches"),
    (_another_kind_of_lora, "holds no LoRA of an attention layer"),
    (_folder, "folder"),
    (_missing, "no file"),
]


@pytest.mark.parametrize(("make", "says"), BAD_PATCHES, ids=[make.__name__[1:] for make, _ in BAD_PATCHES])
def test_a_bad_patch_is_one_sentence_and_nothing_is_written(run, tiny, tmp_path, make, says):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    kohya.save(random_patch(tiny.survey), good)
    make(bad, good)
    before = state_hash(tiny.unet), flags(tiny.unet)
    for args in (
        ("generate", "--prompt", "a star", "--out", "x.png", "--patch", good, "--patch", f"{bad}:0.5", "--steps", "1"),
        ("inspect", bad, "--model", "tiny", "--json"),
    ):
        assert run(*args) == 1
        assert says in run.err
        assert re.fullmatch(r"forget-concept: [^\n]+\n", run.err)
        assert run.out == ""
        assert not run.left
    assert (state_hash(tiny.unet), flags(tiny.unet)) == before
