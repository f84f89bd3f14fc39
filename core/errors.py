"""Errors for the user: what is wrong, with which input, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "Cancelled",
    "ForgetConceptError",
    "ModelError",
    "PatchError",
    "RequestError",
    "TokenError",
    "UnknownFamilyError",
    "UnsupportedAdapterError",
    "listed",
]


class ForgetConceptError(ValueError):
    """Base class of the errors that a user can act on."""


class RequestError(ForgetConceptError):
    """A request cannot be fulfilled: an empty concept, an unknown method or setting, settings that contradict."""


class TokenError(ForgetConceptError):
    """A phrase does not occur in a prompt, or the text encoder truncates it."""


class ModelError(ForgetConceptError):
    """A model cannot be read, or lacks a part that is needed."""


class UnknownFamilyError(ModelError):
    """A model of a family that is not known here; where its text enters may still be found by recording."""


class PatchError(ForgetConceptError):
    """A patch cannot be read, written, or applied to a model."""


class UnsupportedAdapterError(PatchError):
    """A sound adapter that a patch cannot express, such as a LoKr or one of a text encoder: it can be inspected."""


class Cancelled(Exception):
    """The user cancelled. Not a :class:`ForgetConceptError`, because no input is wrong."""


def listed(items: Sequence[str], limit: int = 6) -> str:
    """Join items for a sentence, such as ``a, b, c and 4 more``; at most ``limit`` are named."""
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
