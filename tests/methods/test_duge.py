"""DUGE: its losses against plain references, what is frozen and what is not, and the promises every method makes."""

from __future__ import annotations

import math

import pytest
import torch
from ldm_unet import ldm_unet
from tiny import TinyText, fit, flags, rand, random_patch, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ForgetConceptError, RequestError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.duge import DUGE, MEMORY, DugeSettings, anchor_prompt
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings
from forget_concept.core.training.activations import (
    SiteCapture,
    attention_map,
    cross_attention_map,
    cross_attention_output,
    gather_pixels,
)
from forget_concept.core.training.adapters import Deltas
from forget_concept.core.training.attention import AttentionCapture
from forget_concept.core.training.frozen import frozen
from forget_concept.core.training.gradients import retain_basis
from forget_concept.core.training.losses import attention_output_matching, drift_from_base

STAR = (Concept("star", replacement="circle"),)
QUICK = {
    "steps": 2,
    "batch_size": 2,
    "bank": 4,
    "pixels": 8,
    "n_images": 1,
    "sample_steps": 1,
    "contexts": False,
    "keep_common": False,
    "rank": 2,
}
WHOLE = {"local": False, "prior_weight": 0.5, "memory": 2, "anchor_weight": 2.0}


def asked(*concepts, preserve=("moon",), preset="tuned", seed=3, **settings):
    return ForgetRequest(concepts or STAR, preserve, "duge", preset, {**QUICK, **settings}, seed=seed)


def on(device, dtype=torch.float32):
    model = tiny_model()
    model.unet.to(device, dtype)
    return model


def earlier_patch(model, scale=0.05):
    """What an earlier request by other means left: a random change with a record."""
    change = random_patch(model.survey, rank=2, which=("to_k", "to_v", "to_q"), scale=scale)
    return change.with_metadata(request=ForgetRequest((Concept("fish"),)))


def built(model, request, earlier=None):
    """The objective, its deltas and material, as `fit` makes them."""
    method, settings = DUGE(), resolve_settings(DUGE, request.preset, request.settings)
    inputs = Inputs(earlier=earlier)
    material = method.batches(model, request, settings, inputs)
    method.fill_pools(material, settings, inputs, None)
    null_space = method.null_space(model, material, settings)
    deltas = Deltas(model, method.keys(model, settings), settings.rank, material.generator, earlier, null_space)
    with frozen(model.unet):
        return method.objective(material, deltas, request, settings, inputs, None), deltas, material


def moved(deltas, scale=0.05):
    """Deltas somewhere else than at their beginning."""
    with torch.no_grad():
        for n, parameter in enumerate(deltas.parameters()):
            parameter += scale * rand(*parameter.shape, seed=n).to(parameter.device)


# -- the sites ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_site_worked_out_on_its_own_is_what_the_network_has_there(device, dtype):
    model = on(device, dtype)
    deltas = Deltas(model, [s.key(w) for s in model.survey for w in ("to_k", "to_out")], 2, torch.Generator())
    moved(deltas, 0.3)
    states = model.text.encode(["a star", ""]).to(device, dtype)
    before = flags(model.unet)
    with torch.no_grad(), deltas.attached():
        with SiteCapture(model.survey) as recorder, AttentionCapture(model.survey) as attention:
            model.predict_noise(rand(2, 4, 8, 8), torch.tensor([100, 800]), states)
            xs, outs = recorder.inputs(), recorder.outputs()
            maps = [attention_map(attention.q[s.name], attention.k[s.name], s.heads) for s in model.survey]
        tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
        for site, x, out, seen in zip(model.survey, xs, outs, maps, strict=True):
            torch.testing.assert_close(cross_attention_output(site, x, states.hidden), out, **tolerance)
            torch.testing.assert_close(cross_attention_map(site, x, states.hidden), seen, **tolerance)
            # pixels are independent of one another
            some = torch.tensor([[3, 0], [1, 2]])
            part = cross_attention_output(site, gather_pixels(x, some), states.hidden)
            torch.testing.assert_close(part, torch.stack([out[0, [3, 0]], out[1, [1, 2]]]), **tolerance)
    assert flags(model.unet) == before
    assert recorder.x == {} and recorder.out == {}


