"""The example workflows, written down as graphs; ``python tests/comfyui/workflows.py <ComfyUI folder>`` makes them.

Where a node stands follows from what it is connected to, and its boxes from what the host says of it; so a node that
gets another input is met by making them anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from graphs import Graph, node

PLACE = Path(__file__).resolve().parents[2] / "example_workflows"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


# -- graphs ---------------------------------------------------------------------------------------------------------


def _start(prompt: str) -> Graph:
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "text": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptyLatentImage", width=512, height=512, batch_size=1),
    }


def _drawn(name: str, model: list[Any], text: str = "text") -> Graph:
    sampled = node(
        "KSampler",
        model=model,
        positive=[text, 0],
        negative=["empty", 0],
        latent_image=["latent", 0],
        seed=1,
        steps=20,
        cfg=7.5,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=1.0,
    )
    return {
        f"sample {name}": sampled,
        f"decode {name}": node("VAEDecode", samples=[f"sample {name}", 0], vae=["load", 2]),
        name: node("SaveImage", images=[f"decode {name}", 0], filename_prefix=name),
    }


def _asked(
    concept: str, kind: str = "object", replacement: str = "", preserve: str = "", **more: Any
) -> dict[str, Any]:
    return {
        "model": ["load", 0],
        "clip": ["load", 1],
        "concept": concept,
        "kind": kind,
        "replacement": replacement,
        "preserve": preserve,
        "method": "uce",
        "preset": "tuned",
        "strength": 1.0,
        "seed": 0,
        **more,
    }


def _saved(lora: list[Any], filename: str, picture: str | None = "after") -> Graph:
    image = {} if picture is None else {"image": [f"decode {picture}", 0]}
    return {"save": node("ForgetConceptSavePatch", lora=lora, filename=filename, precision="float16", **image)}


def _compared(graph: Graph, model: list[Any]) -> Graph:
    return graph | _drawn("before", ["load", 0]) | _drawn("after", model)


def _settings(info: dict[str, Any], kind: str, preset: str = "tuned", **changes: Any) -> dict[str, Any]:
    name = f"ForgetConcept{kind}Settings"
    values = info[name]["input"]["required"]["preset"][1]["forget_concept_presets"][preset]
    return node(name, preset=preset, **(values | changes))


def graphs(info: dict[str, Any]) -> dict[str, Graph]:
    """Every example by its name; ``info`` is the host's ``/object_info``."""
    instant = _start("a photo of a church on a hill") | {
        "forget": node("ForgetConcept", **_asked("church", "object", "", "castle, house, tower, bridge"))
    }
    instant = _compared(instant, ["forget", 0]) | _saved(["forget", 1], "forget/%concept%")
    instant["report"] = node("PreviewAny", source=["forget", 2])

    style = _start("a village at night, in the style of Van Gogh") | {
        "forget": node("ForgetConcept", **_asked("Van Gogh", "style", "", "Monet, Picasso, watercolour, photograph"))
    }
    style = _compared(style, ["forget", 0]) | _saved(["forget", 1], "forget/style-%concept%")

    person = _start("a portrait of Sherlock Holmes")
    person["settings"] = _settings(info, "SelectiveAmnesia")
    person["fisher"] = node(
        "ForgetConceptFisherInformation",
        model=["load", 0],
        clip=["load", 1],
        preset="tuned",
        method_settings=["settings", 0],
    )
    wires = {"method_settings": ["settings", 0], "fisher": ["fisher", 0], "vae": ["load", 2]}
    told = _asked("Sherlock Holmes", "identity", "a man in a hat", "Albert Einstein, a detective")
    person["forget"] = node("ForgetConcept", **told | {"method": "selective_amnesia"}, **wires)
    person = _compared(person, ["forget", 0]) | _saved(["forget", 1], "forget/person-%concept%")

    word = _start("a photo of a bat")
    word["settings"] = _settings(
        info,
        "ForgetMeNot",
        "correction",
        unwanted="baseball bat\nwooden bat",
        wanted="flying bat",
        attention_weight=1.0,
    )
    told = _asked("bat", "object", "", "bird, baseball, cave")
    wires = {"method_settings": ["settings", 0], "vae": ["load", 2]}
    word["forget"] = node("ForgetConcept", **told | {"method": "forget_me_not", "preset": "correction"}, **wires)
    word = _compared(word, ["forget", 0]) | _saved(["forget", 1], "forget/corrected-%concept%")

    sequence = _start("a photo of a church with a clock, a car and a dog")
    lora: list[Any] | None = None
    for i, concept in enumerate(("church", "clock", "car", "dog", "umbrella"), 1):
        earlier = {} if lora is None else {"earlier": lora}
        sequence[f"forget {i}"] = node("ForgetConceptInSequence", **_asked(concept), **earlier, max_rank=0)
        lora = [f"forget {i}", 1]
    sequence["take back"] = node("ForgetConceptTakeBack", model=["load", 0], clip=["load", 1], lora=lora, which="dog")
    sequence["inspect"] = node("ForgetConceptInspectPatch", lora=["take back", 1], model=["load", 0])
    sequence = _compared(sequence, ["take back", 0]) | _saved(["take back", 1], "forget/sequence")

    combine = _start("a photo of a church beside a river with a bridge")
    combine["forget church"] = node("ForgetConcept", **_asked("church"))
    combine["forget bridge"] = node("ForgetConcept", **_asked("bridge"))
    strengths = {f"strength_{slot}": 1.0 for slot in "abcd"} | {"strength_b": 0.5, "max_rank": 0}
    combine["combine"] = node(
        "ForgetConceptCombinePatches", lora_a=["forget church", 1], lora_b=["forget bridge", 1], **strengths
    )
    combine["apply"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["combine", 0], strength=1.0)
    combine["inspect"] = node("ForgetConceptInspectPatch", lora=["combine", 0], model=["load", 0])
    combine = _compared(combine, ["apply", 0]) | _saved(["combine", 0], "forget/combined")

    measured = _start("a photo of a red umbrella")
    measured["forget"] = node("ForgetConcept", **_asked("umbrella", "object", "", "bicycle, guitar, teapot, raincoat"))
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "lora": ["forget", 1], "strength": 1.0}
    measured["evaluate"] = node(
        "ForgetConceptEvaluate",
        **wires,
        concept="",
        count=16,
        seed=0,
        steps=16,
        baselines=True,
        attacks="none",
        m_score=False,
        benchmark="automatic",
        clip_judge="openai/clip-vit-base-patch32",
        filename="forget/evaluation-%concept%",
    )
    measured["look"] = node(
        "ForgetConceptAttentionMap",
        **wires,
        prompt="a photo of a red umbrella",
        phrase="umbrella",
        seed=1,
        steps=20,
        guidance=0.0,
    )
    measured["maps"] = node("PreviewImage", images=["look", 0])
    measured["verdict"] = node("PreviewAny", source=["evaluate", 1])
    measured["shares"] = node("PreviewAny", source=["look", 1])
    measured = _compared(measured, ["forget", 0])

    stock = _start("a photo of a church on a hill")
    stock["patch"] = node(
        "LoraLoaderModelOnly", model=["load", 0], lora_name="forget/church_00001.safetensors", strength_model=1.0
    )
    stock = _compared(stock, ["patch", 0])
    return {
        "forget_instantly": instant,
        "forget_a_style": style,
        "forget_a_person": person,
        "correct_a_word": word,
        "forget_in_sequence": sequence,
        "combine_patches": combine,
        "evaluate_forgetting": measured,
        "use_a_saved_patch": stock,
    }


