"""Fitting a plan on a model: the step that every front end shares."""

from __future__ import annotations

import dataclasses

from ..errors import PatchError, RequestError
from ..models.finite import check_weights
from ..models.images import check_images, load_images, picture_size
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import check_words
from ..models.token_positions import end_position
from ..patch.patch import Patch
from ..progress import Progress
from ..request.concept import normalized_phrase
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..version import VERSION
from .base import Inputs
from .registry import get

__all__ = ["fit"]


# the authors of Forget-Me-Not used as few; with fewer, a method learns the images instead of the concept
MIN_IMAGES = 3


def _with_images(model: LatentDiffusion, request: ForgetRequest, inputs: Inputs, progress: Progress | None) -> Inputs:
    """The inputs with the images of the request loaded, and all images checked."""
    size = picture_size(model)
    names = {normalized_phrase(concept.name): concept.name for concept in request.concepts}
    given = {names.get(normalized_phrase(name), name): pictures for name, pictures in inputs.images.items()}
    if len(given) < len(inputs.images):
        raise RequestError("The pictures of one concept are given under two spellings of its name: use one of them.")
    images = {
        concept.name: load_images(concept.images, size, progress)
        for concept in request.concepts
        if concept.images and concept.name not in given
    } | given
    for name, pictures in images.items():
        if name not in names.values():
            raise RequestError(
                f"There are images of '{name}', which is not to be forgotten: leave them out, or name one of "
                f"{', '.join(names.values())}."
            )
        check_images(pictures, MIN_IMAGES, size, f"'{name}'")
    return dataclasses.replace(inputs, images=images)


def fit(
    model: LatentDiffusion,
    plan: Plan,
    progress: Progress | None = None,
    inputs: Inputs | None = None,
) -> Patch:
    """Fit a plan on a model.

    Args:
        model: The base model; it is restored bit-exactly.
        plan: The checked request with its method and settings.
        progress: Called with every step; may raise :class:`Cancelled`.
        inputs: Images, a work folder, and the patch of earlier requests.

    Returns:
        The patch. The request's strength is already multiplied in, so it is applied at strength 1; its metadata state
        what made it.

    Raises:
        ModelError: A weight of the model or a text state is not finite.
        ForgetConceptError: A prompt is too long for the text encoder, the images do not fit, or the edit is zero or not
            finite.
        Cancelled: ``progress`` raised it.
    """
    request, method = plan.request, get(plan.request.method)
    check_weights(model)
    check_words(model.text, [words for _, words in plan.written_words()])
    for concept in request.concepts:
        for phrase in (concept.name, concept.replacement or ""):
            end_position(model.text, phrase)  # raises if the phrase alone is too long for the text encoder
    inputs = _with_images(model, request, inputs or Inputs(), progress)
    if inputs.images and not method.takes_images:
        raise RequestError(
            f"The method '{method.id}' works from words alone, and images of '{next(iter(inputs.images))}' were given: "
            "leave them out, or use another method."
        )
    patch = method().fit(model, plan, progress, inputs)
    patch.check_finite()
    if patch.max_abs() == 0:
        raise PatchError(
            f"The edit changes nothing: for {' and '.join(repr(c.name) for c in request.concepts)} the method "
            f"'{request.method}' gave a zero patch. Name another replacement if there is one: this one may mean the "
            "same to the model."
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
        text_layer=model.text_layer,
    )
