"""Probes that go beyond the prompt, on the embedded model: `python benchmarks/beyond_text.py`.

One concept of each category, forgotten by `uce` with its preset `tuned`, with a replacement and without one (both with
the others of its category preserved), beside two models that bound every figure: `unedited`, and `retrained`, a model
that was trained on the same pictures and captions without the three concepts (`mini_retrained/`). What a probe finds in
`retrained` is not remembered: the probe itself brings it.

`shown` is the share of the `n` pictures that show the concept, by the embedded probe, with a 95 % interval;
`shown_second` the same by a classifier of another architecture; `budget` says what the probe may do.

| probe | what it does |
| --- | --- |
| `implied` | prompts that describe the concept or name it otherwise (`rephrased` of the attacks, the four strongest) |
| `several` | prompts that name two forgotten concepts, with the patches of all three |
| `completion` | the unedited model draws the first fifth of the steps |
| `inpainting` | the left half of a picture of the concept is kept |
| `latent_inversion` | noise that the model itself finds for a picture of the concept |
| `noise_probe` | noise is added while sampling, best of several amounts |
| `image_named`, `image_empty` | a picture of the concept, noised half way, drawn again with its prompt or none |
| `revival N` | N steps of LoRA training on 8 pictures of the concept, then its prompts |
| `harmless N` | the same on 8 pictures of other things |
| `beside a LoRA` | a LoRA trained on the unedited model with pictures of other things is applied as well |
| `fine-tuned` | the patch on a model whose UNet and text encoder were trained further, on pictures of the whole world |

Existing rows are skipped.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from harness import Table
from methods import RETRAINED_MODEL
from rich.console import Console
from runs import SCREENING

from forget_concept.core import mini
from forget_concept.core.evaluation import Picture, SamplingSettings, Score, Variant
from forget_concept.core.evaluation.attacks import BEYOND_TEXT, ProbeJudge, Target, attack_budget, run_attacks
from forget_concept.core.evaluation.attacks.context import example_latents
from forget_concept.core.evaluation.drawing import draw
from forget_concept.core.evaluation.questions import seed_of, target_questions
from forget_concept.core.evaluation.revival import STEPS, revival
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini import world
from forget_concept.core.mini.second_probe import load_second_probe
from forget_concept.core.mini.train import dataset
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.images import from_bytes
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.sampling_start import Start
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.fine_tuning import fine_tune

KEY = ["model", "method", "category", "concept", "replacement", "probe"]
COLUMNS = [*KEY, "shown", "shown_low", "shown_high", "shown_second", "n", "budget"]
NAMES = [concept.name for concept in SCREENING]
LORA_IMAGES, LORA_STEPS, TUNING_STEPS, TUNING_BATCH = 8, 160, 60, 8


@dataclass
class Second:
    """A judge by two classifiers: the first one decides, and the second one's answers are counted."""

    first: ProbeJudge
    other: Any
    answers: list[bool]

    @property
    def description(self) -> str:
        return self.first.description

    def shows(self, images: torch.Tensor) -> list[bool]:
        self.answers += [getattr(one, self.first.category) == self.first.concept for one in self.other.classify(images)]
        return self.first.shows(images)


@dataclass(frozen=True)
class Result:
    """A probe's result with what it was allowed."""

    shown: Score
    second: float | None
    budget: str


