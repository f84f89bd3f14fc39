"""Prompts, pictures and draws of a trained method: seeded, fair, resumable, each with the right words."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import TinyText, fit, rand, tiny_model

from forget_concept.core.errors import Cancelled, ForgetConceptError, RequestError, TokenError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.forget_me_not import ForgetMeNot, ForgetMeNotSettings
from forget_concept.core.prompts.phrases import replace_phrase
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.batches import RETAIN_POOL, BatchSampler, GenerationSettings, target_prompt


def material(model, texts=("a star", "the star", "star"), kept=("", "a tree", "a boat"), seed=0, **more):
    targets = [target_prompt(model.text, Concept("star"), text, None) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    return BatchSampler(model, targets, kept, generator, 2, GenerationSettings(2, 2.5), **more)


@pytest.mark.parametrize(
    ("text", "name", "instead", "wanted"),
    [
        ("a photo of a star", "star", "arrow", "a photo of an arrow"),
        ("An umbrella by a star", "umbrella", "tree", "A tree by a star"),
        ("star, a starfish, Star", "star", "boat", "boat, a starfish, boat"),
        ("a photo of a star at night", "star", "", "a photo of at night"),
        ("the neon style", "neon", "stained glass", "the stained glass style"),
        ("a red star", "star", "arrow", "a red arrow"),
    ],
)
def test_something_else_is_said(text, name, instead, wanted):
    assert replace_phrase(text, name, instead) == wanted


def test_prompts_take_turns(model):
    made = material(model)
    drawn = Counter(prompt.text for _ in range(30) for prompt in made.next_targets())
    assert set(drawn.values()) == {20}
    kept = [made.next_retain() for _ in range(30)]
    assert all(texts[0] == "" and texts[1] != "" for texts in kept)
    assert Counter(texts[1] for texts in kept) == {"a tree": 15, "a boat": 15}


def test_states_are_the_encoders_and_each_prompt_is_encoded_once(model):
    made = material(model, earlier=["a moon"], others=["a key", "a star"])
    said = ["a star", "the star", "star", "a tree", "a boat", "a moon", "a key"]
    assert sorted(text for text in model.text.encoded if text) == sorted(said)
    encoded = len(model.text.encoded)
    states = made.states(["a tree", "a star", "a tree"])
    torch.testing.assert_close(states.hidden, TinyText().encode(["a tree", "a star", "a tree"]).hidden)
    made.states([*said, ""])
    with pytest.raises(ForgetConceptError, match="'new' was not encoded before the first step"):
        made.states(["new", "a star"])
    assert len(model.text.encoded) == encoded


def test_pictures_of_each_pool_are_its_own(model, tmp_path):
    made = material(model, workspace=Workspace(tmp_path))
    wanted = {"star": ["a star", "star"], RETAIN_POOL: ["a tree"]}
    made.draw(wanted, 3)
    assert {name: len(pool) for name, pool in made.pools.items()} == {"star": 3, RETAIN_POOL: 3}
    batch = made.noised(["star", RETAIN_POOL] * 8)
    for x0, name in zip(batch.x0, ["star", RETAIN_POOL] * 8, strict=True):
        assert any(torch.equal(x0, one) for one in made.pools[name])
    alpha = model.alphas_cumprod[batch.times][:, None, None, None]
    torch.testing.assert_close(batch.x, alpha.sqrt() * batch.x0 + (1 - alpha).sqrt() * batch.noise)

    again = material(tiny_model(), workspace=Workspace(tmp_path))
    again.model.sample = None  # from the work folder, not drawn again
    again.draw(wanted, 3)
    assert all(torch.equal(again.pools[name], made.pools[name]) for name in wanted)
    other = material(tiny_model(seed=1), workspace=Workspace(tmp_path))
    other.draw(wanted, 3)
    assert not torch.equal(other.pools["star"], made.pools["star"])


def test_the_state_is_all_that_the_next_draws_depend_on(model):
    made, later = material(model), material(model, seed=9)
    made.next_targets(), made.next_retain(), made.noised(["star"])
    later.restore({name: value.clone() for name, value in made.state().items()})
    for _ in range(3):
        assert made.next_targets(3) == later.next_targets(3) and made.next_retain() == later.next_retain()
        first, second = made.noised([RETAIN_POOL] * 2), later.noised([RETAIN_POOL] * 2)
        assert torch.equal(first.x, second.x) and torch.equal(first.times, second.times)


def test_what_makes_no_sense_is_said(model):
    with pytest.raises(RequestError, match="'a star' is both"):
        material(model, kept=("", "a star"))
    with pytest.raises(TokenError, match="does not occur"):
        target_prompt(model.text, Concept("star"), "a tree", None)
    with pytest.raises(TokenError, match="cut off"):
        target_prompt(model.text, Concept("star"), "a star", "s " * 90)
    with pytest.raises(RequestError, match="no autoencoder"):
        material(model).encode("star", rand(2, 3, 64, 64))


# -- the ways to give prompts, through a method --------------------------------------------------------------------


def prompts(*concepts, preserve=(), **settings):
    request = ForgetRequest(concepts, preserve, "forget_me_not")
    targets, kept = ForgetMeNot().prompts(TinyText(), request, ForgetMeNotSettings(**settings))
    return targets, kept


def test_diverse_prompts_come_with_their_pairs():
    targets, kept = prompts(Concept("star", replacement="arrow"), preserve=("tree",), diverse=20)
    assert len({t.text for t in targets}) == 20
    assert all("star" in t.text and "arrow" in t.replacement_text and "star" not in t.replacement_text for t in targets)
    assert kept[0] == "" and len(kept) > 20 and not any("star" in text for text in kept)
    assert "a photo of tree" in kept


def test_prompts_of_ones_own():
    mine = ("a star by the sea", "my star")
    targets, kept = prompts(
        Concept("star", replacement="boat"), forget_prompts=mine, retain_prompts=("the sea", "my hat")
    )
    assert [t.text for t in targets] == list(mine)
    assert [t.replacement_text for t in targets] == ["a boat by the sea", "my boat"]
    assert kept == ["", "the sea", "my hat"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"forget_prompts": ("a tree",), "retain_prompts": ("x",)}, "star"),
        ({"forget_prompts": ("a star",), "retain_prompts": ("a star",)}, "a star"),
        ({"forget_prompts": ("a star",), "retain_prompts": ("x",), "diverse": 4}, "not both"),
        ({"gradient": "restricted", "preserve_weight": 0.0}, "preserves nothing"),
        ({"retain_prompts": ("x",), "preserve_weight": 0.0}, "preserves nothing"),
        ({"latents": "images"}, "no images of 'star'"),
        ({"diverse": -1}, "'diverse'"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(model, settings, words):
    request = ForgetRequest((Concept("star"),), method="forget_me_not", settings={"latents": "zeros"} | settings)
    with pytest.raises(RequestError, match=words):
        fit(model, request)


def test_a_whole_method_goes_on_where_it_was_cut_short(tmp_path):
    settings = {"steps": 4, "n_images": 2, "sample_steps": 2, "batch_size": 2}
    request = ForgetRequest((Concept("star"),), ("tree",), "forget_me_not", settings=settings, seed=3)
    whole = fit(tiny_model(), request)

    def cancel(event):
        if event.message.startswith("re-steering") and event.step == 2:
            raise Cancelled

    inputs = Inputs(workspace=Workspace(tmp_path))
    with pytest.raises(Cancelled):
        fit(tiny_model(), request, cancel, inputs)
    events = []
    patch = fit(tiny_model(), request, events.append, inputs)
    assert [e.step for e in events if e.terms] == [3, 4]
    assert all(torch.equal(f.up, whole.factors[k].up) for k, f in patch.factors.items())


# -- pictures of a person's own -----------------------------------------------------------------------------------


class Averaging:
    """An autoencoder without weights: 8×8 means, and a fourth channel of zeros."""

    def encode(self, images):
        means = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([means, torch.zeros_like(means[:, :1])], 1)


def pictures(n=3, size=64, seed=0):
    return rand(n, 3, size, size, seed=seed).clamp(-1, 1)


def test_ones_own_pictures_are_what_is_noised(model):
    model.vae = Averaging()
    made = material(model)
    made.draw({RETAIN_POOL: ["a tree"]}, 1)
    made.encode("star", pictures())
    assert torch.equal(made.pools["star"], Averaging().encode(pictures()))
    assert any(torch.equal(made.noised(["star"]).x0[0], one) for one in made.pools["star"])
    with pytest.raises(RequestError, match=r"'star' are 128×128; this model works on 64×64"):
        made.encode("star", pictures(size=128))


def own(**inputs):
    settings = {"steps": 1, "latents": "images", "n_images": 1, "sample_steps": 1}
    request = ForgetRequest((Concept("star"),), method="forget_me_not", settings=settings)
    return fit(tiny_model_with_pictures(), request, None, Inputs(**inputs))


def tiny_model_with_pictures():
    model = tiny_model()
    model.vae = Averaging()
    return model


def test_other_pictures_make_another_patch():
    first, same, other = (own(images={"star": pictures(seed=s)}) for s in (0, 0, 1))
    key = next(iter(first.factors))
    assert torch.equal(first.factors[key].up, same.factors[key].up)
    assert not torch.equal(first.factors[key].up, other.factors[key].up)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"star": pictures(2)}, "too few pictures of 'star': 2, and at least 3"),
        ({"star": pictures(size=72)}, "must be 64 × 64"),
        ({"star": pictures()[:, :1]}, "red, green and blue"),
        ({"tree": pictures()}, "'tree', which is not to be forgotten"),
        ({}, "no images of 'star'"),
    ],
)
def test_pictures_that_cannot_serve_are_refused(images, words):
    with pytest.raises(RequestError, match=words):
        own(images=images)


def test_pictures_that_nobody_would_look_at_are_refused(model):
    with pytest.raises(RequestError, match="does not use with these settings"):
        fit(model, ForgetRequest((Concept("star"),), method="forget_me_not"), None, Inputs({"star": pictures()}))


def test_a_requests_pictures_are_read_and_not_told(tmp_path):
    from PIL import Image

    for i in range(3):
        pixels = ((pictures(seed=i)[0].permute(1, 2, 0) + 1) * 127.5).round().byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    concept = Concept("star", images=(str(tmp_path),))
    settings = {"steps": 1, "latents": "images", "n_images": 1, "sample_steps": 1}
    request = ForgetRequest((concept,), method="forget_me_not", settings=settings)
    patch = fit(tiny_model_with_pictures(), request)
    assert str(tmp_path) not in str(dict(patch.metadata))
