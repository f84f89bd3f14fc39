"""Measuring in the graph of a real ComfyUI: the report, the maps, and what is said where none can be had."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from comfyhost import ComfyUI, ExecutionError, png_size
from graphs import base, difference, forget, node
from test_patches import read_only

nonces = iter(range(20_000, 1_000_000))
WIRES = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}


def evaluate(**changes: Any) -> dict[str, Any]:
    """Few pictures in few steps: what is looked at is that the figures are those of this very MODEL and patch."""
    inputs = {
        **WIRES,
        "lora": ["forget", 1],
        "strength": 1.0,
        "concept": "",
        "count": 4,
        "seed": 3,
        "steps": 6,
        "baselines": False,
        "attacks": "none",
        "m_score": False,
        "benchmark": "automatic",
        "clip_judge": "",
        "filename": f"measured/{next(nonces)}",
    }
    return node("ForgetConceptEvaluate", **(inputs | changes))


def look(**changes: Any) -> dict[str, Any]:
    inputs = {**WIRES, "prompt": "a photo of a red star", "phrase": "star", "seed": 5, "steps": 4, "guidance": 0.0}
    return node("ForgetConceptAttentionMap", **(inputs | changes))


def shown(graph: dict[str, Any], **sources: tuple[str, int]) -> dict[str, Any]:
    return graph | {name: node("PreviewAny", source=list(source)) for name, source in sources.items()}


def text(entry: dict[str, Any], name: str) -> str:
    return entry["outputs"][name]["text"][0]


def red(comfyui: ComfyUI, graph: dict[str, Any]) -> ExecutionError:
    with pytest.raises(ExecutionError) as caught:
        comfyui.run(graph)
    return caught.value


def hashes(comfyui: ComfyUI) -> dict[str, str]:
    graph = {"load": base()["load"], "hash": node("ProbeHash", model=["load", 0], nonce=next(nonces))}
    return comfyui.run(graph)["outputs"]["hash"]["hash"][0]


def random_clip(folder: Path) -> Path:
    """A small CLIP of random weights, as transformers writes it."""
    import torch
    from tiny import clip_files
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(clip_files(folder / "words")), model_max_length=20)
    end = len(tokenizer) - 1
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {**small, **ids, "vocab_size": end + 1, "max_position_embeddings": 20}
    sight = {**small, "image_size": 48, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=words, vision_config=sight, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def pixels(png: bytes) -> Any:
    """``(h, w, 3)`` uint8 of a PNG."""
    import torch
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    from forget_concept.core import mini

    return mini.load(), mini.load_probe()


# -- evaluated ----------------------------------------------------------------------------------------------------


def test_the_report_is_the_command_lines_and_the_model_comes_back(
    comfyui: ComfyUI, embedded: tuple[Any, Any], tmp_path: Path
) -> None:
    """The same call on the diffusers model and the same patch gives the same counts: two hosts, one measure."""
    from forget_concept.core.evaluation import UNEDITED, SamplingSettings
    from forget_concept.core.evaluation.assess import EvaluationSettings, Evaluators, assess
    from forget_concept.core.formats import load_patch

    before = hashes(comfyui)
    graph = base() | {"forget": forget(), "evaluate": evaluate()}
    graph["save"] = node("ForgetConceptSavePatch", lora=["forget", 1])
    graph["save"]["inputs"] |= {"filename": f"evaluated{next(nonces)}", "precision": "float32"}
    comfyui.get("/probe/told")
    entry = comfyui.run(shown(graph, words=("evaluate", 1), file=("evaluate", 2)))
    told = comfyui.get("/probe/told")["texts"]
    assert hashes(comfyui) == before
    page = Path(text(entry, "file"))
    assert page.parent == comfyui.folder / "output" / "measured" and page.name.endswith("_00001.html")
    assert "<svg" in page.read_text(encoding="utf-8")
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    stem = graph["save"]["inputs"]["filename"]
    model, probe = embedded
    patch = load_patch(comfyui.folder / "models" / "loras" / f"{stem}_00001.safetensors", model.survey)
    settings = EvaluationSettings(4, 3, (UNEDITED,), SamplingSettings(6, model.guidance, precision="float32"))
    alone = assess(model, Evaluators.embedded(probe), [(patch, 1.0)], ["star"], settings)
    (mine,), (theirs,) = alone.evaluations, found["evaluations"]
    assert theirs["scores"] == mine.as_dict()["scores"]
    assert theirs["drift"]["patched"] == pytest.approx(mine.drift["patched"], rel=0.05)
    assert found["provenance"]["model_hash"] == model.model_hash
    for pair, own in zip(found["attention"], alone.attention, strict=True):
        assert pair["share_after"] == pytest.approx(own.after.share, abs=1e-3)
    words = text(entry, "words")
    assert found["verdict"]["text"] in words and "“star”" in words
    assert "judged by the embedded model's probe" in words and str(page) in words
    assert any(line.startswith("sampling ") for line in told) and words in told
    width, height = png_size(comfyui.image(entry, "evaluate"))
    assert width > 6 * 2 * 128 and height > 128
    pairs = entry["outputs"]["evaluate"]["forget_concept_pairs"]
    examples = [*mine.target_examples, *mine.kept_examples]
    assert [pair["prompt"] for pair in pairs] == [example.prompt for example in examples]
    assert [pair["asked"] for pair in pairs] == ["yes"] * len(mine.target_examples) + ["no"] * len(mine.kept_examples)
    for pair, example in zip(pairs, examples, strict=True):
        for when in ("before", "after"):
            drawn = pixels(comfyui.raw("/view?" + urlencode(pair[when])))
            # the host's model and the diffusers model round a pixel the other way now and then
            apart = drawn.int() - getattr(example, when).picture.movedim(0, -1).int()
            assert float(apart.abs().float().mean()) < 1.0


def test_measured_again_it_is_another_file_and_equal_inputs_are_not_measured_again(comfyui: ComfyUI) -> None:
    name = f"measured/{next(nonces)}-%concept%"
    graph = shown(base() | {"forget": forget(), "evaluate": evaluate(filename=name)}, file=("evaluate", 2))
    first = Path(text(comfyui.run(graph), "file"))
    assert "evaluate" in comfyui.cached(comfyui.run(graph))
    graph["evaluate"] = evaluate(filename=name, seed=4)
    second = Path(text(comfyui.run(graph), "file"))
    assert first.name.endswith("-star_00001.html") and second == first.with_name(first.name.replace("_00001", "_00002"))
    assert first.is_file() and second.with_suffix(".json").is_file()


def test_the_strength_and_the_concept_are_the_boxes_own(comfyui: ComfyUI) -> None:
    """At strength 0 nothing is changed: not one picture."""
    graph = base() | {"forget": forget(), "evaluate": evaluate(strength=0.0, concept="moon", benchmark="embedded")}
    entry = comfyui.run(shown(graph, file=("evaluate", 2)))
    found = json.loads(Path(text(entry, "file")).with_suffix(".json").read_text(encoding="utf-8"))
    (one,) = found["evaluations"]
    assert one["concept"] == "moon"
    assert one["drift"] == {"patched": 0.0, "unedited": 0.0}
    assert one["scores"]["patched"] == one["scores"]["unedited"]
    assert found["provenance"]["measured"]["benchmark"] == "ConceptBench of the embedded world"


def test_a_model_that_is_patched_already_is_measured_as_it_is(comfyui: ComfyUI) -> None:
    graph = base() | {"forget": forget(), "evaluate": evaluate(model=["forget", 0], strength=0.0)}
    words = text(comfyui.run(shown(graph, words=("evaluate", 1))), "words")
    assert "carries patches on" in words and "judged by the embedded model's probe" in words


def test_an_inversion_through_the_hosts_text_encoder_finds_what_it_finds_in_the_core(
    comfyui: ComfyUI, embedded: tuple[Any, Any]
) -> None:
    """Gradients flow through a copy of the CLIP; the host's own, and its random numbers, stay as they are."""
    from forget_concept.core.evaluation.m_score import concept_latents, m_score
    from forget_concept.core.formats import load_patch
    from forget_concept.core.request.concept import Concept

    before, stem = hashes(comfyui), f"inverted{next(nonces)}"
    graph = base() | {"forget": forget(), "evaluate": evaluate(m_score=True)}
    graph["save"] = node("ForgetConceptSavePatch", lora=["forget", 1], filename=stem, precision="float32")
    entry = comfyui.run(shown(graph, words=("evaluate", 1), file=("evaluate", 2)))
    assert hashes(comfyui) == before
    found = json.loads(Path(text(entry, "file")).with_suffix(".json").read_text(encoding="utf-8"))
    (theirs,) = found["m_scores"]
    assert not found["left_out"] and "M-Score of star" in text(entry, "words")
    model, star = embedded[0], Concept("star")
    patch = load_patch(comfyui.folder / "models" / "loras" / f"{stem}_00001.safetensors", model.survey)
    mine = m_score(model, star, concept_latents(model, star, seed=3), [(patch, 1.0)], seed=3)
    assert theirs["before"] == pytest.approx(mine.before, abs=0.02)
    assert theirs["after"] == pytest.approx(mine.after, abs=0.02)
    assert abs(mine.before - mine.after) > 0.02


