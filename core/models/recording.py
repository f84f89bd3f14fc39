"""Where a text enters a model of no known family: found by recording one prediction.

The general rule: a closed form is a linear map of text states, and it is stored in the linear layers that read these
states first. They are the layers whose input *is* the text states, or a norm of them. Whether they are all is measured:
with what they say of the text silenced, two prompts should give the same prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .families.family import EntryPath, Family
from .model_survey import is_linear
from .text_entries import MEAN, POOLED, TOKENS
from .text_states import TextStates

__all__ = ["RECORDED", "adopt", "record", "recorded", "remember"]

RECORDED = "recorded"  # family of models whose text entries were recorded
_known: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()
_SAME = 2e-2  # largest difference of text states in the model's own precision, relative to the largest of them
_LEAST = 0.5  # share of the text's influence below which nothing is offered


def recorded(module: nn.Module) -> Family | None:
    """What was recorded of a module; ``None`` if nothing was."""
    return _known.get(module)


def remember(module: nn.Module, family: Family) -> None:
    """Let later surveys of a module take it as one of a recorded family."""
    _known[module] = family


def adopt(module: nn.Module, paths: Iterable[str]) -> bool:
    """Take a module as recorded by the paths of a patch's layers; whether all of them are linear layers that it has."""
    wanted = list(paths)
    modules = dict(module.named_modules())
    if not wanted or not all(is_linear(modules.get(path)) for path in wanted):
        return False
    remember(module, _family([EntryPath(TOKENS, path, path) for path in wanted], ""))
    return True


def record(module: nn.Module, predict: Callable[[TextStates], Tensor], one: TextStates, other: TextStates) -> Family:
    """Find the layers of a raw model that read text first; later surveys of the module know them.

    Args:
        module: The raw model.
        predict: Its prediction on one fixed noisy latent under the text states of one prompt.
        one: Text states of a prompt, ``(1, tokens, d)``.
        other: Those of another prompt.

    Raises:
        ModelError: No linear layer reads the text states first, or the text mostly takes other ways.
    """
    seen = _Entries(one)
    with torch.no_grad(), seen.attached(module):
        plain = predict(one).detach().float()
    entries = seen.found
    for stream in {entry.stream for entry in entries}:
        if len({entry.norm for entry in entries if entry.stream == stream}) > 1:
            raise ModelError(
                f"This model ({type(module).__name__}) is of no family that is known here, and it reads the text "
                "through several norms, for which there is no common edit."
            )
    if not any(entry.stream == TOKENS for entry in entries):
        raise ModelError(
            f"This model ({type(module).__name__}) is of no family that is known here, and none of its linear layers "
            f"reads the text states (width {one.hidden.shape[-1]}) first: it cannot be edited."
        )
    with torch.no_grad():
        apart = float((predict(other).detach().float() - plain).norm())
        with _silenced(module, entries):
            left = float((predict(other).detach().float() - predict(one).detach().float()).norm())
    through = 1 - left / apart if apart > 0 else 0.0
    if through < _LEAST:
        raise ModelError(
            f"This model ({type(module).__name__}) is of no family that is known here. Its layers that read the text "
            f"states first ({', '.join(entry.original for entry in entries)}) pass on only {max(through, 0):.0%} of "
            "what the text changes: an edit of them would forget too little."
        )
    known = "all" if through > 0.995 else f"about {through:.0%}"
    family = _family(
        entries,
        f"The model is of no family that is known here: {len(entries)} layers that read the text were found by "
        f"recording, and {known} of what the text changes passes through them. Look at pictures before you rely on it.",
    )
    remember(module, family)
    return family


def _family(entries: list[EntryPath], caution: str) -> Family:
    ordered = sorted(entries, key=lambda entry: (TOKENS, POOLED, MEAN).index(entry.stream))
    return Family(
        id=RECORDED,
        title="recorded",
        original=frozenset(),
        diffusers=frozenset(),
        entries=tuple(ordered),
        caution=caution,
    )


class _Entries:
    """Linear layers whose input is a stream of the states, or what a layer that is no linear one made of it.

    Nothing else of the prediction is kept: a large model's activations would not fit into memory.
    """

    def __init__(self, states: TextStates) -> None:
        self._streams = {TOKENS: states.hidden[0, : states.known()[0]], MEAN: states.mean()}
        if states.pooled is not None:
            self._streams[POOLED] = states.pooled
        self._norms: list[tuple[str, str, Tensor]] = []  # stream, path, output
        self._found: dict[str, EntryPath] = {}

    @property
    def found(self) -> list[EntryPath]:
        """The layers in the order in which they were called."""
        return list(self._found.values())

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[None]:
        handles = []
        for path, part in module.named_modules():
            if next(part.children(), None) is None:
                handles.append(part.register_forward_hook(self._hook(path, is_linear(part))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str, linear: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            given = args[0].detach()
            if linear and path not in self._found:
                for stream, norm, made in self._norms:
                    if _is_output(given, made):
                        self._found[path] = EntryPath(stream, path, path, norm, norm)
                        return
            for stream, values in self._streams.items():
                if path not in self._found and _reads(given, values):
                    if linear:
                        self._found[path] = EntryPath(stream, path, path)
                    else:
                        self._norms.append((stream, path, output.detach()))
                    return

        return hook


def _reads(given: Tensor, values: Tensor) -> bool:
    """Whether an input is these rows, with anything behind them; in whatever precision the model computes."""
    if not given.ndim or given.shape[-1] != values.shape[-1]:
        return False
    rows = given.reshape(-1, given.shape[-1])[: len(values)].float()
    wanted = values.to(rows.device).float()
    size = float(wanted.abs().max())
    return rows.shape == wanted.shape and size > 0 and float((rows - wanted).abs().max()) <= _SAME * size


def _is_output(given: Tensor, output: Tensor) -> bool:
    return given.shape == output.shape and given.device == output.device and torch.equal(given, output.to(given.dtype))


@contextmanager
def _silenced(module: nn.Module, entries: list[EntryPath]) -> Iterator[None]:
    """Inside a ``with`` block these layers answer 0 to everything."""
    handles = [
        module.get_submodule(entry.original).register_forward_hook(lambda part, args, output: torch.zeros_like(output))
        for entry in entries
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
