"""Tiny stand-ins for tests: a causal text encoder without weights on disk, and UNets of a few thousand parameters."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.fit import fit as fit_plan
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.model_survey import PROJECTIONS, ModelSurvey
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import clip_body
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import Progress
from forget_concept.core.request.request import ForgetRequest

WIDTH = 32


class TinyText:
    """A text encoder with sub-words (pieces of four letters) and causal states; end-of-text pads, as in SD1."""

    START, END = 1, 2
    layer = "tiny"

    def __init__(self, width: int = WIDTH, pooled: int | None = None, max_length: int = 77, seed: int = 0) -> None:
        self.max_length = max_length
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(1000, width, generator=generator)
        self.places = 0.3 * torch.randn(max_length, width, generator=generator)
        self.mix = torch.randn(width, width, generator=generator) / width**0.5
        self.pool = None if pooled is None else torch.randn(width, pooled, generator=generator) / width**0.5
        self.encoded: list[str] = []

    def phrase_ids(self, phrase: str) -> list[int]:
        ids = []
        for word in re.findall(r"\w+|[^\w\s]", phrase.lower()):
            pieces = [word[i : i + 4] for i in range(0, len(word), 4)]
            for n, piece in enumerate(pieces):
                marked = piece + ("" if n < len(pieces) - 1 else "_")
                ids.append(3 + zlib.crc32(marked.encode()) % 997)
        return ids

    def token_ids(self, prompt: str) -> list[int]:
        ids = [self.START, *self.phrase_ids(prompt)[: self.max_length - 2], self.END]
        return ids + [self.END] * (self.max_length - len(ids))

    def encode(self, prompts: Sequence[str]) -> TextStates:
        self.encoded += prompts
        ids = torch.tensor([self.token_ids(p) for p in prompts])
        x = self.table[ids] + self.places
        state, states = torch.zeros_like(x[:, 0]), []
        for i in range(x.shape[1]):
            state = torch.tanh(x[:, i] + 0.8 * state @ self.mix)
            states.append(state)
        hidden = torch.stack(states, 1)
        ends = (ids == self.END).int().argmax(1)
        return TextStates(hidden, None if self.pool is None else hidden[torch.arange(len(ids)), ends] @ self.pool)


def tiny_unet_config(**changes: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    } | changes


def tiny_unet(seed: int = 0, **changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**tiny_unet_config(**changes)).eval()


def tiny_model(seed: int = 0, prediction_type: str = "epsilon", **changes: Any) -> LatentDiffusion:
    return LatentDiffusion(
        tiny_unet(seed, **changes),
        TinyText(),
        sd_alphas_cumprod(),
        prediction_type,
        latent_shape=(4, 8, 8),
        name="tiny",
    )


def tiny_xl_model(seed: int = 0) -> LatentDiffusion:
    """A tiny model in SDXL's shape: it also reads a pooled vector, beside the picture's sizes."""
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = tiny_unet(seed, **sizes, projection_class_embeddings_input_dim=16 + 6 * 8)
    return LatentDiffusion(unet, TinyText(pooled=16), sd_alphas_cumprod(), latent_shape=(4, 8, 8), name="tiny-xl")


def fit(
    model: LatentDiffusion, request: ForgetRequest, progress: Progress | None = None, inputs: Inputs | None = None
) -> Patch:
    """Plan a request and fit the plan."""
    return fit_plan(model, plan_request(request), progress, inputs)


def state_hash(module: nn.Module) -> str:
    """Hash of the bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def flags(module: nn.Module) -> list[bool]:
    """All ``requires_grad`` and ``training`` flags, and whether any hooks are registered."""
    found = [p.requires_grad for p in module.parameters()]
    for part in module.modules():
        found += [part.training, bool(part._forward_hooks), bool(part._forward_pre_hooks)]
    return found


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clip_files(folder: Path) -> Path:
    """A byte-complete CLIP vocabulary with three merges, in ``folder``."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # one for each byte
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = ["s t", "a r</w>", "st ar</w>"]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def clip_parts(folder: Path, layers: int = 3, projection: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """A random CLIP text model of width 32 and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(clip_files(folder)), model_max_length=77)
    end = len(tokenizer) - 1
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = CLIPTextModelWithProjection if projection else CLIPTextModel
        return kind(config).eval(), tokenizer


def clip_states(model: Any, embedded: Tensor) -> Tensor:
    """Text states ``(n, tokens, d)`` of token embeddings, layer by layer, with a causal mask of our own."""
    body = clip_body(model)
    length = embedded.shape[1]
    hidden = embedded + body.embeddings.position_embedding.weight[:length]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    for layer in body.encoder.layers:
        # layers take a second mask, and return a tuple, up to transformers 4
        out = layer(hidden, attention_mask=mask, causal_attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
    return body.final_layer_norm(hidden)


def original_names(text: Any) -> dict[str, Tensor]:
    """A CLIP text model's weights under the names of the original layout, which every checkpoint has."""
    state = text.state_dict()
    return {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def random_patch(
    found: ModelSurvey,
    rank: int = 2,
    seed: int = 0,
    which: Sequence[str] = PROJECTIONS,
    scale: float = 0.1,
    metadata: dict[str, str] | None = None,
) -> Patch:
    """A random patch for the given projections of every site."""
    factors = {}
    for n, site in enumerate(found):
        for m, w in enumerate(which):
            d_out, d_in = site.projection(w).weight.shape
            at = seed + 10 * n + m
            factors[site.key(w)] = LowRank(scale * rand(d_out, rank, seed=at), scale * rand(rank, d_in, seed=at + 5))
    return Patch(factors, metadata or {})


def forward(unet: nn.Module) -> Tensor:
    """The prediction of a tiny UNet on one fixed input."""
    with torch.no_grad():
        return unet(rand(1, 4, 8, 8), torch.tensor([100]), encoder_hidden_states=rand(1, 77, 32, seed=9)).sample
