"""The library: load a model, forget something, save, load and apply the patch, evaluate it.

``import forget_concept`` offers these names lazily, and so does this module without the host packages. Importing it
imports the ``formats`` room, which registers what :meth:`Patch.save` and named adapters of :meth:`Patch.apply` do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ModelError, RequestError
from .files.workspace import Workspace
from .formats import load_patch as _load_patch
from .methods.base import Inputs
from .methods.fit import fit as _fit
from .methods.registry import plan_request
from .mini.files import NAMES as EMBEDDED
from .models.latent_diffusion import LatentDiffusion
from .models.loading import from_pipeline, load_checkpoint
from .patch.patch import Patch, Pipeline
from .progress import Progress
from .request.concept import Concept
from .request.request import ForgetRequest

if TYPE_CHECKING:
    from .evaluation import SamplingSettings
    from .evaluation.assess import Evaluators
    from .evaluation.attacks import AttackBudget
    from .evaluation.bench.concept_bench import ConceptBench
    from .evaluation.report import Report

__all__ = ["Concept", "ForgetRequest", "Patch", "evaluate", "fit", "load_model", "load_patch"]

CLIP = "openai/clip-vit-base-patch32"
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def load_model(
    source: str | os.PathLike[str] | Pipeline,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clip_skip: int = 1,
    config: str | os.PathLike[str] | None = None,
) -> LatentDiffusion:
    """Load a model for forgetting, sampling and evaluation.

    Example:
        >>> import forget_concept as fc
        >>> model = fc.load_model("mini")
        >>> model.name, model.latent_shape
        ('mini', (4, 16, 16))

    Args:
        source: ``"mini"`` (the embedded model), a diffusers folder, a single-file ``.safetensors``
            checkpoint, or a diffusers ``StableDiffusionPipeline``, ``StableDiffusionXLPipeline`` or ``FluxPipeline``,
            whose parts are shared, not copied.
        device: where to load it, by default the CPU. A pipeline stays where it is.
        dtype: of the weights, by default float32. A pipeline's and the embedded model's stay as they are.
        clip_skip: the text encoder's layer, counted from the last one as the webui does (not for SDXL).
        config: a diffusers folder with the configuration and tokenizer of a single file, to load it offline.

    Returns:
        The model. Nothing in this library changes its weights.

    Raises:
        ModelError: the source is missing, is a pickle or no model of a supported kind, or an argument does not apply
            to it.
    """
    if not isinstance(source, (str, os.PathLike)):
        _only("A pipeline is loaded already", device=device, dtype=dtype, config=config)
        if getattr(source, "unet", None) is None and getattr(source, "transformer", None) is None:
            raise ModelError(f"A {type(source).__name__} is no model: give 'mini', a path or a pipeline of diffusers.")
        origin = str(getattr(getattr(source, "config", None), "_name_or_path", "") or "pipeline")
        return from_pipeline(source, Path(origin).name, clip_skip)
    if str(source) in EMBEDDED:
        from .mini import load

        _only("The embedded model is float32", dtype=None if dtype == torch.float32 else dtype, config=config)
        if clip_skip != 1:
            raise ModelError(f"The embedded model has no clip skip: leave clip_skip={clip_skip} out.")
        return load(device=str(device or "cpu"), name=str(source))
    return load_checkpoint(Path(source), device or "cpu", dtype or torch.float32, clip_skip, config)


def _only(reason: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ModelError(f"{reason}: leave '{name}' out.")


def fit(
    model: LatentDiffusion,
    concept: str | Concept | ForgetRequest | Sequence[str | Concept],
    *,
    kind: str = "object",
    replacement: str | None = None,
    preserve: Sequence[str] = (),
    method: str = "uce",
    preset: str = "tuned",
    settings: Mapping[str, Any] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    images: Tensor | Paths | Mapping[str, Tensor | Paths] | None = None,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Patch:
    """Make a patch that forgets one or several concepts.

    Example:
        >>> import forget_concept as fc
        >>> model = fc.load_model("mini")
        >>> patch = fc.fit(model, "star", replacement="circle", preserve=["moon"])
        >>> patch.about.concepts
        ('star',)
        >>> several = fc.fit(model, [fc.Concept("star", replacement="circle"), "moon"])
        >>> len(several) == len(patch)
        True

    Args:
        model: from :func:`load_model`; it is not changed.
        concept: what to forget: a name, a :class:`Concept`, several of them, or a whole :class:`ForgetRequest`.
        kind: ``"object"``, ``"style"`` or ``"identity"``; of every concept that is given as a name.
        replacement: the concept to show in place of one that is given as a name; by default none.
        preserve: concepts that must not change: the retain set.
        method: id of the method; ``forget-concept methods`` lists them.
        preset: ``"tuned"`` or ``"published"``, or another preset of the method.
        settings: single settings of the method that differ from its preset.
        strength: factor of the edit, above 0 and at most 10.
        seed: for methods that draw random numbers.
        images: reference images for methods that take them: ``(n, 3, H, W)`` in [-1, 1], or files and folders; with
            several concepts, a mapping of these by concept name.
        progress: called with a :class:`ProgressEvent` at every step; it cancels by raising :class:`Cancelled`.
        work: a folder for intermediate results, with which an interrupted training goes on.

    Returns:
        The patch, with ``strength`` in its factors: apply it at strength 1.

    Raises:
        RequestError: the request makes no sense, or an argument is given twice.
        ForgetConceptError: tokens are cut off, or the edit came out empty or not finite.
        Cancelled: ``progress`` raised it.
    """
    if isinstance(concept, ForgetRequest):
        request = concept
        given = {
            "kind": kind != "object",
            "replacement": replacement is not None,
            "preserve": bool(preserve),
            "method": method != "uce",
            "preset": preset != "tuned",
            "settings": bool(settings),
            "strength": strength != 1.0,
            "seed": seed != 0,
        }
        _not_twice("The request states everything", given)
    else:
        named = [concept] if isinstance(concept, (str, Concept)) else list(concept)
        for one in named:
            if not isinstance(one, (str, Concept)):
                raise RequestError(f"A concept must be a name or a Concept, not a {type(one).__name__}.")
        if named and all(isinstance(one, Concept) for one in named):
            _not_twice(
                "A Concept states its own kind and replacement",
                {"kind": kind != "object", "replacement": replacement is not None},
            )
        if isinstance(preserve, str):
            raise RequestError(f"'preserve' must be a list of names: write preserve=[{preserve!r}].")
        concepts = [Concept(one, kind, replacement) if isinstance(one, str) else one for one in named]
        request = ForgetRequest(
            tuple(concepts), tuple(preserve), method, preset, dict(settings or {}), float(strength), seed
        )
    request, pictures = _with_images(request, images)
    workspace = None if work is None else Workspace(work)
    return _fit(model, plan_request(request), progress, Inputs(images=pictures, workspace=workspace))


def _not_twice(reason: str, given: Mapping[str, bool]) -> None:
    for name, is_given in given.items():
        if is_given:
            raise RequestError(f"{reason}: leave '{name}' out, or write it there.")


def _with_images(
    request: ForgetRequest, images: Tensor | Paths | Mapping[str, Tensor | Paths] | None
) -> tuple[ForgetRequest, dict[str, Tensor]]:
    """The request with the paths among the images in its concepts, and the images that are tensors by concept."""
    if images is None:
        return request, {}
    names = [concept.name for concept in request.concepts]
    if not isinstance(images, Mapping):
        if len(names) != 1:
            raise RequestError(f"There are {len(names)} concepts: give the images by name, as {{{names[0]!r}: ...}}.")
        images = {names[0]: images}
    paths: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for name, given in images.items():
        if name not in names:
            raise RequestError(f"There are images of '{name}', which is not among the concepts {', '.join(names)}.")
        if isinstance(given, Tensor):
            tensors[name] = given
        else:
            paths[name] = tuple(map(str, [given] if isinstance(given, (str, os.PathLike)) else given))
    concepts = tuple(replace(one, images=paths.get(one.name, one.images)) for one in request.concepts)
    return replace(request, concepts=concepts), tensors


def load_patch(path: str | os.PathLike[str], model: LatentDiffusion | None = None) -> Patch:
    """Read a patch: a LoRA file, a peft adapter folder, or a context map.

    Example:
        >>> import forget_concept as fc
        >>> model = fc.load_model("mini")
        >>> fc.fit(model, "star").save("no-star.safetensors")
        >>> patch = fc.load_patch("no-star.safetensors", model)
        >>> patch.about.method
        'uce'

    Args:
        path: the file or the folder.
        model: what the patch is for. A context map needs one; other patches are checked against it if it is given.

    Returns:
        The patch, not applied to anything.

    Raises:
        PatchError: the file cannot be read, is not a patch, or does not fit ``model``.
    """
    patch = _load_patch(path, None if model is None else model.survey)
    if model is not None:
        patch.check_fits(model.survey)
    return patch


def evaluate(
    model: LatentDiffusion,
    patch: Patch | Sequence[Patch | tuple[Patch, float]],
    *,
    concepts: Sequence[str] | None = None,
    count: int = 100,
    seed: int = 0,
    bench: str | os.PathLike[str] | ConceptBench | None = None,
    evaluators: Evaluators | None = None,
    sampling: SamplingSettings | None = None,
    attacks: str | AttackBudget | None = None,
    m_score: bool = False,
    full: bool = False,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Report:
    """Measure what a patch makes a model forget, what the model keeps, and whether attacks bring it back.

    Example:
        >>> import forget_concept as fc
        >>> model = fc.load_model("mini")
        >>> patch = fc.fit(model, "star", replacement="circle", preserve=["moon"])
        >>> report = fc.evaluate(model, patch, count=4)
        >>> report.evaluations[0].concept
        'star'
        >>> scores = report.evaluations[0].scores
        >>> scores["patched"].ua.value > scores["unedited"].ua.value
        True

    Args:
        model: from :func:`load_model`; it is not changed.
        patch: a patch, or several, each alone or with its strength, which are then applied together.
        concepts: what to measure, by default what the patches state that they forget.
        count: images for each cell of UA, IRA and CRA.
        seed: of the first image.
        bench: the questions: ``"embedded"``, ``"checkpoints"``, a file or a :class:`ConceptBench`. The embedded model
            has questions of its own.
        evaluators: what looks at the images; by default the embedded model's probe, and for a checkpoint a CLIP
            (``openai/clip-vit-base-patch32``, downloaded once).
        sampling: how images are drawn, by default at the model's own guidance.
        attacks: name of an attack budget, or a budget; by default no attacks.
        m_score: whether to measure the M-Score by textual inversion, which takes long.
        full: whether to run the stress tests as well: wordings that no fit uses, every kept concept by itself, lower
            strengths, and images that start from the concept. They draw several times as many images.
        progress: called with a :class:`ProgressEvent` at every step; it cancels by raising :class:`Cancelled`.
        work: a folder for intermediate results, with which an interrupted evaluation goes on.

    Returns:
        The report; ``forget_concept.core.evaluation.report.write_report`` writes it as HTML and JSON.

    Raises:
        RequestError: the patches state no concept, or the model needs a benchmark and none is given.
        PatchError: a patch does not fit the model.
        ModelError: the CLIP cannot be loaded.
        Cancelled: ``progress`` raised it.
    """
    from .evaluation import SamplingSettings
    from .evaluation.assess import EvaluationSettings, assess
    from .evaluation.bench.concept_bench import ConceptBench, load_bench
    from .evaluation.stress import FULL

    several = [patch] if isinstance(patch, Patch) else list(patch)
    patches = [one if isinstance(one, tuple) else (one, 1.0) for one in several]
    forgotten = [name for one, _ in patches for about in one.about.sources() for name in about.concepts or ()]
    names = list(dict.fromkeys(forgotten if concepts is None else concepts))
    if not names:
        raise RequestError("The patch does not state what it forgets: name it, as concepts=['star'].")
    questions = bench if bench is None or isinstance(bench, ConceptBench) else load_bench(bench)
    return assess(
        model,
        evaluators or _evaluators(model, questions),
        patches,
        names,
        EvaluationSettings(
            count,
            seed,
            sampling=sampling or SamplingSettings(guidance=model.guidance),
            m_score=m_score,
            attacks=attacks,
            stress=FULL if full else None,
        ),
        bench=questions,
        # what the patches forget besides is not in the retain set either
        without=[name for name in forgotten if questions is not None or _in_the_world(name)],
        progress=progress,
        workspace=None if work is None else Workspace(work),
    )


def _in_the_world(name: str) -> bool:
    """Whether the embedded model's world has this concept."""
    from .evaluation import find_concept

    try:
        find_concept(name)
    except RequestError:
        return False
    return True


def _evaluators(model: LatentDiffusion, bench: ConceptBench | None) -> Evaluators:
    """The embedded model's probe, or a CLIP that tells the benchmark's concepts apart."""
    from .evaluation.assess import Evaluators

    if model.name in EMBEDDED:
        from .mini import load_probe

        return Evaluators.embedded(load_probe().to(model.device))
    if bench is None:
        raise RequestError(
            f"The model '{model.name}' has no questions of its own: name a benchmark, such as bench='checkpoints'."
        )
    from .evaluation.judges import ClipJudge
    from .evaluation.metrics import TransformersClip

    words = TransformersClip(CLIP, model.device)
    return Evaluators(ClipJudge(words, bench.names()), image_text=words)
