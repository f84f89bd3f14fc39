"""The model that never knew: it draws the rest of the world, and nothing of three concepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from forget_concept.core import mini
from forget_concept.core.evaluation.drawing import Picture, SamplingSettings, draw
from forget_concept.core.evaluation.questions import seed_of, target_questions
from forget_concept.core.mini.files import weights_folder
from forget_concept.core.models.images import from_bytes

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "mini_retrained"
LEFT_OUT = {"star": "object", "neon": "style", "Lena Frost": "identity"}
KNOWN = {"heart": "object", "mosaic": "style", "Mira Vale": "identity"}


@pytest.fixture(scope="module")
def share():
    """The share of a concept's own prompts whose pictures show it."""
    model, probe = mini.load(folder=FOLDER), mini.load_probe()

    def of(name: str, category: str, n: int = 8) -> float:
        asked = enumerate(target_questions(name, n))
        pictures = [Picture(q.prompt.text, seed_of("retrained", name, i)) for i, q in asked]
        found = []
        for images in draw(model, pictures, sampling=SamplingSettings(steps=10)):
            found += [getattr(one, category) == name for one in probe.classify(from_bytes(images))]
        return sum(found) / n

    return of


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_it_draws_nothing_of_what_it_never_saw(share, name):
    assert share(name, LEFT_OUT[name]) <= 1 / 8


@pytest.mark.parametrize("name", list(KNOWN))
def test_it_draws_the_others(share, name):
    assert share(name, KNOWN[name]) >= 6 / 8


def test_it_is_small_and_shares_tokenizer_and_autoencoder_with_the_distributed_model():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 9_500_000
    assert {path.name for path in FOLDER.iterdir()} == {"text_encoder", "unet", "text.log.jsonl", "unet.log.jsonl"}
    for part in ("text_encoder", "unet"):
        assert (FOLDER / part / "config.json").read_bytes() == (weights_folder() / part / "config.json").read_bytes()
