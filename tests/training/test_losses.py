"""Every loss through one matrix: values and gradients per device and dtype, against plain formulas in fp64.

A row of ``CASES`` says what a loss is given, its formula in elementary operations, where it is zero, how it scales and
what it refuses. Half-precision inputs are rounded before the reference sees them too: the tolerance is what
accumulating in float32 leaves, far below what accumulating in half precision would lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from tiny import rand
from torch import Tensor

from forget_concept.core.errors import ForgetConceptError
from forget_concept.core.training import losses
from forget_concept.core.training.losses import (
    attention_output_matching,
    attention_resteering,
    contrast_target,
    dense_change,
    drift_from_base,
    elastic_penalty,
    noise_matching,
    prior_preservation,
    relative_fisher,
    replay_matching,
    surrogate_matching,
)

Tensors = dict[str, Tensor]
SITES = [(2, 16, 24), (2, 64, 8), (2, 4, 32)]
MASSES = [(2, 4, 16, 3), (2, 8, 4, 3), (2, 1, 1, 3)]
NOISE = (2, 4, 8, 8)
# two layers (d_out, d_in), the first as factors of rank 3, the second as one dense change
LAYERS = {"a": (12, 10), "b": (6, 14)}
# of a loss's value; inputs are already rounded to the dtype
VALUE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# of a gradient, relative to its greatest element: it is stored in the inputs' dtype
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    ``shapes``: every input's shape, standard normal (``positive``: absolute values). ``learned``: the inputs that get a
    gradient; all others must get none. ``loss`` is the function under test and ``plain`` its formula. ``optimum``
    changes inputs so that the loss is zero. ``scaling``: names of inputs, and the power of a common factor that the
    loss grows with. ``refused``: changes of the inputs, each with words of its error.
    """

    covers: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    learned: tuple[str, ...]
    loss: Callable[[Tensors], Tensor]
    plain: Callable[[Tensors], Tensor]
    optimum: Callable[[Tensors], Tensors]
    scaling: tuple[tuple[tuple[str, ...], int], ...]
    refused: tuple[tuple[Callable[[Tensors], Tensors], str], ...]
    positive: tuple[str, ...] = field(default=())

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensors:
        found = {}
        for i, (name, shape) in enumerate(self.shapes.items()):
            x = rand(*shape, seed=i, dtype=torch.float64)
            found[name] = (x.abs() if name in self.positive else x).to(device, dtype)
        return found


def some(given: Tensors, prefix: str) -> list[Tensor]:
    return [x for name, x in given.items() if name.startswith(prefix)]


def names(shapes: Mapping[str, tuple[int, ...]], *prefixes: str) -> tuple[str, ...]:
    return tuple(name for name in shapes if name.startswith(prefixes))


def transposed(name: str) -> Callable[[Tensors], Tensors]:
    return lambda given: given | {name: given[name].transpose(-1, -2)}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda given: {key: x for key, x in given.items() if key != name}


def emptied(*which: str) -> Callable[[Tensors], Tensors]:
    return lambda given: given | {name: given[name][:0] for name in which}


def zeroed(*which: str) -> Callable[[Tensors], Tensors]:
    return lambda given: given | {name: torch.zeros_like(given[name]) for name in which}


# -- attention ----------------------------------------------------------------------------------------------------


def resteering() -> Case:
    shapes = {f"mass.{i}": shape for i, shape in enumerate(MASSES)}
    every = tuple(shapes)
    return Case(
        ("attention_resteering",),
        shapes,
        every,
        lambda t: attention_resteering(some(t, "mass")),
        lambda t: sum((x * x).sum() for x in some(t, "mass")) ** 0.5,
        zeroed(*every),
        ((every, 1),),
        (
            (lambda t: {}, "no site was recorded"),
            (lambda t: t | {"mass.1": t["mass.1"][0]}, r"site 1 have the shape \(8, 4, 3\): expected \(batch, heads"),
            (lambda t: t | {"mass.1": t["mass.1"][:1]}, "same batch and the same tokens"),
            (lambda t: t | {"mass.2": t["mass.2"][..., :2]}, "same batch and the same tokens"),
            # no token of the concept: a loss of zero would be a success
            (lambda t: {name: x[..., :0] for name, x in t.items()}, "at least one of each"),
        ),
        positive=every,
    )


