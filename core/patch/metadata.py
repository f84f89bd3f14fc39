"""Metadata of a patch: typed fields, and the only place that spells the keys they have in files.

A safetensors file holds strings by key. The entries of this project are ``forget_concept.<field>``; those of other
programs (kohya's ``ss_*``, a workflow) pass through unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PatchError
from ..files.json_text import DIGITS, parse_json
from ..models.families.registry import FAMILIES
from ..request.request import ForgetRequest

__all__ = [
    "CombinedPart",
    "PatchMetadata",
    "checkpoint_metadata",
    "kohya_metadata",
    "own_entries",
    "with_output_name",
]

_PREFIX = "forget_concept."
_OUTPUT_NAME = "ss_output_name"
_ARCHITECTURE = "modelspec.architecture"


@dataclass(frozen=True)
class CombinedPart:
    """One patch of a combined patch: the strength it was added at, and its own metadata as in its file."""

    strength: float
    metadata: Mapping[str, str]

    @property
    def about(self) -> PatchMetadata:
        """The part's metadata, typed."""
        return PatchMetadata.from_strings(self.metadata)


_Codec = tuple[Callable[[str], Any], Callable[[Any], str]]


# -- values as text: a reader raises one of _MALFORMED where it cannot read a text --------------------------------


def _text_of_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _names(text: str) -> tuple[str, ...]:
    value = parse_json(text)
    if not isinstance(value, list):
        raise ValueError("it is not a JSON list")
    return tuple(str(name) for name in value)


def _finite(text: str | float) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it is not a finite number")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > DIGITS:
        raise ValueError("it is not a whole number of a usual size")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parts(text: str) -> tuple[CombinedPart, ...]:
    return tuple(
        CombinedPart(_finite(part["strength"]), {str(k): str(v) for k, v in dict(part["metadata"]).items()})
        for part in parse_json(text)
    )


def _text_of_parts(parts: tuple[CombinedPart, ...]) -> str:
    return _text_of_json([{"strength": part.strength, "metadata": dict(part.metadata)} for part in parts])


@dataclass(frozen=True)
class PatchMetadata:
    """What a patch states about itself; a field that is ``None`` is not stated.

    Reading never fails: an entry of this project whose value is malformed reads as ``None`` and stays in
    ``malformed`` as it was; :meth:`check` raises an error about it. All other entries of a file are in ``foreign``.
    ``PatchMetadata.from_strings(strings).to_strings()`` has the keys of ``strings``.

    Args:
        method: Id of the method, or ``"combined"``, or several ids joined by ``" + "``.
        preset: Name of the preset that the settings started from.
        settings: All settings of the method, resolved.
        request: The request, without paths of local images.
        concepts: Names of the forgotten concepts.
        strength: Strength of the edit, already multiplied into the factors.
        seed: Seed of the request.
        base_model: Hash of the weights that the patch was fitted on.
        base_name: Name of that model.
        family: Model family, such as ``"sd1"`` or ``"sdxl"``.
        architecture: Fingerprint of the UNet's layers.
        text_layer: Which text states the patch was fitted on.
        version: Version of this package that made the patch.
        projections: Projections that a context map expands to.
        trained: Projections that were trained.
        terms: Loss terms of the first and the last step.
        note: A limitation that users should know about.
        history: Record of the requests in a sequence, as a JSON document (see :mod:`.history`).
        parts: The patches that a combined patch was made of.
        format: Kind of file, where it is not a LoRA: ``"context_map"``.
        malformed: Entries of this project that could not be read, by field name, as text.
        foreign: All other entries, by their full key.
    """

    method: str | None = None
    preset: str | None = None
    settings: Mapping[str, Any] | None = None
    request: ForgetRequest | None = None
    concepts: tuple[str, ...] | None = None
    strength: float | None = None
    seed: int | None = None
    base_model: str | None = None
    base_name: str | None = None
    family: str | None = None
    architecture: str | None = None
    text_layer: str | None = None
    version: str | None = None
    projections: tuple[str, ...] | None = None
    trained: tuple[str, ...] | None = None
    terms: Mapping[str, Any] | None = None
    note: str | None = None
    history: Mapping[str, Any] | None = None
    parts: tuple[CombinedPart, ...] | None = None
    format: str | None = None
    malformed: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)

    # -- from and to the strings of a file -----------------------------------------------------------------------

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> PatchMetadata:
        """Read the metadata of a file. Never raises; see the class about malformed values."""
        values: dict[str, Any] = {}
        malformed: dict[str, str] = {}
        foreign: dict[str, str] = {}
        for key, text in strings.items():
            name = key.removeprefix(_PREFIX)
            if name == key or name not in _ENTRIES:
                foreign[key] = text
                continue
            try:
                values[name] = _ENTRIES[name][0](text)
            except _MALFORMED:
                malformed[name] = text
        return cls(**values, malformed=malformed, foreign=foreign)

    @classmethod
    def from_entries(cls, entries: Mapping[str, str]) -> PatchMetadata:
        """As :meth:`from_strings`, for entries by field name instead of by full key."""
        return cls.from_strings({_PREFIX + name: text for name, text in entries.items()})

    def to_strings(self) -> dict[str, str]:
        """The metadata as a file holds it: strings by full key."""
        return {**self.foreign, **{_PREFIX + name: text for name, text in self.to_entries().items()}}

    def to_entries(self) -> dict[str, str]:
        """The entries of this project as text, by field name."""
        stated = {name: write(getattr(self, name)) for name, (_, write) in _ENTRIES.items() if name in self}
        return {**stated, **self.malformed}

    def __contains__(self, name: str) -> bool:
        """Whether the field ``name`` is stated and readable."""
        return name in _ENTRIES and getattr(self, name) is not None

    def check(self, *names: str) -> None:
        """Raise an error about the first malformed entry.

        Args:
            names: Fields to look at; default: all of them.

        Raises:
            PatchError: Names the entry and why it cannot be read.
        """
        for name in names or self.malformed:
            if name not in self.malformed:
                continue
            try:
                _ENTRIES[name][0](self.malformed[name])
            except _MALFORMED as error:
                why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise PatchError(
                    f"The entry '{_PREFIX}{name}' in the metadata of this patch cannot be read: {why.rstrip('.')}. "
                    "Make the patch again, or load the file with a LoRA loader, which ignores its metadata."
                ) from error

    # -- parts of it ---------------------------------------------------------------------------------------------

    def of_base(self) -> PatchMetadata:
        """Only what patches of one base model have in common: the model, its architecture and the text states."""
        return PatchMetadata(**{name: getattr(self, name) for name in _OF_BASE})

    def of_method(self) -> PatchMetadata:
        """Only what a method states about its own result; entries of a newer version count as such."""
        newer = {key: text for key, text in self.foreign.items() if key.startswith(_PREFIX)}
        malformed = {name: text for name, text in self.malformed.items() if name in _OF_METHOD}
        return PatchMetadata(**{name: getattr(self, name) for name in _OF_METHOD}, malformed=malformed, foreign=newer)

    def sources(self) -> tuple[PatchMetadata, ...]:
        """The metadata of the patches that a combined patch was made of, recursively; else only its own."""
        if "parts" in self.malformed:
            return (PatchMetadata(),)
        if self.parts is None:
            return (self,)
        return tuple(source for part in self.parts for source in part.about.sources()) or (PatchMetadata(),)


