"""A theme on the embedded model, before and after it is forgotten: `python benchmarks/themes.py --method uce`.

The request is what a person writes: the theme by its name, a replacement, and the words to keep. Rows of `themes.csv`
are shares of pictures with Wilson's 95 % interval: of a group of prompts (the names, phrases of the theme, synonyms)
and of each of its phrases, the pictures that show anything of the theme; of the other objects, the pictures that show
the one asked for.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

from corrections import kept, pictures, theme
from rich.console import Console

from forget_concept.core import mini
from forget_concept.core.evaluation import SampleCache, SamplingSettings, Score, Variant
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini import vocabulary as v
from forget_concept.core.request.request import ForgetRequest

COLUMNS = ["model", "theme", "method", "preset", "settings", "preserve", "prompts", "phrase", "variant"]
COLUMNS += ["share", "low", "high", "n", "sampler_steps", "precision", "seconds", "patch_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="uce")
    parser.add_argument("--preset", help="default: the preset 'theme' where the method has it, else 'tuned'")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="override a setting")
    parser.add_argument("--preserve", action="store_true", help="name all other objects as words to keep")
    parser.add_argument("--count", type=int, default=100, help="pictures per group of prompts")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps while measuring")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("themes.csv"))
    options = parser.parse_args()
    preset = options.preset or ("theme" if options.method == "forget_me_not" else "tuned")
    settings = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in options.set)}
    case, console = theme(), Console(stderr=True)
    others = tuple(w.name for w in v.CATEGORIES[case.kept] if w.name not in case.without) if options.preserve else ()
    request = ForgetRequest(
        (), others, options.method, preset, settings, seed=options.seed, theme=case.word, theme_replacement="star"
    )
    model, probe = mini.load(), mini.load_probe()
    began = time.perf_counter()
    patch = fit(model, plan_request(request, ()))
    seconds = time.perf_counter() - began
    console.print(f"{case.word} by {options.method}: fitted in {seconds:.0f} s")
    cache = SampleCache(model, probe, SamplingSettings(steps=options.steps, precision=options.precision, batch=16))
    variants = {"before": Variant(), "after": Variant(((patch, 1.0),))}
    asked = {group.name: pictures(group, options.count, options.seed) for group in case.groups}
    rest = kept(case, options.count, options.seed)
    for variant in variants.values():
        cache.request(variant, [*(picture for several in asked.values() for picture in several), *(p for p, _ in rest)])
    cache.generate()
    found: list[tuple[str, str, str, list[bool]]] = []
    for name, variant in variants.items():
        for group in case.groups:
            (test,) = group.tests.values()
            shows = [test(one) for one in cache.get(variant, asked[group.name])]
            found.append((group.name, "all", name, shows))
            for phrase in group.phrases:
                own = [shown for shown, one in zip(shows, asked[group.name], strict=True) if phrase in one.prompt]
                found.append((group.name, phrase, name, own))
        right = [
            one.labels.object == wanted
            for one, (_, wanted) in zip(cache.get(variant, [p for p, _ in rest]), rest, strict=True)
        ]
        found.append(("the other objects", "all", name, right))
    new = not options.out.exists()
    with options.out.open("a", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        if new:
            table.writerow(COLUMNS)
        for group_name, phrase, name, shows in found:
            score = Score.share(shows)
            cells = [model.name, case.word, options.method, preset, json.dumps(settings), "yes" if others else "no"]
            cells += [group_name, phrase, name, *(f"{x:.4f}" for x in (score.value, score.low, score.high))]
            table.writerow(
                [*cells, len(shows), options.steps, cache.sampling.precision, f"{seconds:.1f}", patch.nbytes]
            )
            console.print(f"  {group_name} | {phrase} | {name}: {score.value:.2f} of {len(shows)}")


if __name__ == "__main__":
    main()
