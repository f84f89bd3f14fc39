"""Text states of fixed prompts, remembered for as long as their text encoder lives, within a bound of memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..files.arrays import tensor_bytes
from .text_states import TextStates

__all__ = ["MAX_BYTES", "TOKENIZER_PROBE", "StateCache", "cache_of", "fingerprint"]

# of one text encoder; the everyday words of a closed form take 85 MB in fp32 on SD1, and 110 MB in fp16 on SDXL
MAX_BYTES = 256 * 2**20
# its ids tell tokenizers apart
TOKENIZER_PROBE = "a photo of a red star, saber_(fate) in the caf\u00e9"
# what PEFT's adapters keep beside their tensors and what changes the states nonetheless
_ADAPTER_STATE = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")


def fingerprint(modules: Iterable[nn.Module], *about: object) -> str | None:
    """Hash all that the states of an encoder depend on: its weights, adapters, dtypes and device, and ``about``.

    Args:
        modules: The modules whose weights the states come from.
        about: What else they depend on, such as the layer.

    Returns:
        The hash; ``None`` if it cannot be told, because a weight is not a plain tensor in memory, or because a hook or
        a replaced ``forward`` may change the states.
    """
    digest = hashlib.blake2b(repr(about).encode())
    for module in modules:
        for name, part in module.named_modules():
            if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
                return None
            known = [repr(getattr(part, key, None)) for key in _ADAPTER_STATE] if hasattr(part, "scaling") else []
            digest.update(repr((name, type(part).__qualname__, part.training, known)).encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            # a host's own kind of tensor may hold its values elsewhere
            if tensor.is_meta or type(tensor.data) is not torch.Tensor:
                return None
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape), str(tensor.device))).encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class StateCache:
    """The states of batches of prompts; those that were not asked for longest are dropped first.

    A batch is found by all of its prompts in their order, because the states of a prompt may be rounded differently
    beside others. What is found is therefore bit-identical to what the encoder would return. Usable from any thread.

    Args:
        max_bytes: Bound of the memory of all states.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._found: OrderedDict[tuple[str, ...], tuple[TextStates, torch.device]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...]) -> TextStates | None:
        """A copy of the states of a batch, on the device that they came from, or ``None``."""
        with self._lock:
            if (found := self._found.get(key)) is None:
                return None
            self._found.move_to_end(key)
        states, device = found
        return states.to(device, copy=True)

    def put(self, key: tuple[str, ...], states: TextStates) -> None:
        """Remember a copy of the states of a batch, on the CPU."""
        if states.nbytes > self.max_bytes:
            return
        copied = states.to("cpu", copy=True)
        with self._lock:
            if key in self._found:
                return
            self._found[key] = (copied, states.hidden.device)
            self.nbytes += copied.nbytes
            while self.nbytes > self.max_bytes:
                _, (dropped, _) = self._found.popitem(last=False)
                self.nbytes -= dropped.nbytes


# by the first module of the encoder: the states go when the model does
_CACHES: WeakKeyDictionary[nn.Module, StateCache] = WeakKeyDictionary()
_LOCK = threading.Lock()


def cache_of(encoder: Any) -> tuple[StateCache, str] | None:
    """The cache of a text encoder, and what its keys begin with.

    An encoder whose states may be remembered has ``modules()``, the modules that its states come from, and
    ``fingerprint() -> str | None``, which changes with everything that changes the states.

    Returns:
        ``None`` for every other encoder, such as one with learned vectors.
    """
    tell = getattr(encoder, "fingerprint", None)
    if tell is None or (known := tell()) is None:
        return None
    owner: nn.Module = next(iter(encoder.modules()))
    with _LOCK:
        return _CACHES.setdefault(owner, StateCache()), known
