"""Unified Concept Editing in closed form: an exact low-rank update from one solve for all layers.

Gandikota et al., *Unified Concept Editing in Diffusion Models* (arXiv 2308.14761), equation 7: for every K and V

``W* = (λW + s_e W G Cᵀ + s_p W K Kᵀ) N⁻¹`` with ``N = λI + s_e C Cᵀ + s_p K Kᵀ``

The columns of ``C`` are the text states to forget, those of ``G`` the guide states that they are mapped to, and those
of ``K`` the states to preserve. Every term has ``W`` on its left, so ``ΔW = W M`` with ``M = s_e (G − C) Cᵀ N⁻¹``, the
same ``M`` at every site. It is computed once, in fp64, from the text states alone, without gradients or UNet passes.

A model that also reads a pooled vector of the prompt (SDXL) gets a second map of the same form from the same prompts,
one column a prompt, at the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ForgetConceptError, ModelError, RequestError
from ..formats.context_map import expand
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_survey import TEXT_PROJECTIONS
from ..models.text_encoders import ENCODE_ROWS, TextEncoder, encoded_batches
from ..models.text_entries import POOLED, TOKENS
from ..models.text_states import TextStates
from ..models.token_positions import end_position, phrase_span, tail_positions
from ..patch.low_rank import LowRank
from ..patch.metadata import PatchMetadata
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from ..prompts.everyday import COMMON, CONTEXTS
from ..prompts.pairs import mentions
from ..request.concept import Concept, check_templates, normalized_phrase, templates
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..request.settings import check_settings, setting
from .base import Inputs, Method
from .registry import register

__all__ = [
    "UCE",
    "Columns",
    "UCESettings",
    "aligned_positions",
    "collect_columns",
    "common_prompts",
    "gram_of",
    "solve_context_map",
]


@dataclass(frozen=True)
class UCESettings:
    """Settings of :class:`UCE`: ``erase_weight`` is ``s_e``, ``preserve_weight`` is ``s_p`` and ``ridge`` is ``λ``."""

    # in a causal encoder every later position carries the concept
    columns: Literal["tail", "last"] = setting(
        "tail",
        "Token positions that are edited. tail: every position from the concept's first token on. last: only its last "
        "token, as published.",
        group="prompts",
    )
    projections: tuple[str, ...] = setting(
        TEXT_PROJECTIONS, "Projections that read the text and are edited.", choices=TEXT_PROJECTIONS, advanced=True
    )
    erase_weight: float = setting(1.0, "Weight of each text state to forget.", minimum=0.01, maximum=1000, step=0.05)
    preserve_weight: float = setting(1.0, "Weight of each text state to preserve.", minimum=0, maximum=1000, step=0.05)
    # relative, so that one value fits every text encoder
    ridge: float = setting(
        0.01,
        "Regularization towards the unchanged weights, relative to the size of the text states: more changes less.",
        minimum=0.0001,
        maximum=1000,
    )
    contexts: bool = setting(
        False,
        "Also use the concept in everyday contexts, next to colours, styles and backgrounds.",
        group="prompts",
    )
    # concepts outside the retain set may be affected
    keep_common: bool = setting(
        False, "Also preserve everyday words, in addition to the preserve list.", group="prompts"
    )
    rank: int | None = setting(
        None,
        "Maximum rank of the patch; 0: as many as the tolerance keeps.",
        minimum=1,
        maximum=1024,
        none_value=0,
        leading=True,
    )
    tolerance: float = setting(
        1e-6,
        "Singular values below this share of the largest are dropped.",
        minimum=0,
        maximum=0.999,
        step=1e-6,
    )
    templates: tuple[str, ...] | None = setting(
        None,
        "Prompts with {} in the concept's place, one per line; empty: those of the concept's kind.",
        advanced=True,
        group="prompts",
    )
    preserve_prompts: tuple[str, ...] = setting((), "Whole prompts to preserve, one per line.", group="prompts")
    no_replacement: Literal["dropped", "empty"] = setting(
        "dropped",
        "What a concept without a replacement is mapped to. dropped: the same prompt without it. empty: the empty "
        "prompt.",
        group="prompts",
    )
    neutral_object: str = setting(
        "",
        "What an object without a replacement is mapped to; empty: as no_replacement says.",
        advanced=True,
        group="prompts",
    )
    neutral_style: str = setting(
        "",
        "What a style without a replacement is mapped to; empty: as no_replacement says.",
        advanced=True,
        group="prompts",
    )
    neutral_identity: str = setting(
        "",
        "What a person without a replacement is mapped to; empty: as no_replacement says.",
        advanced=True,
        group="prompts",
    )

    pooled: bool = setting(
        True, "Also edit what the model reads from the whole prompt's vector, if it reads one (SDXL).", advanced=True
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_templates(self.templates)


# steps of the progress bar after those of the prompts: the solve, and its expansion to every site
_AFTER_ENCODING = 2


@dataclass(frozen=True)
class Columns:
    """Text states as columns, in the text encoder's dtype; tens of thousands in fp64 would take hundreds of megabytes.

    Args:
        target: ``C``, the states to forget, ``(d, n)``.
        guide: ``G``, what each of them is mapped to, ``(d, n)``.
        preserved: ``K``, the states to preserve, ``(d, m)``.
    """

    target: Tensor
    guide: Tensor
    preserved: Tensor

    def through(self, norm: nn.Module | None) -> Columns:
        """What a layer reads of the states behind a norm; ``None``: the states themselves."""
        if norm is None:
            return self
        device = next((p.device for p in norm.parameters()), self.target.device)
        with torch.no_grad():
            return Columns(*(norm(part.T.to(device)).to(part).T for part in (self.target, self.guide, self.preserved)))


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
        "tuned": UCESettings(ridge=1.0, contexts=True, keep_common=True, tolerance=0.01),
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
        columns = collect_columns(model.text, plan.request, settings, encoded, streams)
        columns = {stream: those.through(norms[stream]) for stream, those in columns.items()}
        report_progress(progress, ProgressEvent(total - _AFTER_ENCODING, total, message="solving"))
        maps = {
            stream: solve_context_map(those, settings, _output_gram(model, stream, settings.projections))
            for stream, those in columns.items()
        }
        report_progress(progress, ProgressEvent(total - 1, total, message="expanding to every site"))
        note = None
        if set(norms) - set(maps):
            note = "The model also reads the concept from the whole prompt's vector, which this edit does not change."
        patch = expand(maps, model.survey, PatchMetadata(note=note).to_strings(), settings.projections)
        report_progress(progress, ProgressEvent(total, total, message="done"))
        return patch


# -- which text states --------------------------------------------------------------------------------------------


def aligned_positions(
    encoder: TextEncoder, target: tuple[str, str], guide: tuple[str, str]
) -> tuple[list[int], list[int]]:
    """Align the tail of a target prompt with a guide prompt that differs only in the phrase.

    Sub-words of the phrase are aligned from its end, because the last one carries the whole phrase. Later words are
    aligned with the same words, the end-of-text token with the end-of-text token, and the k-th pad with the k-th pad. A
    position without a partner takes the nearest one. In an encoder that is not causal (T5), words before the phrase
    know of it as well, and are aligned with the same words.

    Args:
        encoder: The text encoder.
        target: The concept's name and its prompt.
        guide: The replacement and its prompt; the replacement may be empty.

    Returns:
        The positions of the target prompt that know of the concept and, for each, the position in the guide prompt.

    Raises:
        TokenError: A prompt is cut off, or the concept does not occur in its prompt.
    """
    phrase, prompt = target
    positions = _positions(encoder, phrase, prompt)
    start, width = phrase_span(encoder, phrase, prompt)
    guide_phrase, guide_prompt = guide
    # the same words stand before the phrase, so it starts at the same position
    guide_width = len(encoder.phrase_ids(guide_phrase)) if guide_phrase else 0
    last = len(encoder.token_ids(guide_prompt)) - 1
    end_position(encoder, guide_prompt)  # raises if the guide prompt is cut off
    aligned = []
    for position in positions:
        if position < start:
            at = position
        elif position < start + width:
            from_end = min(start + width - position, max(guide_width, 1))
            at = start + max(guide_width, 1) - from_end
        else:
            at = position - width + guide_width
        aligned.append(min(at, last))
    return positions, aligned


def _positions(encoder: TextEncoder, phrase: str, prompt: str) -> list[int]:
    """The positions whose states depend on the phrase; an encoder says ``causal = False`` if those before it do."""
    if getattr(encoder, "causal", True):
        return tail_positions(encoder, phrase, prompt)
    phrase_span(encoder, phrase, prompt)  # raises if the phrase is not in the prompt
    return list(range(len(encoder.token_ids(prompt))))


def _fill(template: str, phrase: str) -> str:
    """The template with the phrase in place; an empty phrase leaves no double space."""
    return template.format(phrase) if phrase else " ".join(template.replace("{}", " ").split())


def _templates(settings: UCESettings, kind: str, request: ForgetRequest) -> tuple[str, ...]:
    """The templates of the settings, or those of the kind followed by its everyday contexts.

    Contexts that mention a concept to forget are left out: preserved phrases in them would preserve it.
    """
    if settings.templates is not None:
        return settings.templates
    contexts = CONTEXTS[kind] if settings.contexts else ()
    return templates(kind) + tuple(c for c in contexts if not any(mentions(t.name, c) for t in request.concepts))


def common_prompts(request: ForgetRequest, settings: UCESettings) -> list[str]:
    """Prompts of everyday words: each in the first template of its kind, one other template and one context.

    Words that contain a concept to forget, or occur in its name, are left out.
    """
    targets = [normalized_phrase(concept.name) for concept in request.concepts]
    found = []
    for word, prompt in _everyday_prompts(settings):
        plain = normalized_phrase(word)
        if any(plain in target or target in plain for target in targets):
            continue
        # a context may mention a concept to forget, such as neon next to a red star
        if not any(target in normalized_phrase(prompt) for target in targets):
            found.append(prompt)
    return found


def _everyday_prompts(settings: UCESettings) -> list[tuple[str, str]]:
    """Every everyday word with each of its prompts, whatever is to be forgotten."""
    found = []
    for kind, words in COMMON.items():
        for i, word in enumerate(words):
            chosen = [templates(kind)[0], templates(kind)[1 + i % (len(templates(kind)) - 1)]]
            if settings.contexts:
                chosen.append(CONTEXTS[kind][i % len(CONTEXTS[kind])])
            found += [(word, _fill(template, word)) for template in chosen]
    return found


def _guide_phrase(concept: Concept, settings: UCESettings) -> str:
    """The phrase in the concept's place in guide prompts: its replacement, or the neutral one of its kind."""
    if concept.replacement_text:
        return concept.replacement_text
    return {
        "object": settings.neutral_object,
        "style": settings.neutral_style,
        "identity": settings.neutral_identity,
    }[concept.kind]


