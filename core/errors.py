"""Errors that speak to the person at the host: what is wrong, with which input, what to do."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "Cancelled",
    "ForgetConceptError",
    "ModelError",
    "PatchError",
    "RequestError",
    "TokenError",
    "UnsupportedAdapterError",
    "listed",
]


class ForgetConceptError(ValueError):
    """Base of every error a person can act on; its message is one clear sentence."""


class RequestError(ForgetConceptError):
    """What was asked for cannot be done as asked (an empty concept, an unknown method or setting, ...)."""


class TokenError(ForgetConceptError):
    """A phrase was not found in a prompt, or the text encoder cuts it off."""


class ModelError(ForgetConceptError):
    """The model cannot be read or has not the parts that are needed."""


class PatchError(ForgetConceptError):
    """A patch cannot be read, written or applied to this model."""


class UnsupportedAdapterError(PatchError):
    """A sound adapter that a patch cannot express, such as a LoKr or one of a text encoder: it can be inspected."""


class Cancelled(Exception):
    """The person cancelled. Deliberately no :class:`ForgetConceptError`: nothing is wrong with any input."""


def listed(items: Sequence[str], limit: int = 6) -> str:
    """``a, b, c and 4 more``: a list short enough for a sentence."""
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
