"""Run attacks on a forgotten concept and measure their success."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ...errors import ModelError, RequestError
from ...files.workspace import Workspace, key_of
from ...models.images import from_bytes
from ...models.latent_diffusion import LatentDiffusion
from ...models.text_encoders import CLIPText
from ...models.token_positions import end_position
from ...patch.patch import Patch
from ...progress import Progress, ProgressEvent, report_progress
from ..drawing import Picture, SamplingSettings, Variant, draw
from ..intervals import Score
from ..questions import seed_of
from .budget import AttackBudget, AttackCost, attack_budget
from .completion import completion
from .context import AttackContext, SearchResult, example_latents, with_hash_of
from .discrete import discrete
from .homoglyphs import homoglyphs, other_spellings
from .inpainting import inpainting
from .inversion_recall import inversion_recall
from .judge import SuccessJudge
from .latent_inversion import STEPS_FACTOR, latent_inversion
from .noise_probe import noise_probe
from .rephrased import rephrased
from .result import AttackReport, AttackResult, PromptSuccess
from .soft_prompt import soft_prompt
from .target import Target

__all__ = ["ATTACKS", "BEYOND_TEXT", "WHITE_BOX", "Search", "run_attacks"]

Search = Callable[[AttackContext, Progress | None], SearchResult]
ATTACKS: dict[str, Search] = {
    "rephrased": rephrased,
    "homoglyphs": homoglyphs,
    "discrete": discrete,
    "soft_prompt": soft_prompt,
    "inversion_recall": inversion_recall,
}
# those that need the model's gradients and pictures of the concept
WHITE_BOX = ("discrete", "soft_prompt", "inversion_recall")
# on request: they do not search for a prompt, but begin with images of the concept, or change the sampler
BEYOND_TEXT: dict[str, Search] = {
    "completion": completion,
    "inpainting": inpainting,
    "latent_inversion": latent_inversion,
    "noise_probe": noise_probe,
}
_SEARCHES = {**ATTACKS, **BEYOND_TEXT}
_NEED_IMAGES = (*WHITE_BOX, "inpainting", "latent_inversion")


def run_attacks(
    model: LatentDiffusion,
    edited: Variant | Sequence[tuple[Patch, float]],
    target: Target,
    judge: SuccessJudge,
    budget: str | AttackBudget = "quick",
    seed: int = 0,
    *,
    attacks: Sequence[str] | None = None,
    beyond_text: bool = False,
    images: Tensor | None = None,
    before: bool = True,
    base: LatentDiffusion | None = None,
    sampling: SamplingSettings | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> AttackReport:
    """Attack a patched model and measure how often the concept is recovered.

    The model is restored bit-exactly. The result is deterministic for a given seed and device.

    Args:
        model: The unedited model.
        edited: Patches, each with its strength. A :class:`Variant` may add a negative prompt or safety guidance, which
            apply to sampling; the searches use the patched model alone.
        target: The concept under attack.
        judge: Decides whether an image shows the concept.
        budget: Budget or its name.
        seed: Seed of searches and images.
        attacks: Names from :data:`ATTACKS` and :data:`BEYOND_TEXT`. Default: all of :data:`ATTACKS` that the model
            supports; the report gives the reason for each attack that is left out.
        beyond_text: Whether the default includes all of :data:`BEYOND_TEXT` too.
        images: The attacker's images of the concept ``(m, 3, H, W)`` in [-1, 1]. Default: sampled from the unedited
            model.
        before: Whether to attack the unedited model as well.
        base: The model before it forgot, if it is not ``model`` without the patches: it draws the images of the concept
            and the first steps of a completion.
        sampling: Sampling settings. Default: :class:`SamplingSettings`.
        workspace: Caches results, so that an interrupted run resumes.
        progress: Receives progress.

    Raises:
        PatchError: If a patch does not fit the model.
        RequestError: If an attack is unknown, or a requested attack lacks its inputs.
        ModelError: If a requested attack does not support the model's text encoder.
        ForgetConceptError: If the unedited model does not draw the concept.
        Cancelled: If ``progress`` cancels.
    """
    budget = attack_budget(budget)
    variant = edited if isinstance(edited, Variant) else Variant(tuple(edited))
    for patch, _ in variant.patches:
        patch.check_fits(model.survey)
    chosen, left_out = _select_attacks(model, target, attacks, beyond_text)
    sampling = (sampling or SamplingSettings()).resolved(model)
    if any(name in _NEED_IMAGES for name in chosen):
        examples, cost = budget.examples, 2 * sampling.steps * budget.examples
    else:
        examples, cost = 0, 0
    unedited = variant.key == Variant().key
    sides = [(Variant(), "the unedited model")] if before and not unedited else []
    sides.append((variant, "the unedited model" if unedited else "the edited model"))
    counts = {name: _prompts_of(name, model, target) for name in chosen}
    total = cost + len(sides) * sum(_cost(name, budget, sampling, counts[name]) for name in chosen)
    parts = _ProgressParts(progress, total)
    latents = torch.empty(0, *model.latent_shape)
    if examples:
        with parts.part(cost, f"sampling images of {target.concept.name}") as inner:
            latents = example_latents(
                base or model, target, judge, budget.examples, sampling, seed, workspace, inner, images
            )
    plain = AttackContext(model, Variant(), target, judge, latents, budget, sampling, seed, workspace, base)
    outcomes: dict[str, list[_Outcome]] = {name: [] for name in chosen}
    for on, which in sides:
        context = replace(plain, model=with_hash_of(model, on.patches), variant=on)
        for name in chosen:
            searching = _search_cost(name, budget, sampling)
            with parts.part(searching, f"{_display_name(name)} on {which}: searching") as inner:
                found = _SEARCHES[name](context, inner)
            drawing = _cost(name, budget, sampling, counts[name]) - searching
            with parts.part(drawing, f"{_display_name(name)} on {which}: drawing") as inner:
                outcomes[name].append(_measure_prompts(context, found, inner))
    results = []
    for name, found_on in outcomes.items():
        last = found_on[-1]
        first = found_on[0].success if before else None
        results.append(AttackResult(name, last.success, first, last.cost, last.strongest, last.losses))
    return AttackReport(target.concept.name, budget, seed, tuple(results), left_out)


def _display_name(name: str) -> str:
    return name.replace("_", " ")


def _select_attacks(
    model: LatentDiffusion, target: Target, attacks: Sequence[str] | None, beyond_text: bool
) -> tuple[tuple[str, ...], dict[str, str]]:
    default = tuple(_SEARCHES if beyond_text else ATTACKS)
    wanted = default if attacks is None else tuple(dict.fromkeys(attacks))
    if not wanted:
        raise RequestError(f"There is no attack to run: choose from {', '.join(_SEARCHES)}.")
    why: dict[str, str] = {}
    for name in wanted:
        if name not in _SEARCHES:
            raise RequestError(f"The attack '{name}' is not known: choose from {', '.join(_SEARCHES)}.")
        if name in WHITE_BOX and not isinstance(model.text, CLIPText):
            why[name] = f"it needs gradients through the text encoder, and {type(model.text).__name__} has none"
            if attacks is not None:
                raise ModelError(f"The attack '{name}' cannot run on '{model.name}': {why[name]}.")
        if name == "noise_probe" and model.prediction_type == "flow":
            why[name] = "a flow model's sampler adds no noise"
            if attacks is not None:
                raise ModelError(f"The attack '{name}' cannot run on '{model.name}': {why[name]}.")
        if name == "rephrased" and not target.paraphrases:
            why[name] = "no paraphrases were given"
            if attacks is not None:
                raise RequestError(f"The attack '{name}' cannot run on '{target.concept.name}': {why[name]}.")
        if name == "homoglyphs" and not other_spellings(model.text, target):
            why[name] = "the text encoder tokenizes every other spelling like the name itself, or truncates it"
            if attacks is not None:
                raise RequestError(f"The attack '{name}' cannot run on '{target.concept.name}': {why[name]}.")
    left = tuple(name for name in wanted if name not in why)
    if not left:
        raise RequestError(f"No attack on '{target.concept.name}' can run on this model: give paraphrases of it.")
    return left, why


# -- cost in images through the UNet ---------------------------------------------------------------------------------


def _prompts_of(name: str, model: LatentDiffusion, target: Target) -> int:
    if name == "rephrased":
        return len(target.paraphrases)
    if name == "homoglyphs":
        return len(other_spellings(model.text, target))
    return len(target.prompts)


def _search_cost(name: str, budget: AttackBudget, sampling: SamplingSettings) -> int:
    if name == "latent_inversion":
        return STEPS_FACTOR * sampling.steps * budget.examples
    if name == "completion":
        return 2 * sampling.steps * budget.pictures // 5
    # a backward pass costs about twice a forward pass
    if name == "discrete":
        return budget.rounds * budget.rows * (3 + budget.candidates)
    return 3 * budget.steps * budget.batch if name in WHITE_BOX else 0


def _cost(name: str, budget: AttackBudget, sampling: SamplingSettings, prompts: int) -> int:
    chosen = prompts * budget.trials if prompts > budget.strongest else 0
    times = STEPS_FACTOR if name in ("latent_inversion", "noise_probe") else 1
    times *= budget.noises if name == "noise_probe" else 1
    return _search_cost(name, budget, sampling) + 2 * sampling.steps * times * (chosen + budget.pictures)


class _ProgressParts:
    """Combines the progress of all parts of the work, weighted by their cost."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    @contextmanager
    def part(self, cost: int, message: str) -> Iterator[Progress]:
        start = self.done

        def inner(event: ProgressEvent) -> None:
            step = start + cost * min(event.step, event.total) // max(event.total, 1)
            report_progress(self.progress, ProgressEvent(step, self.total, event.loss, event.terms, message))

        inner(ProgressEvent(0, 1))
        yield inner
        self.done = start + cost
        inner(ProgressEvent(1, 1))


