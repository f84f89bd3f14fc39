"""The text states that a closed form maps, and those that it keeps, as columns of matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import ModelError
from ..models.text_encoders import ENCODE_ROWS, CachedTokenizer, TextEncoder, encoded_batches, segments_of
from ..models.text_entries import POOLED, TOKENS
from ..models.text_states import TextStates
from ..models.token_positions import end_position, phrase_span, tail_positions
from ..progress import Progress, ProgressEvent, report_progress
from ..prompts.everyday import COMMON, CONTEXTS, overlaps
from ..prompts.pairs import mentions
from ..request.concept import Concept, normalized_phrase, templates
from ..request.request import ForgetRequest
from .mean_phrases import mean_phrases
from .uce_settings import UCESettings

__all__ = [
    "Columns",
    "aligned_positions",
    "collect_columns",
    "common_prompts",
    "guide_means",
]


@dataclass(frozen=True)
class Columns:
    """Text states as columns, in the text encoder's dtype; tens of thousands in fp64 would take hundreds of megabytes.

    Args:
        target: ``C``, the states to forget, ``(d, n)``.
        guide: ``G``, what each of them is mapped to, ``(d, n)``.
        preserved: ``K``, the states to preserve, ``(d, m)``.
        overshoot: Overshoot of each target, ``(n,)``; ``None``: that of the settings for all of them.
        concept: Index of each target's concept, ``(n,)``, or -1 where the settings' ``reach`` does not apply, because
            it is mapped to a mean; ``None``: it applies to none.
    """

    target: Tensor
    guide: Tensor
    preserved: Tensor
    overshoot: Tensor | None = None
    concept: Tensor | None = None

    def through(self, norm: nn.Module | None) -> Columns:
        """What a layer reads of the states behind a norm; ``None``: the states themselves."""
        if norm is None:
            return self
        device = next((p.device for p in norm.parameters()), self.target.device)
        with torch.no_grad():
            parts = [norm(part.T.to(device)).to(part).T for part in (self.target, self.guide, self.preserved)]
        return replace(self, target=parts[0], guide=parts[1], preserved=parts[2])


@dataclass(frozen=True)
class _Aligned:
    """Edited positions of a prompt; each has a position in every guide prompt, and is mapped to their mean."""

    prompt: str
    positions: tuple[int, ...]
    guides: tuple[tuple[str, tuple[int, ...]], ...]
    overshoot: float
    concept: int


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


def _pairs(
    encoder: TextEncoder, settings: UCESettings, target: tuple[str, str], guide: tuple[str, str]
) -> list[tuple[int, int]]:
    """Positions of a target prompt that are edited, and for each the position of the guide prompt it is mapped to."""
    (name, prompt), (phrase, guide_prompt) = target, guide
    end_position(encoder, prompt)  # raises if it is cut off
    start, width = phrase_span(encoder, name, prompt)
    if not phrase and settings.no_replacement == "empty":
        positions = _positions(encoder, name, prompt)
        aligned = [min(at, len(encoder.token_ids("")) - 1) for at in positions]
    else:
        positions, aligned = aligned_positions(encoder, target, guide)
    if settings.columns == "last":
        # without a phrase in its place: the state before the end, as in the authors' script
        last = start + width - 1
        return [(last, aligned[positions.index(last)] if phrase else max(end_position(encoder, guide_prompt) - 1, 0))]
    return list(zip(positions, aligned, strict=True))


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
        if overlaps(word, targets):
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


def _report_alignment(progress: Progress | None, of: int) -> None:
    """Report, and be cancelled, while prompts are tokenized, which takes seconds for hundreds of concepts.

    The bar stays at its beginning: it counts the prompts that are encoded.
    """
    report_progress(progress, ProgressEvent(0, of, message="aligning the prompts"))


def guide_means(
    encoder: TextEncoder, request: ForgetRequest, settings: UCESettings, progress: Progress | None = None
) -> dict[str, tuple[str, ...]]:
    """The phrases of :func:`mean_phrases`, of the concepts that the settings map to a mean."""
    if settings.no_replacement != "mean":
        return {}
    alone = [concept.name for concept in request.concepts if not _guide_phrase(concept, settings)]
    return mean_phrases(encoder, request, alone, lambda event: _report_alignment(progress, len(request.concepts)))


def collect_columns(
    encoder: TextEncoder,
    request: ForgetRequest,
    settings: UCESettings,
    progress: Progress | None = None,
    streams: Sequence[str] = (TOKENS,),
    means: Mapping[str, Sequence[str]] | None = None,
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
        means: By name of a concept the phrases whose mean it is mapped to (:func:`guide_means`).

    Returns:
        The columns by stream.

    Raises:
        TokenError: A prompt is cut off.
        ModelError: The pooled vectors are wanted, and the encoder gives none.
    """
    parts = [(first, CachedTokenizer(part)) for first, part in segments_of(encoder)]
    kinds = dict.fromkeys(concept.kind for concept in request.concepts)
    wordings = {kind: _templates(settings, kind, request) for kind in kinds}
    means = {} if means is None else means
    aligned: list[_Aligned] = []
    for i, concept in enumerate(request.concepts):
        _report_alignment(progress, len(request.concepts))
        index = -1 if concept.name in means else i
        phrases = means.get(concept.name, (_guide_phrase(concept, settings),))
        overshoot = settings.overshoot_mean if concept.name in means else settings.overshoot
        for template in wordings[concept.kind]:
            prompt = _fill(template, concept.name)
            for first, part in parts:
                guides = []
                for phrase in phrases:
                    guide = "" if not phrase and settings.no_replacement == "empty" else _fill(template, phrase)
                    at = _pairs(part, settings, (concept.name, prompt), (phrase, guide))
                    guides.append((guide, tuple(first + j for _, j in at)))
                aligned.append(_Aligned(prompt, tuple(first + k for k, _ in at), tuple(guides), overshoot, index))
    retain: dict[str, None] = {}
    for preserved_phrase in request.preserve:
        for templates_of_kind in wordings.values():
            for template in templates_of_kind:
                retain[_fill(template, preserved_phrase)] = None
    if settings.keep_common:
        retain |= dict.fromkeys(common_prompts(request, settings))
    retain |= dict.fromkeys(settings.preserve_prompts)
    retain.pop("", None)
    for prompt in retain:
        _report_alignment(progress, len(retain))
        for _, part in parts:
            end_position(part, prompt)  # raises if it is cut off
    # the retain set first, so that its states are one contiguous slice
    prompts = dict.fromkeys(
        (one.prompt, tuple(guide for guide, _ in one.guides), one.overshoot, one.concept) for one in aligned
    )
    about = [text for prompt, guides, _, _ in prompts for text in (prompt, *guides)]
    texts = list(dict.fromkeys(["", *retain, *about]))
    everyday = [prompt for _, prompt in _everyday_prompts(settings)] if settings.keep_common else []
    found, row = _encode(encoder, texts, everyday, progress), {text: i for i, text in enumerate(texts)}
    states, lengths = found.hidden, found.known()
    preserved = states[: 1 + len(retain)].flatten(0, 1)
    if settings.columns == "last":
        ends = [(i, first + end_position(part, text)) for i, text in enumerate(retain, 1) for first, part in parts]
        preserved = torch.cat([states[0, : lengths[0]], *(states[i, end - 1 : end] for i, end in ends)])
    elif found.lengths is not None:
        preserved = torch.cat([states[i, : lengths[i]] for i in range(1 + len(retain))])
    columns = {
        TOKENS: Columns(
            target=torch.cat([states[row[one.prompt], list(one.positions)] for one in aligned]).T,
            guide=torch.cat(_guide_states(aligned, states, row)).T,
            preserved=preserved.T,
            overshoot=torch.tensor([one.overshoot for one in aligned for _ in one.positions]),
            concept=torch.tensor([one.concept for one in aligned for _ in one.positions]),
        )
    }
    for stream in streams:
        if stream == TOKENS:
            continue
        vectors = found.pooled if stream == POOLED else found.mean()
        if vectors is None:
            raise ModelError(
                "This model also reads a vector of the whole prompt (as SDXL does), and the text encoder gives none: "
                "load the model with all of its text encoders, or set 'pooled' to no."
            )
        columns[stream] = Columns(
            target=vectors[[row[prompt] for prompt, _, _, _ in prompts]].T,
            guide=torch.stack([vectors[[row[guide] for guide in guides]].mean(0) for _, guides, _, _ in prompts]).T,
            preserved=vectors[: 1 + len(retain)].T,
            overshoot=torch.tensor([overshoot for _, _, overshoot, _ in prompts]),
            concept=torch.tensor([concept for _, _, _, concept in prompts]),
        )
    return columns


