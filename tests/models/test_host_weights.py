"""What a lent model is checked for and spared, and that it comes back as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from forget_concept.core.errors import ModelError
from forget_concept.core.models.host_weights import check_channels, without_checkpointing


def test_latents_that_are_only_a_part_of_what_a_unet_takes_are_refused_in_words() -> None:
    check_channels(torch.zeros(1, 4, 2, 2), SimpleNamespace(in_channels=4))
    with pytest.raises(ModelError, match=r"takes 9 channels .*uce"):
        check_channels(torch.zeros(1, 4, 2, 2), SimpleNamespace(in_channels=9))


def test_no_activation_is_recomputed_and_every_switch_comes_back() -> None:
    unet = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    unet[0].checkpoint, unet[1].use_checkpoint, unet[2].checkpoint = True, True, False  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="midway"), without_checkpointing(unet):
        assert (unet[0].checkpoint, unet[1].use_checkpoint, unet[2].checkpoint) == (False, False, False)
        raise RuntimeError("midway")
    assert (unet[0].checkpoint, unet[1].use_checkpoint, unet[2].checkpoint) == (True, True, False)
