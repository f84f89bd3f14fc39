"""Patches in the very weights of a loaded model: exact copies are kept, so that what is taken out leaves no trace.

The host has hands on the same weights (its ``<lora:…>`` writes into them too), so a layer is always *settled* before it
is written: brought to what it is without the host's own changes, which the host then makes anew on top.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..models.unet import UNetSurvey
from ..patch.patch import Patch

__all__ = ["LiveWeights"]


class LiveWeights:
    """The patches in one UNet. ``settle`` takes the host's changes out of a layer for good; ``settled`` reads, without
    a change, the weight that this would give.

    :meth:`state` may be asked for in any thread; to change anything is for the one in which no picture is drawn.
    """

    def __init__(
        self, survey: UNetSurvey, settle: Callable[[nn.Module], None], settled: Callable[[nn.Module], Tensor]
    ) -> None:
        self.survey = survey
        self.patches: dict[str, tuple[Patch, float]] = {}
        self._settle, self._settled = settle, settled
        self._own: dict[str, Tensor] = {}  # by canonical key, exactly as they were before the first patch
        self._written: dict[str, Tensor] = {}
        self._lent = False
        self._lock = threading.RLock()  # while weights are written, none are compared

    def state(self) -> Literal["in force", "gone", "mixed"]:
        """Whether the weights are those that were written: all of them, none, or only some.

        What is put aside for a while is in force: no picture is drawn meanwhile.
        """
        with self._lock:
            if self._lent:
                return "in force"
            held = lost = 0
            for key, written in self._written.items():
                module = self.survey.linear(key)
                # the host may be writing just now: what was read in between is read again
                if any(torch.equal(self._settled(module).detach().cpu(), written) for _ in range(2)):
                    held += not torch.equal(written, self._own[key])
                else:
                    lost += 1
        if not lost:
            return "in force"
        return "mixed" if held else "gone"

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        """Put a patch in, in place of one of the same name; raises :class:`PatchError` with nothing changed."""
        patch.check_fits(self.survey)
        patch.scaled(strength)
        if self.state() != "in force":
            raise PatchError(
                f"Something else has changed the model's weights since {self._names()} went in: take that off the list "
                "of applied patches first, or load the checkpoint anew."
            )
        wanted = {key: value for key, value in self.patches.items() if key != name}
        wanted[name] = (patch, strength)
        patches, before = self.patches, self._written
        self._write(wanted)
        changed = any(not torch.equal(self._written[key], before.get(key, self._own[key])) for key in patch.factors)
        if not changed and strength != 0 and name not in patches:
            self._write(patches)
            raise PatchError(
                f"The patch '{name}' changes nothing here: at strength {strength:g} all of it is lost in the rounding "
                "of this model's weights."
            )

    def remove(self, name: str) -> None:
        """Take a patch out; the weights are then exactly what they would be had it never been in.

        Where the weights were loaded anew since, it is only struck off. Raises :class:`PatchError` for a name that is
        not there, and where something else has written over a part of it.
        """
        if name not in self.patches:
            raise PatchError(f"No patch '{name}' was applied to the loaded model.")
        wanted = {key: value for key, value in self.patches.items() if key != name}
        state = self.state()
        if state == "mixed":
            raise PatchError(
                f"Something else has changed a part of the weights since {self._names()} went in, so that the patch "
                f"'{name}' cannot be taken out exactly: load the checkpoint anew."
            )
        if state == "in force":
            self._write(wanted)
            return
        self.patches = wanted
        if not wanted:
            self._own, self._written = {}, {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside a ``with`` block: the weights without any patch; afterwards, those with them again."""
        state = self.state()
        if state == "mixed":
            raise PatchError(
                f"Something else has changed a part of the weights since {self._names()} went in: load the checkpoint "
                "anew."
            )
        if state == "gone" or not self._own:
            yield
            return
        try:
            with self._lock:
                self._lent = True
                self._put(self._own)
            yield
        finally:
            with self._lock:
                self._put(self._written)
                self._lent = False

    def _names(self) -> str:
        return ", ".join(f"'{name}'" for name in self.patches)

    def _write(self, wanted: dict[str, tuple[Patch, float]]) -> None:
        with self._lock:
            self._rewrite(wanted)

    def _rewrite(self, wanted: dict[str, tuple[Patch, float]]) -> None:
        keys = dict.fromkeys(key for patch, _ in wanted.values() for key in patch.factors)
        before, own = self._written, dict(self._own)
        for key in keys:
            if key not in own:
                module = self.survey.linear(key)
                self._settle(module)
                own[key] = module.weight.detach().to("cpu", copy=True)
        try:
            self._put(own)
            made: dict[str, Tensor] = {}
            if wanted:
                merged = Patch.combined(list(wanted.values())).merged_state(self.survey)
                made = {key: merged[self.survey.layer(key).path + ".weight"].cpu() for key in keys}
                self._put(made)
        except BaseException:
            self._put(own | before)
            raise
        self.patches, self._written = wanted, made
        self._own = {key: own[key] for key in keys}

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            module = self.survey.linear(key)
            self._settle(module)
            module.weight.copy_(value)
