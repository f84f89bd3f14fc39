"""A host's server for tests: started on loopback with the host's own interpreter, used over HTTP, stopped by pid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = os.environ.get("FORGET_CONCEPT_REQUIRE_HOSTS") == "1"


def own_python(host: Path, variable: str) -> Path | None:
    """The interpreter in the environment variable ``variable``, else that of the host's own .venv or venv."""
    if named := os.environ.get(variable):
        return Path(named)
    tail = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    candidates = [host.joinpath(folder, *tail) for folder in (".venv", "venv")]
    return next((path for path in candidates if path.exists()), None)


def linked(source: Path, place: Path) -> None:
    """Link ``source`` to ``place``, as users install it; copied where links are not possible."""
    try:
        place.symlink_to(source, target_is_directory=True)
    except OSError:  # Windows without permission to create links
        shutil.copytree(source, place, ignore=shutil.ignore_patterns(".git", ".venv", "build"))


class Server:
    """One server process on ``port``, with its output in ``log``."""

    def __init__(self, what: str, log: Path) -> None:
        self.what, self.log = what, log
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def free_port(self) -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        return self.port

    def launch(
        self,
        command: list[str],
        folder: Path,
        environment: dict[str, str],
        sign: str,
        limit: float,
        marker: str = "",
    ) -> None:
        """Start the server; wait until its log contains ``marker`` and the path ``sign`` responds.

        Raises:
            RuntimeError: If it exits, or does not respond within ``limit`` seconds.
        """
        quiet = {"PYTHONPATH": "", "LD_PRELOAD": "", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        quiet["PYTHONUNBUFFERED"] = "1"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **quiet, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + limit
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.what} exited during startup:\n{self.tail()}")
            try:
                if marker in self.log.read_text(encoding="utf-8", errors="replace"):
                    self.raw(sign)
                    return
            except (OSError, urllib.error.URLError):
                pass
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self.what} did not respond within {limit:.0f} s:\n{self.tail()}")
            time.sleep(0.2)

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    # -- requests ------------------------------------------------------------------------------------------------

    def send(self, request: Any, timeout: float = 60) -> bytes:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read()

    def raw(self, path: str) -> bytes:
        return self.send(f"http://127.0.0.1:{self.port}{path}")

    def get(self, path: str) -> Any:
        return json.loads(self.raw(path))

    def post(self, path: str, data: Any, timeout: float = 60) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        answer = self.send(request, timeout)
        return json.loads(answer) if answer else None
