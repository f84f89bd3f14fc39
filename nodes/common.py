"""What several nodes share: the wires between them, the boxes that make a request, and the way through the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..core.errors import RequestError
from ..core.files.workspace import Workspace
from ..core.methods.base import Inputs
from ..core.methods.registry import all_methods, plan_request
from ..core.methods.selective_amnesia import SelectiveAmnesia, asked_fisher
from ..core.models.images import fit_images, picture_size
from ..core.models.latent_diffusion import LatentDiffusion
from ..core.progress import Progress
from ..core.request.concept import KINDS, canonical_phrase, templates
from ..core.request.parsing import parse_request
from ..core.request.plan import Plan
from ..core.request.request import MAX_SEED, MAX_STRENGTH, ForgetRequest
from ..core.service.forms import MethodSettings, with_settings
from ..core.training.fisher import fisher_key
from . import host

__all__ = [
    "CATEGORY",
    "LORA",
    "ForgetFisher",
    "ForgetImages",
    "ForgetSettings",
    "Measured",
    "Pictures",
    "RequestInputs",
    "asked_inputs",
    "at_work",
    "model_inputs",
    "more_inputs",
    "patch_outputs",
    "schema",
]

CATEGORY = "model_patches/unlearning"
LORA = io.Custom("LORA_MODEL")
ForgetSettings = io.Custom("FORGET_SETTINGS")
ForgetImages = io.Custom("FORGET_IMAGES")
ForgetFisher = io.Custom("FORGET_FISHER")

# a person's pictures of concepts: the concept's name (empty: the only one there is), pictures (n, 3, H, W) in [-1, 1]
Pictures = tuple[tuple[str, Tensor], ...]


@dataclass(frozen=True)
class Measured:
    """Fisher information in a work folder: its file's key and the settings it was measured for."""

    workspace: Workspace
    key: str
    settings: MethodSettings


def schema(*, search_aliases: Sequence[str] = (), **known: Any) -> io.Schema:
    """A node's schema. ``search_aliases`` are left out where the host does not know them: it would drop the pack."""
    for output in known.get("outputs", ()):
        # else older hosts write its type
        output.display_name = output.display_name or output.id
    extra: dict[str, Any] = {}
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        extra["search_aliases"] = list(search_aliases)
    return io.Schema(category=CATEGORY, **known, **extra)


def model_inputs() -> list[Any]:
    """The model that shall forget, and what reads its prompts."""
    return [
        io.Model.Input("model", tooltip="The model that shall forget: a UNet that reads text by cross-attention."),
        io.Clip.Input("clip", tooltip="The text encoder your prompts go through, after any CLIP Set Last Layer."),
    ]


def asked_inputs() -> list[Any]:
    """The boxes of a request. A saved workflow knows them by their order: new ones come behind all others."""
    methods = all_methods()
    presets = list(dict.fromkeys(name for method in methods.values() for name in method.presets))
    return [
        *model_inputs(),
        io.String.Input(
            "concept",
            multiline=True,
            placeholder="star\nneon (style) -> sketch",
            default="",
            dynamic_prompts=False,
            tooltip="What to forget, in the words a prompt would use. Several: one a line, or separated by commas. One "
            "may say its own kind and replacement: neon (style) -> sketch.",
        ),
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default=KINDS[0],
            tooltip="What the concepts are that do not say it themselves; it chooses the prompts they are read in.",
        ),
        io.String.Input(
            "replacement",
            default="",
            dynamic_prompts=False,
            tooltip="What to show instead, where a concept does not say it. Empty: nothing in particular. One for all, "
            "or one for each.",
        ),
        io.String.Input(
            "preserve",
            multiline=True,
            placeholder="things to keep",
            default="",
            dynamic_prompts=False,
            tooltip="Words that must go on working, such as neighbours of the concept: one a line, or by commas.",
        ),
        io.Combo.Input(
            "method",
            options=list(methods),
            default="uce" if "uce" in methods else next(iter(methods)),
            tooltip="\n".join(f"{name}: {method.title}" for name, method in methods.items())
            + "\nA settings node that is connected says it instead.",
        ),
        io.Combo.Input(
            "preset",
            options=presets,
            default="tuned" if "tuned" in presets else presets[0],
            tooltip="published: the authors' settings. tuned: those that did best on the embedded model. "
            "A settings node that is connected says it instead.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.05,
            max=MAX_STRENGTH,
            step=0.05,
            tooltip="Scales the edit: 1 is as the method works it out, less forgets less.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=False,
            tooltip="For methods that draw noise. The same inputs give the same patch; leave it fixed.",
        ),
    ]


def more_inputs() -> list[Any]:
    """What a request may have besides: all of it optional."""
    return [
        io.String.Input(
            "settings",
            optional=True,
            default="",
            dynamic_prompts=False,
            tooltip='Single settings of the method in place of the others, as JSON: {"rank": 8}. Mostly empty: a '
            "settings node is easier.",
        ),
        io.Int.Input(
            "preview_every",
            optional=True,
            default=10,
            min=0,
            max=100000,
            tooltip="Training steps from one preview picture of the concept to the next; 0: none. Without the VAE the "
            "picture is rough. The closed form has no steps.",
        ),
        ForgetSettings.Input(
            "method_settings",
            optional=True,
            tooltip="From a settings node: the method, its preset and its settings, in place of the boxes here.",
        ),
        ForgetImages.Input(
            "images", optional=True, tooltip="From Reference Images: your pictures, for methods that look at some."
        ),
        io.Vae.Input(
            "vae", optional=True, tooltip="The checkpoint's VAE: for reference images, and for clear previews."
        ),
        ForgetFisher.Input(
            "fisher",
            optional=True,
            tooltip="From Fisher Information: for Selective Amnesia, which then does not measure.",
        ),
    ]


