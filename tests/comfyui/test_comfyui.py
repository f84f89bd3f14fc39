"""The pack in a real ComfyUI: loaded under any folder name, run through POST /prompt, cancelled, made to fail."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from comfyhost import ROOT, ComfyUI, ExecutionError, png_size
from graphs import DYNAMIC, PROMPT, base, below, difference, drawn, forget, from_workflow, node
from nodetexts import english, ours

from forget_concept.nodes.generate import plain

# training in a few steps: what is looked at here is the host's model, not what is forgotten
QUICK = json.dumps({"steps": 2, "n_images": 1, "sample_steps": 2, "batch_size": 1})
ENDLESS = json.dumps({"steps": 100000, "n_images": 1, "sample_steps": 2, "batch_size": 1})

nonces = iter(range(1, 1_000_000))


def hashes(comfyui: ComfyUI, **more: Any) -> dict[str, str]:
    """The embedded model's memory, flags and addresses as they are now (the loader's node is cached)."""
    graph = {"load": base()["load"], "hash": node("ProbeHash", model=["load", 0], nonce=next(nonces)), **more}
    entry = comfyui.run(graph)
    found = entry["outputs"]["hash"]["hash"][0]
    found.pop("rng")
    return found


def trapped(comfyui: ComfyUI, what: str, call: int = 1) -> None:
    trap = node("ProbeTrap", model=["load", 0], what=what, call=call, nonce=next(nonces))
    comfyui.run({"load": base()["load"], "trap": trap})


def red(comfyui: ComfyUI, graph: dict[str, Any]) -> ExecutionError:
    with pytest.raises(ExecutionError) as caught:
        comfyui.run(graph)
    return caught.value


# -- loaded -------------------------------------------------------------------------------------------------------


def test_the_pack_loads_under_any_folder_name(comfyui: ComfyUI) -> None:
    info = comfyui.get("/object_info")
    own = {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{comfyui.pack_name}"}
    assert set(own) == set(ours(info)), "an id without the pack's prefix"
    assert len(own) >= 15
    for name, known in own.items():
        assert known["category"] == "model_patches/unlearning"
        assert known["description"] and known["display_name"]
        for section in ("required", "optional"):
            for field, (_, *options) in known["input"].get(section, {}).items():
                assert options and options[0].get("tooltip"), f"{name}: {field} has no tooltip"
        assert all(known["output_tooltips"]), f"{name}: an output has no tooltip"
    known = own["ForgetConcept"]
    assert known["output"] == ["MODEL", "LORA_MODEL", "STRING"]
    assert own["ForgetConceptLoadEmbeddedModel"]["output"] == ["MODEL", "CLIP", "VAE"]
    methods = known["input"]["required"]["method"]
    assert {"uce", "forget_me_not"} <= set(methods[0] if isinstance(methods[0], list) else methods[1]["options"])
    started, said, _ = comfyui.log.read_text(encoding="utf-8", errors="replace").partition("To see the GUI")
    assert said and "Traceback" not in started


def test_the_pages_of_help_and_the_translations_belong_to_the_nodes(comfyui: ComfyUI) -> None:
    own = ours(comfyui.get("/object_info"))
    pages = {page.stem: page for page in (ROOT / "web" / "docs").glob("*.md")}
    assert set(pages) == set(own)
    for page in pages.values():
        address = f"/extensions/{comfyui.pack_name}/docs/{page.name}"
        assert comfyui.raw(address).decode() == page.read_text(encoding="utf-8")
    translations = comfyui.get("/i18n")
    for path in (ROOT / "locales").glob("*/nodeDefs.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        assert set(told) == set(own)
        for name, texts in told.items():
            known = {e for part in ("required", "optional") for e in own[name]["input"].get(part, {})}
            assert set(texts["inputs"]) == known
            assert set(texts["outputs"]) == {str(i) for i in range(len(own[name]["output"]))}
            assert translations[path.parent.name]["nodeDefs"][name] == texts
            for entry in [*texts["inputs"].values(), *texts["outputs"].values()]:
                assert plain(entry["name"]) and plain(entry["tooltip"])
            assert plain(texts["display_name"]) and plain(texts["description"])


def test_the_english_locale_is_what_the_nodes_say(comfyui: ComfyUI) -> None:
    told = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert told == english(ours(comfyui.get("/object_info"))), "run 'make generated'"


# -- run ----------------------------------------------------------------------------------------------------------


def test_the_example_workflow_makes_two_different_pictures(comfyui: ComfyUI) -> None:
    offered = [names for names in comfyui.get("/api/workflow_templates").values() if "forget_concept_embedded" in names]
    assert offered, "the host does not offer the example workflow"
    workflow = json.loads((ROOT / "example_workflows" / "forget_concept_embedded.json").read_text(encoding="utf-8"))
    graph = from_workflow(workflow, comfyui.get("/object_info"))
    entry = comfyui.run(graph)
    saves = [name for name, part in graph.items() if part["class_type"] == "SaveImage"]
    pictures = [comfyui.image(entry, name) for name in saves]
    assert len(pictures) == 2
    assert all(png_size(picture) == (128, 128) for picture in pictures)
    assert pictures[0] != pictures[1]


def test_the_patch_changes_the_picture_and_not_the_model(comfyui: ComfyUI) -> None:
    before = hashes(comfyui)
    graph = base() | {"forget": forget()} | drawn("with", ["forget", 0]) | drawn("without", ["load", 0])
    graph |= {"difference": difference("with", "without"), "report": node("PreviewAny", source=["forget", 2])}
    entry = comfyui.run(graph)
    found = entry["outputs"]["difference"]
    assert found["finite"] == [True]
    assert found["difference"][0] > 0.5
    assert "forgotten: star (object), shown as 'circle'" in entry["outputs"]["report"]["text"][0]
    after = hashes(comfyui)
    # the stock sampler has since baked and unbaked the patch: the objects may be others, the bits may not
    assert (after["weights"], after["memory"]) == (before["weights"], before["memory"])


@pytest.mark.parametrize("method", ["uce", "forget_me_not"])
def test_the_file_loaded_by_the_stock_loader_gives_the_live_picture(comfyui: ComfyUI, method: str) -> None:
    settings = QUICK if method == "forget_me_not" else ""
    making = base() | {"forget": forget(method=method, settings=settings)} | drawn("live", ["forget", 0])
    making |= {"save": node(comfyui.kind("SaveLoRA", "SaveLoRANode"), lora=["forget", 1], prefix=f"made/{method}")}
    comfyui.run(making)
    (written,) = (comfyui.folder / "output" / "made").glob(f"{method}_*.safetensors")
    name = f"{method}-{next(nonces)}.safetensors"
    shutil.move(written, comfyui.folder / "models" / "loras" / name)
    loaded = {
        "file": node("LoraLoaderModelOnly", model=["load", 0], lora_name=name, strength_model=1.0),
        "wire": comfyui.stock("LoraModelLoader", model=["load", 0], lora=["forget", 1], strength_model=1.0),
        "none": node("LoraLoaderModelOnly", model=["load", 0], lora_name=name, strength_model=0.0),
    }
    graph = making | loaded | drawn("from-file", ["file", 0]) | drawn("from-wire", ["wire", 0])
    graph |= drawn("from-none", ["none", 0]) | drawn("without", ["load", 0])
    graph |= {"file-live": difference("from-file", "live"), "wire-live": difference("from-wire", "live")}
    graph |= {"none-base": difference("from-none", "without"), "file-base": difference("from-file", "without")}
    outputs = comfyui.run(graph)["outputs"]
    greatest = {key: outputs[key]["difference"][0] for key in ("file-live", "wire-live", "none-base", "file-base")}
    warnings.warn(f"{comfyui.host.name}, {method}: greatest pixel differences (of 255): {greatest}", stacklevel=1)
    assert greatest["file-live"] == greatest["wire-live"] == greatest["none-base"] == 0
    assert greatest["file-base"] > 0.01


def test_a_patched_model_carries_what_the_stock_loader_leaves_and_samples_as_fast(comfyui: ComfyUI) -> None:
    graph = base() | {"forget": forget()}
    graph |= {"stock": comfyui.stock("LoraModelLoader", model=["load", 0], lora=["forget", 1], strength_model=1.0)}
    graph |= {f"left-{name}": node("ProbePatches", model=[name, 0]) for name in ("load", "forget", "stock")}
    speed = {"positive": ["text", 0], "negative": ["empty", 0], "latent": ["latent", 0], "steps": 4}
    graph |= {"speed": node("ProbeSpeed", a=["load", 0], b=["forget", 0], runs=3, rounds=2, **speed)}
    outputs = comfyui.run(graph)["outputs"]
    left = {name: outputs[f"left-{name}"] for name in ("load", "forget", "stock")}
    assert left["forget"] == left["stock"]
    assert set(left["forget"]["counts"][0].values()) == {1}
    assert left["forget"]["others"] == left["load"]["others"]
    seconds = outputs["speed"]["seconds"][0]
    ratio = seconds["b"] / seconds["a"]
    warnings.warn(f"{comfyui.host.name}: sampling with the patch takes {ratio:.3f} of the time without", stacklevel=1)
    # the patch is in the weights: only the machine's own unrest is left
    assert ratio < 1.5


def test_a_trained_method_runs_and_the_model_stays_bit_identical(comfyui: ComfyUI) -> None:
    comfyui.get("/probe/told")
    before = hashes(comfyui)
    graph = base() | {"forget": forget(method="forget_me_not", settings=QUICK, seed=next(nonces))}
    graph |= {"hash": node("ProbeHash", model=["load", 0], after=["forget", 0], nonce=next(nonces))}
    found = comfyui.run(graph)["outputs"]["hash"]["hash"][0]
    assert {key: found[key] for key in before} == before
    told = comfyui.get("/probe/told")
    assert told["counts"]["progress_state"] > 2
    assert any("loss" in text for text in told["texts"])
    assert any(text.startswith("forgotten: star") for text in told["texts"])


def test_the_hosts_random_numbers_are_left_alone(comfyui: ComfyUI) -> None:
    graph = base() | {"first": node("ProbeHash", model=["load", 0], nonce=next(nonces))}
    graph |= {"forget": forget(method="forget_me_not", settings=QUICK, model=["first", 0], seed=next(nonces))}
    graph |= {"then": node("ProbeHash", model=["load", 0], after=["forget", 0], nonce=next(nonces))}
    outputs = comfyui.run(graph)["outputs"]
    assert outputs["first"]["hash"][0]["rng"] == outputs["then"]["hash"][0]["rng"]


def test_equal_inputs_are_not_worked_out_again(comfyui: ComfyUI) -> None:
    graph = base() | {"forget": forget(preserve="heart"), "report": node("PreviewAny", source=["forget", 2])}
    comfyui.run(graph)
    assert "forget" in comfyui.cached(comfyui.run(graph))
    assert "forget" not in comfyui.cached(comfyui.run(graph | {"forget": forget(preserve="heart", strength=0.5)}))


def test_several_concepts_and_kinds_of_words(comfyui: ComfyUI) -> None:
    told = forget(concept="star, moon\na (small) house", replacement="circle,heart\ntree", preserve="fish,boat")
    graph = base() | {"forget": told, "report": node("PreviewAny", source=["forget", 2])}
    words = comfyui.run(graph)["outputs"]["report"]["text"][0]
    for line in ("star (object), shown as 'circle'", "a (small) house (object), shown as 'tree'", "kept: fish, boat"):
        assert line in words


def test_an_incoming_patch_is_worked_on_top_of(comfyui: ComfyUI) -> None:
    """Two in a row: the second sees the first one's weights, so it is another patch than alone, and says so."""
    second = forget(concept="moon", replacement="heart", preserve="")
    graph = base() | {"forget": forget(), "alone": second}
    graph |= {"stacked": node("ForgetConcept", **{**second["inputs"], "model": ["forget", 0]})}
    graph |= {"a": node("PreviewAny", source=["alone", 2]), "s": node("PreviewAny", source=["stacked", 2])}
    graph |= drawn("both", ["stacked", 0]) | drawn("first", ["forget", 0]) | {"d": difference("both", "first")}
    before = hashes(comfyui)
    outputs = comfyui.run(graph)["outputs"]
    alone, stacked = outputs["a"]["text"][0], outputs["s"]["text"][0]
    assert "carries patches on 22 weights" in stacked and "carries patches" not in alone
    bases = [next(line for line in words.splitlines() if line.startswith("base model")) for words in (alone, stacked)]
    assert bases[0] != bases[1]
    assert outputs["d"]["difference"][0] > 0
    assert hashes(comfyui)["weights"] == before["weights"]


