"""Both rules against fp64 references, their first-order claims, the conditions of optimality, and all their corners."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import rand, tiny_model

from forget_concept.core.errors import ForgetConceptError
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.forget_me_not import ForgetMeNot, ForgetMeNotSettings
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training import gradients
from forget_concept.core.training.gradients import (
    MARGIN,
    inner_products,
    null_space_projection,
    project_step,
    restricted_gradient,
    retain_basis,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gradients as bench

SHAPES = [(3, 4), (5,), (2, 1, 2), ()]
SIZE = sum(math.prod(shape) for shape in SHAPES)
EPS = {torch.float64: 2e-15, torch.float32: 4e-7, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(EPS), ids=str)


def split(vector, device="cpu", dtype=torch.float64):
    """One flat vector as the parameters of a model."""
    parts = vector.split([math.prod(shape) for shape in SHAPES])
    return [part.reshape(shape).to(device, dtype) for part, shape in zip(parts, SHAPES, strict=True)]


def flat(tensors):
    """And back, in fp64; what is missing is zero."""
    return torch.cat(
        [
            torch.zeros(math.prod(shape)).double() if x is None else x.detach().double().cpu().reshape(-1)
            for x, shape in zip(tensors, SHAPES, strict=True)
        ]
    )


@st.composite
def geometries(draw, count=2):
    """Vectors of a random common frame with small whole coordinates: parallel, opposite and zero ones come up often."""
    seed = draw(st.integers(0, 2**16))
    frame = torch.linalg.qr(rand(SIZE, 3, seed=seed, dtype=torch.float64)).Q
    whole = st.integers(-2, 2)
    scale = st.sampled_from([1e-12, 1e-3, 1.0, 1e6])
    return [
        frame @ torch.tensor([draw(whole), draw(whole), draw(whole)], dtype=torch.float64) * draw(scale)
        for _ in range(count)
    ]


def dot(a, b):
    return float(a @ b)


def slack(*vectors):
    """What rounding may cost an inner product of these."""
    return 1e-12 * math.prod(float(v.norm()) for v in vectors) + 1e-300


def restricted_reference(f, r, alpha=1.0):
    s = f @ r
    if s >= 0:
        return f + alpha * r
    return (f - s / (r @ r) * r) + alpha * (r - s / (f @ f) * f)


def asked(u, f, r, margin):
    """By the docstring: what is wanted of ``g·u'`` for gradients of norm 1."""
    halved = 1.0
    if f.norm() > 0 and r.norm() > 0:
        halved = float(((f / f.norm() + r / r.norm()) / 2).norm())  # cos(φ/2), by the bisector
    return margin * float(u.norm()) * halved


def projection_reference(u, f, r, margin=0.0, rounds=200_000):
    """Dual projected gradient descent, knowing nothing of cases, on gradients of norm 1."""
    units = [v / v.norm() for v in (f, r) if v.norm() > 0]
    if not units:
        return u
    basis = torch.stack(units)
    gram, at = basis @ basis.T, basis @ u - asked(u, f, r, margin)
    multipliers = torch.zeros(len(units), dtype=torch.float64)
    for _ in range(rounds):
        new = (multipliers - 0.5 * (gram @ multipliers + at)).clamp(min=0)
        if torch.equal(new, multipliers):
            break
        multipliers = new
    return u + multipliers @ basis


# -- the restricted gradient --------------------------------------------------------------------------------------


@given(geometries(), st.sampled_from([0.0, 0.3, 1.0, 1.6, 40.0]))
def test_to_first_order_neither_loss_rises(pair, alpha):
    f, r = pair
    g = flat(restricted_gradient(split(f), split(r), alpha))
    size = f.norm() + alpha * r.norm()
    assert dot(g, f) >= -slack(f, size) and dot(g, r) >= -slack(r, size)
    opposite = dot(f, r) < 0 and dot(f, r) ** 2 >= (1 - 1e-12) * dot(f, f) * dot(r, r)
    if opposite:
        assert not g.any()
    else:
        torch.testing.assert_close(g, restricted_reference(f, r, alpha), rtol=1e-9, atol=1e-12 * float(size) + 1e-300)