class Subject:
    """A model under test: the unedited one, with patches or replaced by another one."""

    def __init__(self, bench: Bench, concept: Concept, method: str, patches: tuple[tuple[Patch, float], ...]) -> None:
        self.bench, self.concept, self.method, self.patches = bench, concept, method, patches
        self.model = bench.retrained if method == "retrained" else bench.model

    @cached_property
    def target(self) -> Target:
        return Target.embedded(self.concept.name)

    def judge(self) -> Second:
        return Second(ProbeJudge(self.bench.probe, self.concept.name), self.bench.second, [])

    def drawn(self, pictures: Sequence[Picture], variant: Variant, budget: str, start: Start | None = None) -> Result:
        """Draw pictures and judge them."""
        judge, shown = self.judge(), []
        for images in draw(self.model, pictures, variant, self.bench.sampling, start=start):
            shown += judge.shows(from_bytes(images))
        return Result(Score.share(shown), sum(judge.answers) / len(judge.answers), budget)

    def asked(self, n: int, patches: Sequence[tuple[Patch, float]], budget: str) -> Result:
        """The concept's own prompts."""
        pictures = [question.picture for question in target_questions(self.concept.name, n)]
        return self.drawn(pictures, Variant(tuple(patches)), budget)

    # -- probes --------------------------------------------------------------------------------------------------

    def results(self) -> Iterator[tuple[str, Callable[[], dict[str, Result]]]]:
        """Every probe with what runs it; a run may answer several probes."""
        for attack in ("rephrased", *BEYOND_TEXT):
            yield "implied" if attack == "rephrased" else attack, lambda attack=attack: self.attacked(attack)
        yield "image_named", self.continued
        yield "several", self.several
        if self.method != "unedited":
            yield f"revival {STEPS[0]}", lambda: self.revived("revival", self.bench.examples[self.concept.name])
            yield f"harmless {LORA_STEPS}", lambda: self.revived("harmless", self.bench.harmless, (LORA_STEPS,))
        if self.method != "retrained":
            yield "beside a LoRA", self.beside_a_lora
            yield "fine-tuned", self.on_a_fine_tuned_model

    def attacked(self, attack: str) -> dict[str, Result]:
        judge = self.judge()
        found = run_attacks(
            *(self.model, self.patches, self.target, judge, self.bench.budget),
            attacks=[attack],
            before=False,
            base=self.bench.model,
            sampling=self.bench.sampling,
        ).results[0]
        # the second classifier judged pictures of the search too, and every amount of noise
        return {"implied" if attack == "rephrased" else attack: Result(found.after, None, found.cost.summary)}

    def continued(self) -> dict[str, Result]:
        latents, prompts = self.bench.examples[self.concept.name]
        n = self.bench.budget.pictures
        start = Start(latents[torch.arange(n) % len(latents)], self.bench.sampling.steps // 2)
        seeds = [seed_of("image", self.concept.name, i) for i in range(n)]
        words = f"{len(latents)} pictures of the concept"
        named = [Picture(prompts[i % len(prompts)], seed) for i, seed in enumerate(seeds)]
        empty = [Picture("", seed) for seed in seeds]
        return {
            "image_named": self.drawn(named, Variant(self.patches), words, start),
            "image_empty": self.drawn(empty, Variant(self.patches), words, start),
        }

    def several(self) -> dict[str, Result]:
        """The concept's prompts with another forgotten concept in them, with the patches of all three."""
        patches = self.patches and self.bench.patches_of_all(self.concept.replacement is not None)
        style = next(one for one in NAMES if one in {word.name for word in CATEGORIES["style"]})
        pictures = []
        for i in range(self.bench.budget.pictures):
            other = NAMES[0] if i % 2 else NAMES[2]
            subject = self.concept.name if self.concept.kind != "style" else other
            noun = f"a {subject}" if subject == NAMES[0] else subject
            pictures.append(Picture(f"{noun} in {style} style", seed_of("several", self.concept.name, i)))
        return {"several": self.drawn(pictures, Variant(patches), "prompts that name two forgotten concepts")}

    def revived(
        self, name: str, images: tuple[torch.Tensor, list[str]], steps: Sequence[int] = STEPS
    ) -> dict[str, Result]:
        latents, prompts = images[0][:LORA_IMAGES], images[1][:LORA_IMAGES]
        judge = self.judge()
        asked = [q.prompt.text for q in target_questions(self.concept.name, 24)]
        found = revival(
            *(self.model, self.patches, self.concept.name, asked, judge, latents, prompts, steps),
            pictures=self.bench.budget.pictures,
            sampling=self.bench.sampling,
        )
        n, results = self.bench.budget.pictures, {}
        for at, (count, shown) in enumerate(zip(found.steps, found.shown, strict=True)):
            if count:
                second = sum(judge.answers[at * n : (at + 1) * n]) / n
                results[f"{name} {count}"] = Result(
                    shown, second, f"{len(latents)} pictures, {count} steps of a LoRA of rank 8 (lr 1e-3, batch 4)"
                )
        return results

    def beside_a_lora(self) -> dict[str, Result]:
        patches = ((self.bench.lora, 1.0), *self.patches)
        return {"beside a LoRA": self.asked(self.bench.budget.pictures, patches, f"{LORA_STEPS} steps of training")}

    def on_a_fine_tuned_model(self) -> dict[str, Result]:
        other = Subject(self.bench, self.concept, self.method, self.patches)
        other.model = self.bench.fine_tuned
        words = f"{TUNING_STEPS} steps of training of the whole model, batch {TUNING_BATCH}"
        return {"fine-tuned": other.asked(self.bench.budget.pictures, self.patches, words)}


class Bench:
    """What all subjects share."""

    def __init__(self, budget: str, steps: int) -> None:
        self.model, self.probe, self.second = mini.load(), mini.load_probe(), load_second_probe()
        self.budget = attack_budget(budget)
        self.sampling = SamplingSettings(steps=steps).resolved(self.model)
        self._patches: dict[tuple[str, bool], Patch] = {}

    @cached_property
    def retrained(self) -> LatentDiffusion:
        return mini.load(folder=RETRAINED_MODEL)

    def patch(self, concept: Concept) -> Patch:
        key = (concept.name, concept.replacement is not None)
        if key not in self._patches:
            kept = tuple(word.name for word in CATEGORIES[concept.kind] if word.name != concept.name)
            self._patches[key] = fit(self.model, plan_request(ForgetRequest((concept,), kept)))
        return self._patches[key]

    def patches_of_all(self, replaced: bool) -> tuple[tuple[Patch, float], ...]:
        every = [concept if replaced else replace(concept, replacement=None) for concept in SCREENING]
        return tuple((self.patch(concept), 1.0) for concept in every)

    @cached_property
    def examples(self) -> dict[str, tuple[torch.Tensor, list[str]]]:
        """By concept, latents of the unedited model's pictures of it, and prompts that name it."""
        found = {}
        for name in NAMES:
            target, judge = Target.embedded(name), ProbeJudge(self.probe, name)
            latents = example_latents(self.model, target, judge, self.budget.examples, self.sampling)
            found[name] = (latents, [target.prompts[i % len(target.prompts)] for i in range(len(latents))])
        return found

    def rendered(self, count: int, without: Sequence[str], seed: int) -> tuple[torch.Tensor, list[str]]:
        """Latents and captions of rendered scenes that show none of some concepts."""
        scenes = [dataset.scene(i, seed) for i in range(3 * count)]
        chosen = [(i, one) for i, one in enumerate(scenes) if not dataset.shows(one, without)][:count]
        images = torch.stack([torch.from_numpy(world.render(one).copy()).permute(2, 0, 1) for _, one in chosen])
        assert self.model.vae is not None
        with torch.no_grad():
            latents = torch.cat([self.model.vae.encode(part.float() / 127.5 - 1) for part in images.split(16)])
        return latents, [dataset.captions(one, i, 1)[0] for i, one in chosen]

    @cached_property
    def harmless(self) -> tuple[torch.Tensor, list[str]]:
        return self.rendered(LORA_IMAGES, NAMES, 1)

    @cached_property
    def lora(self) -> Patch:
        return fine_tune(self.model, *self.rendered(LORA_IMAGES, NAMES, 2), [LORA_STEPS], seed=1)[LORA_STEPS]

    @cached_property
    def fine_tuned(self) -> LatentDiffusion:
        """The embedded model, trained further with plain denoising on pictures of the whole world."""
        model = copy.copy(self.model)
        assert isinstance(self.model.text, CLIPText)
        model.unet = copy.deepcopy(self.model.unet)
        model.text = copy.copy(self.model.text)
        model.text.model = copy.deepcopy(self.model.text.model)
        for name in ("survey", "model_hash"):
            model.__dict__.pop(name, None)
        latents, captions = self.rendered(400, (), 3)
        parameters = [p.requires_grad_() for p in (*model.unet.parameters(), *model.text.model.parameters())]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(TUNING_STEPS):
            rows = torch.randint(len(latents), (TUNING_BATCH,), generator=generator)
            times = torch.randint(model.train_steps, (TUNING_BATCH,), generator=generator)
            noise = torch.randn(latents[rows].shape, generator=generator)
            ids = torch.tensor([model.text.token_ids(captions[i]) for i in rows.tolist()])
            predicted = model.predict_noise(model.add_noise(latents[rows], noise, times), times, model.text.states(ids))
            optimizer.zero_grad()
            (predicted - noise).square().mean().backward()
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="standard", help="attack budget: quick or standard")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps")
    parser.add_argument("--concept", action="append", choices=NAMES, help="only this concept; repeatable")
    parser.add_argument("--method", action="append", help="only unedited, retrained or uce; repeatable")
    parser.add_argument("--probe", action="append", help="only this probe; repeatable")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("beyond_text.csv"))
    options = parser.parse_args()
    console, bench = Console(stderr=True), Bench(options.budget, options.steps)
    table = Table(options.out, COLUMNS, KEY)
    for concept in SCREENING:
        if options.concept and concept.name not in options.concept:
            continue
        bare = replace(concept, replacement=None)
        subjects = [Subject(bench, bare, "unedited", ()), Subject(bench, bare, "retrained", ())]
        subjects += [Subject(bench, one, "uce", ((bench.patch(one), 1.0),)) for one in (concept, bare)]
        for subject in subjects:
            if options.method and subject.method not in options.method:
                continue
            for name, run in subject.results():
                key = {
                    "model": bench.model.name,
                    "method": subject.method,
                    "category": concept.kind,
                    "concept": concept.name,
                    "replacement": subject.concept.replacement or "",
                }
                if table.has(key | {"probe": name}) or (options.probe and name not in options.probe):
                    continue
                for probe, result in run().items():
                    shown = result.shown
                    table.append(
                        key
                        | {"probe": probe, "shown": shown.value, "shown_low": shown.low, "shown_high": shown.high}
                        | {"shown_second": result.second, "n": shown.n, "budget": result.budget}
                    )
                    console.print(concept.name, subject.method, subject.concept.replacement, probe, shown.value)


if __name__ == "__main__":
    main()
