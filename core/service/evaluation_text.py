"""From a front's fields to an evaluation's benchmark and judges, and from its report to text and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..evaluation import find_concept
from ..evaluation.assess import Evaluators
from ..evaluation.attention_pictures import AttentionMap, AttentionPair, overlay
from ..evaluation.bench.concept_bench import ConceptBench, load_bench
from ..evaluation.judges import ClipJudge
from ..evaluation.metrics import TransformersClip
from ..evaluation.pictures import before_after
from ..evaluation.report import Report
from ..evaluation.report.verdict import fine_percent, percent, span, verdict
from ..evaluation.report.write import VARIANTS
from ..mini import load_probe
from ..models.images import from_pil

__all__ = [
    "attention_sheet",
    "attention_summary",
    "chosen_benchmark",
    "evaluation_summary",
    "evaluators",
    "known_only",
    "pairs",
    "sheet",
]

AUTOMATIC, WORLD = "automatic", "world"


def chosen_benchmark(chosen: str, embedded: bool, names: Sequence[str]) -> ConceptBench | None:
    """The benchmark with the user's name for it; ``None`` for the embedded model's own world.

    Raises:
        RequestError: For a benchmark that does not suit the model, and for concepts that it does not contain.
    """
    if chosen == AUTOMATIC:
        chosen = WORLD if embedded else "checkpoints"
    if not embedded and chosen != "checkpoints":
        raise RequestError(
            f"The benchmark '{chosen}' asks about the embedded model's own world, and this MODEL is another one: "
            "choose 'automatic' or 'checkpoints'."
        )
    if chosen == WORLD:
        for name in names:
            find_concept(name)
        return None
    bench = load_bench(chosen)
    for name in names:
        bench.find(name)
    return bench


def evaluators(embedded: bool, clip: str, bench: ConceptBench | None) -> Evaluators:
    """The judges of the pictures: the embedded model's probe, or for any other model a CLIP that is on this machine.

    Raises:
        RequestError: Where no CLIP is named.
        ModelError: Where it cannot be read.
    """
    if embedded or bench is None:
        with _own_random_numbers():
            return Evaluators.embedded(load_probe())
    if not clip.strip():
        raise RequestError(
            "There is no judge for this model: name a CLIP in 'clip_judge', a folder with one or the hub name of one "
            "that was downloaded before (such as openai/clip-vit-base-patch32). Only the embedded model has a judge of "
            "its own."
        )
    # on the CPU: the card's memory is the host's
    with _own_random_numbers():
        encoder = TransformersClip(clip.strip(), local_only=True)
    missing = {"FID, KID, LPIPS": "the networks that measure them are not loaded in a host"}
    return Evaluators(ClipJudge(encoder, bench.names()), image_text=encoder, missing=missing)


def _own_random_numbers() -> AbstractContextManager[None]:
    """Building a network draws initial weights, which are overwritten: leave the host's random state alone."""
    return torch.random.fork_rng(devices=[])


def known_only(names: Sequence[str], bench: ConceptBench | None) -> list[str]:
    """The ``names`` that the benchmark (``None``: the embedded model's world) can leave out of its retain set."""
    if bench is not None:
        return list(names)
    found = []
    for name in names:
        try:
            found.append(find_concept(name)[0])
        except RequestError:  # not part of the world
            continue
    return found


# -- text -----------------------------------------------------------------------------------------------------------

_PARTS = {
    "ua": "forgotten",
    "ira": "kept of its kind",
    "cra": "kept of other kinds",
    "cra_target": "kept beside it",
}

_PROMPTS = {"named": "prompts that name it", "empty": "the empty prompt"}


