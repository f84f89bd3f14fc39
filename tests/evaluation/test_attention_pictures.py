"""Where a word looks: held to a plain computation of every map, and on the embedded model to where the object is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import flags, random_patch, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ModelError, RequestError, TokenError
from forget_concept.core.evaluation import Picture, SamplingSettings
from forget_concept.core.evaluation.attention_pictures import (
    AttentionMap,
    AttentionPair,
    attention_maps,
    attention_pairs,
    heat,
    overlay,
)
from forget_concept.core.models.latent_diffusion import LatentDiffusion

QUICK = SamplingSettings(3, 3.0, 2, "float32")
PICTURES = [Picture("a red star", 4), Picture("a big blue moonlight and a star", 5), Picture("a starfish", 6)]
PHRASES = ["star", "moonlight", "starfish"]


class Decoder:
    """Makes pictures of latents by repeating them."""

    def encode(self, images):
        raise NotImplementedError

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


@pytest.fixture()
def tiny(device):
    model = tiny_model()
    model.vae = Decoder()
    model.unet.to(device)
    return model


def bilinear(size, grown):
    """The matrix ``(grown, size)`` that stretches a line of values, by its definition: pixel centres meet."""
    matrix = torch.zeros(grown, size, dtype=torch.float64)
    for i in range(grown):
        place = min(max((i + 0.5) * size / grown - 0.5, 0), size - 1)
        left = int(place)
        matrix[i, left] += 1 - (place - left)
        matrix[i, min(left + 1, size - 1)] += place - left
    return matrix


def plainly(model, picture, sampling):
    """Every token's map ``(h, w, tokens)``: whole attention matrices of the conditional pass, site by site, in fp64."""
    height, width = model.latent_shape[1:]
    kept, total, passes = {}, torch.zeros(height, width, 77, dtype=torch.float64), 0
    hooks = [
        site.projection(which).register_forward_hook(
            lambda module, args, out, key=(site.name, which): kept.__setitem__(key, out[0].double().cpu())
        )
        for site in model.survey
        for which in ("to_q", "to_k")
    ]

    def step(event):
        nonlocal passes
        if not event.step:  # the prompts are encoded before the first step
            return
        passes += 1
        for site in model.survey:
            q, k = kept[site.name, "to_q"], kept[site.name, "to_k"]
            q, k = (x.reshape(len(x), site.heads, -1).transpose(0, 1) for x in (q, k))
            maps = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1).mean(0)
            side = int(len(maps) ** 0.5)
            stretch = bilinear(side, height), bilinear(side, width)
            total.add_(torch.einsum("yi,xj,ijt->yxt", *stretch, maps.reshape(side, side, -1)) / len(model.survey))

    try:
        model.sample(
            [picture.prompt], [picture.seed], sampling.steps, sampling.guidance, progress=step, sampler=sampling.sampler
        )
    finally:
        for hook in hooks:
            hook.remove()
    return total / passes


def test_the_map_is_that_of_whole_attention_matrices(tiny):
    found = attention_maps(tiny, PICTURES, PHRASES, (), QUICK)
    for picture, phrase, one in zip(PICTURES, PHRASES, found, strict=True):
        every = plainly(tiny, picture, QUICK)
        # the shares of all tokens make up the whole, everywhere
        torch.testing.assert_close(every.sum(-1), torch.ones(8, 8, dtype=torch.float64))
        ids, wanted = tiny.text.token_ids(picture.prompt), tiny.text.phrase_ids(phrase)
        starts = [i for i in range(77) if ids[i : i + len(wanted)] == wanted]
        places = [start + i for start in starts for i in range(len(wanted))]
        assert len(wanted) > 1 or phrase == "star"
        torch.testing.assert_close(one.mass.double(), every[..., places].sum(-1), rtol=2e-4, atol=1e-6)
        assert one.mass.dtype == torch.float32
        assert one.share == pytest.approx(float(one.mass.mean()))


def test_shares_of_the_parts_are_the_share_of_the_whole(tiny):
    picture = Picture("a big blue moonlight and a star", 5)
    whole, *parts = attention_maps(tiny, [picture] * 3, ["big blue moonlight", "big", "blue moonlight"], (), QUICK)
    torch.testing.assert_close(whole.mass, parts[0].mass + parts[1].mass, rtol=1e-4, atol=1e-6)


def test_the_fast_way_is_the_reference(tiny):
    fast, plain = (attention_maps(tiny, PICTURES, PHRASES, (), QUICK, None, way) for way in ("sdpa", "reference"))
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a.mass, b.mass, rtol=1e-4, atol=1e-6)
        assert torch.equal(a.picture, b.picture)


