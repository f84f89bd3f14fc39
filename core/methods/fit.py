"""The methods' registry and the front door :func:`fit`.

To add a method, write one file here with a class under :func:`register`; it then appears in every host, the command
line and the shared tests. Nothing else is edited.
"""

from __future__ import annotations

import dataclasses

from ..errors import PatchError, RequestError
from ..models.images import check_images, load_images, picture_size
from ..models.latent_diffusion import LatentDiffusion
from ..models.token_positions import end_position
from ..patch.patch import Patch
from ..progress import Progress
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..version import VERSION
from .base import Inputs
from .registry import get

__all__ = ["fit"]


# Forget-Me-Not's authors worked with as few; with fewer a method learns the pictures, not what they show
MIN_IMAGES = 3


def _with_images(model: LatentDiffusion, request: ForgetRequest, inputs: Inputs) -> Inputs:
    """The inputs with the request's own pictures read in, and all of them looked through."""
    size = picture_size(model)
    images = {
        concept.name: load_images(concept.images, size)
        for concept in request.concepts
        if concept.images and concept.name not in inputs.images
    } | dict(inputs.images)
    names = [concept.name for concept in request.concepts]
    for name, pictures in images.items():
        if name not in names:
            raise RequestError(f"There are pictures of '{name}', which is not to be forgotten: {', '.join(names)} are.")
        check_images(pictures, MIN_IMAGES, size, f"'{name}'")
    return dataclasses.replace(inputs, images=images)


def fit(
    model: LatentDiffusion,
    plan: Plan,
    progress: Progress | None = None,
    inputs: Inputs | None = None,
) -> Patch:
    """Do what the request asks, on a borrowed model that is given back as it was: the front door of every host.

    ``inputs`` are a person's pictures, a work folder and what to start from. The patch has the request's ``strength``
    in it already (apply it at 1), and says in its metadata what made it.
    Raises :class:`ForgetConceptError` in words (a bad request, tokens cut off, an edit that came out empty or
    not finite) and :class:`Cancelled` where ``progress`` does.
    """
    request, method = plan.request, get(plan.request.method)
    for concept in request.concepts:
        for phrase in (concept.name, concept.replacement or ""):
            end_position(model.text, phrase)  # raises where even the bare words are cut off
    inputs = _with_images(model, request, inputs or Inputs())
    if inputs.images and not method.takes_images:
        raise RequestError(
            f"The method '{method.id}' works from words alone, and pictures of '{next(iter(inputs.images))}' were "
            "given: leave them out, or use another method."
        )
    patch = method().fit(model, plan, progress, inputs)
    patch.check_finite()
    if patch.max_abs() == 0:
        raise PatchError(
            f"The edit changes nothing: for {' and '.join(repr(c.name) for c in request.concepts)} the method "
            f"'{request.method}' came out empty. If there is a replacement, it may mean the same to this model."
        )
    return patch.scaled(request.strength).with_metadata(
        version=VERSION,
        method=request.method,
        preset=request.preset,
        settings=dataclasses.asdict(plan.settings),
        request=request.without_images(),
        concepts=tuple(concept.name for concept in request.concepts),
        strength=request.strength,
        seed=request.seed,
        base_model=model.model_hash,
        base_name=model.name,
        family=model.survey.family,
        architecture=model.survey.fingerprint(),
        text_layer=str(getattr(model.text, "layer", "unknown")),
    )