# -- to files -------------------------------------------------------------------------------------------------------


def _parts(known: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, dict[str, Any]]]]:
    """A node's sockets (name, type) and boxes (name, options), in their order."""
    sockets, boxes = [], []
    for section in ("required", "optional"):
        for name in known["input_order"].get(section, []):
            kind, *options = known["input"][section][name]
            if isinstance(kind, list) or kind in _WIDGETS:
                boxes.append((name, {"choices": kind if isinstance(kind, list) else None} | (options or [{}])[0]))
            else:
                sockets.append((name, kind))
    return sockets, boxes


def _size(sockets: int, outputs: int, boxes: list[tuple[str, dict[str, Any]]], kind: str) -> list[int]:
    rows = sum(90 if options.get("multiline") else 24 for _, options in boxes if not options.get("advanced"))
    tail = {"SaveImage": 300, "PreviewImage": 300, "PreviewAny": 130, "ForgetConcept": 130}.get(kind, 0)
    tail = tail or {"ForgetConceptInSequence": 160, "ForgetConceptEvaluate": 600}.get(kind, 0)
    tail = tail or (120 if kind.startswith("ForgetConcept") and kind.endswith(("Patch", "Patches", "Back")) else 20)
    return [340, 20 * max(sockets, outputs) + rows + tail]


