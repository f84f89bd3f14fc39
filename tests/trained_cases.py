"""Small requests that together go through every part of the trained methods, and the models that they are made on."""

from __future__ import annotations

import torch
from tiny import rand, random_patch, tiny_model, tiny_unet

from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

# one block down and up, with a cross-attention in each: many trainings are made here
SMALL = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
}
COMMON = {"steps": 3, "batch_size": 2, "n_images": 1, "sample_steps": 1, "rank": 2, "lr": 1e-2}
DUGE = {"bank": 3, "pixels": 8, "memory": 2, "contexts": False, "keep_common": False}
NETWORK = DUGE | {"local": False}
AMNESIA = {"contexts": False, "keep_common": False, "replay_images": 3, "fisher_samples": 2, "fisher_draws": 1}
AMNESIA |= {"fisher_prompts": ("a boat", "a key", "a tree")}
REPLACED = (Concept("star", replacement="circle"),)
SEVERAL = (Concept("star"), Concept("watercolour wash", "style", replacement="an oil painting"))

# method, concepts, settings, whether it starts from an earlier patch
CASES = {
    "duge, site by site": ("duge", REPLACED, DUGE, True),
    "duge, site by site, concepts dropped": ("duge", SEVERAL, DUGE | {"no_replacement": "dropped"}, False),
    "duge, whole network": (
        "duge",
        REPLACED,
        NETWORK | {"prior_weight": 0.5, "anchor_weight": 2.0, "no_replacement": "empty"},
        True,
    ),
    "duge, attention maps, null space": (
        "duge",
        SEVERAL,
        NETWORK | {"compare": "maps", "project": 0.8, "train": ("to_q", "to_k"), "optimiser": "sgd"},
        False,
    ),
    "duge, restricted step": ("duge", REPLACED, DUGE | {"gradient": "restricted_step", "lr": 0.5}, True),
    "forget_me_not": ("forget_me_not", SEVERAL, {"contexts": False}, True),
    "forget_me_not, restricted step": (
        "forget_me_not",
        REPLACED,
        {"contexts": False, "gradient": "restricted_step", "lr": 0.5},
        False,
    ),
    "forget_me_not, correction": (
        "forget_me_not",
        (Concept("star"),),
        {"wanted": ("film star",), "unwanted": ("sea star", "gold star"), "contrast": 0.5, "attention_weight": 1.0},
        True,
    ),
    "forget_me_not, dense, whole unet": ("forget_me_not", REPLACED, {"scope": "unet", "rank": None, "steps": 2}, False),
    "forget_me_not, inversion": (
        "forget_me_not",
        (Concept("star"),),
        {"concept_source": "inversion", "latents": "images", "inversion_steps": 2, "tokens": 2, "contexts": False},
        False,
    ),
    "selective_amnesia": ("selective_amnesia", REPLACED, AMNESIA, True),
    "selective_amnesia, noise, restricted": (
        "selective_amnesia",
        (Concept("star"),),
        AMNESIA | {"surrogate": "noise", "gradient": "restricted", "optimiser": "sgd", "clip_norm": 0.1},
        False,
    ),
}


class Pixels:
    """Pictures as latents an eighth as large; only the way in is needed."""

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([small, small[:, :1]], 1)


def clip_model(parts):
    text = CLIPText(*parts)
    return LatentDiffusion(
        tiny_unet(**SMALL), text, sd_alphas_cumprod(), vae=Pixels(), latent_shape=(4, 8, 8), name="tiny"
    )


def made(case, parts, clip=False):
    """The model, the request and the inputs of a case; ``clip``: on a model with CLIP, whatever the case needs."""
    method, concepts, settings, later = CASES[case]
    inverted = settings.get("concept_source") == "inversion"
    model = clip_model(parts) if inverted or clip else tiny_model(**SMALL)
    request = ForgetRequest(concepts, ("moon", "key"), method, "tuned", COMMON | settings, seed=3)
    earlier = None
    if later:
        change = random_patch(model.survey, which=("to_k", "to_v"), scale=0.05)
        earlier = change.with_metadata(request=ForgetRequest((Concept("fish"),)))
    images = {"star": rand(3, 3, 64, 64).clamp(-1, 1)} if inverted else {}
    return model, request, {"earlier": earlier, "images": images}


def same(patch, whole):
    assert patch.metadata == whole.metadata
    assert patch.factors.keys() == whole.factors.keys()
    for key, factor in whole.factors.items():
        assert torch.equal(factor.up, patch.factors[key].up), key
        assert torch.equal(factor.down, patch.factors[key].down), key
