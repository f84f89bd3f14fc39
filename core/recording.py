"""What goes into the projections of the cross-attention sites and what comes out of them, kept from a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ForgetConceptError
from .unet import CrossAttentionSite

__all__ = ["Kept", "Recorder"]

R = TypeVar("R", bound="Recorder")


@dataclass(frozen=True)
class Kept:
    """One side of one projection: its output, or with ``given`` its input; ``by_site`` holds the latest of each."""

    projection: str
    given: bool = False
    by_site: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, site: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.by_site[site] = args[0] if self.given else output

        return keep


class Recorder:
    """A context manager that listens to projections of some sites, differentiable and host-agnostic.

    It works with every attention backend, and sees what adapters add if those were attached before.
    """

    def __init__(self, sites: Iterable[CrossAttentionSite], kept: Sequence[Kept]) -> None:
        self.sites, self.kept = tuple(sites), tuple(kept)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self: R) -> R:
        try:
            for site in self.sites:
                for kept in self.kept:
                    hook = kept.hook(site.name)
                    self._hooks.append(site.projection(kept.projection).register_forward_hook(hook))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self.clear()

    def clear(self) -> None:
        """Let go of what was kept (and of the graph behind it)."""
        for kept in self.kept:
            kept.by_site.clear()

    def check_seen(self) -> None:
        """Raises :class:`ForgetConceptError` where no forward pass has been seen."""
        for site in self.sites:
            if any(site.name not in kept.by_site for kept in self.kept):
                raise ForgetConceptError(f"No forward pass has reached {site.name}: there is nothing of it to look at.")
