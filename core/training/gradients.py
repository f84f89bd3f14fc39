"""How the gradients of forgetting and of keeping become one step.

:func:`restricted_gradient` takes out of each gradient what works against the other (arXiv 2412.07808).
:func:`project_step` does so to the step an optimiser is about to take, since momentum, weight decay and Adam's scaling
undo what holds for the gradient. :func:`null_space_projection` keeps a change from acting on chosen input directions at
all, and :func:`retain_basis` finds those of what is to be kept (arXiv 2103.09762, 2511.07970).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForgetConceptError

__all__ = [
    "Gradients",
    "InnerProducts",
    "NoFreeDirection",
    "ProjectedStep",
    "inner_products",
    "null_space_projection",
    "project_step",
    "restricted_gradient",
    "retain_basis",
]

# one a parameter, on any devices; None where a loss does not depend on it, which counts as zero
Gradients = Sequence[Tensor | None]

CHUNK = 1 << 20  # elements widened to fp64 at a time
MARGIN = 0.3  # of a projected step; measured in benchmarks/gradients.py
PARALLEL = 1e-13  # sin² of an angle that fp64 sums of products cannot tell from 0 (sin 3e-7: fp32's precision)


class NoFreeDirection(ForgetConceptError):
    """The states to keep fill the whole input space, so that no change is left that they would not see."""


@dataclass(frozen=True)
class InnerProducts:
    """``forget`` = ``‖g_f‖²``, ``retain`` = ``‖g_r‖²`` and ``cross`` = ``g_f·g_r``, over all parameters."""

    forget: float
    retain: float
    cross: float

    @property
    def conflict(self) -> bool:
        """Whether a small step down one gradient raises the other's loss."""
        return self.cross < 0

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 0 where one of them is zero."""
        norms = math.sqrt(self.forget) * math.sqrt(self.retain)
        return max(-1.0, min(1.0, self.cross / norms)) if norms else 0.0

    @property
    def parallel(self) -> bool:
        """Whether both lie on one line, in the same or in opposite directions, as far as fp64 can tell."""
        return 1 - self.cosine**2 <= PARALLEL


@dataclass(frozen=True)
class ProjectedStep:
    """``step`` = ``u + forget_multiplier · g_f + retain_multiplier · g_r``; above 0, its constraint is active.

    With both at 0, ``step`` holds the very tensors that were given.
    """

    step: list[Tensor]
    forget_multiplier: float
    retain_multiplier: float

    @property
    def forget_active(self) -> bool:
        return self.forget_multiplier > 0

    @property
    def retain_active(self) -> bool:
        return self.retain_multiplier > 0


def inner_products(forget: Gradients, retain: Gradients) -> InnerProducts:
    """The three numbers the rules need, accumulated in fp64 and fetched from the devices at once.

    Raises :class:`ForgetConceptError` where the two are not of the same parameters or are not finite.
    """
    gram = _gram(forget, retain)
    return InnerProducts(gram[0][0], gram[1][1], gram[0][1])


def restricted_gradient(forget: Gradients, retain: Gradients, alpha: float = 1.0) -> list[Tensor | None]:
    """The restricted gradient of arXiv 2412.07808, all parameters taken as one vector.

    ``g = (g_f − s/‖g_r‖² g_r) + α (g_r − s/‖g_f‖² g_f)`` where ``s = g_f·g_r < 0``, else ``g = g_f + α g_r``. For any
    ``α ≥ 0`` both ``g·g_f ≥ 0`` and ``g·g_r ≥ 0``: to first order neither loss rises along ``−g``. ``α`` weighs what
    is kept, as in the authors' released training script (1.6 there).

    ``forget`` and ``retain`` are the gradients of two losses that shall both fall. A side that is zero leaves the other
    as it is (times its weight). Where they are opposite the result is exactly zero, and not the rounding which an
    adaptive optimiser would blow up to a whole step. A parameter on which neither loss depends gets ``None``; the
    others get the dtype of ``forget``. Raises :class:`ForgetConceptError` where the two are not of the same
    parameters or are not finite, and for a negative weight.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ForgetConceptError(f"The weight 'alpha' of what is kept must be at least 0, and it is {alpha:g}.")
    products = inner_products(forget, retain)
    if not products.conflict or 0 in (products.forget, products.retain):
        return [_sum(f, r, alpha) for f, r in zip(forget, retain, strict=True)]
    if products.parallel:
        found = [f if f is not None else r for f, r in zip(forget, retain, strict=True)]
        return [None if g is None else torch.zeros_like(g) for g in found]
    of_forget = 1 - alpha * products.cross / products.forget
    of_retain = alpha - products.cross / products.retain
    return [_combined((f, of_forget), (r, of_retain)) for f, r in zip(forget, retain, strict=True)]


