"""Fixtures that run the command line in this process on tiny models; conftest loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn import DrawnModel, DrawnProbe, forgets
from tiny import tiny_model

from forget_concept.core import cli
from forget_concept.core.cli import options

LONG = " ".join(f"word{i}" for i in range(90))  # longer than a text encoder's context


class Decoder:
    def encode(self, images):
        raise NotImplementedError

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


class Run:
    """Runs a command in this process, in its own folder: exit code, output, and the files it left."""

    def __init__(self, capsys, folder: Path) -> None:
        self.capsys, self.folder = capsys, folder
        self.out = self.err = ""

    def __call__(self, *args: object) -> int:
        self.capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as end:  # --help, --version
            code = int(end.code or 0)
        self.out, self.err = self.capsys.readouterr()
        return code

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def left(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture()
def run(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Run(capsys, folder)


@pytest.fixture()
def tiny(monkeypatch):
    """Any ``--model`` is a tiny real UNet."""
    model = tiny_model()
    model.vae = Decoder()
    monkeypatch.setattr(options, "load_model", lambda args, console: model)
    return model


@pytest.fixture()
def drawn(monkeypatch):
    """``--model mini`` shows exactly what prompts name, and any ``--patch`` forgets ``star``."""
    model = DrawnModel()
    patch = forgets("star", "object", lambda seed: seed % 4 == 0)
    patch.metadata = {"forget_concept.concepts": '["star"]'}
    monkeypatch.setattr(options, "load_embedded", lambda args, console: (model, DrawnProbe()))
    monkeypatch.setattr(options, "load_patches", lambda given, model: [(patch, 1.0) for _ in given])
    return model
