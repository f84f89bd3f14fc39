"""The published terms of the trained methods, as pure functions of tensors.

Nothing here knows a model, an adapter or a prompt: a method computes the tensors and weighs the terms. Half-precision
tensors are converted to float32 before any arithmetic, so that sums are accumulated in float32; float64 stays float64.
Every loss is a scalar that is 0 at its optimum. No gradient goes to targets, frozen weights or Fisher information.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ForgetConceptError, listed

__all__ = [
    "Change",
    "Factors",
    "attention_output_matching",
    "attention_resteering",
    "contrast_target",
    "dense_change",
    "drift_from_base",
    "elastic_penalty",
    "noise_matching",
    "prior_preservation",
    "relative_fisher",
    "replay_matching",
    "surrogate_matching",
]

# a change of one weight matrix (d_out, d_in): `up` (d_out, r) and `down` (r, d_in), or the matrix itself
Factors = tuple[Tensor, Tensor]
Change = Tensor | Factors


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Scalars that may lie on several devices, ``(n,)`` on the first one's."""
    return torch.stack([part.to(parts[0].device) for part in parts])


# -- attention ----------------------------------------------------------------------------------------------------


def attention_resteering(masses: Sequence[Tensor]) -> Tensor:
    """Forget-Me-Not's attention re-steering, ``‖concat_l A_l[..., S]‖₂``: one un-squared norm over all sites.

    Its gradient is ``A / ‖A‖``, and zero where there is no mass at all.

    Args:
        masses: For each cross-attention site ``l`` its attention on the concept's tokens ``S``,
            ``(batch, heads, pixels_l, tokens)``, any float dtype. Heads and pixels may differ between sites.

    Returns:
        The norm, a scalar, float32 (float64 for float64 masses).

    Raises:
        ForgetConceptError: If there is no site, or a site's masses are empty, not 4-dimensional, or of another batch or
            another number of tokens than the first site's.

    Reference:
        Zhang et al., Forget-Me-Not, arXiv 2303.17591, §3 (attention re-steering).
    """
    if not masses:
        raise ForgetConceptError("There is no attention to re-steer: no site was recorded.")
    for site, mass in enumerate(masses):
        if mass.ndim != 4 or not mass.numel():
            raise ForgetConceptError(
                f"The attention masses of site {site} have the shape {_shape(mass)}: expected (batch, heads, pixels, "
                "tokens) with at least one of each."
            )
        if (mass.shape[0], mass.shape[3]) != (masses[0].shape[0], masses[0].shape[3]):
            raise ForgetConceptError(
                f"The attention masses of site {site} have the shape {_shape(mass)} and those of site 0 "
                f"{_shape(masses[0])}: all sites must have the same batch and the same tokens."
            )
    norms = [torch.linalg.vector_norm(_wide(mass)) for mass in masses]
    norm: Tensor = torch.linalg.vector_norm(_stacked(norms))
    return norm


def attention_output_matching(outputs: Sequence[Tensor], targets: Sequence[Tensor], relative: bool = False) -> Tensor:
    """DUGE's unlearning loss ``L_U = mean_l mean (A_l^θ − A_l^{φ_n})²``: each site is pulled to the frozen model's.

    ``A_l`` is the site's output, or its attention map *(reading: the paper leaves it open)*.

    Args:
        outputs: For each cross-attention site what the trained model computes under the target prompt,
            ``(batch, pixels_l, width_l)`` for outputs or ``(batch, heads, pixels_l, tokens)`` for maps, any float
            dtype.
        targets: What the frozen model computes under the anchor prompt (published: the empty one), in the same order
            and of the same shapes; detached.
        relative: Divide each site's error by ``mean A_l^{φ_n}²`` (at least 1e-12), so that a site counts the same
            whatever the size of its outputs. The loss then stays when outputs and targets of a site are scaled alike.

    Returns:
        The mean over the sites, a scalar, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If there are no sites, or the two differ in number or in shape, or a site is empty.

    Reference:
        Thakral et al., DUGE, arXiv 2503.13769, the cross-attention loss ``L_U``.
    """
    if not outputs or len(outputs) != len(targets):
        raise ForgetConceptError(
            f"The sites' outputs cannot be compared: there are {len(outputs)} outputs and {len(targets)} targets, and "
            "one of each is needed for every site."
        )
    found = []
    for site, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        if output.shape != target.shape or not output.numel():
            raise ForgetConceptError(
                f"The outputs of site {site} cannot be compared: their shape is {_shape(output)} and that of their "
                f"targets {_shape(target)}; both must be equal and not empty."
            )
        a, b = _wide(output), _wide(target.detach())
        error = torch.mean((a - b) ** 2)
        found.append(error / torch.mean(b**2).clamp(min=1e-12) if relative else error)
    return _stacked(found).mean()