def project_step(step: Sequence[Tensor], forget: Gradients, retain: Gradients, margin: float = MARGIN) -> ProjectedStep:
    """The nearest step along which, to first order, both losses fall; with ``margin=0`` neither rises.

    ``step`` is ``u`` of ``θ ← θ − u``, with momentum, weight decay and the learning rate in it. Of all ``u'`` with
    ``g_f·u' ≥ m ‖g_f‖`` and ``g_r·u' ≥ m ‖g_r‖`` this is the one of least ``‖u' − u‖``: ``u' = u + λ_f g_f + λ_r g_r``,
    ``λ ≥ 0``. None, one or both of the constraints are active, and the 2×2 Gram matrix tells which: exact, without
    iteration. (One projection after the other may violate the first constraint again.) A step that meets both comes
    back bit for bit; any other meets them to the rounding of its dtype. Zero gradients constrain nothing; opposite ones
    leave of ``u`` what is orthogonal to them.

    ``m = margin · ‖u‖ · cos(φ/2)``, where ``φ`` is the angle between the gradients: the share ``margin`` of the
    steepest descent that both losses can have at once in a step of this length. Without one, nothing of first order is
    left of a loss whose constraint is active, and its curvature raises it; a wide one overshoots. ``u'`` is never
    longer than ``‖u‖ √(1 + margin²)``.

    Raises :class:`ForgetConceptError` where the three are not of the same parameters or are not finite, and for a
    margin outside [0, 1].
    """
    if not 0 <= margin <= 1:
        raise ForgetConceptError(f"The 'margin' of a projected step must be from 0 to 1, and it is {margin:g}.")
    gram = _gram(step, forget, retain)
    products = InnerProducts(gram[1][1], gram[2][2], gram[1][2])
    norm_f, norm_r, rho = math.sqrt(products.forget), math.sqrt(products.retain), products.cosine
    wanted = margin * math.sqrt(gram[0][0])
    if norm_f and norm_r:
        wanted *= math.sqrt((1 + rho) / 2)
    # against gradients of norm 1: what u descends on each beyond what is wanted; a zero gradient wants nothing
    f = gram[0][1] / norm_f - wanted if norm_f else 0.0
    r = gram[0][2] / norm_r - wanted if norm_r else 0.0
    if f >= 0 and r >= 0:
        return ProjectedStep(list(step), 0.0, 0.0)
    add_f = add_r = 0.0
    if products.parallel:
        # one line: what lacks most on it is added, and that is enough for both
        add_f, add_r = (-f, 0.0) if f <= r else (0.0, -r)
    elif f < 0 and r - rho * f >= 0:
        add_f = -f
    elif r < 0 and f - rho * r >= 0:
        add_r = -r
    else:
        add_f, add_r = (rho * r - f) / (1 - rho * rho), (rho * f - r) / (1 - rho * rho)
    of_forget, of_retain = add_f / norm_f if add_f else 0.0, add_r / norm_r if add_r else 0.0
    moved = []
    for u, g_f, g_r in zip(step, forget, retain, strict=True):
        found = _combined((u, 1.0), (g_f, of_forget), (g_r, of_retain))
        assert found is not None  # a step has a tensor for every parameter
        moved.append(found)
    return ProjectedStep(moved, of_forget, of_retain)


def null_space_projection(x: Tensor, basis: Tensor) -> Tensor:
    """``x − (x B) Bᵀ``: a change that no input in the span of ``B`` can feel; differentiable.

    ``x`` is ``(..., d_in)``, a delta ``(d_out, d_in)`` or a LoRA's ``down`` ``(r, d_in)``; ``basis`` is ``(d_in, n)``
    with orthonormal columns (:func:`retain_basis`). To project the change itself holds under any optimiser; projecting
    its gradient, as arXiv 2511.07970 (CUIG) does for K and V, holds under plain descent only *(reading)*. Raises
    :class:`ForgetConceptError` where the shapes do not fit.
    """
    if basis.ndim != 2 or not x.ndim or x.shape[-1] != basis.shape[0]:
        raise ForgetConceptError(
            f"A basis of shape {tuple(basis.shape)} is not one of the inputs of a change of shape {tuple(x.shape)}."
        )
    basis = basis.to(x.device, x.dtype)
    return x - (x @ basis) @ basis.T