@pytest.mark.parametrize("method", ["uce", "forget_me_not"])
def test_little_memory_gives_the_same_patch(comfyui: ComfyUI, method: str) -> None:
    """Weights left offloaded, and the incoming patch worked in at each use, make no difference."""
    settings = QUICK if method == "forget_me_not" else ""
    second = forget(concept="moon", replacement="heart", preserve="", method=method, settings=settings)["inputs"]
    second["model"] = ["forget", 0]
    tight = {**second, "model": ["tight", 0]}
    graph = base() | {"forget": forget(), "tight": node("ProbeLowMemory", model=["forget", 0])}
    graph |= {"a": node("ForgetConcept", **second), "b": node("ForgetConcept", **tight)}
    one = {"one": comfyui.stock("LoraModelLoader", model=["forget", 0], lora=["a", 1], strength_model=1.0)}
    other = {"other": comfyui.stock("LoraModelLoader", model=["forget", 0], lora=["b", 1], strength_model=1.0)}
    graph |= one | other | drawn("pa", ["one", 0]) | drawn("pb", ["other", 0]) | {"d": difference("pa", "pb")}
    before = hashes(comfyui)
    assert comfyui.run(graph)["outputs"]["d"]["difference"][0] < 0.05
    assert hashes(comfyui)["weights"] == before["weights"]