def test_the_original_layout_has_the_same_sites():
    model = LatentDiffusion(ldm_unet(), TinyText(), sd_alphas_cumprod(), latent_shape=(4, 8, 8))
    states = model.text.encode(["a star"])
    with torch.no_grad(), SiteCapture(model.survey) as recorder:
        model.predict_noise(rand(1, *model.latent_shape), torch.tensor([300]), states)
        for site, x, out in zip(model.survey, recorder.inputs(), recorder.outputs(), strict=True):
            torch.testing.assert_close(cross_attention_output(site, x, states.hidden), out, atol=1e-5, rtol=1e-4)


def test_an_attention_map_is_the_softmax_of_its_definition():
    q, k = rand(2, 5, 6, seed=1), rand(2, 7, 6, seed=2)
    found = attention_map(q, k, heads=2)
    assert found.shape == (2, 2, 5, 7)
    for b in range(2):
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            for p in range(5):
                scores = [math.exp(float(q[b, p, part] @ k[b, t, part]) / math.sqrt(3)) for t in range(7)]
                wanted = torch.tensor([score / sum(scores) for score in scores])
                torch.testing.assert_close(found[b, h, p], wanted, atol=1e-6, rtol=1e-5)


def test_without_a_forward_pass_there_is_nothing_to_look_at(model):
    with SiteCapture(model.survey) as recorder, pytest.raises(ForgetConceptError, match="No forward pass"):
        recorder.outputs()


# -- the losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, None])
def test_drift_is_measured_from_the_base(device, rank):
    model = on(device)
    keys = [site.key(which) for site in list(model.survey)[:2] for which in ("to_k", "to_q")]
    deltas = Deltas(model, keys, rank, torch.Generator().manual_seed(1))
    moved(deltas)
    for parameter in deltas.parameters():
        parameter.data = parameter.data.double()
    patch = random_patch(model.survey, which=("to_k", "to_v")).to(torch.float64, device)
    earlier = {key: (factor.up, factor.down) for key, factor in patch.factors.items()}
    square = size = 0.0
    for key in keys:
        change = deltas.delta(key).detach()
        if key in earlier:
            change = change + patch.factors[key].delta()
        square += float((change**2).sum())
        size += float((model.survey.linear(key).weight.double() ** 2).sum())
    weights = {key: model.survey.linear(key).weight for key in keys}
    assert float(drift_from_base(deltas.changes(), weights, earlier)) == pytest.approx(square / size, rel=1e-6)
    parameters = deltas.parameters()

    def drift(*values):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        return drift_from_base(deltas.changes(), weights, earlier)

    assert finite_differences(drift, parameters) < 1e-6


def finite_differences(loss, parameters, eps=1e-6, seed=0):
    """Largest relative error of the gradient along three random directions."""
    start = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss(*start).backward()
    gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
    worst = 0.0
    for n in range(3):
        along = [rand(*p.shape, seed=seed + 10 * n + i).to(p) for i, p in enumerate(parameters)]
        with torch.no_grad():
            up = float(loss(*(s + eps * d for s, d in zip(start, along, strict=True))))
            down = float(loss(*(s - eps * d for s, d in zip(start, along, strict=True))))
        numeric = (up - down) / (2 * eps)
        exact = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
        worst = max(worst, abs(numeric - exact) / max(abs(exact), 1e-9))
    loss(*start)
    return worst


@pytest.mark.parametrize("compare", ["outputs", "maps"])
@pytest.mark.parametrize("local", [True, False])
def test_every_terms_gradient_is_that_of_its_value(compare, local):
    """The deltas are added in fp32, so the differences are wide ones."""
    model = tiny_model()
    request = asked(**(WHOLE | {"local": local, "compare": compare, "train": ("to_q", "to_k")}))
    objective, deltas, _ = built(model, request, earlier_patch(model))
    moved(deltas, 0.1)
    state = objective.state()
    parameters = deltas.parameters()
    along = [rand(*p.shape, seed=n) for n, p in enumerate(parameters)]

    def terms(step=0.0):
        objective.restore(state)
        with torch.no_grad():
            for parameter, direction in zip(parameters, along, strict=True):
                parameter += step * direction
        return objective(1)

    eps = 4e-3
    with frozen(model.unet), deltas.attached():
        found = terms()
        assert set(found) == {"unlearn", "prior", "anchor", "preserve", "earlier"}
        exact = {}
        for name, term in found.items():
            gradients = torch.autograd.grad(term.value, parameters, retain_graph=True)
            exact[name] = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
        with torch.no_grad():
            up, down = terms(eps), terms(-2 * eps)
    for name, slope in exact.items():
        assert float(up[name].value - down[name].value) / (2 * eps) == pytest.approx(slope, rel=3e-2), name


