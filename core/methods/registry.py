"""Registry of the methods.

To add a method, write one file in this folder with a class under :func:`register`. It then appears in every host, in
the command line and in the shared tests; nothing else is edited.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import ForgetConceptError, RequestError
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..request.settings import check_described
from ..request.themes import expanded
from .base import Method

__all__ = ["all_methods", "get", "plan_request", "register"]

_METHODS: dict[str, type[Method]] = {}
C = TypeVar("C", bound=type[Method])


def register(method: C) -> C:
    """Class decorator that registers a method.

    Raises:
        ForgetConceptError: Another method has its id, one of the presets ``published`` and ``tuned`` is missing, a
            setting has no description, or ``main`` names none or one that the method has not.
    """
    known = _METHODS.get(method.id)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ForgetConceptError(
            f"Two methods are called '{method.id}': {known.__qualname__} and {method.__qualname__}. Rename one of them."
        )
    if not {"published", "tuned"} <= set(method.presets):
        raise ForgetConceptError(
            f"The method '{method.id}' lacks one of the presets 'published' and 'tuned': declare both."
        )
    check_described(method)
    main, known_settings = getattr(method, "main", ()), [field.name for field in dataclasses.fields(method.Settings)]
    if not main or not set(main) <= set(known_settings):
        raise ForgetConceptError(
            f"The method '{method.id}' must name in 'main' the settings that a short form shows, of "
            f"{', '.join(known_settings)}."
        )
    _METHODS[method.id] = method
    return method


def all_methods() -> dict[str, type[Method]]:
    """Every method by its id, sorted; imports all modules of this folder."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f".{module.name}", __package__)
    return dict(sorted(_METHODS.items()))


def get(method_id: str) -> type[Method]:
    """The method with this id.

    Raises:
        RequestError: There is no such method; the message lists the methods.
    """
    methods = all_methods()
    if method_id not in methods:
        raise RequestError(f"The method '{method_id}' is not known: choose one of {', '.join(methods)}.")
    return methods[method_id]


def plan_request(request: ForgetRequest, theme_folders: Sequence[Path] | None = None) -> Plan:
    """Look up the method of a request and plan it, which checks it; a theme is replaced by its concepts.

    Args:
        request: The request.
        theme_folders: Folders of the user's own themes (``None``: the one of :func:`user_theme_folder`).

    Raises:
        RequestError: The method or the theme does not exist, or as :class:`Plan`.
    """
    return Plan(expanded(request, theme_folders), get(request.method))
