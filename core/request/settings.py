"""Settings of a method: how a field describes itself, and presets with overrides checked against that.

A method's ``Settings`` is a frozen dataclass whose fields are declared with :func:`setting`. Forms, the command line,
the REST interface, locales and help pages are generated from what a field declares (help, bounds, choices).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, Union, cast

from ..errors import ForgetConceptError, RequestError

__all__ = [
    "HasSettings",
    "Kind",
    "SettingInfo",
    "check_described",
    "check_settings",
    "describe_settings",
    "quick_settings",
    "resolve_settings",
    "setting",
]

Kind = Literal["whole", "number", "choice", "switch", "line", "lines"]
T = TypeVar("T")
_KEY = "forget_concept"
_KINDS: Mapping[Any, Kind] = {bool: "switch", int: "whole", float: "number", str: "line"}


class HasSettings(Protocol):
    """A method's class: ``Settings`` is a dataclass, and ``presets`` maps names to instances of it."""

    # Any, because a protocol's mutable attributes are invariant and the type differs by method
    id: typing.ClassVar[str]
    Settings: typing.ClassVar[Any]
    presets: typing.ClassVar[Any]


def setting(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    step: float | None = None,
    choices: Sequence[str] = (),
    none_value: float | None = None,
    advanced: bool = False,
    leading: bool = False,
    group: str = "method",
    quick: Any = None,
) -> T:
    """A field of a method's ``Settings`` that describes itself.

    Args:
        default: The value unless a preset or a request gives another one.
        help: What the setting does, in one or two sentences; shown by every host and the command line.
        minimum: Smallest value allowed. Numbers need both bounds.
        maximum: Largest value allowed.
        step: Step of a form's number field; default: 1 for whole numbers, 0.01 for others.
        choices: For a tuple of strings: the strings it may hold. A ``Literal`` type states its choices itself.
        none_value: For a number that may be ``None``: the number that a form shows for ``None``.
        advanced: Whether hosts show it only on request.
        leading: Whether forms list it before the method's own settings.
        group: Heading that listings put it under.
        quick: Value for the shortest possible run, if the default takes long; the shared tests use it.

    Returns:
        A dataclass field, typed as its value.
    """
    known = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "step": step,
        "choices": tuple(choices),
        "none_value": none_value,
        "advanced": advanced,
        "leading": leading,
        "group": group,
        "quick": quick,
    }
    return dataclasses.field(default=default, metadata={_KEY: known})


@dataclass(frozen=True)
class SettingInfo:
    """The declaration of one field of a ``Settings`` class; :func:`setting` explains the attributes.

    ``kind`` follows from the type: ``whole`` and ``number``, ``choice`` (a ``Literal``), ``switch``, ``line`` (text)
    and ``lines`` (a tuple of strings, which ``choices`` may restrict). ``optional``: whether it may be ``None``.
    """

    name: str
    kind: Kind
    default: Any
    optional: bool
    help: str
    minimum: float | None
    maximum: float | None
    step: float
    choices: tuple[str, ...]
    none_value: float | None
    advanced: bool
    leading: bool
    group: str
    quick: Any

    @property
    def numeric(self) -> bool:
        """Whether it is a number, and so has bounds."""
        return self.kind in ("whole", "number")

    @property
    def selects(self) -> bool:
        """Whether it is a selection of several ``choices``."""
        return self.kind == "lines" and bool(self.choices)

    @property
    def low(self) -> float:
        """Smallest number that a form accepts: ``minimum``, or ``none_value`` if that is smaller."""
        minimum = cast(float, self.minimum)
        return minimum if self.none_value is None else min(minimum, self.none_value)

    @property
    def high(self) -> float:
        """Largest number that a form accepts."""
        return cast(float, self.maximum)

    def values(self) -> str:
        """A description of the accepted values."""
        if self.numeric:
            text = f"{_KIND_NAMES[self.kind]} from {self.minimum:g} to {self.maximum:g}"
        elif self.kind == "choice":
            text = "one of " + ", ".join(self.choices)
        elif self.selects:
            text = "one or more of " + ", ".join(self.choices)
        else:
            text = _KIND_NAMES[self.kind]
        return text + (" or null" if self.optional else "")

    def check(self, value: Any) -> None:
        """Check a value of the right type.

        Raises:
            RequestError: It is out of bounds, or not among the choices.
        """
        if value is None and self.optional:
            return
        if self.selects:
            if not value or set(value) - set(self.choices) or len(set(value)) != len(value):
                raise RequestError(
                    f"The setting '{self.name}' must name one or more of {', '.join(self.choices)}, each once, "
                    f"not {list(value)!r}."
                )
        elif self.numeric:
            null = ", or null" if self.optional else ""
            # negated comparisons, so that NaN fails too
            if not value >= self.minimum:
                raise RequestError(f"The setting '{self.name}' must be at least {self.minimum:g}{null}, not {value:g}.")
            if not value <= self.maximum:
                raise RequestError(f"The setting '{self.name}' must be at most {self.maximum:g}{null}, not {value:g}.")


