"""Losses against their formulas; gradients against finite differences in fp64; fp32 and bf16 on every device."""

from __future__ import annotations

import pytest
import torch
from tiny import rand

from forget_concept.core.errors import ForgetConceptError
from forget_concept.core.training.losses import attention_resteering, noise_matching

SHAPES = [(2, 4, 16, 3), (2, 8, 4, 3), (1, 1, 1, 1)]


def masses(device, dtype):
    return [rand(*shape, seed=i).abs().to(device, dtype).requires_grad_() for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_resteering_is_one_norm_over_everything(device, dtype, tolerance):
    given = masses(device, dtype)
    loss = attention_resteering(given)
    flat = torch.cat([m.detach().float().flatten() for m in given])
    assert loss.dtype == torch.float32 and loss.ndim == 0
    torch.testing.assert_close(loss.detach(), flat.norm(), rtol=1e-5, atol=0)
    (3 * loss).backward()
    for m in given:  # d‖m‖/dm = m / ‖m‖
        torch.testing.assert_close(m.grad.float(), 3 * m.detach().float() / flat.norm(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_noise_matching_is_the_mean_square(device, dtype, tolerance):
    a = rand(2, 4, 8, 8).to(device, dtype).requires_grad_()
    b = rand(2, 4, 8, 8, seed=1).to(device, dtype).requires_grad_()
    loss = noise_matching(a, b)
    difference = a.detach().float() - b.detach().float()
    torch.testing.assert_close(loss.detach(), (difference**2).mean(), rtol=1e-5, atol=0)
    (0.5 * loss).backward()
    assert loss.dtype == torch.float32 and b.grad is None
    torch.testing.assert_close(a.grad.float(), difference / difference.numel(), rtol=tolerance, atol=tolerance * 1e-2)


def test_gradients_are_those_of_finite_differences(device):
    given = [rand(*shape, seed=i, dtype=torch.float64).to(device).requires_grad_() for i, shape in enumerate(SHAPES)]
    assert torch.autograd.gradcheck(lambda *m: attention_resteering(m), given)
    a, b = (rand(2, 4, 3, 3, seed=i, dtype=torch.float64).to(device).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradcheck(lambda x: noise_matching(x, b), (a,))
    assert attention_resteering(given).dtype == torch.float64


def test_at_no_mass_the_gradient_is_zero_and_not_nan(device):
    nothing = torch.zeros(1, 2, 3, 1, device=device, requires_grad=True)
    something = torch.ones(1, 2, 3, 1, device=device, requires_grad=True)
    attention_resteering([nothing]).backward()
    assert not nothing.grad.any()
    attention_resteering([nothing, something]).backward()
    assert torch.isfinite(nothing.grad).all() and torch.isfinite(something.grad).all()


def test_nothing_to_lose_is_an_error():
    with pytest.raises(ForgetConceptError, match="no site"):
        attention_resteering([])
    with pytest.raises(ForgetConceptError, match="shapes"):
        noise_matching(rand(1, 2), rand(2, 1))
