"""Patches written into a loaded model's weights, with exact copies of the originals, so that removal leaves no trace.

The host writes into the same weights (its ``<lora:…>`` syntax does), so a layer is always *settled* before it is
written: reset to its weight without the host's own changes, which the host then repeats on top.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..models.model_survey import ModelSurvey
from ..patch.patch import Patch

__all__ = ["LiveWeights"]


class LiveWeights:
    """The patches in one UNet.

    :meth:`state` may be called from any thread; the other methods only while the host draws nothing.
    """

    def __init__(
        self, survey: ModelSurvey, settle: Callable[[nn.Module], None], settled: Callable[[nn.Module], Tensor]
    ) -> None:
        """Start without any patch.

        Args:
            settle: Removes the host's own changes from a layer.
            settled: Reads the weight that ``settle`` would give, without changing anything.
        """
        self.survey = survey
        self.patches: dict[str, tuple[Patch, float]] = {}
        self._settle, self._settled = settle, settled
        self._own: dict[str, Tensor] = {}  # by canonical key: exact copies from before the first patch
        self._written: dict[str, Tensor] = {}
        self._set_aside = False  # the patches are out of the weights for the length of a job
        self._lock = threading.RLock()  # weights are not compared while they are written

    def state(self) -> Literal["in force", "gone", "mixed"]:
        """Whether the weights still are those that were written: all of them, none, or only some.

        Patches that are set aside for a job count as in force: nothing is drawn meanwhile.
        """
        with self._lock:
            if self._set_aside:
                return "in force"
            held = lost = 0
            for key, written in self._written.items():
                module = self.survey.linear(key)
                # the host may be writing at this moment: read a second time before concluding that the weight changed
                if any(torch.equal(self._settled(module).detach().cpu(), written) for _ in range(2)):
                    held += not torch.equal(written, self._own[key])
                else:
                    lost += 1
        if not lost:
            return "in force"
        return "mixed" if held else "gone"

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        """Write a patch into the weights, in place of one of the same name.

        Raises:
            PatchError: Where it does not fit or changes nothing, or something else overwrote the weights. Nothing is
                changed then.
        """
        patch.check_fits(self.survey)
        patch.scaled(strength)
        if self.state() != "in force":
            raise PatchError(
                f"Something else has changed the model's weights since {self._names()} was applied: remove that first, "
                "or reload the checkpoint."
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
                "of this model's weights. Use a higher strength."
            )

    def remove(self, name: str) -> None:
        """Remove a patch; the weights are then bit-identical to what they would be without it.

        Where the weights were reloaded since, only the record of it is removed.

        Raises:
            PatchError: Where no patch of this name is applied, or something else overwrote a part of the weights.
        """
        if name not in self.patches:
            raise PatchError(f"No patch '{name}' was applied to the loaded model.")
        wanted = {key: value for key, value in self.patches.items() if key != name}
        state = self.state()
        if state == "mixed":
            raise PatchError(
                f"Something else has changed a part of the weights since {self._names()} was applied, so the patch "
                f"'{name}' cannot be removed exactly: reload the checkpoint."
            )
        if state == "in force":
            self._write(wanted)
            return
        self.patches = wanted
        if not wanted:
            self._own, self._written = {}, {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside a ``with`` block, the weights are without any patch; they are written again when it ends."""
        state = self.state()
        if state == "mixed":
            raise PatchError(
                f"Something else has changed a part of the weights since {self._names()} was applied: reload the "
                "checkpoint."
            )
        if state == "gone" or not self._own:
            yield
            return
        try:
            with self._lock:
                self._set_aside = True
                self._put(self._own)
            yield
        finally:
            with self._lock:
                self._put(self._written)
                self._set_aside = False

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
