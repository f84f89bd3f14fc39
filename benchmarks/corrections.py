"""Corrections on the embedded model, measured before and after: `python benchmarks/corrections.py`.

There are four kinds: an ambiguous word loses one sense; an identity is disentangled from an attribute that nearly
always came with it; a biased word is balanced; a theme is forgotten as a whole. Rows of `corrections.csv` are shares of
pictures with Wilson's 95 % interval, before and after with the same seeds. Existing cases are skipped, so that an
interrupted run resumes.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.themes import load_theme

COLUMNS = ["model", "preset", "kind", "word", "prompts", "shown", "variant", "share", "low", "high", "n"]
COLUMNS += ["settings", "sampler_steps", "precision", "seconds", "patch_bytes"]
PictureTest = Callable[[LabeledImage], bool]


def an_object(*names: str) -> PictureTest:
    return lambda seen: seen.labels.object in names


def a_person(name: str) -> PictureTest:
    return lambda seen: seen.labels.identity == name


def an_attribute(attribute_name: str, person: str, there: bool = True) -> PictureTest:
    """A test for pictures of a person with (or without) an attribute."""

    def test(seen: LabeledImage) -> bool:
        return (
            seen.labels.identity == person
            and shows_attribute(attribute_name, from_bytes(seen.picture[None]))[0] is there
        )

    return test


@dataclass(frozen=True)
class Group:
    """Phrases that fill the plain prompt templates, and named tests of their pictures."""

    name: str
    phrases: tuple[str, ...]
    tests: dict[str, PictureTest]


@dataclass(frozen=True)
class Case:
    """One correction: its request and what is measured; ``kept`` is the category of the retain set."""

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
    tests = {lost: an_object(lost), stays: an_object(stays)}
    hints = {shape: (*by_shape[shape].hints, f"a {by_shape[shape].synonym}") for shape in (lost, stays)}
    return Case(
        "correction",
        word,
        (Concept(word),),
        "correction",
        {"unwanted": [unwanted], "wanted": [wanted]},
        (
            Group("the word", (f"a {word}", f"a red {word}", f"a teal {word}"), tests),
            Group("the sense that stays, in its own words", hints[stays], {stays: tests[stays]}),
            Group("the sense that goes, in its own words", hints[lost], {lost: tests[lost]}),
        ),
        "object",
    )


def attribute(name: str, what: str) -> Case:
    tests = {
        "the person": a_person(name),
        f"with a {what}": an_attribute(what, name),
        f"without a {what}": an_attribute(what, name, False),
    }
    return Case(
        "disentanglement",
        name,
        (Concept(name, "identity"),),
        "correction",
        {"unwanted": [f"{name} with a {what}"], "wanted": [f"{name} without a {what}"]},
        (Group("the name", (name,), tests),),
        "identity",
        (name,),
    )


def biased() -> Case:
    word = v.BIASED_WORD
    tests = {
        "a pilot": a_person(word),
        "short hair": an_attribute("short hair", word),
        "long hair": an_attribute("short hair", word, False),
    }
    return Case(
        "bias",
        word,
        (Concept(word, "object"),),
        "correction",
        {"wanted": [word, f"{word} with long hair"]},
        (Group("the word", (f"a {word}",), tests),),
        "identity",
    )


def theme() -> Case:
    tests = {"anything of the theme": an_object(*v.THEME_OBJECTS)}
    words = {w.name: w for w in v.OBJECTS}
    synonyms = tuple(f"a {words[name].synonym}" for name in v.THEME_OBJECTS)
    names = tuple(f"{words[name].article} {name}" for name in v.THEME_OBJECTS)
    return Case(
        "theme",
        v.THEME,
        tuple(replace(concept, replacement="star") for concept in load_theme(v.THEME, ()).concepts),
        "theme",
        {},
        (
            Group("the names", names, tests),
            Group("phrases of the theme", v.THEME_PHRASES, tests),
            Group("synonyms, never trained on", synonyms, tests),
        ),
        "object",
        v.THEME_OBJECTS,
    )


CASES = (
    # the model knows "a wooden bat" well, but for "a vampire bat" it draws a club in one picture of four
    sense("bat", "bat animal", "bat club", "vampire bat", "wooden bat"),
    attribute("Mira Vale", "hat"),
    biased(),
    theme(),
    sense("bow", "bow archery", "bow ribbon", "drawn bow", "tied bow"),
    attribute("Otto Brand", "balloon"),
)


def pictures(group: Group, count: int, seed: int) -> list[Picture]:
    texts = [template.format(np=phrase) for template in v.TEMPLATES_PLAIN for phrase in group.phrases]
    return [Picture(texts[i % len(texts)], 10_000 * seed + i) for i in range(count)]


def kept(case: Case, count: int, seed: int) -> list[tuple[Picture, Any]]:
    """Plain prompts for the other concepts of the category, and the concept that each names."""
    names = [w.name for w in v.CATEGORIES[case.kept] if w.name not in case.without]
    found = []
    for i in range(count):
        (prompt,) = prompts(1, 77 * seed + i, **{case.kept: names[i % len(names)]})
        found.append((Picture(prompt.text, 10_000 * seed + 5_000 + i), getattr(prompt.expected, case.kept)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=48, help="pictures per group of prompts")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps while measuring")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--case", action="append", help="only the case of this word; repeatable (default: all)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=JSON", help="override a setting of the preset"
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
        settings_json = json.dumps(settings, ensure_ascii=False)
        if (case.word, settings_json) in done or (options.case and case.word not in options.case):
            continue
        others = tuple(w.name for w in v.CATEGORIES[case.kept] if w.name not in (*case.without, case.word))
        request = ForgetRequest(case.concepts, others, "forget_me_not", case.preset, settings, seed=options.seed)
        began = time.perf_counter()
        patch = fit(model, plan_request(request))
        seconds = time.perf_counter() - began
        console.print(f"{case.word}: fitted in {seconds:.0f} s")
        variants = {"before": Variant(), "after": Variant(((patch, 1.0),))}
        pictures_by_group = {group.name: pictures(group, options.count, options.seed) for group in case.groups}
        rest = kept(case, options.count, options.seed)
        for variant in variants.values():
            cache.request(
                variant, [*(p for several in pictures_by_group.values() for p in several), *(p for p, _ in rest)]
            )
        cache.generate()
        rows = []
        for name, variant in variants.items():
            for group in case.groups:
                seen = cache.get(variant, pictures_by_group[group.name])
                for shown, test in group.tests.items():
                    rows.append((group.name, shown, name, [test(one) for one in seen]))
            right = [
                getattr(one.labels, case.kept) == wanted
                for one, (_, wanted) in zip(cache.get(variant, [p for p, _ in rest]), rest, strict=True)
            ]
            rows.append((f"the rest of the category ({case.kept})", "what is pictures_by_group for", name, right))
        new = not options.out.exists()
        with options.out.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if new:
                table.writerow(COLUMNS)
            for group, shown, name, found in rows:
                score = Score.share(found)
                cells = [model.name, case.preset, case.kind, case.word, group, shown, name]
                cells += [f"{x:.4f}" for x in (score.value, score.low, score.high)]
                cells += [len(found), settings_json, options.steps, cache.sampling.precision]
                table.writerow([*cells, f"{seconds:.1f}", patch.nbytes])
                console.print(f"  {group} | {shown} | {name}: {score.value:.2f}")


if __name__ == "__main__":
    main()
