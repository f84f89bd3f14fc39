"""The example workflows, written down as graphs; ``python tests/comfyui/workflows.py <ComfyUI folder>`` makes them.

Each example says in which column a node stands. Boxes and sockets are those of the host's ``/object_info``, so a node
that gets another input is met by making the files anew. What differs between hosts (outputs of the host's own end
nodes, boxes that only newer hosts have) is left out of the files: the page adds it.
"""

from __future__ import annotations

import graphlib
import json
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs import DYNAMIC, Graph, below, is_box, node

PLACE = Path(__file__).resolve().parents[2] / "example_workflows"
BLUEPRINT = PLACE.parent / "subgraphs" / "Forget Concept.json"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
DOWNLOAD = {
    "name": CHECKPOINT,
    "url": f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{CHECKPOINT}",
    "directory": "checkpoints",
}
NOTE = "MarkdownNote"


@dataclass(frozen=True)
class Example:
    """An example: its graph, its nodes by column from left to right, a note, and groups as (title, first, last "
    "column)."""

    graph: Graph
    columns: list[list[str]]
    note: str
    groups: list[tuple[str, int, int]]


# -- graphs ---------------------------------------------------------------------------------------------------------

_OWN_CHECKPOINT = (
    "\n\n**Your own checkpoint:** replace *Load Embedded Model* by *Load Checkpoint* (Stable Diffusion 1, 2 or XL), "
    "set the "
    "picture to 512×512 (XL: 1024×1024), and both KSamplers to 20 steps, cfg 7, `euler`, `normal`."
)


def _start(prompt: str) -> Graph:
    return {
        "load": node("ForgetConceptLoadEmbeddedModel"),
        "text": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    }


def _drawn(name: str, model: list[Any], **changes: Any) -> Graph:
    given = {"seed": 7, "steps": 25, "cfg": 2.5, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0}
    sampled = node(
        "KSampler",
        model=model,
        positive=["text", 0],
        negative=["empty", 0],
        latent_image=["latent", 0],
        **(given | changes),
    )
    return {
        f"sample {name}": sampled,
        f"decode {name}": node("VAEDecode", samples=[f"sample {name}", 0], vae=["load", 2]),
        name: node("SaveImage", images=[f"decode {name}", 0], filename_prefix=f"forget_concept/{name}"),
    }


def _compared(graph: Graph, model: list[Any], **changes: Any) -> Graph:
    return graph | _drawn("before", ["load", 0], **changes) | _drawn("after", model, **changes)


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


def _adjusted(info: dict[str, Any], method: str, preset: str, **changes: Any) -> dict[str, Any]:
    """The boxes below ``adjust`` with a preset's values."""
    known = info["ForgetConcept"]["input"]["required"]["method"][1]["forget_concept_methods"][method][preset]
    assert set(changes) <= set(known), changes
    fields = {f"adjust.{name}": value for name, value in (known | changes).items()}
    return {"method": method, "preset": preset, "adjust": method, **fields}


def _settings(info: dict[str, Any], kind: str, preset: str = "tuned", **changes: Any) -> dict[str, Any]:
    name = f"ForgetConcept{kind}Settings"
    values = info[name]["input"]["required"]["preset"][1]["forget_concept_presets"][preset]
    return node(name, preset=preset, **(values | changes))


def _saved(lora: list[Any], filename: str, picture: str = "after") -> Graph:
    image = [f"decode {picture}", 0]
    return {"save": node("ForgetConceptSavePatch", lora=lora, filename=filename, precision="float16", image=image)}


_FIRST = ["load", "latent", "note"]
_PROMPTS = ["text", "empty"]
_SAMPLED = ["sample before", "sample after"]
_PICTURES = ["decode before", "before", "decode after", "after"]