def patch_outputs(what: str = "The patch itself") -> list[Any]:
    """The patched model, the patch, and words."""
    return [
        io.Model.Output("MODEL", tooltip="The model with the patch on."),
        LORA.Output("LORA_MODEL", tooltip=f"{what}: for Save Forget Patch, or the stock LoRA nodes."),
        io.String.Output("REPORT", tooltip="What was done, in words."),
    ]


@dataclass(frozen=True)
class RequestInputs:
    """A request as a node's boxes and wires have it."""

    plan: Plan
    notes: tuple[str, ...]
    settings: MethodSettings | None
    images: Pictures
    fisher: Measured | None
    preview_every: int
    vae: Any

    @property
    def request(self) -> ForgetRequest:
        return self.plan.request

    @classmethod
    def read(
        cls,
        concept: str,
        kind: str,
        replacement: str,
        preserve: str,
        method: str,
        preset: str,
        strength: float,
        seed: int,
        settings: str = "",
        preview_every: int = 10,
        method_settings: MethodSettings | None = None,
        images: Pictures | None = None,
        vae: Any = None,
        fisher: Measured | None = None,
    ) -> RequestInputs:
        """Everything that can be refused before a model is loaded is refused here, in words."""
        request = parse_request(concept, kind, replacement, preserve, method, preset, strength, seed, settings)
        notes = []
        if method_settings is not None:
            request = with_settings(request, method_settings)
            if (method, preset) != (request.method, request.preset):
                notes.append("method and preset are those of the settings node that is connected.")
        return cls.of(request, notes, method_settings, preview_every, images, vae, fisher)

    @classmethod
    def of(
        cls,
        request: ForgetRequest,
        notes: Sequence[str] = (),
        settings: MethodSettings | None = None,
        preview_every: int = 10,
        images: Pictures | None = None,
        vae: Any = None,
        fisher: Measured | None = None,
    ) -> RequestInputs:
        """A request with what is wired to a node beside it; refused in words as by :meth:`read`."""
        plan = plan_request(request)
        if images and vae is None:
            raise RequestError("Reference images are read through the VAE: connect the checkpoint's VAE too.")
        if fisher is not None and request.method != SelectiveAmnesia.id:
            raise RequestError(
                f"Fisher information is for Selective Amnesia ('{SelectiveAmnesia.id}'), and the method is "
                f"'{request.method}': disconnect it, or choose that method."
            )
        return cls(plan, tuple(notes), settings, tuple(images or ()), fisher, preview_every, vae)

    def inputs(self, diffusion: LatentDiffusion) -> Inputs:
        """The pictures at the model's size, and the work folder of what was measured for it."""
        if self.fisher is not None:
            self._check_measured(self.fisher, diffusion)
        return Inputs(
            images=self._images(picture_size(diffusion)),
            workspace=None if self.fisher is None else self.fisher.workspace,
        )

    def _images(self, size: tuple[int, int]) -> dict[str, Tensor]:
        from torch import cat

        names = {canonical_phrase(concept.name): concept.name for concept in self.request.concepts}
        found: dict[str, list[Tensor]] = {}
        for name, pictures in self.images:
            if not name and len(names) > 1:
                raise RequestError(
                    f"There are {len(names)} concepts, and reference images that do not say whose they are: name the "
                    "concept in Reference Images."
                )
            # a name that is none of the concepts is refused by the core, in words
            whose = names.get(canonical_phrase(name), name) if name else next(iter(names.values()))
            found.setdefault(whose, []).append(fit_images(pictures, size, f"'{whose}'"))
        return {name: cat(pictures) for name, pictures in found.items()}

    def _check_measured(self, fisher: Measured, diffusion: LatentDiffusion) -> None:
        settings = self.plan.settings
        prompts, asked = asked_fisher(settings)
        if fisher_key(diffusion, SelectiveAmnesia().keys(diffusion, settings), prompts, asked) != fisher.key:
            raise RequestError(
                "The Fisher information that came in was measured on another model or under other settings than the "
                "ones asked for: connect the same MODEL and the same settings to both nodes."
            )


@contextmanager
def at_work(
    node: str | None, model: Any, clip: Any, asked: RequestInputs
) -> Iterator[tuple[LatentDiffusion, Progress, Inputs]]:
    """The host's model, a progress callback, and the request's inputs besides its text."""
    with host.latent_diffusion(model, clip, asked.vae) as diffusion:
        concept, request = asked.request.concepts[0], asked.request
        prompt = templates(concept.kind)[0].format(concept.name)
        fading = host.Fading(diffusion, model, prompt, request.seed, asked.preview_every)
        yield diffusion, host.progress(node, fading), asked.inputs(diffusion)
