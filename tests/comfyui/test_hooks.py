"""A saved patch as one of the host's LoRA hooks, which are in force for a part of the sampling."""

from __future__ import annotations

from typing import Any

from comfyhost import ComfyUI
from graphs import Graph, base, difference, drawn, forget, node


def saved(comfyui: ComfyUI, name: str, **changes: Any) -> str:
    """Forget and save; the file as the host's own nodes name it."""
    graph = base() | {"forget": forget(**changes)}
    graph["save"] = node("ForgetConceptSavePatch", lora=["forget", 1], filename=f"hooks/{name}", precision="float32")
    comfyui.run(graph)
    folder = comfyui.folder / "models" / "loras"
    (found,) = folder.glob(f"hooks/{name}*.safetensors")
    return found.relative_to(folder).as_posix()


def hooked(name: str, hooks: list[Any], model: list[Any]) -> Graph:
    """A picture under hooks, which both conditionings carry."""
    found = drawn(name, model)
    for side, text in (("positive", "text"), ("negative", "empty")):
        key = f"{name}-{side}"
        found[key] = node(
            "ConditioningSetProperties", cond_NEW=[text, 0], strength=1.0, set_cond_area="default", hooks=hooks
        )
        found[f"{name}-sample"]["inputs"][side] = [key, 0]
    return found


def keyframes(name: str, hook: str, *frames: tuple[float, float]) -> Graph:
    """The hook with strengths from parts of the sampling on."""
    found: Graph = {}
    earlier: dict[str, Any] = {}
    for i, (start, strength) in enumerate(frames):
        found[f"{name}-{i}"] = node("CreateHookKeyframe", strength_mult=strength, start_percent=start, **earlier)
        earlier = {"prev_hook_kf": [f"{name}-{i}", 0]}
    found[name] = node("SetHookKeyframes", hooks=[hook, 0], hook_kf=earlier["prev_hook_kf"])
    return found


def test_a_patch_is_in_force_for_as_long_as_its_hook_is(comfyui: ComfyUI) -> None:
    name = saved(comfyui, "star")
    graph = base() | {"forget": forget()}
    graph["hook"] = node("CreateHookLora", lora_name=name, strength_model=1.0, strength_clip=0.0)
    graph |= keyframes("never", "hook", (0.0, 0.0)) | keyframes("late", "hook", (0.0, 0.0), (0.5, 1.0))
    graph |= drawn("base", ["load", 0]) | drawn("live", ["forget", 0])
    for picture, hooks in (("on", "hook"), ("off", "never"), ("half", "late")):
        graph |= hooked(picture, [hooks, 0], ["load", 0])
    pairs = [("on", "live"), ("off", "base"), ("on", "base"), ("half", "base"), ("half", "live")]
    graph |= {f"{a}:{b}": difference(a, b) for a, b in pairs}
    outputs = comfyui.run(graph)["outputs"]
    on, off, *different = (outputs[f"{a}:{b}"]["difference"][0] for a, b in pairs)
    assert on <= 1 and off <= 1  # the host adds the same product to the weights in another order
    assert min(different) > 5


def test_a_hook_and_a_live_patch_add_up(comfyui: ComfyUI) -> None:
    moon = saved(comfyui, "moon", concept="moon", preserve="star")
    graph = base() | {"forget": forget()}
    graph["text"] = node("CLIPTextEncode", clip=["load", 1], text="a photo of a moon")
    graph["hook"] = node("CreateHookLora", lora_name=moon, strength_model=1.0, strength_clip=0.0)
    graph["both"] = node("LoraLoaderModelOnly", model=["forget", 0], lora_name=moon, strength_model=1.0)
    graph |= drawn("stacked", ["both", 0]) | hooked("hooked", ["hook", 0], ["forget", 0])
    graph |= drawn("live", ["forget", 0])
    graph |= {f"hooked:{other}": difference("hooked", other) for other in ("stacked", "live")}
    outputs = comfyui.run(graph)["outputs"]
    assert outputs["hooked:stacked"]["difference"][0] <= 1
    assert outputs["hooked:live"]["difference"][0] > 5
