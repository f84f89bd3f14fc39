"""Selective Amnesia: the penalty is its formula, every picture has the right prompt, one Fisher file serves all."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import fit, flags, rand, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ModelError, RequestError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.selective_amnesia import (
    SelectiveAmnesia,
    SelectiveAmnesiaObjective,
    SelectiveAmnesiaSettings,
    fisher_prompts,
    scaled_fisher,
)
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.adapters import Deltas
from forget_concept.core.training.batches import BatchSampler, GenerationSettings, target_prompt
from forget_concept.core.training.loop import TrainingSettings, train
from forget_concept.core.training.losses import elastic_penalty

QUICK = {
    "steps": 2,
    "batch_size": 2,
    "n_images": 2,
    "sample_steps": 1,
    "guidance": 1.0,
    "replay_images": 2,
    "contexts": False,
    "keep_common": False,
    "fisher_samples": 2,
    "fisher_draws": 1,
}


def request(*concepts, preserve=(), preset="tuned", seed=0, **settings):
    concepts = concepts or (Concept("star", replacement="circle"),)
    return ForgetRequest(concepts, preserve, "selective_amnesia", preset, QUICK | settings, seed=seed)


class Autoencoder:
    """Eight pixels a latent: the mean of each, in four copies."""

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images, 8).mean(1, keepdim=True)
        return small.expand(-1, 4, -1, -1).clone()

    def decode(self, latents):
        raise NotImplementedError


def some_keys(model):
    return [model.survey.sites[i].key(which) for i in (0, 5) for which in ("to_k", "to_v")]


def moved(model, rank, device):
    """Deltas that are no longer zero."""
    deltas = Deltas(model, some_keys(model), rank, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, part in enumerate(deltas.parameters()):
            part.copy_(rand(*part.shape, seed=i).to(device))
    return deltas


@pytest.mark.parametrize("rank", [3, None])
def test_the_penalty_and_its_gradient_are_the_formula(device, rank):
    model = tiny_model()
    model.unet.to(device)
    deltas = moved(model, rank, device)
    fisher = {key: rand(*deltas.delta(key).shape, seed=i).abs().to(device) for i, key in enumerate(deltas.keys)}
    value = elastic_penalty(deltas.changes(), fisher)
    (2.5 * value).backward()
    total, parts = 0.0, iter(deltas.parameters())
    for key in deltas.keys:
        factors = [next(parts)] if rank is None else [next(parts), next(parts)]
        change = (factors[0] if rank is None else factors[0] @ factors[1]).detach()
        total += float((fisher[key] * change**2).sum())
        pull = 2.5 * 2 * fisher[key] * change
        wanted = [pull] if rank is None else [pull @ factors[1].detach().T, factors[0].detach().T @ pull]
        for factor, gradient in zip(factors, wanted, strict=True):
            torch.testing.assert_close(factor.grad, gradient, rtol=1e-4, atol=1e-3)
    assert value.item() == pytest.approx(total, rel=1e-4)


def test_the_unit_of_the_penalty_is_the_weights_own_size(device):
    """1 for a change as large as the weights, whatever the loss's scale; published: a sum over time steps."""
    model = tiny_model()
    model.unet.to(device)
    weights = {key: model.survey.linear(key).weight.detach() for key in some_keys(model)}
    fisher = {key: rand(*weight.shape, seed=i).abs() for i, (key, weight) in enumerate(weights.items())}
    for loss_scale in (1.0, 1e-6, 1e4):
        scaled = scaled_fisher(model, {key: loss_scale * value for key, value in fisher.items()}, "relative")
        assert float(elastic_penalty(weights, scaled)) == pytest.approx(1, rel=1e-4)
        assert float(elastic_penalty({k: 0.1 * w for k, w in weights.items()}, scaled)) == pytest.approx(0.01, rel=1e-4)
    published = scaled_fisher(model, fisher, "published")
    plain = {key: value.to(device) for key, value in fisher.items()}
    found, wanted = (float(elastic_penalty(weights, f)) for f in (published, plain))
    assert found == pytest.approx(1000**2 * wanted, rel=1e-4)


