"""The patches in the webui's Lora folder that were made here: found by what they say of themselves.

A patch goes by the stem of its file, as ``<lora:stem:1>`` does, and by nothing else: a name from outside is looked up
among the files that are there, and never made into a path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import ForgetConceptError, PatchError, RequestError, listed
from ..files.names import patch_name
from ..files.safetensors_io import read_metadata, read_safetensors, write_safetensors
from ..files.writing import check_folder, make_folder, write_bytes, write_json
from ..formats import kohya
from ..patch.metadata import PatchMetadata, with_output_name
from ..patch.patch import Patch
from .errors import NotFoundError
from .preview import bars, png
from .summaries import concept_names, patch_summary

__all__ = ["PRECISIONS", "Entry", "PatchLibrary"]

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
FAMILIES = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
PLACEHOLDER = "%concept%"
_LORAS = (".safetensors", ".pt", ".ckpt")
_PREVIEWS = tuple(f"{dot}{kind}" for dot in (".preview.", ".") for kind in ("png", "jpg", "jpeg", "webp"))
_BESIDE = (*_PREVIEWS, ".json", ".txt", ".description.txt")


@dataclass(frozen=True)
class Entry:
    """A patch's file: its ``name``, its place, its size in bytes, when it was written (seconds since 1970), and what it
    says of itself."""

    name: str
    path: Path
    place: str
    size: int
    written: float
    metadata: Mapping[str, str]

    @cached_property
    def about(self) -> PatchMetadata:
        """The metadata, typed."""
        return PatchMetadata.from_strings(self.metadata)

    @property
    def concepts(self) -> list[str]:
        """What it forgets; for one that was put together, what its parts forget."""
        found = concept_names(self.metadata)
        if not found:
            found = [name for part in self.about.parts or () for name in concept_names(part.metadata)]
        return list(dict.fromkeys(found))

    @property
    def method(self) -> str:
        return self.about.method or "unknown"

    @property
    def family(self) -> str:
        return self.about.family or "other"

    @property
    def tag(self) -> str:
        """What puts it on in a prompt."""
        return f"<lora:{self.name}:1>"

    @property
    def preview(self) -> Path | None:
        """Its picture, if it has one."""
        return next((file for end in _PREVIEWS if (file := _beside(self.path, end)).is_file()), None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; nothing of this machine beyond the place in the Lora folder."""
        return {
            "name": self.name,
            "file": self.place,
            "bytes": self.size,
            "written": self.written,
            "concepts": self.concepts,
            "method": self.method,
            "family": self.family,
            "base_model": self.about.base_name or "",
            "lora": self.tag,
        }


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.stem + end)