def output_matching(relative: bool) -> Case:
    shapes = {f"{side}.{i}": shape for side in ("output", "target") for i, shape in enumerate(SITES)}

    def plain(t: Tensors) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=t["output.0"].device)
        for a, b in zip(some(t, "output"), some(t, "target"), strict=True):
            error = ((a - b) * (a - b)).sum()
            total = total + error / ((b * b).sum() if relative else a.numel())
        return total / len(SITES)

    return Case(
        ("attention_output_matching",),
        shapes,
        names(shapes, "output"),
        lambda t: attention_output_matching(some(t, "output"), some(t, "target"), relative),
        plain,
        lambda t: t | {f"output.{i}": t[f"target.{i}"].clone() for i in range(len(SITES))},
        # one site alone may be scaled where sites count by their own size
        ((tuple(shapes), 0), (("output.1", "target.1"), 0)) if relative else ((tuple(shapes), 2),),
        (
            (lambda t: {}, "0 outputs and 0 targets"),
            (without("target.2"), "3 outputs and 2 targets"),
            (without("output.0"), "2 outputs and 3 targets"),
            (transposed("target.1"), r"outputs of site 1 cannot be compared: their shape is \(2, 64, 8\) and .*\(2, 8"),
            # would be broadcast
            (lambda t: t | {"target.0": t["target.0"][:1]}, "outputs of site 0 cannot be compared"),
            (emptied("output.0", "target.0"), "not empty"),
        ),
    )


# -- noise predictions ---------------------------------------------------------------------------------------------


