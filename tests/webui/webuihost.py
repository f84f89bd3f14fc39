"""A real AUTOMATIC1111 webui or Forge for tests: found, started on loopback with a data folder of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from hosting import REQUIRED, ROOT, Server, linked, own_python

__all__ = ["MODEL", "PREFIX", "REQUIRED", "ROOT", "Drawn", "WebUI", "call", "done", "found_hosts", "hosts", "missing"]

PROBE = Path(__file__).with_name("probe_extension")
STARTUP = float(os.environ.get("WEBUI_STARTUP_SECONDS", "480"))
KINDS = {"webui": "AUTOMATIC1111's webui", "forge": "Forge"}
MODEL = "forget-concept-mini"
PREFIX = "/forget-concept/v1"  # of the extension's REST routes


def found_hosts(kind: str) -> list[Path]:
    """The folders of this kind (``"webui"`` or ``"forge"``) in WEBUI_DIRS; where that is not set, the webui at home."""
    named = [Path(part).expanduser() for part in os.environ.get("WEBUI_DIRS", "").split(os.pathsep) if part]
    if named:
        return [path for path in named if (path / "modules_forge").is_dir() == (kind == "forge")]
    home = Path.home() / "stable-diffusion-webui"
    return [home] if kind == "webui" and (home / "launch.py").is_file() else []


def hosts(*kinds: str) -> list[Any]:
    """What a fixture of hosts takes as parameters: ``(kind, folder)`` with its marker; all kinds by default."""
    return [
        pytest.param((kind, host), id=f"{kind}-{host.name if host else 'none'}", marks=getattr(pytest.mark, kind))
        for kind in kinds or tuple(KINDS)
        for host in [*found_hosts(kind)] or [None]
    ]


def missing(host: Path | None, kind: str) -> str | None:
    """Why the tests cannot run on ``host``, in words, or ``None``."""
    if host is None:
        home = ", or install it in ~/stable-diffusion-webui" if kind == "webui" else ""
        return f"there is no {KINDS[kind]} here: name one in WEBUI_DIRS{home}"
    if not (host / "launch.py").is_file():
        return f"{host} (from WEBUI_DIRS) is no webui: it has no launch.py"
    if own_python(host, "WEBUI_PYTHON") is None:
        return f"{host} has no interpreter in .venv or venv: name one in WEBUI_PYTHON"
    return None


def call(webui: WebUI, method: str, path: str, body: Any = None, login: str | None = None) -> tuple[int, Any]:
    """The code and the JSON of an answer."""
    headers = {"Content-Type": "application/json"}
    if login is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{webui.port}{PREFIX}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def done(webui: WebUI, job: dict[str, Any], seconds: float = 600) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _, job = call(webui, "GET", f"/jobs/{job['id']}")
        if job["state"] not in ("queued", "running"):
            return job
        time.sleep(0.2)
    raise TimeoutError(job)


class Drawn:
    """What came back: a picture, ``png``, or several, ``pngs``, and ``infotext`` as it is written into the first."""

    def __init__(self, answer: dict[str, Any]) -> None:
        told = json.loads(answer["info"])
        # a grid of several comes first
        self.pngs = [base64.b64decode(image) for image in answer["images"][told["index_of_first_image"] :]]
        self.infotext: str = told["infotexts"][0]

    @property
    def png(self) -> bytes:
        return self.pngs[0]

    @property
    def pixels(self) -> bytes:
        return pixels(self.png)

    @property
    def all_pixels(self) -> list[bytes]:
        return [pixels(png) for png in self.pngs]


def pixels(png: bytes) -> bytes:
    """A PNG's pixels, without what is written into it."""
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


