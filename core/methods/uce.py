"""Unified Concept Editing in closed form: an exact low-rank update from one solve for all layers.

Gandikota et al., *Unified Concept Editing in Diffusion Models* (arXiv 2308.14761), equation 7: for every K and V

``W* = (λW + s_e W G Cᵀ + s_p W K Kᵀ) N⁻¹`` with ``N = λI + s_e C Cᵀ + s_p K Kᵀ``

The columns of ``C`` are the text states to forget, those of ``G`` the guide states that they are mapped to, and those
of ``K`` the states to preserve. A target may be mapped beyond its guide state, to ``C + o (G - C)``, where ``o`` is the
setting ``overshoot``, raised for concepts that regularization holds back (``reach``). Every term has ``W`` on its left,
so ``ΔW = W M`` with ``M = s_e (G − C) Cᵀ N⁻¹``, the same ``M`` at every site. It is computed once, in fp64, from the
text states alone, without gradients or UNet passes.

A model that also reads a pooled vector of the prompt (SDXL) gets a second map of the same form from the same prompts,
one column a prompt, at the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import ForgetConceptError, RequestError
from ..formats.context_map import expand
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_entries import TOKENS
from ..patch.low_rank import LowRank
from ..patch.metadata import PatchMetadata
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from ..request.plan import Plan
from .base import POOLED_LEFT, Inputs, Method
from .mean_phrases import mean_note
from .registry import register
from .text_columns import Columns, collect_columns, guide_means
from .uce_settings import UCESettings

__all__ = [
    "UCE",
    "UCESettings",
    "gram_of",
    "solve_context_map",
]


# steps of the progress bar after those of the prompts: the solve, and its expansion to every site
_AFTER_ENCODING = 2
# overshoot that ``reach`` may raise to; columns that it looks at, of all concepts together, and at least of each
MOST, COLUMNS_SEEN, LEAST_SEEN = 3.0, 16384, 64


@register
class UCE(Method):
    """The closed form: exact, without training, in well under a second."""

    id = "uce"
    title = "Unified Concept Editing (closed form)"
    paper = "https://arxiv.org/abs/2308.14761"
    Settings = UCESettings
    main = ("rank", "columns", "erase_weight", "preserve_weight", "ridge", "keep_common", "no_replacement")
    presets = {
        # the authors' released script: names without a template, their last token, λ = 0.5, styles mapped to "art"
        "published": UCESettings(
            columns="last",
            ridge=0.5,
            templates=("{}",),
            no_replacement="empty",
            neutral_style="art",
            pooled=False,
        ),
        # chosen on tree, mosaic and Hugo Marsh of the embedded world, where this tolerance reduces the rank from 180 to
        # 13 and leaves two digits of every residual unchanged
        "tuned": UCESettings(
            ridge=1.0,
            overshoot=1.1,
            reach=0.8,
            contexts=True,
            keep_common=True,
            tolerance=0.01,
            no_replacement="mean",
        ),
    }

    def fit(
        self,
        model: LatentDiffusion,
        plan: Plan,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> Patch:
        """Encode the prompts, solve once, and expand to every site. Deterministic; the seed is not used."""
        if inputs is not None and inputs.earlier is not None:
            raise RequestError(
                "The closed form does not start from an earlier patch, because it solves for all requests together: "
                "leave 'earlier' out of its inputs."
            )
        settings: UCESettings = plan.settings
        total = _AFTER_ENCODING

        def encoded(event: ProgressEvent) -> None:
            nonlocal total
            total = event.total + _AFTER_ENCODING
            report_progress(progress, ProgressEvent(event.step, total, message=event.message))

        norms = {entry.stream: entry.norm for entry in model.survey.entries}
        streams = [stream for stream in norms if stream == TOKENS or settings.pooled]
        means = guide_means(model.text, plan.request, settings, encoded)
        columns = collect_columns(model.text, plan.request, settings, encoded, streams, means)
        columns = {stream: those.through(norms[stream]) for stream, those in columns.items()}

        def solving() -> None:
            report_progress(progress, ProgressEvent(total - _AFTER_ENCODING, total, message="solving"))

        maps = {}
        for stream, those in columns.items():
            solving()
            outputs = _output_gram(model, stream, settings.projections)
            maps[stream] = solve_context_map(those, settings, outputs, solving)
        report_progress(progress, ProgressEvent(total - 1, total, message="expanding to every site"))
        notes = [model.survey.caution, POOLED_LEFT if set(norms) - set(maps) else None, mean_note(means)]
        about = PatchMetadata(note=" ".join(filter(None, notes)) or None)
        patch = expand(maps, model.survey, about.to_strings(), settings.projections)
        report_progress(progress, ProgressEvent(total, total, message="done"))
        return patch


# -- the solve ----------------------------------------------------------------------------------------------------


def _unseen() -> None:
    """No progress is reported."""


def gram_of(
    parts: Iterable[Tensor],
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    look: Callable[[], None] = _unseen,
) -> Tensor:
    """``Σ XᵀX`` over some matrices ``X``.

    Args:
        parts: The matrices, ``(n, width)`` each.
        width: Their width.
        device: Device of the computation and the result.
        dtype: Dtype of the computation, which converts a few thousand rows at a time to save memory.
        look: Called now and then; may raise :class:`Cancelled`.

    Returns:
        ``(width, width)``, fp64.
    """
    total = torch.zeros(width, width, dtype=dtype, device=device)
    for part in parts:
        for rows in part.split(4096):
            rows = rows.to(device, dtype)
            total.addmm_(rows.T, rows)
            look()
    return total.double()


def _output_gram(model: LatentDiffusion, stream: str, projections: tuple[str, ...]) -> Tensor:
    """``Σ WᵀW`` over a stream's edited layers, ``(d, d)`` fp64: the metric of text states as the outputs see it."""
    device = model.device if model.device.type == "cuda" else torch.device("cpu")
    entries = model.survey.edited(stream, projections)
    return gram_of((entry.weight for entry in entries), entries[0].width, device, torch.float32)


