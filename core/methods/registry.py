"""Registry of the forgetting methods."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TypeVar

from ..errors import ForgetConceptError, RequestError
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..request.settings import check_described
from .base import Method

__all__ = ["all_methods", "get", "plan_request", "register"]

_METHODS: dict[str, type[Method]] = {}
C = TypeVar("C", bound=type[Method])


def register(method: C) -> C:
    """Class decorator that makes a method known.

    Raises:
        ForgetConceptError: The id is taken, one of the presets ``published`` and ``tuned`` is missing, or a setting
            does not describe itself.
    """
    known = _METHODS.get(method.id)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ForgetConceptError(
            f"Two methods are called '{method.id}': {known.__qualname__} and {method.__qualname__}."
        )
    if not {"published", "tuned"} <= set(method.presets):
        raise ForgetConceptError(f"The method '{method.id}' lacks one of the presets 'published' and 'tuned'.")
    check_described(method)
    _METHODS[method.id] = method
    return method


def all_methods() -> dict[str, type[Method]]:
    """Every method by its id, in the order of the ids; every module in this folder is one, or their base."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f".{module.name}", __package__)
    return dict(sorted(_METHODS.items()))


def get(method_id: str) -> type[Method]:
    """The method with this id. Raises :class:`RequestError` listing the known ones."""
    methods = all_methods()
    if method_id not in methods:
        raise RequestError(f"The method '{method_id}' is not known: choose one of {', '.join(methods)}.")
    return methods[method_id]


def plan_request(request: ForgetRequest) -> Plan:
    """Look up the request's method and check the request, once, on its way from a front end to ``fit``.

    Raises:
        RequestError: As :class:`Plan`, or the method does not exist.
    """
    return Plan(request, get(request.method))
