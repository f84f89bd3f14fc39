"""The M-Score: does an inversion of the concept's pictures still find the concept's own words?

Zhang et al., *Forget-Me-Not* (arXiv 2303.17591): textual inversion looks for the vectors that make a model draw what
some pictures show. In a model that knows the concept they come out near the embedding of its name; in one that has
forgotten it they do not. The score is the cosine of the two, with the unedited model and with the edited one, and what
is read off is the drop between them. Both inversions start from the same random vectors, never from the name, and see
the same pictures, times and noise.

The paper leaves open in which space the cosine is taken. Here it is the input embeddings', between the mean of the
inverted vectors and the mean of the name's sub-words, which told forgotten concepts from kept ones best on the embedded
model (`benchmarks/m_score.csv`); the others of :data:`SPACES` come along in the result. And the vectors stay at the
vocabulary's own scale: with many large steps they grow to several times a word's length, where an edit that was made
for the words no longer reaches, and forgotten concepts may be found again (an attack, and no measure of this).
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
# one restart was enough to tell every forgotten concept from every kept one
PICTURES, DRAW_STEPS, RESTARTS = 8, 16, 1


@dataclass(frozen=True)
class MScore:
    """The M-Score of one concept: ``before`` with the unedited model, ``after`` with the patches on; cosines.

    ``similarities`` are both in every one of :data:`SPACES`, ``space`` is the one that ``before`` and ``after`` are of.
    All are means over restarts, each from random vectors of its own; ``drops`` are the drops of each. ``pictures`` is
    how many there were, ``settings`` and ``seed`` (the first restart's) are the inversions'.
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
        return self.similarities[self.space][0]

    @property
    def after(self) -> float:
        return self.similarities[self.space][1]

    @property
    def drop(self) -> float:
        """``before − after``: about 0 for a concept that is kept, and the higher, the less of it is left."""
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
    """The settings of an inversion that only has to find a direction: one vector, 20 steps, the kind's own templates.

    A step is 0.22 of the spread of the vocabulary's embeddings, whatever a model's scale is; it and the number of steps
    were chosen on seven concepts of the embedded world (``CHOSE`` in `benchmarks/m_score.py`). The paper's own settings
    are :class:`InversionSettings`' defaults. Raises :class:`ModelError` for another text encoder than a
    CLIP of SD1 or SD2, and :class:`RequestError` for an unknown kind.
    """
    spread = float(_table(model).float().std(0).mean())
    return InversionSettings(tokens=1, steps=20, lr=0.22 * spread, batch_size=4, templates=templates(kind))


def _clip(model: LatentDiffusion) -> CLIPText:
    if not isinstance(model.text, CLIPText):
        raise ModelError(
            "The M-Score needs textual inversion, which works with SD1's and SD2's CLIP text encoder only, not with "
            f"{type(model.text).__name__}: leave it out for this model."
        )
    return model.text


def _table(model: LatentDiffusion) -> Tensor:
    table: Tensor = _clip(model).model.get_input_embeddings().weight.detach()
    return table


# -- the pictures -------------------------------------------------------------------------------------------------


def concept_latents(
    model: LatentDiffusion,
    concept: Concept,
    images: Tensor | None = None,
    count: int = PICTURES,
    seed: int = 0,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Latents ``(n, 4, h, w)`` of pictures of a concept: of ``images``, or of ``count`` that the model draws itself.

    ``images`` are ``(n, 3, H, W)`` in [-1, 1]. The model must be the unedited one; what it draws is kept in the
    ``workspace``. Raises :class:`RequestError` for pictures that do not fit, for none, and where the model has no
    autoencoder to read them with.
    """
    if images is not None:
        if model.vae is None:
            raise RequestError("Pictures were given, and this model has no autoencoder here to read them with.")
        check_images(images, 1, picture_size(model), f"'{concept.name}'")
        return torch.cat([model.vae.encode(images[i : i + 16]).float().cpu() for i in range(0, len(images), 16)])
    if count < 1:
        raise RequestError(f"The M-Score of '{concept.name}' needs at least one picture, not {count}.")
    prompt_templates = templates(concept.kind)
    prompts = [prompt_templates[i % len(prompt_templates)].format(concept.name) for i in range(count)]
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    read = [model.text_layer, list(model.latent_shape)]
    key = key_of("m-score", model.model_hash, prompts, seeds, DRAW_STEPS, model.guidance, read)
    if workspace is not None and (found := workspace.load("pictures", key)) is not None:
        return found["latents"]
    latents = model.sample(prompts, seeds, DRAW_STEPS, model.guidance, progress=progress, sampler="dpm++").float().cpu()
    if workspace is not None:
        workspace.save("pictures", key, {"latents": latents})
    return latents


# -- the cosines --------------------------------------------------------------------------------------------------


@torch.no_grad()
def similarities(
    model: LatentDiffusion, vectors: Tensor, name: str, prompt_templates: Sequence[str] = ("{}",)
) -> dict[str, float]:
    """Cosines between inverted ``vectors`` ``(n, d_token)`` and the concept's own words, for each of :data:`SPACES`.

    - ``input``: of the mean vector and the mean of the name's sub-words, as input embeddings;
    - ``nearest``: for each sub-word of the name the nearest vector, the mean over the sub-words;
    - ``output``: of the text encoder's states at the end of the prompt, each less the state of the same template
      without any concept; the mean over the templates in ``prompt_templates``;
    - ``output_raw``: the same without taking that off.

    Raises :class:`ModelError` for another text encoder than a CLIP of SD1 or SD2, and
    :class:`TokenError` where the name has no tokens or a prompt is cut off.
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


# -- the score ----------------------------------------------------------------------------------------------------


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
    """Invert ``latents`` ``(n, 4, h, w)`` of the concept (:func:`concept_latents`) without and with ``patches``.

    ``settings`` default to :func:`quick_inversion`; ``restarts`` inversions of each, with the seeds from ``seed`` on,
    are averaged. The model comes back bit for bit as it was. In a ``workspace`` each inversion is kept, and one that
    was cut short goes on; those of the unedited model serve every patch. Without patches both are the same. Raises
    :class:`RequestError` for settings that start from words (the score would measure how far an inversion moves away
    from what it was told), for an unknown ``space``, for no restart, and as :func:`invert`
    (:class:`ModelError` for SDXL, whose text cannot be inverted here).
    """
    _clip(model)
    settings = settings or quick_inversion(model, concept.kind)
    if settings.init is not None:
        raise RequestError(
            f"An M-Score starts from random vectors, not from words: leave 'init' ('{settings.init}') out of its "
            "inversion."
        )
    if space not in SPACES:
        raise RequestError(f"The M-Score knows no space '{space}': choose one of {', '.join(SPACES)}.")
    if restarts < 1:
        raise RequestError(f"An M-Score needs at least one restart, not {restarts}.")
    end_position(model.text, concept.name)
    name, sides = concept.name, 2 if patches else 1

    def inverted(variant: LatentDiffusion, side: int, restart: int) -> dict[str, float]:
        done = (side * restarts + restart) * settings.steps
        message = f"inverting pictures of '{name}' {('before', 'after')[side]} forgetting"

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
    """The same model, its modules shared, under another hash: what is kept for it is not the unedited model's."""
    edited = copy.copy(model)
    edited.__dict__.pop("model_hash", None)
    parts = [[float(s), {key: [f.up, f.down] for key, f in patch.factors.items()}] for patch, s in patches]
    edited._known_hash = key_of("patched", model.model_hash, parts)
    return edited