class PatchLibrary:
    """The patches below ``folder()``, which is asked for each time: a webui may change it."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[int, int, dict[str, str]]] = {}

    # -- looking -------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every patch that was made here, the newest first. Raises where the folder cannot be read."""
        root = self._folder()
        found = [entry for file in self._files() if (entry := self._entry(root, file)) is not None]
        return sorted(found, key=lambda entry: (-entry.written, entry.place))

    def names(self) -> list[str]:
        """The names of :meth:`entries`."""
        return [entry.name for entry in self.entries()]

    def find(self, name: str) -> Entry:
        """The patch of this name. Raises :class:`NotFoundError` for none, :class:`RequestError` for several."""
        found = [entry for entry in self.entries() if entry.name == name]
        if not found:
            raise NotFoundError(
                f"There is no patch '{name[:120]}' in the Lora folder: its name is that of its file, without "
                "folder and ending."
            )
        if len(found) > 1:
            raise RequestError(
                f"There are {len(found)} files called '{name}' ({listed([one.place for one in found], 4)}), and the "
                "webui takes only one of them: rename the others on the disk."
            )
        return found[0]

    def load(self, name: str) -> Patch:
        """The patch itself. Raises as :meth:`find`, and :class:`PatchError` for a file that is damaged."""
        return kohya.load(self.find(name).path)

    def inspect(self, name: str) -> dict[str, Any]:
        """What a patch is and what made it: :meth:`Entry.as_dict`, its size in layers and ranks, and words to read."""
        entry, patch = self.find(name), self.load(name)
        return entry.as_dict() | {
            "layers": len(patch),
            "rank": patch.rank,
            "precision": str(next(iter(patch.factors.values())).up.dtype).removeprefix("torch."),
            "words": patch_summary(patch),
            "metadata": dict(entry.metadata),
        }

    # -- writing -------------------------------------------------------------------------------------------------

    def place(self, name: str, folder: str, concepts: Sequence[str]) -> tuple[Path, str]:
        """Folder and stem that a new patch asks for by ``name``, looked through; nothing is made yet.

        ``%concept%`` in the name (which an empty one is) stands for ``concepts``; a name without folders goes into
        ``folder``, itself within the Lora folder. Raises :class:`ForgetConceptError` in words.
        """
        wanted = name.strip() or PLACEHOLDER
        if folder and not any(slash in wanted for slash in "/\\"):
            wanted = f"{folder}/{wanted}"
        *folders, stem = _checked(wanted, concepts)
        return check_folder(self._folder().joinpath(*folders)), stem

    def save(
        self, patch: Patch, name: str, folder: str, precision: str = "float32", picture: torch.Tensor | None = None
    ) -> Entry:
        """Write a patch under a name that no LoRA has, with its preview picture and its card.

        ``picture`` is ``(h, w, 3)`` in [0, 1]; without one the patch itself is drawn. Raises
        :class:`ForgetConceptError` in words; nothing is left behind then.
        """
        if precision not in PRECISIONS:
            raise RequestError(f"The precision '{precision}' is not known: choose one of {', '.join(PRECISIONS)}.")
        concepts = Entry("", Path(), "", 0, 0, patch.metadata).concepts
        target, stem = self.place(name, folder, concepts)
        path = self._fresh(make_folder(target), stem)
        kohya.save(patch, path, dtype=PRECISIONS[precision])
        try:
            write_bytes(_beside(path, ".preview.png"), png(bars(patch) if picture is None else picture))
            write_json(_beside(path, ".json"), _card(patch, concepts))
        except ForgetConceptError:
            _remove(path)
            raise
        return self.find(path.stem)

    def rename(self, name: str, new: str) -> Entry:
        """Give a patch, its picture and its card another name, in the same folder, bit for bit.

        The name within the file changes too: it is what a prompt may call the LoRA by. Raises
        :class:`ForgetConceptError` in words.
        """
        entry = self.find(name)
        if any(slash in new for slash in "/\\"):
            raise RequestError(f"'{new}' is no name: a patch stays in its folder, so write a name without slashes.")
        (stem,) = _checked(new, entry.concepts)
        if stem == entry.name:
            return entry
        if stem.casefold() in self._stems() - {entry.name.casefold()}:
            raise RequestError(f"There is a LoRA called '{stem}' already: choose another name.")
        check_folder(entry.path.parent)
        tensors, metadata = read_safetensors(entry.path)
        target = entry.path.with_name(stem + entry.path.suffix)
        beside = [(_beside(entry.path, end), _beside(target, end)) for end in _BESIDE]
        beside = [(old, fresh) for old, fresh in beside if old.is_file()]
        write_safetensors(tensors, target, with_output_name(metadata, stem))
        try:
            for old, fresh in beside:
                old.replace(fresh)
            # where only the case of letters differs, some systems have one file under both names
            if not target.samefile(entry.path):
                entry.path.unlink()
        except OSError as error:
            raise ForgetConceptError(f"'{name}' cannot be renamed: {error.strerror or error}.") from error
        return self.find(stem)

    def delete(self, name: str) -> None:
        """Remove a patch, its picture and its card for good. Raises :class:`ForgetConceptError` in words."""
        _remove(self.find(name).path)

    def combine(
        self,
        parts: Sequence[tuple[str, float]],
        name: str,
        folder: str,
        max_rank: int | None = None,
        precision: str = "float32",
    ) -> tuple[Entry, str]:
        """Several patches at their strengths as a new one: exactly, unless its rank is bounded; and words about it.

        Raises :class:`ForgetConceptError` in words.
        """
        wanted = [(part, strength) for part, strength in parts if strength != 0]
        if len(wanted) < 2:
            raise RequestError("Choose at least two patches to combine, each at a strength other than 0.")
        if len({part for part, _ in wanted}) < len(wanted):
            raise RequestError(
                "A patch is chosen twice: leave one of them out, and give the other the strength of both."
            )
        if max_rank is not None and max_rank < 1:
            raise RequestError(f"The rank of a patch must be at least 1, not {max_rank}.")
        whole = Patch.combined([(self.load(part), strength) for part, strength in wanted])
        if whole.max_abs() == 0:
            raise PatchError("The sum of these patches changes nothing: choose other strengths.")
        lines = []
        if max_rank is not None and whole.rank > max_rank:
            cut = whole.truncated(max_rank)
            lines.append(f"cut from rank {whole.rank} to {cut.rank}: {_held(whole, cut):.1%} of the edit is held")
            whole = cut
        entry = self.save(whole, name, folder, precision)
        return entry, "\n".join([patch_summary(whole), *lines])

    # -- inside --------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        """Every LoRA file, through linked folders too, as the webui goes; a folder that leads to itself only once."""
        root = self._folder()
        found, seen = [], set()
        for folder, folders, files in os.walk(root, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            found += [Path(folder, file) for file in files if Path(file).suffix.lower() in _LORAS]
        return found

    def _stems(self) -> set[str]:
        return {file.stem.casefold() for file in self._files()}

    def _entry(self, root: Path, file: Path) -> Entry | None:
        if file.suffix.lower() != ".safetensors":
            return None
        try:
            stat = file.stat()
            known = self._read.get(file)
            if known is None or known[:2] != (stat.st_mtime_ns, stat.st_size):
                known = self._read[file] = (stat.st_mtime_ns, stat.st_size, read_metadata(file))
        except (PatchError, OSError):  # another program's file, or one that is gone by now: none of ours
            return None
        metadata = known[2]
        # a context map is no LoRA: the webui cannot load it
        entry = Entry(file.stem, file, file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime, metadata)
        return None if entry.about.method is None or entry.about.format is not None else entry

    def _fresh(self, folder: Path, stem: str) -> Path:
        """A file that no LoRA anywhere in the Lora folder shares its name with: the webui goes by names alone."""
        taken, number = self._stems(), 1
        while f"{stem}_{number:05}".casefold() in taken:
            number += 1
        return folder / f"{stem}_{number:05}.safetensors"


def _checked(name: str, concepts: Sequence[str]) -> tuple[str, ...]:
    parts = patch_name(name, concepts, "the Lora folder")
    for part in parts:
        # a dot hides a file, and the rest means something in a prompt
        if part.startswith(".") or any(sign in part for sign in "\n\r\t"):
            raise RequestError(f"'{part}' cannot be the name of a patch: begin it with a letter or a number.")
    return parts


def _remove(path: Path) -> None:
    try:
        for file in (path, *(_beside(path, end) for end in _BESIDE)):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ForgetConceptError(f"'{path.stem}' cannot be deleted: {error.strerror or error}.") from error


def _card(patch: Patch, concepts: Sequence[str]) -> dict[str, Any]:
    """What the webui shows of a LoRA and puts into the prompt with it."""
    family = patch.about.family or ""
    return {
        "description": f"Makes the model forget {listed(list(concepts) or ['what its parts say'])}. It needs no word "
        "in the prompt.",
        "sd version": FAMILIES.get(family, "SD1"),
        "activation text": "",
        "preferred weight": 1.0,
        "notes": patch_summary(patch),
    }


def _held(whole: Patch, cut: Patch) -> float:
    """The share of ``‖Δ‖²`` that is in the cut one, which is its projection."""
    squares = [sum(float(f.delta().square().sum()) for f in patch.factors.values()) for patch in (cut, whole)]
    return squares[0] / squares[1]