class WebUI(Server):
    """One running webui with this extension, under another folder name, and the tests' own; ``folder`` is its data."""

    def __init__(
        self,
        host: Path,
        folder: Path,
        kind: str = "webui",
        extension: str = "some-other_name",
        embedded: str = "mini",
    ) -> None:
        super().__init__(kind, folder / "log.txt")
        self.host, self.folder, self.kind, self.extension, self.embedded = host, folder, kind, extension, embedded

    @property
    def loras(self) -> Path:
        return self.folder / "models" / "Lora"

    def prepare(self) -> None:
        """The data folder: models, and both extensions linked into it."""
        checkpoints = self.folder / "models" / "Stable-diffusion"
        for place in (checkpoints, self.loras, self.folder / "extensions", self.folder / "embeddings"):
            place.mkdir(parents=True, exist_ok=True)
        if not any(checkpoints.glob("*.safetensors")):
            from forget_concept.core.cli import main

            assert main(["export", "--model", self.embedded, "--out", str(checkpoints)]) == 0
        if self.kind == "forge":
            self.describe()
        for source, name in ((ROOT, self.extension), (PROBE, "probe_extension")):
            if not (self.folder / "extensions" / name).exists():
                linked(source, self.folder / "extensions" / name)

    def describe(self) -> None:
        """The embedded model's parts, as Forge wants a model described that it does not know; the probe tells it so."""
        from forget_concept.core.mini import ldm, weights_folder

        folder = self.folder / "described"
        shutil.copytree(weights_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
        config = folder / "vae" / "config.json"
        padded, known = ldm.ddconfig(padded=True), json.loads(config.read_text(encoding="utf-8"))
        known["block_out_channels"] = [padded["ch"] * times for times in padded["ch_mult"]]
        known |= {"norm_num_groups": 32, "shift_factor": 0.0}
        config.write_text(json.dumps(known), encoding="utf-8")

    def compile(self) -> None:
        """The extension's bytecode, as it is there from the second start on."""
        folder = self.folder / "extensions" / self.extension
        places = [str(folder / name) for name in ("core", "sd_webui_ext")]
        own = {**os.environ, "PYTHONPATH": "", "LD_PRELOAD": ""}
        python = str(own_python(self.host, "WEBUI_PYTHON"))
        subprocess.run([python, "-m", "compileall", "-q", *places], check=True, capture_output=True, env=own)

    def second_checkpoint(self, name: str) -> None:
        """Another checkpoint of the same kind: the embedded model with its cross-attention turned round."""
        from safetensors.torch import load_file, save_file

        folder = self.folder / "models" / "Stable-diffusion"
        state = load_file(folder / f"{MODEL}.safetensors")
        turned = {key: (-value if ".attn2.to_v." in key else value) for key, value in state.items()}
        save_file(turned, folder / f"{name}.safetensors")
        shutil.copyfile(folder / f"{MODEL}.yaml", folder / f"{name}.yaml")

    def v_checkpoint(self, name: str) -> None:
        """The embedded model's weights as those of a model that predicts v; its pictures are noise."""
        folder = self.folder / "models" / "Stable-diffusion"
        shutil.copyfile(folder / f"{MODEL}.safetensors", folder / f"{name}.safetensors")
        described = (folder / f"{MODEL}.yaml").read_text(encoding="utf-8")
        described = described.replace("  params:\n", '  params:\n    parameterization: "v"\n', 1)
        (folder / f"{name}.yaml").write_text(described, encoding="utf-8")

    def marked_checkpoint(self, name: str) -> None:
        """The embedded model's weights in a file that says of itself that it predicts v, which its .yaml does not."""
        import torch
        from safetensors.torch import load_file, save_file

        folder = self.folder / "models" / "Stable-diffusion"
        save_file(
            load_file(folder / f"{MODEL}.safetensors") | {"v_pred": torch.zeros(0)}, folder / f"{name}.safetensors"
        )
        shutil.copyfile(folder / f"{MODEL}.yaml", folder / f"{name}.yaml")

    def start(self, *arguments: str, half: bool = False, environment: dict[str, str] | None = None) -> None:
        python = own_python(self.host, "WEBUI_PYTHON")
        assert python is not None
        command = [str(python), "launch.py", "--skip-prepare-environment", "--skip-torch-cuda-test"]
        command += ["--skip-version-check", "--data-dir", str(self.folder), "--server-name", "127.0.0.1"]
        command += ["--port", str(self.free_port()), "--api"]
        if self.kind == "forge":
            command += ["--always-cpu"]
        else:
            command += ["--use-cpu", "all", "--no-download-sd-model", "--do-not-download-clip"]
            command += ["--precision", "half"] if half else ["--no-half", "--precision", "full"]
        own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        own |= {"SD_WEBUI_RESTARTING": "1", "COMMANDLINE_ARGS": "", "PROBE_DESCRIBED": str(self.folder / "described")}
        if self.embedded == "mini-xl":
            own["PROBE_OPEN_CLIP"] = str(self.folder / "models" / "Stable-diffusion" / "forget-concept-mini-xl-text")
        own |= environment or {}
        # a question that comes while it is still putting its API together breaks it
        sign = "/sdapi/v1/samplers"
        self.launch([*command, *arguments], self.host, own, sign, STARTUP, marker="Startup time:")

    # -- talk ----------------------------------------------------------------------------------------------------

    def draw(self, prompt: str, way: str = "txt2img", **options: Any) -> Drawn:
        """A small picture in few steps."""
        asked = {
            "prompt": prompt,
            "width": 128,
            "height": 128,
            "steps": 2,
            "cfg_scale": 2.5,
            "sampler_name": "Euler",
            "seed": 1,
            **options,
        }
        return Drawn(self.post(f"/sdapi/v1/{way}", asked, timeout=300))

    def probe(self, what: str, **arguments: Any) -> Any:
        """Ask the tests' own extension to do something inside of the webui; its answer or its :class:`ProbeError`."""
        try:
            return self.post(f"/probe/{what}", arguments, timeout=300)
        except urllib.error.HTTPError as error:
            told = json.loads(error.read())
            raise ProbeError(told["kind"], told["words"]) from None


class ProbeError(Exception):
    """What went wrong inside of the webui: the class's name as ``kind``, and its words."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind, self.words = kind, words
