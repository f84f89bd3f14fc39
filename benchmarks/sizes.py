"""What Forget Concept costs in a real ComfyUI on models of the published shapes, with drawn weights.

`python benchmarks/sizes.py --host ~/comfy/ComfyUI` starts that ComfyUI on a free port and fills `sizes.csv`, a row a
model, with the instant method and its preset `tuned`: all everyday words are kept, which is what takes long to encode.
`seconds` is the best of `--runs`, from the request to the patched MODEL, without the text encoder: its time, for the
prompts of one run, is `encoding_seconds`. `core_seconds` is what the same run took of all cores, which other work on
the machine does not change; `share_seconds` is what telling the surviving share takes besides.
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
ASKED = {"concept": "church", "preserve": "castle, house, tower, bridge"}


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--host", type=Path, required=True, help="a ComfyUI with its own .venv or venv")
    told.add_argument("--model", nargs="+", default=["sd15"], choices=["sd15", "sd15, inpainting", "sd21"])
    told.add_argument("--runs", type=int, default=5)
    told.add_argument("--threads", type=int, default=2)
    told.add_argument("--out", type=Path, default=Path(__file__).with_name("sizes.csv"))
    args = told.parse_args()
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
            asked = ASKED | {"runs": args.runs, "threads": args.threads, "nonce": 0}
            graph = {"load": node("ProbeTrueShape", kind=model)}
            graph["cost"] = node("ProbeCost", model=["load", 0], clip=["load", 1], **asked)
            runs = host.run(graph, timeout=3600)["outputs"]["cost"]["cost"]
            best = min(runs, key=lambda run: run["seconds"])
            table.append(row | {name: best[name] for name in ["prompts", "rank", *MEASURED]})
    finally:
        host.stop()


if __name__ == "__main__":
    main()