def collect_columns(
    encoder: TextEncoder,
    request: ForgetRequest,
    settings: UCESettings,
    progress: Progress | None = None,
    streams: Sequence[str] = (TOKENS,),
) -> dict[str, Columns]:
    """Collect the text states to forget, their guide states, and those to preserve.

    The states to preserve are all positions of the empty prompt, which is used in every image with guidance, of each
    preserved phrase in the templates of the request's kinds, and of each preserved prompt. With ``columns="last"`` they
    are the empty prompt's and, as published, the last token's of the others. Of pooled vectors and means there is one
    column a prompt.

    Args:
        encoder: The text encoder.
        request: The request.
        settings: The method's settings.
        progress: Called with the number of encoded prompts.
        streams: The streams of text states that are wanted.

    Returns:
        The columns by stream.

    Raises:
        TokenError: A prompt is cut off.
        ModelError: The pooled vectors are wanted, and the encoder gives none.
    """
    pairs: list[tuple[str, int, str, int]] = []  # target prompt, position, guide prompt, position
    for concept in request.concepts:
        phrase = _guide_phrase(concept, settings)
        for template in _templates(settings, concept.kind, request):
            prompt = _fill(template, concept.name)
            end_position(encoder, prompt)
            if not phrase and settings.no_replacement == "empty":
                guide = ""
                positions = _positions(encoder, concept.name, prompt)
                start, width = phrase_span(encoder, concept.name, prompt)
                aligned = positions
            else:
                guide = _fill(template, phrase)
                positions, aligned = aligned_positions(encoder, (concept.name, prompt), (phrase, guide))
                start, width = phrase_span(encoder, concept.name, prompt)
            if settings.columns == "last":
                # without a phrase in its place: the state before the end, as in the authors' script
                last = positions.index(start + width - 1)
                at = aligned[last] if phrase else end_position(encoder, guide) - 1
                positions, aligned = [start + width - 1], [at]
            pairs += [(prompt, p, guide, g) for p, g in zip(positions, aligned, strict=True)]
    retain: dict[str, None] = {}
    for preserved_phrase in request.preserve:
        for kind in dict.fromkeys(concept.kind for concept in request.concepts):
            for template in _templates(settings, kind, request):
                retain[_fill(template, preserved_phrase)] = None
    if settings.keep_common:
        retain |= dict.fromkeys(common_prompts(request, settings))
    retain |= dict.fromkeys(settings.preserve_prompts)
    retain.pop("", None)
    ends = [end_position(encoder, prompt) for prompt in retain]
    # the retain set first, so that its states are one contiguous slice
    texts = list(dict.fromkeys(["", *retain] + [p for p, _, _, _ in pairs] + [g for _, _, g, _ in pairs]))
    everyday = [prompt for _, prompt in _everyday_prompts(settings)] if settings.keep_common else []
    found, row = _encode(encoder, texts, everyday, progress), {text: i for i, text in enumerate(texts)}
    states = found.hidden
    preserved = states[: 1 + len(retain)].flatten(0, 1)
    if settings.columns == "last":
        preserved = torch.cat([states[0], *(states[i, end - 1 : end] for i, end in enumerate(ends, 1))])
    columns = {
        TOKENS: Columns(
            target=states[[row[p] for p, _, _, _ in pairs], [i for _, i, _, _ in pairs]].T,
            guide=states[[row[g] for _, _, g, _ in pairs], [j for _, _, _, j in pairs]].T,
            preserved=preserved.T,
        )
    }
    prompts = dict.fromkeys((prompt, guide) for prompt, _, guide, _ in pairs)
    for stream in streams:
        if stream == TOKENS:
            continue
        vectors = found.pooled if stream == POOLED else states.float().mean(1)
        if vectors is None:
            raise ModelError(
                "This model also reads a vector of the whole prompt (as SDXL does), and the text encoder gives none: "
                "load the model with all of its text encoders, or set 'pooled' to no."
            )
        columns[stream] = Columns(
            target=vectors[[row[prompt] for prompt, _ in prompts]].T,
            guide=vectors[[row[guide] for _, guide in prompts]].T,
            preserved=vectors[: 1 + len(retain)].T,
        )
    return columns