@given(st.integers(0, 2**16), st.sampled_from([1.0, 0.25, 1.6]))
def test_without_conflict_it_is_the_sum_bit_for_bit(seed, alpha):
    f, r = rand(SIZE, seed=seed), rand(SIZE, seed=seed + 1)
    if f @ r < 0:
        r = -r
    found = restricted_gradient(split(f, dtype=torch.float32), split(r, dtype=torch.float32), alpha)
    assert torch.equal(flat(found), torch.add(f, r, alpha=alpha).double())
    assert alpha != 1 or torch.equal(flat(found), (f + r).double())


@DTYPES
def test_in_a_conflict_it_is_the_papers_formula_on_every_device(device, dtype):
    f = split(rand(SIZE, seed=1), device, dtype)
    r = split(rand(SIZE, seed=2) - 0.5 * rand(SIZE, seed=1), device, dtype)
    assert inner_products(f, r).conflict
    for alpha in (1.0, 1.6):
        found = restricted_gradient(f, r, alpha)
        wanted = restricted_reference(flat(f), flat(r), alpha)
        assert [g.dtype for g in found] == [dtype] * 4 and {g.device.type for g in found} == {device}
        torch.testing.assert_close(flat(found), wanted, rtol=EPS[dtype], atol=EPS[dtype] * float(wanted.abs().max()))


def test_alpha_weighs_what_is_kept():
    """As in the authors' script, and the same as weighing its loss."""
    f, r = rand(SIZE, seed=1, dtype=torch.float64), rand(SIZE, seed=2, dtype=torch.float64)
    r = r - (1 + f @ r) / (f @ f) * f  # f·r = −1
    torch.testing.assert_close(
        flat(restricted_gradient(split(f), split(r), 1.6)), flat(restricted_gradient(split(f), split(1.6 * r)))
    )
    nearly_all = flat(restricted_gradient(split(f), split(r), 1e6))
    blind_to_f = r - (f @ r) / (f @ f) * f
    assert torch.cosine_similarity(nearly_all, blind_to_f, 0) > 1 - 1e-9


def test_nearly_opposite_gradients_give_their_difference_and_not_its_rounding(device):
    """The sum is a 10⁻⁵ of either; in fp32 arithmetic a hundredth of it would be noise."""
    direction = rand(4000, seed=1)
    other = rand(4000, seed=2)
    f, r = direction.to(device), (1e-5 * other - direction).to(device)
    (found,) = restricted_gradient([f], [r])
    wanted = restricted_reference(f.double().cpu(), r.double().cpu())
    error = (found.double().cpu() - wanted).norm() / wanted.norm()
    assert error < 1e-6
    assert float(wanted.norm()) < 1e-4 * float(f.norm())


@DTYPES
def test_opposite_gradients_give_exactly_nothing(device, dtype):
    f = split(rand(SIZE, seed=1), device, dtype)
    found = restricted_gradient(f, [-4 * x for x in f])
    assert not flat(found).any() and [g.dtype for g in found] == [dtype] * 4


def test_a_zero_or_missing_side_leaves_the_other(device):
    f = split(rand(SIZE, seed=1), device, torch.float32)
    zero = [torch.zeros_like(x) for x in f]
    for nothing in (zero, [None] * 4):
        assert torch.equal(flat(restricted_gradient(f, nothing)), flat(f))
        assert torch.equal(flat(restricted_gradient(nothing, f, 2.0)), 2 * flat(f))
    assert not flat(restricted_gradient(zero, zero)).any()
    assert restricted_gradient([None] * 4, [None] * 4) == [None] * 4


def test_a_parameter_that_only_one_loss_knows_takes_part(device):
    """Missing is zero, for the result and for the inner products alike."""
    f = split(rand(SIZE, seed=1), device, torch.float32)
    r = split(0.3 * rand(SIZE, seed=2) - rand(SIZE, seed=1), device, torch.float32)
    f[1], r[2] = None, None
    filled = ([torch.zeros_like(b) if a is None else a for a, b in zip(x, y, strict=True)] for x, y in ((f, r), (r, f)))
    assert inner_products(f, r).conflict
    torch.testing.assert_close(flat(restricted_gradient(f, r)), flat(restricted_gradient(*filled)))
    f[3] = r[3] = None
    assert restricted_gradient(f, r)[3] is None


