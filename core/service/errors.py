"""Errors that REST answers with codes of their own."""

from __future__ import annotations

from ..errors import ForgetConceptError, RequestError

__all__ = ["Busy", "Missing"]


class Busy(ForgetConceptError):
    """Something else is under way."""


class Missing(RequestError):
    """There is none of the name that was given."""