@pytest.mark.long
def test_attacks_reach_through_the_hosts_text_encoder(comfyui: ComfyUI) -> None:
    before = hashes(comfyui)
    graph = base() | {"forget": forget(), "evaluate": evaluate(attacks="quick", steps=4)}
    entry = comfyui.run(shown(graph, words=("evaluate", 1), file=("evaluate", 2)), timeout=1200)
    assert hashes(comfyui) == before
    found = json.loads(Path(text(entry, "file")).with_suffix(".json").read_text(encoding="utf-8"))
    assert {"rephrased", "homoglyphs", "discrete", "soft_prompt"} <= {attack["name"] for attack in found["attacks"]}
    assert not found["left_out"], found["left_out"]
    assert "attack discrete on star" in text(entry, "words")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vae": ["nothing", 3]}, "The input 'vae' is empty"),
        ({"concept": "church"}, "church"),
        ({"concept": "church", "benchmark": "embedded"}, "has no concept 'church'"),
        ({"concept": "cat", "benchmark": "checkpoints"}, "The judge knows no object 'cat'"),
        ({"concept": "star", "benchmark": "checkpoints"}, "has no concept 'star'"),
        ({"model": ["narrow", 0], "concept": "umbrella"}, "There is no judge for this model"),
        ({"model": ["narrow", 0], "benchmark": "world"}, "embedded model's own world"),
        ({"model": ["narrow", 0], "concept": "umbrella", "clip_judge": "no/such-clip"}, "is not on this machine"),
        ({"lora": ["nothing", 2]}, "no LoRA"),
        ({"filename": "../out"}, "not inside the output folder"),
        ({"filename": " "}, "has no name"),
    ],
)
def test_what_cannot_be_measured_is_a_red_node_in_words(comfyui: ComfyUI, changes: dict[str, Any], said: str) -> None:
    graph = base() | {"forget": forget(), "evaluate": evaluate(**changes), "nothing": node("ProbeNothing")}
    graph["narrow"] = node("ProbeNarrow", model=["load", 0], dtype="bfloat16")
    found = red(comfyui, graph)
    assert found.node == "evaluate"
    assert said in found.words, found.words
    assert "Traceback" not in found.words


