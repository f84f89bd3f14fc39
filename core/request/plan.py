"""A plan: a request with its method and resolved settings, checked once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from ..errors import RequestError
from .concept import unescaped
from .prompt_syntax import check_no_syntax
from .request import ForgetRequest
from .settings import HasSettings, describe_settings, resolve_settings

__all__ = ["Plan", "PlannedMethod"]


class PlannedMethod(HasSettings, Protocol):
    """What a plan needs to know about a method; every ``Method`` class provides it."""

    title: ClassVar[str]
    takes_images: ClassVar[bool]
    trained: ClassVar[bool]


@dataclass(frozen=True)
class Plan:
    """A checked request with its method and settings: what ``fit`` takes.

    Constructing a plan is the only place where a request is checked, so every plan is valid. ``plan_request`` in
    :mod:`..methods.registry` looks up the method of a request and constructs its plan.

    Args:
        request: The request.
        method: The method that the request names.

    Attributes:
        request: The request as it is read: brackets that were escaped, as in ``saber_\\(fate\\)``, are plain ones.
        settings: An instance of the method's ``Settings``: its preset with the request's settings in their place.

    Raises:
        RequestError: The request contradicts itself, names another method, has images for a method that uses none, has
            prompt syntax among its words, or its preset or settings are not the method's.
    """

    request: ForgetRequest
    method: type[PlannedMethod]
    settings: Any = field(init=False)

    def __post_init__(self) -> None:
        request, method = self.request, self.method
        request.check()
        if request.theme is not None:
            raise RequestError(f"The concepts of the theme '{request.theme}' are missing: plan it with plan_request.")
        if request.method != method.id:
            raise RequestError(f"The request is for the method '{request.method}', and the plan is for '{method.id}'.")
        pictured = next((concept.name for concept in request.concepts if concept.images), None)
        if pictured is not None and not method.takes_images:
            raise RequestError(
                f"The method '{method.id}' works from words alone, and images of '{pictured}' were given: leave them "
                "out, or use another method."
            )
        request = _unescaped(request, _text_settings(request, method))
        object.__setattr__(self, "request", request)
        object.__setattr__(self, "settings", resolve_settings(method, request.preset, request.settings))
        for where, words in self.written_words():
            check_no_syntax(words, where)

    def written_words(self) -> Iterator[tuple[str, str]]:
        """All words in the request that a person wrote, each with the input where they stand.

        The inputs are names, replacements, the retain set and texts in settings; presets are not a person's words.
        """
        for concept in self.request.concepts:
            yield "The concept", concept.name
            if concept.replacement and concept.replacement.strip():
                yield f"The replacement of '{concept.name}',", concept.replacement
        for phrase in self.request.preserve:
            yield "The entry of the preserve list", phrase
        for name in _text_settings(self.request, self.method):
            value = getattr(self.settings, name) or ()
            for text in (value,) if isinstance(value, str) else value:
                if words := text.replace("{}", " ").strip():
                    yield f"The setting '{name}' with the text", words


def _text_settings(request: ForgetRequest, method: type[HasSettings]) -> tuple[str, ...]:
    """The settings in the request that are free text."""
    return tuple(
        info.name
        for info in describe_settings(method.Settings)
        if info.name in request.settings and info.kind in ("line", "lines") and not info.choices
    )


def _unescaped(request: ForgetRequest, text_settings: tuple[str, ...]) -> ForgetRequest:
    """The request with brackets as they are read."""
    return replace(
        request,
        concepts=tuple(
            replace(
                concept,
                name=unescaped(concept.name),
                replacement=None if concept.replacement is None else unescaped(concept.replacement),
            )
            for concept in request.concepts
        ),
        preserve=tuple(map(unescaped, request.preserve)),
        settings={
            name: _unescaped_value(value) if name in text_settings else value
            for name, value in request.settings.items()
        },
    )


def _unescaped_value(value: Any) -> Any:
    if isinstance(value, str):
        return unescaped(value)
    return tuple(map(_unescaped_value, value)) if isinstance(value, tuple) else value
