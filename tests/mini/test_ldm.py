"""The embedded model's export: diffusers reads it back exactly, and the original code's own classes take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ldm_unet import ldm_unet_class

from forget_concept.core.errors import ModelError, PatchError
from forget_concept.core.mini import config, ldm

# the last level without attention, as SD1's
DEEPER = config.UNET | {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SIMPLE = config.UNET | {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
GROUPED = config.AUTOENCODER | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}
UNGROUPED = config.AUTOENCODER | {"block_out_channels": (32, 64), "norm_num_groups": 32}
UNGROUPED |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def unet(shape: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**shape).eval()


def autoencoder(shape: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made = AutoencoderKL(**shape).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # norms too: a bias of zero would hide a mistake
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def parts(shapes: ldm.Shapes) -> ldm.Parts:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(CLIPTextConfig(**ldm.text_config(300, shapes.text)))
    # transformers 5 leaves the prefix out of the names
    words = {"text_model." + name.removeprefix("text_model."): t for name, t in text.state_dict().items()}
    return ldm.Parts(unet(dict(shapes.unet)).state_dict(), autoencoder(dict(shapes.vae)).state_dict(), words, shapes)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def diffusers_unet(state: dict[str, torch.Tensor], shape: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's UNet as diffusers itself reads one."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    found: dict[str, torch.Tensor] = convert_ldm_unet_checkpoint(dict(state), dict(shape))
    return found


def diffusers_autoencoder(state: dict[str, torch.Tensor], shape: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's autoencoder as diffusers itself reads one."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    found: dict[str, torch.Tensor] = convert_ldm_vae_checkpoint(dict(state), dict(shape))
    return found


@pytest.mark.parametrize("shape", [SIMPLE, DEEPER], ids=["two levels", "three levels"])
def test_diffusers_reads_the_exported_unet_back_exactly(shape: dict[str, Any]) -> None:
    state = unet(shape).state_dict()
    there = ldm.unet_to_ldm(state, shape)
    assert len(there) == len(state)
    assert_same(diffusers_unet({ldm.UNET_PREFIX + name: t for name, t in there.items()}, shape), state)


@pytest.mark.parametrize("shape", [GROUPED, UNGROUPED], ids=["8 groups", "32 groups"])
def test_diffusers_reads_the_exported_autoencoder_back_exactly(shape: dict[str, Any]) -> None:
    state = autoencoder(shape).state_dict()
    there = ldm.autoencoder_to_ldm(state, shape)
    assert len(there) == len(state)
    assert_same(diffusers_autoencoder({ldm.VAE_PREFIX + name: t for name, t in there.items()}, shape), state)


@pytest.mark.parametrize("shape", [SIMPLE, DEEPER], ids=["two levels", "three levels"])
def test_the_original_unet_takes_every_weight_and_predicts_the_same(shape: dict[str, Any]) -> None:
    original = ldm_unet_class()(**ldm.unet_config(shape)).eval()
    ours = unet(shape)
    original.load_state_dict(ldm.unet_to_ldm(ours.state_dict(), shape))  # strict
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, shape["cross_attention_dim"])
    times = torch.tensor([3, 700])
    with torch.no_grad():
        expected = ours(x, times, encoder_hidden_states=context, return_dict=False)[0]
        assert torch.allclose(original(x, timesteps=times, context=context), expected, atol=2e-5)


def test_stable_diffusion_1_is_the_original_of_320_channels() -> None:
    from diffusers import UNet2DConditionModel

    levels = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    shape = {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": levels,
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    }
    with torch.device("meta"):
        ours = UNet2DConditionModel(**shape).state_dict()
        theirs = ldm_unet_class()(**ldm.unet_config(shape)).state_dict()
    there = ldm.unet_to_ldm(ours, shape)
    assert {name: t.shape for name, t in there.items()} == {name: t.shape for name, t in theirs.items()}


def test_padding_computes_the_same_with_the_norms_of_the_hosts() -> None:
    """The padded weights in a network of 32 groups (diffusers' own, of the padded widths) draw the same picture."""
    from diffusers import AutoencoderKL

    ours = autoencoder(GROUPED)
    widths = tuple(4 * width for width in GROUPED["block_out_channels"])
    hosts_shape = GROUPED | {"block_out_channels": widths, "norm_num_groups": 32}
    hosts = AutoencoderKL(**hosts_shape).eval()
    padded = ldm.padded_autoencoder(ldm.autoencoder_to_ldm(ours.state_dict(), GROUPED), GROUPED)
    hosts.load_state_dict(diffusers_autoencoder({ldm.VAE_PREFIX + n: t for n, t in padded.items()}, hosts_shape))
    assert ldm.ddconfig(GROUPED)["ch"] == widths[0]
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(picture).latent_dist.mean
        assert torch.allclose(hosts.encode(picture).latent_dist.mean, latents, atol=1e-4)
        assert torch.allclose(hosts.decode(latents).sample, ours.decode(latents).sample, atol=1e-4)


def test_a_checkpoint_holds_the_three_parts(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = parts(ldm.Shapes(SIMPLE, UNGROUPED))
    path = tmp_path / "mini.safetensors"
    ldm.save_checkpoint(made, path, "some folder", dtype=torch.float32)
    state = load_file(path)
    prefixes = {name.split(".", 1)[0] for name in state}
    assert prefixes == {"model", "first_stage_model", "cond_stage_model"}
    assert_same(diffusers_unet(state, SIMPLE), dict(made.unet))
    assert_same(diffusers_autoencoder(state, UNGROUPED), dict(made.vae))
    text = {n.removeprefix(ldm.TEXT_PREFIX): t for n, t in state.items() if n.startswith(ldm.TEXT_PREFIX)}
    assert_same(text, dict(made.text))
    assert made.vocabulary == 300


def test_the_yaml_describes_the_original_classes(tmp_path: Path) -> None:
    shapes = ldm.Shapes(SIMPLE, GROUPED)
    described = yaml.safe_load(ldm.yaml_text("a folder: with a colon", shapes))["model"]["params"]
    assert described["scale_factor"] == config.LATENT_SCALE
    assert described["cond_stage_config"]["params"]["version"] == "a folder: with a colon"
    assert described["unet_config"]["params"] == ldm.unet_config(SIMPLE)
    dd = described["first_stage_config"]["params"]["ddconfig"]
    assert dd["ch"] == 128 and dd["ch_mult"] == [1, 1, 2, 2] and dd["num_res_blocks"] == 1
    original = ldm_unet_class()(**described["unet_config"]["params"])
    assert set(original.state_dict()) == set(ldm.unet_to_ldm(unet(SIMPLE).state_dict(), SIMPLE))


def test_the_embedded_model_can_be_said_in_the_original_layout() -> None:
    assert ldm.unet_config()["channel_mult"][0] == 1
    assert ldm.ddconfig()["ch"] % 32 == 0
    assert yaml.safe_load(ldm.yaml_text("folder"))


def test_a_diffusers_folder_is_read_without_diffusers(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes = ldm.Shapes(SIMPLE, GROUPED)
    made = unet(SIMPLE).half()
    made.save_pretrained(tmp_path / "unet", variant="fp16")
    autoencoder(GROUPED).save_pretrained(tmp_path / "vae")
    CLIPTextModel(CLIPTextConfig(**ldm.text_config(300))).save_pretrained(tmp_path / "text_encoder")
    read = ldm.read_parts(tmp_path)
    assert_same(read.unet, made.float().state_dict())
    assert ldm.unet_config(read.shapes.unet) == ldm.unet_config(shapes.unet)
    assert ldm.ddconfig(read.shapes.vae) == ldm.ddconfig(shapes.vae)
    assert ldm.text_config(300, read.shapes.text) == ldm.text_config(300)
    assert read.vocabulary == 300


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The embedded model is not there"):
        ldm.read_parts(tmp_path)
    unet(SIMPLE).save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PatchError, match="is cut off"):
        ldm.read_parts(tmp_path)


def test_what_the_layout_cannot_say_is_refused() -> None:
    with pytest.raises(ModelError, match="whole multiple"):
        ldm.unet_config(SIMPLE | {"block_out_channels": (64, 96)})
    with pytest.raises(ModelError, match="no layer of its configuration"):
        ldm.unet_to_ldm({"down_blocks.7.resnets.0.conv1.weight": torch.zeros(1)}, SIMPLE)
