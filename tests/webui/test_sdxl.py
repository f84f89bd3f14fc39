"""A checkpoint of SDXL's kind in a running webui: the concept enters twice, and both ways are forgotten."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from webuihost import REQUIRED, WebUI, call, done, hosts, missing

from forget_concept.core import mini
from forget_concept.core.formats import load_patch
from forget_concept.core.models.unet import POOLED_KEY

pytestmark = pytest.mark.skipif("mini-xl" not in mini.NAMES, reason="the package has no mini-xl")
ASKED = {
    "concepts": [{"name": "star", "kind": "object", "replacement": "circle"}],
    "preserve": ["moon", "heart", "house", "tree"],
    "method": "uce",
    "pictures": 1,
    "name": "from_sdxl",
}
SEEDS = 8


@pytest.fixture(scope="module", params=hosts("webui"))
def sdxl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    kind, host = request.param
    if why := missing(host, kind):
        if REQUIRED:
            pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 asks for one)")
        pytest.skip(why)
    running = WebUI(host, tmp_path_factory.mktemp("sdxl"), kind, embedded="mini-xl")
    try:
        running.prepare()
        running.start()
        # its own rough picture of SDXL's latents would be downloaded
        running.post("/sdapi/v1/options", {"live_previews_enable": False})
        yield running
    finally:
        running.stop()


def objects(webui: WebUI, prompt: str) -> list[str | None]:
    """What the probe sees in pictures of a prompt."""
    from PIL import Image

    found = []
    for seed in range(SEEDS):
        drawn = webui.draw(prompt, seed=seed, steps=16)
        pixels = np.asarray(Image.open(io.BytesIO(drawn.png)).convert("RGB"), dtype=np.float32) / 255
        found += mini.load_probe().classify(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    return [label.object for label in found]


def test_a_star_is_forgotten_through_tokens_and_pooled_vector(sdxl: WebUI) -> None:
    """By the patch that the tab's job makes, put on the model, and by its file in the webui's own loader of LoRAs."""
    before = objects(sdxl, "a picture of a red star")
    kept = objects(sdxl, "a picture of a red moon")
    assert before.count("star") >= SEEDS * 3 // 4 and kept.count("moon") >= SEEDS * 3 // 4, (before, kept)
    code, job = call(sdxl, "POST", "/forget", ASKED)
    assert code == 202, job
    job: dict[str, Any] = done(sdxl, job)
    assert job["state"] == "done", job["error"]
    result = job["result"]
    patch = load_patch(sdxl.loras / result["file"])
    assert POOLED_KEY in patch.factors
    assert call(sdxl, "POST", f"/patches/{result['name']}/apply", {"strength": 1.0})[0] == 200
    assert "star" not in objects(sdxl, "a picture of a red star")
    assert objects(sdxl, "a picture of a red moon").count("moon") >= SEEDS * 3 // 4
    assert call(sdxl, "POST", f"/patches/{result['name']}/remove") == (200, [])
    assert "star" not in objects(sdxl, f"a picture of a red star {result['lora']}")
    assert objects(sdxl, "a picture of a red star") == before
