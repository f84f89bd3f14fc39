"""Forgetting in the loaded model: it reads and draws as the webui does, and the model is given back as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from webuihost import MODEL, ProbeError, WebUI, hosts

PROMPT = "a photo of a red star"
TRAINED = {
    "method": "forget_me_not",
    "settings": {"steps": 2, "n_images": 1, "sample_steps": 2, "batch_size": 1},
}


@pytest.fixture()
def untouched(webui: WebUI) -> Iterator[None]:
    """Weights, flags, identities and hooks are afterwards what they were, and the queue is free."""
    before = webui.probe("state")
    yield
    assert webui.probe("state") == before
    assert before["job"] == "" and before["locked"] is False


def test_it_reads_a_prompt_as_the_webui_does_and_every_word_means_itself(webui: WebUI, untouched: None) -> None:
    asked = ["a star", "a (red) star [x:y:0.5] (a:1.3)", "cats AND dogs BREAK stars", r"moon \(big\)", "", "a\\b"]
    plain = [
        "a star",
        r"a \(red\) star \[x:y:0.5\] \(a:1.3\)",
        "cats AND dogs break stars",
        r"moon \(big\)",
        "",
        r"a\\b",
    ]
    told = webui.probe("texts", prompts=asked, plain=plain)
    assert told["same"] == [True] * len(asked)
    assert told["shape"][1] == 77
    for ids, words in zip(told["ids"], told["phrases"], strict=True):
        assert ids[1 : 1 + len(words)] == words
    assert len(told["phrases"][1]) > len(["red", "star", "x", "y", "0.5", "a", "1.3"])
    # only the first section of a long prompt, as everywhere in this package
    assert webui.probe("texts", prompts=["star " * 200], plain=["star " * 200])["shape"] == [1, 77, told["shape"][2]]


def test_a_textual_inversion_cannot_stand_for_words(webui: WebUI) -> None:
    if webui.kind == "forge":
        pytest.skip("Forge takes textual inversions of SD1's width only, and this model is a small one")
    embedding = webui.folder / "embeddings" / "star.safetensors"
    save_file({"emb_params": torch.zeros(1, 192)}, embedding)
    try:
        webui.draw(PROMPT)  # this makes the webui look
        with pytest.raises(ProbeError, match="'star' is the name of a textual inversion"):
            webui.probe("forget")
    finally:
        embedding.unlink()
        webui.draw(PROMPT)


def test_a_built_in_word_may_be_a_textual_inversion(webui: WebUI) -> None:
    """Nobody wrote it: the patch is the same as without the file, and the webui itself goes on using it."""
    if webui.kind == "forge":
        pytest.skip("Forge takes textual inversions of SD1's width only, and this model is a small one")
    from forget_concept.core.formats import kohya

    words = ("sketch", "photo", "house", "neon")
    files = [webui.folder / "embeddings" / f"{word}.safetensors" for word in words]
    webui.draw(PROMPT)
    webui.probe("forget", name="without_them")
    plain = webui.draw("a sketch of a house").pixels
    try:
        for file in files:
            save_file({"emb_params": torch.zeros(1, 192)}, file)
        webui.draw("a moon")  # this makes the webui look, and forget the states of its last prompt
        with_them = webui.draw("a sketch of a house").pixels
        assert with_them != plain
        webui.probe("forget", name="with_them")
        webui.draw("a heart")
        assert webui.draw("a sketch of a house").pixels == with_them
    finally:
        for file in files:
            file.unlink(missing_ok=True)
        webui.draw(PROMPT)
    a, b = (kohya.load(webui.loras / f"{name}.safetensors") for name in ("without_them", "with_them"))
    for key, factor in a.factors.items():
        assert torch.equal(factor.up, b.factors[key].up) and torch.equal(factor.down, b.factors[key].down), key


def test_it_is_the_embedded_model_bit_for_bit_but_for_the_arithmetic(webui: WebUI, untouched: None) -> None:
    """The very latents of the same seed here, out of the files of the package; gradients against differences."""
    from forget_concept.core import mini

    told, model = webui.probe("compare"), mini.load()
    expected = model.sample([PROMPT], [1], steps=2, guidance=2.5).flatten()
    found = torch.tensor(told["latents"])
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert told["slope"] == pytest.approx(told["gradient"], rel=1e-2)
    pixels = model.decode(expected.view(1, 4, 16, 16))
    again = model.vae.encode(pixels).flatten()  # type: ignore[union-attr]
    assert told["round_trip"] == pytest.approx(float((again - expected).norm() / expected.norm()), rel=1e-2)


def test_a_closed_form_gives_the_patch_that_the_command_line_gives(webui: WebUI, untouched: None) -> None:
    from tiny import fit

    from forget_concept.core import mini
    from forget_concept.core.formats import kohya
    from forget_concept.core.request.concept import Concept
    from forget_concept.core.request.request import ForgetRequest

    told = webui.probe("forget", name="from_here")
    assert told["hash"] == mini.load().model_hash
    assert (told["layer"], told["shape"]) == ("clip_skip=1,final_norm", [4, 16, 16])
    assert told["requires_grad"] is False
    assert told["shown"] and all(job == "probe" for job, _ in told["shown"])
    request = ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon", "heart"), method="uce")
    expected, found = fit(mini.load(), request), kohya.load(webui.loras / "from_here.safetensors")
    assert set(found.factors) == set(expected.factors)
    # the checkpoint is half precision, as the package's own weights are; the text states differ in the last bits
    apart = max(float((found.factors[k].delta() - expected.factors[k].delta()).abs().max()) for k in found.factors)
    relative = apart / expected.max_abs()
    print(
        f"greatest weight difference from the command line's patch: {apart:.1e}, {relative:.1e} of the greatest change"
    )
    assert relative < 1e-5


def test_training_step_by_step_leaves_the_model_as_it_was(webui: WebUI, untouched: None) -> None:
    told = webui.probe("forget", **TRAINED)
    assert len(told["losses"]) >= 2 and told["norm"] > 0


@pytest.mark.parametrize(("how", "kind"), [("raise_after", "RuntimeError"), ("interrupt_after", "Cancelled")])
def test_what_breaks_off_leaves_the_model_as_it_was(webui: WebUI, untouched: None, how: str, kind: str) -> None:
    plain = webui.draw(PROMPT).pixels
    with pytest.raises(ProbeError) as told:
        webui.probe("forget", **TRAINED, **{how: 2})
    assert told.value.kind == kind
    # the interruption was for that job alone
    assert webui.draw(PROMPT).pixels == plain


@pytest.mark.long
def test_every_attention_optimisation(webui: WebUI) -> None:
    if webui.kind == "forge":
        pytest.skip("Forge chooses its attention when it starts")
    found = webui.probe("optimization")
    assert len(found["names"]) >= 4
    slopes = {}
    try:
        for name in [*found["names"], "None"]:
            now = webui.probe("optimization", name=name)["now"]
            assert (now or "None") == name.partition(" - ")[0]
            before = webui.probe("state")
            told = webui.probe("compare")
            slopes[name] = (told["slope"], told["gradient"])
            assert webui.probe("state") == before
    finally:
        webui.probe("optimization", name="Automatic")
    first = next(iter(slopes.values()))[1]
    for slope, gradient in slopes.values():
        assert slope == pytest.approx(gradient, rel=1e-2)
        assert gradient == pytest.approx(first, rel=1e-3)


def test_what_the_last_picture_left_behind_plays_no_part(webui: WebUI) -> None:
    """LoRAs, hypernetworks, tiling and a clip skip of the settings."""
    webui.draw(PROMPT)
    plain = webui.probe("compare")["latents"]
    webui.probe("forget", name="left_behind", concepts=[["moon", "circle"]], preserve=["star"])
    typed = webui.draw(f"{PROMPT} <lora:left_behind:1>", tiling=True)
    if webui.kind == "webui":  # Forge has none
        webui.probe("hypernetwork", on=True)
    try:
        before = webui.probe("state")
        assert before["networks"] == ["left_behind"]
        assert before["hypernetworks"] == (webui.kind == "webui")
        assert webui.probe("compare")["latents"] == plain
        assert webui.probe("state") == before
    finally:
        webui.probe("hypernetwork", on=False)
    assert webui.draw(f"{PROMPT} <lora:left_behind:1>", tiling=True).pixels == typed.pixels
    webui.draw(PROMPT)


def test_clip_skip_is_another_layer_and_said_so(webui: WebUI, untouched: None) -> None:
    webui.probe("options", CLIP_stop_at_last_layers=2)
    try:
        assert webui.probe("texts", prompts=["a star"], plain=["a star"])["same"] == [True]
        assert webui.probe("forget")["layer"] == "clip_skip=2,final_norm"
    finally:
        webui.probe("options", CLIP_stop_at_last_layers=1)


@pytest.mark.long
def test_a_model_that_predicts_v(webui: WebUI) -> None:
    webui.probe("checkpoint", name="velocity")
    try:
        assert webui.probe("forget")["prediction"] == "v_prediction"
        told = webui.probe("compare")
        assert told["slope"] == pytest.approx(told["gradient"], rel=1e-2)
    finally:
        webui.probe("checkpoint", name=MODEL)
    assert webui.probe("forget")["prediction"] == "epsilon"


def test_a_file_that_says_it_predicts_v_is_not_forgotten_in_as_one_of_epsilon(webui: WebUI) -> None:
    webui.probe("checkpoint", name="marked")
    try:
        with pytest.raises(ProbeError, match=r"'marked\.safetensors' says that it predicts v.*put a \.yaml file"):
            webui.probe("forget")
    finally:
        webui.probe("checkpoint", name=MODEL)
    assert webui.probe("forget")["prediction"] == "epsilon"


@pytest.mark.parametrize(("part", "name"), [("unet", "UNet"), ("text", "text encoder"), ("vae", "autoencoder")])
def test_a_damaged_checkpoint_is_named_and_nothing_else_is_blamed(webui: WebUI, part: str, name: str) -> None:
    weight = webui.probe("damage", part=part)["name"]
    try:
        with pytest.raises(ProbeError, match=f"is damaged: its {name} has NaN or infinite values") as raised:
            webui.probe("forget")
        assert weight in str(raised.value)
    finally:
        webui.probe("reload_checkpoint")
    assert webui.probe("forget")["prediction"] == "epsilon"


def test_a_picture_waits_for_the_job_and_then_comes(webui: WebUI) -> None:
    plain = webui.draw(PROMPT).pixels
    webui.probe("queued", seconds=2.0)
    drawn: list[tuple[float, bytes]] = []

    def draw() -> None:
        pixels = webui.draw(PROMPT).pixels
        drawn.append((time.time(), pixels))

    waiting = threading.Thread(target=draw)
    waiting.start()
    progress = webui.get("/sdapi/v1/progress?skip_current_image=true")
    assert progress["state"]["job"] == "probe"
    waiting.join(120)
    assert drawn[0][0] > webui.probe("ended")["at"]
    assert drawn[0][1] == plain


@pytest.mark.long
def test_another_checkpoint_chosen_while_a_job_runs(webui: WebUI) -> None:
    """A1111 loads it when the job is over. Forge loads what is chosen when it next needs a model: the job tells so."""
    plain = webui.draw(PROMPT).pixels
    asked = {"concepts": [{"name": "star", "replacement": "circle"}], "name": "meanwhile", "pictures": 0}
    asked |= TRAINED | {"settings": {**TRAINED["settings"], "steps": 30}}  # type: ignore[dict-item]
    job = webui.post("/forget-concept/v1/forget", asked)
    place = f"/forget-concept/v1/jobs/{job['id']}"
    try:
        while webui.get(place)["state"] == "queued":
            time.sleep(0.1)
        webui.probe("checkpoint", name="turned", load=False)
        deadline = time.monotonic() + 120
        while (job := webui.get(place))["state"] == "running" and time.monotonic() < deadline:
            time.sleep(0.2)
        saved = any(webui.loras.rglob("meanwhile*"))
        if webui.kind == "webui":
            assert (job["state"], saved) == ("done", True)
        else:
            assert (job["state"], saved) == ("failed", False)
            assert "The checkpoint was changed from" in job["error"]
        assert "turned" in webui.probe("model")["title"]
        assert webui.draw(PROMPT).pixels != plain
    finally:
        webui.probe("checkpoint", name=MODEL)
    assert webui.draw(PROMPT).pixels == plain


@pytest.mark.long
@pytest.mark.parametrize("stopped", hosts("webui"), indirect=True)
def test_two_models_at_once_have_patches_of_their_own(stopped: WebUI) -> None:
    stopped.second_checkpoint("turned")
    stopped.folder.joinpath("config.json").write_text(
        '{"sd_checkpoints_limit": 2, "sd_checkpoints_keep_in_cpu": false}', encoding="utf-8"
    )
    stopped.start("--nowebui")
    stopped.probe("checkpoint", name=MODEL)
    stopped.probe("forget", name="no_star")
    plain, first = stopped.draw(PROMPT).pixels, stopped.probe("model")
    stopped.probe("apply", patch="no_star")
    applied = stopped.draw(PROMPT).pixels
    stopped.probe("checkpoint", name="turned")
    turned = stopped.draw(PROMPT).pixels
    assert stopped.probe("active")["active"] == []
    stopped.probe("apply", patch="no_star", strength=0.5)
    stopped.probe("checkpoint", name=MODEL)
    assert stopped.probe("model") == first
    assert stopped.probe("active")["active"] == [["no_star", 1.0, True]]
    assert stopped.draw(PROMPT).pixels == applied
    stopped.probe("remove", name="no_star")
    assert stopped.draw(PROMPT).pixels == plain
    stopped.probe("checkpoint", name="turned")
    assert stopped.probe("active")["active"] == [["no_star", 0.5, True]]
    stopped.probe("remove", name="no_star")
    assert stopped.draw(PROMPT).pixels == turned


def works(host: WebUI) -> None:
    """Draw, forget, send gradients through, apply beside a LoRA and take out again, bit for bit."""
    plain = host.draw(PROMPT).pixels
    before = host.probe("state")
    host.probe("forget", name="no_star")
    assert host.probe("compare", vae=False)["gradient"] > 0
    assert host.probe("state") == before
    host.probe("apply", patch="no_star")
    assert host.draw(f"{PROMPT} <lora:no_star:-0.5>").pixels != plain
    assert host.probe("active")["active"] == [["no_star", 1.0, True]]
    host.probe("remove", name="no_star")
    assert host.draw(PROMPT).pixels == plain
    assert host.probe("state") == before


@pytest.mark.long
@pytest.mark.parametrize("stopped", hosts("webui"), indirect=True)
def test_half_precision(stopped: WebUI) -> None:
    # a CPU takes minutes for a picture of a VAE in half precision
    stopped.folder.joinpath("config.json").write_text('{"sd_vae_decode_method": "Approx cheap"}', encoding="utf-8")
    stopped.start("--nowebui", half=True)
    works(stopped)


@pytest.mark.long
@pytest.mark.parametrize("stopped", hosts("webui"), indirect=True)
def test_medium_memory(stopped: WebUI) -> None:
    stopped.start("--nowebui", "--medvram")
    works(stopped)


@pytest.mark.long
@pytest.mark.parametrize("stopped", hosts("webui"), indirect=True)
def test_low_memory_is_refused_in_words(stopped: WebUI) -> None:
    stopped.start("--nowebui", "--lowvram")
    plain = stopped.draw(PROMPT).pixels
    with pytest.raises(ProbeError, match=r"ModelError.*--lowvram"):
        stopped.probe("forget")
    assert stopped.draw(PROMPT).pixels == plain


@pytest.mark.long
@pytest.mark.parametrize("stopped", hosts("webui"), indirect=True)
def test_fp8_is_refused_in_words(stopped: WebUI) -> None:
    stopped.folder.joinpath("config.json").write_text('{"fp8_storage": "Enable"}', encoding="utf-8")
    stopped.start("--nowebui")
    with pytest.raises(ProbeError, match=r"ModelError.*float8.*Settings > Optimizations"):
        stopped.probe("forget")


@pytest.mark.long
@pytest.mark.parametrize("stopped", hosts("forge"), indirect=True)
def test_low_bits_are_refused_in_words(stopped: WebUI) -> None:
    stopped.folder.joinpath("config.json").write_text('{"forge_unet_storage_dtype": "float8-e4m3fn"}', encoding="utf-8")
    stopped.start("--nowebui")
    with pytest.raises(ProbeError, match=r"ModelError.*float8.*Diffusion in Low Bits"):
        stopped.probe("forget")
