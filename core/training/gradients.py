"""Combining the gradients of forgetting and retaining into one step.

:func:`restricted_gradient` removes from each gradient the component that conflicts with the other (arXiv 2412.07808).
:func:`project_step` projects the optimizer's actual update, since momentum, weight decay and Adam's scaling undo what
holds for the gradient. :func:`null_space_projection` prevents a change from acting on given input directions, and
:func:`retain_basis` finds those of the retain set (arXiv 2103.09762, 2511.07970).
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

# one per parameter, on any devices; None where the loss does not depend on it, which counts as zero
Gradients = Sequence[Tensor | None]

CHUNK = 1 << 20  # elements converted to fp64 at a time
MARGIN = 0.3  # of a projected step; measured in benchmarks/gradients.py
PARALLEL = 1e-13  # sin² of an angle that fp64 sums of products cannot tell from 0 (sin 3e-7: fp32's precision)


class NoFreeDirection(ForgetConceptError):
    """The states to preserve span the whole input space, so every change would affect them."""


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
        """Cosine of the angle between the two; 0 if one of them is zero."""
        norms = math.sqrt(self.forget) * math.sqrt(self.retain)
        return max(-1.0, min(1.0, self.cross / norms)) if norms else 0.0

    @property
    def parallel(self) -> bool:
        """Whether both are parallel or opposite, to fp64 precision."""
        return 1 - self.cosine**2 <= PARALLEL


@dataclass(frozen=True)
class ProjectedStep:
    """``step`` = ``u + forget_multiplier · g_f + retain_multiplier · g_r``.

    A constraint is active if its multiplier is above 0. If none is, ``step`` holds the input tensors themselves.
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
    """Inner products of two gradients, accumulated in fp64 with one transfer per device.

    Raises:
        ForgetConceptError: The two have different parameters, or are not finite.
    """
    gram = _gram(forget, retain)
    return InnerProducts(gram[0][0], gram[1][1], gram[0][1])


