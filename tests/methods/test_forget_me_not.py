"""Forget-Me-Not: the attention on the concept's own tokens falls, batches are not mixed up, nothing is ignored."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyText, clip_parts, fit, flags, rand, state_hash, tiny_model, tiny_unet
from torch import Tensor

from forget_concept.core.errors import Cancelled, ModelError, RequestError, TokenError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.formats import kohya
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.forget_me_not import ForgetMeNot, ForgetMeNotObjective, ForgetMeNotSettings
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.model_survey import PROJECTIONS
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.models.token_positions import token_positions
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.adapters import Deltas
from forget_concept.core.training.attention import AttentionCapture, attention_mass, token_mask
from forget_concept.core.training.batches import BatchSampler, GenerationSettings
from forget_concept.core.training.losses import attention_resteering

QUICK = {"latents": "zeros", "steps": 3, "batch_size": 2}


# the terms at weights of one size, whatever the tuned preset's are
PLAIN = {"contexts": False, "train": ("to_q", "to_k"), "preserve_weight": 1.0, "steer_weight": 1.0}


def request(*concepts, preserve=(), preset="tuned", seed=0, **settings):
    values = QUICK | (PLAIN if preset == "tuned" else {}) | settings
    return ForgetRequest(concepts or (Concept("star"),), preserve, "forget_me_not", preset, values, seed=seed)


def mass_on(model, phrase, prompt):
    mask = token_mask([token_positions(model.text, phrase, prompt)], 77)
    with torch.no_grad(), AttentionCapture(model.survey) as recorder:
        model.predict_noise(rand(1, 4, 8, 8), torch.tensor([500]), model.text.encode([prompt]))
        return float(attention_resteering(recorder.masses(mask)))


def test_the_attention_on_the_concept_falls(model):
    before = mass_on(model, "star", "a photo of star")
    patch = fit(model, request(steps=12, lr=1e-2, steer_weight=0.0, preserve=("tree",)))
    with patch.applied(model.unet):
        assert mass_on(model, "star", "a photo of star") < 0.5 * before


def test_several_concepts_of_several_sub_words(model):
    both = (Concept("butterfly"), Concept("watercolour wash", "style"))
    before = [mass_on(model, c.name, f"a photo of {c.name}") for c in both]
    patch = fit(model, request(*both, steps=12, lr=1e-2, preserve_weight=0.0, steer_weight=0.0))
    with patch.applied(model.unet):
        for concept, was in zip(both, before, strict=True):
            assert mass_on(model, concept.name, f"a photo of {concept.name}") < 0.7 * was


def test_a_replacement_steers_the_prediction():
    model = tiny_model()
    x, t = rand(4, 4, 8, 8), torch.tensor([100, 400, 600, 900])
    star, circle = (model.text.encode([f"a photo of {w}"] * 4) for w in ("star", "circle"))
    with torch.no_grad():
        wanted = model.predict_noise(x, t, circle)
        before = float((model.predict_noise(x, t, star) - wanted).norm())
    patch = fit(
        model,
        request(
            Concept("star", replacement="circle"),
            steps=30,
            lr=1e-2,
            train=("to_k", "to_v"),
            attention_weight=0.0,
            steer_weight=1e3,
            preserve_weight=0.0,
            templates=("a photo of {}",),
        ),
    )
    with torch.no_grad(), patch.applied(model.unet):
        assert float((model.predict_noise(x, t, star) - wanted).norm()) < 0.7 * before


def test_the_preserve_term_keeps_the_prediction():
    drift = []
    for weight in (0.0, 100.0):
        model = tiny_model()
        patch = fit(
            model, request(steps=10, lr=1e-2, train=("to_k", "to_v"), preserve_weight=weight, steer_weight=0.0, seed=3)
        )
        x, t = rand(4, 4, 8, 8), torch.tensor([100, 400, 600, 900])
        empty = model.text.encode([""] * 4)
        with torch.no_grad():
            base = model.predict_noise(x, t, empty)
            with patch.applied(model.unet):
                drift.append(float((model.predict_noise(x, t, empty) - base).norm()))
    assert drift[1] < 0.5 * drift[0]


def test_published_is_one_dense_change_of_all_four(model):
    before, flagged = state_hash(model.unet), flags(model.unet)
    asked = ForgetRequest(
        (Concept("star"),),
        method="forget_me_not",
        preset="published",
        settings={"steps": 2, "n_images": 2, "sample_steps": 2},
    )
    patch = fit(model, asked)
    assert state_hash(model.unet) == before and flags(model.unet) == flagged
    assert len(patch) == 4 * len(model.survey)
    published = ForgetMeNot.presets["published"]
    assert (published.steps, published.lr, published.weight_decay, published.batch_size) == (35, 2e-6, 0.01, 1)
    # two steps of AdamW at 2e-6 move no weight by more
    assert 0 < max(float(f.delta().abs().max()) for f in patch.factors.values()) < 4.1e-6
    targets, kept = ForgetMeNot().prompts(model.text, ForgetRequest((Concept("star", "style"),)), published)
    assert [p.text for p in targets] == ["a photo in the style of star"] and kept == []


def test_a_batch_is_each_prompt_with_its_own_positions(model):
    """The loss of a batch is that of its prompts one by one: ‖·‖² adds up. (The authors' mixed heads and batch.)"""
    with torch.no_grad():  # fresh weights look at all tokens alike, which would hide whose positions are whose
        for site in model.survey:
            site.projection("to_q").weight.mul_(30)
    settings = ForgetMeNotSettings(latents="zeros", batch_size=4, preserve_weight=0.0, steer_weight=0.0)
    asked = ForgetRequest((Concept("star"), Concept("butterfly")))
    prompts, _ = ForgetMeNot().prompts(model.text, asked, settings)
    batch = [prompts[i] for i in (0, 5, 2, 7)]
    generator = torch.Generator().manual_seed(0)
    material = BatchSampler(model, batch, [], generator, 4, GenerationSettings(1, 1.0))
    deltas = Deltas(model, ForgetMeNot().keys(model, settings), 8, generator)
    material.restore(material.state() | {"turn": torch.arange(4)})
    seen = {}
    original = model.predict_noise
    model.predict_noise = lambda x, t, s: seen.update(x=x, t=t, s=s) or original(x, t, s)
    with deltas.attached():
        together = float(ForgetMeNotObjective(material, deltas, settings)(1)["attention"].value.detach())
        squares = 0.0
        for i, prompt in enumerate(batch):
            with torch.no_grad(), AttentionCapture(model.survey) as recorder:
                original(seen["x"][i : i + 1], seen["t"][i : i + 1], seen["s"].index([i]))
                squares += float(attention_resteering(recorder.masses(token_mask([prompt.positions], 77)))) ** 2
        with torch.no_grad(), AttentionCapture(model.survey) as recorder:
            original(seen["x"], seen["t"], seen["s"])
            mask = token_mask([prompt.positions for prompt in batch], 77)
            tiled = {}
            for name, tile in (("each row's own", Tensor.repeat_interleave), ("the authors'", Tensor.repeat)):
                masses = []
                for site in recorder.sites:
                    # the authors' layout: batch and heads in one axis, batch first
                    q, k = (
                        x[site.name].unflatten(-1, (site.heads, -1)).transpose(1, 2).flatten(0, 1)
                        for x in (recorder.q, recorder.k)
                    )
                    over = (
                        tile(mask, site.heads, 0) if tile is Tensor.repeat_interleave else tile(mask, site.heads, 1, 1)
                    )
                    masses.append(attention_mass(q, k, over, 1))
                tiled[name] = float(attention_resteering(masses))
    assert together == pytest.approx(squares**0.5, rel=1e-4)
    assert len({len(p.positions) for p in batch}) > 1
    assert tiled["each row's own"] == pytest.approx(together, rel=1e-4)
    assert tiled["the authors'"] != pytest.approx(together, rel=1e-2), tiled


def test_positions_and_the_end_of_text():
    text = TinyText()
    templates = ("a {} and a butterfly",)
    for include_end, wanted in ((False, (2, 3, 4, 7, 8, 9)), (True, (2, 3, 4, 7, 8, 9, 10))):  # one end, not every pad
        settings = ForgetMeNotSettings(templates=templates, include_end=include_end)
        (target,), _ = ForgetMeNot().prompts(text, ForgetRequest((Concept("butterfly"),)), settings)
        assert target.positions == wanted


def test_the_same_seed_gives_the_same_patch():
    def made(seed):
        return fit(
            tiny_model(), request(latents="generated", n_images=1, sample_steps=1, seed=seed, preserve=("tree",))
        )

    first, again, other = made(1), made(1), made(2)
    key = next(iter(first.factors))
    assert all(
        torch.equal(f.up, again.factors[k].up) and torch.equal(f.down, again.factors[k].down)
        for k, f in first.factors.items()
    )
    assert not torch.equal(first.factors[key].down, other.factors[key].down)
    assert first.rank == 8


def test_progress_tells_of_every_term_and_cancel_leaves_the_model(model):
    before, flagged = state_hash(model.unet), flags(model.unet)
    events = []
    fit(
        model,
        request(Concept("star", replacement="circle"), latents="generated", n_images=1, sample_steps=2),
        events.append,
    )
    assert list(dict.fromkeys(e.message for e in events)) == [
        "encoding the prompts",
        "sampling 2 images",
        "re-steering attention",
    ]
    assert [e.step for e in events if e.message == "sampling 2 images"] == [1, 2]
    assert set(events[-1].terms) == {"attention", "steer", "preserve"} and events[-1].step == events[-1].total == 3

    messages = [e.message for e in events]
    for at in (messages.index("sampling 2 images") + 1, len(messages) - 1):  # while sampling, while training
        steps = iter(range(at - 1))

        def progress(event, steps=steps):
            if next(steps, None) is None:
                raise Cancelled

        with pytest.raises(Cancelled):
            fit(model, request(latents="generated", n_images=1, sample_steps=2), progress)
    assert state_hash(model.unet) == before and flags(model.unet) == flagged


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(Concept("star", replacement="circle"), preset="published"), "nothing is replaced"),
        (request(preset="published", preserve=("tree",)), "preserves nothing"),
        (request(attention_weight=0.0), "'attention_weight' 0"),
        (request(attention_weight=0.0, steer_weight=0.0), "nothing would be forgotten"),
        (request(train=("to_x",)), "to_q, to_k"),
        (request(train=()), "to_q, to_k"),
        (request(steps=0), "'steps'"),
        (request(rank=0), "'rank'"),
        (request(lr=0), "'lr'"),
        (request(latents="mine"), "'zeros', 'generated'"),
        (request(templates=("{} {}",)), "exactly one"),
        (request(preserve_weight=-1), "'preserve_weight'"),
    ],
)
def test_what_would_be_ignored_or_makes_no_sense_is_refused(model, asked, words):
    with pytest.raises(RequestError, match=words):
        fit(model, asked)


