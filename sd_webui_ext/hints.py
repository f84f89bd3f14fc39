"""Words that appear beside a field while it is filled in."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..core.request.request import strength_warning
from ..core.service import html

__all__ = ["strength_hint", "strength_words"]


def strength_words(strength: Any) -> str:
    """The warning for a strength as HTML; empty for a usual strength, or while the field is empty."""
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    warning = strength_warning(float(strength)) if number else None
    return html.problem(warning) if warning else ""


def strength_hint(slider: Any) -> Any:
    """A component that says what is known of a high strength as soon as the slider is set to one."""
    hint = gr.HTML("", elem_id=f"{slider.elem_id}_hint")
    slider.change(strength_words, [slider], [hint], queue=False, show_progress="hidden")
    return hint