def test_what_is_done_to_the_result_does_not_reach_what_it_was_made_of():
    f, r = split(rand(SIZE, seed=1)), [None] * 4
    before = flat(f).clone()
    for g in restricted_gradient(f, r):
        g.mul_(0)
    assert torch.equal(flat(f), before)


# -- the projected step -------------------------------------------------------------------------------------------


MARGINS = st.sampled_from([0.0, 0.3, 1.0])


@given(geometries(count=3), MARGINS)
def test_the_step_meets_the_conditions_of_optimality(vectors, margin):
    """Feasible, multipliers not negative, complementary slackness: for a convex problem that is the minimum."""
    u, f, r = vectors
    found = project_step(split(u), split(f), split(r), margin)
    v, a, b = flat(found.step), found.forget_multiplier, found.retain_multiplier
    assert a >= 0 and b >= 0
    assert found.forget_active == (a > 0) and found.retain_active == (b > 0)
    torch.testing.assert_close(v, u + a * f + b * r, rtol=1e-12, atol=1e-12 * float(u.norm()) + 1e-300)
    least = asked(u, f, r, margin)
    beyond = [dot(g, v) - least * float(g.norm()) for g in (f, r)]
    # where the two are opposite to rounding, cos(φ/2) is no better known than to the root of it
    known = [
        slack(g, u) + (1e-7 * margin * slack(g, u) / 1e-12 if least < 1e-6 * float(u.norm()) else 0) for g in (f, r)
    ]
    assert beyond[0] >= -known[0] and beyond[1] >= -known[1]
    if found.forget_active:
        assert abs(beyond[0]) <= known[0]
    if found.retain_active:
        assert abs(beyond[1]) <= known[1]
    assert v.norm() <= u.norm() * math.sqrt(1 + margin**2) * (1 + 1e-12)
    if not (found.forget_active or found.retain_active):
        assert torch.equal(v, u)


@given(geometries(count=3), MARGINS)
def test_the_step_is_the_one_a_search_finds(vectors, margin):
    u, f, r = vectors
    found = flat(project_step(split(u), split(f), split(r), margin).step)
    wanted = projection_reference(u, f, r, margin)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7 * float(u.norm()) + 1e-300)