def _encode(
    encoder: TextEncoder, texts: Sequence[str], everyday: Sequence[str] = (), progress: Progress | None = None
) -> TextStates:
    """The text states of ``n`` prompts.

    The ``everyday`` prompts are encoded in batches of their own, even those that are not among the texts, so that their
    states are remembered from one request to the next.
    """
    row, first = {text: i for i, text in enumerate(texts)}, list(dict.fromkeys(everyday))
    first += [""] * (-len(first) % ENCODE_ROWS)
    seen = set(first)
    order = [*first, *(text for text in texts if text not in seen)]
    found: TextStates | None = None
    for i, states in enumerate(encoded_batches(encoder, order, progress)):
        if found is None:
            # the solve needs fp64, which the CPU and CUDA support, but not every accelerator
            device = states.hidden.device if states.hidden.is_cuda else torch.device("cpu")
            found = TextStates(*(_rows(part, len(texts), device) for part in (states.hidden, states.pooled)))
        prompts = order[i * ENCODE_ROWS : (i + 1) * ENCODE_ROWS]
        wanted = [at for at, prompt in enumerate(prompts) if prompt in row]
        at = [row[prompts[i]] for i in wanted]
        for kept, part in ((found.hidden, states.hidden), (found.pooled, states.pooled)):
            if kept is not None and part is not None:
                kept[at] = part.detach()[wanted].to(kept.device)
    assert found is not None  # the empty prompt is always among them
    return found


