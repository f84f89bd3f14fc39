"""A host's model in the core: complete once constructed, differentiable in place, and restored bit-exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch import nn

from forget_concept.core.errors import ModelError
from forget_concept.core.models.host_weights import (
    HostLatentDiffusion,
    check_channels,
    detached_view,
    without_checkpointing,
)


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


def test_an_adapter_states_everything_and_nothing_changes_afterwards() -> None:
    base = tiny_model()
    unet = base.unet
    given = {
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "vae": None,
        "latent_shape": (4, 8, 8),
        "guidance": 3.0,
        "name": "a",
        "eps_model": lambda x, t, states: unet(x.float(), t, states.hidden.float(), return_dict=False)[0],
    }
    for missing in given:
        with pytest.raises(TypeError, match=missing):
            HostLatentDiffusion(
                unet,
                base.text,
                base.alphas_cumprod,
                "epsilon",
                **{name: value for name, value in given.items() if name != missing},
            )
    model = HostLatentDiffusion(unet, base.text, base.alphas_cumprod, "epsilon", **given)
    assert (model.device, model.dtype, model.guidance) == (torch.device("cpu"), torch.bfloat16, 3.0)
    for name in ("device", "dtype"):
        with pytest.raises(AttributeError):
            setattr(model, name, None)
    assert model.model_hash == base.model_hash


@pytest.mark.parametrize("ending", ["success", "error"])
def test_inference_tensors_are_differentiable_inside_and_the_hosts_own_afterwards(ending: str) -> None:
    with torch.inference_mode():
        layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    own = {name: (tensor, tensor.clone()) for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    x = torch.randn(8, 4, requires_grad=True)
    try:
        with detached_view(layer):
            assert all(not p.is_inference() and not p.requires_grad for p in layer.parameters())
            assert layer[0].weight.data_ptr() == own["0.weight"][0].data_ptr()  # no copy
            layer.eval()(x).square().sum().backward()
            if ending == "error":
                raise RuntimeError("midway")
    except RuntimeError as error:
        assert str(error) == "midway"
    assert x.grad is not None and bool(x.grad.any())
    now = dict([*layer.named_parameters(), *layer.named_buffers()])
    for name, (tensor, value) in own.items():
        assert now[name] is tensor and torch.equal(tensor, value)
    assert layer.training and layer[1].training
