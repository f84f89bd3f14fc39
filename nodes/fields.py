"""Ids of the settings nodes."""

from __future__ import annotations

from ..core.methods.base import Method

__all__ = ["node_id"]


def node_id(method: type[Method]) -> str:
    """The id of a method's settings node."""
    return "ForgetConcept" + "".join(part.capitalize() for part in method.id.split("_")) + "Settings"