@given(st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_step_that_is_good_already_comes_back_bit_for_bit(seed, dtype):
    u, f, r = (rand(SIZE, seed=seed + i) for i in range(3))
    f, r = (v if u.to(dtype).double() @ v.to(dtype).double() >= 0 else -v for v in (f, r))
    for margin in (0.0, 0.3):
        good = u + margin * (f.norm() + u.norm()) * (f / f.norm() + r / r.norm()) if margin else u
        given_step = split(good, dtype=dtype)
        found = project_step(given_step, split(f, dtype=dtype), split(r, dtype=dtype), margin)
        assert all(a is b for a, b in zip(found.step, given_step, strict=True))
        assert not found.forget_active and not found.retain_active


def test_one_projection_after_the_other_is_not_enough():
    """It violates the first constraint again; here by a quarter of the step, and in a tenth of random cases or more."""
    f, r = torch.tensor([1.0, 0.0]).double(), torch.tensor([-math.sqrt(0.5), math.sqrt(0.5)]).double()
    u = torch.tensor([-0.5, -1.0]).double()

    def in_turn(u, f, r):
        for g in (f, r):
            u = u - min(0.0, dot(u, g)) / dot(g, g) * g
        return u

    assert dot(f, in_turn(u, f, r)) == pytest.approx(-0.5) and dot(r, in_turn(u, f, r)) >= -1e-15
    found = project_step([u], [f], [r], margin=0)
    assert found.forget_active and found.retain_active
    assert dot(f, found.step[0]) >= -1e-15 and dot(r, found.step[0]) >= -1e-15

    violated = 0
    for seed in range(300):
        u, f, r = (rand(6, seed=3 * seed + i, dtype=torch.float64) for i in range(3))
        v = in_turn(u, f, r)
        violated += dot(f, v) < -1e-9
        (exact,) = project_step([u], [f], [r], margin=0).step
        assert dot(f, exact) >= -1e-12 and dot(r, exact) >= -1e-12
    assert violated > 10


@DTYPES
def test_the_four_cases_on_every_device(device, dtype):
    f, r = torch.zeros(2, SIZE, dtype=torch.float64)
    f[0], r[0], r[1] = 2.0, -1.0, 1.0
    cases = {
        (False, False): (3.0, 4.0),
        (True, False): (-1.0, 2.0),
        (False, True): (1.0, -1.0),
        (True, True): (-1.0, -3.0),
    }
    for active, (x, y) in cases.items():
        u = rand(SIZE, seed=4, dtype=torch.float64)
        u[0], u[1] = x, y
        given_step, gf, gr = split(u, device, dtype), split(f, device, dtype), split(r, device, dtype)
        found = project_step(given_step, gf, gr, margin=0)
        assert (found.forget_active, found.retain_active) == active
        wanted = projection_reference(flat(given_step), f, r)
        torch.testing.assert_close(flat(found.step), wanted, rtol=EPS[dtype], atol=10 * EPS[dtype])
        assert [v.dtype for v in found.step] == [dtype] * 4 and {v.device.type for v in found.step} == {device}


@pytest.mark.parametrize("factor", [-3.0, 3.0])
@DTYPES
def test_gradients_on_one_line(device, dtype, factor):
    f = split(rand(SIZE, seed=1), device, dtype)
    r = [(factor + 1) * x - x for x in f]
    for sign in (1.0, -1.0):
        u = [sign * x + y for x, y in zip(f, split(rand(SIZE, seed=2), device, dtype), strict=True)]
        v, wide = flat(project_step(u, f, r, margin=0).step), flat(f)
        across = flat(u) - (flat(u) @ wide) / (wide @ wide) * wide
        wanted = flat(u) if factor > 0 and flat(u) @ wide >= 0 else across
        torch.testing.assert_close(v, wanted, rtol=EPS[dtype], atol=10 * EPS[dtype])


def test_zero_gradients_constrain_nothing(device):
    u, f = split(rand(SIZE, seed=1), device), split(-rand(SIZE, seed=1), device)
    zero = [torch.zeros_like(x) for x in u]
    for nothing in (zero, [None] * 4):
        assert torch.equal(flat(project_step(u, nothing, nothing).step), flat(u))
        found = project_step(u, f, nothing, margin=0)
        assert found.forget_active and not found.retain_active and flat(found.step).norm() < 1e-14
        found = project_step(u, nothing, f, margin=0)
        assert found.retain_active and not found.forget_active and flat(found.step).norm() < 1e-14
    assert project_step(zero, f, f).step[0] is zero[0]


def test_half_precision_gradients_and_a_full_precision_step(device):
    u = split(rand(SIZE, seed=1), device, torch.float32)
    f, r = (split(-rand(SIZE, seed=1) + rand(SIZE, seed=i), device, torch.bfloat16) for i in (2, 3))
    found = project_step(u, f, r, margin=0)
    assert found.forget_active or found.retain_active
    assert all(v.dtype == torch.float32 for v in found.step)
    v = flat(found.step)
    assert dot(v, flat(f)) >= -1e-5 and dot(v, flat(r)) >= -1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
def test_parameters_on_several_devices():
    u, f, r = (split(rand(SIZE, seed=i), dtype=torch.float32) for i in (1, 2, 3))
    u = [-x for x in u]
    spread = [[x.to("cuda" if i % 2 else "cpu") for i, x in enumerate(v)] for v in (u, f, r)]
    torch.testing.assert_close(flat(restricted_gradient(*spread[1:])), flat(restricted_gradient(f, r)))
    torch.testing.assert_close(flat(project_step(*spread).step), flat(project_step(u, f, r).step))


def test_sums_over_many_numbers_are_those_of_fp64(monkeypatch):
    """In pieces, in fp64: a sum in fp32 would lose the small conflict behind the large agreement."""
    monkeypatch.setattr(gradients, "CHUNK", 1000)
    f, r = torch.full((12_345,), 1e4), torch.full((12_345,), 1e4)
    f[1::2] = -1e4  # everything cancels but for the odd one and the last
    f[0], r[0] = 0.0, 0.0
    f[-1], r[-1] = 1.0, -1e-3
    found = inner_products([f.view(5, -1)], [r.view(5, -1)])
    exact = sum(int(a) * int(b) for a, b in zip(f[:-1], r[:-1], strict=True)) - 1e-3
    assert found.cross == pytest.approx(exact, abs=1e-6)
    assert found.forget == pytest.approx(float(f.double() @ f.double()), rel=1e-14)
    assert found.retain == pytest.approx(float(r.double() @ r.double()), rel=1e-14)


def test_what_does_not_belong_together_is_said():
    f, r = split(rand(SIZE, seed=1)), split(rand(SIZE, seed=2))
    for call in (lambda a, b: restricted_gradient(a, b), lambda a, b: project_step(a, b, b)):
        with pytest.raises(ForgetConceptError, match=r"different numbers of parameters.*4.*3"):
            call(f, r[:3])
        with pytest.raises(ForgetConceptError, match=r"number 1 .*\(5,\).*\(1, 5\)"):
            call(f, [r[0], r[1][None], *r[2:]])
        with pytest.raises(ForgetConceptError, match="not finite"):
            call(f, [r[0] * float("nan"), *r[1:]])
        with pytest.raises(ForgetConceptError, match="not finite"):
            call([f[0] * float("inf"), *f[1:]], r)
    for margin in (-0.1, 1.1, float("nan")):
        with pytest.raises(ForgetConceptError, match="'margin'"):
            project_step(f, f, r, margin)
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ForgetConceptError, match="'alpha'"):
            restricted_gradient(f, r, alpha)