def examples(info: dict[str, Any]) -> dict[str, Example]:
    """Every example by its name; ``info`` is the host's ``/object_info``."""
    found: dict[str, Example] = {}

    def simple(name: str, graph: Graph, middle: list[list[str]], note: str, checkpoint: bool = False) -> None:
        last = len(middle)
        groups = [("1  Model and prompt", 0, 0), ("2  Forget", 1, last), ("3  Before and after", last + 1, last + 2)]
        columns = [["load", *_PROMPTS, "latent", "note"], *middle, _SAMPLED, _PICTURES]
        found[name] = Example(graph, columns, note + ("" if checkpoint else _OWN_CHECKPOINT), groups)

    graph = _start("a picture of a red star")
    graph["forget"] = node("ForgetConcept", **_asked("star", "object", "circle", "heart, moon, house, tree, crown"))
    simple(
        "forget_concept_embedded",
        _compared(graph, ["forget", 0]),
        [["forget"]],
        "### Forget a concept\nRuns as it is, in seconds, on the small model that comes with the nodes: a star "
        "becomes a circle, "
        "and what is under **preserve** stays. The report on the node says what was done.",
    )

    graph = _start("a photo of a church on a hill")
    graph["load"] = node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    graph["latent"] = node("EmptyLatentImage", width=512, height=512, batch_size=1)
    graph["forget"] = node("ForgetConcept", **_asked("church", "object", "", "castle, house, tower, bridge"))
    how = {"seed": 1, "steps": 20, "cfg": 7.5, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    graph = _compared(graph, ["forget", 0], **how) | _saved(["forget", 1], "forget/%concept%")
    simple(
        "forget_instantly",
        graph,
        [["forget", "save"]],
        "### Forget an object, on a checkpoint\nNeeds Stable Diffusion 1.5 (ComfyUI offers the download), or choose "
        "any "
        "checkpoint of Stable Diffusion 1, 2 or XL. The closed form takes seconds; the patch is saved as a LoRA in "
        "`models/loras/forget`.\n\nWithout a checkpoint: open the example *forget_concept_embedded*.",
        checkpoint=True,
    )

    graph = _start("a mosaic picture of a blue house")
    graph["forget"] = node("ForgetConcept", **_asked("mosaic", "style", "", "sketch, neon, watercolour, comic"))
    simple(
        "forget_a_style",
        _compared(graph, ["forget", 0]),
        [["forget"]],
        "### Forget a style\n**kind** is `style`: the prompts that are edited name a style, and the subject stays.",
    )

    graph = _start("a picture of Hugo Marsh")
    graph["settings"] = _settings(info, "SelectiveAmnesia", steps=60)
    graph["fisher"] = node(
        "ForgetConceptFisherInformation",
        model=["load", 0],
        clip=["load", 1],
        preset="tuned",
        method_settings=["settings", 0],
    )
    wires = {"method_settings": ["settings", 0], "fisher": ["fisher", 0], "vae": ["load", 2]}
    told = _asked("Hugo Marsh", "identity", "Lena Frost", "Otto Brand, Zuri Okoye, Ivy Stone")
    graph["forget"] = node("ForgetConcept", **told | {"method": "selective_amnesia"}, **wires)
    simple(
        "forget_a_person",
        _compared(graph, ["forget", 0]),
        [["settings", "fisher"], ["forget"]],
        "### Forget a person\nSelective Amnesia trains in some minutes on a CPU. Its Fisher information is measured "
        "once and kept, "
        "so the next person takes less. Rare settings are behind *Show Advanced* in the settings node's menu.",
    )

    graph = _start("a picture of a bat")
    fields = _adjusted(
        info,
        "forget_me_not",
        "correction",
        unwanted="wooden bat\nbat for a ball game",
        wanted="flying bat\nbat with wings",
    )
    graph["forget"] = node("ForgetConcept", **_asked("bat", "object", "", "arrow, key, umbrella") | fields)
    graph["forget"]["inputs"]["vae"] = ["load", 2]
    simple(
        "correct_a_word",
        _compared(graph, ["forget", 0], seed=5),
        [["forget"]],
        "### Correct a word\n*Bat* means an animal and a club. The boxes **unwanted** and **wanted** at the end of "
        "the node name the "
        "sense to forget and the sense to keep.",
    )

    graph = _start("a picture of a red star")
    lora: list[Any] | None = None
    for i, (concept, other) in enumerate((("star", "circle"), ("tree", "house"), ("heart", "cup")), 1):
        earlier = {} if lora is None else {"earlier": lora}
        told = _asked(concept, "object", other, "moon, key")
        graph[f"forget {i}"] = node("ForgetConceptInSequence", **told, **earlier)
        lora = [f"forget {i}", 1]
    graph["take back"] = node("ForgetConceptTakeBack", model=["load", 0], clip=["load", 1], lora=lora, which="heart")
    graph["inspect"] = node("ForgetConceptInspectPatch", lora=["take back", 1], model=["load", 0])
    simple(
        "forget_in_sequence",
        _compared(graph, ["take back", 0]),
        [["forget 1"], ["forget 2"], ["forget 3", "take back", "inspect"]],
        "### Several requests in sequence\nEach node adds a request to the patch of the one before it. **Take Back** "
        "removes one of "
        "them again: here *heart*.",
    )

    graph = _start("a picture of a red star")
    graph["forget 1"] = node("ForgetConcept", **_asked("star", "object", "circle", "moon, house"))
    graph["forget 2"] = node("ForgetConcept", **_asked("tree", "object", "mushroom", "house, crown"))
    strengths = {f"strength_{slot}": 1.0 for slot in "abcd"} | {"strength_b": 0.5, "max_rank": 0}
    graph["combine"] = node("ForgetConceptCombinePatches", lora_a=["forget 1", 1], lora_b=["forget 2", 1], **strengths)
    graph["apply"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["combine", 0], strength=1.0)
    graph["inspect"] = node("ForgetConceptInspectPatch", lora=["combine", 0], model=["load", 0])
    simple(
        "combine_patches",
        _compared(graph, ["apply", 0]),
        [["forget 1", "forget 2"], ["combine", "apply", "inspect"]],
        "### Combine patches\nTwo patches become one, each at its own strength. *Inspect Forget Patch* says what is "
        "in it.",
    )

    graph = _start("a picture of a red umbrella")
    graph["forget"] = node("ForgetConcept", **_asked("umbrella", "object", "", "mushroom, key, crown, boat"))
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "lora": ["forget", 1], "strength": 1.0}
    graph["evaluate"] = node(
        "ForgetConceptEvaluate",
        **wires,
        concept="",
        count=16,
        seed=0,
        steps=16,
        baselines=False,
        attacks="none",
        m_score=False,
        benchmark="automatic",
        clip_judge="",
        filename="forget/evaluation-%concept%",
    )
    asked = {"prompt": "a picture of a red umbrella", "phrase": "umbrella", "seed": 1, "steps": 20, "guidance": 0.0}
    graph["look"] = node("ForgetConceptAttentionMap", **wires, **asked)
    graph["maps"] = node("PreviewImage", images=["look", 0])
    simple(
        "evaluate_forgetting",
        _compared(graph, ["forget", 0]),
        [["forget"], ["evaluate"], ["look", "maps"]],
        "### Measure a patch\n*Evaluate Forgetting* draws the same prompts before and after, and counts what is left "
        "of the concept "
        "and of everything else. On a checkpoint, name a CLIP as judge in **clip_judge**.",
    )

    graph = _start("a picture of a red star")
    graph["forget"] = node("ForgetConcept", **_asked("star", "object", "circle", "moon, heart, key"))
    graph["apply"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["forget", 1], strength=0.8)
    graph = _compared(graph, ["apply", 0]) | _saved(["forget", 1], "forget/%concept%")
    simple(
        "use_a_saved_patch",
        graph,
        [["forget"], ["save", "apply"]],
        "### Save a patch, and use it\n*Save Forget Patch* writes a LoRA into `models/loras/forget`. In any other "
        "workflow the stock node "
        "*Load LoRA* takes it, or *Load Forget Patch*. Here the patch is applied directly, at strength 0.8.",
    )
    return found


