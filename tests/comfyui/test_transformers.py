"""Forgetting in diffusion transformers by a real ComfyUI's own classes, at CFG 1, where a negative prompt does nothing.

The weights are drawn; what is looked at is that every part fits, and that the stock loaders take the file whole.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfyhost import ComfyUI, ExecutionError
from graphs import Graph, forget, node

QUICK = json.dumps({"contexts": False, "keep_common": False})
# family, the layers that read text with the width of what they read, and the host's node for an empty picture
KINDS = {
    "flux": ("flux", {"txt_in": 4096, "vector_in.in_layer": 768}, "EmptySD3LatentImage"),
    "chroma": ("chroma", {"txt_in": 4096}, "EmptySD3LatentImage"),
    "sd3": ("sd3", {"context_embedder": 4096, "y_embedder.mlp.0": 2048}, "EmptySD3LatentImage"),
    "flux2 klein": ("flux2", {"txt_in": 7680}, "EmptyFlux2LatentImage"),
    "qwen image": ("qwen-image", {"txt_in": 3584}, "EmptySD3LatentImage"),
    "z image": ("lumina2", {"cap_embedder.1": 2560}, "EmptySD3LatentImage"),
    "hunyuan image": (
        "hunyuan",
        {"txt_in.input_embedder": 3584, "txt_in.c_embedder.in_layer": 3584},
        "EmptyHunyuanImageLatent",
    ),
    # recorded, because no family is known here
    "aura flow": ("", {"cond_seq_linear": 2048}, "EmptyLatentImage"),
    "pixart": ("", {"y_embedder.y_proj.fc1": 4096}, "EmptyLatentImage"),
}


def known(comfyui: ComfyUI, *classes: str) -> None:
    missing = [name for name in classes if name not in comfyui.get("/object_info")]
    if missing:
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")


def sampled(name: str, model: list[Any], negative: str = "empty") -> Graph:
    inputs = {"positive": ["text", 0], "negative": [negative, 0], "latent_image": ["latent", 0], "seed": 1, "steps": 2}
    how = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {name: node("KSampler", model=model, **inputs, **how)}


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_forgetting_without_classifier_free_guidance(comfyui: ComfyUI, kind: str) -> None:
    family, entries, latent = KINDS[kind]
    known(comfyui, latent)
    offered = comfyui.get("/object_info/ProbeTransformer")["ProbeTransformer"]["input"]["required"]["kind"]
    if kind not in (offered[0] if isinstance(offered[0], list) else offered[1]["options"]):
        pytest.skip(f"this ComfyUI has no text encoder of {kind}")
    side = 512 if kind == "pixart" else 128  # PixArt's positions need it
    # words of the everyday list are left out: the path is the same
    told = forget(concept="church", replacement="", preserve="castle", settings=QUICK)
    graph: Graph = {
        "load": node("ProbeTransformer", kind=kind),
        "forget": told,
        "report": node("PreviewAny", source=["forget", 2]),
        "text": node("CLIPTextEncode", clip=["load", 1], text="a photo of a church on a hill"),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "named": node("CLIPTextEncode", clip=["load", 1], text="church"),
        "latent": node(latent, width=side, height=side, batch_size=1),
        "delta": node("ProbeDelta", model=["forget", 0], lora=["forget", 1]),
        "saved": node(
            "ForgetConceptSavePatch",
            lora=["forget", 1],
            filename=f"families/{kind.replace(' ', '-')}",
            precision="float32",
        ),
        "file": node("PreviewAny", source=["saved", 1]),
        "edit": node("ProbeLatentDifference", a=["without", 0], b=["with", 0]),
        "negative": node("ProbeLatentDifference", a=["without", 0], b=["against", 0]),
    }
    graph |= sampled("without", ["load", 0]) | sampled("with", ["forget", 0])
    graph |= sampled("against", ["load", 0], "named")
    outputs = comfyui.run(graph, 900)["outputs"]
    (facts,) = outputs["load"]["facts"]
    assert (facts["family"], facts["entries"]) == (family, entries if family else {})
    assert "forgotten: church (object)" in outputs["report"]["text"][0]
    recorded = "found by recording, and all of what the text changes passes through them"
    assert (recorded in outputs["report"]["text"][0]) == (not family)
    (layers,) = outputs["delta"]["layers"]
    assert {key.removeprefix("diffusion_model.").removesuffix(".weight") for key in layers} == set(entries)
    assert outputs["delta"]["named"] == [len(entries)], "a layer of the file is not in the MODEL"
    assert outputs["delta"]["worst"][0] < 1e-6
    assert outputs["edit"]["finite"] == [True]
    assert outputs["edit"]["difference"][0] > 1e-5
    assert outputs["negative"]["difference"] == [0.0]
    # and by the stock loader of a file
    graph = {
        "load": graph["load"],
        "loaded": node(
            "LoraLoaderModelOnly", model=["load", 0], lora_name=outputs["file"]["text"][0], strength_model=1.0
        ),
        "count": node("ProbePatches", model=["loaded", 0]),
    }
    # and by our own nodes
    graph["read"] = node("ForgetConceptLoadPatch", file=outputs["file"]["text"][0])
    graph["applied"] = node("ForgetConceptApplyPatch", model=["load", 0], lora=["read", 0], strength=1.0)
    graph["own"] = node("ProbePatches", model=["applied", 0])
    found = comfyui.run(graph)["outputs"]
    assert found["count"]["counts"] == found["own"]["counts"] == [dict.fromkeys(layers, 1)]
    assert "lora key not loaded" not in comfyui.log.read_text(encoding="utf-8", errors="replace")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8_tensorwise", "float8_e4m3fn", "narrow"])
def test_a_quantised_transformer_is_forgotten_in(comfyui: ComfyUI, kind: str) -> None:
    """Also where the layers that read the text are quantised."""
    if kind != "narrow":
        known(comfyui, "ProbeQuantised")
    way = {"ProbeNarrow": {"dtype": "float8_e4m3fn"}} if kind == "narrow" else {"ProbeQuantised": {"format": kind}}
    ((name, how),) = way.items()
    graph: Graph = {
        "load": node("ProbeTransformer", kind="flux"),
        "small": node(name, model=["load", 0], **how),
        "forget": forget(model=["small", 0], concept="church", replacement="", preserve="castle", settings=QUICK),
        "full": forget(concept="church", replacement="", preserve="castle", settings=QUICK),
        "report": node("PreviewAny", source=["forget", 2]),
        "text": node("CLIPTextEncode", clip=["load", 1], text="a photo of a church on a hill"),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "edit": node("ProbeLatentDifference", a=["without", 0], b=["with", 0]),
        "rounded": node("ProbeLatentDifference", a=["with", 0], b=["with full", 0]),
    }
    graph |= sampled("without", ["small", 0]) | sampled("with", ["forget", 0]) | sampled("with full", ["full", 0])
    outputs = comfyui.run(graph, 900)["outputs"]
    assert "forgotten: church (object)" in outputs["report"]["text"][0]
    assert outputs["edit"]["finite"] == [True] and outputs["edit"]["difference"][0] > 1e-5
    assert outputs["rounded"]["difference"][0] > 0  # quantised indeed


@pytest.mark.parametrize(
    ("model", "clip", "words"),
    [
        ("flux", "load", "the CLIP returns 192"),
        ("flux", "chroma", "also reads a vector of the whole prompt"),
        ("qwen image", "chroma", "reads text states of width 3584"),
    ],
)
def test_a_clip_of_another_family_is_refused(comfyui: ComfyUI, model: str, clip: str, words: str) -> None:
    graph: Graph = {
        "load": node("ForgetConceptLoadEmbeddedModel"),
        "model": node("ProbeTransformer", kind=model),
        "chroma": node("ProbeTransformer", kind="chroma"),
        "forget": forget(model=["model", 0], clip=[clip, 1], concept="church", settings=QUICK),
        "report": node("PreviewAny", source=["forget", 2]),
    }
    with pytest.raises(ExecutionError, match=words):
        comfyui.run(graph)


def test_a_method_that_trains_attention_is_refused_in_words(comfyui: ComfyUI) -> None:
    graph: Graph = {
        "load": node("ProbeTransformer", kind="chroma"),
        "forget": forget(concept="church", method="forget_me_not"),
        "report": node("PreviewAny", source=["forget", 2]),
    }
    with pytest.raises(ExecutionError, match="uce"):
        comfyui.run(graph)


def test_a_video_model_is_surveyed(comfyui: ComfyUI) -> None:
    (facts,) = comfyui.run({"load": node("ProbeTransformer", kind="wan")})["outputs"]["load"]["facts"]
    assert facts == {"family": "wan", "entries": {"text_embedding.0": 4096}}
