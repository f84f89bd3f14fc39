"""Axes for the webui's X/Y/Z plot: which patch, and how strong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import RequestError
from ..core.request.request import MAX_STRENGTH
from .always_on import FIELD, NAMES, STRENGTH
from .webui import WebUI, plot_script

__all__ = ["add_axes"]

_STRENGTH_AXIS, _PATCH_AXIS = f"[{FIELD}] Strength", f"[{FIELD}] Patch"
_NONE = "None"


def add_axes(host: WebUI) -> None:
    """Add the axes to the plot, once; does nothing as long as the webui has not loaded its plot script."""
    plot = plot_script()
    if plot is None or any(option.label == _STRENGTH_AXIS for option in plot.axis_options):
        return

    def check_strengths(p: Any, values: Sequence[float]) -> None:
        for value in values:
            if abs(value) > MAX_STRENGTH:
                raise RequestError(
                    f"A strength on the axis '{_STRENGTH_AXIS}' must be from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, "
                    f"not {value:g}."
                )
        if not (_selected(p) or host.active() or _PATCH_AXIS in _axes(p)):
            raise RequestError(
                f"The axis '{_STRENGTH_AXIS}' has no patch: choose one under {FIELD} > Patches in every picture, put "
                f"one into the model, or add the axis '{_PATCH_AXIS}'."
            )

    def check_names(p: Any, values: Sequence[str]) -> None:
        known = host.prompt_patches()
        for value in values:
            if value not in (_NONE, *known):
                raise RequestError(
                    f"There is no patch '{value}' in the Lora folder: write the name of one, or {_NONE}, on the axis "
                    f"'{_PATCH_AXIS}'."
                )

    def set_strength(p: Any, value: float, values: Sequence[float]) -> None:
        setattr(p, STRENGTH, value)

    def set_name(p: Any, value: str, values: Sequence[str]) -> None:
        setattr(p, NAMES, [] if value == _NONE else [value])

    plot.axis_options.extend(
        [
            plot.AxisOption(_STRENGTH_AXIS, float, set_strength, confirm=check_strengths),
            plot.AxisOption(
                _PATCH_AXIS, str, set_name, confirm=check_names, choices=lambda: [_NONE, *host.prompt_patches()]
            ),
        ]
    )


def _selected(p: Any) -> bool:
    """Whether a patch is chosen in the always-on script."""
    script = next((one for one in p.scripts.alwayson_scripts if one.title() == FIELD), None)
    return script is not None and bool(p.script_args[script.args_from])


def _axes(p: Any) -> set[str]:
    """The labels of the plot's axes, from its arguments: type, values and list of values of each of the three."""
    script = next((one for one in p.scripts.selectable_scripts if hasattr(one, "current_axis_options")), None)
    if script is None:
        return set()
    kinds = p.script_args[script.args_from : script.args_from + 9 : 3]
    return {script.current_axis_options[kind or 0].label for kind in kinds}