# -- measuring the prompts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    success: Score
    cost: AttackCost
    strongest: tuple[PromptSuccess, ...]
    losses: tuple[float, ...]


def _measure_prompts(context: AttackContext, found: SearchResult, progress: Progress) -> _Outcome:
    """Select the strongest prompts with a few images each, and measure these prompts with other seeds."""
    budget, prompts = context.budget, list(found.prompts)
    for prompt in prompts:
        end_position(found.model.text, prompt)  # raises TokenError if it is truncated
    first: list[Picture] = []
    if len(prompts) > budget.strongest:
        first = [
            Picture(prompt, seed_of("attack", "choose", context.seed, i))
            for prompt in prompts
            for i in range(budget.trials)
        ]
    total = len(first) + budget.pictures
    shown = _judge_pictures(context, found, first, progress, 0, total)
    hits = dict.fromkeys(prompts, 0)
    for picture, hit in zip(first, shown, strict=True):
        hits[picture.prompt] += hit
    best = sorted(prompts, key=lambda prompt: -hits[prompt])[: min(budget.strongest, budget.pictures)]
    second = [
        Picture(best[i % len(best)], seed_of("attack", "measure", context.seed, i)) for i in range(budget.pictures)
    ]
    shown = _judge_pictures(context, found, second, progress, len(first), total)
    each = [
        PromptSuccess(
            prompt,
            sum(hit for picture, hit in zip(second, shown, strict=True) if picture.prompt == prompt),
            sum(picture.prompt == prompt for picture in second),
        )
        for prompt in best
    ]
    each.sort(key=lambda one: -one.shown / max(one.pictures, 1))
    spent = AttackCost(found.gradient_steps, found.unet_passes, len(prompts), total * len(found.noises))
    return _Outcome(Score.share(shown), spent, tuple(each), found.losses)


