"""A page's form as a request, and a request as the form; independent of the page's framework."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ForgetConceptError, RequestError
from ..files.json_text import parse_json
from ..files.reading import read_text
from ..files.writing import make_folder, write_json
from ..methods.registry import get, plan_request
from ..request.concept import Concept
from ..request.parsing import split_list
from ..request.plan import Plan
from ..request.request import ForgetRequest
from .forms import form_values, settings_of

__all__ = ["ROWS", "Form", "Line", "recall", "remember"]

# the number of lines for concepts on the page; a request file may have more concepts
ROWS = 12
_LAST = "last.json"


@dataclass(frozen=True)
class Line:
    """One line of the form: a concept as the user typed it."""

    name: str = ""
    replacement: str = ""
    kind: str = "object"
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """The values on the page that make up a request.

    Attributes:
        fields: The values of the selected method's settings, by name.
        theme: Name of a theme, whose concepts are forgotten too; empty: none.
        theme_replacement: What is shown in place of the theme's concepts that state no replacement.
    """

    lines: tuple[Line, ...]
    preserve: str
    method: str
    preset: str
    fields: Mapping[str, Any]
    strength: float
    seed: str
    theme: str = ""
    theme_replacement: str = ""

    def request(self) -> ForgetRequest:
        """The request; a plan validates it. Raises :class:`RequestError` for what is missing or no number."""
        method = get(self.method)
        concepts = []
        for line in self.lines:
            if not line.name.strip():
                if line.replacement.strip() or line.images:
                    raise RequestError("A line has a replacement or pictures and no concept: write what to forget.")
                continue
            images = line.images if method.takes_images else ()
            concepts.append(Concept(line.name.strip(), line.kind, line.replacement.strip() or None, images))
        if not concepts and not self.theme:
            raise RequestError("Nothing to forget: write a concept in the first line, or choose a theme.")
        if self.theme_replacement.strip() and not self.theme:
            raise RequestError(
                "What to show in place of a theme is given without a theme: choose one, or empty the box."
            )
        settings = settings_of(method, self.preset, self.fields)
        return ForgetRequest(
            tuple(concepts),
            tuple(split_list(self.preserve)),
            settings.method,
            settings.preset,
            settings.values,
            _number(self.strength, "strength"),
            _seed(self.seed),
            self.theme or None,
            self.theme_replacement.strip() or None,
        )

    def plan(self, theme_folders: Sequence[Path] | None = None) -> Plan:
        """The plan of :meth:`request`, with the concepts of its theme. Raises :class:`RequestError` in words."""
        return plan_request(self.request(), theme_folders)

    @classmethod
    def of(cls, request: ForgetRequest, theme_folders: Sequence[Path] | None = None) -> Form:
        """The form of a request, without its images: their paths may belong to another machine.

        Args:
            request: The request.
            theme_folders: Where a theme is looked for, as for :func:`..request.themes.themes`.

        Raises:
            ForgetConceptError: As for :func:`..methods.registry.plan_request`.
            RequestError: For what the page cannot show: more concepts than it has lines, and phrases to preserve that
                contain a comma.
        """
        settings = plan_request(request, theme_folders).settings
        preserve = ", ".join(request.preserve)
        if split_list(preserve) != list(request.preserve):
            raise RequestError(
                "Phrases to preserve that contain a comma cannot be written on this page: use the request through REST "
                "or on the command line."
            )
        if len(request.concepts) > ROWS:
            raise RequestError(
                f"The request has {len(request.concepts)} concepts, and this page has {ROWS} lines: use it through "
                "REST or on the command line."
            )
        lines = [Line(one.name, one.replacement or "", one.kind) for one in request.concepts]
        return cls(
            tuple(lines),
            preserve,
            request.method,
            request.preset,
            form_values(get(request.method), settings),
            request.strength,
            str(request.seed),
            request.theme or "",
            request.theme_replacement or "",
        )


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"The {name} is empty: write a number.")
    return float(value)


def _seed(text: str) -> int:
    try:
        return int(str(text).strip() or "0")
    except ValueError:
        raise RequestError(f"The seed must be a whole number, not '{str(text)[:40]}'.") from None


# -- the last form, remembered -------------------------------------------------------------------------------------


def remember(folder: Path, request: ForgetRequest, more: Mapping[str, Any]) -> None:
    """Save a request without its image paths, and further fields of the page, for the next time it is opened."""
    plain = json.loads(request.without_images().to_json())
    write_json(make_folder(folder) / _LAST, {"request": plain, **more})


def recall(folder: Path, theme_folders: Sequence[Path] | None = None) -> tuple[Form, dict[str, Any]] | None:
    """The form and further fields that were saved; ``None`` where they are missing or no longer valid."""
    try:
        kept = parse_json(read_text(folder / _LAST, "The last form"))
        request = ForgetRequest.from_json(json.dumps(kept.pop("request")))
        return Form.of(request, theme_folders), kept
    except (ForgetConceptError, ValueError, KeyError, TypeError, AttributeError):
        return None
