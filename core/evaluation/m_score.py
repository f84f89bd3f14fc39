"""M-Score: similarity of the concept's name to the embedding that textual inversion learns from the concept's images.

Textual inversion learns the vectors that make a model reproduce given images. In a model that knows the concept they
are close to the embedding of its name; in a model that has forgotten it they are not. The score is the cosine
similarity of the two, and the result is its drop from the unedited to the edited model. Both inversions start from the
same random vectors, never from the name, and use the same images, time steps and noise.

The paper does not specify the space of the cosine. The default here is the input embedding space, between the mean of
the learned vectors and the mean of the name's sub-words, which separated forgotten from retained concepts best on the
embedded model (`benchmarks/m_score.csv`); the other :data:`SPACES` are part of the result. The vectors stay at the
scale of the vocabulary: with many large steps they grow to several times the norm of a word embedding, where the edit
has no effect and a forgotten concept may be recovered. That is an attack, which the M-Score does not measure.

Reference: Zhang et al., *Forget-Me-Not*, arXiv 2303.17591.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import ModelError, RequestError
from ..files.workspace import Workspace, key_of
from ..models.images import check_images, picture_size
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import CLIPText, encode_prompts
from ..models.token_positions import end_position
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from ..request.concept import Concept, templates
from ..training.textual_inversion import PLACEHOLDER, InversionSettings, InvertedText, invert
from .drawing import patched

__all__ = ["SPACES", "MScore", "concept_latents", "m_score", "quick_inversion", "similarities"]

SPACES = ("input", "nearest", "output", "output_raw")
# one restart was enough to separate every forgotten concept from every retained one
PICTURES, DRAW_STEPS, RESTARTS = 8, 16, 1


@dataclass(frozen=True)
class MScore:
    """The M-Score of one concept.

    Attributes:
        concept: Name of the concept.
        similarities: Cosines ``(before, after)`` in each of :data:`SPACES`, means over the restarts.
        drops: ``before - after`` of each restart, in ``space``.
        pictures: Number of images.
        settings: Settings of the inversions.
        seed: Seed of the first restart.
        space: The space of ``before``, ``after`` and ``drop``.
    """

    concept: str
    similarities: Mapping[str, tuple[float, float]]
    drops: tuple[float, ...]
    pictures: int
    settings: InversionSettings
    seed: int
    space: str = "input"

    @property
    def before(self) -> float:
        """Cosine with the unedited model."""
        return self.similarities[self.space][0]

    @property
    def after(self) -> float:
        """Cosine with the patched model."""
        return self.similarities[self.space][1]

    @property
    def drop(self) -> float:
        """``before - after``: about 0 for a retained concept; larger values mean stronger erasure."""
        return self.before - self.after

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "before": self.before,
            "after": self.after,
            "drop": self.drop,
            "drops": list(self.drops),
            "space": self.space,
            "similarities": {name: {"before": b, "after": a} for name, (b, a) in self.similarities.items()},
            "pictures": self.pictures,
            "inversion": {**asdict(self.settings), "templates": list(self.settings.templates)},
            "seed": self.seed,
        }


def quick_inversion(model: LatentDiffusion, kind: str = "object") -> InversionSettings:
    """Return inversion settings that only need to find a direction: one vector, 20 steps, the templates of the kind.

    The learning rate is 0.22 times the standard deviation of the vocabulary's embeddings, so it adapts to the model's
    scale. It and the number of steps were chosen on seven concepts of the embedded world (``CHOSE`` in
    `benchmarks/m_score.py`). The paper's settings are the defaults of :class:`InversionSettings`.

    Args:
        model: The model to invert.
        kind: Kind of the concept.

    Raises:
        ModelError: If the text encoder is not the CLIP of SD1 or SD2.
        RequestError: If the kind is unknown.
    """
    deviation = float(_table(model).float().std(0).mean())
    return InversionSettings(tokens=1, steps=20, lr=0.22 * deviation, batch_size=4, templates=templates(kind))


def _clip(model: LatentDiffusion) -> CLIPText:
    if not isinstance(model.text, CLIPText):
        raise ModelError(
            "The M-Score needs textual inversion, which supports the CLIP text encoder of SD1 and SD2 only, not "
            f"{type(model.text).__name__}: leave it out for this model."
        )
    return model.text


def _table(model: LatentDiffusion) -> Tensor:
    table: Tensor = _clip(model).model.get_input_embeddings().weight.detach()
    return table


# -- images -------------------------------------------------------------------------------------------------------


def concept_latents(
    model: LatentDiffusion,
    concept: Concept,
    images: Tensor | None = None,
    count: int = PICTURES,
    seed: int = 0,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Return latents of images of a concept, either given or sampled by the unedited model.

    Args:
        model: The unedited model.
        concept: The concept.
        images: Images ``(n, 3, H, W)`` in [-1, 1]. Default: sampled by the model.
        count: Number of images to sample.
        seed: Seed of the sampled images.
        progress: Receives sampling progress.
        workspace: Caches the sampled latents.

    Returns:
        Latents ``(n, 4, h, w)``, fp32, on the CPU.

    Raises:
        RequestError: If the images have the wrong shape or size, ``count`` is below 1, or images are given and the
            model has no autoencoder.
    """
    if images is not None:
        if model.vae is None:
            raise RequestError(
                "This model has no autoencoder to encode the given images: load one, or leave the images out."
            )
        check_images(images, 1, picture_size(model), f"'{concept.name}'")
        return torch.cat([model.vae.encode(images[i : i + 16]).float().cpu() for i in range(0, len(images), 16)])
    if count < 1:
        raise RequestError(f"The M-Score of '{concept.name}' needs at least one image, not {count}.")
    prompt_templates = templates(concept.kind)
    prompts = [prompt_templates[i % len(prompt_templates)].format(concept.name) for i in range(count)]
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    read = [model.text_layer, list(model.latent_shape)]
    key = key_of("m-score", model.model_hash, prompts, seeds, DRAW_STEPS, model.guidance, read)
    shapes = {"latents": (count, *model.latent_shape)}
    if workspace is not None and (found := workspace.load("pictures", key, shapes)) is not None:
        return found["latents"]
    latents = model.sample(prompts, seeds, DRAW_STEPS, model.guidance, progress=progress, sampler="dpm++").float().cpu()
    if workspace is not None:
        workspace.save("pictures", key, {"latents": latents})
    return latents


