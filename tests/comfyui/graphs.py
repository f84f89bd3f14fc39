"""Graphs in API format, and the way from a saved workflow to one, as the page does it."""

from __future__ import annotations

from typing import Any

Graph = dict[str, Any]
PROMPT = "a photo of a red star"


def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def forget(**changes: Any) -> dict[str, Any]:
    """A Forget Concept node on the embedded model of :func:`base`."""
    inputs = {
        "model": ["load", 0],
        "clip": ["load", 1],
        "concept": "star",
        "kind": "object",
        "replacement": "circle",
        "preserve": "moon",
        "method": "uce",
        "preset": "tuned",
        "strength": 1.0,
        "seed": 0,
    }
    return node("ForgetConcept", **(inputs | changes))


def base() -> Graph:
    return {
        "load": node("ForgetConceptLoadEmbeddedModel"),
        "text": node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    }


def drawn(name: str, model: list[Any], steps: int = 6, seed: int = 1, text: str = "text") -> Graph:
    """Sample with ``model`` and decode: the picture comes out of ``<name>`` and is saved by ``<name>-save``."""
    return {
        f"{name}-sample": node(
            "KSampler",
            model=model,
            positive=[text, 0],
            negative=["empty", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=2.5,
            sampler_name="ddim",
            scheduler="ddim_uniform",
            denoise=1.0,
        ),
        name: node("VAEDecode", samples=[f"{name}-sample", 0], vae=["load", 2]),
        f"{name}-save": node("SaveImage", images=[name, 0], filename_prefix=name),
    }


def difference(a: str, b: str) -> dict[str, Any]:
    return node("ProbeDifference", a=[a, 0], b=[b, 0])


DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def is_box(kind: Any) -> bool:
    """Whether an input of this type in ``/object_info`` is a box on the node."""
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)


def below(options: dict[str, Any], chosen: str) -> list[tuple[str, Any]]:
    """The inputs that a dynamic combo shows for a choice."""
    found = next(option["inputs"] for option in options["options"] if option["key"] == chosen)
    return [item for section in ("required", "optional") for item in found.get(section, {}).items()]


def from_workflow(workflow: dict[str, Any], info: dict[str, Any]) -> Graph:
    """A saved workflow (as the page writes it) in API format; ``info`` is the host's ``/object_info``."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph: Graph = {}
    for entry in workflow["nodes"]:
        if entry["type"] in ("Note", "MarkdownNote"):
            continue
        linked = {
            slot["name"]: sources[slot["link"]] for slot in entry.get("inputs", []) if slot.get("link") is not None
        }
        inputs = _inputs(entry, info[entry["type"]], linked)
        graph[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs}
    return graph


def _inputs(entry: dict[str, Any], known: dict[str, Any], linked: dict[str, Any]) -> dict[str, Any]:
    values = list(entry.get("widgets_values") or [])
    inputs: dict[str, Any] = {}

    def read(section: str, name: str, kind: Any, options: dict[str, Any]) -> None:
        if is_box(kind):
            if not values and section == "optional":
                return  # saved before there was such a box
            inputs[name] = values.pop(0)
            if options.get("control_after_generate", name in ("seed", "noise_seed")):
                assert values.pop(0) in ("fixed", "randomize", "increment", "decrement"), entry
            if options.get("image_upload"):
                values.pop(0)
            for box, (of, *about) in below(options, inputs[name]) if kind == DYNAMIC else ():
                read("required", f"{name}.{box}", of, about[0] if about else {})
        if name in linked:
            inputs[name] = linked[name]

    for section in ("required", "optional"):
        for name in known["input_order"].get(section, []):
            kind, *options = known["input"][section][name]
            read(section, name, kind, options[0] if options else {})
    assert not values, f"{entry['type']} has {values} too many widget values"
    return inputs
