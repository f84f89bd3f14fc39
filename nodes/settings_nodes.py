"""One settings node per method, generated from the metadata of its settings' fields."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.methods.base import Method
from ..core.methods.registry import all_methods
from ..core.request.settings import resolve_settings
from ..core.service.forms import FormField, form_fields, presets, settings_of, settings_summary
from .common import ForgetSettings, Node, field_input, reported, schema
from .fields import node_id

__all__ = ["settings_nodes"]


def _input(field: FormField, main: bool) -> Any:
    made = field_input(field, optional=True)
    if not main:  # shown by "Show Advanced" in the node's menu
        made.extra_dict["advanced"] = True
    return made


class _SettingsNode(Node):
    """The settings of one method; the page fills in the fields when a preset is chosen."""

    METHOD: type[Method]

    @classmethod
    def define_schema(cls) -> io.Schema:
        method = cls.METHOD
        chosen = io.Combo.Input(
            "preset",
            options=list(method.presets),
            default="tuned",
            tooltip="Fills in the fields below. Only the fields count; the node reports differences from the preset.",
        )
        # not every host accepts this as a constructor argument
        chosen.extra_dict["forget_concept_presets"] = presets(method)
        return schema(
            node_id=node_id(method),
            display_name=f"Settings: {method.title}",
            description=f"The settings of {method.title}, for the input method_settings. Published in {method.paper}",
            inputs=[chosen, *(_input(field, field.setting in method.main) for field in form_fields(method))],
            outputs=[ForgetSettings.Output("SETTINGS", tooltip="For the input method_settings.")],
            hidden=[io.Hidden.unique_id],
            search_aliases=[method.id, "unlearning settings"],
        )

    @classmethod
    def execute(cls, preset: str, **given: Any) -> io.NodeOutput:
        # a graph of an older version lacks later settings
        values = {**presets(cls.METHOD).get(preset, {}), **given}
        settings = settings_of(cls.METHOD, preset, values)
        # reject a wrong value at the node that holds it, not at the one that forgets
        resolve_settings(cls.METHOD, settings.preset, settings.values)
        return reported(cls.hidden.unique_id, settings_summary(settings, cls.METHOD), settings)


def settings_nodes() -> list[type[io.ComfyNode]]:
    """One settings node per registered method."""
    return [
        type(node_id(method), (_SettingsNode,), {"METHOD": method, "__module__": __name__, "__doc__": method.title})
        for method in all_methods().values()
    ]
