"""The adapter to ComfyUI: the only package that imports ``comfy``."""

from .embedded import embedded_model, embedded_name
from .files import lora_file, lora_files, lora_folder, lora_stamp, output_folder, theme_folders, work_folder
from .model import latent_diffusion, patched_weights, surveyed, surviving_share, weights_hash, with_lora
from .page import ConceptPreview, progress, show_text, workflow

__all__ = [
    "ConceptPreview",
    "embedded_model",
    "embedded_name",
    "latent_diffusion",
    "lora_file",
    "lora_files",
    "lora_folder",
    "lora_stamp",
    "output_folder",
    "patched_weights",
    "progress",
    "show_text",
    "surveyed",
    "surviving_share",
    "theme_folders",
    "weights_hash",
    "with_lora",
    "work_folder",
    "workflow",
]
