"""What a word shows before and after a correction, on the embedded model: `python benchmarks/corrections.py`.

Four kinds: a word of two senses loses one; an identity loses what nearly always came with it; a biased word is made
even; a theme goes as a whole. Rows of `corrections.csv` are shares of pictures with Wilson's 95 % interval, before and
after on the same seeds; a kind that is in the file already is left out, so that a run goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from forget_concept.core import mini
from forget_concept.core.evaluation import LabeledImage, Picture, SampleCache, SamplingSettings, Score, Variant
from forget_concept.core.evaluation.attributes import shows_attribute
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini import vocabulary as v
from forget_concept.core.mini.world import prompts
from forget_concept.core.models.images import from_bytes
from forget_concept.core.prompts.themes import theme as named_theme
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

COLUMNS = ["model", "preset", "kind", "word", "prompts", "shown", "variant", "share", "low", "high", "n"]
COLUMNS += ["settings", "sampler_steps", "precision", "seconds", "patch_bytes"]
Sees = Callable[[LabeledImage], bool]


def an_object(*names: str) -> Sees:
    return lambda seen: seen.labels.object in names


def a_person(name: str) -> Sees:
    return lambda seen: seen.labels.identity == name


def a_sign(sign: str, person: str, there: bool = True) -> Sees:
    """A picture of the person with (or without) what the sign stands for."""

    def sees(seen: LabeledImage) -> bool:
        return seen.labels.identity == person and shows_attribute(sign, from_bytes(seen.picture[None]))[0] is there

    return sees


@dataclass(frozen=True)
class Group:
    """Prompts (``{}`` is left to the plain templates) and what is looked for in their pictures, by name."""

    name: str
    phrases: tuple[str, ...]
    looks: dict[str, Sees]


@dataclass(frozen=True)
class Case:
    """One correction: how it is asked for and what is measured; ``kept`` is the category the rest is checked in."""

    kind: str
    word: str
    concepts: tuple[Concept, ...]
    preset: str
    settings: dict[str, Any]
    groups: tuple[Group, ...]
    kept: str
    without: tuple[str, ...] = field(default=())


def sense(word: str, lost: str, stays: str, unwanted: str, wanted: str) -> Case:
    by_shape = {s.shape: s for s in v.SENSES}
    looks = {lost: an_object(lost), stays: an_object(stays)}
    hints = {shape: (*by_shape[shape].hints, f"a {by_shape[shape].synonym}") for shape in (lost, stays)}
    return Case(
        "correction",
        word,
        (Concept(word),),
        "correction",
        {"unwanted": [unwanted], "wanted": [wanted]},
        (
            Group("the word", (f"a {word}", f"a red {word}", f"a teal {word}"), looks),
            Group("the sense that stays, in its own words", hints[stays], {stays: looks[stays]}),
            Group("the sense that goes, in its own words", hints[lost], {lost: looks[lost]}),
        ),
        "object",
    )


def attribute(name: str, what: str) -> Case:
    looks = {
        "the person": a_person(name),
        f"with a {what}": a_sign(what, name),
        f"without a {what}": a_sign(what, name, False),
    }
    return Case(
        "disentanglement",
        name,
        (Concept(name, "identity"),),
        "correction",
        {"unwanted": [f"{name} with a {what}"], "wanted": [f"{name} without a {what}"]},
        (Group("the name", (name,), looks),),
        "identity",
        (name,),
    )


def biased() -> Case:
    word = v.BIASED_WORD
    looks = {
        "a pilot": a_person(word),
        "short hair": a_sign("short hair", word),
        "long hair": a_sign("short hair", word, False),
    }
    return Case(
        "bias",
        word,
        (Concept(word, "object"),),
        "correction",
        {"wanted": [word, f"{word} with long hair"]},
        (Group("the word", (f"a {word}",), looks),),
        "identity",
    )


def theme() -> Case:
    looks = {"anything of the theme": an_object(*v.THEME_OBJECTS)}
    words = {w.name: w for w in v.OBJECTS}
    synonyms = tuple(f"a {words[name].synonym}" for name in v.THEME_OBJECTS)
    names = tuple(f"{words[name].article} {name}" for name in v.THEME_OBJECTS)
    return Case(
        "theme",
        v.THEME,
        named_theme(v.THEME, "star"),
        "theme",
        {},
        (
            Group("the names", names, looks),
            Group("phrases of the theme", v.THEME_PHRASES, looks),
            Group("synonyms, never trained on", synonyms, looks),
        ),
        "object",
        v.THEME_OBJECTS,
    )


CASES = (
    # the model knows "a wooden bat" well; of "a vampire bat" it draws a club in one of four
    sense("bat", "bat animal", "bat club", "vampire bat", "wooden bat"),
    attribute("Mira Vale", "hat"),
    biased(),
    theme(),
    sense("bow", "bow archery", "bow ribbon", "drawn bow", "tied bow"),
    attribute("Otto Brand", "balloon"),
)


def pictures(group: Group, count: int, seed: int) -> list[Picture]:
    said = [template.format(np=phrase) for template in v.TEMPLATES_PLAIN for phrase in group.phrases]
    return [Picture(said[i % len(said)], 10_000 * seed + i) for i in range(count)]


def kept(case: Case, count: int, seed: int) -> list[tuple[Picture, Any]]:
    """Prompts in plain words about the rest of the category, and what each asks for."""
    names = [w.name for w in v.CATEGORIES[case.kept] if w.name not in case.without]
    found = []
    for i in range(count):
        (asked,) = prompts(1, 77 * seed + i, **{case.kept: names[i % len(names)]})
        found.append((Picture(asked.text, 10_000 * seed + 5_000 + i), getattr(asked.expected, case.kept)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=48, help="pictures of every group of prompts")
    parser.add_argument("--steps", type=int, default=16, help="steps of the sampler that is measured with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--case", action="append", help="only these words (default: all)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=JSON", help="a setting in place of the preset's"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("corrections.csv"))
    options = parser.parse_args()
    console = Console(stderr=True)
    changes = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in options.set)}
    done = set()
    if options.out.exists():
        with options.out.open(encoding="utf-8") as file:
            done = {(row["word"], row["settings"]) for row in csv.DictReader(file)}
    model, probe = mini.load(), mini.load_probe()
    cache = SampleCache(model, probe, SamplingSettings(steps=options.steps, precision=options.precision, batch=16))
    for case in CASES:
        settings = case.settings | changes
        told = json.dumps(settings, ensure_ascii=False)
        if (case.word, told) in done or (options.case and case.word not in options.case):
            continue
        others = tuple(w.name for w in v.CATEGORIES[case.kept] if w.name not in (*case.without, case.word))
        request = ForgetRequest(case.concepts, others, "forget_me_not", case.preset, settings, seed=options.seed)
        began = time.perf_counter()
        patch = fit(model, plan_request(request))
        seconds = time.perf_counter() - began
        console.print(f"{case.word}: fitted in {seconds:.0f} s")
        variants = {"before": Variant(), "after": Variant(((patch, 1.0),))}
        asked = {group.name: pictures(group, options.count, options.seed) for group in case.groups}
        rest = kept(case, options.count, options.seed)
        for variant in variants.values():
            cache.request(variant, [*(p for several in asked.values() for p in several), *(p for p, _ in rest)])
        cache.generate()
        rows = []
        for name, variant in variants.items():
            for group in case.groups:
                seen = cache.get(variant, asked[group.name])
                for shown, sees in group.looks.items():
                    rows.append((group.name, shown, name, [sees(one) for one in seen]))
            right = [
                getattr(one.labels, case.kept) == wanted
                for one, (_, wanted) in zip(cache.get(variant, [p for p, _ in rest]), rest, strict=True)
            ]
            rows.append((f"the rest of the category ({case.kept})", "what is asked for", name, right))
        new = not options.out.exists()
        with options.out.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if new:
                table.writerow(COLUMNS)
            for group, shown, name, found in rows:
                score = Score.share(found)
                cells = [model.name, case.preset, case.kind, case.word, group, shown, name]
                cells += [f"{x:.4f}" for x in (score.value, score.low, score.high)]
                cells += [len(found), told, options.steps, cache.sampling.precision]
                table.writerow([*cells, f"{seconds:.1f}", patch.nbytes])
                console.print(f"  {group} | {shown} | {name}: {score.value:.2f}")


if __name__ == "__main__":
    main()