def solve_context_map(
    columns: Columns, settings: UCESettings, outputs: Tensor | None = None, look: Callable[[], None] = _unseen
) -> LowRank:
    """Solve ``M = s_e (G − C) Cᵀ N⁻¹`` as low-rank factors.

    ``λ`` is ``settings.ridge`` times the mean square of a value in ``C``, so that one setting fits every text encoder.

    With fewer columns than text dimensions, ``Cᵀ N⁻¹`` comes from a solve of the columns' size: for
    ``N = λI + U Uᵀ``, ``Uᵀ N⁻¹ = (λI + UᵀU)⁻¹ Uᵀ``, which is exact and avoids the cancellation of Woodbury's identity;
    else from one of size ``d``. The truncation minimizes ``‖W M x‖`` summed over all projections and columns ``x``:
    with ``N = R Rᵀ``, the singular directions ``V`` of ``L M R`` give ``M_r = (M R V_r)(V_rᵀ R⁻¹)``.

    Args:
        columns: The text states.
        settings: The method's settings.
        outputs: ``Lᵀ L = Σ WᵀW`` over all projections, ``(d, d)``; ``None``: the identity.
        look: Called between the parts of the solve, which take seconds for hundreds of concepts; may raise
            :class:`Cancelled`.

    Returns:
        The factors, fp32, of the numerical rank under ``settings.tolerance``, at most ``settings.rank``.

    Raises:
        ForgetConceptError: The system cannot be solved.

    Reference:
        Gandikota et al., UCE, arXiv 2308.14761, equation 7.
    """
    device = columns.target.device
    target, guide = columns.target.double(), columns.guide.double()
    look()
    width, count = target.shape
    preserved = columns.preserved.T if settings.preserve_weight else columns.preserved.T[:0]
    eye = torch.eye(width, dtype=torch.float64, device=device)
    ridge = settings.ridge * (float(target.square().mean()) or 1.0)
    known = settings.erase_weight * gram_of([target.T], width, device, look=look)
    normal = ridge * eye + known + settings.preserve_weight * gram_of([preserved], width, device, look=look)
    factor = _cholesky(normal)
    if count + len(preserved) < width:
        scaled = torch.cat([settings.erase_weight**0.5 * target.T, settings.preserve_weight**0.5 * preserved.double()])
        small = ridge * torch.eye(len(scaled), dtype=torch.float64, device=device) + scaled @ scaled.T
        rows = torch.cholesky_solve(scaled, _cholesky(small))
        down = rows[:count] / settings.erase_weight**0.5
    else:
        down = torch.cholesky_solve(target, factor).T
    look()
    overshoot = settings.overshoot if columns.overshoot is None else columns.overshoot.to(target)
    way = guide - target
    change = settings.erase_weight * overshoot * way
    gram = eye if outputs is None else outputs.to(device, torch.float64)
    look()
    if settings.reach is not None and columns.concept is not None:
        concept = columns.concept.to(device)
        some = spread_columns(concept, max(COLUMNS_SEEN // (int(concept.max()) + 2), LEAST_SEEN))
        moved = change @ (down @ target[:, some]) if count < width else (change @ down) @ target[:, some]
        times = raise_to(settings.reach, concept[some], way[:, some], moved, gram)[concept + 1]
        now = torch.as_tensor(overshoot, dtype=torch.float64, device=device)
        change = settings.erase_weight * torch.minimum(now * times, now.clamp(min=MOST)) * way
        look()
    # truncate M R in the metric of the projections' outputs
    seen = down @ factor
    look()
    if seen.shape[0] < width:  # M R has at most as many directions as columns, so the small problem suffices
        side, corner = torch.linalg.qr(seen.T)
        moved = change @ corner.T
    else:
        side, moved = eye, change @ seen
    look()
    values, vectors = torch.linalg.eigh(moved.T @ gram @ moved)
    look()
    size = values.clamp(min=0).sqrt().flip(0)
    # the Gram matrix squares singular values, so those below the square root of fp64's precision are rounding
    keep = int((size > size[0] * max(settings.tolerance, 1e-8)).sum()) if size[0] > 0 else 1
    keep = min(keep, settings.rank or keep)
    basis = vectors.flip(1)[:, :keep]
    up = moved @ basis
    down = torch.linalg.solve_triangular(factor, (side @ basis).T, upper=False, left=False)
    root = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-300)).clamp(min=1e-300).sqrt()
    return LowRank((up / root).float(), (down * root[:, None]).float())