def _judge_pictures(
    context: AttackContext,
    search: SearchResult,
    pictures: Sequence[Picture],
    progress: Progress,
    start: int,
    total: int,
) -> list[bool]:
    """Return whether each image shows the concept, with any of the search's noises; verdicts are cached."""
    if not pictures:
        return []
    model, s, key = search.model, search.sampling or context.sampling, ""
    begin = None
    if search.start is not None:
        latents = search.start.latents
        begin = replace(search.start, latents=latents[torch.arange(len(pictures)) % len(latents)])
    if context.workspace is not None:
        safe = context.variant.safe
        under = [context.variant.negative, None if safe is None else asdict(safe)]
        conditions = [s.steps, s.guidance, s.precision, s.sampler, model.device.type, context.judge.description, *under]
        samples = [[picture.prompt, picture.seed] for picture in pictures]
        beyond = [] if begin is None else [begin.latents, begin.first, begin.noised, begin.mask]
        beyond += [[one.eta, one.variance] for one in search.noises if one is not None]
        key = key_of("verdicts", model.model_hash, context.text_key, samples, conditions, *beyond)
        if (known := context.workspace.load("attack", key, {"shown": (len(pictures),)})) is not None:
            return known["shown"].tolist()
    found: list[list[bool]] = []

    def inner(event: ProgressEvent) -> None:
        size = min(s.batch, len(pictures) - len(found[-1]))
        at = (len(found) - 1) * len(pictures) + len(found[-1])
        done = start + (at + size * event.step / max(event.total, 1)) / len(search.noises)
        report_progress(progress, ProgressEvent(round(100 * done), 100 * total))

    for noise in search.noises:
        found.append([])
        for images in draw(model, pictures, context.variant, s, inner, begin, noise):
            found[-1] += map(bool, context.judge.shows(from_bytes(images)))
    shown = [any(tries) for tries in zip(*found, strict=True)]
    if context.workspace is not None:
        context.workspace.save("attack", key, {"shown": torch.tensor(shown)})
    return shown
