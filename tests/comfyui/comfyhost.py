"""A real ComfyUI for tests: found, started on loopback in its own folder, spoken to by HTTP, stopped by its pid."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosting import REQUIRED, ROOT, Server, linked, own_python

__all__ = ["REQUIRED", "ComfyUI", "ExecutionError", "found_hosts", "missing", "png_size", "python_of"]

PROBE_PACK = Path(__file__).with_name("probe_pack")
STARTUP = float(os.environ.get("COMFYUI_STARTUP_SECONDS", "180"))
PROMPT = float(os.environ.get("COMFYUI_PROMPT_SECONDS", "300"))


def found_hosts() -> list[Path]:
    """The folders in COMFYUI_DIRS, else comfy-cli's default workspace where it is there."""
    named = [Path(part) for part in os.environ.get("COMFYUI_DIRS", "").split(os.pathsep) if part]
    return named or [path for path in (Path.home() / "comfy" / "ComfyUI",) if (path / "main.py").is_file()]


def python_of(host: Path) -> Path | None:
    """COMFYUI_PYTHON, else the interpreter of the host's own .venv or venv."""
    return own_python(host, "COMFYUI_PYTHON")


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


class ComfyUI(Server):
    """One running host with this pack and the tests' own nodes; ``folder`` has its models, output and custom_nodes."""

    def __init__(self, host: Path, folder: Path, pack_name: str = "some-other_name", pack: Path = ROOT) -> None:
        super().__init__("ComfyUI", folder / "log.txt")
        self.host, self.folder, self.pack_name, self.pack = host, folder, pack_name, pack

    def start(self, environment: dict[str, str] | None = None, arguments: tuple[str, ...] = ()) -> None:
        packs = self.folder / "custom_nodes"
        for name in ("custom_nodes", "models/loras", "output", "input", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        linked(self.pack, packs / self.pack_name)
        linked(PROBE_PACK, packs / "probe_pack")
        python = python_of(self.host)
        assert python is not None
        command = [str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.free_port())]
        command += ["--disable-api-nodes", "--base-directory", str(self.folder), *arguments]
        self.launch(command, self.host, environment or {}, "/object_info/KSampler", STARTUP)

    # -- talk ----------------------------------------------------------------------------------------------------

    def kind(self, *names: str) -> str:
        """The first of these that the host has: some of its nodes had other names once."""
        known = self.get("/object_info")
        return next(name for name in names if name in known)

    def stock(self, kind: str, /, **inputs: Any) -> dict[str, Any]:
        """A node of the host's own: required boxes that are not among ``inputs`` have the host's defaults."""
        known = self.get(f"/object_info/{kind}")[kind]["input"].get("required", {})
        assert set(inputs) <= set(known), f"{kind} has no {sorted(set(inputs) - set(known))}"
        given = {name: spec[1]["default"] for name, spec in known.items() if spec[1:] and "default" in spec[1]}
        return {"class_type": kind, "inputs": given | inputs}

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