def spread_columns(concept: Tensor, count: int) -> Tensor:
    """Indices of at most ``count`` columns of each concept, at equal distances.

    Args:
        concept: Index of each column's concept, ``(n,)``, at least -1.
        count: Number of columns of a concept.
    """
    order = concept.argsort(stable=True)
    sizes = torch.bincount(concept + 1)
    of_each = sizes[concept[order] + 1]
    place = torch.arange(len(concept), device=concept.device) - (sizes.cumsum(0) - sizes)[concept[order] + 1]
    return order[(of_each <= count) | (place * count // of_each != (place - 1) * count // of_each)].sort().values


def raise_to(reach: float, concept: Tensor, way: Tensor, moved: Tensor, outputs: Tensor) -> Tensor:
    """By what factor to raise the overshoot of each concept, so that it gets a share of its way in the end.

    Regularization keeps what is near preserved states where it is: people more than styles. The change is linear in
    the overshoot, so one step suffices where concepts do not move each other.

    Args:
        reach: The share of the way, as a projection on it over all columns of a concept.
        concept: Index of each column's concept, ``(n,)``; -1: it stays as it is.
        way: From the states to what they are mapped to, ``(d, n)``.
        moved: How far the states are moved now, ``(d, n)``.
        outputs: The metric of states, ``(d, d)``.

    Returns:
        ``(concepts + 1,)``, at least 1; the first is that of the index -1.
    """
    seen = outputs @ way
    sums = torch.zeros(2, int(concept.max()) + 2, dtype=way.dtype, device=way.device)
    sums.index_add_(1, concept + 1, torch.stack([(seen * way).sum(0), (seen * moved).sum(0)]))
    factor = (reach * sums[0] / sums[1].clamp(min=1e-300)).clamp(min=1)
    factor[0] = 1
    return factor


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not torch.isfinite(factor).all():
        raise ForgetConceptError(
            "The closed form cannot be solved, because the text states are not finite or 'ridge' is too small: raise "
            "'ridge', or run the text encoder in full precision."
        )
    return factor
