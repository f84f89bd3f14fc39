"""A real ComfyUI for tests: found, started on loopback in its own folder, spoken to by HTTP, stopped by its pid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROBE_PACK = Path(__file__).with_name("probe_pack")
STARTUP = float(os.environ.get("COMFYUI_STARTUP_SECONDS", "180"))
PROMPT = float(os.environ.get("COMFYUI_PROMPT_SECONDS", "300"))
REQUIRED = os.environ.get("FORGET_CONCEPT_REQUIRE_HOSTS") == "1"


def found_hosts() -> list[Path]:
    """The folders in COMFYUI_DIRS, else comfy-cli's default workspace where it is there."""
    named = [Path(part) for part in os.environ.get("COMFYUI_DIRS", "").split(os.pathsep) if part]
    return named or [path for path in (Path.home() / "comfy" / "ComfyUI",) if (path / "main.py").is_file()]


def python_of(host: Path) -> Path | None:
    """COMFYUI_PYTHON, else the interpreter of the host's own .venv or venv."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return Path(named)
    tail = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    candidates = [host.joinpath(folder, *tail) for folder in (".venv", "venv")]
    return next((path for path in candidates if path.exists()), None)


def missing(host: Path | None) -> str | None:
    """Why the tests cannot run on ``host``, in words, or ``None``."""
    if host is None:
        return "there is no ComfyUI here: name one in COMFYUI_DIRS, or install it in ~/comfy/ComfyUI"
    if not (host / "main.py").is_file():
        return f"{host} (from COMFYUI_DIRS) is no ComfyUI: it has no main.py"
    if python_of(host) is None:
        return f"{host} has no interpreter in .venv or venv: name one in COMFYUI_PYTHON"
    return None


class ExecutionError(Exception):
    """A prompt ended in a red node, or was refused; ``words`` is what the person reads, ``node`` the red node's id."""

    def __init__(self, words: str, node: str | None = None) -> None:
        super().__init__(words)
        self.words, self.node = words, node


class ComfyUI:
    """One running host with this pack and the tests' own nodes; ``folder`` has its models, output and custom_nodes."""

    def __init__(self, host: Path, folder: Path, pack_name: str = "some-other_name") -> None:
        self.host, self.folder, self.pack_name = host, folder, pack_name
        self.log = folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, environment: dict[str, str] | None = None, arguments: tuple[str, ...] = ()) -> None:
        packs = self.folder / "custom_nodes"
        for name in ("custom_nodes", "models/loras", "output", "input", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _linked(ROOT, packs / self.pack_name)
        _linked(PROBE_PACK, packs / "probe_pack")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        python = python_of(self.host)
        assert python is not None
        command = [str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-api-nodes", "--base-directory", str(self.folder), *arguments]
        nothing = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.host,
                env={**os.environ, **nothing, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + STARTUP
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at once:\n{self.tail()}")
            try:
                self.get("/object_info/KSampler")
                return
            except (OSError, urllib.error.URLError):
                if time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"ComfyUI did not answer within {STARTUP:.0f} s:\n{self.tail()}") from None
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

    # -- talk ----------------------------------------------------------------------------------------------------

    def _open(self, request: Any) -> Any:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def raw(self, path: str) -> bytes:
        return self._open(f"http://127.0.0.1:{self.port}{path}")

    def get(self, path: str) -> Any:
        return json.loads(self.raw(path))

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        answer = self._open(request)
        return json.loads(answer) if answer else None

    def queue(self, graph: dict[str, Any]) -> str:
        """Queue a graph in API format; :class:`ExecutionError` where the host refuses it."""
        try:
            answer = self.post("/prompt", {"prompt": graph})
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
        if errors := answer.get("node_errors"):
            node, found = next(iter(errors.items()))
            raise ExecutionError("; ".join(f"{e['message']}: {e['details']}" for e in found["errors"]), node)
        if "prompt_id" not in answer:
            raise ExecutionError(str(answer))
        return answer["prompt_id"]

    def wait(self, prompt: str, timeout: float = PROMPT) -> dict[str, Any]:
        """The history entry of a finished prompt; :class:`ExecutionError` for a red node."""
        deadline = time.monotonic() + timeout
        while not (history := self.get(f"/history/{prompt}")):
            assert self.process is not None and self.process.poll() is None, f"ComfyUI died:\n{self.tail()}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"the prompt did not end within {timeout} s:\n{self.tail()}")
            time.sleep(0.05)
        entry = history[prompt]
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                raise ExecutionError(f"{message['exception_type']}: {message['exception_message']}", message["node_id"])
        return entry

    def run(self, graph: dict[str, Any], timeout: float = PROMPT) -> dict[str, Any]:
        return self.wait(self.queue(graph), timeout)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def statuses(self, entry: dict[str, Any]) -> list[str]:
        return [kind for kind, _ in entry["status"]["messages"]]

    def cached(self, entry: dict[str, Any]) -> set[str]:
        return {
            node
            for kind, message in entry["status"]["messages"]
            if kind == "execution_cached"
            for node in message["nodes"]
        }

    def image(self, entry: dict[str, Any], node: str) -> bytes:
        """The PNG that a node saved."""
        place = entry["outputs"][node]["images"][0]
        return self.raw("/view?" + urllib.parse.urlencode(place))


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def _linked(source: Path, place: Path) -> None:
    try:
        place.symlink_to(source, target_is_directory=True)
    except OSError:  # Windows without the right to link
        shutil.copytree(source, place, ignore=shutil.ignore_patterns(".git", ".venv", "build"))
