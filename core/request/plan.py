"""A plan: a request with its method and resolved settings, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ..errors import RequestError
from .request import ForgetRequest
from .settings import HasSettings, resolve_settings

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
        settings: An instance of the method's ``Settings``: its preset with the request's settings in their place.

    Raises:
        RequestError: The request contradicts itself, names another method, has images for a method that uses none, or
            its preset or settings are not the method's.
    """

    request: ForgetRequest
    method: type[PlannedMethod]
    settings: Any = field(init=False)

    def __post_init__(self) -> None:
        request, method = self.request, self.method
        request.check()
        if request.method != method.id:
            raise RequestError(f"The request is for the method '{request.method}', and the plan is for '{method.id}'.")
        pictured = next((concept.name for concept in request.concepts if concept.images), None)
        if pictured is not None and not method.takes_images:
            raise RequestError(
                f"The method '{method.id}' works from words alone, and images of '{pictured}' were given: leave them "
                "out, or use another method."
            )
        object.__setattr__(self, "settings", resolve_settings(method, request.preset, request.settings))
