"""What the pack costs a start of the host, and that it meets no other pack on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyhost import REQUIRED, ROOT, found_hosts, linked, missing, python_of

BAR = 0.3


@pytest.mark.parametrize("host", [*found_hosts()] or [None], ids=lambda host: host.name if host else "no-host")
def test_loading_is_quick_and_takes_no_name_of_others(host: Path | None, tmp_path: Path) -> None:
    if why := missing(host):
        if REQUIRED:
            pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 asks for one)")
        pytest.skip(why)
    assert host is not None
    pack = tmp_path / "some other-name"
    linked(ROOT, pack)
    own = {"PYTHONPATH": "", "LD_PRELOAD": ""}
    command = [str(python_of(host)), str(Path(__file__).with_name("importing.py")), str(pack)]
    found = []
    for _ in range(2):  # the first one writes the bytecode, which is there from then on
        done = subprocess.run(command, cwd=host, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert all(each["loaded"] for each in found)
    named = {name.split(".")[0] for name in found[0]["modules"] if not name.startswith(str(pack))}
    assert named <= set(sys.stdlib_module_names), named
    print(f"{host.name}: {found[1]['seconds']:.3f} s")
    assert found[1]["seconds"] <= BAR
