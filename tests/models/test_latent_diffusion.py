"""The model as methods see it: noise, conversion, sampling that depends on prompt and seed alone."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, rand, tiny_model, tiny_xl_model
from torch import nn

from forget_concept.core.errors import Cancelled, ModelError, RequestError
from forget_concept.core.models.autoencoders import DiffusersAutoencoder
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import ENCODE_ROWS, EncodedPrompts, encode_prompts

PROMPTS = ["a star", "a tree", "a star", "the moon on a hill"]


def test_schedule_is_stable_diffusions():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(sd_alphas_cumprod(), scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)


def test_noise_goes_on_as_diffusers_has_it(model):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, e, t = rand(3, 4, 8, 8), rand(3, 4, 8, 8, seed=1), torch.tensor([0, 400, 999])
    torch.testing.assert_close(model.add_noise(x, e, t), scheduler.add_noise(x, e, t), atol=1e-5, rtol=1e-4)


def test_v_prediction_is_converted():
    """A UNet that gives the true v must come out as the true ε."""
    x0, eps, t = rand(2, 4, 8, 8), rand(2, 4, 8, 8, seed=1), torch.tensor([3, 900])
    base = tiny_model()
    a = base.alphas_cumprod[t].view(-1, 1, 1, 1)
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    model = LatentDiffusion(
        base.unet, base.text, base.alphas_cumprod, "v_prediction", latent_shape=(4, 8, 8), eps_model=lambda *_: v
    )
    found = model.predict_noise(model.add_noise(x0, eps, t), t, base.text.encode(["", ""]))
    torch.testing.assert_close(found, eps, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="sample"):
        LatentDiffusion(base.unet, base.text, base.alphas_cumprod, "sample")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_is_diffusers_ddim(prediction, spacing, guidance):
    from diffusers import DDIMScheduler

    model = tiny_model(prediction_type=prediction)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=spacing == "trailing",
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == model.timesteps(5, spacing)
    x = model.initial_noise([7])
    c, u = model.text.encode(["a star"]).hidden, model.text.encode(["blurred"]).hidden
    with torch.no_grad():
        for t in scheduler.timesteps:
            out, none = (model.unet(x, t, encoder_hidden_states=h).sample for h in (c, u))
            x = scheduler.step(none + guidance * (out - none), t, x).prev_sample
    ours = model.sample(["a star"], [7], steps=5, guidance=guidance, negative="blurred", spacing=spacing)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-3)


def test_a_picture_depends_on_its_prompt_and_seed_alone(model):
    seeds = [1, 2, 3, 2**63]
    together = model.sample(PROMPTS, seeds, steps=3)
    for batch in (1, 3):
        torch.testing.assert_close(model.sample(PROMPTS, seeds, steps=3, batch=batch), together, atol=1e-4, rtol=1e-3)
    alone = model.sample([PROMPTS[3]], [seeds[3]], steps=3)
    torch.testing.assert_close(alone[0], together[3], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_words_are_encoded_once(model):
    model.sample(PROMPTS, [1, 2, 3, 4], steps=2, batch=2)
    assert sorted(filter(None, model.text.encoded)) == sorted({*PROMPTS} - {""})
    model.text.encoded.clear()
    model.sample(["a star"], [1], steps=1, guidance=1.0)
    assert [text for text in model.text.encoded if text] == ["a star"]
    model.text.encoded.clear()
    model.sample(["a star"], [1], steps=1, encoded=EncodedPrompts(TinyText(), ["a star"]))
    assert model.text.encoded == []


@pytest.mark.parametrize("pooled", [None, 4])
@pytest.mark.parametrize("count", [1, ENCODE_ROWS, ENCODE_ROWS + 3])
def test_fixed_prompts_are_encoded_in_batches_of_one_shape(monkeypatch, count, pooled):
    text, sizes = TinyText(pooled=pooled), []
    plain = text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: sizes.append(len(prompts)) or plain(prompts))
    prompts = [f"star {i}" for i in range(count)]
    found = encode_prompts(text, prompts)
    assert set(sizes) == {ENCODE_ROWS} and len(sizes) == -(-count // ENCODE_ROWS) and len(found) == count
    wanted = plain(prompts)
    torch.testing.assert_close(found.hidden, wanted.hidden)
    assert (found.pooled is None) is (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(found.pooled, wanted.pooled)


def test_negative_prompts_one_or_each(model):
    one = model.sample(PROMPTS[:2], [1, 2], steps=2, negative="blurred")
    each = model.sample(PROMPTS[:2], [1, 2], steps=2, negative=["blurred", "dark"])
    torch.testing.assert_close(one[0], each[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one[1], each[1], atol=1e-3)


def test_until_stops_on_the_way(model):
    noise = model.initial_noise([5])
    assert torch.equal(model.sample(["a star"], [5], steps=4, until=0), noise)
    half = model.sample(["a star"], [5], steps=4, until=2)
    full = model.sample(["a star"], [5], steps=4)
    assert not torch.allclose(half, full, atol=1e-3)
    t = model.timesteps(4)
    a, b = model.alphas_cumprod[t[2]], model.alphas_cumprod[t[3]]
    x = half
    for after in (b, model.alphas_cumprod[0]):
        eps = model._guided(x, t[2] if after == b else t[3], model.text.encode(["a star", ""]), 7.5)
        x = after.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - after).sqrt() * eps
        a = after
    torch.testing.assert_close(x.detach(), full, atol=1e-4, rtol=1e-3)


def test_progress_and_cancel(model):
    events = []
    model.sample(PROMPTS, [1, 2, 3, 4], steps=3, batch=2, progress=events.append)
    encoding = [e for e in events if e.message == "encoding the prompts"]
    assert encoding == events[: len(encoding)] and {e.step for e in encoding} == {0}
    assert [e.step for e in events[len(encoding) :]] == [1, 2, 3, 4, 5, 6] and {e.total for e in events} == {6}

    def stop(event):
        raise Cancelled

    with pytest.raises(Cancelled):
        model.sample(PROMPTS, [1, 2, 3, 4], steps=3, progress=stop)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": [1]}, "2 prompts, 1 seeds"),
        ({"negative": ["a"]}, "1 negative"),
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 1001}, "1 to 1000"),
        ({"until": 4, "steps": 3}, "0 to 3"),
        ({"spacing": "odd"}, "'odd'"),
        ({"guidance": float("nan")}, "finite"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_bad_counts_are_refused(model, arguments, words):
    with pytest.raises(RequestError, match=words):
        model.sample(**({"prompts": ["a", "b"], "seeds": [1, 2], "steps": 2} | arguments))
    assert model.sample([], [], steps=2).shape == (0, 4, 8, 8)


def test_steps_that_do_not_divide_the_schedule_stay_within_it(model):
    for steps in (1, 3, 7, 30, 333, 999, 1000):
        for spacing in ("leading", "trailing"):
            times = model.timesteps(steps, spacing)
            assert len(times) == steps and min(times) >= 0 and max(times) <= 999
            assert times == sorted(times, reverse=True)


def test_decode_in_chunks_and_the_scale_of_latents(model):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5).eval()
    model.vae = DiffusersAutoencoder(vae)
    images = rand(3, 3, 8, 8).clamp(-1, 1)
    latents = model.vae.encode(images)
    torch.testing.assert_close(latents, vae.encode(images).latent_dist.mode() * 0.5, atol=1e-6, rtol=1e-5)
    decoded = model.decode(latents, batch=2)
    torch.testing.assert_close(decoded, vae.decode(latents / 0.5).sample.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    model.vae = None
    with pytest.raises(ModelError, match="no autoencoder"):
        model.decode(latents)


def test_hash_is_of_the_attention_weights_whatever_the_precision():
    first, second = tiny_model(), tiny_model()
    assert first.model_hash == second.model_hash
    second.unet.half()
    del second.__dict__["survey"]
    assert second.model_hash == first.model_hash
    third = tiny_model()
    third.survey.sites[3].projection("to_v").weight.data[0, 0] += 1
    assert third.model_hash != first.model_hash
    assert LatentDiffusion(first.unet, first.text, first.alphas_cumprod, model_hash="abc").model_hash == "abc"


def test_pooled_text_and_sizes_reach_an_sdxl_unet():
    model = tiny_xl_model()
    unet = model.unet
    states, x, t = model.text.encode(["a star"]), rand(1, 4, 8, 8), torch.tensor([5])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        expected = unet(
            x,
            t,
            encoder_hidden_states=states.hidden,
            added_cond_kwargs={"text_embeds": states.pooled, "time_ids": sizes},
        ).sample
        torch.testing.assert_close(model.predict_noise(x, t, states), expected)
    with pytest.raises(ModelError, match="pooled"):
        model.predict_noise(x, t, TinyText().encode(["a star"]))


class LabelledUNet(nn.Module):
    """What an LDM UNet with pooled text is called with."""

    def __init__(self):
        super().__init__()
        self.label_emb = nn.Linear(2, 2)
        self.input_blocks = self.output_blocks = nn.ModuleList()

    def forward(self, x, timesteps=None, context=None, y=None):
        self.y = y
        return x


def test_ldm_sdxl_gets_pooled_text_and_sizes_as_one_vector():
    from diffusers.models.embeddings import get_timestep_embedding

    class Survey:
        layout = "ldm"

    model = LatentDiffusion(LabelledUNet(), TinyText(pooled=16), sd_alphas_cumprod(), latent_shape=(4, 8, 8))
    model.__dict__["survey"] = Survey()
    states = model.text.encode(["a star", ""])
    model.predict_noise(rand(2, 4, 8, 8), torch.tensor([5, 6]), states)
    y = model.unet.y
    assert y.shape == (2, 16 + 6 * 256)
    torch.testing.assert_close(y[:, :16], states.pooled)
    sizes = get_timestep_embedding(
        torch.tensor([64.0, 64, 0, 0, 64, 64]), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(y[1, 16:].view(6, 256), sizes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [8, 16])
def test_the_second_order_sampler_is_nearer_to_the_exact_solution(steps: int) -> None:
    """For Gaussian data the probability flow is known in closed form: x scales with the marginal's deviation."""
    spread = 0.3

    def exact_noise(x: torch.Tensor, timesteps: torch.Tensor, states: object) -> torch.Tensor:
        alpha = model.alphas_cumprod[timesteps.long()].view(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * x / (alpha * spread**2 + 1 - alpha)

    model = tiny_model()
    model._call = exact_noise
    start = model.initial_noise([1, 2])
    first = float(model.alphas_cumprod[model.timesteps(steps)[0]])
    last = float(model.alphas_cumprod[0])
    exact = start * ((last * spread**2 + 1 - last) / (first * spread**2 + 1 - first)) ** 0.5
    error = {
        sampler: float((model.sample(["a", "b"], [1, 2], steps, guidance=1.0, sampler=sampler) - exact).norm())
        for sampler in ("ddim", "dpm++")
    }
    assert error["dpm++"] < 0.6 * error["ddim"], error


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(RequestError, match="sampler"):
        tiny_model().sample(["a"], [1], 2, sampler="euler")