_KIND_NAMES: Mapping[Kind, str] = {
    "whole": "whole number",
    "number": "number",
    "switch": "true or false",
    "line": "text",
    "lines": "list of texts",
}


@functools.cache
def describe_settings(settings: type) -> tuple[SettingInfo, ...]:
    """Describe every field of a ``Settings`` class, in the order of the fields.

    Raises:
        ForgetConceptError: A field was not declared with :func:`setting`, lacks its bounds, or has a type that forms do
            not support.
    """
    hints = typing.get_type_hints(settings)
    return tuple(_info(settings.__name__, field, hints[field.name]) for field in dataclasses.fields(settings))


def _info(owner: str, field: dataclasses.Field[Any], hint: Any) -> SettingInfo:
    where = f"The setting '{field.name}' of {owner}"
    known = field.metadata.get(_KEY)
    if known is None or not known["help"].strip():
        raise ForgetConceptError(
            f"{where} has no description: declare it as "
            f"'{field.name}: ... = setting(default, \"what it does\", ...)', from core/request/settings.py."
        )
    optional = type(None) in typing.get_args(hint)
    bare = _without_none(hint)
    choices = known["choices"]
    if typing.get_origin(bare) is Literal:
        kind: Kind = "choice"
        choices = tuple(str(option) for option in typing.get_args(bare))
    elif typing.get_origin(bare) is tuple and typing.get_args(bare) == (str, ...):
        kind = "lines"
    elif bare in _KINDS:
        kind = _KINDS[bare]
    else:
        raise ForgetConceptError(
            f"{where} has the type {bare}, which forms do not support: use int, float, bool, str, a Literal or "
            "tuple[str, ...]."
        )
    numeric = kind in ("whole", "number")
    if numeric and (known["minimum"] is None or known["maximum"] is None):
        raise ForgetConceptError(f"{where} is a number without bounds: give setting(...) a minimum and a maximum.")
    if numeric and optional and known["none_value"] is None:
        raise ForgetConceptError(f"{where} may be None: give setting(...) the number that stands for it, none_value.")
    step = known["step"] or (1 if kind == "whole" else 0.01)
    return SettingInfo(field.name, kind, field.default, optional, **{**known, "choices": choices, "step": step})


def _without_none(hint: Any) -> Any:
    """The type without ``None``."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return parts[0] if len(parts) == 1 else hint
    return hint


def check_described(method: type[HasSettings]) -> None:
    """Check the settings of a method's class when it is registered.

    Raises:
        ForgetConceptError: As :func:`describe_settings`, or a preset is out of bounds.
    """
    infos = describe_settings(method.Settings)
    for name, values in method.presets.items():
        for info in infos:
            try:
                info.check(getattr(values, info.name))
            except RequestError as error:
                raise ForgetConceptError(f"In the preset '{name}' of the method '{method.id}': {error}") from error


def check_settings(settings: Any) -> None:
    """Check every field of a ``Settings`` instance against its bounds and choices.

    Raises:
        RequestError: A value is out of bounds, or not among the choices.
    """
    owner: type = type(settings)
    for info in describe_settings(owner):
        info.check(getattr(settings, info.name))


def quick_settings(method: type[HasSettings]) -> dict[str, Any]:
    """Overrides for the shortest possible run of a method, for tests."""
    return {info.name: info.quick for info in describe_settings(method.Settings) if info.quick is not None}


def resolve_settings(method: type[HasSettings], preset: str, overrides: Mapping[str, Any]) -> Any:
    """The settings of a preset with overrides.

    Args:
        method: The method's class.
        preset: Name of the preset.
        overrides: Values by name, as in JSON.

    Returns:
        An instance of ``method.Settings``.

    Raises:
        RequestError: The preset or a setting does not exist (the message lists those that do), or a value has the wrong
            type or is out of bounds.
    """
    if preset not in method.presets:
        raise RequestError(
            f"The method '{method.id}' has no preset '{preset}': choose one of {', '.join(sorted(method.presets))}."
        )
    hints = typing.get_type_hints(method.Settings)
    infos = {info.name: info for info in describe_settings(method.Settings)}
    values = {}
    for name, value in overrides.items():
        if name not in infos:
            raise RequestError(
                f"The method '{method.id}' has no setting '{name}': its settings are {', '.join(infos)}."
            )
        values[name] = _typed(name, value, hints[name])
        infos[name].check(values[name])
    return dataclasses.replace(method.presets[preset], **values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Convert a JSON value to the type of its field: whole numbers to floats, lists to tuples."""
    fits, result = _fit_type(value, hint)
    if not fits:
        raise RequestError(f"The setting '{name}' must be {_type_name(hint)}, not {value!r}.")
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


def _type_name(hint: Any) -> str:
    """A description of a type for error messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin is tuple:
        return f"a list, each entry {_type_name(args[0])}"
    if hint is type(None):
        return "nothing (null)"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