def _guide_states(aligned: Sequence[_Aligned], states: Tensor, row: dict[str, int]) -> list[Tensor]:
    """The guide states of each, ``(positions, d)``. Concepts of one kind share them where their names are as long."""
    found: dict[tuple[tuple[str, tuple[int, ...]], ...], Tensor] = {}
    for guides in dict.fromkeys(one.guides for one in aligned):
        each = [states[row[guide], list(positions)] for guide, positions in guides]
        found[guides] = each[0] if len(each) == 1 else torch.stack(each).mean(0)
    return [found[one.guides] for one in aligned]


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
            hidden, pooled = (_rows(part, len(texts), device) for part in (states.hidden, states.pooled))
            found = TextStates(hidden, pooled, torch.zeros(len(texts), dtype=torch.long))
        if (more := states.hidden.shape[1] - found.hidden.shape[1]) > 0:
            found = TextStates(pad(found.hidden, (0, 0, 0, more)), found.pooled, found.lengths)
        prompts = order[i * ENCODE_ROWS : (i + 1) * ENCODE_ROWS]
        wanted = [at for at, prompt in enumerate(prompts) if prompt in row]
        at = [row[prompts[i]] for i in wanted]
        found.hidden[at, : states.hidden.shape[1]] = states.hidden.detach()[wanted].to(found.hidden.device)
        if found.pooled is not None and states.pooled is not None:
            found.pooled[at] = states.pooled.detach()[wanted].to(found.pooled.device)
        known = states.known()
        assert found.lengths is not None
        found.lengths[at] = torch.tensor([known[one] for one in wanted], dtype=torch.long)
    assert found is not None  # the empty prompt is always among them
    whole = all(length == found.hidden.shape[1] for length in found.known())
    return TextStates(found.hidden, found.pooled) if whole else found


def _rows(part: Tensor | None, count: int, device: torch.device) -> Any:
    """Room for ``count`` rows of the shape of one of ``part``'s."""
    return None if part is None else part.new_zeros(count, *part.shape[1:], device=device)
