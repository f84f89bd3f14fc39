"""A method's settings as the fields of a form, and the form's values as settings: the same in every host.

The fields are made of what the settings say of themselves (:func:`~forget_concept.core.request.settings.setting`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError, listed
from ..methods.base import Method
from ..request.request import ForgetRequest
from ..request.settings import Kind, SettingInfo, describe_settings

__all__ = [
    "FormField",
    "MethodSettings",
    "form_fields",
    "form_values",
    "main_fields",
    "main_presets",
    "presets",
    "settings_from_fields",
    "settings_json",
    "settings_of",
    "settings_summary",
    "with_settings",
]


@dataclass(frozen=True)
class FormField:
    """One field of a form.

    A setting that selects several of its choices (``train``) has a switch for each, named ``<setting>_<member>``.

    Attributes:
        name: The field's own name.
        kind: What the field takes; never a selection.
        default: Its value in the preset that the form starts with.
        info: The setting that it belongs to.
        member: For one switch of a selection: the choice that it stands for.
    """

    name: str
    kind: Kind
    default: Any
    info: SettingInfo
    member: str | None = None

    @property
    def setting(self) -> str:
        """Name of the setting that it belongs to."""
        return self.info.name

    @property
    def options(self) -> tuple[str, ...]:
        """What a ``choice`` may be."""
        return self.info.choices if self.kind == "choice" else ()

    @property
    def help(self) -> str:
        """What it does, in words."""
        return self.info.help if self.member is None else f"{self.member}: {self.info.help}"


@dataclass(frozen=True)
class MethodSettings:
    """What a form says: a method, the preset it started from, and the values that differ from it."""

    method: str
    preset: str
    values: Mapping[str, Any]


def form_fields(method: type[Method], preset: str = "tuned") -> list[FormField]:
    """Every field of a method's form, with the values of a preset.

    First come the leading settings, then the method's own, then those it inherits. Saved workflows know fields by this
    order.
    """
    return _fields(method, method.presets[preset])


def form_values(method: type[Method], settings: Any) -> dict[str, Any]:
    """Values of the fields, by name, for resolved settings of the method."""
    return {field.name: field.default for field in _fields(method, settings)}


def main_fields(method: type[Method]) -> list[FormField]:
    """The fields of a method's short form, in the order of :attr:`Method.main`."""
    fields = form_fields(method)
    return [field for name in method.main for field in fields if field.setting == name]


def main_presets(method: type[Method]) -> dict[str, dict[str, Any]]:
    """Values of the short form's fields, by name, for every preset."""
    names = [field.name for field in main_fields(method)]
    return {preset: {name: values[name] for name in names} for preset, values in presets(method).items()}


def _fields(method: type[Method], values: Any) -> list[FormField]:
    fields: list[FormField] = []
    for info in _in_form_order(method.Settings):
        value = getattr(values, info.name)
        if info.selects:
            fields += [
                FormField(f"{info.name}_{member}", "switch", member in value, info, member) for member in info.choices
            ]
        else:
            fields.append(FormField(info.name, info.kind, _to_field(info, value), info))
    return fields


def _in_form_order(settings: type) -> list[SettingInfo]:
    inherited = {
        field.name
        for base in settings.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    infos = describe_settings(settings)
    leading = [info for info in infos if info.leading]
    rest = sorted((info for info in infos if not info.leading), key=lambda info: info.name in inherited)
    return leading + rest


def _to_field(info: SettingInfo, value: Any) -> Any:
    if info.kind == "lines":
        return "\n".join(value or ())
    return info.none_value if value is None else value


def _from_field(info: SettingInfo, value: Any) -> Any:
    if info.kind == "lines":
        lines = tuple(line.strip() for line in str(value).splitlines() if line.strip())
        return lines or (None if info.optional else ())
    return None if info.none_value is not None and value == info.none_value else value


def settings_from_fields(method: type[Method], values: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the method, from the values of its fields by name."""
    settings: dict[str, Any] = {}
    for field in form_fields(method):
        if field.member is None:
            settings[field.setting] = _from_field(field.info, values[field.name])
        else:
            selected = settings.setdefault(field.setting, ())
            if values[field.name]:
                settings[field.setting] = (*selected, field.member)
    return settings


def settings_of(method: type[Method], preset: str, values: Mapping[str, Any]) -> MethodSettings:
    """The settings of a filled-in form. Their values are not checked: a plan does that.

    Raises:
        RequestError: The preset is unknown.
    """
    if preset not in method.presets:
        raise RequestError(
            f"The method '{method.id}' has no preset '{preset}': choose one of {', '.join(sorted(method.presets))}."
        )
    settings = settings_from_fields(method, values)
    base = method.presets[preset]
    infos = {info.name: info for info in describe_settings(method.Settings)}
    changed = {name: value for name, value in settings.items() if not _same(infos[name], value, getattr(base, name))}
    return MethodSettings(method.id, preset, changed)


def _same(info: SettingInfo, a: Any, b: Any) -> bool:
    # a page rounds numbers to some digits
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1e-3)
    if info.selects:
        return set(a) == set(b)
    return bool(a == b)


def settings_summary(settings: MethodSettings, method: type[Method]) -> str:
    """One sentence: the method, its preset, and what differs from it."""
    head = f"{method.title}, preset {settings.preset}"
    if not settings.values:
        return f"{head}, as it is."
    base = method.presets[settings.preset]
    changed = [f"{name}: {_words(getattr(base, name))} → {_words(value)}" for name, value in settings.values.items()]
    return f"{head}, changed: {listed(changed, 12)}."


def _words(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return re.sub(r"\s+", " ", listed([str(item) for item in value], 4))
    return f"{value:g}" if isinstance(value, float) else str(value)


def presets(method: type[Method]) -> dict[str, dict[str, Any]]:
    """Values of the fields, by name, for every preset."""
    return {name: {field.name: field.default for field in form_fields(method, name)} for name in method.presets}


def settings_json(method: type[Method]) -> list[dict[str, Any]]:
    """Every setting as the REST interface and the command line describe it, in the order of the form."""
    tuned = method.presets["tuned"]
    return [
        {
            "name": info.name,
            "kind": "list" if info.kind == "lines" else info.kind,
            "about": info.help,
            "default": _plain(getattr(tuned, info.name)),
            "options": list(info.choices),
            "low": info.minimum,
            "high": info.maximum,
            "optional": info.optional,
            "advanced": info.advanced,
            "group": info.group,
        }
        for info in _in_form_order(method.Settings)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def with_settings(request: ForgetRequest, settings: MethodSettings) -> ForgetRequest:
    """The request with a form's method, preset and values; the request's own single settings take precedence."""
    return dataclasses.replace(
        request,
        method=settings.method,
        preset=settings.preset,
        settings={**settings.values, **request.settings},
    )
