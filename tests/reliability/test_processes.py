"""The program as a whole process: the same bytes from each, and none that is killed leaves half of anything."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forget_concept.core.formats import load_patch

KILLS = int(os.environ.get("FORGET_CONCEPT_KILLS", "20"))
FORGET = [sys.executable, "-m", "forget_concept.core.cli", "forget", "--concept", "star", "--replacement", "circle"]


def environment(**more: str) -> dict[str, str]:
    # threads are fixed: sums in another order differ in the last bits
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **more}


SAVE = """
import sys, torch
from forget_concept.core.formats import kohya
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_"
factors = {key + end: LowRank(torch.ones(4, 2), torch.ones(2, 3)) for end in "kv"}
request = ForgetRequest((Concept("star"),), settings={"ridge": 0.1, "contexts": True})
about = {"method": "uce", "request": request, "settings": {"a": 1, "b": 2}, "seed": 3, "family": "sd1"}
kohya.save(Patch(factors).with_metadata(**about), sys.argv[1])
"""


def test_the_same_patch_is_the_same_file_in_every_process(tmp_path):
    made = set()
    for seed in ("0", "12345"):
        out = tmp_path / seed / "p.safetensors"  # its name stands in the file
        out.parent.mkdir()
        command = [sys.executable, "-c", SAVE, str(out)]
        subprocess.run(command, env=environment(PYTHONHASHSEED=seed), check=True, timeout=300)
        made.add(out.read_bytes())
    assert len(made) == 1


@pytest.mark.long
def test_the_same_request_is_the_same_file_in_every_process(tmp_path):
    made = []
    for seed in ("0", "12345"):
        out = tmp_path / seed / "p.safetensors"  # its name stands in the file
        out.parent.mkdir()
        command = [*FORGET, "--out", str(out), "--seed", "3"]
        subprocess.run(command, env=environment(PYTHONHASHSEED=seed), check=True, timeout=300)
        made.append(out.read_bytes())
    assert made[0] == made[1] and load_patch(out).about.seed == 3


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is of POSIX")
def test_a_process_killed_at_any_time_leaves_the_old_file_or_the_new(tmp_path):
    """Kills at random times from the start of the interpreter on, each over a file that is there already."""
    out, work = tmp_path / "p.safetensors", tmp_path / "work"
    command = [*FORGET, "--out", str(out), "--work", str(work)]
    began = time.monotonic()
    subprocess.run(command, env=environment(), check=True, timeout=300)
    whole = time.monotonic() - began
    new = out.read_bytes()
    rng, states = random.Random(0), []
    for _ in range(KILLS):
        out.write_bytes(b"old")
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0, 1.1 * whole))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        found = out.read_bytes()
        assert found in (b"old", new)
        states.append(found == new)
    assert not all(states)
    subprocess.run(command, env=environment(), check=True, timeout=300)
    assert out.read_bytes() == new
    assert not [path for folder in (tmp_path, work) for path in Path(folder).rglob("*.part")]
    print(f"{KILLS} kills: {states.count(False)} left the old file, {states.count(True)} the new one")
