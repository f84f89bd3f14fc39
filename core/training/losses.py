"""Losses as pure functions of tensors, one a published term; scalars come out in fp32 or wider."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ForgetConceptError

__all__ = ["attention_resteering", "noise_matching"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def attention_resteering(masses: Sequence[Tensor]) -> Tensor:
    """Forget-Me-Not's loss: ``‖concat_l A_l[..., S]‖₂``, one un-squared norm over all sites, heads, pixels and tokens.

    ``masses`` are :func:`attention_mass` of the sites, of any shapes. Its gradient at no mass at all is
    zero. arXiv 2303.17591, §3.1. Raises :class:`ForgetConceptError` for no sites.
    """
    if not masses:
        raise ForgetConceptError("There is no attention to re-steer: no site was recorded.")
    norms = [torch.linalg.vector_norm(_wide(mass)) for mass in masses]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def noise_matching(predicted: Tensor, wanted: Tensor) -> Tensor:
    """``mean ‖ε_θ(x_t, t, c) − ε*‖²`` over all elements; no gradient goes to ``wanted``.

    With the true noise for ``ε*`` it is the denoising loss; with a frozen model's prediction, Concept Ablation's term
    (arXiv 2303.13516) and the keeping of preserved prompts. Raises :class:`ForgetConceptError` on different shapes.
    """
    if predicted.shape != wanted.shape:
        raise ForgetConceptError(
            f"Noise of shapes {tuple(predicted.shape)} and {tuple(wanted.shape)} cannot be compared."
        )
    return torch.mean((_wide(predicted) - _wide(wanted.detach())) ** 2)