@pytest.mark.parametrize("preset", ["published", "tuned"])
def test_unlearning_pulls_every_site_to_the_frozen_model_with_the_earlier_parts_on(device, preset):
    """Held against passes by hand: hooks on each site's last layer, the earlier patch put on as a host would."""
    model = on(device)
    earlier = earlier_patch(model)
    request = asked(preset=preset, local=False, rank=2, batch_size=2, relative=False)
    objective, deltas, material = built(model, request, earlier)
    moved(deltas)
    state = objective.state()
    with frozen(model.unet), deltas.attached():
        found = objective(1)["unlearn"]
    assert found.side == "forget"
    material.restore(state)
    prompts = material.next_targets()
    batch = material.noised([prompt.concept for prompt in prompts])

    def outputs(texts, *patches):
        kept = []
        with torch.no_grad():
            handles = [patch.apply(model.unet) for patch in patches]
            hooks = [
                site.projection("to_out").register_forward_hook(lambda m, a, out: kept.append(out))
                for site in model.survey
            ]
            model.predict_noise(batch.x, batch.times, model.text.encode(texts))
            for handle in (*handles, *hooks):
                handle.remove()
        return kept

    assert all(prompt.replacement_text and "circle" in prompt.replacement_text for prompt in prompts)
    wanted = outputs([prompt.replacement_text for prompt in prompts], earlier)
    now = outputs([prompt.text for prompt in prompts], earlier, Patch(deltas.factors()))
    plain = sum(float(((a - b) ** 2).mean()) for a, b in zip(now, wanted, strict=True)) / len(now)
    assert float(found.value) == pytest.approx(plain, rel=1e-3)
    without = outputs([prompt.replacement_text for prompt in prompts])
    assert (
        abs(sum(float(((a - b) ** 2).mean()) for a, b in zip(now, without, strict=True)) / len(now) / plain - 1) > 0.05
    )


def test_what_a_target_reads_as(model):
    plain = (Concept("star"),)
    _, _, material = built(model, asked(*plain, no_replacement="empty"))
    assert {anchor_prompt(prompt) for prompt in material.targets} == {""}
    _, _, material = built(model, asked(*plain, no_replacement="dropped"))
    assert {anchor_prompt(prompt) for prompt in material.targets} == {
        "a photo of",
        "a picture of",
        "",
    }
    _, _, material = built(model, asked(contexts=True))
    said = {prompt.text: anchor_prompt(prompt) for prompt in material.targets}
    assert said["a purple star in the style of impressionism"] == "a purple circle in the style of impressionism"


@pytest.mark.parametrize("local", [True, False])
def test_what_is_kept_and_the_anchor_are_measured_from_the_base_and_the_earlier_from_what_it_left(local):
    model = tiny_model()
    earlier = earlier_patch(model)
    objective, deltas, _ = built(model, asked(**(WHOLE | {"local": local})), earlier)
    with frozen(model.unet), deltas.attached(), torch.no_grad():
        terms = objective(1)
    # nothing is trained yet: what earlier requests forgot is as they left it, what is kept has drifted already
    assert float(terms["earlier"].value) == 0 and float(terms["preserve"].value) > 1e-6
    assert [terms[name].side for name in ("preserve", "anchor", "earlier", "prior")] == ["retain"] * 4
    keys = [site.key(which) for site in model.survey for which in ("to_k", "to_v")]
    square = sum(float((earlier.factors[key].delta() ** 2).sum()) for key in keys)
    size = sum(float((model.survey.linear(key).weight ** 2).sum()) for key in keys)
    assert float(terms["anchor"].value) == pytest.approx(square / size, rel=1e-4)
    objective, deltas, _ = built(model, asked(**(WHOLE | {"local": local})))
    with frozen(model.unet), deltas.attached(), torch.no_grad():
        terms = objective(1)
    assert float(terms["preserve"].value) == 0 and float(terms["anchor"].value) == 0 and "earlier" not in terms