def test_words_that_are_cut_off_are_refused_before_any_work(model):
    events = []
    with pytest.raises(TokenError, match="cut off"):
        fit(model, request(Concept("s " * 74)), events.append)
    with pytest.raises(TokenError, match="cut off"):
        fit(model, request(preserve=("s " * 80,)), events.append)
    assert not events


# -- the whole UNet ------------------------------------------------------------------------------------------------


def test_the_whole_unet_is_every_linear_layer_of_its_transformers(model, tmp_path):
    before, flagged = state_hash(model.unet), flags(model.unet)
    mass = mass_on(model, "star", "a photo of star")
    alone = {"preserve_weight": 0.0, "steer_weight": 0.0}
    patch = fit(model, request(scope="unet", train=PROJECTIONS, steps=8, lr=1e-2, rank=2, **alone))
    assert set(patch.factors) == set(model.survey.layers) and len(patch) == 110 and patch.rank == 2
    changed = {
        key.split(".transformer_blocks.0.")[1] for key, f in patch.factors.items() if float(f.up.abs().max()) > 0
    }
    assert changed == {key.split(".transformer_blocks.0.")[1] for key in model.survey.layers}
    with patch.applied(model.unet):
        assert mass_on(model, "star", "a photo of star") < 0.7 * mass
    assert state_hash(model.unet) == before and flags(model.unet) == flagged
    kohya.save(patch, tmp_path / "p.safetensors")
    again = kohya.load(tmp_path / "p.safetensors")
    assert set(again.factors) == set(patch.factors)
    some = ForgetMeNot().keys(model, ForgetMeNotSettings(scope="unet", train=("to_k",)))
    assert {key.split(".transformer_blocks.0.")[1] for key in some} == {
        "attn1.to_k",
        "attn2.to_k",
        "ff.net.0.proj",
        "ff.net.2",
    }


