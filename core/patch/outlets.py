"""Registry of what a patch can become: a file in some format, or an adapter on a model.

:meth:`Patch.save` and :meth:`Patch.apply` belong to the patch for whoever uses it, and what they do belongs to the
rooms above this one (``formats``). Imports go down only, so the upper room registers its functions here when it is
imported, and the patch looks them up. ``forget_concept`` and ``forget_concept.core.api`` import ``formats``; whoever
imports :class:`Patch` alone and saves one gets an error that says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..errors import PatchError
from ..models.model_survey import ModelSurvey
from .apply import PatchHandle

__all__ = ["Attach", "Save", "attach_with", "attacher", "format_names", "saver", "saves_as"]

_ROOM = "import forget_concept.core.formats first"


class Save(Protocol):
    """Writes a :class:`Patch` to ``path``; ``survey`` gives the layer names of an unusual UNet."""

    def __call__(
        self,
        patch: Any,
        path: str | os.PathLike[str],
        survey: ModelSurvey | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None: ...


class Attach(Protocol):
    """Puts a :class:`Patch` on a raw UNet as a named adapter."""

    def __call__(self, patch: Any, unet: nn.Module, name: str, strength: float) -> PatchHandle: ...


# a patch is typed Any above, because its own file imports this one
S = TypeVar("S", bound=Save)
A = TypeVar("A", bound=Attach)
_SAVERS: dict[str, Save] = {}
_ATTACHERS: list[Attach] = []


def saves_as(name: str) -> Callable[[S], S]:
    """Decorator: the function writes the format ``name`` of :meth:`Patch.save`."""

    def registered(save: S) -> S:
        _SAVERS[name] = save
        return save

    return registered


def attach_with(attach: A) -> A:
    """Decorator: the function is how :meth:`Patch.apply` makes a named adapter."""
    _ATTACHERS[:] = [attach]
    return attach


def format_names() -> tuple[str, ...]:
    """Names of the registered formats."""
    return tuple(sorted(_SAVERS))


def saver(name: str) -> Save:
    """The function that writes the format ``name``.

    Raises:
        PatchError: there is no such format, or nothing has registered one yet.
    """
    if not _SAVERS:
        raise PatchError(f"No file format is registered: {_ROOM}.")
    if name not in _SAVERS:
        raise PatchError(f"The patch format '{name}' is not known: choose one of {', '.join(format_names())}.")
    return _SAVERS[name]


def attacher() -> Attach:
    """The function that puts a patch on a UNet as a named adapter.

    Raises:
        PatchError: nothing has registered one yet.
    """
    if not _ATTACHERS:
        raise PatchError(f"Nothing is registered that makes an adapter of a patch: {_ROOM}.")
    return _ATTACHERS[0]
