"""The request: what to forget, in Python and as a JSON file that every front end reads (``request.schema.json``).

:meth:`ForgetRequest.from_json` checks the form: it accepts exactly what the JSON Schema accepts, without a schema
library. :meth:`ForgetRequest.check` also checks the meaning, such as a preserve list that contains the concept; a
:class:`~.plan.Plan` calls it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import PatchError, RequestError
from ..files.json_text import parse_json
from ..files.names import is_unicode
from ..files.reading import read_text
from .concept import KINDS, Concept, canonical_phrase, templates

__all__ = ["SCHEMA_PATH", "SCHEMA_VERSION", "ForgetRequest", "check_patch_strength", "strength_warning"]
SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).with_name("request.schema.json")
MAX_STRENGTH = 10.0
HIGH_STRENGTH = 1.5  # above it there is a warning
# bounds that keep every request within what a machine can do: a tokenizer takes minutes for a text of 250,000 letters
MAX_CONCEPTS = MAX_PRESERVED = MAX_ENTRIES = 10_000
MAX_IMAGES = 1000  # of one concept
MAX_LETTERS, MAX_PATH = 2000, 4096
MAX_SEED = 2**64 - 1  # ComfyUI's widest seed; torch.Generator takes it too


def check_patch_strength(strength: float) -> None:
    """Check the strength that a patch is used at: the one bound for all front ends.

    Raises:
        PatchError: It is not a number from -10 to 10.
    """
    if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:  # nor is NaN
        raise PatchError(
            f"The strength of a patch must be a finite number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, not "
            f"{strength:g}."
        )


def strength_warning(strength: float) -> str | None:
    """What is known to happen at a high strength, as one sentence; ``None`` up to 1.5 in either direction.

    Args:
        strength: Strength of a request, or of a patch where it is applied.
    """
    if abs(strength) <= HIGH_STRENGTH:
        return None
    return (
        f"The strength {strength:g} is above {HIGH_STRENGTH:g}, where an edit also damages what should stay: on the "
        "embedded model a preserved moon became a disc at 10. Use 1, or at most 1.5."
    )


@dataclass(frozen=True)
class ForgetRequest:
    """Everything that is forgotten at once, and how; immutable, and the same in every host.

    Args:
        concepts: The concepts to forget; at least one, unless there is a theme.
        preserve: The retain set: words and phrases that must keep their meaning.
        method: Id of the method.
        preset: Name of the method's preset to start from.
        settings: Single settings in place of the preset's.
        strength: Factor of the edit, above 0 and at most 10.
        seed: Seed of everything that is drawn at random, from 0 to 2**64 - 1.
        theme: Name of a theme (:mod:`.themes`), whose concepts are forgotten too; the plan has them in its place.
        theme_replacement: Replacement of the theme's concepts that state none.

    Raises:
        RequestError: ``concepts`` or ``preserve`` is not a list.
    """

    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...] = ()
    method: str = "uce"
    preset: str = "tuned"
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    seed: int = 0
    theme: str | None = None
    theme_replacement: str | None = None

    def __post_init__(self) -> None:
        for name in ("concepts", "preserve"):
            value = getattr(self, name)
            if isinstance(value, (str, Concept)):
                raise RequestError(f"'{name}' must be a list, not a single {type(value).__name__}.")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "settings", {k: _frozen(v) for k, v in dict(self.settings).items()})

    # -- checking ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the form and the meaning of the request.

        Raises:
            RequestError: Names the field that is wrong or the entries that contradict each other.
        """
        _check_form(self._as_dict())
        names: dict[str, str] = {}
        for concept in self.concepts:
            if (key := canonical_phrase(concept.name)) in names:
                raise RequestError(f"The concept '{concept.name}' is given twice: leave one of them out.")
            names[key] = concept.name
        for concept in self.concepts:
            if concept.replacement is None:
                continue
            replacement = canonical_phrase(concept.replacement)
            if replacement == canonical_phrase(concept.name):
                raise RequestError(
                    f"The replacement of '{concept.name}' is the concept itself: name another one, or none."
                )
            if replacement in names:
                raise RequestError(
                    f"The replacement '{concept.replacement}' of '{concept.name}' is itself to be forgotten: "
                    "name one that stays."
                )
        phrases = {
            canonical_phrase(template.format(concept.name)): concept.name
            for concept in self.concepts
            for template in templates(concept.kind)
        }
        for phrase in self.preserve:
            if (clash := phrases.get(canonical_phrase(phrase))) is not None:
                raise RequestError(
                    f"The preserve list contains '{phrase}', which is the concept '{clash}' to be forgotten: "
                    "remove it from one of the two."
                )

    # -- JSON ----------------------------------------------------------------------------------------------------

    def _as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "concepts": [
                {"name": c.name, "kind": c.kind}
                | ({} if c.replacement is None else {"replacement": c.replacement})
                | ({"images": list(c.images)} if c.images else {})
                for c in self.concepts
            ],
            "preserve": list(self.preserve),
            "method": self.method,
            "preset": self.preset,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings.items()},
            "strength": self.strength,
            "seed": self.seed,
        } | {
            key: value
            for key, value in (("theme", self.theme), ("theme_replacement", self.theme_replacement))
            if value is not None
        }

    def to_json(self, indent: int | None = None) -> str:
        """The request as JSON; :meth:`from_json` reads an equal one.

        Raises:
            RequestError: A field has the wrong form.
        """
        data = self._as_dict()
        _check_form(data)
        return json.dumps(data, ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> ForgetRequest:
        """Read a request from JSON and check its form, as ``request.schema.json`` has it.

        Raises:
            RequestError: The text is not JSON, or names the field that is wrong.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise RequestError(f"The request is not valid JSON: {error}.") from error
        _check_form(data)
        concepts = tuple(
            Concept(c["name"], c.get("kind", "object"), c.get("replacement"), tuple(c.get("images", ())))
            for c in data.get("concepts", ())
        )
        plain = ("preserve", "method", "preset", "settings", "theme", "theme_replacement")
        given = {key: data[key] for key in plain if key in data}
        if "strength" in data:
            given["strength"] = float(data["strength"])
        if "seed" in data:
            given["seed"] = int(data["seed"])
        return cls(concepts, **given)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ForgetRequest:
        """Read a request from a UTF-8 JSON file; relative paths of images are relative to the file's folder.

        Raises:
            RequestError: Names the file and what is wrong.
        """
        text = read_text(path, "The request file", RequestError)
        try:
            request = cls.from_json(text)
        except RequestError as error:
            raise RequestError(f"In the request file '{path}': {error}") from error
        folder = Path(path).parent
        concepts = [replace(c, images=tuple(str(folder / image) for image in c.images)) for c in request.concepts]
        return replace(request, concepts=tuple(concepts))

    def without_images(self) -> ForgetRequest:
        """Copy without local image paths."""
        return replace(self, concepts=tuple(replace(concept, images=()) for concept in self.concepts))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# -- the form, exactly as in request.schema.json (a test compares the two) ----------------------------------------


def _check_form(data: object) -> None:
    _check_texts(data)
    for problem in _problems(data):
        raise RequestError(problem)


def _check_texts(data: object) -> None:
    """Raise for a text that no JSON file can hold; a schema sees only documents that are valid Unicode."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and not is_unicode(value):
            raise RequestError(
                f"The request contains {value!a}, which is not valid Unicode: it has bytes that are not UTF-8, or "
                "half of a character. Write it in UTF-8."
            )
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value


def _problems(data: object) -> Iterator[str]:
    if not isinstance(data, dict):
        yield "The request must be a JSON object with the fields 'schema' and 'concepts'."
        return
    known = (
        *("schema", "concepts", "preserve", "method", "preset", "settings", "strength", "seed"),
        *("theme", "theme_replacement"),
    )
    for key in data:
        if key not in known:
            yield f"The request has an unknown field '{key[:80]}': the fields are {', '.join(known)}."
    for key in ("schema",) if "theme" in data else ("schema", "concepts"):
        if key not in data:
            yield f"The request lacks the field '{key}'."
            return
    if not _is_integer(data["schema"]) or data["schema"] != SCHEMA_VERSION:
        yield f"The request has schema {_shown(data['schema'])}; this version reads schema {SCHEMA_VERSION}."
    if "theme" not in data or data.get("concepts", []) != []:
        yield from _concept_problems(data["concepts"])
    if not _is_words(data.get("theme", "x")):
        yield f"'theme' must be the name of a theme, not {_shown(data['theme'])}."
    if "theme_replacement" in data and not _is_text(data["theme_replacement"]):
        yield f"'theme_replacement' must be words, not {_shown(data['theme_replacement'])}."
    if "theme_replacement" in data and "theme" not in data:
        yield "'theme_replacement' is given without a 'theme': name the theme, or leave it out."
    preserve = data.get("preserve", [])
    if not isinstance(preserve, list) or len(preserve) > MAX_PRESERVED:
        yield f"'preserve' must be a list of words or short phrases, at most {MAX_PRESERVED:,}."
    else:
        for phrase in preserve:
            if not _is_words(phrase):
                yield f"The preserve list contains {_shown(phrase)}: every entry must be words."
    for key in ("method", "preset"):
        if not _is_words(data.get(key, "x")):
            yield f"'{key}' must be a name, not {_shown(data[key])}."
    settings = data.get("settings", {})
    if not isinstance(settings, dict):
        yield "'settings' must be an object of names and values."
    else:
        for name, value in settings.items():
            values = value if isinstance(value, list) else [value]
            if len(values) > MAX_ENTRIES or not all(_is_plain(item) for item in values):
                yield (
                    f"The setting '{name[:80]}' must be a finite number, at most {MAX_LETTERS:,} letters, true, false, "
                    f"null or a list of at most {MAX_ENTRIES:,} of these."
                )
    strength = data.get("strength", 1.0)
    if not _is_number(strength) or not 0 < strength <= MAX_STRENGTH:
        yield f"The strength must be a number above 0 and at most {MAX_STRENGTH:g}, not {_shown(strength)}."
    seed = data.get("seed", 0)
    if not _is_integer(seed) or not 0 <= seed <= MAX_SEED:
        yield f"The seed must be a whole number from 0 to {MAX_SEED}, not {_shown(seed)}."


def _concept_problems(concepts: object) -> Iterator[str]:
    if not isinstance(concepts, list) or not concepts:
        yield "Nothing to forget: give at least one concept."
        return
    if len(concepts) > MAX_CONCEPTS:
        yield f"There are {len(concepts):,} concepts, and at most {MAX_CONCEPTS:,} are forgotten at once."
    for concept in concepts:
        if not isinstance(concept, dict):
            yield f"A concept must be an object with a 'name', not {_shown(concept)}."
            continue
        for key in concept:
            if key not in ("name", "kind", "replacement", "images"):
                yield f"A concept has an unknown field '{key[:80]}': the fields are name, kind, replacement, images."
        name = concept.get("name")
        if not _is_words(name):
            long = isinstance(name, str) and len(name) > MAX_LETTERS
            yield _TOO_LONG if long else "A concept is empty: name what is to be forgotten."
            continue
        if concept.get("kind", "object") not in KINDS:
            shown = _shown(concept["kind"])
            yield f"The concept '{name}' has the unknown kind {shown}: choose one of {', '.join(KINDS)}."
        replacement = concept.get("replacement")
        if replacement is not None and not _is_text(replacement):
            yield f"The replacement of '{name}' must be words, not {_shown(replacement)}."
        images = concept.get("images", [])
        paths = isinstance(images, list) and len(images) <= MAX_IMAGES and all(map(_is_path, images))
        if not paths:
            yield (
                f"The images of '{name}' must be a list of at most {MAX_IMAGES:,} files and folders, not "
                f"{_shown(images)}."
            )


_TOO_LONG = f"A concept has more than {MAX_LETTERS:,} letters: name it in the words that a prompt would use."


def _shown(value: object) -> str:
    """A value for a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " …"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_LETTERS


def _is_words(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_LETTERS and bool(value.strip())


def _is_path(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_PATH and bool(value.strip())


def _is_number(value: object) -> bool:
    if isinstance(value, int):  # one beyond the largest float is finite, too, and no setting is so large
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    # JSON has one kind of number: 3.0 is a whole number to a schema
    return _is_number(value) and value == int(value)  # type: ignore[call-overload]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool) or _is_text(value) or _is_number(value)