# -- the embedded model -------------------------------------------------------------------------------------------


def test_the_host_draws_what_diffusers_draws(comfyui: ComfyUI) -> None:
    """Same words, same noise, same picture: text states, one prediction, latents, pixels, and the model's hash."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from safetensors.torch import load_file

    from forget_concept.core.mini import load

    graph = base() | {
        "core": node(
            "ProbeCore",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            prompt=PROMPT,
            seed=7,
            steps=6,
            name="core.safetensors",
        )
    }
    facts = comfyui.run(graph)["outputs"]["core"]["facts"][0]
    theirs = load_file(comfyui.folder / "output" / "core.safetensors")
    ours = load()
    assert facts["hash"] == ours.model_hash
    assert facts["layer"] == ours.text.layer
    assert facts["ids"] == ours.text.token_ids(PROMPT)
    assert facts["words"] == ours.text.phrase_ids(PROMPT)
    with torch.no_grad():
        states = ours.text.encode([PROMPT])
        predicted = ours.predict_noise(ours.initial_noise([7]), torch.tensor([500]), states)
    latents = ours.sample([PROMPT], [7], steps=6, guidance=3.0)
    picture = ((ours.decode(latents) + 1) / 2).movedim(1, -1)
    expected = {
        "alphas": (ours.alphas_cumprod, 1e-6),
        "states": (states.hidden, 2e-4),
        "predicted": (predicted, 2e-4),
        "latents": (latents, 2e-3),
        "picture": (picture, 2e-3),
    }
    found = {name: float((theirs[name] - tensor).abs().max()) for name, (tensor, _) in expected.items()}
    warnings.warn(f"{comfyui.host.name}: greatest differences from diffusers: {found}", stacklevel=1)
    for name, (_, bound) in expected.items():
        assert found[name] < bound, name


# -- going wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concept": ""}, "The concept is empty"),
        ({"concept": " ,\n"}, "The concept is empty"),
        ({"replacement": " Star "}, "The replacement of 'star' is the concept itself"),
        ({"preserve": "moon, a STAR"}, "The preserve list contains 'a STAR'"),
        ({"concept": "star, moon", "replacement": "circle, heart, tree"}, "2 concepts and 3 replacements"),
        ({"concept": "star, star"}, "given twice"),
        ({"method": "no such"}, "no such"),
        ({"preset": "no such"}, "no such"),
        ({"kind": "no such"}, "no such"),
        ({"strength": 0.0}, "0.0"),
        ({"settings": "{nothing"}, "The settings are not JSON"),
        ({"settings": '{"colour": 1}'}, "has no setting 'colour'"),
        ({"settings": '{"ridge": -1}'}, "'ridge'"),
        ({"concept": "very " * 90 + "star"}, "cut off"),
    ],
)
def test_what_cannot_be_done_is_a_red_node_in_words(comfyui: ComfyUI, changes: dict[str, Any], words: str) -> None:
    before = hashes(comfyui)
    graph = base() | {"forget": forget(**({"replacement": ""} if "concept" in changes else {}) | changes)}
    found = red(comfyui, graph | drawn("with", ["forget", 0]))
    assert found.node == "forget"
    assert words in found.words
    assert hashes(comfyui) == before


def test_an_error_is_read_without_a_path(comfyui: ComfyUI) -> None:
    """The page shows the type before the sentence, and the type's module is a path in the pack's folder."""
    found = red(comfyui, base() | {"forget": forget(concept="")} | drawn("with", ["forget", 0]))
    assert found.words.startswith("Forget Concept: The concept is empty"), found.words
    settings = comfyui.stock("ForgetConceptUceSettings", projections_to_k=False, projections_to_v=False)
    graph = base() | {"settings": settings, "forget": forget(method_settings=["settings", 0])}
    assert red(comfyui, graph | drawn("with", ["forget", 0])).words.startswith("Forget Concept: ")


def test_the_fields_of_adjust_are_the_settings(comfyui: ComfyUI) -> None:
    """Without it the preset counts; with it the fields do, and only those of the chosen method."""
    known = comfyui.get("/object_info")["ForgetConcept"]["input"]
    presets = known["required"]["method"][1]["forget_concept_methods"]
    kind, options = known["optional"]["adjust"]
    assert kind == DYNAMIC and [option["key"] for option in options["options"]] == ["as preset", *presets]
    for method, (name, values) in ((m, next(iter(p.items()))) for m, p in presets.items()):
        assert {box for box, _ in below(options, method)} == set(values), (method, name)
        assert len(values) <= 7
    fields = {f"adjust.{name}": value for name, value in presets["uce"]["tuned"].items()}
    graph = base() | {"plain": forget(preserve="key"), "same": forget(preserve="key", adjust="uce", **fields)}
    graph |= {"other": forget(preserve="key", adjust="uce", **fields | {"adjust.ridge": 7.0})}
    graph |= {name: node("PreviewAny", source=[name[1:], 2]) for name in ("-plain", "-same", "-other")}
    outputs = comfyui.run(graph)["outputs"]
    assert "settings:" not in outputs["-plain"]["text"][0] and "settings:" not in outputs["-same"]["text"][0]
    assert 'settings: {"ridge": 7.0}' in outputs["-other"]["text"][0]
    shown = outputs["other"]["forget_concept_report"]
    assert shown == outputs["-other"]["text"], "the page has no report for the node"
    found = red(comfyui, graph | {"other": forget(method="duge", adjust="uce", **fields)})
    assert "choose the same method in both" in found.words


def test_a_model_without_cross_attention_is_one_clear_sentence(comfyui: ComfyUI) -> None:
    graph = base() | {"other": node("ProbeNoAttention"), "forget": forget(model=["other", 0])}
    found = red(comfyui, graph | {"report": node("PreviewAny", source=["forget", 2])})
    assert found.node == "forget"
    assert "no cross-attention" in found.words


def test_model_and_clip_of_different_families_are_one_clear_sentence(comfyui: ComfyUI) -> None:
    before = hashes(comfyui)
    graph = base() | {"other": node("ProbeOtherText", clip=["load", 1]), "forget": forget(clip=["other", 0])}
    found = red(comfyui, graph | {"report": node("PreviewAny", source=["forget", 2])})
    assert "MODEL and CLIP are of different families" in found.words
    assert "192" in found.words and "384" in found.words
    assert hashes(comfyui) == before


@pytest.mark.parametrize(("what", "words"), [("error", "the trap went off"), ("memory", "OutOfMemory")])
@pytest.mark.parametrize("call", [1, 5])
def test_an_error_midway_leaves_the_model_as_it_was(comfyui: ComfyUI, what: str, words: str, call: int) -> None:
    graph = base() | {"forget": forget(method="forget_me_not", settings=QUICK, seed=next(nonces))}
    graph |= {"report": node("PreviewAny", source=["forget", 2])}
    before = hashes(comfyui)
    trapped(comfyui, what, call)
    try:
        found = red(comfyui, graph)
    finally:
        trapped(comfyui, "none")
    assert found.node == "forget"
    assert words in found.words
    # after running out of memory the host itself unloads all models: same bits, new places
    after = hashes(comfyui)
    assert after == before if what == "error" else after["memory"] == before["memory"]
    assert "execution_success" in comfyui.statuses(comfyui.run(graph)), "the next one does not run"


def test_a_training_that_breaks_down_says_so(comfyui: ComfyUI) -> None:
    before = hashes(comfyui)
    settings = json.dumps({**json.loads(QUICK), "lr": 1, "weight_decay": 10, "steps": 60})
    graph = base() | {"forget": forget(method="forget_me_not", settings=settings)}
    found = red(comfyui, graph | {"report": node("PreviewAny", source=["forget", 2])})
    assert "diverged at step" in found.words
    assert hashes(comfyui) == before


def test_cancel_stops_at_once_and_the_next_prompt_runs(comfyui: ComfyUI) -> None:
    before = hashes(comfyui)
    graph = base() | {"forget": forget(method="forget_me_not", settings=ENDLESS)}
    graph |= {"report": node("PreviewAny", source=["forget", 2])}
    comfyui.get("/probe/told")
    prompt = comfyui.queue(graph)
    deadline = time.monotonic() + 60
    while not any("re-steering" in text for text in comfyui.get("/probe/told")["texts"]):
        assert time.monotonic() < deadline, comfyui.tail()
        time.sleep(0.1)
    pressed = time.monotonic()
    comfyui.interrupt()
    entry = comfyui.wait(prompt, 30)
    waited = time.monotonic() - pressed
    assert "execution_interrupted" in comfyui.statuses(entry)
    assert waited < 5
    warnings.warn(f"{comfyui.host.name}: Cancel took {waited:.2f} s", stacklevel=1)
    assert hashes(comfyui) == before
    short = graph | {"forget": forget(method="forget_me_not", settings=QUICK, seed=next(nonces))}
    assert "execution_success" in comfyui.statuses(comfyui.run(short))


def test_cancel_inside_of_the_network_is_a_cancel(comfyui: ComfyUI) -> None:
    before = hashes(comfyui)
    trapped(comfyui, "cancel", 3)
    try:
        graph = base() | {"forget": forget(method="forget_me_not", settings=QUICK, seed=next(nonces))}
        entry = comfyui.run(graph | {"report": node("PreviewAny", source=["forget", 2])})
        assert "execution_interrupted" in comfyui.statuses(entry)
    finally:
        trapped(comfyui, "none")
    assert hashes(comfyui) == before


def test_the_pack_left_nothing_in_the_host(comfyui: ComfyUI) -> None:
    assert not list(Path(comfyui.host / "custom_nodes").glob("*orget*"))