def to_workflow(name: str, graph: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """A graph as the page saves it (schema 0.4): in columns, each node right of what it is connected to."""
    level: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in level:
            sources = [value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)]
            level[key] = 1 + max((depth(source) for source in sources), default=-1)
        return level[key]

    order = sorted(graph, key=lambda key: (depth(key), list(graph).index(key)))
    number = {key: i for i, key in enumerate(order, 1)}
    heights: dict[int, int] = {}
    nodes: dict[str, dict[str, Any]] = {}
    links: list[list[Any]] = []
    for key in order:
        kind, inputs = graph[key]["class_type"], graph[key]["inputs"]
        sockets, boxes = _parts(info[kind])
        values: list[Any] = []
        for box, options in boxes:
            assert not isinstance(inputs.get(box), list), f"{kind}: {box} is a box"
            values.append(inputs.get(box, options.get("default")))
            if options.get("control_after_generate", box in ("seed", "noise_seed")):
                values.append("fixed")
        unknown = set(inputs) - {socket for socket, _ in sockets} - {box for box, _ in boxes}
        assert not unknown, f"{kind} has no {unknown}"
        size = _size(len(sockets), len(info[kind]["output"]), boxes, kind)
        column = level[key]
        top = heights.get(column, 60)
        heights[column] = top + size[1] + 70
        nodes[key] = {
            "id": number[key],
            "type": kind,
            "pos": [40 + 420 * column, top],
            "size": size,
            "flags": {},
            "order": number[key] - 1,
            "mode": 0,
            "inputs": [{"name": socket, "type": of, "link": None} for socket, of in sockets],
            "outputs": [
                {"name": label, "type": of, "links": []}
                for label, of in zip(info[kind]["output_name"], info[kind]["output"], strict=True)
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        for i, (socket, of) in enumerate(sockets):
            if isinstance(inputs.get(socket), list):
                source, output = inputs[socket]
                links.append([len(links) + 1, number[source], output, number[key], i, of])
                nodes[key]["inputs"][i]["link"] = len(links)
                nodes[source]["outputs"][output]["links"].append(len(links))
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"forget-concept/{name}")),
        "revision": 0,
        "last_node_id": len(order),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": [
            [i, a, output, b, slot, nodes[order[a - 1]]["outputs"][output]["type"]]
            for i, a, output, b, slot, _ in links
        ],
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def dumped(workflow: dict[str, Any]) -> str:
    """As it stands in a file."""
    return json.dumps(workflow, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    from comfyhost import ComfyUI

    host = ComfyUI(Path(sys.argv[1]), Path(tempfile.mkdtemp()), "forget-concept")
    host.start()
    try:
        known = host.get("/object_info")
    finally:
        host.stop()
    for title, graph in graphs(known).items():
        (PLACE / f"{title}.json").write_text(dumped(to_workflow(title, graph, known)), encoding="utf-8", newline="\n")