# -- blind to what is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)], ids=str)
def test_a_blind_change_does_nothing_to_what_is_kept(device, dtype, tolerance):
    states = rand(7, 32, seed=1, dtype=torch.float64).to(device, dtype)
    basis = retain_basis(states, energy=1.0)
    assert basis.shape == (32, 7) and basis.dtype == dtype and basis.device.type == device
    torch.testing.assert_close(basis.T @ basis, torch.eye(7, device=device, dtype=dtype), atol=tolerance, rtol=0)
    delta = rand(16, 32, seed=2, dtype=torch.float64).to(device, dtype)
    blind = null_space_projection(delta, basis)
    assert float((states @ blind.T).abs().max()) < 20 * tolerance < float((states @ delta.T).abs().max())
    # the nearest such change: what was taken away lies in the span, and a second time changes nothing more
    torch.testing.assert_close((delta - blind) @ basis @ basis.T, delta - blind, atol=20 * tolerance, rtol=0)
    torch.testing.assert_close(null_space_projection(blind, basis), blind, atol=20 * tolerance, rtol=0)
    up, down = rand(16, 3, seed=3).to(device, dtype), rand(3, 32, seed=4).to(device, dtype)
    torch.testing.assert_close(
        up @ null_space_projection(down, basis), null_space_projection(up @ down, basis), atol=20 * tolerance, rtol=0
    )


def test_the_gradient_goes_through_the_blind_projection():
    basis = retain_basis(rand(3, 6, seed=1, dtype=torch.float64), energy=1.0)
    x = rand(2, 6, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: null_space_projection(x, basis).sin(), (x,))


def test_the_basis_holds_the_energy_and_no_direction_more(device):
    """Against the eigenvalues of the Gram matrix, worked out another way."""
    states = (rand(40, 12, seed=1) * torch.logspace(0, -3, 12)).to(device)
    wide = states.double().cpu()
    eigenvalues = torch.linalg.eigvalsh(wide.T @ wide).flip(0)
    shares = eigenvalues.cumsum(0) / eigenvalues.sum()
    ranks = set()
    for energy in (0.3, 0.9, 0.99, 0.9999):
        basis = retain_basis(states, energy)
        r = basis.shape[1]
        ranks.add(r)
        assert shares[r - 1] >= energy and (r == 1 or shares[r - 2] < energy)
        assert float((wide @ basis.double().cpu()).norm() ** 2 / wide.norm() ** 2) == pytest.approx(
            float(shares[r - 1])
        )
        torch.testing.assert_close(retain_basis(states, energy, max_rank=1), basis[:, :1])
    assert len(ranks) > 2


