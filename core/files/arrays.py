"""The bytes of a tensor, for hashing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tensor_bytes"]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order, as bytes.

    Args:
        tensor: A tensor of any shape and dtype. A contiguous one on the CPU is not copied, so use the view before the
            tensor changes.
    """
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
