"""Which patches a user put into which checkpoint, so that one that was lost with its weights can be named and restored.

A host unloads a checkpoint together with the patches in its weights, and loads it again without them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from .host_interface import ActivePatch

__all__ = ["AppliedPatches", "DroppedPatch"]


@dataclass(frozen=True)
class DroppedPatch:
    """A patch that the user applied and did not remove, and that is not in the weights of the current checkpoint.

    Attributes:
        name: The patch's name in the library.
        strength: The strength it was applied with.
        checkpoint: The checkpoint that it was applied to.
        same: Whether that is the current checkpoint, which was loaded again since or overwritten by something else.
    """

    name: str
    strength: float
    checkpoint: str
    same: bool


class AppliedPatches:
    """A record of patches by checkpoint; usable from any thread. It ends with the host's process."""

    def __init__(self) -> None:
        self._strengths: dict[tuple[str, str], float] = {}  # by checkpoint and name, in the order of application
        self._lock = threading.Lock()

    def put(self, checkpoint: str, name: str, strength: float) -> None:
        """Record that a patch was applied to a checkpoint."""
        with self._lock:
            self._strengths.pop((checkpoint, name), None)
            self._strengths[checkpoint, name] = strength

    def take(self, checkpoint: str, name: str) -> None:
        """Record that the user removed a patch from a checkpoint; unknown ones are ignored."""
        with self._lock:
            self._strengths.pop((checkpoint, name), None)

    def rename(self, name: str, new: str | None) -> None:
        """Follow a patch to its new name; ``None``: it no longer exists."""
        with self._lock:
            known, self._strengths = self._strengths, {}
            for (checkpoint, old), strength in known.items():
                kept = new if old == name else old
                if kept is not None:
                    self._strengths[checkpoint, kept] = strength

    def dropped(self, checkpoint: str, active: Sequence[ActivePatch]) -> list[DroppedPatch]:
        """The recorded patches that are not in force now.

        Args:
            checkpoint: The current checkpoint; empty while there is none, and nothing counts as dropped then.
            active: The patches in its weights.
        """
        if not checkpoint:
            return []
        in_force = {one.name for one in active if one.in_force}
        with self._lock:
            found: dict[str, DroppedPatch] = {}
            for (place, name), strength in self._strengths.items():
                # of one patch in several checkpoints, the current checkpoint's strength is the one to restore
                if name not in in_force and (name not in found or place == checkpoint):
                    found[name] = DroppedPatch(name, strength, place, place == checkpoint)
        return list(found.values())

    def dismiss(self, dropped: Sequence[DroppedPatch]) -> None:
        """Strike off dropped patches, in every checkpoint."""
        for one in dropped:
            self.rename(one.name, None)