@pytest.mark.parametrize("n", [3, 50])
def test_the_basis_of_few_directions_is_their_number(n):
    directions = rand(3, 20, seed=1)
    states = rand(n, 3, seed=2) @ directions
    assert retain_basis(states.double(), energy=1.0).shape == (20, 3) or n == 50
    assert retain_basis(states, energy=1 - 1e-9).shape == (20, 3)
    assert retain_basis(directions[:1].repeat(n, 1)).shape == (20, 1)
    assert retain_basis(states.bfloat16(), max_rank=2).dtype == torch.float32


def test_the_basis_refuses_what_it_cannot_keep():
    states = rand(5, 4, seed=1)
    for bad in (torch.zeros(0, 4), torch.zeros(3, 4), rand(4), states * float("nan")):
        with pytest.raises(ForgetConceptError, match="states to preserve"):
            retain_basis(bad)
    for energy in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ForgetConceptError, match="'energy'"):
            retain_basis(states, energy)
    with pytest.raises(ForgetConceptError, match="'max_rank'"):
        retain_basis(states, max_rank=0)
    with pytest.raises(ForgetConceptError, match="span all 4"):
        retain_basis(states, energy=1.0)
    assert retain_basis(states, energy=1.0, max_rank=3).shape == (4, 3)
    with pytest.raises(ForgetConceptError, match=r"\(4, 3\).*\(2, 5\)"):
        null_space_projection(rand(2, 5), retain_basis(states, max_rank=3))


# -- the claims themselves, both losses worked out anew after the step ----------------------------------------------


def two_losses(device, seed=1):
    """A small network in fp64 that is to give one thing on some inputs and to stay as it is on near others."""
    weights = [rand(*shape, seed=10 * seed + i).double() for i, shape in enumerate([(8, 6), (8, 8), (3, 8)])]
    weights = [(w / 2).to(device).requires_grad_() for w in weights]
    x = rand(20, 6, seed=40).double().to(device)
    near = x + 0.3 * rand(20, 6, seed=50).double().to(device)

    def network(x):
        return ((x @ weights[0].T).tanh() @ weights[1].T).tanh() @ weights[2].T

    with torch.no_grad():
        wanted, kept = network(x) + 0.5, network(near) - 0.2

    def losses():
        return (network(x) - wanted).square().mean(), (network(near) - kept).square().mean()

    return weights, losses


def rise(weights, losses, step, size=1.0):
    """How much each loss rose by the step; the weights are put back."""
    with torch.no_grad():
        before = [float(loss) for loss in losses()]
        kept = [w.clone() for w in weights]
        for w, u in zip(weights, step, strict=True):
            w -= size * u
        after = [float(loss) for loss in losses()]
        for w, was in zip(weights, kept, strict=True):
            w.copy_(was)
    return [b - a for a, b in zip(before, after, strict=True)]


def test_a_small_step_lowers_both_losses_where_the_sum_raises_one(device):
    weights, losses = two_losses(device)
    f, r = (torch.autograd.grad(loss, weights) for loss in losses())
    assert inner_products(f, r).conflict
    assert max(rise(weights, losses, [a + b for a, b in zip(f, r, strict=True)], 1e-4)) > 0
    assert max(rise(weights, losses, restricted_gradient(f, r), 1e-4)) < 0


def test_adam_undoes_the_gradients_claim_and_the_projected_step_restores_it(device):
    """Without a margin nothing of first order is left, and a loss rises by its curvature; with one it falls."""
    weights, losses = two_losses(device, seed=6)
    f, r = (torch.autograd.grad(loss, weights) for loss in losses())
    signs = [g.sign() for g in restricted_gradient(f, r)]  # Adam's first step
    free = [rise(weights, losses, signs, size) for size in (1e-5, 1e-6)]
    assert max(free[0]) > 0
    worse = free[0].index(max(free[0]))
    assert free[0][worse] / free[1][worse] == pytest.approx(10, rel=0.1)  # of first order
    found = project_step(signs, f, r, margin=0)
    assert found.forget_active or found.retain_active
    held = [rise(weights, losses, found.step, size) for size in (1e-5, 1e-6)]
    assert held[0][worse] < free[0][worse] / 50
    assert abs(held[0][worse] / held[1][worse]) == pytest.approx(100, rel=0.1)  # of second
    assert held[0][worse] > 0 > held[0][1 - worse]
    assert max(rise(weights, losses, project_step(signs, f, r, margin=0.3).step, 1e-5)) < 0


