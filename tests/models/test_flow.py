"""Flow models: the straight path between picture and noise, and Flux as diffusers' own pipeline draws with it."""

from __future__ import annotations

import pytest
import torch
from tiny import fit, flags, rand, state_hash
from torch import nn
from transformers_of_diffusers import SMALL

import forget_concept as fc
from forget_concept.core.errors import ModelError, PatchError, TokenError
from forget_concept.core.mini import load_modules
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.loading import from_pipeline
from forget_concept.core.models.token_positions import end_position, phrase_span, tail_positions
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

pytestmark = pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="diffusers' transformers need torch 2.4 or later")
TEXT, LENGTH = 24, 20


def t5_parts():
    """A tiny T5 encoder, and a tokenizer of T5's kind: no start token, an end token, zeros as padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *["a", "photo", "of", "the", "in", "on", "with", "star", "circle", "moon", "tree", "red", "blue", "house"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )
    config = T5Config(
        vocab_size=len(words), d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return T5EncoderModel(config).eval(), fast


@pytest.fixture(scope="module")
def pipe():
    """A FluxPipeline of tiny parts, which draws latents of 16×16."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    clip_tokenizer = load_modules()[2]
    ids = {"bos_token_id": len(clip_tokenizer) - 2, "eos_token_id": len(clip_tokenizer) - 1, "pad_token_id": 0}
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=16, **ids,
    )  # fmt: skip
    t5, t5_tokenizer = t5_parts()
    small = next(one for one in SMALL if one.family == "flux")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        clip = CLIPTextModel(clip_config).eval()
        vae = AutoencoderKL(latent_channels=2, norm_num_groups=4, block_out_channels=(8,), sample_size=16).eval()
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=1.0), vae, clip, clip_tokenizer, t5, t5_tokenizer, small.make()
    )
    pipe.tokenizer_max_length_2 = LENGTH
    pipe.default_sample_size = 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(pipe) -> LatentDiffusion:
    return from_pipeline(pipe, "tiny-flux")


def test_noise_is_added_on_the_straight_line_and_found_again(model):
    x0, noise = rand(3, 2, 16, 16, seed=1), rand(3, 2, 16, 16, seed=2)
    times = torch.tensor([0, 499, 999])
    x = model.add_noise(x0, noise, times)
    sigma = ((times + 1) / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise)
    true = LatentDiffusion(model.unet, model.text, None, "flow", eps_model=lambda *_: noise - x0)
    true.__dict__["survey"] = model.survey
    states = model.text.encode(["a", "a", "a"])
    torch.testing.assert_close(true.predict_noise(x, times, states), noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_pictures_are_those_of_diffusers_own_pipeline(pipe, model, steps):
    """Text states, packing, places, time steps and the sampler: the same latents from the same noise."""
    prompt, seeds = "a photo of a star", [7]
    noise = model.initial_noise(seeds)
    packed = pipe._pack_latents(noise, 1, 2, 16, 16)
    wanted = pipe(
        prompt, height=16, width=16, num_inference_steps=steps, guidance_scale=1.0, latents=packed,
        sigmas=[1 - i / steps for i in range(steps)], max_sequence_length=LENGTH, output_type="latent",
    ).images  # fmt: skip
    found = model.sample([prompt], seeds, steps=steps, guidance=model.guidance)
    # time steps are rounded to thousandths
    torch.testing.assert_close(pipe._pack_latents(found, 1, 2, 16, 16), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("changes", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=["fixed", "dynamic"])
def test_time_steps_are_shifted_as_the_pipelines_scheduler_says(pipe, changes):
    """Flux dev's are, by the size of the picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**changes)
    dynamic = {"mu": calculate_shift(64)} if "use_dynamic_shifting" in changes else {}
    scheduler.set_timesteps(sigmas=[1 - i / 5 for i in range(5)], **dynamic)
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        found = from_pipeline(pipe, "shifted").timesteps(5)
    finally:
        pipe.scheduler = before
    assert [t + 1 for t in found] == pytest.approx(scheduler.timesteps.tolist(), abs=0.51)


def test_the_second_order_sampler_draws_as_well(model):
    ddim, second = (model.sample(["a star"], [1], steps=16, guidance=1.0, sampler=one) for one in ("ddim", "dpm++"))
    fine = model.sample(["a star"], [1], steps=500, guidance=1.0)
    assert torch.isfinite(second).all() and (second - fine).norm() < (ddim - fine).norm()


def test_positions_are_counted_without_a_start_token(model):
    text = model.text
    assert phrase_span(text, "star", "a photo of a star") == (4, 1)
    assert end_position(text, "a photo of a star") == 5
    assert tail_positions(text, "red star", "a red star on the house")[0] == 1
    with pytest.raises(TokenError, match=f"reads {LENGTH - 1} beside start and end"):
        end_position(text, "a " * LENGTH)


def test_a_concept_is_forgotten_and_taken_back(pipe, model):
    """In the pipeline itself: the star's prompt draws what the circle's draws, and the model is left as it was."""
    before, flagged = state_hash(pipe.transformer), flags(pipe.transformer)
    settings = {"ridge": 1e-4, "templates": ("a photo of a {}",), "keep_common": False, "contexts": False}
    settings |= {"overshoot": 1.0, "reach": None}
    patch = fit(model, ForgetRequest((Concept("star", replacement="circle"),), settings=settings))
    assert set(patch.factors) == {"txt_in", "vector_in.in_layer"} and patch.about.text_layer == "flux:t5,final_norm"

    def drawn(word: str) -> torch.Tensor:
        return model.sample([f"a photo of a {word}"], [3], steps=4, guidance=1.0)

    star, circle = drawn("star"), drawn("circle")
    with patch.applied(model.survey):
        forgotten = drawn("star")
    assert (forgotten - circle).norm() < 0.1 * (star - circle).norm()
    assert torch.equal(drawn("star"), star)
    pytest.importorskip("peft", "0.17", reason="an adapter on a pipeline needs peft")
    handle = patch.apply(pipe)
    torch.testing.assert_close(drawn("star"), forgotten, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(drawn("star"), star)
    assert state_hash(pipe.transformer) == before and flags(pipe.transformer) == flagged


def test_at_guidance_one_a_negative_prompt_does_nothing_and_a_patch_does(model):
    star = model.sample(["a star"], [5], steps=4, guidance=1.0)
    assert torch.equal(model.sample(["a star"], [5], steps=4, guidance=1.0, negative="star"), star)
    settings = {"templates": ("a {}",), "keep_common": False, "contexts": False}
    patch = fc.fit(model, Concept("star", replacement="moon"), settings=settings)
    with patch.applied(model.survey):
        assert not torch.allclose(model.sample(["a star"], [5], steps=4, guidance=1.0), star)


def test_the_library_loads_a_flux_pipeline_and_says_what_it_cannot(pipe):
    model = fc.load_model(pipe)
    assert (model.prediction_type, model.guidance, model.latent_shape) == ("flow", 1.0, (2, 16, 16))
    sd3 = next(one for one in SMALL if one.family == "sd3").make()

    class Other:
        transformer, config = sd3, None

    with pytest.raises(ModelError, match="Stable Diffusion 3 pipeline, of which only Flux is read"):
        fc.load_model(Other())
    with pytest.raises(ModelError, match="comes without its noise schedule"):
        LatentDiffusion(pipe.transformer, model.text, None)
    with pytest.raises(PatchError, match="no UNet or transformer"):
        fc.fit(model, "star", settings={"templates": ("a {}",), "keep_common": False}).apply(object())
