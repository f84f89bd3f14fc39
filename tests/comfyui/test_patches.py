"""Patches in the graph of a real ComfyUI: settings, sequences, files, strengths, records, pictures, all by wire."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyhost import ROOT, ComfyUI, ExecutionError
from graphs import base, difference, drawn, forget, node
from safetensors import safe_open

QUICK = json.dumps({"steps": 2, "n_images": 1, "sample_steps": 2, "batch_size": 1})

nonces = iter(range(10_000, 1_000_000))


def settings_node(comfyui: ComfyUI, kind: str, **changes: Any) -> dict[str, Any]:
    """A settings node with the values that the page would send: the node's own defaults, but for ``changes``."""
    name = f"ForgetConcept{kind}Settings"
    known = comfyui.get(f"/object_info/{name}")[name]["input"]["required"]
    values = {key: spec[1]["default"] for key, spec in known.items()}
    assert set(changes) <= set(values)
    return node(name, **(values | changes))


def report(graph: dict[str, Any], source: str, output: int = 2) -> dict[str, Any]:
    return graph | {f"{source}-words": node("PreviewAny", source=[source, output])}


def words(entry: dict[str, Any], source: str) -> str:
    return entry["outputs"][f"{source}-words"]["text"][0]


def red(comfyui: ComfyUI, graph: dict[str, Any]) -> ExecutionError:
    with pytest.raises(ExecutionError) as caught:
        comfyui.run(graph)
    return caught.value


