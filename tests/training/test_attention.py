"""Attention mass: the fast way held to the reference, forward and in every gradient; and the recorder."""

from __future__ import annotations

import pytest
import torch
from tiny import flags, rand, tiny_unet

from forget_concept.core.errors import ForgetConceptError, TokenError
from forget_concept.core.models.survey import survey
from forget_concept.core.training.attention import (
    AttentionCapture,
    attention_mass,
    attention_mass_reference,
    token_mask,
)

# (batch, pixels, tokens, heads, width of a head, columns); the last has more columns than a head is wide
SHAPES = [(1, 16, 77, 4, 8, 1), (2, 9, 77, 8, 16, 3), (3, 64, 5, 1, 40, 5), (2, 7, 77, 2, 4, 13)]
TOLERANCE = {torch.float32: (2e-5, 1e-5), torch.bfloat16: (3e-2, 4e-3)}


def inputs(batch, pixels, tokens, heads, width, columns, device="cpu", dtype=torch.float32, scale=1.0):
    q = (scale * rand(batch, pixels, heads * width)).to(device, dtype)
    k = (scale * rand(batch, tokens, heads * width, seed=1)).to(device, dtype)
    places = [
        torch.randperm(tokens, generator=torch.Generator().manual_seed(b))[:columns].tolist() for b in range(batch)
    ]
    places[0] = places[0][: max(1, columns - 1)]  # prompts need not have as many positions
    return q.requires_grad_(), k.requires_grad_(), token_mask(places, tokens, device), places


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fast_way_is_the_reference_forward_and_backward(shape, dtype, device):
    q, k, mask, _ = inputs(*shape, device=device, dtype=dtype)
    wide = [t.detach().float().requires_grad_() for t in (q, k)]
    rtol, atol = TOLERANCE[dtype]
    fast, slow = attention_mass(q, k, mask, shape[3]), attention_mass_reference(*wide, mask, shape[3])
    assert fast.shape == (shape[0], shape[3], shape[1], mask.shape[2]) and fast.dtype == dtype
    torch.testing.assert_close(fast.float(), slow, rtol=rtol, atol=atol)
    weight = rand(*fast.shape, seed=5).to(device)  # an incoming gradient that is not all ones
    (fast.float() * weight).sum().backward()
    (slow * weight).sum().backward()
    for name, ours, theirs in (("q", q, wide[0]), ("k", k, wide[1])):
        size = float(theirs.grad.abs().max())
        torch.testing.assert_close(
            ours.grad.float(),
            theirs.grad,
            rtol=rtol,
            atol=atol * max(size, 1),
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )


def test_the_reference_is_the_definition():
    """Every head, row, pixel and token by itself, in plain loops: batch and heads must not be mixed up."""
    q, k, mask, places = inputs(3, 4, 9, 2, 5, 2)
    found = attention_mass_reference(q, k, mask, 2)
    for b in range(3):
        for h in range(2):
            part = slice(5 * h, 5 * h + 5)
            for p in range(4):
                logits = torch.stack([q[b, p, part] @ k[b, t, part] for t in range(9)]) / 5**0.5
                for i, t in enumerate(places[b]):
                    torch.testing.assert_close(found[b, h, p, i], logits.softmax(0)[t])
                assert not found[b, h, p, len(places[b]) :].any()


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
def test_gradients_are_those_of_finite_differences(implementation, device):
    q, k = (rand(2, 3, 8, seed=i, dtype=torch.float64).to(device).requires_grad_() for i in (0, 1))
    mask = token_mask([[0], [1, 2]], 3, device)
    assert torch.autograd.gradcheck(lambda a, b: attention_mass(a, b, mask, 2, implementation), (q, k))


def test_masses_are_shares():
    q, k, _, _ = inputs(2, 6, 7, 2, 8, 1)
    every = token_mask([list(range(7))] * 2, 7)
    mass = attention_mass(q, k, every, 2)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2, 6))
    assert mass.min() >= 0
    # a column with several ones is their sum
    torch.testing.assert_close(
        attention_mass(q, k, every[..., :3].sum(-1, keepdim=True), 2)[..., 0], mass[..., :3].sum(-1)
    )


def test_masks():
    mask = token_mask([[4], [1, 2, 5]], 6)
    assert mask.shape == (2, 6, 3)
    assert mask[0].sum() == 1 and mask[0, 4, 0] == 1
    assert [mask[1, p, i].item() for i, p in enumerate((1, 2, 5))] == [1, 1, 1]
    with pytest.raises(TokenError, match="no token"):
        token_mask([[1], []], 6)
    with pytest.raises(TokenError, match="no token"):
        token_mask([], 6)
    with pytest.raises(TokenError, match="outside"):
        token_mask([[6]], 6)


def test_shapes_that_do_not_fit_are_refused():
    q, k, mask, _ = inputs(2, 6, 7, 2, 8, 1)
    for arguments in (
        (q[:1], k, mask, 2),
        (q, k, mask[:, :3], 2),
        (q, k, mask, 3),
        (q[..., :8], k, mask, 2),
        (q[0], k, mask, 2),
    ):
        for implementation in ("sdpa", "reference"):
            with pytest.raises(ForgetConceptError, match="does not fit"):
                attention_mass(*arguments, implementation)


def test_the_recorder_sees_the_attention_the_unet_computes():
    """Against diffusers' own processor, which makes the whole map; and gradients reach the weights."""
    unet = tiny_unet()
    found = survey(unet)
    site = found.sites[4]
    x, context = rand(2, 4, 8, 8), rand(2, 77, 32, seed=9)
    maps = []

    class Explicit:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            q, k, v = (attn.head_to_batch_dim(t) for t in (q, k, v))
            maps.append(attn.get_attention_scores(q, k))
            return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(maps[-1] @ v)))

    site.module.set_processor(Explicit())
    mask = token_mask([[3], [5, 6]], 77)
    flagged = flags(unet)
    with AttentionCapture(found) as recorder:
        unet(x, torch.tensor([100]), encoder_hidden_states=context)
        masses = recorder.masses(mask)
        torch.testing.assert_close(masses, recorder.masses(mask, "reference"), atol=1e-5, rtol=1e-4)
        assert [m.shape[:2] for m in masses] == [(2, s.heads) for s in found]
        full = maps[0].view(2, site.heads, -1, 77)
        torch.testing.assert_close(masses[4][0, :, :, 0], full[0, :, :, 3], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(masses[4][1, :, :, 1], full[1, :, :, 6], atol=1e-6, rtol=1e-4)
        sum(m.sum() for m in masses).backward()
    assert float(site.projection("to_k").weight.grad.norm()) > 0
    assert flags(unet) == flagged and not recorder.q and not recorder.k


def test_the_recorder_leaves_nothing_after_an_error_and_says_what_is_missing():
    unet = tiny_unet()
    flagged = flags(unet)
    with pytest.raises(RuntimeError), AttentionCapture(survey(unet)):
        raise RuntimeError
    assert flags(unet) == flagged
    with AttentionCapture(survey(unet)) as recorder, pytest.raises(ForgetConceptError, match="No forward pass"):
        recorder.masses(token_mask([[1]], 77))