def matching(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Case:
    return Case(
        (name,),
        {"predicted": NOISE, "target": NOISE},
        ("predicted",),
        lambda t: function(t["predicted"], t["target"]),
        lambda t: ((t["predicted"] - t["target"]) ** 2).sum() / t["predicted"].numel(),
        lambda t: t | {"predicted": t["target"].clone()},
        ((("predicted", "target"), 2),),
        (
            (lambda t: t | {"target": t["target"][:1]}, r"\(2, 4, 8, 8\) and \(1, 4, 8, 8\) cannot be compared"),
            (lambda t: t | {"predicted": t["predicted"][:, :3]}, "cannot be compared"),
            (lambda t: t | {"target": t["target"].flatten(1)}, "cannot be compared"),
            (emptied("predicted", "target"), "not empty"),
        ),
    )


def contrasted() -> Case:
    eta = 0.7
    return Case(
        ("contrast_target",),
        {"predicted": NOISE, "anchor": NOISE, "opposed": NOISE},
        ("predicted",),
        lambda t: noise_matching(t["predicted"], contrast_target(t["anchor"], t["opposed"], eta)),
        lambda t: (
            (t["predicted"] - (1 + eta) * t["anchor"] + eta * t["opposed"]).square().sum() / t["predicted"].numel()
        ),
        lambda t: t | {"predicted": contrast_target(t["anchor"], t["opposed"], eta)},
        ((("predicted", "anchor", "opposed"), 2),),
        (
            (lambda t: t | {"opposed": t["opposed"][:1]}, r"\(2, 4, 8, 8\) and \(1, 4, 8, 8\) give no target"),
            (lambda t: t | {"predicted": t["predicted"][:1]}, "cannot be compared"),
        ),
    )


# -- weights ------------------------------------------------------------------------------------------------------

_A, _B = LAYERS["a"], LAYERS["b"]
CHANGES = {"up": (_A[0], 3), "down": (3, _A[1]), "dense": _B}


def changes(t: Tensors) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    if "up" in t:
        found["a"] = (t["up"], t["down"])
    if "dense" in t:
        found["b"] = t["dense"]
    return found


def by_layer(t: Tensors, what: str) -> Tensors:
    return {name.rpartition(".")[2]: x for name, x in t.items() if name.startswith(what + ".")}


def product(up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("or,ri->oi", up, down)


def elastic(relative: bool) -> Case:
    shapes = CHANGES | {f"fisher.{name}": shape for name, shape in LAYERS.items()}
    if relative:
        shapes |= {f"weight.{name}": shape for name, shape in LAYERS.items()}

    def loss(t: Tensors) -> Tensor:
        fisher = by_layer(t, "fisher")
        return elastic_penalty(changes(t), relative_fisher(fisher, by_layer(t, "weight")) if relative else fisher)

    def plain(t: Tensors) -> Tensor:
        total = (t["fisher.a"] * product(t["up"], t["down"]) ** 2).sum() + (t["fisher.b"] * t["dense"] ** 2).sum()
        if relative:
            total = total / sum((t[f"fisher.{name}"] * t[f"weight.{name}"] ** 2).sum() for name in LAYERS)
        return total

    fishers = names(shapes, "fisher")
    refused = (
        (without("fisher.b"), "Fisher information and the trained projections must be of the same layers: .* has b"),
        (without("dense"), "must be of the same layers: only one of the two has b"),
        (transposed("fisher.a"), r"of a has the shape \(10, 12\) and the projection \(12, 10\)"),
    )
    return Case(
        ("elastic_penalty", "dense_change", *(("relative_fisher",) if relative else ())),
        shapes,
        tuple(CHANGES),
        loss,
        plain,
        zeroed("up", "dense"),
        (
            (("up", "dense"), 2),
            *([(("up", "dense", *names(shapes, "weight")), 0), (fishers, 0)] if relative else [(fishers, 1)]),
        ),
        (
            # with weights the scale is looked at first
            (
                (without("weight.b"), "must be of the same layers: only one of the two has b"),
                (transposed("weight.a"), r"of a has the shape \(12, 10\) and the projection \(10, 12\)"),
                (zeroed(*fishers), "no scale relative to the weights: Σ F θ² is 0"),
                (lambda t: {}, "no layer to set the Fisher information against"),
            )
            if relative
            else (
                *refused,
                (lambda t: {}, "no layer to set the Fisher information against"),
                (transposed("down"), r"change of a do not fit together: up is \(12, 3\) and down is \(10, 3\)"),
                (lambda t: t | {"dense": t["dense"].flatten()}, r"change of b has the shape \(84,\)"),
            )
        ),
        positive=fishers,
    )


def drift() -> Case:
    shapes = (
        CHANGES
        | {f"weight.{name}": shape for name, shape in LAYERS.items()}
        # earlier requests changed the second layer, and one that is not trained now
        | {"earlier_up": (_B[0], 2), "earlier_down": (2, _B[1]), "other_up": (5, 2), "other_down": (2, 7)}
    )

    def loss(t: Tensors) -> Tensor:
        earlier = {"b": (t["earlier_up"], t["earlier_down"]), "c": (t["other_up"], t["other_down"])} if t else {}
        return drift_from_base(changes(t), by_layer(t, "weight"), earlier)

    def plain(t: Tensors) -> Tensor:
        moved = product(t["up"], t["down"]).square().sum()
        moved = moved + (t["dense"] + product(t["earlier_up"], t["earlier_down"])).square().sum()
        return moved / sum(t[f"weight.{name}"].square().sum() for name in LAYERS)

    scaled = ("up", "dense", "earlier_up")
    return Case(
        ("drift_from_base", "dense_change"),
        shapes,
        tuple(CHANGES),
        loss,
        plain,
        zeroed("up", "dense", "earlier_up"),
        ((scaled, 2), ((*scaled, "weight.a", "weight.b"), 0)),
        (
            (lambda t: {}, "no layer to set the base weight against"),
            (without("weight.b"), "base weight and the trained projections must be of the same layers: .* has b"),
            (transposed("weight.a"), r"of a has the shape \(10, 12\) and the projection \(12, 10\)"),
            (transposed("earlier_down"), r"left at b do not fit: up is \(6, 2\) and down is \(14, 2\)"),
            (transposed("earlier_up"), "left at b do not fit"),
            (lambda t: t | {"earlier_down": t["earlier_down"][:, :3]}, r"left at b .* the projection is \(6, 14\)"),
            (transposed("up"), "change of a do not fit together"),
            (zeroed("weight.a", "weight.b"), "base weights are all zero"),
        ),
    )


CASES = {
    "resteering": resteering(),
    "outputs": output_matching(False),
    "outputs, relative": output_matching(True),
    "noise": matching("noise_matching", noise_matching),
    "surrogate": matching("surrogate_matching", surrogate_matching),
    "replay": matching("replay_matching", replay_matching),
    "prior": matching("prior_preservation", prior_preservation),
    "contrast": contrasted(),
    "elastic": elastic(False),
    "elastic, relative": elastic(True),
    "drift": drift(),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
every_dtype = pytest.mark.parametrize("dtype", list(VALUE), ids=str)


def test_every_public_function_is_in_the_matrix():
    assert {name for case in CASES.values() for name in case.covers} == set(losses.__all__) - {"Change", "Factors"}


@every_dtype
@every_loss
def test_value_and_gradient_are_those_of_the_formula(case, dtype, device):
    given = case.tensors(dtype, device)
    before = {name: x.clone() for name, x in given.items()}
    for x in given.values():
        x.requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    loss, wanted = case.loss(given), case.plain(exact)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=VALUE[dtype], atol=0)
    (0.5 * loss).backward()
    (0.5 * wanted).backward()
    for name, x in given.items():
        torch.testing.assert_close(x.detach(), before[name], rtol=0, atol=0)
        if name not in case.learned:
            assert x.grad is None, f"a gradient goes to {name}"
            continue
        assert x.grad.dtype == dtype
        size = float(exact[name].grad.abs().max())
        torch.testing.assert_close(
            x.grad.double(),
            exact[name].grad,
            rtol=0,
            atol=GRADIENT[dtype] * size,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )


@every_loss
def test_gradients_are_those_of_finite_differences(case, device):
    given = case.tensors(device=device)
    learned = [given[name].requires_grad_() for name in case.learned]

    def loss(*values: Tensor) -> Tensor:
        return case.loss(given | dict(zip(case.learned, values, strict=True)))

    assert loss(*learned).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, learned)


@every_dtype
@every_loss
def test_the_optimum_is_zero_with_a_finite_gradient(case, dtype, device):
    given = case.optimum(case.tensors(dtype, device))
    for name in case.learned:
        given[name] = given[name].detach().requires_grad_()
    loss = case.loss(given)
    assert loss.item() == 0
    loss.backward()
    for name in case.learned:
        assert given[name].grad is not None and not given[name].grad.any(), name
    # and elsewhere it is above
    assert case.loss(case.tensors(dtype, device)).item() > 0


@every_loss
def test_losses_scale_as_they_claim(case):
    given = case.tensors()
    loss = float(case.loss(given))
    for which, power in case.scaling:
        for factor in (1e-2, 30.0):
            scaled = given | {name: factor * given[name] for name in which}
            assert float(case.loss(scaled)) == pytest.approx(factor**power * loss, rel=1e-9), (which, power)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [(case, change, words) for case in CASES.values() for change, words in case.refused],
    ids=[f"{name}-{i}" for name, case in CASES.items() for i in range(len(case.refused))],
)
def test_inputs_that_do_not_fit_are_refused_in_words(case, change, words):
    with pytest.raises(ForgetConceptError, match=words):
        case.loss(change(case.tensors()))


