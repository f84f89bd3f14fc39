"""Models from folders and files, and what is refused in words."""

from __future__ import annotations

import json

import pytest
import torch
from ldm_unet import ldm_unet
from safetensors.torch import save_file
from tiny import clip_parts, fit, original_names, rand, tiny_unet

from forget_concept.core import mini
from forget_concept.core.errors import ModelError
from forget_concept.core.mini.ldm import autoencoder_to_ldm
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.loading import from_pipeline, load_checkpoint
from forget_concept.core.models.safe_guidance import SafetyGuidance
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    text, tokenizer = clip_parts(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture()
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "tiny-model")
    return tmp_path / "tiny-model"


def test_a_diffusers_folder(pipeline, folder):
    model = load_checkpoint(folder)
    assert (model.name, model.prediction_type, model.latent_shape) == ("tiny-model", "v_prediction", (4, 8, 8))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a star",
        latents=model.initial_noise([3]),
        num_inference_steps=4,
        guidance_scale=5.0,
        height=64,
        width=64,
        output_type="pt",
    ).images
    latents = model.sample(["a star"], [3], steps=4, guidance=5.0)
    torch.testing.assert_close((model.decode(latents) + 1) / 2, theirs, atol=1e-4, rtol=1e-3)
    patch = fit(model, ForgetRequest((Concept("star", replacement="tree"),)))
    assert patch.metadata["forget_concept.base_name"] == "tiny-model"
    assert load_checkpoint(folder, clip_skip=2).text.layer != model.text.layer
    assert load_checkpoint(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_sdxl_shaped_folder(folder, tmp_path):
    text, tokenizer = clip_parts(tmp_path / "2", projection=True, seed=1)
    text.save_pretrained(folder / "text_encoder_2")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    unet = tiny_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    unet.save_pretrained(folder / "unet")
    model = load_checkpoint(folder)
    assert model.sample(["a star"], [1], steps=1).shape == (1, 4, 8, 8)
    assert model.survey.context_dim == 64


def test_half_precision_variants(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "m", variant="fp16")
    assert len(load_checkpoint(tmp_path / "m").survey) == 11


def test_pipelines_are_shared(pipeline):
    model = from_pipeline(pipeline, "mine")
    assert model.unet is pipeline.unet and model.name == "mine"


def test_refusals_in_words(folder, tmp_path):
    with pytest.raises(ModelError, match=r"no model 'nothing'.*'mini'"):
        load_checkpoint("nothing")
    for name in ("old.ckpt", "old.pt"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(ModelError, match="pickle"):
            load_checkpoint(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no folder 'unet'"):
        load_checkpoint(tmp_path / "empty")
    torch.save({"a": torch.zeros(1)}, tmp_path / "hidden.safetensors")
    with pytest.raises(ModelError, match="pickle"):
        load_checkpoint(tmp_path / "hidden.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "lora.safetensors")


def test_damaged_folders_are_said(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000])
    with pytest.raises(ModelError, match="unet' cannot be loaded"):
        load_checkpoint(folder)
    weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(data)
    with pytest.raises(ModelError, match="only as a pickle"):
        load_checkpoint(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ModelError, match="noise schedule"):
        load_checkpoint(folder)


def test_inpainting_models_are_refused(folder):
    unet = tiny_unet(in_channels=9)
    unet.save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="9 channels"):
        load_checkpoint(folder)


def test_a_single_file_without_its_configuration_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors' cannot be loaded"):
        load_checkpoint(tmp_path / "x.safetensors", config=tmp_path)


def single_file(pipeline, folder, path, marks=(), metadata=None):
    """The folder's weights in the original layout, with another UNet, which is returned."""
    unet = ldm_unet()
    for n, parameter in enumerate(unet.parameters()):
        parameter.data = rand(*parameter.shape, seed=n) * 0.05
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"norm_num_groups": 32}))
    state = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    state |= {f"cond_stage_model.transformer.{k}": v for k, v in original_names(pipeline.text_encoder).items()}
    vae = autoencoder_to_ldm(pipeline.vae.state_dict(), pipeline.vae.config)
    state |= {f"first_stage_model.{k}": v for k, v in vae.items()}
    state |= {mark: torch.zeros(0) for mark in marks}
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=metadata)
    return unet


