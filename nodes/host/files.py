"""The host's folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...core.errors import PatchError
from ...core.request.themes import user_theme_folder

__all__ = ["lora_file", "lora_files", "lora_folder", "lora_stamp", "output_folder", "theme_folders", "work_folder"]


def lora_files() -> list[str]:
    """The safetensors files in the host's LoRA folders, named as in the stock loaders."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith((".safetensors", ".sft"))]


def lora_file(name: str) -> Path:
    """Path of a file in :func:`lora_files`.

    Raises:
        PatchError: If the list has no such file.
    """
    found = folder_paths.get_full_path("loras", name) if name in lora_files() else None
    if found is None:
        raise PatchError(f"There is no file '{name}' in the LoRA folders: press R to refresh the list, and choose one.")
    return Path(found)


def lora_stamp(name: str | None) -> str:
    """A string that changes whenever a file of :func:`lora_files` changes."""
    try:
        found = lora_file(name or "").stat()
    except (OSError, PatchError):
        return "absent"
    return f"{found.st_mtime_ns} {found.st_size}"


def lora_folder() -> Path:
    """Folder for new LoRAs."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def output_folder() -> Path:
    """The host's output folder."""
    return Path(folder_paths.get_output_directory())


def work_folder() -> Path:
    """Folder for cached intermediate results; the host does not serve it to pages."""
    return Path(folder_paths.get_user_directory()) / "__forget_concept"


def theme_folders() -> list[Path]:
    """Folders of the user's own themes: the host's, then the one that the command line reads."""
    return [work_folder() / "themes", user_theme_folder()]