def test_the_prior_is_the_denoising_loss_on_pictures_under_their_own_prompts(model):
    objective, deltas, material = built(model, asked(**WHOLE, preserve=("moon", "key")))
    moved(deltas)
    assert len(objective.memory) == 2 and "" not in objective.memory and len(material.pools[MEMORY]) == 2
    state = material.state()
    with frozen(model.unet), deltas.attached(), torch.no_grad():
        found = float(objective._prior_loss())
        material.restore(state)
        rows = torch.randint(2, (2,), generator=material.generator)
        times = torch.randint(1000, (2,), generator=material.generator)
        noise = torch.randn((2, 4, 8, 8), generator=material.generator)
        x = model.add_noise(material.pools[MEMORY][rows], noise, times)
        plain = model.predict_noise(x, times, model.text.encode([objective.memory[i] for i in rows]))
    assert found == pytest.approx(float(((plain - noise) ** 2).mean()), rel=1e-5)


def test_prompts_to_keep_that_name_what_was_forgotten_earlier_are_left_out(model):
    request = asked(preserve=("moon",), retain_prompts=("a fish and a moon", "a moon"))
    _, _, material = built(model, request)
    assert "a fish and a moon" in material.retain
    _, _, material = built(model, request, earlier_patch(model))
    assert "a fish and a moon" not in material.retain and {"", "a moon"} <= set(material.retain)
    assert {text for text in material.earlier if "fish" in text} == set(material.earlier) != set()


def test_contexts_that_name_another_target_are_left_out(model):
    request = asked(Concept("tree"), Concept("cartoon", "style"), preserve=("moon", "comic"), contexts=True)
    _, _, material = built(model, request)
    said = [target.text for target in material.targets] + material.retain
    assert "a red tree" in said and "cartoon style" in said and "a pink moon, charcoal style" in said
    assert not any("cartoon" in text and ("tree" in text or "moon" in text) for text in said)
    assert not any("tree" in text for text in material.retain)


# -- the promises of a method -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        (WHOLE, torch.bfloat16),
        ({**WHOLE, "compare": "maps", "train": ("to_k",)}, torch.float32),
    ],
)
def test_the_model_comes_back_and_the_seed_decides(device, dtype, settings):
    model = on(device, dtype)
    before, flagged = state_hash(model.unet), flags(model.unet)
    events = []
    first = fit(model, asked(**settings), events.append)
    again, other = fit(model, asked(**settings)), fit(model, asked(**settings, seed=4))
    assert state_hash(model.unet) == before and flags(model.unet) == flagged
    same = [all(torch.equal(f.up, p.factors[k].up) for k, f in first.factors.items()) for p in (again, other)]
    assert same == [True, False]
    assert all(f.up.dtype == torch.float32 and torch.isfinite(f.up).all() for f in first.factors.values())
    told = [event for event in events if event.terms]
    assert set(told[0].terms) == {"unlearn", "preserve"} | ({"prior", "anchor"} if settings else set())


@pytest.mark.parametrize("settings", [{}, {"local": False}])
def test_training_brings_the_target_to_what_it_shall_read_as(device, settings):
    model = on(device)
    request = asked(**{**settings, "steps": 16, "lr": 2e-2, "batch_size": 4, "rank": 4, "clip_norm": 1.0})
    events = []
    patch = fit(model, request, events.append)
    told = [event.terms["unlearn"] for event in events if event.terms]
    assert sum(told[-4:]) < 0.7 * sum(told[:4])
    x, times = rand(4, 4, 8, 8, seed=7), torch.tensor([50, 300, 600, 900])

    def sites(text):
        with torch.no_grad(), SiteCapture(model.survey) as recorder:
            model.predict_noise(x, times, model.text.encode([text] * 4))
            return recorder.outputs()

    star, circle = sites("a photo of a star"), sites("a photo of a circle")
    with patch.applied(model.unet):
        after = sites("a photo of a star")
    assert float(attention_output_matching(after, circle, True)) < 0.8 * float(
        attention_output_matching(star, circle, True)
    )