# -- what a matrix does not say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_too_long_for_half_precision_is_exact(dtype, device):
    """65,536 equal parts: added up in half precision, a sum stops growing (bf16 at 256) or overflows (fp16)."""
    ones = torch.ones(256, 256, dtype=dtype, device=device)
    assert float(elastic_penalty({"a": 2 * ones}, {"a": ones})) == 4 * 2**16
    assert float(drift_from_base({"a": 2 * ones}, {"a": ones})) == 4
    assert float(attention_resteering([ones.view(1, 1, -1, 4)])) == 256
    assert float(noise_matching(300 * ones, 0 * ones)) == 300.0**2
    assert float(attention_output_matching([300 * ones], [0 * ones])) == 300.0**2


def test_at_no_mass_the_gradient_is_zero_beside_a_site_that_has_some(device):
    nothing = torch.zeros(1, 2, 3, 1, device=device, requires_grad=True)
    something = torch.ones(1, 2, 3, 1, device=device, requires_grad=True)
    attention_resteering([nothing, something]).backward()
    assert not nothing.grad.any()
    torch.testing.assert_close(something.grad, something.detach() / 6**0.5)


def test_a_change_is_worth_the_same_as_factors_and_as_a_matrix():
    t = CASES["drift"].tensors()
    both = {"a": (t["up"], t["down"])}, {"a": dense_change((t["up"], t["down"]))}
    fisher, weights = {"a": t["weight.a"].abs()}, {"a": t["weight.a"]}
    earlier = {"a": (t["up"] - 1, t["down"])}
    for loss in (lambda c: elastic_penalty(c, fisher), lambda c: drift_from_base(c, weights, earlier)):
        assert float(loss(both[0])) == pytest.approx(float(loss(both[1])), rel=1e-12)


def test_relative_fisher_makes_a_change_as_large_as_the_weights_one():
    t = CASES["elastic, relative"].tensors()
    weights = by_layer(t, "weight")
    fisher = relative_fisher(by_layer(t, "fisher"), weights)
    assert float(elastic_penalty(weights, fisher)) == pytest.approx(1, rel=1e-12)


def test_a_site_without_output_does_not_divide_by_zero():
    nothing, something = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert float(attention_output_matching([nothing, something], [nothing, 2 * something], relative=True)) == 0.125


def test_without_contrast_the_target_is_the_anchors():
    anchor, opposed = rand(*NOISE), rand(*NOISE, seed=1)
    assert torch.equal(contrast_target(anchor, opposed, 0.0), anchor)
    # the negatively guided target: the anchor is the empty prompt, the opposed one the concept
    torch.testing.assert_close(contrast_target(anchor, opposed, 2.0), anchor - 2 * (opposed - anchor))
