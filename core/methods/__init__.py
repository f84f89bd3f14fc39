"""The methods' registry and the front door :func:`fit`.

To add a method, write one file here with a class under :func:`register`; it then appears in every host, the command
line and the shared tests. Nothing else is edited.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

from torch import Tensor

from ..concepts import ForgetRequest
from ..diffusion import LatentDiffusion
from ..errors import ForgetConceptError, PatchError, RequestError
from ..images import check_images, load_images, picture_size
from ..patch import Patch
from ..progress import Progress
from ..text import end_position
from ..version import VERSION
from ..workspace import Workspace

__all__ = ["Inputs", "Method", "all_methods", "fit", "get", "register", "resolve_settings"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a person gives besides words.

    ``images``: pictures by the concept's name, each ``(n, 3, H, W)`` in [-1, 1]. ``workspace``: a folder for what takes
    long. ``earlier``: what earlier requests left, to start from.
    """

    images: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    workspace: Workspace | None = None
    earlier: Patch | None = None

    def earlier_factors(self) -> dict[str, list[Tensor]]:
        """The tensors of what earlier requests left, by key."""
        return {} if self.earlier is None else {k: [f.up, f.down] for k, f in self.earlier.factors.items()}


class Method(ABC):
    """Base of the methods of forgetting.

    ``id`` names it in requests, ``title`` and ``paper`` in interfaces. ``Settings`` is a frozen dataclass of plain
    values; ``presets`` has at least ``"published"`` (the authors') and ``"tuned"`` (ours). ``takes_images``: whether it
    can look at a person's own pictures. ``trained``: whether it starts from what earlier requests left; the others, the
    closed forms, are solved for all requests at once.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]
    takes_images: ClassVar[bool] = False
    trained: ClassVar[bool] = False

    @abstractmethod
    def fit(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        settings: Any,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> Patch:
        """The patch, at strength 1. The request has been checked and ``settings`` resolved."""


# Forget-Me-Not's authors worked with as few; with fewer a method learns the pictures, not what they show
FEWEST_IMAGES = 3

_METHODS: dict[str, type[Method]] = {}
C = TypeVar("C", bound=type[Method])


def register(method: C) -> C:
    """Class decorator: make a method known. Raises :class:`ForgetConceptError` where its id is taken."""
    known = _METHODS.get(method.id)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ForgetConceptError(
            f"Two methods are called '{method.id}': {known.__qualname__} and {method.__qualname__}."
        )
    if not {"published", "tuned"} <= set(method.presets):
        raise ForgetConceptError(f"The method '{method.id}' lacks one of the presets 'published' and 'tuned'.")
    _METHODS[method.id] = method
    return method


def all_methods() -> dict[str, type[Method]]:
    """Every method by its id, in the order of the ids; every module in this folder is one, or their base."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f".{module.name}", __package__)
    return dict(sorted(_METHODS.items()))


def get(method_id: str) -> type[Method]:
    """The method with this id. Raises :class:`RequestError` listing the known ones."""
    methods = all_methods()
    if method_id not in methods:
        raise RequestError(f"The method '{method_id}' is not known: choose one of {', '.join(methods)}.")
    return methods[method_id]


def resolve_settings(method: type[Method], preset: str, overrides: Mapping[str, Any]) -> Any:
    """The preset's settings with ``overrides`` in place.

    Raises :class:`RequestError` for an unknown preset or setting (with the known ones) and for a value of a wrong type.
    """
    if preset not in method.presets:
        raise RequestError(
            f"The method '{method.id}' has no preset '{preset}': choose one of {', '.join(sorted(method.presets))}."
        )
    hints = typing.get_type_hints(method.Settings)
    names = [f.name for f in dataclasses.fields(method.Settings)]
    values = {}
    for name, value in overrides.items():
        if name not in names:
            raise RequestError(
                f"The method '{method.id}' has no setting '{name}': its settings are {', '.join(names)}."
            )
        values[name] = _typed(name, value, hints[name])
    return dataclasses.replace(method.presets[preset], **values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` wants it: whole numbers pass for numbers, lists for tuples."""
    fits, result = _fit_type(value, hint)
    if not fits:
        raise RequestError(f"The setting '{name}' must be {_spoken(hint)}, not {value!r}.")
    return result


def _fit_type(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return next((found for found in (_fit_type(value, option) for option in args) if found[0]), (False, None))
    if hint is type(None):
        return value is None, None
    if origin is Literal:
        return isinstance(value, (str, int)) and value in args, value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False, None
        parts = [_fit_type(item, args[0]) for item in value]
        return all(fits for fits, _ in parts), tuple(part for _, part in parts)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool), value
    if hint is float:
        fits = isinstance(value, (int, float)) and math.isfinite(value)
        return fits, float(value) if fits else None
    if hint is int:
        fits = isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
        return fits, int(value) if fits else None
    return isinstance(value, hint), value


def _spoken(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin is tuple:
        return f"a list, each entry {_spoken(args[0])}"
    if hint is type(None):
        return "nothing (null)"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "words"}.get(hint, str(hint))


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
        check_images(pictures, FEWEST_IMAGES, size, f"'{name}'")
    return dataclasses.replace(inputs, images=images)


def fit(
    model: LatentDiffusion,
    request: ForgetRequest,
    progress: Progress | None = None,
    inputs: Inputs | None = None,
) -> Patch:
    """Do what the request asks, on a borrowed model that is given back as it was: the front door of every host.

    ``inputs`` are a person's pictures, a work folder and what to start from. The patch has the request's ``strength``
    in it already (apply it at 1), and says in its metadata what made it.
    Raises :class:`~..errors.ForgetConceptError` in words (a bad request, tokens cut off, an edit that came out empty or
    not finite) and :class:`~..errors.Cancelled` where ``progress`` does.
    """
    request.check()
    method = get(request.method)
    settings = resolve_settings(method, request.preset, request.settings)
    for concept in request.concepts:
        for phrase in (concept.name, concept.replacement or ""):
            end_position(model.text, phrase)  # raises where even the bare words are cut off
    inputs = _with_images(model, request, inputs or Inputs())
    if inputs.images and not method.takes_images:
        raise RequestError(
            f"The method '{method.id}' works from words alone, and pictures of '{next(iter(inputs.images))}' were "
            "given: leave them out, or use another method."
        )
    patch = method().fit(model, request, settings, progress, inputs)
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
        settings=json.dumps(dataclasses.asdict(settings), ensure_ascii=False),
        request=request.without_images().to_json(),
        concepts=json.dumps([c.name for c in request.concepts], ensure_ascii=False),
        strength=repr(float(request.strength)),
        seed=str(request.seed),
        base_model=model.model_hash,
        base_name=model.name,
        family=model.survey.family,
        architecture=model.survey.fingerprint(),
        text_layer=str(getattr(model.text, "layer", "unknown")),
    )
