"""Errors that REST answers with codes of their own."""

from __future__ import annotations

from ..errors import ForgetConceptError, RequestError

__all__ = ["BusyError", "NotFoundError"]


class BusyError(ForgetConceptError):
    """Something else is under way."""


class NotFoundError(RequestError):
    """There is none of the name that was given."""