def evaluation_summary(report: Report, file: Path) -> str:
    """The verdict, the figures behind it, what was left out and why, and where the whole report is."""
    lines = [verdict(report).text]
    for one in report.evaluations:
        lines.append(f"{one.concept} ({one.category}), with 95 % intervals")
        for variant, scores in one.scores.items():
            figures = [(label, getattr(scores, part)) for part, label in _PARTS.items()]
            line = "; ".join(f"{label} {percent(s.value)} ({span(s)}, n {s.n})" for label, s in figures)
            lines.append(f"  {VARIANTS[variant]}: {line}")
    for found in report.outcomes:
        shown = [("the concept", found.shown), (found.name, found.replacement), ("nothing known", found.nothing)]
        shown.append(("another concept", found.other))
        parts = ", ".join(f"{name} {percent(score.value)}" for name, score in shown if score is not None)
        lines.append(f"prompts of {found.concept} show: {parts}")
    lines += [
        f"{again.concept}, {VARIANTS[again.variant]}: a second judge differs on {percent(again.differ.value)} and "
        f"finds it forgotten in {percent(again.ua.value)}"
        for again in report.second_judge
    ]
    lines += [
        f"pictures of {one.concept}, noised and drawn again with {_PROMPTS[one.prompt]}, show it in "
        f"{percent(one.before.value)} before, {percent(one.after.value)} after (n {one.after.n})"
        for one in report.image_to_image
    ]
    for attack in report.attacks:
        before = "" if attack.before is None else f"{percent(attack.before.value)} before, "
        lines.append(
            f"attack {attack.name} on {attack.concept}: shown again in {before}{percent(attack.after.value)} after "
            f"({span(attack.after)}, n {attack.after.n})"
        )
    lines += [f"M-Score of {one.concept}: {one.before:.3f} before, {one.after:.3f} after" for one in report.m_scores]
    lines += [
        f"{metric.name}: " + ", ".join(f"{value:.4g} {VARIANTS[name]}" for name, value in metric.values.items())
        for metric in report.metrics
    ]
    lines += [f"left out: {report.PARTS.get(part, part)}: {why}" for part, why in report.left_out.items()]
    lines += [f"judged by {report.provenance.measured['judge']}", f"report: {file}"]
    return "\n".join(lines)


def attention_summary(found: AttentionMap | AttentionPair, phrase: str) -> str:
    """How much attention the phrase gets, and what the colours mean."""
    if isinstance(found, AttentionMap):
        low, high = (float(value) for value in found.mass.aminmax())
        lines = [f"\u201c{phrase}\u201d gets {fine_percent(found.share)} of the attention"]
    else:
        low, high = found.scale
        lines = [
            f"\u201c{phrase}\u201d gets {fine_percent(found.before.share)} of the attention before, "
            f"{fine_percent(found.after.share)} with the patch"
        ]
    darkest, lightest = fine_percent(low), fine_percent(high)
    lines.append(f"darkest {darkest}, lightest {lightest} of the attention that a place of the picture pays")
    return "\n".join(lines)


# -- pictures -------------------------------------------------------------------------------------------------------


def sheet(report: Report) -> Tensor:
    """The pictures before and after as one, ``(1, h, w, 3)`` in [0, 1]."""
    return from_pil(before_after(report.evaluations, report.title)).movedim(0, -1)[None].float() / 255


def pairs(report: Report) -> tuple[list[dict[str, str]], Tensor]:
    """The pictures of :func:`sheet` one by one, ``(2 n, h, w, 3)`` in [0, 1]: before, after, before, ...

    Each pair has its ``prompt``, the ``concept`` that was measured, and whether the prompt names it (``asked``: "yes"
    or "no").
    """
    found = [
        ({"prompt": example.prompt, "concept": one.concept, "asked": asked}, (example.before, example.after))
        for one in report.evaluations
        for asked, examples in (("yes", one.target_examples), ("no", one.kept_examples))
        for example in examples
    ]
    pictures = [seen.picture for _, both in found for seen in both]
    stacked = torch.stack(pictures).movedim(1, -1).float() / 255 if pictures else torch.empty(0)
    return [caption for caption, _ in found], stacked


def attention_sheet(found: AttentionMap | AttentionPair) -> Tensor:
    """The overlays, ``(1 or 2, h, w, 3)`` in [0, 1]; both of a pair on one scale."""
    if isinstance(found, AttentionPair):
        overlays = list(found.overlays())
    else:
        low, high = (float(value) for value in found.mass.aminmax())
        overlays = [overlay(found.picture, found.mass, low, high)]
    return torch.stack(overlays).movedim(1, -1).float() / 255