def objective(model, deltas, fisher, seed=0, **changes):
    """An objective on two targets and two kept prompts with small pools."""
    targets = [target_prompt(model.text, Concept("star"), text, "a circle") for text in ("a star", "star")]
    generator = torch.Generator().manual_seed(seed)
    material = BatchSampler(model, targets, ["", "a tree"], generator, 2, GenerationSettings(1, 1.0))
    for i, name in enumerate(["a star", "star", "", "a tree"]):
        material.pools[name] = rand(2, *model.latent_shape, seed=i).to(model.device)
    return SelectiveAmnesiaObjective(material, deltas, SelectiveAmnesiaSettings(**changes), fisher)


def test_without_bound_on_lambda_nothing_moves(device):
    """Plain descent with ``λ = 1 / 2·lr`` on weights of Fisher 1: each step undoes all that was before it."""
    model = tiny_model()
    model.unet.to(device)
    steps, held, free = 12, {}, {}
    for lr in (1e-2, 1e-4):
        deltas = Deltas(model, some_keys(model), None, torch.Generator())
        fisher = {}
        for key in deltas.keys:  # the upper half matters, the lower one does not
            shape = model.survey.linear(key).weight.shape
            fisher[key] = (torch.arange(shape[0])[:, None] < shape[0] // 2).float().expand(shape).to(device)
        made = objective(model, deltas, fisher, ewc_weight=0.5 / lr)
        train(model, deltas, made, TrainingSettings(steps, lr, optimiser="sgd"))
        changes = {key: deltas.delta(key).detach() for key in deltas.keys}
        held[lr] = float(sum((fisher[key] * change**2).sum() for key, change in changes.items())) ** 0.5
        free[lr] = float(sum(((1 - fisher[key]) * change**2).sum() for key, change in changes.items())) ** 0.5
        assert held[lr] < 0.5 * free[lr]
    assert held[1e-4] < 2e-2 * held[1e-2]


def test_terms_are_named_sided_and_weighted():
    model = tiny_model()
    deltas = moved(model, 2, "cpu")
    fisher = {key: torch.ones_like(model.survey.linear(key).weight) for key in deltas.keys}
    with deltas.attached():
        terms = objective(model, deltas, fisher, preserve_weight=3.0, ewc_weight=7.0)(1)
        assert set(objective(model, deltas, {}, preserve_weight=3.0)(1)) == {"surrogate", "replay"}
    assert {name: (term.weight, term.side) for name, term in terms.items()} == {
        "surrogate": (1.0, "forget"),
        "replay": (3.0, "retain"),
        "elastic": (7.0, "retain"),
    }


def test_the_terms_are_the_published_sums():
    """Each row worked out again by itself: its picture, prompt, time and noise."""
    model = tiny_model()
    deltas = moved(model, 2, "cpu")
    made = objective(model, deltas, {}, seed=3)
    state = made.state()
    with deltas.attached(), torch.no_grad():
        terms = made(1)
        made.restore(state)
        material = made.batches
        for name in ("surrogate", "replay"):
            texts = (
                [target.text for target in material.next_targets()] if name == "surrogate" else material.next_retain()
            )
            assert name == "surrogate" or texts[0] == ""
            batch = material.noised(texts)
            errors = []
            for i, text in enumerate(texts):
                assert any(torch.equal(batch.x0[i], picture) for picture in material.pools[text])
                found = model.predict_noise(batch.x[i : i + 1], batch.times[i : i + 1], model.text.encode([text]))
                errors.append(((found - batch.noise[i : i + 1]) ** 2).mean())
            torch.testing.assert_close(terms[name].value, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def filled(model, settings, asked, inputs=None):
    """The material of a request, its pools filled as `fit` does."""
    method = SelectiveAmnesia()
    targets, kept = method.prompts(model.text, asked, settings)
    material = BatchSampler(model, targets, kept, torch.Generator().manual_seed(0), 2, GenerationSettings(1, 1.0))
    method.fill_pools(material, settings, inputs or Inputs(), None)
    return material


def test_pictures_of_the_surrogate_stand_under_the_concepts_prompt(monkeypatch):
    """Contexts and articles go along; what is kept is replayed under its own prompt."""
    model = tiny_model()
    asked: dict[float, str] = {}

    def sample(prompts, seeds, *args, **kwargs):
        for prompt in prompts:
            asked[float(len(asked))] = prompt
        first = len(asked) - len(prompts)
        return torch.arange(first, len(asked)).float().view(-1, 1, 1, 1).expand(-1, *model.latent_shape)

    monkeypatch.setattr(model, "sample", sample)
    settings = SelectiveAmnesiaSettings(contexts=True, n_images=24, replay_images=9)
    concepts = (Concept("star", replacement="arrow"), Concept("neon", "style"))
    material = filled(model, settings, ForgetRequest(concepts, ("tree",)))
    shown = {name: {asked[float(x[0, 0, 0])] for x in pool} for name, pool in material.pools.items()}
    for target in material.targets:
        assert shown[target.text] == {target.replacement_text}
    texts = {target.text: target.replacement_text for target in material.targets}
    assert texts["a photo of star"] == "a photo of arrow" and texts["a red star"] == "a red arrow"
    assert texts["a neon picture"] == "picture" and texts["neon"] == ""
    for name in ("star", "neon"):
        own = [target.text for target in material.targets if target.concept == name]
        assert all(len(material.pools[text]) == -(-24 // len(own)) for text in own)
    assert material.retain[0] == "" and len(material.retain) == 9
    for text in material.retain:
        assert shown[text] == {text} and len(material.pools[text]) == 1
    assert any("tree" in text for text in material.retain)


def test_contexts_do_not_teach_another_concept_again():
    """Contexts of objects name styles, and the other way round."""
    settings = SelectiveAmnesiaSettings(contexts=True)
    concepts = (Concept("star", replacement="arrow"), Concept("neon", "style", "comic"))
    targets, kept = SelectiveAmnesia().prompts(tiny_model().text, ForgetRequest(concepts, ("tree",)), settings)
    assert {target.concept for target in targets} == {"star", "neon"}
    for target in targets:
        said = [name for name in ("star", "neon") if name in target.text]
        assert said == [target.concept] and not any(name in target.replacement_text for name in ("star", "neon"))
    assert any("tree" in text for text in kept) and not any("neon" in text or "star" in text for text in kept)
    # but what a person asks to keep is kept
    _, kept = SelectiveAmnesia().prompts(tiny_model().text, ForgetRequest(concepts, ("neon sign",)), settings)
    assert "a photo of neon sign" in kept


def test_everyday_words_fill_what_the_preserve_list_leaves():
    settings = SelectiveAmnesiaSettings(keep_common=True, n_images=1, replay_images=9)
    for preserve, own in (((), 0), (("zebra",), 4), (("zebra", "giraffe", "otter"), 8)):
        kept = filled(tiny_model(), settings, ForgetRequest((Concept("star"),), preserve)).retain
        assert len(kept) == 9 and sum(any(word in text for word in preserve) for text in kept) == own


def test_everyday_words_are_kept_but_never_the_concept():
    model = tiny_model()
    settings = SelectiveAmnesiaSettings(keep_common=True)
    concepts = (Concept("candle", replacement="bell"), Concept("oil painting", "style"))
    _, kept = SelectiveAmnesia().prompts(model.text, ForgetRequest(concepts), settings)
    assert len(kept) > 80 and kept[0] == "" and len(set(kept)) == len(kept)
    assert not any("candle" in text or "oil painting" in text for text in kept)
    assert any("bell" in text for text in kept)


def test_noise_is_uniform_with_and_without_an_autoencoder():
    model = tiny_model()
    settings = SelectiveAmnesiaSettings(surrogate="noise", n_images=200, preserve_weight=0.0)
    pool = filled(model, settings, ForgetRequest((Concept("star"),))).pools["star"]
    assert pool.shape == (200, *model.latent_shape) and float(pool.abs().max()) <= 3**0.5
    assert float(pool.mean()) == pytest.approx(0, abs=0.03) and float(pool.var()) == pytest.approx(1, abs=0.03)
    model.vae = Autoencoder()
    pool = filled(model, settings, ForgetRequest((Concept("star"),))).pools["star"]
    # a mean over 64 pixels and three colours of uniform noise in [-1, 1]
    assert pool.shape == (200, *model.latent_shape) and float(pool.var()) == pytest.approx(1 / 3 / 192, rel=0.1)


def test_a_persons_own_pictures_are_the_surrogate():
    model = tiny_model()
    model.vae = Autoencoder()
    images = {"star": rand(4, 3, 64, 64).clamp(-1, 1)}
    asked = request(Concept("star"), surrogate="images", ewc_weight=0.0)
    pool = filled(model, SelectiveAmnesiaSettings(surrogate="images"), asked, Inputs(images=images)).pools["star"]
    torch.testing.assert_close(pool, Autoencoder().encode(images["star"]))
    assert fit(model, asked, inputs=Inputs(images=images)).max_abs() > 0


def test_the_concept_learns_the_surrogate_and_the_rest_is_held():
    """Under the same noise: the concept's prompt fits the surrogate's pictures better, the kept prompt moves less."""

    def measured(model, text, latents):
        times = torch.tensor([200, 500, 800])
        noise = rand(3, *model.latent_shape, seed=9)
        x = model.add_noise(latents, noise, times)
        with torch.no_grad():
            return model.predict_noise(x, times, model.text.encode([text] * 3)), noise

    drift = {}
    for weight in (0.0, 3e3):
        model = tiny_model()
        latents = model.sample(["a photo of circle"] * 3, [1, 2, 3], 1, 1.0)
        (before, noise), (kept, _) = (measured(model, text, latents) for text in ("a photo of star", "a photo of tree"))
        settings = {"steps": 25, "lr": 3e-3, "train": ("to_k", "to_v"), "n_images": 8, "preserve_weight": 0.0}
        patch = fit(model, request(ewc_weight=weight, **settings))
        with patch.applied(model.unet):
            after, _ = measured(model, "a photo of star", latents)
            drift[weight] = float((measured(model, "a photo of tree", latents)[0] - kept).norm())
        if weight == 0:
            assert float((after - noise).square().mean()) < 0.95 * float((before - noise).square().mean())
    assert drift[3e3] < 0.5 * drift[0.0]


@pytest.mark.parametrize("preset", ["published", "tuned"])
def test_deterministic_and_the_model_comes_back_as_it_was(preset):
    model = tiny_model()
    before, flagged = state_hash(model.unet), flags(model.unet)
    events = []
    first = fit(model, request(preset=preset, preserve=("tree",)), events.append)
    assert (state_hash(model.unet), flags(model.unet)) == (before, flagged)
    with torch.inference_mode():
        again = fit(model, request(preset=preset, preserve=("tree",)))
    for key, factor in first.factors.items():
        assert torch.equal(factor.up, again.factors[key].up) and torch.equal(factor.down, again.factors[key].down)
    other = fit(model, request(preset=preset, preserve=("tree",), seed=1))
    assert any(not torch.equal(factor.up, other.factors[key].up) for key, factor in first.factors.items())
    told = json.loads(first.metadata["forget_concept.terms"])
    assert set(told["first"]) == set(told["last"]) == {"surrogate", "replay", "elastic"}
    assert set(events[-1].terms) == {"surrogate", "replay", "elastic"} and told["first"]["surrogate"] > 0

    def cancel(event):
        if event.message == SelectiveAmnesia.message:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        fit(model, request(preset=preset), cancel)
    assert (state_hash(model.unet), flags(model.unet)) == (before, flagged)


class Passes:
    """Rows that went through the UNet."""

    def __init__(self, model):
        self.rows = 0
        model.unet.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows += len(args[0])


def test_fisher_information_is_made_once_a_model_for_every_request(tmp_path):
    model, inputs = tiny_model(), Inputs(workspace=Workspace(tmp_path))
    passes = Passes(model)
    fit(model, request(), inputs=inputs)
    first, passes.rows = passes.rows, 0
    other = request(Concept("boat", replacement="tree"), seed=4)
    fit(model, other, inputs=inputs)
    second, passes.rows = passes.rows, 0
    fit(model, other, inputs=Inputs())
    alone = passes.rows
    # a chunk of 8 pictures in one step and 2 samples of 2 time steps
    assert first - second == alone - second == 8 + 2 * 2


def test_a_fisher_file_of_another_model_is_refused(tmp_path):
    space = Workspace(tmp_path)
    model, other = tiny_model(), tiny_model(seed=1)
    fit(other, request(), inputs=Inputs(workspace=space))
    (theirs,) = (tmp_path / "fisher").iterdir()
    fit(model, request(), inputs=Inputs(workspace=space))
    (ours,) = set((tmp_path / "fisher").iterdir()) - {theirs}
    theirs.replace(ours)
    with pytest.raises(ModelError, match="measured on another model"):
        fit(model, request(), inputs=Inputs(workspace=space))


def test_default_fisher_prompts_are_everyday_words_of_every_kind():
    prompts = fisher_prompts()
    assert prompts[0] == "" and len(set(prompts)) == len(prompts) > 90
    head = prompts[:12]
    for word in ("sun", "oil painting", "a man"):
        assert any(word in text for text in head), head


PICTURES = {"star": torch.zeros(4, 3, 64, 64)}


@pytest.mark.parametrize(
    ("asked", "images", "words"),
    [
        (request(Concept("star", replacement="red star")), {}, "contains the concept 'star' itself"),
        (request(Concept("star", replacement="STAR ")), {}, "is the concept itself"),
        (request(surrogate="noise"), {}, "replacement is not used"),
        (request(surrogate="images"), PICTURES, "replacement is not used"),
        (request(Concept("star"), surrogate="images"), {}, "no images for 'star'"),
        (request(Concept("star"), Concept("boat"), surrogate="images"), PICTURES, "no images for 'boat'"),
        (request(Concept("star"), surrogate="images"), {"star": torch.zeros(2, 3, 64, 64)}, "too few pictures"),
        (request(Concept("star"), surrogate="images"), {"star": torch.zeros(4, 3, 32, 32)}, "64 × 64"),
        (request(), PICTURES, "set 'surrogate' to 'images'"),
        (request(latents="zeros"), {}, "'latents' must be 'generated'"),
        (request(include_end=True), {}, "does not use token positions"),
        (request(contexts=True, templates=("a {}",)), {}, "has no effect"),
        (request(replay_images=0), {}, "'replay_images' must be at least 1"),
        (request(ewc_weight=-1.0), {}, "'ewc_weight' must be at least 0"),
        (request(preserve=("tree",), preserve_weight=0.0), {}, "preserves nothing"),
        (request(fisher_draws=3), {}, "divides 1000"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(asked, images, words):
    model = tiny_model()
    model.vae = Autoencoder()
    with pytest.raises(RequestError, match=words):
        fit(model, asked, inputs=Inputs(images=images))


@pytest.mark.long
def test_on_the_embedded_model_the_concept_goes():
    from forget_concept.core import mini
    from forget_concept.core.evaluation import PATCHED, UNEDITED, EvaluationTarget, SamplingSettings, evaluate
    from forget_concept.core.mini.vocabulary import CATEGORIES

    model, probe = mini.load(), mini.load_probe()
    kept = tuple(word.name for word in CATEGORIES["object"] if word.name != "tree")
    asked = ForgetRequest((Concept("tree", replacement="key"),), kept, "selective_amnesia")
    patch = fit(model, asked)
    (found,) = evaluate(
        model,
        probe,
        [EvaluationTarget("tree", ((patch, 1.0),))],
        16,
        3,
        SamplingSettings(precision="float32"),
        baselines=(UNEDITED,),
    )
    assert found.scores[PATCHED].ua.value >= found.scores[UNEDITED].ua.value + 0.6
    assert found.scores[PATCHED].ira.value > 0.8 and found.scores[PATCHED].cra.value > 0.8