def graphs(info: dict[str, Any]) -> dict[str, Graph]:
    """The graphs of the examples by name."""
    return {name: example.graph for name, example in examples(info).items()}


# -- to files -------------------------------------------------------------------------------------------------------

_TITLES = {
    "settings": "Settings: Selective Amnesia",
    "text": "Prompt",
    "empty": "Negative prompt (empty)",
    "latent": "Size of the picture",
    "sample before": "Without the patch",
    "sample after": "With the patch",
    "before": "Before",
    "after": "After",
    "maps": "Attention to the word",
    "forget 1": "First request",
    "forget 2": "Second request",
    "forget 3": "Third request",
    "note": "Read me",
}
# heights that hold a node's boxes on the canvas and in Nodes 2.0, and for ours its report or picture after a run
_HEIGHTS = {
    "CLIPTextEncode": 110,
    "CheckpointLoaderSimple": 110,
    "EmptyLatentImage": 125,
    "ForgetConcept": 640,
    "ForgetConceptApplyPatch": 200,
    "ForgetConceptAttentionMap": 480,
    "ForgetConceptCombinePatches": 380,
    "ForgetConceptEvaluate": 1180,
    "ForgetConceptFisherInformation": 260,
    "ForgetConceptInSequence": 640,
    "ForgetConceptInspectPatch": 300,
    "ForgetConceptLoadEmbeddedModel": 105,
    "ForgetConceptSavePatch": 400,
    "ForgetConceptSelectiveAmnesiaSettings": 360,
    "ForgetConceptTakeBack": 320,
    "KSampler": 275,
    NOTE: 330,
    "PreviewImage": 360,
    "SaveImage": 330,
    "VAEDecode": 60,
}
_WIDTHS = {
    "ForgetConcept": 400,
    "ForgetConceptInSequence": 400,
    "ForgetConceptEvaluate": 420,
    "KSampler": 300,
    NOTE: 360,
}
_WIDTH, _BETWEEN, _TITLE, _GAP, _TOP = 330, 70, 30, 26, 60
# boxes that only newer hosts have: the page gives them their defaults
_NEWER = {"LoraModelLoader": ("bypass",)}


