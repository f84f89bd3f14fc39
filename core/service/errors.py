"""Errors that a front answers differently from others, such as REST with a status code of its own."""

from __future__ import annotations

from ..errors import ForgetConceptError, RequestError

__all__ = ["BusyError", "NotFoundError"]


class BusyError(ForgetConceptError):
    """Another job is running."""


class NotFoundError(RequestError):
    """No job, patch or report has the given name."""
