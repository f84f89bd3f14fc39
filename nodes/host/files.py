"""The host's folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...core.errors import PatchError

__all__ = ["lora_file", "lora_files", "lora_folder", "lora_stamp", "output_folder", "work_folder"]


def lora_files() -> list[str]:
    """What there is in the host's LoRA folders, as the stock loaders list it."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(".safetensors")]


def lora_file(name: str) -> Path:
    """Where a file of that list is. Raises :class:`PatchError` for one that is not in it."""
    found = folder_paths.get_full_path("loras", name) if name in lora_files() else None
    if found is None:
        raise PatchError(f"There is no file '{name}' in the LoRA folders: press R to read them again, and choose one.")
    return Path(found)


def lora_stamp(name: str | None) -> str:
    """What changes when a file of that list does."""
    try:
        found = lora_file(name or "").stat()
    except (OSError, PatchError):
        return "absent"
    return f"{found.st_mtime_ns} {found.st_size}"


def lora_folder() -> Path:
    """Where new LoRAs go."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def output_folder() -> Path:
    """Where the host's own nodes write what they make."""
    return Path(folder_paths.get_output_directory())


def work_folder() -> Path:
    """For what takes long and may be wanted again; the page cannot reach it."""
    return Path(folder_paths.get_user_directory()) / "__forget_concept"