# -- similarities -------------------------------------------------------------------------------------------------


@torch.no_grad()
def similarities(
    model: LatentDiffusion, vectors: Tensor, name: str, prompt_templates: Sequence[str] = ("{}",)
) -> dict[str, float]:
    """Return the cosine similarity of learned vectors and the concept's name in each of :data:`SPACES`.

    - ``input``: input embeddings, mean of the vectors and mean of the name's sub-words;
    - ``nearest``: input embeddings, the nearest vector of each sub-word, averaged over the sub-words;
    - ``output``: text encoder states at the end of the prompt, minus the state of the same template without a concept;
      mean over the templates;
    - ``output_raw``: like ``output``, without the subtraction.

    Args:
        model: The model whose text encoder is used.
        vectors: Learned vectors ``(n, d_token)``.
        name: The concept's name.
        prompt_templates: Templates with one ``{}`` for the output spaces.

    Raises:
        ModelError: If the text encoder is not the CLIP of SD1 or SD2.
        TokenError: If the name has no tokens or a prompt is truncated.
    """
    encoder = _clip(model)
    end_position(encoder, name)
    table = _table(model)
    own = table[encoder.phrase_ids(name)].float().cpu()
    learned = vectors.float().cpu()
    pairs = normalize(own, dim=1) @ normalize(learned, dim=1).T
    reading = InvertedText(encoder, {PLACEHOLDER: vectors})
    found = _ends(reading, [template.format(PLACEHOLDER) for template in prompt_templates])
    wanted = _ends(encoder, [template.format(name) for template in prompt_templates])
    plain = _ends(encoder, [" ".join(template.replace("{}", " ").split()) for template in prompt_templates])
    return {
        "input": _cosine(learned.mean(0), own.mean(0)),
        "nearest": float(pairs.max(1).values.mean()),
        "output": _cosine(found - plain, wanted - plain),
        "output_raw": _cosine(found, wanted),
    }