# -- noise predictions ---------------------------------------------------------------------------------------------


def noise_matching(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of a noise prediction, ``mean (ε_θ(x_t, t, c) − ε*)²``.

    With a frozen model's prediction as ``ε*`` it is distillation: under the same prompt it preserves (the second part
    of DUGE's ``L_reg``), under an anchor prompt it replaces one concept by another (Concept Ablation), and with
    :func:`contrast_target` it is ESD's loss. The three terms below have a sample's own noise as ``ε*``.

    Args:
        predicted: ``ε_θ(x_t, t, c)`` as a UNet returns it, ``(batch, channels, height, width)``, any float dtype.
        target: ``ε*``, of the same shape; detached.

    Returns:
        The mean over all elements, a scalar, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If the shapes differ (nothing is broadcast) or the tensors are empty.

    Reference:
        Kumari et al., Concept Ablation, arXiv 2303.13516, the model-based objective. Ho et al., DDPM, arXiv 2006.11239,
        equation 14 (with the true noise).
    """
    if predicted.shape != target.shape or not predicted.numel():
        raise ForgetConceptError(
            f"Noise of the shapes {_shape(predicted)} and {_shape(target)} cannot be compared: both must be equal and "
            "not empty."
        )
    return torch.mean((_wide(predicted) - _wide(target.detach())) ** 2)


def surrogate_matching(predicted: Tensor, noise: Tensor) -> Tensor:
    """Selective Amnesia's forgetting term, ``E_{q(x|c_f)} ‖ε − ε_θ(x_t, t, c_f)‖²``, as a mean over elements.

    The concept's prompt ``c_f`` is taught samples of the surrogate distribution ``q`` that the user chose.

    Args:
        predicted: ``ε_θ(x_t, t, c_f)`` for noised samples of ``q``, ``(batch, channels, height, width)``, any float
            dtype.
        noise: ``ε``, the noise in ``x_t``, of the same shape; detached.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If the shapes differ or the tensors are empty.

    Reference:
        Heng & Soh, Selective Amnesia, arXiv 2305.10120, equation 8, first term, its likelihood bounded by the denoising
        loss.
    """
    return noise_matching(predicted, noise)


def replay_matching(predicted: Tensor, noise: Tensor) -> Tensor:
    """Selective Amnesia's replay term, ``E_replay ‖ε − ε_θ(x_t, t, c_r)‖²``, as a mean over elements.

    Args:
        predicted: ``ε_θ(x_t, t, c_r)`` for noised samples that the base model generated of retained prompts ``c_r``,
            ``(batch, channels, height, width)``, any float dtype.
        noise: ``ε``, the noise in ``x_t``, of the same shape; detached.

    Returns:
        A scalar without its weight ``γ``, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If the shapes differ or the tensors are empty.

    Reference:
        Heng & Soh, Selective Amnesia, arXiv 2305.10120, equation 8, the generative replay term.
    """
    return noise_matching(predicted, noise)


def prior_preservation(predicted: Tensor, noise: Tensor) -> Tensor:
    """DUGE's prior preservation ``L_pr``: the denoising loss on a small memory of unrelated images and prompts.

    Args:
        predicted: ``ε_θ(x_t, t, c_m)`` for noised images of the memory under their own prompts ``c_m``,
            ``(batch, channels, height, width)``, any float dtype.
        noise: ``ε``, the noise in ``x_t``, of the same shape; detached.

    Returns:
        A scalar without its weight ``λ_p``, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If the shapes differ or the tensors are empty.

    Reference:
        Thakral et al., DUGE, arXiv 2503.13769, the prior preservation loss ``L_pr``.
    """
    return noise_matching(predicted, noise)


def contrast_target(anchor: Tensor, opposed: Tensor, contrast: float) -> Tensor:
    """The target ``ε_a + η (ε_a − ε_o)``: the anchor's prediction, moved on away from another prompt's.

    With the empty prompt as anchor and the concept as the opposed prompt it is ESD's target
    ``ε(∅) − η (ε(c) − ε(∅))``.

    Args:
        anchor: ``ε_a``, the frozen model's prediction under the anchor prompt, ``(batch, channels, height, width)``.
        opposed: ``ε_o``, its prediction under the prompt to move away from, of the same shape.
        contrast: ``η``; 0 gives the anchor's own prediction.

    Returns:
        The target, of the same shape, float32 (float64 for float64 inputs), detached.

    Raises:
        ForgetConceptError: If the shapes differ.

    Reference:
        Gandikota et al., ESD, arXiv 2303.07345, the negatively guided target.
    """
    if anchor.shape != opposed.shape:
        raise ForgetConceptError(
            f"Predictions of the shapes {_shape(anchor)} and {_shape(opposed)} give no target: both must be equal."
        )
    anchor, opposed = _wide(anchor.detach()), _wide(opposed.detach())
    return anchor + contrast * (anchor - opposed)


# -- weights ------------------------------------------------------------------------------------------------------


def dense_change(change: Change, name: str = "a layer") -> Tensor:
    """A change of one weight matrix as the matrix itself, ``θ − θ* = B A``.

    Args:
        change: ``(up, down)`` with ``up`` ``(d_out, r)`` and ``down`` ``(r, d_in)``, or the dense ``(d_out, d_in)``.
        name: The layer's name, for the error message.

    Returns:
        ``(d_out, d_in)``, float32 or float64, differentiable in what was given.

    Raises:
        ForgetConceptError: If the factors do not fit together, or a tensor is not a matrix.
    """
    if isinstance(change, Tensor):
        if change.ndim != 2:
            raise ForgetConceptError(f"The change of {name} has the shape {_shape(change)}: expected (d_out, d_in).")
        return _wide(change)
    up, down = change
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ForgetConceptError(
            f"The factors of the change of {name} do not fit together: up is {_shape(up)} and down is {_shape(down)}, "
            "expected (d_out, r) and (r, d_in)."
        )
    return _wide(up) @ _wide(down)


def _dense(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    return {name: dense_change(change, name) for name, change in changes.items()}


def _check_same(what: str, given: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> None:
    """Raise where ``given`` is not of the layers ``of``, or has other shapes."""
    if not of:
        raise ForgetConceptError(f"There is no layer to set the {what} against: give at least one trained projection.")
    if given.keys() != of.keys():
        differ = listed(sorted(given.keys() ^ of.keys()))
        raise ForgetConceptError(
            f"The {what} and the trained projections must be of the same layers: only one of the two has {differ}."
        )
    for name, value in given.items():
        if value.shape != of[name].shape:
            raise ForgetConceptError(
                f"The {what} of {name} has the shape {_shape(value)} and the projection {_shape(of[name])}: both must "
                "be equal."
            )


def elastic_penalty(changes: Mapping[str, Change], fisher: Mapping[str, Tensor]) -> Tensor:
    """Elastic weight consolidation on factors: ``Σ_i F_i (θ_i − θ*_i)² = Σ F ⊙ (B A)²`` over all layers.

    Args:
        changes: By layer ``θ − θ*``: ``(up, down)``, ``(d_out, r)`` and ``(r, d_in)``, or one dense ``(d_out, d_in)``;
            any float dtype.
        fisher: By the same layers ``F``, the diagonal Fisher information, ``(d_out, d_in)``, not negative; detached.
            :func:`relative_fisher` gives it a unit that carries over between models.

    Returns:
        A scalar without its weight ``λ`` and without Kirkpatrick's ½, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If there are no layers, or the two are not of the same layers and shapes.

    Reference:
        Kirkpatrick et al., EWC, arXiv 1612.00796, equation 3. Heng & Soh, Selective Amnesia, arXiv 2305.10120,
        equation 8, the Fisher term.
    """
    dense = _dense(changes)
    _check_same("Fisher information", fisher, dense)
    return _stacked([(_wide(fisher[name].detach()) * change.square()).sum() for name, change in dense.items()]).sum()


def relative_fisher(fisher: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fisher information in the weights' own unit, ``F / Σ_i F_i θ*_i²``.

    :func:`elastic_penalty` is then 1 for a change as large as the weights themselves. It stays the same when the loss
    that ``F`` was measured with, or all weights and changes, are scaled by a constant.

    Args:
        fisher: By layer ``F``, ``(d_out, d_in)``, any float dtype.
        weights: By the same layers ``θ*``, ``(d_out, d_in)``, any float dtype.

    Returns:
        By the same layers the scaled ``F``, float32 or float64.

    Raises:
        ForgetConceptError: If there are no layers, the two are not of the same layers and shapes, or
            ``Σ_i F_i θ*_i²`` is not above 0.
    """
    _check_same("Fisher information", fisher, weights)
    size = sum(
        float((_wide(value.detach()) * _wide(weights[name].detach()).square()).sum()) for name, value in fisher.items()
    )
    if not size > 0:
        raise ForgetConceptError(
            f"The Fisher information has no scale relative to the weights: Σ F θ² is {size:g}, and must be above 0."
        )
    return {name: _wide(value.detach()) / size for name, value in fisher.items()}


def drift_from_base(
    changes: Mapping[str, Change], weights: Mapping[str, Tensor], earlier: Mapping[str, Factors] | None = None
) -> Tensor:
    """The first part of DUGE's ``L_reg`` as a share, ``‖θ − φ_0‖² / ‖φ_0‖²``, over the trained layers.

    ``θ − φ_0`` is what earlier requests left (``E``) and what is trained (``D``):
    ``‖E + D‖² = ‖E‖² + 2⟨E, D⟩ + ‖D‖²``, without ever making the dense ``E``. Measured from the base model, drift does
    not compound over requests. It stays the same when changes and weights are scaled by a constant. Published is the
    numerator; ``‖φ_0‖²`` is a constant that makes the weight ``λ_r`` carry over between models.

    Args:
        changes: By layer the trained change ``D``: ``(up, down)``, ``(d_out, r)`` and ``(r, d_in)``, or one dense
            ``(d_out, d_in)``; any float dtype.
        weights: By the same layers the base weights ``φ_0``, ``(d_out, d_in)``, any float dtype; detached.
        earlier: By layer the factors of ``E``, like ``(up, down)`` above; detached. Layers without an entry have none,
            and entries for layers that are not trained are left out, since nothing here can change them.

    Returns:
        A scalar without its weight ``λ_r``, float32 (float64 for float64 inputs).

    Raises:
        ForgetConceptError: If there are no layers, the three are not of the same layers and shapes, or all base weights
            are zero.

    Reference:
        Thakral et al., DUGE, arXiv 2503.13769, the regularization loss ``L_reg``. Lee et al., CUIG, arXiv 2511.07970
        (drift measured from the base).
    """
    dense = _dense(changes)
    _check_same("base weight", weights, dense)
    moved, size = [], 0.0
    for name, change in dense.items():
        square = (change**2).sum()
        if earlier is not None and name in earlier:
            up, down = (_wide(factor.detach()) for factor in earlier[name])
            fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
            if not fits or (up.shape[0], down.shape[1]) != change.shape:
                raise ForgetConceptError(
                    f"The factors that earlier requests left at {name} do not fit: up is {_shape(up)} and down is "
                    f"{_shape(down)}, and the projection is {_shape(change)}."
                )
            square = square + 2 * (up * (change @ down.T)).sum() + ((up.T @ up) * (down @ down.T)).sum()
        moved.append(square)
        size += float(_wide(weights[name].detach()).square().sum())
    if not size > 0:
        raise ForgetConceptError("The base weights are all zero, so a change of them has no relative size.")
    return _stacked(moved).sum() / size