def saved(comfyui: ComfyUI) -> list[Path]:
    return sorted(
        (comfyui.folder / "models" / "loras").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    )


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def sequence(concept: str, replacement: str, earlier: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    inputs = forget(concept=concept, replacement=replacement, preserve="", **changes)["inputs"]
    return node("ForgetConceptInSequence", **inputs, **({} if earlier is None else {"earlier": earlier}))


# -- settings -----------------------------------------------------------------------------------------------------


def test_a_settings_node_says_what_the_boxes_would(comfyui: ComfyUI) -> None:
    """Wire and box make the same patch; the wire names the method, and says so."""
    chosen = {"steps": 3, "n_images": 1, "sample_steps": 2, "batch_size": 1}
    graph = base() | {
        "settings": settings_node(comfyui, "ForgetMeNot", **chosen),
        "wired": forget(method_settings=["settings", 0]),
        "boxed": forget(method="forget_me_not", settings=json.dumps(chosen)),
    }
    graph |= drawn("w", ["wired", 0]) | drawn("b", ["boxed", 0]) | {"d": difference("w", "b")}
    entry = comfyui.run(report(report(graph, "wired"), "boxed"))
    assert entry["outputs"]["d"]["difference"] == [0]
    assert "method and preset are those of the connected settings node" in words(entry, "wired")
    assert "settings node" not in words(entry, "boxed")
    assert '"steps": 3' in words(entry, "wired")


def test_a_settings_node_of_defaults_is_the_preset(comfyui: ComfyUI) -> None:
    comfyui.get("/probe/told")
    graph = base() | {"settings": settings_node(comfyui, "Uce"), "forget": forget(method_settings=["settings", 0])}
    entry = comfyui.run(report(graph, "forget"))
    assert "settings:" not in words(entry, "forget")
    assert any(text.endswith("preset tuned, as it is.") for text in comfyui.get("/probe/told")["texts"])


def test_every_method_has_a_settings_node_with_only_its_own_fields(comfyui: ComfyUI) -> None:
    from forget_concept.core.methods.registry import all_methods
    from forget_concept.core.service.forms import form_fields, presets
    from forget_concept.nodes.fields import node_id

    info = comfyui.get("/object_info")
    for method in all_methods().values():
        known = info[node_id(method)]["input"]["required"]
        assert list(known) == ["preset", *(widget.name for widget in form_fields(method))]
        assert known["preset"][1]["forget_concept_presets"] == json.loads(json.dumps(presets(method)))
        assert info[node_id(method)]["output"] == ["FORGET_SETTINGS"]


def test_a_setting_that_cannot_be_is_a_red_settings_node(comfyui: ComfyUI) -> None:
    settings = settings_node(comfyui, "Uce", projections_to_k=False, projections_to_v=False)
    graph = base() | {"settings": settings, "forget": forget(method_settings=["settings", 0])}
    found = red(comfyui, report(graph, "forget"))
    assert found.node == "settings"
    assert "'projections'" in found.words


# -- files --------------------------------------------------------------------------------------------------------


def test_what_is_saved_can_be_loaded_and_is_the_same_patch(comfyui: ComfyUI) -> None:
    """Bit for bit, with its record, under a name of its own each time; the stock loader takes it too."""
    before = saved(comfyui)
    graph = base() | {"forget": forget(), "save": node("ForgetConceptSavePatch", lora=["forget", 1])}
    graph["save"]["inputs"] |= {"filename": f"kept/{next(nonces)}-%concept%", "precision": "float32"}
    comfyui.run(graph)
    again = graph | {"forget": forget(preserve="moon, heart")}
    comfyui.run(again)
    first, second = [path for path in saved(comfyui) if path not in before]
    assert first.name.endswith("-star_00001.safetensors") and second.name.endswith("-star_00002.safetensors")
    assert first.with_suffix(".preview.png").is_file()
    name = first.relative_to(comfyui.folder / "models" / "loras").as_posix()
    loading = base() | {"forget": forget(), "load-patch": node("ForgetConceptLoadPatch", file=name)}
    loading |= {
        "apply": node("ForgetConceptApplyPatch", model=["load", 0], lora=["load-patch", 0], strength=1.0),
        "half": node("ForgetConceptApplyPatch", model=["load", 0], lora=["load-patch", 0], strength=0.5),
        "none": node("ForgetConceptApplyPatch", model=["load", 0], lora=["load-patch", 0], strength=0.0),
        "stock": node("LoraLoaderModelOnly", model=["load", 0], lora_name=name, strength_model=1.0),
        "wire": comfyui.stock("LoraModelLoader", model=["load", 0], lora=["load-patch", 0], strength_model=1.0),
        "inspect": node("ForgetConceptInspectPatch", lora=["load-patch", 0], model=["load", 0]),
    }
    sources = {"live": "forget", "applied": "apply", "halved": "half", "unpatched": "none", "base": "load"}
    for picture, source in (sources | {"stock-p": "stock", "wire-p": "wire"}).items():
        loading |= drawn(picture, [source, 0])
    pairs = [("live", "applied"), ("live", "stock-p"), ("live", "wire-p"), ("unpatched", "base"), ("live", "halved")]
    loading |= {f"{a}:{b}": difference(a, b) for a, b in pairs}
    entry = comfyui.run(report(report(loading, "apply", 1), "load-patch", 1))
    found = {f"{a}:{b}": entry["outputs"][f"{a}:{b}"]["difference"][0] for a, b in pairs}
    assert [found[f"{a}:{b}"] for a, b in pairs[:4]] == [0, 0, 0, 0]
    assert found["live:halved"] > 0.5
    assert "it was made on this very model" in words(entry, "apply")
    assert "100.0 % of the edit survives" in words(entry, "apply")
    for text in (words(entry, "load-patch"), entry["outputs"]["inspect"]["text"][0]):
        assert "1. forgotten: star (object), shown as 'circle'; uce, preset tuned, strength 1, seed 0" in text
        assert "kept: moon" in text
    assert "fits this MODEL" in entry["outputs"]["inspect"]["text"][0]


def test_the_stock_nodes_take_what_carries_metadata_for_a_plain_lora(comfyui: ComfyUI) -> None:
    graph = base() | {
        "forget": forget(),
        "save": node(comfyui.kind("SaveLoRA", "SaveLoRANode"), lora=["forget", 1], prefix=f"stock/{next(nonces)}"),
    }
    comfyui.run(graph)
    (path,) = (comfyui.folder / "output" / "stock").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert all(name.startswith("diffusion_model.") for name in names)
        assert len(names) == 3 * 22


def test_a_saved_patch_and_its_picture_carry_the_workflow(comfyui: ComfyUI) -> None:
    from PIL import Image

    before = saved(comfyui)
    graph = base() | {"forget": forget(concept="moon", replacement="heart", preserve="")}
    graph |= drawn("after", ["forget", 0])
    graph |= {"save": node("ForgetConceptSavePatch", lora=["forget", 1], image=["after", 0], precision="float16")}
    graph["save"]["inputs"]["filename"] = f"{next(nonces)}"
    workflow = {"nodes": [], "links": [], "version": 0.4, "extra": {"note": "ünïcode ✓ ☂"}}
    answer = comfyui.post("/prompt", {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": workflow}}})
    entry = comfyui.wait(answer["prompt_id"])
    (path,) = [path for path in saved(comfyui) if path not in before]
    picture = Image.open(path.with_suffix(".preview.png"))
    for carried in (metadata(path), picture.text):
        assert json.loads(carried["workflow"]) == workflow
        assert json.loads(carried["prompt"]) == graph
    assert picture.size == (128, 128)
    assert metadata(path)["forget_concept.concepts"] == '["moon"]'
    assert metadata(path)["ss_output_name"] == path.stem
    assert comfyui.image(entry, "save").startswith(b"\x89PNG")
    with safe_open(path, "pt") as file:
        weights = [name for name in list(file.keys()) if name.endswith(".weight")]
        assert {str(file.get_tensor(name).dtype) for name in weights} == {"torch.float16"}


@pytest.mark.parametrize("name", ["../out", "a/../../b", "/etc/x", "C:\\x", "..", "", "a/con/b", "what?", "x" * 200])
def test_a_file_outside_of_the_folder_is_refused_in_words(comfyui: ComfyUI, name: str) -> None:
    before = saved(comfyui)
    graph = base() | {"forget": forget(), "save": node("ForgetConceptSavePatch", lora=["forget", 1])}
    graph["save"]["inputs"] |= {"filename": name, "precision": "float32"}
    found = red(comfyui, graph)
    assert found.node == "save"
    assert any(
        part in found.words
        for part in ("not inside the LoRA folder", "has no name", "is not a valid file name", "too long")
    )
    assert saved(comfyui) == before


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody can write to, root neither; skipped in words where that cannot be had."""
    root = getattr(os, "geteuid", lambda: 1)() == 0
    shut, opened = (
        (["chattr", "+i", folder], ["chattr", "-i", folder]) if root else (["chmod", "555", folder], ["true"])
    )
    if not shutil.which(shut[0]) or subprocess.run(shut, capture_output=True).returncode:
        pytest.skip("this system has no folder that root cannot write to")
    try:
        yield
    finally:
        subprocess.run(opened, check=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(comfyui: ComfyUI) -> None:
    blocked = comfyui.folder / "models" / "loras" / f"blocked{next(nonces)}"
    blocked.write_text("a file where a folder is wanted")
    graph = base() | {"forget": forget(), "save": node("ForgetConceptSavePatch", lora=["forget", 1])}
    graph["save"]["inputs"] |= {"filename": f"{blocked.name}/x", "precision": "float32"}
    found = red(comfyui, graph)
    assert "cannot be written to" in found.words and "Traceback" not in found.words
    folder = blocked.with_name(f"shut{next(nonces)}")
    folder.mkdir()
    graph["save"]["inputs"]["filename"] = f"{folder.name}/x"
    with read_only(folder):
        found = red(comfyui, graph)
    assert f"'{folder}' cannot be written to" in found.words
    assert not list(folder.iterdir())


def test_files_that_are_no_patch_say_so(comfyui: ComfyUI) -> None:
    folder = comfyui.folder / "models" / "loras"
    (folder / "noise.safetensors").write_bytes(os.urandom(200))
    (folder / "pickle.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))
    for name, what in (("noise.safetensors", "not a safetensors file"), ("pickle.safetensors", "a pickle")):
        found = red(comfyui, report({"read": node("ForgetConceptLoadPatch", file=name)}, "read", 1))
        assert what in found.words, found.words
    outside = red(comfyui, report({"r": node("ForgetConceptLoadPatch", file="../../x")}, "r", 1))
    # refused by the host's own check of the list, or where that has none by the node
    assert "not in" in outside.words or "There is no file '../../x' in the LoRA folders" in outside.words


def test_an_adapter_that_cannot_be_applied_is_inspected(comfyui: ComfyUI) -> None:
    """A LoKr passes Load and is described by Inspect; Apply refuses it instead of applying a part."""
    import torch
    from safetensors.torch import save_file

    layer = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_"
    lokr = {f"{layer}k.lokr_w1": torch.ones(2, 2), f"{layer}k.lokr_w2": torch.ones(4, 4)}
    lora = {f"{layer}v.lora_up.weight": torch.ones(8, 2), f"{layer}v.lora_down.weight": torch.ones(2, 8)}
    save_file(lokr | lora, comfyui.folder / "models" / "loras" / "lokr.sft")
    graph = base() | {"read": node("ForgetConceptLoadPatch", file="lokr.sft")}
    looked = graph | {"inspect": node("ForgetConceptInspectPatch", lora=["read", 0])}
    found = comfyui.run(looked)["outputs"]["inspect"]["text"][0]
    assert "LoKr of 1 layers, LoRA of 1 layers, rank 2" in found and "cannot be applied" in found
    graph["apply"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["read", 0], strength=1.0)
    refused = red(comfyui, report(graph, "apply", 1))
    assert refused.node == "apply" and "LoKr in 2 tensors" in refused.words


def test_a_file_written_anew_is_read_anew(comfyui: ComfyUI) -> None:
    """Equal inputs are cached, unless the file itself is another one."""
    folder = comfyui.folder / "models" / "loras"
    before = saved(comfyui)
    graph = base() | {"forget": forget(), "save": node("ForgetConceptSavePatch", lora=["forget", 1])}
    graph["save"]["inputs"] |= {"filename": f"changing{next(nonces)}", "precision": "float32"}
    comfyui.run(graph)
    (path,) = [path for path in saved(comfyui) if path not in before]
    reading = report({"read": node("ForgetConceptLoadPatch", file=path.name)}, "read", 1)
    comfyui.run(reading)
    assert "read" in comfyui.cached(comfyui.run(reading))
    graph["forget"] = forget(concept="moon", replacement="heart", preserve="")
    comfyui.run(graph)
    (other,) = [each for each in saved(comfyui) if each not in before and each != path]
    os.replace(other, folder / path.name)
    assert "forgotten: moon" in words(comfyui.run(reading), "read")


# -- fitting ------------------------------------------------------------------------------------------------------


def test_a_patch_of_another_architecture_is_one_sentence(comfyui: ComfyUI, tmp_path: Path) -> None:
    """A patch of SDXL's layers and widths, as Apply, Inspect and the stock loader's own silence see it."""
    import torch

    from forget_concept.core.formats import kohya
    from forget_concept.core.patch.low_rank import LowRank
    from forget_concept.core.patch.patch import Patch

    factors = {
        f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn2.to_k": LowRank(
            torch.ones(640, 2), torch.ones(2, 2048)
        )
        for i in range(2)
    }
    sdxl = Patch(factors, {"forget_concept.family": "sdxl"})
    kohya.save(sdxl, comfyui.folder / "models" / "loras" / "sdxl.safetensors")
    graph = base() | {"read": node("ForgetConceptLoadPatch", file="sdxl.safetensors")}
    applied = graph | {"apply": node("ForgetConceptApplyPatch", model=["load", 0], lora=["read", 0], strength=1.0)}
    found = red(comfyui, report(applied, "apply", 1))
    assert found.node == "apply"
    assert "for another architecture" in found.words
    looked = graph | {"inspect": node("ForgetConceptInspectPatch", lora=["read", 0], model=["load", 0])}
    assert "does not fit this MODEL" in comfyui.run(looked)["outputs"]["inspect"]["text"][0]


def test_narrow_weights_keep_less_and_a_warning_says_so(comfyui: ComfyUI) -> None:
    """In bfloat16 a small part of the edit is rounded away, and most of an edit ten thousand times weaker."""
    graph = base() | {"forget": forget(), "narrow": node("ProbeNarrow", model=["load", 0], dtype="bfloat16")}
    for name, strength in (("whole", 1.0), ("weak", 0.0001)):
        graph[name] = node("ForgetConceptApplyPatch", model=["narrow", 0], lora=["forget", 1], strength=strength)
        graph = report(graph, name, 1)
    entry = comfyui.run(graph)
    shares = {name: float(words(entry, name).split("(bfloat16) ")[1].split(" %")[0]) for name in ("whole", "weak")}
    warnings.warn(f"{comfyui.host.name}: surviving shares in bfloat16: {shares}", stacklevel=1)
    assert 80 < shares["whole"] <= 110
    assert "warning: more than half of the edit is rounded away" not in words(entry, "whole")
    assert shares["weak"] < 50
    assert "warning: more than half of the edit is rounded away" in words(entry, "weak")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_share_is_that_of_the_weights_the_host_really_makes(comfyui: ComfyUI, dtype: str) -> None:
    graph = base() | {"forget": forget(), "narrow": node("ProbeNarrow", model=["load", 0], dtype=dtype)}
    graph["apply"] = node("ForgetConceptApplyPatch", model=["narrow", 0], lora=["forget", 1], strength=0.05)
    graph["measured"] = node("ProbeShare", base=["narrow", 0], patched=["apply", 0], lora=["forget", 1], strength=0.05)
    entry = comfyui.run(report(graph, "apply", 1))
    said = float(words(entry, "apply").split(f"({dtype}) ")[1].split(" %")[0])
    assert said == pytest.approx(100 * entry["outputs"]["measured"]["share"][0], abs=0.06)


# -- several ------------------------------------------------------------------------------------------------------


def test_combined_patches_are_the_sum_of_both(comfyui: ComfyUI) -> None:
    graph = base() | {"one": forget(), "other": forget(concept="tree", replacement="house", preserve="")}
    strengths = {"strength_a": 1.0, "strength_b": 0.5, "strength_c": 1.0, "strength_d": 1.0, "max_rank": 0}
    graph["both"] = node("ForgetConceptCombinePatches", lora_a=["one", 1], lora_b=["other", 1], **strengths)
    graph["once"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["both", 0], strength=1.0)
    graph["first"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["one", 1], strength=1.0)
    graph["then"] = node("ForgetConceptApplyPatch", model=["first", 0], lora=["other", 1], strength=0.5)
    graph["small"] = node(
        "ForgetConceptCombinePatches", lora_a=["one", 1], lora_b=["other", 1], **strengths | {"max_rank": 4}
    )
    graph |= drawn("x", ["once", 0]) | drawn("y", ["then", 0]) | {"d": difference("x", "y")}
    entry = comfyui.run(report(report(graph, "both", 1), "small", 1))
    assert entry["outputs"]["d"]["difference"][0] < 0.05
    for line in ("part at strength 1: star", "part at strength 0.5: tree"):
        assert line in words(entry, "both")
    assert "rank 4" in words(entry, "small") and "% of the edit is preserved" in words(entry, "small")


def test_a_sequence_keeps_its_record_through_a_file_and_gives_one_back(comfyui: ComfyUI) -> None:
    """Forget two, save, load, forget a third, take the second back: the sequence of the first and the third."""
    before = saved(comfyui)
    first = base() | {"one": sequence("star", "circle")}
    first["two"] = sequence("tree", "house", ["one", 1])
    first["save"] = node("ForgetConceptSavePatch", lora=["two", 1], filename=f"s{next(nonces)}", precision="float32")
    comfyui.run(first)
    (path,) = [each for each in saved(comfyui) if each not in before]
    graph = base() | {"read": node("ForgetConceptLoadPatch", file=path.name)}
    graph["three"] = sequence("moon", "heart", ["read", 0])
    graph["back"] = node("ForgetConceptTakeBack", model=["load", 0], clip=["load", 1], lora=["three", 1], which="tree")
    graph["one"] = sequence("star", "circle")
    graph["straight"] = sequence("moon", "heart", ["one", 1])
    graph |= drawn("x", ["back", 0]) | drawn("y", ["straight", 0]) | drawn("z", ["three", 0])
    graph |= {"same": difference("x", "y"), "other": difference("x", "z")}
    entry = comfyui.run(report(report(graph, "three"), "back"))
    assert entry["outputs"]["same"]["difference"][0] == 0
    for number, name in enumerate(("star", "tree", "moon"), 1):
        assert f"{number}. forgotten: {name}" in words(entry, "three")
    assert "taken back: tree" in words(entry, "back")
    assert "2. forgotten" not in words(entry, "back").split("still forgotten:")[1]
    assert entry["outputs"]["same"]["finite"] == [True]


def test_a_sequence_of_trained_requests(comfyui: ComfyUI) -> None:
    quick = {"method": "forget_me_not", "settings": QUICK}
    graph = base() | {"one": sequence("star", "circle", **quick)}
    graph["two"] = sequence("tree", "house", ["one", 1], **quick)
    graph["back"] = node("ForgetConceptTakeBack", model=["load", 0], clip=["load", 1], lora=["two", 1], which="#1")
    entry = comfyui.run(report(report(graph, "two"), "back"))
    assert "2. forgotten: tree" in words(entry, "two")
    assert "'tree' were trained on top of it" in words(entry, "back")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"which": "ship"}, "does not forget 'ship'"),
        ({"which": "7"}, "does not forget a request number 7"),
        ({"which": " "}, "Nothing is named to be taken back"),
        ({"which": "star, tree"}, "would be empty"),
    ],
)
def test_what_cannot_be_taken_back_says_so(comfyui: ComfyUI, changes: dict[str, Any], said: str) -> None:
    graph = base() | {"one": sequence("star", "circle")}
    graph["two"] = sequence("tree", "house", ["one", 1])
    inputs = {"model": ["load", 0], "clip": ["load", 1], "lora": ["two", 1]}
    graph["back"] = node("ForgetConceptTakeBack", **inputs, **changes)
    found = red(comfyui, report(graph, "back"))
    assert found.node == "back"
    assert said in found.words


def test_a_sequence_on_a_model_that_is_patched_already_says_how_it_is_meant(comfyui: ComfyUI) -> None:
    graph = base() | {"one": sequence("star", "circle")}
    graph["two"] = sequence("tree", "house", ["one", 1], model=["one", 0])
    found = red(comfyui, report(graph, "two"))
    assert found.node == "two"
    assert "connect the checkpoint's own MODEL" in found.words
    graph["two"] = sequence("star", "heart", ["one", 1])
    assert "already forgotten, by request 1" in red(comfyui, report(graph, "two")).words


@pytest.mark.parametrize(("part", "name"), [("unet", "UNet"), ("text", "text encoder"), ("vae", "autoencoder")])
def test_a_damaged_checkpoint_is_named_and_nothing_else_is_blamed(comfyui: ComfyUI, part: str, name: str) -> None:
    def graph(which: str) -> dict[str, Any]:
        wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
        found = {"load": base()["load"], "damage": node("ProbeDamage", **wires, part=which, nonce=next(nonces))}
        found["forget"] = forget(model=["damage", 0], clip=["damage", 1], vae=["damage", 2])
        return report(found, "forget")

    try:
        failed = red(comfyui, graph(part))
        assert failed.node == "forget" and f"is damaged: its {name} has NaN or infinite values" in failed.words
    finally:
        entry = comfyui.run(graph("none"))
    assert "forgotten: star" in words(entry, "forget")


# -- pictures and what is measured ----------------------------------------------------------------------------------


def test_pictures_of_ones_own_are_brought_to_the_models_size(comfyui: ComfyUI) -> None:
    settings = settings_node(
        comfyui, "ForgetMeNot", latents="images", steps=2, n_images=1, sample_steps=2, batch_size=1
    )
    graph = base() | {"settings": settings}
    graph |= {"big": node("EmptyImage", width=300, height=200, batch_size=2, color=0x204060)}
    graph |= {"small": node("EmptyImage", width=128, height=128, batch_size=2, color=0xC08040)}
    graph["first"] = node("ForgetConceptReferenceImages", images=["big", 0], concept="")
    graph["all"] = node("ForgetConceptReferenceImages", images=["small", 0], concept=" a Star ", before=["first", 0])
    told = {"method_settings": ["settings", 0], "images": ["all", 0], "vae": ["load", 2]}
    graph["forget"] = forget(**told)
    assert "forgotten: star" in words(comfyui.run(report(graph, "forget")), "forget")
    for changes, said in (
        ({"vae": None}, "connect the checkpoint's VAE"),
        ({"images": ["first", 0]}, "too few pictures of 'star'"),
        ({"concept": "star, moon", "replacement": "", "preserve": ""}, "do not name theirs"),
        ({"method_settings": None}, "works from words alone"),
    ):
        inputs = {key: value for key, value in ({**told} | changes).items() if value is not None}
        found = red(comfyui, report(graph | {"forget": forget(**inputs)}, "forget"))
        assert said in found.words, found.words
    tiny = node("EmptyImage", width=40, height=40, batch_size=3, color=0)
    shrunk = graph | {"big": tiny}
    assert "too small" in red(comfyui, report(shrunk, "forget")).words


def test_fisher_information_is_measured_once_and_used(comfyui: ComfyUI) -> None:
    quick = {"steps": 2, "n_images": 1, "replay_images": 1, "sample_steps": 2, "batch_size": 1, "fisher_samples": 2}
    graph = base() | {"settings": settings_node(comfyui, "SelectiveAmnesia", **quick, fisher_draws=1)}
    wires = {"model": ["load", 0], "clip": ["load", 1], "preset": "tuned", "method_settings": ["settings", 0]}
    graph["fisher"] = node("ForgetConceptFisherInformation", **wires)
    graph["forget"] = forget(method_settings=["settings", 0], fisher=["fisher", 0])
    comfyui.get("/probe/told")
    entry = comfyui.run(report(report(graph, "fisher", 1), "forget"))
    assert "on 2 pictures" in words(entry, "fisher")
    (kept,) = (comfyui.folder / "user" / "__forget_concept" / "fisher").glob("*.safetensors")
    told = comfyui.get("/probe/told")["texts"]
    measured = [i for i, text in enumerate(told) if "measuring Fisher" in text]
    learned = [i for i, text in enumerate(told) if "learning the surrogate" in text]
    assert measured and learned and max(measured) < min(learned)
    stamp = kept.stat().st_mtime_ns
    graph["forget"] = forget(method_settings=["settings", 0], fisher=["fisher", 0], concept="moon", replacement="heart")
    graph["forget"]["inputs"]["preserve"] = ""
    assert "fisher" in comfyui.cached(comfyui.run(report(report(graph, "fisher", 1), "forget")))
    assert kept.stat().st_mtime_ns == stamp
    assert not any("measuring Fisher" in text for text in comfyui.get("/probe/told")["texts"])
    graph["other"] = settings_node(comfyui, "SelectiveAmnesia", **quick | {"fisher_samples": 2}, fisher_draws=2)
    graph["forget"] = forget(method_settings=["other", 0], fisher=["fisher", 0])
    assert "measured on another model or with other settings" in red(comfyui, report(graph, "forget")).words
    graph["forget"] = forget(fisher=["fisher", 0])
    assert "Fisher information is for Selective Amnesia" in red(comfyui, report(graph, "forget")).words


# -- live ---------------------------------------------------------------------------------------------------------


def test_the_concept_is_shown_while_it_fades_and_nothing_else_changes(comfyui: ComfyUI) -> None:
    chosen = {"steps": 6, "n_images": 1, "sample_steps": 2, "batch_size": 1}
    wires = {"method": "forget_me_not", "settings": json.dumps(chosen), "seed": next(nonces)}
    graph = base() | {
        "with": forget(**wires, preview_every=2, vae=["load", 2]),
        "without": forget(**wires, preview_every=0),
    }
    comfyui.get("/probe/told")
    comfyui.run(report(graph, "with"))
    shown = comfyui.get("/probe/told")
    assert shown["pictures"] == 4, "at the first step and at every second one"
    lines = [text for text in shown["texts"] if "re-steering" in text]
    assert any("loss" in text and text.endswith("left") for text in lines), lines
    comfyui.run(report(graph, "without"))
    assert comfyui.get("/probe/told")["pictures"] == 0
    graph |= drawn("x", ["with", 0]) | drawn("y", ["without", 0]) | {"d": difference("x", "y")}
    assert comfyui.run(graph)["outputs"]["d"]["difference"] == [0]


def test_the_closed_form_draws_no_previews(comfyui: ComfyUI) -> None:
    comfyui.get("/probe/told")
    comfyui.run(report(base() | {"forget": forget(preserve=f"moon, tree {next(nonces)}", preview_every=1)}, "forget"))
    assert comfyui.get("/probe/told")["pictures"] == 0


def test_cancel_while_a_preview_is_drawn(comfyui: ComfyUI) -> None:
    endless = json.dumps({"steps": 100000, "n_images": 1, "sample_steps": 2, "batch_size": 1})
    graph = base() | {"forget": forget(method="forget_me_not", settings=endless, preview_every=1, seed=next(nonces))}
    before = state(comfyui)
    comfyui.get("/probe/told")
    prompt = comfyui.queue(report(graph, "forget"))
    deadline = time.monotonic() + 60
    while not comfyui.get("/probe/told")["pictures"]:
        assert time.monotonic() < deadline, comfyui.tail()
        time.sleep(0.1)
    pressed = time.monotonic()
    comfyui.interrupt()
    assert "execution_interrupted" in comfyui.statuses(comfyui.wait(prompt, 30))
    assert time.monotonic() - pressed < 5
    assert state(comfyui) == before
    short = base() | {"forget": forget(method="forget_me_not", settings=QUICK, preview_every=1, seed=next(nonces))}
    assert "execution_success" in comfyui.statuses(comfyui.run(report(short, "forget")))


def state(comfyui: ComfyUI) -> dict[str, str]:
    graph = {"load": base()["load"], "hash": node("ProbeHash", model=["load", 0], nonce=next(nonces))}
    found = comfyui.run(graph)["outputs"]["hash"]["hash"][0]
    return {key: value for key, value in found.items() if key != "rng"}


@pytest.mark.parametrize("what", ["error", "memory", "cancel"])
def test_a_sequence_that_breaks_off_leaves_the_model_and_the_earlier_patch(comfyui: ComfyUI, what: str) -> None:
    quick = {"method": "forget_me_not", "settings": QUICK}
    graph = base() | {"one": sequence("star", "circle", seed=next(nonces))}
    graph["two"] = sequence("tree", "house", ["one", 1], **quick)
    comfyui.run(report(graph, "one"))
    before = state(comfyui)
    arm = {"load": base()["load"], "trap": node("ProbeTrap", model=["load", 0], what=what, call=3, nonce=next(nonces))}
    comfyui.run(arm)
    try:
        if what == "cancel":
            assert "execution_interrupted" in comfyui.statuses(comfyui.run(report(graph, "two")))
        else:
            assert red(comfyui, report(graph, "two")).node == "two"
    finally:
        comfyui.run(arm | {"trap": node("ProbeTrap", model=["load", 0], what="none", call=1, nonce=next(nonces))})
    after = state(comfyui)
    assert after["memory"] == before["memory"] if what == "memory" else after == before
    assert "2. forgotten: tree" in words(comfyui.run(report(graph, "two")), "two")


# -- words --------------------------------------------------------------------------------------------------------


def test_words_of_every_script_and_many_of_them(comfyui: ComfyUI) -> None:
    names = ["🌟🚀", "نجمة حمراء", "כוכב", "звезда", "星、月亮", "👩\u200d🚀"]
    graph = base() | {"forget": forget(concept="\n".join(names), replacement="", preserve="")}
    text = words(comfyui.run(report(graph, "forget")), "forget")
    for name in ("🌟🚀", "نجمة حمراء", "כוכב", "звезда", "星", "月亮", "👩\u200d🚀"):
        assert f"forgotten: {name} (object)" in text
    many = ", ".join(f"thing number {i}" for i in range(200))
    start = time.monotonic()
    graph = base() | {"forget": forget(concept=many, replacement="", preserve="", preset="published")}
    text = words(comfyui.run(report(graph, "forget"), 600), "forget")
    warnings.warn(f"{comfyui.host.name}: 200 concepts took {time.monotonic() - start:.1f} s", stacklevel=1)
    assert "188 more" in text and len(text) < 3000


def test_wires_that_are_empty_say_which_and_what_to_connect(comfyui: ComfyUI) -> None:
    for name, inputs, said in (
        ("ForgetConcept", forget(model=["none", 0])["inputs"], "input MODEL is empty"),
        ("ForgetConcept", forget(clip=["none", 1])["inputs"], "input CLIP is empty"),
        ("ForgetConceptApplyPatch", {"model": ["none", 0], "lora": ["f", 1], "strength": 1.0}, "input MODEL is empty"),
        ("ForgetConceptApplyPatch", {"model": ["load", 0], "lora": ["none", 2], "strength": 1.0}, "no LoRA in"),
        ("ForgetConceptInspectPatch", {"lora": ["none", 2]}, "no LoRA in"),
    ):
        graph = base() | {"none": node("ProbeNothing"), "f": forget(), "x": node(name, **inputs)}
        found = red(comfyui, graph | ({} if "Inspect" in name else {"w": node("PreviewAny", source=["x", 0])}))
        assert said in found.words, found.words
    found = red(
        comfyui, base() | {"a": node("ForgetConceptApplyPatch", strength=1.0), "w": node("PreviewAny", source=["a", 0])}
    )
    assert "Required input is missing" in found.words


def test_a_workflow_saved_before_there_were_more_inputs_still_runs(comfyui: ComfyUI) -> None:
    """The first release's: eleven widgets, in their order, and no wires but MODEL and CLIP."""
    from graphs import from_workflow

    workflow = json.loads((Path(__file__).parent / "workflow_0.json").read_text(encoding="utf-8"))
    graph = from_workflow(workflow, comfyui.get("/object_info"))
    assert "execution_success" in comfyui.statuses(comfyui.run(graph))
    inputs = next(part["inputs"] for part in graph.values() if part["class_type"] == "ForgetConcept")
    assert inputs["settings"] == "" and inputs["seed"] == 0 and inputs["method"] == "uce"
    assert (ROOT / "example_workflows").is_dir()
