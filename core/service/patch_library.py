"""The library: the patches in a host's LoRA folder that this package wrote, recognised by their metadata.

A patch's name is the stem of its file, as in ``<lora:stem:1>``. A name from outside is looked up among the files there
are, and never made into a path.
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
from ..files.names import fresh_file, is_unicode, patch_name, printable
from ..files.safetensors_io import read_metadata, read_safetensors, write_safetensors
from ..files.writing import check_folder, make_folder, write_bytes, write_json
from ..formats import kohya
from ..formats.contents import contents_of
from ..patch.metadata import PatchMetadata, with_output_name
from ..patch.patch import Patch
from .errors import NotFoundError
from .preview import bars, png
from .summaries import concept_names, contents_summary, patch_summary

__all__ = ["PRECISIONS", "Entry", "PatchLibrary"]

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
FAMILIES = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
PLACEHOLDER = "%concept%"
_LORAS = (".safetensors", ".pt", ".ckpt")
_SAFE = (".safetensors", ".sft")
_PREVIEWS = tuple(f"{dot}{kind}" for dot in (".preview.", ".") for kind in ("png", "jpg", "jpeg", "webp"))
_BESIDE = (*_PREVIEWS, ".json", ".txt", ".description.txt")


@dataclass(frozen=True)
class Entry:
    """A patch's file: ``place`` within the LoRA folder, ``size`` in bytes, ``written`` in seconds since 1970."""

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
        """The concepts it forgets; for a combined patch, those of its parts."""
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
        """The syntax that applies it in a prompt."""
        return f"<lora:{self.name}:1>"

    @property
    def preview(self) -> Path | None:
        """Its picture, if it has one."""
        return next((file for end in _PREVIEWS if (file := _beside(self.path, end)).is_file()), None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, without paths of this machine beyond the place in the LoRA folder."""
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
    """The patches below ``folder()``, which is called each time: a host may change its LoRA folder."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        # by file: its time and size, and its metadata or why they cannot be read
        self._read: dict[Path, tuple[int, int, dict[str, str] | str]] = {}

    # -- looking -------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every patch that this package wrote, the newest first. Raises where the folder cannot be read."""
        root = self._folder()
        found = [entry for file in self._files() if (entry := self._entry(root, file)) is not None]
        return sorted(found, key=lambda entry: (-entry.written, entry.place))

    def unreadable(self) -> list[tuple[str, str]]:
        """The files of the LoRA folder that could be patches but cannot be read: the place of each, and why."""
        root = self._folder()
        return sorted(
            (printable(file.relative_to(root).as_posix()), why)
            for file in self._files((".safetensors",))
            if isinstance(why := self._metadata(file), str)
        )

    def names(self) -> list[str]:
        """The names of :meth:`entries`."""
        return [entry.name for entry in self.entries()]

    def find(self, name: str) -> Entry:
        """The patch of this name. Raises :class:`NotFoundError` for none, :class:`RequestError` for several."""
        found = [entry for entry in self.entries() if entry.name == name]
        if not found:
            raise NotFoundError(
                f"There is no patch '{name[:120]}' in the Lora folder: a patch's name is that of its file without "
                "folder and extension."
            )
        if len(found) > 1:
            raise RequestError(
                f"There are {len(found)} files called '{name}' ({listed([one.place for one in found], 4)}), and the "
                "webui takes only one of them: rename the others on the disk."
            )
        return found[0]

    def _find_any(self, name: str) -> Entry:
        """As :meth:`find`, among other programs' files, too, where this package has none of this name."""
        own = [entry for entry in self.entries() if entry.name == name]
        others = [file for file in self._files(_SAFE) if file.stem == name]
        if own or len(others) != 1:
            return self.find(name)
        (file,) = others
        stat = file.stat()
        place = file.relative_to(self._folder()).as_posix()
        return Entry(name, file, place, stat.st_size, stat.st_mtime, read_metadata(file))

    def load(self, name: str) -> Patch:
        """Read a patch. Raises as :meth:`find`, and :class:`PatchError` for a damaged file."""
        return kohya.load(self.find(name).path)

    def inspect(self, name: str) -> dict[str, Any]:
        """:meth:`Entry.as_dict` with the number of layers, rank, precision, metadata and a summary (``words``).

        Other programs' files can be inspected, too, including adapters that cannot be applied as a patch.
        """
        entry = self._find_any(name)
        tensors, metadata = read_safetensors(entry.path)
        contents = contents_of(tensors, metadata, source=name)
        words = contents_summary(contents)
        if contents.why_not is None:
            words = [patch_summary(kohya.from_state(tensors, metadata, source=name))]
        return entry.as_dict() | {
            "layers": contents.layers,
            "rank": max(contents.ranks, default=0),
            "precision": contents.dtype,
            "words": "\n".join(words),
            "metadata": dict(entry.metadata),
        }

    # -- writing -------------------------------------------------------------------------------------------------

    def place(self, name: str, folder: str, concepts: Sequence[str]) -> tuple[Path, str]:
        """Folder and stem of a new patch, validated; nothing is created.

        Args:
            name: As the user wrote it; ``%concept%`` stands for ``concepts``, and an empty name means ``%concept%``.
            folder: Where a name without folders goes, within the LoRA folder.

        Raises:
            ForgetConceptError: For a place outside of the LoRA folder, and one that cannot be written to.
        """
        wanted = name.strip() or PLACEHOLDER
        if folder and not any(slash in wanted for slash in "/\\"):
            wanted = f"{folder}/{wanted}"
        *folders, stem = _checked(wanted, concepts)
        # the longest of the names beside each other: a number is put behind the stem
        return check_folder(self._folder().joinpath(*folders), f"{stem}_00000.safetensors"), stem

    def save(
        self, patch: Patch, name: str, folder: str, precision: str = "float32", picture: torch.Tensor | None = None
    ) -> Entry:
        """Write a patch under a fresh name, with its preview picture and its card.

        Args:
            picture: The preview ``(h, w, 3)`` in [0, 1]; ``None``: a bar chart of the patch's layers.

        Raises:
            ForgetConceptError: Where it cannot be written; no file is left behind.
        """
        if precision not in PRECISIONS:
            raise RequestError(f"The precision '{precision}' is not known: choose one of {', '.join(PRECISIONS)}.")
        concepts = Entry("", Path(), "", 0, 0, patch.metadata).concepts
        target, stem = self.place(name, folder, concepts)
        # the webui identifies a LoRA by its name alone, wherever it lies in the LoRA folder
        path = fresh_file(make_folder(target), stem, ".safetensors", taken=self._stems())
        kohya.save(patch, path, dtype=PRECISIONS[precision])
        try:
            write_bytes(_beside(path, ".preview.png"), png(bars(patch) if picture is None else picture))
            write_json(_beside(path, ".json"), _card(patch, concepts))
        except ForgetConceptError:
            _remove(path)
            raise
        return self.find(path.stem)

    def rename(self, name: str, new: str) -> Entry:
        """Rename a patch, its picture and its card within their folder; the weights stay bit-identical.

        The name within the file changes too, since a prompt may refer to it. Raises :class:`ForgetConceptError`.
        """
        entry = self.find(name)
        if any(slash in new for slash in "/\\"):
            raise RequestError(
                f"'{new}' is not a valid name: a patch stays in its folder, so write a name without slashes."
            )
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
        """Delete a patch, its picture and its card. Raises :class:`ForgetConceptError` where that is not possible."""
        _remove(self.find(name).path)

    def combine(
        self,
        parts: Sequence[tuple[str, float]],
        name: str,
        folder: str,
        max_rank: int | None = None,
        precision: str = "float32",
    ) -> tuple[Entry, str]:
        """Write the sum of several patches at their strengths as a new one; returns its entry and a summary.

        The sum is exact unless ``max_rank`` bounds it. Raises :class:`ForgetConceptError`.
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
        combined = Patch.combined([(self.load(part), strength) for part, strength in wanted])
        if combined.max_abs() == 0:
            raise PatchError("The sum of these patches changes nothing: choose other strengths.")
        lines = []
        if max_rank is not None and combined.rank > max_rank:
            cut = combined.truncated(max_rank)
            share = _retained_share(combined, cut)
            lines.append(f"truncated from rank {combined.rank} to {cut.rank}, which retains {share:.1%} of the edit")
            combined = cut
        entry = self.save(combined, name, folder, precision)
        return entry, "\n".join([patch_summary(combined), *lines])

    # -- inside --------------------------------------------------------------------------------------------------

    def _files(self, suffixes: tuple[str, ...] = _LORAS) -> list[Path]:
        """Every file with these endings, following links as the webui does; one back to a parent only once."""
        root = self._folder()
        found, seen = [], set()
        for folder, folders, files in os.walk(root, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            found += [Path(folder, file) for file in files if Path(file).suffix.lower() in suffixes]
        return found

    def _stems(self) -> set[str]:
        return {file.stem.casefold() for file in self._files()}

    def _metadata(self, file: Path) -> dict[str, str] | str:
        """The metadata of a file, or why they cannot be read; empty for one that was deleted meanwhile."""
        try:
            stat = file.stat()
        except OSError:
            return {}
        known = self._read.get(file)
        if known is None or known[:2] != (stat.st_mtime_ns, stat.st_size):
            found: dict[str, str] | str
            try:
                found = read_metadata(file)
            except PatchError as error:
                found = printable(str(error).replace(str(file), file.name))
            if not is_unicode(file.name):
                found = "Its name is not valid Unicode, so that nothing can refer to it: rename it on the disk."
            known = self._read[file] = (stat.st_mtime_ns, stat.st_size, found)
        return known[2]

    def _entry(self, root: Path, file: Path) -> Entry | None:
        if file.suffix.lower() != ".safetensors" or not isinstance(metadata := self._metadata(file), dict):
            return None
        try:
            stat = file.stat()
        except OSError:
            return None
        # a context map is no LoRA: the webui cannot load it
        entry = Entry(file.stem, file, file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime, metadata)
        return None if entry.about.method is None or entry.about.format is not None else entry


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
    """The card that the webui shows for a LoRA."""
    family = patch.about.family or ""
    return {
        "description": f"Makes the model forget {listed(list(concepts) or ['what its parts say'])}. It needs no word "
        "in the prompt.",
        "sd version": FAMILIES.get(family, "SD1"),
        "activation text": "",
        "preferred weight": 1.0,
        "notes": patch_summary(patch),
    }


def _retained_share(whole: Patch, cut: Patch) -> float:
    """The share of ``‖Δ‖²`` that is in the truncated patch, a projection of the whole one."""
    squares = [sum(float(f.delta().square().sum()) for f in patch.factors.values()) for patch in (cut, whole)]
    return squares[0] / squares[1]
