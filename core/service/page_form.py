"""The tab's form as a request, and a request as the form: no gradio in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files.writing import make_folder, write_json
from ..methods.registry import get, plan_request
from ..request.concept import Concept
from ..request.parsing import split_list
from ..request.plan import Plan
from ..request.request import ForgetRequest
from .forms import form_values, settings_of

__all__ = ["ROWS", "Form", "Line", "recall", "remember"]

# as many concepts as the page has lines for; a request file may have more
ROWS = 12
_LAST = "last.json"


@dataclass(frozen=True)
class Line:
    """One line of the form: a concept as it was typed."""

    name: str = ""
    replacement: str = ""
    kind: str = "object"
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """Everything on the page that makes a request; ``fields`` are those of the chosen method."""

    lines: tuple[Line, ...]
    preserve: str
    method: str
    preset: str
    fields: Mapping[str, Any]
    strength: float
    seed: str

    def request(self) -> ForgetRequest:
        """The request that is meant; a plan checks it. Raises :class:`RequestError` in words."""
        method = get(self.method)
        concepts = []
        for line in self.lines:
            if not line.name.strip():
                if line.replacement.strip() or line.images:
                    raise RequestError("A line has a replacement or pictures and no concept: write what to forget.")
                continue
            images = line.images if method.takes_images else ()
            concepts.append(Concept(line.name.strip(), line.kind, line.replacement.strip() or None, images))
        if not concepts:
            raise RequestError("Nothing to forget: write a concept in the first line.")
        settings = settings_of(method, self.preset, self.fields)
        return ForgetRequest(
            tuple(concepts),
            tuple(split_list(self.preserve)),
            settings.method,
            settings.preset,
            settings.values,
            _number(self.strength, "strength"),
            _seed(self.seed),
        )

    def plan(self) -> Plan:
        """The plan of :meth:`request`. Raises :class:`RequestError` in words."""
        return plan_request(self.request())

    @classmethod
    def of(cls, plan: Plan) -> Form:
        """The form that means ``plan.request``, without its pictures: their places are another machine's, or nobody's.

        Raises :class:`RequestError` for what the page cannot hold: more concepts
        than it has lines, words to keep with a comma in them.
        """
        request = plan.request
        preserve = ", ".join(request.preserve)
        if split_list(preserve) != list(request.preserve):
            raise RequestError(
                "Words to keep that have a comma in them cannot be written on this page: use the request through REST, "
                "or in the command line."
            )
        if len(request.concepts) > ROWS:
            raise RequestError(
                f"The request has {len(request.concepts)} concepts, and this page has {ROWS} lines: use it through "
                "REST, or in the command line."
            )
        lines = [Line(one.name, one.replacement or "", one.kind) for one in request.concepts]
        return cls(
            tuple(lines),
            preserve,
            request.method,
            request.preset,
            form_values(get(request.method), plan.settings),
            request.strength,
            str(request.seed),
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


# -- what was last asked for --------------------------------------------------------------------------------------


def remember(folder: Path, request: ForgetRequest, more: Mapping[str, Any]) -> None:
    """Keep a request, without its pictures, and what else the page had, for the next time it is opened."""
    plain = json.loads(request.without_images().to_json())
    write_json(make_folder(folder) / _LAST, {"request": plain, **more})


def recall(folder: Path) -> tuple[Form, dict[str, Any]] | None:
    """What was kept, if that still can be meant: a method may be gone since."""
    try:
        kept = json.loads((folder / _LAST).read_text(encoding="utf-8"))
        request = ForgetRequest.from_json(json.dumps(kept.pop("request")))
        return Form.of(plan_request(request)), kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
