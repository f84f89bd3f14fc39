"""Names for architectures that are recognised and not supported, so that a refusal can name the model's family."""

from __future__ import annotations

from torch import nn

__all__ = ["SUPPORTED", "architecture_of"]

SUPPORTED = "Stable Diffusion 1, 2 and XL"

# by the names of submodules, first match; a path names a submodule of a submodule
_MARKS: tuple[tuple[str, frozenset[str]], ...] = (
    ("Chroma", frozenset({"double_blocks", "single_blocks", "distilled_guidance_layer"})),
    ("Flux.2", frozenset({"double_blocks", "single_blocks", "double_stream_modulation_img"})),
    ("HunyuanVideo", frozenset({"double_blocks", "single_blocks", "img_in.proj"})),
    ("Flux", frozenset({"double_blocks", "single_blocks", "img_in", "txt_in"})),
    ("Flux", frozenset({"transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder"})),
    ("Stable Diffusion 3", frozenset({"joint_blocks", "x_embedder"})),
    ("Stable Diffusion 3", frozenset({"transformer_blocks", "pos_embed", "context_embedder"})),
    ("AuraFlow", frozenset({"double_layers", "single_layers"})),
    ("Qwen-Image", frozenset({"transformer_blocks", "txt_norm", "img_in"})),
    ("Lumina 2 or Z-Image", frozenset({"noise_refiner", "context_refiner", "cap_embedder"})),
    ("Wan", frozenset({"patch_embedding", "text_embedding", "time_projection", "blocks"})),
    ("PixArt", frozenset({"t_block", "x_embedder", "y_embedder", "blocks"})),
    ("LTX-Video", frozenset({"transformer_blocks", "adaln_single", "patchify_proj"})),
)


def architecture_of(module: nn.Module) -> str | None:
    """The family of a diffusion transformer by its submodules, in the naming of its authors or of diffusers.

    Returns:
        Its name for a sentence; ``None`` for UNets and for anything unknown.
    """
    paths = {name for name, _ in module.named_children()}
    paths |= {f"{name}.{inner}" for name, child in module.named_children() for inner, _ in child.named_children()}
    return next((name for name, marks in _MARKS if marks <= paths), None)
