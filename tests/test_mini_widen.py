"""The host form of the embedded autoencoder computes the same pictures."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from forget_concept.core.mini import config
from forget_concept.core.mini.widen import HOST_GROUPS, widen, widened_config


def test_widened_autoencoder_is_the_same_function() -> None:
    torch.manual_seed(0)
    ours, wide = AutoencoderKL(**config.AUTOENCODER).eval(), AutoencoderKL(**widened_config()).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # norms away from one and zero, or a lost bias would not show
            parameter.add_(torch.randn_like(parameter) * 0.05)
    wide.load_state_dict(widen(ours.state_dict()))
    assert all(m.num_groups == HOST_GROUPS for m in wide.modules() if isinstance(m, torch.nn.GroupNorm))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents, wide_latents = (m.encode(images).latent_dist.mode() for m in (ours, wide))
        torch.testing.assert_close(wide_latents, latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wide.decode(latents).sample, ours.decode(latents).sample, rtol=1e-4, atol=1e-4)
