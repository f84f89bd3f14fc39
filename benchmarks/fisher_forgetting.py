"""Effect of the Fisher estimator on the result: `python benchmarks/fisher_forgetting.py --precision bfloat16`.

`selective_amnesia` with its tuned settings forgets one concept, with the Fisher information of each estimator and
without any, all else equal. The exact value uses all time steps and therefore fewer samples, or it would take an hour;
`passes` is the number of UNet passes of each. The other columns are those of `methods.py`. Existing rows are not
computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from harness import RunProgress, SharedSampleCache, Table, costing
from methods import Fitted, embedded, measured
from runs import CONCEPTS, Run, fullest_request

from forget_concept.core.evaluation import PATCHED, SamplingSettings
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request

METHOD = "selective_amnesia"
# overrides of the preset, and the number of time steps per sample
KINDS = {
    "pairs": ({"fisher": "pairs"}, 8),
    "halves": ({"fisher": "halves"}, 8),
    "exact": ({"fisher": "exact", "fisher_samples": 4}, 1000),
    "none": ({"ewc_weight": 0.0}, 0),
}
MEASURES = ["ua", "ira", "cra", "drift", "seconds"]
KEY = ["model", "fisher", "concept", "seed", "n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fisher", action="append", choices=list(KINDS), help="only this estimator; repeatable (default: all)"
    )
    parser.add_argument("--concept", default="star", choices=[concept.name for concept in CONCEPTS])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default=SamplingSettings.precision, help="while measuring")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--work", type=Path, help="folder to cache the unedited model's pictures")
    options = parser.parse_args()
    table = Table(options.out, [*KEY, "passes", *MEASURES], KEY)
    model, probe, by = embedded(options.device)
    workspace = None if options.work is None else Workspace(options.work)
    cache = SharedSampleCache(model, probe, SamplingSettings(precision=options.precision), workspace, by)
    concept = next(c for c in CONCEPTS if c.name == options.concept)
    run = Run(METHOD, "tuned", "", concept, options.seed)
    kinds = options.fisher or list(KINDS)
    with RunProgress(len(kinds)) as progress:
        for kind in kinds:
            key = dict(zip(KEY, (model.name, kind, concept.name, options.seed, options.count), strict=True))
            if not table.has(key):
                progress.name = kind
                settings, steps = KINDS[kind]
                wanted = fullest_request(model, run)
                request = dataclasses.replace(wanted.request, settings=dict(wanted.request.settings) | settings)
                with costing(model) as cost:
                    patch = fit(model, plan_request(request), progress, wanted.inputs)
                samples = settings.get("fisher_samples", 96) if steps else 0
                made = Fitted(PATCHED, ((patch, 1.0),), cost)
                row = measured(model, probe, run, made, options.count, cache, progress)
                table.append(key | {"passes": steps * samples} | {name: row[name] for name in MEASURES})
                progress.say(f"{kind}: " + " ".join(f"{name} {row[name]:.3f}" for name in MEASURES))
            progress.done()


if __name__ == "__main__":
    main()