def _rows(part: Tensor | None, count: int, device: torch.device) -> Any:
    """Room for ``count`` rows of the shape of one of ``part``'s."""
    return None if part is None else torch.empty(count, *part.shape[1:], dtype=part.dtype, device=device)


# -- the solve ----------------------------------------------------------------------------------------------------


def gram_of(parts: Iterable[Tensor], width: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """``Σ XᵀX`` over some matrices ``X``.

    Args:
        parts: The matrices, ``(n, width)`` each.
        width: Their width.
        device: Device of the computation and the result.
        dtype: Dtype of the computation, which converts a few thousand rows at a time to save memory.

    Returns:
        ``(width, width)``, fp64.
    """
    total = torch.zeros(width, width, dtype=dtype, device=device)
    for part in parts:
        for rows in part.split(4096):
            rows = rows.to(device, dtype)
            total.addmm_(rows.T, rows)
    return total.double()


def _output_gram(model: LatentDiffusion, stream: str, projections: tuple[str, ...]) -> Tensor:
    """``Σ WᵀW`` over a stream's edited layers, ``(d, d)`` fp64: the metric of text states as the outputs see it."""
    device = model.device if model.device.type == "cuda" else torch.device("cpu")
    entries = model.survey.edited(stream, projections)
    return gram_of((entry.weight for entry in entries), entries[0].width, device, torch.float32)


def solve_context_map(columns: Columns, settings: UCESettings, outputs: Tensor | None = None) -> LowRank:
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

    Returns:
        The factors, fp32, of the numerical rank under ``settings.tolerance``, at most ``settings.rank``.

    Raises:
        ForgetConceptError: The system cannot be solved.

    Reference:
        Gandikota et al., UCE, arXiv 2308.14761, equation 7.
    """
    device = columns.target.device
    target, guide = columns.target.double(), columns.guide.double()
    width, count = target.shape
    preserved = columns.preserved.T if settings.preserve_weight else columns.preserved.T[:0]
    eye = torch.eye(width, dtype=torch.float64, device=device)
    ridge = settings.ridge * (float(target.square().mean()) or 1.0)
    known = settings.erase_weight * gram_of([target.T], width, device)
    normal = ridge * eye + known + settings.preserve_weight * gram_of([preserved], width, device)
    factor = _cholesky(normal)
    if count + len(preserved) < width:
        scaled = torch.cat([settings.erase_weight**0.5 * target.T, settings.preserve_weight**0.5 * preserved.double()])
        small = ridge * torch.eye(len(scaled), dtype=torch.float64, device=device) + scaled @ scaled.T
        rows = torch.cholesky_solve(scaled, _cholesky(small))
        down = rows[:count] / settings.erase_weight**0.5
    else:
        down = torch.cholesky_solve(target, factor).T
    change = settings.erase_weight * (guide - target)
    # truncate M R in the metric of the projections' outputs
    seen = down @ factor
    if seen.shape[0] < width:  # M R has at most as many directions as columns, so the small problem suffices
        side, corner = torch.linalg.qr(seen.T)
        moved = change @ corner.T
    else:
        side, moved = eye, change @ seen
    gram = eye if outputs is None else outputs.to(device, torch.float64)
    values, vectors = torch.linalg.eigh(moved.T @ gram @ moved)
    size = values.clamp(min=0).sqrt().flip(0)
    # the Gram matrix squares singular values, so those below the square root of fp64's precision are rounding
    keep = int((size > size[0] * max(settings.tolerance, 1e-8)).sum()) if size[0] > 0 else 1
    keep = min(keep, settings.rank or keep)
    basis = vectors.flip(1)[:, :keep]
    up = moved @ basis
    down = torch.linalg.solve_triangular(factor, (side @ basis).T, upper=False, left=False)
    root = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-300)).clamp(min=1e-300).sqrt()
    return LowRank((up / root).float(), (down * root[:, None]).float())


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not torch.isfinite(factor).all():
        raise ForgetConceptError(
            "The closed form cannot be solved, because the text states are not finite or 'ridge' is too small: raise "
            "'ridge', or run the text encoder in full precision."
        )
    return factor