def retain_basis(states: Tensor, energy: float = 0.99, max_rank: int | None = None) -> Tensor:
    """The leading directions of the states to keep, ``(d, r)`` with orthonormal columns, strongest first.

    ``states`` is ``(n, d)``, one input a row (text states for K and V; each once, or its direction weighs more). ``r``
    is the least for which the projections hold ``energy`` of ``Σ ‖row‖²``, not above ``max_rank``, nor above what
    fp64 tells from zero; the states are not centred. Gradient Projection Memory's rule (arXiv 2103.09762;
    *reading*); CUIG (arXiv 2511.07970) takes the whole span of its states instead, which is ``energy=1``. Worked out
    in fp64; the result has the states' device and dtype, fp32 at least.

    Raises :class:`ForgetConceptError` for states that are none, all zero or not finite, an ``energy`` outside (0, 1],
    a ``max_rank`` below 1; and :class:`NoFreeDirection` where the directions would fill the whole space.
    """
    if states.ndim != 2 or not states.numel():
        raise ForgetConceptError(
            f"The states to keep must be a table (n, d), and their shape is {tuple(states.shape)}."
        )
    if not 0 < energy <= 1:
        raise ForgetConceptError(f"The share 'energy' of the states to keep must be above 0 and at most 1: {energy:g}.")
    if max_rank is not None and max_rank < 1:
        raise ForgetConceptError(f"At least one direction must be kept: 'max_rank' is {max_rank}.")
    wide = _fp64(states.detach())
    if not bool(torch.isfinite(wide).all()) or not bool(wide.any()):
        raise ForgetConceptError("The states to keep are all zero or not finite: there is no direction to keep.")
    n, d = wide.shape
    if n > d:  # the same directions and strengths from a square
        wide = torch.linalg.qr(wide, mode="r").R
    _, strengths, directions = torch.linalg.svd(wide, full_matrices=False)
    strengths = strengths / strengths[0]
    share = torch.cumsum(strengths**2, 0)
    rank = int((share < energy * share[-1]).sum()) + 1
    rank = min(rank, int((strengths > max(n, d) * torch.finfo(torch.float64).eps).sum()), max_rank or d)
    if rank == d:
        raise NoFreeDirection(
            f"What is to be kept fills all {d} directions of the input, so that nothing could be changed: use a lower "
            "'energy' or a 'max_rank'."
        )
    dtype = torch.promote_types(states.dtype, torch.float32)
    basis: Tensor = directions[:rank].T.contiguous().to(states.device, dtype)
    return basis


def _fp64(x: Tensor) -> Tensor:
    # fp64 lives on the CPU and on CUDA, not on every accelerator
    return x.to(x.device if x.is_cuda else "cpu", torch.float64)


def _gram(*vectors: Gradients) -> list[list[float]]:
    """All inner products of some lists of tensors, each list taken as one vector."""
    k = len(vectors)
    if len({len(vector) for vector in vectors}) > 1:
        counts = ", ".join(str(len(vector)) for vector in vectors)
        raise ForgetConceptError(f"Gradients of different numbers of parameters cannot be combined: {counts}.")
    sums: dict[torch.device, Tensor] = {}
    for i, tensors in enumerate(zip(*vectors, strict=True)):
        known = [(j, x.detach()) for j, x in enumerate(tensors) if x is not None]
        if len({(x.shape, x.device) for _, x in known}) > 1:
            shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for _, x in known)
            raise ForgetConceptError(f"Gradients of different parameters cannot be combined: number {i} is {shapes}.")
        if not known:
            continue
        flat = [(j, x.reshape(-1)) for j, x in known]
        for start in range(0, flat[0][1].numel(), CHUNK):
            rows = torch.stack([_fp64(x[start : start + CHUNK]) for _, x in flat])
            place = [j for j, _ in flat]
            total = sums.setdefault(rows.device, torch.zeros(k, k, dtype=torch.float64, device=rows.device))
            part = rows @ rows.T
            if len(place) == k:
                total += part
            else:
                for a, row in enumerate(place):
                    for b, column in enumerate(place):
                        total[row, column] += part[a, b]
    found = torch.zeros(k, k, dtype=torch.float64)
    for total in sums.values():
        found += total.cpu()
    if not bool(torch.isfinite(found).all()):
        raise ForgetConceptError("A gradient or a step is not finite, so that it cannot be combined with another.")
    result: list[list[float]] = found.tolist()
    return result


def _sum(forget: Tensor | None, retain: Tensor | None, alpha: float) -> Tensor | None:
    if forget is None or retain is None:
        # a copy: what is done to the result in place (clipping) must not reach what it was made of
        return retain * alpha if retain is not None else None if forget is None else forget.clone()
    return torch.add(forget, retain, alpha=alpha).to(forget.dtype)


def _combined(*terms: tuple[Tensor | None, float]) -> Tensor | None:
    """``Σ weight · tensor``, in fp64 and rounded once: what is left of opposite vectors is no cancellation error."""
    known = [(x.detach(), weight) for x, weight in terms if x is not None]
    if not known:
        return None
    total = _fp64(known[0][0]) * known[0][1]
    for x, weight in known[1:]:
        if weight:
            total.add_(_fp64(x), alpha=weight)
    return total.to(known[0][0].device, known[0][0].dtype)