def test_the_references_of_this_file_agree_with_a_search_by_hand():
    """Two dimensions, a fine grid: the reference is no copy of what it is to check."""
    f, r, u = (torch.tensor(v).double() for v in ([1.0, 0.2], [-1.0, 0.3], [0.3, -1.0]))
    grid = torch.linspace(-1.2, 1.2, 481).double()
    points = torch.tensor(list(itertools.product(grid.tolist(), grid.tolist()))).double()
    feasible = points[(points @ f >= 0) & (points @ r >= 0)]
    best = feasible[(feasible - u).square().sum(1).argmin()]
    assert (best - projection_reference(u, f, r)).norm() < 0.02


# -- the benchmark that looks on ----------------------------------------------------------------------------------

STAR = Concept("star", "object", "circle")
QUICK = ForgetMeNotSettings(steps=2, lr=1e-2, batch_size=2, latents="zeros", one_template=True, rank=2)


@pytest.fixture()
def brief(monkeypatch):
    monkeypatch.setattr(bench, "HELD_OUT", 1)


def test_a_training_that_is_watched_is_the_one_that_is_not(brief):
    settings = replace(QUICK, gradient="restricted_step")
    watch = bench.observe(tiny_model(), STAR, settings, seed=3, margin=MARGIN)
    others = tuple(word.name for word in CATEGORIES["object"] if word.name != "star")
    request = ForgetRequest((STAR,), others, "forget_me_not", seed=3)
    plain = ForgetMeNot().train_patch(tiny_model(), request, settings, None, Inputs())
    seen = watch.inner.deltas.factors()
    assert seen.keys() == plain.factors.keys()
    for key, factor in plain.factors.items():
        assert torch.equal(seen[key].up, factor.up) and torch.equal(seen[key].down, factor.down)
    assert len(watch.steps) == len({w.before["forget"] for w in watch.steps}) == 2
    other = bench.observe(tiny_model(), STAR, settings, seed=3, margin=0.0)
    assert other.steps[0].before == watch.steps[0].before and other.held_out[1] != watch.held_out[1]


def test_the_losses_are_worked_out_again_on_the_very_same_batch(brief):
    """A step too small to be felt leaves both bit for bit, though every batch is another; a large one does not."""
    still = bench.observe(tiny_model(), STAR, replace(QUICK, optimiser="sgd", lr=1e-7, clip_norm=1e-6), seed=0)
    assert all(w.after == w.before for w in still.steps) and still.held_out[0] == still.held_out[1]
    row = bench.row_of(still, {})
    assert row["forget_rose"] == row["retain_rose"] == row["either_rose"] == 0
    moved = bench.observe(tiny_model(), STAR, QUICK, seed=0)
    assert all(w.after["forget"] < w.before["forget"] and w.after["retain"] > w.before["retain"] for w in moved.steps)
    row = bench.row_of(moved, {"seed": 0})
    assert (row["seed"], row["forget_rose"], row["retain_rose"], row["either_rose"]) == (0, 0, 1, 1)
    assert row["step_norm"] > 0 == moved.held_out[0]["retain"] < row["retain_after"]


def test_the_summary_pools_trainings_and_says_how_many_steps_are_left():
    def row(gradient, margin, backtracks, either, steps):
        shares = dict.fromkeys(bench.SHARES, "0") | {"either_rose": either, "retain_rose": either}
        numbers = dict.fromkeys(["step_norm", "gradient_norm", *bench.LOSSES], "1")
        key = dict(
            zip(bench.KEY, ["m", gradient, margin, backtracks, "adamw", "0.0002", "star", "0", steps], strict=True)
        )
        return key | shares | numbers

    sums = [row("sum", "", "", "0.9", "60"), row("sum", "", "", "0.6", "30")]
    rows = [*sums, row("restricted_step", "0.3", "2", "0.2", "60")]
    text = bench.summary(rows)
    assert "| sum | 90 | 0.0% | 80.0% | 80.0% |" in text
    assert "20.0% of the steps against 80.0% with the sum: 0.25 times as often" in text
