"""Cost of Forget Concept in a real ComfyUI on models of the published shapes, with random weights.

`python benchmarks/sizes.py --host ~/comfy/ComfyUI` starts that ComfyUI on a free port and fills `sizes.csv`, one row
per model, for the closed form with its preset `tuned`, which retains all everyday words and therefore encodes many
prompts. `seconds` is the best of `--runs`, from the request to the patched MODEL, without the text encoder, whose time
for the prompts of one run is `encoding_seconds`. `core_seconds` is the CPU time of the same run over all cores, which
other work on the machine does not affect; `share_seconds` is the additional time to compute the surviving share.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from harness import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "comfyui"))

from comfyhost import ComfyUI
from graphs import node

MEASURED = ["seconds", "core_seconds", "share_seconds", "encoding_seconds", "patch_bytes"]
COLUMNS = ["comfyui", "model", "method", "preset", "threads", "prompts", "rank", *MEASURED]
REQUEST = {"concept": "church", "preserve": "castle, house, tower, bridge"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, required=True, help="a ComfyUI with its own .venv or venv")
    parser.add_argument("--model", nargs="+", default=["sd15"], choices=["sd15", "sd15, inpainting", "sd21"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sizes.csv"))
    args = parser.parse_args()
    table = Table(args.out, COLUMNS, ["comfyui", "model", "threads"])
    version = (args.host / "comfyui_version.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'__version__ = "(.+)"', version)
    host = ComfyUI(args.host, Path(tempfile.mkdtemp(prefix="forget-concept-")))
    host.start({"OMP_NUM_THREADS": str(args.threads)})
    try:
        for model in args.model:
            row = {"comfyui": found, "model": model, "method": "uce", "preset": "tuned", "threads": args.threads}
            if table.has(row):
                continue
            inputs = REQUEST | {"runs": args.runs, "threads": args.threads, "nonce": 0}
            graph = {"load": node("ProbeTrueShape", kind=model)}
            graph["cost"] = node("ProbeCost", model=["load", 0], clip=["load", 1], **inputs)
            runs = host.run(graph, timeout=3600)["outputs"]["cost"]["cost"]
            best = min(runs, key=lambda run: run["seconds"])
            table.append(row | {name: best[name] for name in ["prompts", "rank", *MEASURED]})
    finally:
        host.stop()


if __name__ == "__main__":
    main()