def _parts(known: dict[str, Any], inputs: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, Any]]]:
    """A node's sockets (name, type) and boxes (name, options), in their order."""
    sockets: list[tuple[str, str]] = []
    boxes: list[tuple[str, Any]] = []
    for section in ("required", "optional"):
        for name in known["input_order"].get(section, []):
            kind, *options = known["input"][section][name]
            about = options[0] if options else {}
            if not is_box(kind):
                sockets.append((name, kind))
                continue
            if kind == DYNAMIC:
                choices = [option["key"] for option in about["options"]]
                boxes.append((name, about | {"default": choices[0]}))
                for box, (_, *more) in below(about, inputs.get(name, choices[0])):
                    boxes.append((f"{name}.{box}", more[0] if more else {}))
            else:
                boxes.append((name, about))
    return sockets, boxes


def inputs_of(graph: dict[str, Any], key: str) -> list[str]:
    """The nodes that a node takes something from."""
    return [source[0] for source in graph.get(key, {}).get("inputs", {}).values() if isinstance(source, list)]


def to_workflow(name: str, example: Example, info: dict[str, Any]) -> dict[str, Any]:
    """An example as the page saves it (schema 0.4)."""
    graph = example.graph
    order = [key for column in example.columns for key in column]
    assert sorted(order) == sorted([*graph, "note"]), f"{name}: {set(order) ^ {*graph, 'note'}}"
    kinds = {key: NOTE if key == "note" else graph[key]["class_type"] for key in order}
    number = {key: i for i, key in enumerate(order, 1)}
    nodes: dict[str, dict[str, Any]] = {}
    links: list[list[Any]] = []
    edges: list[tuple[int, int, int]] = []
    left = 40
    for column in example.columns:
        width = max(_WIDTHS.get(kinds[key], _WIDTH) for key in column)
        top = _TOP
        for key in column:
            height = _HEIGHTS[kinds[key]] + (340 if graph.get(key, {}).get("inputs", {}).get("adjust") else 0)
            nodes[key] = _node(number[key], kinds[key], graph.get(key), info, [left, top], [width, height])
            if key in _TITLES:
                nodes[key]["title"] = _TITLES[key]
            top += height + _TITLE + _GAP
        edges.append((left, left + width, top - _TITLE))
        left += width + _BETWEEN
    nodes["note"]["widgets_values"] = [example.note]
    for key in order:
        if kinds[key] == "CheckpointLoaderSimple":
            nodes[key]["properties"]["models"] = [DOWNLOAD]
        for i, socket in enumerate(nodes[key]["inputs"]):
            source = graph[key]["inputs"].get(socket["name"])
            if isinstance(source, list):
                link = len(links) + 1
                output = nodes[source[0]]["outputs"][source[1]]
                links.append([link, number[source[0]], source[1], number[key], i, output["type"]])
                socket["link"] = link
                output["links"].append(link)
    sources = {key: inputs_of(graph, key) for key in order}
    for place, key in enumerate(graphlib.TopologicalSorter(sources).static_order()):
        nodes[key]["order"] = place
    # a full-HD page opens it in whole, beside its own bars
    width, height = edges[-1][1] + 20 - edges[0][0], max(edge[2] for edge in edges) + 100
    scale = round(min(0.9, 1780 / width, 940 / height), 2)
    view = {"scale": scale, "offset": [round(90 / scale) - 20, round(80 / scale) + 85 - _TOP]}
    groups = []
    for i, (title, first, last) in enumerate(example.groups, 1):
        bottom = max(edge[2] for edge in edges[first : last + 1])
        x, y = edges[first][0] - 20, _TOP - 85
        box = [x, y, edges[last][1] + 20 - x, bottom + 14 - y]
        groups.append({"id": i, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}})
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"forget-concept/{name}")),
        "revision": 0,
        "last_node_id": len(order),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": view},
        "version": 0.4,
    }


