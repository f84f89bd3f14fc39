"""Settings of a method: preset, overrides and type checks."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from ..errors import RequestError
from ..methods.base import Method

__all__ = ["resolve_settings"]


def resolve_settings(method: type[Method], preset: str, overrides: Mapping[str, Any]) -> Any:
    """The preset's settings with ``overrides`` in place.

    Raises :class:`RequestError` for an unknown preset or setting (with the known ones) and for a value of a wrong type.
    """
    if preset not in method.presets:
        raise RequestError(
            f"The method '{method.id}' has no preset '{preset}': choose one of {', '.join(sorted(method.presets))}."
        )
    hints = typing.get_type_hints(method.Settings)
    names = [f.name for f in dataclasses.fields(method.Settings)]
    values = {}
    for name, value in overrides.items():
        if name not in names:
            raise RequestError(
                f"The method '{method.id}' has no setting '{name}': its settings are {', '.join(names)}."
            )
        values[name] = _typed(name, value, hints[name])
    return dataclasses.replace(method.presets[preset], **values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` wants it: whole numbers pass for numbers, lists for tuples."""
    fits, result = _fit_type(value, hint)
    if not fits:
        raise RequestError(f"The setting '{name}' must be {_spoken(hint)}, not {value!r}.")
    return result


def _fit_type(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return next((found for found in (_fit_type(value, option) for option in args) if found[0]), (False, None))
    if hint is type(None):
        return value is None, None
    if origin is Literal:
        return isinstance(value, (str, int)) and value in args, value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False, None
        parts = [_fit_type(item, args[0]) for item in value]
        return all(fits for fits, _ in parts), tuple(part for _, part in parts)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool), value
    if hint is float:
        fits = isinstance(value, (int, float)) and math.isfinite(value)
        return fits, float(value) if fits else None
    if hint is int:
        fits = isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
        return fits, int(value) if fits else None
    return isinstance(value, hint), value


def _spoken(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin is tuple:
        return f"a list, each entry {_spoken(args[0])}"
    if hint is type(None):
        return "nothing (null)"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "words"}.get(hint, str(hint))
