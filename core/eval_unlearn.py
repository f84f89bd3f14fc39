"""This project as a technique of the benchmark suite eval-unlearn, which finds it by its entry point.

eval-unlearn (https://pypi.org/project/eval-unlearn) makes a technique of the keywords of its configuration and asks it
for pictures of prompts. It is not imported here; the extra ``forget-concept[eval-unlearn]`` installs it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .api import fit, load_model, load_patch
from .errors import RequestError
from .mini.files import NAMES as EMBEDDED
from .models.images import to_bytes, to_pil
from .request.request import MAX_SEED, ForgetRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ForgetConceptTechnique"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FIT_OPTIONS = {"kind", "method", "preserve", "preset", "replacement", "seed", "settings"}


class ForgetConceptTechnique:
    """A model with a patch on it, as eval-unlearn runs one: ``generate(prompts, seed)``.

    Args:
        model: ``"mini"``, a diffusers folder or a single-file checkpoint.
        erase_concept: What is forgotten, unless ``request`` or ``patch`` is given; also the name under which
            eval-unlearn reports the run.
        request: A request file, or its content.
        patch: A finished patch file or adapter folder.
        strength: Factor of the patch when it is applied.
        device: Where to run (default: CUDA where there is one).
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of a checkpoint's weights.
        config: A diffusers folder with the configuration of a single file, to load it offline.
        num_inference_steps: Sampling steps.
        guidance_scale: Guidance scale.
        batch_size: Pictures sampled at once.
        **options: With ``erase_concept`` alone, arguments of :func:`fit`, such as ``method``,
            ``preset``, ``replacement`` and ``preserve``.

    Raises:
        RequestError: There is nothing to forget, or more than one source of the patch, or an option does not apply.
        ForgetConceptError: As loading a model, fitting and loading a patch.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "mini",
        erase_concept: str | None = None,
        request: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        patch: str | os.PathLike[str] | None = None,
        strength: float = 1.0,
        device: str | None = None,
        dtype: str = "float32",
        config: str | os.PathLike[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        if request is not None and patch is not None:
            raise RequestError("A request and a patch are given: give eval-unlearn's technique one of them.")
        if request is None and patch is None and not erase_concept:
            raise RequestError("Nothing is to be forgotten: give 'erase_concept', a 'request' or a 'patch'.")
        if options and (request is not None or patch is not None):
            given = "request" if patch is None else "patch"
            raise RequestError(f"The {given} states everything: leave '{min(options)}' out, or write it there.")
        if unknown := sorted(set(options) - _FIT_OPTIONS):
            raise RequestError(f"There is no option '{unknown[0]}': choose from {', '.join(sorted(_FIT_OPTIONS))}.")
        if dtype not in _DTYPES:
            raise RequestError(f"The dtype '{dtype}' is unknown: choose from {', '.join(_DTYPES)}.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(model, device, None if str(model) in EMBEDDED else _DTYPES[dtype], config=config)
        if patch is not None:
            self.patch = load_patch(patch, self.model)
        elif request is not None:
            self.patch = fit(self.model, _read(request))
        else:
            self.patch = fit(self.model, str(erase_concept), **options)
        self.strength, self.steps, self.guidance, self.batch = strength, num_inference_steps, guidance_scale, batch_size

    def generate(
        self,
        prompts: Sequence[str],
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> list[Image]:
        """Draw one picture a prompt with the patch in force.

        Args:
            prompts: The prompts.
            seed: Seed of the first picture; the next ones take the following numbers. ``None``: a random one.
            num_inference_steps: Sampling steps (default: as constructed).
            guidance_scale: Guidance scale (default: as constructed).
            negative_prompt: One negative prompt for all pictures.
        """
        if not prompts:
            return []
        first = secrets.randbelow(2**32) if seed is None else seed
        seeds = [(first + i) % (MAX_SEED + 1) for i in range(len(prompts))]
        steps = self.steps if num_inference_steps is None else num_inference_steps
        guidance = self.guidance if guidance_scale is None else guidance_scale
        with self.patch.apply(self.model, self.strength):
            latents = self.model.sample(prompts, seeds, steps, guidance, negative_prompt, batch=self.batch)
        return [to_pil(picture) for picture in to_bytes(self.model.decode(latents, self.batch))]


def _read(request: str | os.PathLike[str] | Mapping[str, Any]) -> ForgetRequest:
    if isinstance(request, Mapping):
        return ForgetRequest.from_json(json.dumps(dict(request)))
    return ForgetRequest.from_file(request)