def _node(
    number: int, kind: str, part: dict[str, Any] | None, info: dict[str, Any], place: list[int], size: list[int]
) -> dict[str, Any]:
    made: dict[str, Any] = {"id": number, "type": kind, "pos": place, "size": size, "flags": {}, "order": number - 1}
    made |= {"mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": []}
    if part is None:
        return made
    known, given = info[kind], part["inputs"]
    sockets, boxes = _parts(known, given)
    unknown = set(given) - {socket for socket, _ in sockets} - {box for box, _ in boxes}
    assert not unknown, f"{kind} has no {unknown}"
    for box, options in boxes:
        if box in _NEWER.get(kind, ()):
            continue
        assert not isinstance(given.get(box), list), f"{kind}: {box} is a box"
        made["widgets_values"].append(given.get(box, options.get("default")))
        if options.get("control_after_generate", box in ("seed", "noise_seed")):
            made["widgets_values"].append("fixed")
    made["inputs"] = [{"name": socket, "type": of, "link": None} for socket, of in sockets]
    # newer hosts give outputs to their own end nodes: nothing is connected there, and the page adds them
    if not known["output_node"] or kind.startswith("ForgetConcept"):
        made["outputs"] = [
            {"name": label, "type": of, "links": []}
            for label, of in zip(known["output_name"], known["output"], strict=True)
        ]
    made["properties"] = {"Node name for S&R": kind}
    return made


def blueprint(info: dict[str, Any]) -> dict[str, Any]:
    """*Forget Concept* as a blueprint for the node library: model, clip and words give a model."""
    part = node("ForgetConcept", **_asked(""))
    inner = _node(1, "ForgetConcept", part, info, [380, 60], [400, 640])
    names = [socket["name"] for socket in inner["inputs"]]
    inner["inputs"].append({"name": "concept", "type": "STRING", "widget": {"name": "concept"}, "link": 3})
    for number, name in enumerate(("model", "clip"), 1):
        inner["inputs"][names.index(name)]["link"] = number
    inner["outputs"][0]["links"] = [4]
    own = uuid.uuid5(uuid.NAMESPACE_URL, "forget-concept/blueprint")
    types = {"model": "MODEL", "clip": "CLIP", "concept": "STRING"}
    slots = [names.index("model"), names.index("clip"), len(names)]
    sockets = [
        {"id": str(uuid.uuid5(own, name)), "name": name, "type": of, "linkIds": [i], "pos": [180, 80 + 20 * i]}
        for i, (name, of) in enumerate(types.items(), 1)
    ]
    end = {"id": str(uuid.uuid5(own, "MODEL")), "name": "MODEL", "type": "MODEL", "linkIds": [4], "pos": [880, 100]}
    links = [
        {"id": i, "origin_id": -10, "origin_slot": i - 1, "target_id": 1, "target_slot": slot, "type": of}
        for i, (slot, of) in enumerate(zip(slots, types.values(), strict=True), 1)
    ]
    links.append({"id": 4, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"})
    subgraph = {
        "id": str(own),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": 1, "lastLinkId": 4, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": "Forget Concept",
        "inputNode": {"id": -10, "bounding": [80, 60, 120, 100]},
        "outputNode": {"id": -20, "bounding": [860, 80, 120, 60]},
        "inputs": sockets,
        "outputs": [end],
        "widgets": [],
        "nodes": [inner],
        "groups": [],
        "links": links,
        "extra": {},
        "category": "model_patches/unlearning",
        "description": "Makes the model forget an object in seconds, and returns the patched model.",
    }
    outer = {
        "id": 2,
        "type": str(own),
        "pos": [60, 60],
        "size": [340, 180],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": "model", "type": "MODEL", "link": None},
            {"name": "clip", "type": "CLIP", "link": None},
            {"name": "concept", "type": "STRING", "widget": {"name": "concept"}, "link": None},
        ],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}],
        "title": "Forget Concept",
        "properties": {"proxyWidgets": [["-1", "concept"]]},
        "widgets_values": ["star"],
    }
    return {
        "id": str(uuid.uuid5(own, "file")),
        "revision": 0,
        "last_node_id": 2,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def dumped(workflow: dict[str, Any]) -> str:
    """As it stands in a file."""
    return json.dumps(workflow, ensure_ascii=False, indent=1) + "\n"


def write(info: dict[str, Any]) -> None:
    """Write the files of all examples."""
    for title, example in examples(info).items():
        text = dumped(to_workflow(title, example, info))
        (PLACE / f"{title}.json").write_text(text, encoding="utf-8", newline="\n")
    BLUEPRINT.write_text(dumped(blueprint(info)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    from comfyhost import ComfyUI

    host = ComfyUI(Path(sys.argv[1]), Path(tempfile.mkdtemp()), "forget-concept")
    host.start()
    try:
        known = host.get("/object_info")
    finally:
        host.stop()
    write(known)