def test_a_patch_of_another_architecture_is_one_sentence(comfyui: ComfyUI) -> None:
    import torch

    from forget_concept.core.formats import kohya
    from forget_concept.core.patch.low_rank import LowRank
    from forget_concept.core.patch.patch import Patch

    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    sdxl = Patch({key: LowRank(torch.ones(640, 2), torch.ones(2, 2048))}, {"forget_concept.family": "sdxl"})
    kohya.save(sdxl, comfyui.folder / "models" / "loras" / "sdxl-measured.safetensors")
    graph = base() | {"read": node("ForgetConceptLoadPatch", file="sdxl-measured.safetensors")}
    for name, part in (("evaluate", evaluate(lora=["read", 0])), ("look", look(lora=["read", 0], strength=1.0))):
        found = red(comfyui, shown(graph | {name: part}, words=(name, 1)))
        assert found.node == name
        assert "for another architecture" in found.words


def test_an_output_folder_that_cannot_be_written_is_said_before_anything_is_drawn(comfyui: ComfyUI) -> None:
    folder = comfyui.folder / "output" / f"shut{next(nonces)}"
    folder.parent.mkdir(exist_ok=True)
    graph = base() | {"forget": forget(), "evaluate": evaluate(filename=f"{folder.name}/x", count=500)}
    folder.write_text("a file where a folder is wanted")
    assert "cannot be written to" in red(comfyui, graph).words
    folder.unlink()
    folder.mkdir()
    began = time.monotonic()
    with read_only(folder):
        found = red(comfyui, graph)
    assert f"'{folder}' cannot be written to" in found.words
    assert time.monotonic() - began < 60
    assert not list(folder.iterdir())