_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
_TEXT: _Codec = (str, str)
_JSON: _Codec = (_object, _text_of_json)
_LIST: _Codec = (_words, ",".join)
# how each field is read from the text of its entry, and written as text
_ENTRIES: dict[str, _Codec] = {
    "method": _TEXT,
    "preset": _TEXT,
    "settings": _JSON,
    "request": (ForgetRequest.from_json, ForgetRequest.to_json),
    "concepts": (_names, _text_of_json),
    "strength": (_finite, lambda value: repr(float(value))),
    "seed": (_whole, str),
    "base_model": _TEXT,
    "base_name": _TEXT,
    "family": _TEXT,
    "architecture": _TEXT,
    "text_layer": _TEXT,
    "version": _TEXT,
    "projections": _LIST,
    "trained": _LIST,
    "terms": _JSON,
    "note": _TEXT,
    "history": _JSON,
    "parts": (_parts, _text_of_parts),
    "format": _TEXT,
}
_OF_BASE = ("base_model", "base_name", "family", "architecture", "text_layer")
_OF_METHOD = ("projections", "trained", "terms", "note")


def own_entries(strings: Mapping[str, str]) -> dict[str, str]:
    """The entries of this project as text, by field name, including those of a newer version."""
    return {key.removeprefix(_PREFIX): text for key, text in strings.items() if key.startswith(_PREFIX)}


# -- entries of other programs ------------------------------------------------------------------------------------


# what a file of a diffusion transformer calls its base model
_TRANSFORMERS = {family.id: family.base_model or family.id for family in FAMILIES}


def kohya_metadata(rank: int, alpha: float, family: str, output_name: str) -> dict[str, str]:
    """The entries by which ComfyUI, the webui and Forge recognize a LoRA file and its base model.

    Args:
        rank: Highest rank of the factors; written as the network's dimension.
        alpha: The alpha of all layers.
        family: Model family, such as ``"sd1"``.
        output_name: Name of the file, without its extension.
    """
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        _OUTPUT_NAME: output_name,
        "ss_base_model_version": {"sdxl": "sdxl_base_v1-0", "sd2": "sd_v2", **_TRANSFORMERS}.get(family, "sd_v1"),
        "ss_v2": str(family == "sd2"),
        _ARCHITECTURE: {
            "sd1": "stable-diffusion-v1/lora",
            "sd2": "stable-diffusion-v2-768-v/lora",
            "sdxl": "stable-diffusion-xl-v1-base/lora",
        }.get(family, f"{family if family in _TRANSFORMERS else 'other'}/lora"),
    }


def with_output_name(strings: Mapping[str, str], name: str) -> dict[str, str]:
    """Metadata of a LoRA file for the same file under another ``name``."""
    return {**strings, _OUTPUT_NAME: name}


def checkpoint_metadata(architecture: str, title: str) -> dict[str, str]:
    """The entries by which a host recognizes a checkpoint, after the model specification of Stability AI."""
    return {_ARCHITECTURE: architecture, "modelspec.title": title}