# -- concepts from pictures ----------------------------------------------------------------------------------------


class Quarter:
    """An autoencoder of sorts: 64 × 64 pictures, eighth of the size, a fourth channel of the mean."""

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


@pytest.fixture()
def seeing(clip):
    text = CLIPText(*clip)
    return LatentDiffusion(tiny_unet(), text, sd_alphas_cumprod(), vae=Quarter(), latent_shape=(4, 8, 8), name="tiny")


def pictures(*names):
    return {name: torch.tanh(rand(4, 3, 64, 64, seed=n)) for n, name in enumerate(names)}


INVERTED = {"concept_source": "inversion", "latents": "images", "tokens": 3, "inversion_steps": 2, "n_images": 1}
INVERTED |= {"inversion_lr": 1e-2, "sample_steps": 1}


def test_a_concept_is_said_by_the_vectors_of_its_pictures(seeing, tmp_path, monkeypatch):
    """Its own number of positions beside a name of another number; the pictures reach the pools; nothing is left."""
    before = [(state_hash(m), flags(m)) for m in (seeing.unet, seeing.text.model)]
    asked = request(Concept("star"), Concept("Mira Vale", "identity"), preserve=("tree",), **INVERTED)
    seen, told = [], []
    objective = ForgetMeNot.objective

    def watched(self, material, *rest):
        seen.append(material)
        return objective(self, material, *rest)

    monkeypatch.setattr(ForgetMeNot, "objective", watched)
    inputs = Inputs(pictures("star", "Mira Vale"), Workspace(tmp_path))
    patch = fit(seeing, asked, told.append, inputs)
    assert [(state_hash(m), flags(m)) for m in (seeing.unet, seeing.text.model)] == before
    (material,) = seen
    assert {target.concept for target in material.targets} == {"<star>", "<Mira Vale>"}
    assert {len(target.positions) for target in material.targets} == {3}
    assert {target.text for target in material.targets} >= {"a photo of <star>", "a portrait of <Mira Vale>"}
    torch.testing.assert_close(material.pools["<star>"], Quarter().encode(inputs.images["star"]))
    messages = [event.message for event in told if event.terms]
    assert messages.count("learning vectors of the images") == 4 and messages[-1] == "re-steering attention"
    assert "<star>" not in patch.metadata["forget_concept.concepts"]
    # by name it is another edit; a second time the vectors are taken from the folder
    again = fit(seeing, asked, told.append, inputs)
    assert [e.message for e in told if e.terms].count("learning vectors of the images") == 4
    key = next(iter(patch.factors))
    assert torch.equal(again.factors[key].up, patch.factors[key].up)