@pytest.mark.parametrize("what", ["error", "cancel"])
def test_a_measurement_that_breaks_off_leaves_the_model_and_no_file(comfyui: ComfyUI, what: str) -> None:
    before = hashes(comfyui)
    trap = node("ProbeTrap", model=["load", 0], what=what, call=9, nonce=next(nonces))
    comfyui.run({"load": base()["load"], "trap": trap})
    name = f"broken{next(nonces)}"
    graph = base() | {"forget": forget(seed=next(nonces)), "evaluate": evaluate(filename=f"{name}/x")}
    if what == "error":
        assert "the trap went off" in red(comfyui, graph).words
    else:
        assert "execution_interrupted" in comfyui.statuses(comfyui.run(graph))
    trap["inputs"] |= {"what": "none", "nonce": next(nonces)}
    comfyui.run({"load": base()["load"], "trap": trap})
    assert hashes(comfyui) == before
    assert not (comfyui.folder / "output" / name).exists()
    entry = comfyui.run(graph)
    assert entry["status"]["status_str"] == "success"


def test_a_checkpoint_is_judged_by_a_clip_that_is_here(comfyui: ComfyUI, tmp_path: Path) -> None:
    """The way of every model but the embedded one. A CLIP of random weights recognises nothing, which is said."""
    folder = random_clip(tmp_path / "clip")
    graph = base() | {"forget": forget(concept="umbrella"), "narrow": node("ProbeNarrow", model=["load", 0])}
    graph["narrow"]["inputs"]["dtype"] = "bfloat16"
    graph["evaluate"] = evaluate(model=["narrow", 0], clip_judge=str(folder), steps=2)
    comfyui.get("/probe/told")
    found = red(comfyui, graph)
    assert found.node == "evaluate"
    assert "The unedited model draws none of these prompts correctly" in found.words
    told = comfyui.get("/probe/told")["texts"]
    assert any(line.startswith("sampling 24 images") for line in told), told


# -- looked at ----------------------------------------------------------------------------------------------------


def test_the_map_is_that_of_the_core_on_the_diffusers_model(comfyui: ComfyUI, embedded: tuple[Any, Any]) -> None:
    """The share that the host's model pays is the diffusers model's; a patch makes a second map, and nothing stays."""
    from forget_concept.core.evaluation import Picture, SamplingSettings
    from forget_concept.core.evaluation.attention_pictures import attention_pairs
    from forget_concept.core.evaluation.report.verdict import fine_percent
    from forget_concept.core.formats import load_patch

    before = hashes(comfyui)
    stem = f"looked{next(nonces)}"
    graph = base() | {"forget": forget(), "look": look(), "both": look(lora=["forget", 1], strength=1.0, phrase="")}
    graph["none"] = look(lora=["forget", 1], strength=0.0)
    graph["save"] = node("ForgetConceptSavePatch", lora=["forget", 1], filename=stem, precision="float32")
    for name in ("look", "both", "none"):
        graph[f"{name}-image"] = node("PreviewImage", images=[name, 0])
        graph = shown(graph, **{f"{name}-words": (name, 1)})
    for i in range(2):
        graph[f"none-{i}"] = node("ImageFromBatch", image=["none", 0], batch_index=i, length=1)
    graph["same"] = difference("none-0", "none-1")
    entry = comfyui.run(graph)
    assert [len(entry["outputs"][f"{name}-image"]["images"]) for name in ("look", "both")] == [1, 2]
    assert png_size(comfyui.image(entry, "look-image")) == (128, 128)
    assert entry["outputs"]["same"]["difference"] == [0]
    model, _ = embedded
    patch = load_patch(comfyui.folder / "models" / "loras" / f"{stem}_00001.safetensors", model.survey)
    sampling = SamplingSettings(4, model.guidance, 1, "float32")
    (pair,) = attention_pairs(model, [Picture("a photo of a red star", 5)], ["star"], [(patch, 1.0)], sampling)
    assert f"“star” gets {fine_percent(pair.before.share)} of the attention\n" in text(entry, "look-words")
    before_share, after_share = fine_percent(pair.before.share), fine_percent(pair.after.share)
    both = f"“star” gets {before_share} of the attention before, {after_share} with the patch"
    assert both in text(entry, "both-words")
    assert pair.before.share != pair.after.share
    assert hashes(comfyui) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vae": ["nothing", 3]}, "The input 'vae' is empty"),
        ({"phrase": "moon"}, "moon"),
        ({"phrase": ""}, "The input 'phrase' is empty"),
        ({"prompt": ""}, "star"),
        ({"phrase": "🌟"}, "🌟"),
    ],
)
def test_a_phrase_that_cannot_be_looked_for_says_so(comfyui: ComfyUI, changes: dict[str, Any], said: str) -> None:
    graph = base() | {"nothing": node("ProbeNothing"), "look": look(**changes)}
    found = red(comfyui, shown(graph, words=("look", 1)))
    assert found.node == "look"
    assert said in found.words, found.words
    assert "Traceback" not in found.words