def test_neither_the_batch_nor_a_narrow_precision_makes_another_map(tiny):
    found = attention_maps(tiny, PICTURES, PHRASES, (), QUICK)
    for picture, phrase, one in zip(PICTURES, PHRASES, found, strict=True):
        (alone,) = attention_maps(tiny, [picture], [phrase], (), QUICK)
        torch.testing.assert_close(alone.mass, one.mass, rtol=1e-4, atol=1e-6)
    narrow = attention_maps(tiny, PICTURES, PHRASES, (), replace(QUICK, precision="bfloat16"))
    for a, b in zip(narrow, found, strict=True):
        torch.testing.assert_close(a.mass, b.mass, rtol=0.1, atol=1e-3)


def test_without_guidance_there_is_one_pass(tiny):
    plain = replace(QUICK, guidance=1.0)
    (found,) = attention_maps(tiny, PICTURES[:1], ["star"], (), plain)
    ids = tiny.text.token_ids(PICTURES[0].prompt)
    place = ids.index(tiny.text.phrase_ids("star")[0])
    torch.testing.assert_close(found.mass.double(), plainly(tiny, PICTURES[0], plain)[..., place], rtol=2e-4, atol=1e-6)


def test_a_patch_is_seen_as_if_it_were_in_the_weights(tiny):
    before, on = state_hash(tiny.unet), flags(tiny.unet)
    patch = random_patch(tiny.survey, scale=0.4)
    (pair,) = attention_pairs(tiny, PICTURES[:1], PHRASES[:1], ((patch, 0.7),), QUICK)
    assert state_hash(tiny.unet) == before
    assert flags(tiny.unet) == on
    merged = tiny_model()
    merged.vae = Decoder()
    merged.unet.load_state_dict(merged.unet.state_dict() | patch.merged_state(merged.survey, 0.7))
    merged.unet.to(tiny.device)
    (truth,) = attention_maps(merged, PICTURES[:1], PHRASES[:1], (), QUICK)
    torch.testing.assert_close(pair.after.mass, truth.mass, rtol=1e-3, atol=1e-5)
    (plain,) = attention_maps(tiny, PICTURES[:1], PHRASES[:1], (), QUICK)
    assert torch.equal(pair.before.mass, plain.mass)
    assert (pair.after.mass - pair.before.mass).abs().max() > 1e-3
    assert pair.as_dict()["share_after"] == pytest.approx(float(truth.mass.mean()), rel=1e-3)


def test_what_cannot_be_watched_is_said_and_the_model_is_given_back(tiny):
    before, on = state_hash(tiny.unet), flags(tiny.unet)
    patches = ((random_patch(tiny.survey), 1.0),)
    with pytest.raises(TokenError, match="'moon' does not occur in the prompt 'a red star'"):
        attention_maps(tiny, PICTURES[:1], ["moon"], patches, QUICK)
    with pytest.raises(RequestError, match="1 images and 2 phrases"):
        attention_maps(tiny, PICTURES[:1], ["star", "red"], patches, QUICK)
    with pytest.raises(RequestError, match="0 images"):
        attention_maps(tiny, [], [], patches, QUICK)

    def stop(event):
        if event.step >= 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        attention_pairs(tiny, PICTURES, PHRASES, patches, QUICK, stop)
    tiny.vae = None
    with pytest.raises(ModelError, match="no autoencoder"):
        attention_maps(tiny, PICTURES[:1], ["star"], patches, QUICK)
    assert state_hash(tiny.unet) == before
    assert flags(tiny.unet) == on


def test_a_host_that_draws_pictures_one_pass_at_a_time_is_refused():
    plain = tiny_model()

    def one_by_one(x, t, states):
        rows = [plain.predict_noise(x[i : i + 1], t[i : i + 1], states.index([i])) for i in range(len(x))]
        return torch.cat(rows)

    model = LatentDiffusion(
        plain.unet, plain.text, plain.alphas_cumprod, vae=Decoder(), latent_shape=(4, 8, 8), eps_model=one_by_one
    )
    with pytest.raises(ModelError, match="in one batch"):
        attention_maps(model, PICTURES[:1], ["star"], (), QUICK)


def test_progress_rises_to_its_total(tiny):
    events = []
    attention_pairs(tiny, PICTURES, PHRASES, (), QUICK, events.append)
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert steps[-1] == events[-1].total == 2 * 3 * QUICK.steps


# -- colours --------------------------------------------------------------------------------------------------------