@pytest.mark.parametrize("settings", [{}, WHOLE])
def test_a_training_that_was_cut_short_goes_on_to_the_same_result(model, tmp_path, settings):
    request = asked(**settings, steps=4)
    earlier = earlier_patch(model)
    whole = fit(model, request, inputs=Inputs(earlier=earlier))

    def cancel(event):
        if event.terms and event.step == 2:
            raise Cancelled

    inputs = Inputs(workspace=Workspace(tmp_path), earlier=earlier)
    with pytest.raises(Cancelled):
        fit(model, request, cancel, inputs)
    steps = []
    patch = fit(model, request, lambda event: steps.append(event.step) if event.terms else None, inputs)
    assert steps == [3, 4]
    assert all(torch.equal(f.up, patch.factors[k].up) for k, f in whole.factors.items())


def test_a_blind_change_does_not_move_what_is_kept(model):
    request = asked(preserve=("moon", "key"), project=0.9, train=("to_q", "to_k", "to_v"), lr=1e-2)
    patch = fit(model, request)
    _, _, material = built(model, request)
    states = torch.unique(material.states(material.retain).hidden.flatten(0, 1), dim=0)
    basis = retain_basis(states, 0.9)
    seen = float((states @ basis).square().sum() / states.square().sum())
    assert 0.9 <= seen < 1
    plain = fit(model, asked(preserve=("moon", "key"), train=("to_q", "to_k", "to_v"), lr=1e-2))
    for key, factor in patch.factors.items():
        if not key.endswith(".to_q"):
            assert float((factor.delta() @ basis).norm() / factor.delta().norm()) < 1e-5
            other = plain.factors[key].delta()
            assert float((other @ basis).norm() / other.norm()) > 0.1
    with pytest.raises(ForgetConceptError, match="spans all"):
        fit(model, asked(project=1.0))


def test_a_sequence_keeps_its_parts_apart(model):
    found = History()
    for name in ("fish", "star"):
        found = found.forget(model, plan_request(asked(Concept(name), preserve=())))
    assert [part.patch.rank for part in found.parts] == [2, 2] and found.patch.rank == 4
    assert found.without("fish").patch.rank == 2
    assert "earlier" in found.parts[1].patch.metadata["forget_concept.terms"]
    assert "earlier" not in found.parts[0].patch.metadata["forget_concept.terms"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unlearn_weight": 0}, "'unlearn_weight' must be at least 0.001"),
        ({"bank": 0}, "'bank' must be at least 1"),
        ({"compare": "maps", "train": ("to_v",)}, "no map depends"),
        ({"project": 0.5, "train": ("to_q",)}, "'project' is for to_k and to_v"),
        ({"project": 1.5}, "'project' must be at most 1, or null"),
        ({"anchor_weight": -1}, "'anchor_weight' must be at least 0"),
        ({"preserve_weight": 0}, "preserves nothing, and there is a preserve list"),
        ({"prior_weight": 1, "latents": "zeros"}, "needs images"),
        ({"project": 0.5, "preserve_weight": 0, "gradient": "restricted"}, "balances forgetting and preserving"),
        ({"compare": "colours"}, "'compare' must be one of"),
    ],
)
def test_what_would_be_ignored_is_refused(model, settings, words):
    with pytest.raises(RequestError, match=words):
        fit(model, asked(**settings))
    with pytest.raises(RequestError, match="preserve nothing"):
        fit(model, asked(preserve=(), keep_common=True, preserve_weight=0))


def test_the_published_preset_is_the_papers_losses_alone():
    found = DUGE.presets["published"]
    assert (found.local, found.relative, found.no_replacement) == (False, False, "empty")
    assert (found.unlearn_weight, found.prior_weight, found.anchor_weight, found.preserve_weight) == (1, 1, 1, 1)
    assert found.earlier_weight == 0 and found.project is None and not found.contexts and not found.keep_common
    assert isinstance(found, DugeSettings)
