"""Vectors in place of words: exact where they are words' own, learned without a trace on the model, found again."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, clip_parts, flags, rand, state_hash, tiny_unet

from forget_concept.core.errors import Cancelled, ForgetConceptError, ModelError, RequestError, TokenError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import CLIPText, SDXLText, clip_body
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.models.token_positions import end_position, tail_positions, token_positions
from forget_concept.core.training.textual_inversion import InversionSettings, InvertedText, invert, with_vectors


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


@pytest.fixture()
def model(parts):
    text = CLIPText(*parts)
    return LatentDiffusion(tiny_unet(), text, sd_alphas_cumprod(), latent_shape=(4, 8, 8), name="tiny")


def embeddings(encoder, words):
    """The input embeddings of real words."""
    return encoder.model.get_input_embeddings().weight.detach()[encoder.phrase_ids(words)].clone()


# -- the encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_real_words_vectors_give_the_real_words_states(parts, clip_skip):
    encoder = CLIPText(*parts, clip_skip=clip_skip)
    prompts = ["a photo of {}", "{}", "{}, seen twice: {}", "(a {})", "nothing of the kind", ""]
    for words in ("star", "a blue lighthouse"):
        text = InvertedText(encoder, {"<concept>": embeddings(encoder, words)})
        assert (text.max_length, text.layer) == (encoder.max_length, encoder.layer)
        said = [prompt.replace("{}", "<Concept>") for prompt in prompts]
        real = [prompt.replace("{}", words) for prompt in prompts]
        assert torch.equal(text.encode(said).hidden, encoder.encode(real).hidden)
        assert not text.encode(said).hidden.requires_grad


def test_the_slots_stand_where_the_words_would(parts):
    encoder = CLIPText(*parts)
    text = InvertedText(encoder, {"<concept>": torch.zeros(4, 32), "sks": torch.zeros(2, 32)})
    a = len(encoder.phrase_ids("a photo of"))
    assert token_positions(text, "<concept>", "a photo of <concept>") == [a + 1, a + 2, a + 3, a + 4]
    prompt = "a photo of <concept> beside <concept>"
    b = len(encoder.phrase_ids("beside"))
    assert token_positions(text, "<concept>", prompt) == [a + 1 + i for i in range(4)] + [
        a + b + 5 + i for i in range(4)
    ]
    assert end_position(text, prompt) == a + b + 9
    assert tail_positions(text, "<concept>", prompt) == list(range(a + 1, 77))
    # each its own number, told apart from words that hold them
    assert len(token_positions(text, "SKS", "one sks, <concept>")) == 2
    with pytest.raises(TokenError, match="does not occur"):
        token_positions(text, "sks", "he asks for tusks")
    assert text.token_ids("a star") == encoder.token_ids("a star")
    assert (
        len(text.token_ids(prompt)) == 77
        and text.token_ids(prompt)[b + a + 9 :] == encoder.token_ids("")[1 : 77 - 8 - a - b]
    )


def test_what_is_cut_off_is_cut_as_by_the_encoder(parts):
    encoder = CLIPText(*parts)
    text = InvertedText(encoder, {"<c>": embeddings(encoder, "star star")})
    for filler in ("x " * 74, "x " * 73, "x " * 80):
        assert torch.equal(text.encode([filler + "<c>"]).hidden, encoder.encode([filler + "star star"]).hidden)
        assert text.token_ids(filler + "<c>")[-1] == encoder.token_ids("")[-1]
    with pytest.raises(TokenError, match="cut off"):
        token_positions(text, "<c>", "x " * 74 + "<c>")


def test_several_words_each_have_their_vectors(parts):
    encoder = CLIPText(*parts)
    text = InvertedText(encoder, {"<a>": embeddings(encoder, "moon"), "<a> b": embeddings(encoder, "star")})
    said, real = ["<a> and <a>  B", "<a> bc"], ["moon and star", "moon bc"]
    assert torch.equal(text.encode(said).hidden, encoder.encode(real).hidden)


def test_the_encoder_is_left_as_it_was(parts, monkeypatch):
    encoder = CLIPText(*parts)
    before, flagged, rows = state_hash(encoder.model), flags(encoder.model), len(encoder.tokenizer)
    text = InvertedText(encoder, {"<c>": rand(3, 32)})
    text.encode(["<c>"])

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(clip_body(encoder.model).encoder, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        text.encode(["<c>"])
    assert (state_hash(encoder.model), flags(encoder.model), len(encoder.tokenizer)) == (before, flagged, rows)


def test_half_precision_encoders_take_full_precision_vectors(parts):
    encoder = CLIPText(*parts)
    try:
        encoder.model.bfloat16()
        vectors = embeddings(encoder, "star").float().requires_grad_()
        states = InvertedText(encoder, {"<c>": vectors}).states(["a <c>"]).hidden
        assert torch.equal(states, encoder.encode(["a star"]).hidden)
        (gradient,) = torch.autograd.grad(states.float().square().sum(), vectors)
        assert gradient.dtype == torch.float32 and float(gradient.abs().sum()) > 0
    finally:
        encoder.model.float()


def test_vectors_that_do_not_fit_are_refused(parts):
    encoder = CLIPText(*parts)
    for vectors, words in (
        ({"<c>": torch.zeros(2, 31)}, r"shape \(2, 31\); .* \(number, 32\)"),
        ({"<c>": torch.zeros(0, 32)}, r"\(0, 32\)"),
        ({"<c>": torch.zeros(32)}, r"\(32,\)"),
        ({" ": torch.zeros(1, 32)}, "empty or given twice"),
        ({"<c>": torch.zeros(1, 32), "<C>": torch.zeros(1, 32)}, "empty or given twice"),
        ({}, "no vectors"),
    ):
        with pytest.raises(RequestError, match=words):
            InvertedText(encoder, vectors)
    for other in (TinyText(), SDXLText(*parts[:1], *parts[:1], *parts[1:], *parts[1:])):
        with pytest.raises(ModelError, match=f"{type(other).__name__}.*by name"):
            InvertedText(other, {"<c>": torch.zeros(1, 32)})


# -- learning ------------------------------------------------------------------------------------------------------

QUICK = InversionSettings(tokens=3, steps=6, lr=1e-2, batch_size=2)


def test_the_model_is_bit_identical_and_only_the_vectors_learn(model):
    model.text.model.train()
    model.unet.requires_grad_(False)
    hashes = [(state_hash(m), flags(m)) for m in (model.unet, model.text.model)]
    latents = rand(3, 4, 8, 8)
    found = invert(model, latents, QUICK)
    assert found.shape == (3, 32) and found.dtype == torch.float32 and not found.requires_grad
    assert [(state_hash(m), flags(m)) for m in (model.unet, model.text.model)] == hashes
    assert all(p.grad is None for m in (model.unet, model.text.model) for p in m.parameters())
    assert torch.equal(latents, rand(3, 4, 8, 8))
    model.text.model.eval()


@pytest.mark.parametrize("way", ["cancel", "not finite"])
def test_it_comes_back_on_every_way_out(model, way, monkeypatch):
    hashes = [(state_hash(m), flags(m)) for m in (model.unet, model.text.model)]

    def progress(event):
        if event.step == 2 and way == "cancel":
            raise Cancelled

    if way == "not finite":
        predict, calls = model.predict_noise, []

        def poisoned(*args):
            calls.append(1)
            return predict(*args) * (float("nan") if len(calls) == 2 else 1)

        monkeypatch.setattr(model, "predict_noise", poisoned)
    expected, words = (ForgetConceptError, "step 2") if way == "not finite" else (Cancelled, None)
    with pytest.raises(expected, match=words):
        invert(model, rand(2, 4, 8, 8), QUICK, 0, progress)
    assert [(state_hash(m), flags(m)) for m in (model.unet, model.text.model)] == hashes


def denoising_loss(model, vectors, x0):
    """Of the given vectors, on fixed times and noise."""
    reading = with_vectors(model, {"<c>": vectors})
    times, noise = torch.arange(16) * 60 + 20, rand(16, 4, 8, 8, seed=5)
    with torch.no_grad():
        x = model.add_noise(x0.expand(16, -1, -1, -1), noise, times)
        return float(
            ((reading.predict_noise(x, times, reading.text.encode(["a photo of <c>"] * 16)) - noise) ** 2).mean()
        )


def test_the_loss_falls(model):
    x0 = rand(1, 4, 8, 8, seed=3)
    settings = InversionSettings(tokens=2, steps=30, lr=1e-1, batch_size=2, templates=("a photo of {}",))
    started = invert(model, x0, InversionSettings(tokens=2, steps=1, lr=1e-9, templates=("a photo of {}",)))
    found = invert(model, x0, settings)
    before, after = (denoising_loss(model, vectors, x0) for vectors in (started, found))
    assert after < before - 0.01 * before, (before, after)


def test_the_same_seed_gives_the_same_vectors(model):
    latents = rand(3, 4, 8, 8)
    first, again, other = (invert(model, latents, QUICK, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_it_works_inside_a_hosts_inference_mode(model):
    latents = rand(3, 4, 8, 8)
    plain = invert(model, latents, QUICK)
    with torch.inference_mode():
        assert torch.equal(invert(model, latents.clone(), QUICK), plain)


def test_cut_short_it_goes_on_to_the_same_result_and_is_not_made_twice(model, tmp_path):
    latents, workspace = rand(3, 4, 8, 8), Workspace(tmp_path)
    whole = invert(model, latents, QUICK)
    made = []

    def progress(event):
        if event.terms:
            made.append(event.step)
            if len(made) == 4:
                raise Cancelled

    with pytest.raises(Cancelled):
        invert(model, latents, QUICK, 0, progress, workspace=workspace)
    assert torch.equal(invert(model, latents, QUICK, 0, progress, workspace=workspace), whole)
    assert made == [1, 2, 3, 4, 5, 6]
    assert torch.equal(invert(model, latents, QUICK, 0, progress, workspace=workspace), whole)
    assert made == [1, 2, 3, 4, 5, 6]
    # of other pictures, another seed, another text encoder, it is another inversion
    invert(model, latents + 1e-3, QUICK, 0, progress, workspace=workspace)
    invert(model, latents, QUICK, 1, progress, workspace=workspace)
    bias = clip_body(model.text.model).final_layer_norm.bias
    with torch.no_grad():
        bias.add_(1)
        invert(model, latents, QUICK, 0, progress, workspace=workspace)
        bias.sub_(1)
    assert len(made) == 24


def test_it_starts_from_given_words(model):
    barely = {"steps": 1, "lr": 1e-6}
    found = invert(model, rand(1, 4, 8, 8), InversionSettings(tokens=5, init="star star", **barely))
    two = embeddings(model.text, "star star")
    assert len(two) == 2
    torch.testing.assert_close(found, torch.cat([two, two, two[:1]]), atol=2e-6, rtol=0)
    # and else from vectors that are spread as the table's own
    drawn = invert(model, rand(1, 4, 8, 8), InversionSettings(tokens=60, **barely))
    table = model.text.model.get_input_embeddings().weight.detach()
    assert float(drawn.std() / table.std()) == pytest.approx(1, abs=0.1)


def test_what_makes_no_sense_is_said(model):
    for settings, words in (
        ({"tokens": 0}, "'tokens'"),
        ({"steps": 0}, "'steps'"),
        ({"batch_size": 0}, "'batch_size'"),
        ({"lr": 0.0}, "'lr'"),
        ({"weight_decay": -1.0}, "'weight_decay'"),
        ({"templates": ()}, "templates"),
        ({"templates": ("a photo",)}, "exactly one"),
    ):
        with pytest.raises(RequestError, match=words):
            InversionSettings(**settings)
    for init in ("a blue lighthouse", " "):
        with pytest.raises(RequestError, match="must be 1 to 4"):
            invert(model, rand(1, 4, 8, 8), InversionSettings(init=init))
    for latents, words in (
        (rand(1, 4, 8, 16), r"\(1, 4, 8, 16\), and this model's are \(number, 4, 8, 8\)"),
        (rand(4, 8, 8), r"\(4, 8, 8\)"),
        (rand(0, 4, 8, 8), r"\(0, 4, 8, 8\)"),
        (rand(1, 4, 8, 8) / 0, "not finite"),
    ):
        with pytest.raises(RequestError, match=words):
            invert(model, latents, QUICK)
    with pytest.raises(TokenError, match="cut off"):
        invert(model, rand(1, 4, 8, 8), InversionSettings(templates=("x " * 74 + "{}",)))
    with pytest.raises(ModelError, match="TinyText"):
        invert(LatentDiffusion(model.unet, TinyText(), sd_alphas_cumprod(), latent_shape=(4, 8, 8)), rand(1, 4, 8, 8))


def test_a_gradient_that_never_arrives_is_no_success(model, monkeypatch):
    def vanishing(self, prompts):
        states = self.encoder.encode(prompts)
        return TextStates(states.hidden + 0 * self.vectors["<concept>"].sum())

    monkeypatch.setattr(InvertedText, "states", vanishing)
    with pytest.raises(ForgetConceptError, match="learned nothing"):
        invert(model, rand(1, 4, 8, 8), QUICK)


def test_a_model_that_reads_vectors_shares_all_but_its_words_and_its_hash(model):
    first, again, other = (with_vectors(model, {"<c>": torch.full((1, 32), x)}) for x in (0.0, 0.0, 1.0))
    assert first.unet is model.unet and first.text.encoder is model.text and isinstance(model.text, CLIPText)
    # what is kept under the hash of one (pictures it drew) is not taken for another's
    assert first.model_hash == again.model_hash != other.model_hash != model.model_hash != first.model_hash
    with torch.no_grad():
        x, t = rand(1, 4, 8, 8), torch.tensor([500])
        noise = [m.predict_noise(x, t, m.text.encode(["a star"])) for m in (model, first)]
    assert torch.equal(*noise)


# -- on the embedded model -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_eight_drawn_stars_become_words_for_a_star():
    from forget_concept.core import mini
    from forget_concept.core.mini import vocabulary, world

    model, probe = mini.load(), mini.load_probe()
    scenes = [world.Scene(shape="star", colour=c, seed=1000 + i) for i, c in enumerate(vocabulary.COLOURS)]
    pictures = torch.stack([torch.from_numpy(world.render(s)).permute(2, 0, 1) / 127.5 - 1 for s in scenes])
    vectors = invert(model, model.vae.encode(pictures), InversionSettings(steps=150, lr=1e-2))
    reading = with_vectors(model, {"<concept>": vectors})
    prompts = ["a photo of <concept>", "a drawing of <concept>"] * 8
    shown = probe.see(model.decode(reading.sample(prompts, range(16), 16, 2.5, sampler="dpm++")))
    assert sum(labels.object == "star" for labels in shown) >= 12, shown