def oklab(colours):
    """sRGB in [0, 1] to OKLab, as Ottosson 2020 gives it."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    cones = torch.tensor(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]], dtype=torch.float64,
    )  # fmt: skip
    axes = torch.tensor(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]], dtype=torch.float64,
    )  # fmt: skip
    return (linear @ cones.T).pow(1 / 3) @ axes.T


def test_equal_steps_of_heat_are_equal_steps_to_the_eye():
    colours = heat(torch.linspace(0, 1, 256)).double()
    assert colours.min() > 0 and colours.max() < 1  # nothing of the path is cut off at the ends of a screen's colours
    lab = oklab(colours)
    steps = (lab[8:] - lab[:-8]).norm(dim=1)
    assert steps.max() / steps.min() < 1.1
    # more is always lighter: the map reads the same in grey
    assert (lab[1:, 0] > lab[:-1, 0]).all()
    assert lab[-1, 0] - lab[0, 0] > 0.65


def test_values_outside_the_scale_have_the_colour_of_its_end():
    ends = heat(torch.tensor([-3.0, 0.0, 1.0, 7.0, float("nan")]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[2], ends[3]) and torch.equal(ends[4], ends[0])


def test_before_and_after_have_one_scale():
    picture = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    low, high = torch.full((8, 8), 0.1), torch.full((8, 8), 0.1)
    high[:, 4:] = 0.3
    pair = AttentionPair("a star", "star", 0, AttentionMap(low, picture), AttentionMap(high, picture))
    assert pair.scale == (pytest.approx(0.1), pytest.approx(0.3))
    before, after = pair.overlays()
    assert before.shape == after.shape == picture.shape and before.dtype == after.dtype == torch.uint8
    # the same share has the same colour on both sides, and more is lighter
    assert torch.equal(before[:, 0, 0], after[:, 0, 0])
    assert after[:, 0, 31].float().mean() > before[:, 0, 31].float().mean() + 50
    assert before.flatten(1).unique(dim=1).shape[1] == 1


def test_an_overlay_shows_the_picture_below_and_refuses_a_scale_that_is_none():
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    picture[:, :, 8:] = 255
    flat = overlay(picture, torch.full((4, 4), 0.2), 0.2, 0.2)
    assert (flat[:, :, 15].float() - flat[:, :, 0].float()).min() > 40
    for low, high in ((0.3, 0.2), (0.0, float("nan"))):
        with pytest.raises(RequestError, match="must rise"):
            overlay(picture, torch.zeros(4, 4), low, high)


# -- on the embedded model ------------------------------------------------------------------------------------------


def over_under(mass, inside):
    """The chance that a place inside has more than one outside: the area under the ROC curve."""
    return float((mass[inside][:, None] > mass[~inside][None]).float().mean())


def test_the_word_of_an_object_looks_at_the_object():
    """Found by its colour, which nothing else in the picture has; a map of nothing in particular would get 0.5."""
    from forget_concept.core import mini

    model = mini.load()
    before = flags(model.unet)
    names = ["star", "heart", "house", "fish", "cup", "boat", "crown", "circle"]
    pictures = [Picture(f"a photo of a red {name} on a grey background", seed) for seed, name in enumerate(names)]
    found = attention_maps(model, pictures, names, (), SamplingSettings(8, precision="float32"))
    assert flags(model.unet) == before
    places = []
    for one in found:
        colours = one.picture.float()
        ground = colours[:, :6, :6].mean((1, 2), keepdim=True)
        drawn = ((colours - ground).norm(dim=0) > 80).float()
        places.append(torch.nn.functional.avg_pool2d(drawn[None, None], 8)[0, 0] > 0.5)
        assert 15 < places[-1].sum() < 128
    own = [over_under(one.mass, inside) for one, inside in zip(found, places, strict=True)]
    assert sum(value > 0.95 for value in own) >= 7, own
    # not merely at the middle, where every object is: each lies on its own shape better than on the others'
    others = [
        sum(over_under(one.mass, inside) for inside in places if inside is not mine) / (len(places) - 1)
        for one, mine in zip(found, places, strict=True)
    ]
    assert sum(mine > other + 0.02 for mine, other in zip(own, others, strict=True)) >= 7, (own, others)
    # the mass centre, above what the whole picture pays anyway, lies within the object's box
    for one, inside in zip(found, places, strict=True):
        excess = (one.mass - one.mass[~inside].mean()).clamp(min=0)
        rows, columns = inside.nonzero(as_tuple=True)
        y = float((excess.sum(1) * torch.arange(16)).sum() / excess.sum())
        x = float((excess.sum(0) * torch.arange(16)).sum() / excess.sum())
        assert rows.min() < y < rows.max() and columns.min() < x < columns.max()