def test_a_single_file_in_ldm_layout(pipeline, folder, tmp_path):
    """The original layout of the same weights, read with the folder as configuration: the same noise."""
    unet = single_file(pipeline, folder, tmp_path / "single.safetensors")
    model = load_checkpoint(tmp_path / "single.safetensors", config=folder)
    assert model.name == "single"
    for name in ("UP.SAFETENSORS", "single.sft", "single.ckpt"):  # content decides, not the ending
        (tmp_path / "single.safetensors").rename(tmp_path / name)
        named = load_checkpoint(tmp_path / name, config=folder)
        assert named.name == name.rpartition(".")[0] and named.model_hash == model.model_hash
        (tmp_path / name).rename(tmp_path / "single.safetensors")
    for site in model.survey:
        assert torch.equal(site.projection("to_k").weight, unet.get_submodule(site.ldm_name).to_k.weight)
    states = from_pipeline(pipeline).text.encode(["a star"])
    torch.testing.assert_close(model.text.encode(["a star"]).hidden, states.hidden)
    theirs = LatentDiffusion(unet, model.text, model.alphas_cumprod, latent_shape=(4, 8, 8))
    x, t = rand(1, 4, 8, 8), torch.tensor([400])
    with torch.no_grad():
        raw = theirs.predict_noise(x, t, states)  # the file says nothing of v; the folder's schedule does
        alpha = model.alphas_cumprod[400]
        torch.testing.assert_close(
            model.predict_noise(x, t, states), alpha.sqrt() * raw + (1 - alpha).sqrt() * x, atol=1e-5, rtol=1e-4
        )
        image = rand(1, 4, 8, 8, seed=2)
        torch.testing.assert_close(model.decode(image), from_pipeline(pipeline).decode(image), atol=1e-5, rtol=1e-4)


def test_nothing_is_drawn_on_the_terminal_while_files_are_read(pipeline, folder, tmp_path, capfd):
    single_file(pipeline, folder, tmp_path / "single.safetensors")
    capfd.readouterr()
    load_checkpoint(tmp_path / "single.safetensors", config=folder)
    tiny_unet().save_pretrained(folder / "unet")
    load_checkpoint(folder)
    mini.load()
    assert capfd.readouterr() == ("", "")


def scheduled(folder, **changes):
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


@pytest.mark.parametrize(
    ("marks", "metadata", "config", "expected"),
    [
        (("v_pred",), None, "epsilon", ("v_prediction", False)),
        (("v_pred", "ztsnr"), None, "epsilon", ("v_prediction", True)),
        (("ztsnr",), {"modelspec.prediction_type": "v"}, "epsilon", ("v_prediction", True)),
        ((), {"modelspec.prediction_type": "v"}, "epsilon", ("v_prediction", False)),
        ((), {"modelspec.prediction_type": "epsilon"}, "v_prediction", ("epsilon", False)),
        ((), {"modelspec.title": "x"}, "v_prediction", ("v_prediction", False)),
        ((), None, "epsilon", ("epsilon", False)),
    ],
)
def test_a_files_own_marks_beat_the_configuration(pipeline, folder, tmp_path, marks, metadata, config, expected):
    scheduled(folder, prediction_type=config)
    single_file(pipeline, folder, tmp_path / "x.safetensors", marks, metadata)
    model = load_checkpoint(tmp_path / "x.safetensors", config=folder)
    prediction, zero = expected
    assert model.prediction_type == prediction
    assert (float(model.alphas_cumprod[-1]) < 1e-6) is zero
    assert model.spacing == ("trailing" if zero else "leading")


@pytest.mark.parametrize(
    ("marks", "metadata", "words"),
    [
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "contradicts itself"),
        ((), {"modelspec.prediction_type": "flow"}, "prediction type 'flow'"),
        (("ztsnr",), {"modelspec.prediction_type": "epsilon"}, "zero terminal SNR"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(pipeline, folder, tmp_path, marks, metadata, words):
    single_file(pipeline, folder, tmp_path / "x.safetensors", marks, metadata)
    with pytest.raises(ModelError, match=words):
        load_checkpoint(tmp_path / "x.safetensors", config=folder)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("steps", [5, 8])
def test_a_folder_with_zero_terminal_snr_is_sampled_as_diffusers_does(folder, sampler, steps):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    scheduled(folder, rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True)
    model = load_checkpoint(folder)
    assert model.alphas_cumprod[-1] == 0 and model.spacing == "trailing"
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kinds = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
    scheduler = kinds[sampler].from_config(config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == model.timesteps(steps, "trailing")
    x = model.initial_noise([7])
    c, u = model.text.encode(["a star"]).hidden, model.text.encode([""]).hidden
    with torch.no_grad():
        for t in scheduler.timesteps:
            out, none = (model.unet(x, t, encoder_hidden_states=h).sample for h in (c, u))
            x = scheduler.step(none + 2.5 * (out - none), t, x).prev_sample
    ours = model.sample(["a star"], [7], steps, 2.5, sampler=sampler)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    safe = model.sample(["a star"], [7], steps, 2.5, sampler=sampler, safety=SafetyGuidance("moon"))
    assert torch.isfinite(safe).all() and not torch.allclose(safe, ours)
    unguided = model.sample(["a star"], [7], steps, 1.0, sampler=sampler)
    assert torch.isfinite(unguided).all()


def test_zero_terminal_snr_needs_v_prediction(folder):
    scheduled(folder, rescale_betas_zero_snr=True, prediction_type="epsilon")
    with pytest.raises(ModelError, match="zero terminal SNR"):
        load_checkpoint(folder)


def test_the_spacing_of_a_folder_is_read(folder):
    scheduled(folder, timestep_spacing="trailing")
    model = load_checkpoint(folder)
    trailing = model.sample(["a star"], [7], steps=3)
    assert torch.equal(trailing, model.sample(["a star"], [7], steps=3, spacing="trailing"))
    assert not torch.equal(trailing, model.sample(["a star"], [7], steps=3, spacing="leading"))