def test_pictures_that_are_not_there_or_cannot_be_used_are_said(seeing, model):
    asked = request(**INVERTED)
    with pytest.raises(RequestError, match="no images of 'star'"):
        fit(seeing, asked)
    with pytest.raises(RequestError, match="no images of 'star' to learn it from"):
        fit(seeing, request(**INVERTED | {"latents": "zeros"}))
    model.vae = Quarter()
    with pytest.raises(ModelError, match=r"TinyText.*by name"):
        fit(model, asked, None, Inputs(pictures("star")))
    for setting in ("tokens", "inversion_steps", "inversion_lr"):
        with pytest.raises(RequestError, match=f"'{setting}'"):
            fit(seeing, request(**INVERTED | {setting: 0}), None, Inputs(pictures("star")))


def test_without_a_replacement_it_is_steered_to_the_prompt_without_it(model):
    """Attention alone leaves other ways in; with a replacement that is dropped, all of them lead elsewhere."""
    (target,), _ = ForgetMeNot().prompts(
        model.text, ForgetRequest((Concept("star"),)), ForgetMeNotSettings(templates=("a photo of {} at night",))
    )
    assert target.replacement_text == "a photo of at night"
    events = []
    fit(model, request(), events.append)
    assert set(events[-1].terms) == {"attention", "steer", "preserve"}
    fit(model, request(steer_weight=0.0), events.append)
    assert set(events[-1].terms) == {"attention", "preserve"}