def restricted_gradient(forget: Gradients, retain: Gradients, alpha: float = 1.0) -> list[Tensor | None]:
    """The restricted gradient, with all parameters taken as one vector.

    ``g = (g_f − s/‖g_r‖² g_r) + α (g_r − s/‖g_f‖² g_f)`` if ``s = g_f·g_r < 0``, else ``g = g_f + α g_r``. For any
    ``α ≥ 0`` both ``g·g_f ≥ 0`` and ``g·g_r ≥ 0``: to first order neither loss rises along ``−g``.

    Opposite gradients give exactly zero; an adaptive optimizer would scale a rounding error up to a whole step.

    Args:
        forget: Gradients of the loss that makes the model forget, one per parameter.
        retain: Gradients of the loss that makes it retain. A side that is zero leaves the other unchanged.
        alpha: Weight ``α`` of the retain side; 1.6 in the authors' released training script.

    Returns:
        One gradient per parameter, in the dtype of ``forget``; ``None`` where neither loss depends on it.

    Raises:
        ForgetConceptError: The two have different parameters or are not finite, or ``alpha`` is negative.

    Reference:
        Restricted gradient for diversity unlearning, arXiv 2412.07808.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ForgetConceptError(f"The weight 'alpha' of the retain side must be at least 0, not {alpha:g}.")
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
    """The nearest step along which both losses fall to first order; with ``margin=0`` neither rises.

    Of all ``u'`` with ``g_f·u' ≥ m ‖g_f‖`` and ``g_r·u' ≥ m ‖g_r‖`` this is the one with the least ``‖u' − u‖``:
    ``u' = u + λ_f g_f + λ_r g_r``, ``λ ≥ 0``. The 2×2 Gram matrix determines which constraints are active, exactly and
    without iteration. (Two projections in turn may violate the first constraint again.) A step that satisfies both is
    returned bit-exactly; any other satisfies them to the rounding of its dtype. Zero gradients constrain nothing; with
    opposite gradients the component of ``u`` orthogonal to them remains.

    ``m = margin · ‖u‖ · cos(φ/2)``, where ``φ`` is the angle between the gradients: the share ``margin`` of the
    steepest descent that both losses can have at once in a step of this length. Without a margin, a loss whose
    constraint is active has no first-order descent, and its curvature raises it; a large margin overshoots. ``u'`` is
    never longer than ``‖u‖ √(1 + margin²)``.

    Args:
        step: ``u`` of ``θ ← θ − u``, one tensor per parameter, with momentum, weight decay and learning rate applied.
        forget: Gradients of the loss that makes the model forget.
        retain: Gradients of the loss that makes it retain.
        margin: Share of the steepest joint descent, from 0 to 1.

    Returns:
        The projected step and the multipliers ``λ``.

    Raises:
        ForgetConceptError: The three have different parameters or are not finite, or ``margin`` is out of range.
    """
    if not 0 <= margin <= 1:
        raise ForgetConceptError(f"The 'margin' of a projected step must be from 0 to 1, not {margin:g}.")
    gram = _gram(step, forget, retain)
    products = InnerProducts(gram[1][1], gram[2][2], gram[1][2])
    norm_f, norm_r, rho = math.sqrt(products.forget), math.sqrt(products.retain), products.cosine
    required = margin * math.sqrt(gram[0][0])
    if norm_f and norm_r:
        required *= math.sqrt((1 + rho) / 2)
    # for gradients of norm 1: the descent of u beyond the required one; a zero gradient requires nothing
    f = gram[0][1] / norm_f - required if norm_f else 0.0
    r = gram[0][2] / norm_r - required if norm_r else 0.0
    if f >= 0 and r >= 0:
        return ProjectedStep(list(step), 0.0, 0.0)
    add_f = add_r = 0.0
    if products.parallel:
        # both constrain one direction: satisfying the more violated one satisfies both
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
    """Null-space projection ``x − (x B) Bᵀ``: the result maps every input in the span of ``B`` to zero; differentiable.

    Projecting the change itself is valid under any optimizer. CUIG projects the gradient of K and V, which is valid
    only under plain gradient descent *(reading)*.

    Args:
        x: ``(..., d_in)``: a delta ``(d_out, d_in)``, or the ``down`` ``(r, d_in)`` of a LoRA.
        basis: ``B``, ``(d_in, n)`` with orthonormal columns (:func:`retain_basis`).

    Returns:
        A tensor of the shape of ``x``.

    Raises:
        ForgetConceptError: The shapes do not fit.

    Reference:
        CUIG, arXiv 2511.07970.
    """
    if basis.ndim != 2 or not x.ndim or x.shape[-1] != basis.shape[0]:
        raise ForgetConceptError(
            f"A basis of shape {tuple(basis.shape)} does not fit a change of shape {tuple(x.shape)}: expected "
            "(d_in, n) and (..., d_in)."
        )
    basis = basis.to(x.device, x.dtype)
    return x - (x @ basis) @ basis.T


def retain_basis(states: Tensor, energy: float = 0.99, max_rank: int | None = None) -> Tensor:
    """The leading directions of the states to preserve, strongest first.

    The states are not centred. The rank ``r`` is the least for which the projections hold ``energy`` of ``Σ ‖row‖²``,
    at most ``max_rank``, and at most the numerical rank in fp64.

    Args:
        states: ``(n, d)``, one layer input per row: text states for K and V. Duplicates weigh more, so pass each once.
        energy: Share of the states' energy to preserve, in (0, 1]; 1, as in CUIG, takes their whole span.
        max_rank: Maximum number of directions; ``None``: no limit.

    Returns:
        ``(d, r)`` with orthonormal columns, on the states' device, in their dtype but at least fp32.

    Raises:
        ForgetConceptError: The states are not a matrix, all zero or not finite, or ``energy`` or ``max_rank`` is out of
            range.
        NoFreeDirection: The directions span the whole space.

    Reference:
        Gradient Projection Memory, arXiv 2103.09762 *(reading)*; CUIG, arXiv 2511.07970.
    """
    if states.ndim != 2 or not states.numel():
        raise ForgetConceptError(
            f"The states to preserve must be a matrix (n, d) that is not empty, not of shape {tuple(states.shape)}."
        )
    if not 0 < energy <= 1:
        raise ForgetConceptError(f"The share 'energy' must be above 0 and at most 1, not {energy:g}.")
    if max_rank is not None and max_rank < 1:
        raise ForgetConceptError(f"'max_rank' must be at least 1, not {max_rank}.")
    wide = _fp64(states.detach())
    if not bool(torch.isfinite(wide).all()) or not bool(wide.any()):
        raise ForgetConceptError("The states to preserve are all zero or not finite: run the text encoder in fp32.")
    n, d = wide.shape
    if n > d:  # R of the QR decomposition has the same singular values and directions
        wide = torch.linalg.qr(wide, mode="r").R
    _, strengths, directions = torch.linalg.svd(wide, full_matrices=False)
    strengths = strengths / strengths[0]
    share = torch.cumsum(strengths**2, 0)
    rank = int((share < energy * share[-1]).sum()) + 1
    rank = min(rank, int((strengths > max(n, d) * torch.finfo(torch.float64).eps).sum()), max_rank or d)
    if rank == d:
        raise NoFreeDirection(
            f"The states to preserve span all {d} directions of the input, so nothing could be changed: use a lower "
            "'energy' or a 'max_rank'."
        )
    dtype = torch.promote_types(states.dtype, torch.float32)
    basis: Tensor = directions[:rank].T.contiguous().to(states.device, dtype)
    return basis


def _fp64(x: Tensor) -> Tensor:
    # not every accelerator supports fp64; the CPU and CUDA do
    return x.to(x.device if x.is_cuda else "cpu", torch.float64)


def _gram(*vectors: Gradients) -> list[list[float]]:
    """The Gram matrix of some lists of tensors, each list taken as one vector."""
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
        raise ForgetConceptError(
            "A gradient or a step is not finite, so it cannot be combined with another: use a lower learning rate, or "
            "run the model in full precision."
        )
    result: list[list[float]] = found.tolist()
    return result


def _sum(forget: Tensor | None, retain: Tensor | None, alpha: float) -> Tensor | None:
    if forget is None or retain is None:
        # a copy, because clipping changes the result in place
        return retain * alpha if retain is not None else None if forget is None else forget.clone()
    return torch.add(forget, retain, alpha=alpha).to(forget.dtype)


def _combined(*terms: tuple[Tensor | None, float]) -> Tensor | None:
    """``Σ weight · tensor``, computed in fp64 and rounded once, so that opposite vectors cancel cleanly."""
    known = [(x.detach(), weight) for x, weight in terms if x is not None]
    if not known:
        return None
    total = _fp64(known[0][0]) * known[0][1]
    for x, weight in known[1:]:
        if weight:
            total.add_(_fp64(x), alpha=weight)
    return total.to(known[0][0].device, known[0][0].dtype)