def _ends(encoder: CLIPText | InvertedText, prompts: Sequence[str]) -> Tensor:
    hidden = encode_prompts(encoder, prompts).hidden
    return torch.stack([row[end_position(encoder, p)] for row, p in zip(hidden, prompts, strict=True)]).double().cpu()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((normalize(a.double(), dim=-1) * normalize(b.double(), dim=-1)).sum(-1).mean())


# -- score --------------------------------------------------------------------------------------------------------


def m_score(
    model: LatentDiffusion,
    concept: Concept,
    latents: Tensor,
    patches: Sequence[tuple[Patch, float]] = (),
    settings: InversionSettings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    space: str = "input",
    restarts: int = RESTARTS,
) -> MScore:
    """Measure the M-Score of a concept without and with patches. The model is restored bit-exactly.

    Args:
        model: The unedited model.
        concept: The concept.
        latents: Latents ``(n, 4, h, w)`` of its images, from :func:`concept_latents`.
        patches: Patches, each with its strength. Without patches, ``before`` and ``after`` are the same.
        settings: Inversion settings. Default: :func:`quick_inversion`. They must not start from words, because the
            score would then measure the distance from the initialization.
        seed: Seed of the first restart; the others use the following seeds.
        progress: Receives inversion progress.
        workspace: Caches inversions, which also resume when interrupted; those of the unedited model serve all patches.
        space: One of :data:`SPACES`.
        restarts: Inversions per model, which are averaged.

    Raises:
        RequestError: If the settings start from words, ``space`` is unknown, or ``restarts`` is below 1; also as
            :func:`invert`.
        ModelError: If the text encoder does not support inversion (SDXL).

    Reference: Zhang et al., *Forget-Me-Not*, arXiv 2303.17591.
    """
    _clip(model)
    settings = settings or quick_inversion(model, concept.kind)
    if settings.init is not None:
        raise RequestError(
            f"An M-Score starts from random vectors, not from words: leave 'init' ('{settings.init}') out of its "
            "inversion."
        )
    if space not in SPACES:
        raise RequestError(f"The M-Score has no space '{space}': choose one of {', '.join(SPACES)}.")
    if restarts < 1:
        raise RequestError(f"An M-Score needs at least one restart, not {restarts}.")
    end_position(model.text, concept.name)
    name, sides = concept.name, 2 if patches else 1

    def inverted(variant: LatentDiffusion, side: int, restart: int) -> dict[str, float]:
        done = (side * restarts + restart) * settings.steps
        message = f"inverting images of '{name}' {('before', 'after')[side]} forgetting"

        def inner(event: ProgressEvent) -> None:
            total = sides * restarts * settings.steps
            report_progress(progress, ProgressEvent(done + event.step, total, event.loss, event.terms, message))

        vectors = invert(variant, latents, settings, seed + restart, inner, workspace=workspace)
        return similarities(model, vectors, name, settings.templates)

    before = after = [inverted(model, 0, restart) for restart in range(restarts)]
    if patches:
        edited = _edited(model, patches)
        with patched(model, patches):
            after = [inverted(edited, 1, restart) for restart in range(restarts)]
    return MScore(
        name,
        {each: (_mean(before, each), _mean(after, each)) for each in SPACES},
        tuple(b[space] - a[space] for b, a in zip(before, after, strict=True)),
        len(latents),
        settings,
        seed,
        space,
    )


def _mean(cosines: Sequence[Mapping[str, float]], space: str) -> float:
    return sum(one[space] for one in cosines) / len(cosines)


def _edited(model: LatentDiffusion, patches: Sequence[tuple[Patch, float]]) -> LatentDiffusion:
    """Shallow copy of the model with another hash, so that cached results are not taken for the unedited model's."""
    edited = copy.copy(model)
    edited.__dict__.pop("model_hash", None)
    parts = [[float(s), {key: [f.up, f.down] for key, f in patch.factors.items()}] for patch, s in patches]
    edited._known_hash = key_of("patched", model.model_hash, parts)
    return edited
