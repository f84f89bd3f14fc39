"""Stage `pack`: write the trained parts as one diffusers folder in fp16, with the probe and the logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..config import SCHEDULE, new_autoencoder, new_text_encoder, new_unet
from ..probe import Probe


def pack_retrained(work: Path, target: Path) -> int:
    """Write UNet, text encoder and logs of a model that was trained without some concepts, and return the bytes."""
    from ... import mini

    words = mini.load_modules()[2]
    trained = torch.load(work / "unet.pt", weights_only=True)["modules"]
    unet, text = new_unet(), new_text_encoder(len(words))
    unet.load_state_dict(trained["average_unet"])
    text.load_state_dict(trained["average_text"])
    for name, module in (("unet", unet), ("text_encoder", text)):
        module.half().save_pretrained(target / name, variant="fp16")
    for log in ("text.log.jsonl", "unet.log.jsonl"):
        shutil.copy(work / log, target / log)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def pack(work: Path, target: Path) -> int:
    """Write the model folder `target` from the checkpoints in `work`, and return its size in bytes."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizer

    target.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    trained = torch.load(work / "unet.pt", weights_only=True)["modules"]
    unet, text, vae, probe = new_unet(), new_text_encoder(len(tokenizer)), new_autoencoder(), Probe()
    unet.load_state_dict(trained["average_unet"])
    text.load_state_dict(trained["average_text"])
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    probe.load_state_dict(torch.load(work / "probe.pt", weights_only=True)["modules"]["model"])
    for name, module in (("unet", unet), ("text_encoder", text), ("vae", vae)):
        module.half().save_pretrained(target / name, variant="fp16")
    shutil.copytree(work / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    DDIMScheduler(**SCHEDULE).save_pretrained(target / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    save_file({k: v.half().contiguous() for k, v in probe.state_dict().items()}, target / "probe.safetensors")
    for log in work.glob("*.log.jsonl"):
        shutil.copy(log, target / log.name)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
