"""What several nodes share: socket types, the inputs of a request, and the context that a fit runs in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..core.errors import ForgetConceptError, RequestError
from ..core.files.workspace import Workspace
from ..core.methods.base import Inputs
from ..core.methods.registry import all_methods, plan_request
from ..core.methods.selective_amnesia import SelectiveAmnesia, fisher_measurement
from ..core.models.images import fit_images, picture_size
from ..core.models.latent_diffusion import LatentDiffusion
from ..core.progress import Progress
from ..core.request.concept import KINDS, canonical_phrase, templates
from ..core.request.parsing import parse_request
from ..core.request.plan import Plan
from ..core.request.request import MAX_SEED, MAX_STRENGTH, ForgetRequest
from ..core.request.themes import themes
from ..core.service.forms import (
    FormField,
    MethodSettings,
    main_fields,
    main_presets,
    presets,
    settings_of,
    with_settings,
)
from ..core.training.fisher import fisher_key
from . import host

__all__ = [
    "CATEGORY",
    "LORA",
    "FisherFile",
    "ForgetFisher",
    "ForgetImages",
    "ForgetSettings",
    "Node",
    "NodeError",
    "Pictures",
    "RequestInputs",
    "adjust_inputs",
    "field_input",
    "fit_context",
    "model_inputs",
    "optional_request_inputs",
    "patch_outputs",
    "reported",
    "required_request_inputs",
    "schema",
    "theme_input",
]

AS_PRESET = "as preset"
CATEGORY = "model_patches/unlearning"
LORA = io.Custom("LORA_MODEL")
ForgetSettings = io.Custom("FORGET_SETTINGS")
ForgetImages = io.Custom("FORGET_IMAGES")
ForgetFisher = io.Custom("FORGET_FISHER")

NO_THEME = "none"

# reference images: pairs of a concept's name (empty: the request's only concept) and pictures (n, 3, H, W) in [-1, 1]
Pictures = tuple[tuple[str, Tensor], ...]


class NodeError(Exception):
    """An error in a node, as the person reads it.

    The page shows ``<type>: <message>``, and names the type by its module and qualified name. Those of a core error are
    a path in the pack's folder, which would stand in front of the sentence. A built-in type is shown without a module.
    """

    __module__ = "builtins"
    __qualname__ = "Forget Concept"


class Node(io.ComfyNode):
    """Base class of the nodes: errors of the core become a :class:`NodeError` with the same sentence."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        execute = vars(cls).get("execute")
        # the host clones node classes, and a clone's method is wrapped already
        if execute is not None and not hasattr(execute.__func__, "__wrapped__"):
            cls.execute = classmethod(_readable(execute.__func__))


def _readable(execute: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute)
    def wrapped(cls: type[Node], *args: Any, **given: Any) -> Any:
        try:
            return execute(cls, *args, **given)
        except ForgetConceptError as error:
            raise NodeError(str(error)) from error

    return wrapped


def reported(node: str | None, text: str, *outputs: Any, ui: Mapping[str, Any] | None = None) -> io.NodeOutput:
    """A node's outputs, with a text that the page shows on the node after the run; ``ui`` is shown too."""
    host.show_text(node, text)
    return io.NodeOutput(*outputs, ui={**(ui or {}), "forget_concept_report": [text]})


@dataclass(frozen=True)
class FisherFile:
    """Fisher information in a work folder: the key of its file, and the settings it was measured with."""

    workspace: Workspace
    key: str
    settings: MethodSettings


def schema(*, search_aliases: Sequence[str] = (), **known: Any) -> io.Schema:
    """A node's schema, without ``search_aliases`` on hosts that do not know them and would reject the whole pack."""
    for output in known.get("outputs", ()):
        # older hosts otherwise show the type
        output.display_name = output.display_name or output.id
    extra: dict[str, Any] = {}
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        extra["search_aliases"] = list(search_aliases)
    return io.Schema(category=CATEGORY, **known, **extra)


def model_inputs() -> list[Any]:
    """The inputs for the model and its text encoder."""
    return [
        io.Model.Input(
            "model", tooltip="The model to edit. A diffusion transformer, such as Flux, takes the method uce alone."
        ),
        io.Clip.Input("clip", tooltip="The text encoder of your prompts, after any CLIP Set Last Layer."),
    ]


def required_request_inputs() -> list[Any]:
    """The required inputs of a request. Saved workflows identify widgets by order: append new ones at the end."""
    methods = all_methods()
    every_preset = list(dict.fromkeys(name for method in methods.values() for name in method.presets))
    chosen = io.Combo.Input(
        "method",
        options=list(methods),
        default="uce" if "uce" in methods else next(iter(methods)),
        tooltip="\n".join(f"{name}: {method.title}" for name, method in methods.items())
        + "\nA connected settings node overrides it.",
    )
    # for the page, which offers the presets of the chosen method only; not every host takes this in the constructor
    chosen.extra_dict["forget_concept_methods"] = {name: main_presets(method) for name, method in methods.items()}
    return [
        *model_inputs(),
        io.String.Input(
            "concept",
            multiline=True,
            placeholder="star\nneon (style) -> sketch",
            default="",
            dynamic_prompts=False,
            tooltip="The concepts to forget, in the words a prompt would use: one per line, or separated by commas. "
            "Each may state its own kind and replacement: neon (style) -> sketch.",
        ),
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default=KINDS[0],
            tooltip="Kind of the concepts that do not state their own; it selects the prompt templates.",
        ),
        io.String.Input(
            "replacement",
            default="",
            dynamic_prompts=False,
            tooltip="Replacement for concepts that do not state their own: one for all, or one for each. Empty: no "
            "particular replacement.",
        ),
        io.String.Input(
            "preserve",
            multiline=True,
            placeholder="things to keep",
            default="",
            dynamic_prompts=False,
            tooltip="The retain set: concepts that must not change, such as neighbours of the forgotten one. One per "
            "line, or separated by commas.",
        ),
        chosen,
        io.Combo.Input(
            "preset",
            options=every_preset,
            default="tuned" if "tuned" in every_preset else every_preset[0],
            tooltip="published: the authors' settings. tuned: the settings that performed best on the embedded model. "
            "A connected settings node overrides it.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.05,
            max=MAX_STRENGTH,
            step=0.05,
            tooltip="Scales the edit. 1: as the method computes it; lower values forget less.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=False,
            tooltip="Random seed of methods that sample noise. The same inputs give the same patch: keep it fixed.",
        ),
    ]


def optional_request_inputs() -> list[Any]:
    """The optional inputs of a request."""
    rare = [
        io.String.Input(
            "settings",
            optional=True,
            default="",
            dynamic_prompts=False,
            tooltip='Overrides of single settings of the method, as JSON: {"rank": 8}. Usually empty: a settings node '
            "is easier.",
        ),
        io.Int.Input(
            "preview_every",
            optional=True,
            default=10,
            min=0,
            max=100000,
            tooltip="Training steps between preview pictures of the concept. 0: no previews. Previews are coarse "
            "without a VAE. Closed-form methods have no steps.",
        ),
    ]
    for one in rare:  # not every host takes this in the constructor
        one.extra_dict["advanced"] = True
    return [
        *rare,
        ForgetSettings.Input(
            "method_settings",
            optional=True,
            tooltip="From a settings node: overrides method, preset and settings of this node.",
        ),
        ForgetImages.Input(
            "images",
            optional=True,
            tooltip="From Reference Images for Concept: your pictures, for methods that use them.",
        ),
        io.Vae.Input(
            "vae", optional=True, tooltip="The checkpoint's VAE: required for reference images; makes previews sharp."
        ),
        ForgetFisher.Input(
            "fisher",
            optional=True,
            tooltip="From Fisher Information: saves Selective Amnesia the measurement.",
        ),
    ]


def theme_input() -> Any:
    """The choice of a theme; the last input of a node, because saved workflows identify widgets by order."""
    return io.Combo.Input(
        "theme",
        optional=True,
        options=[NO_THEME, *themes(host.theme_folders())],
        default=NO_THEME,
        tooltip="Forgets every concept of a list too, such as weapons. The concept above may then be empty, and a "
        "single replacement is for the whole list. To make your own list, copy one from core/request/theme_lists to "
        "user/__forget_concept/themes.",
    )


def patch_outputs(what: str = "The patch") -> list[Any]:
    """The outputs patched model, patch and report; ``what`` begins the patch's tooltip."""
    return [
        io.Model.Output("MODEL", tooltip="The patched model."),
        LORA.Output("LORA_MODEL", tooltip=f"{what}, for Save Forget Patch or the stock LoRA nodes."),
        io.String.Output("REPORT", tooltip="A summary of what was done."),
    ]


def field_input(field: FormField, optional: bool = False) -> Any:
    """The input of a form's field.

    Args:
        field: The field.
        optional: Whether a graph may lack it, which an older version saved.
    """
    info = field.info
    common = {"default": field.default, "tooltip": field.help, "optional": optional}
    if field.kind == "switch":
        return io.Boolean.Input(field.name, **common)
    if field.kind == "choice":
        return io.Combo.Input(field.name, options=list(field.options), **common)
    if field.kind == "whole":
        return io.Int.Input(field.name, min=int(info.low), max=int(info.high), **common)
    if field.kind == "number":
        return io.Float.Input(field.name, min=info.low, max=info.high, step=info.step, **common)
    return io.String.Input(field.name, multiline=field.kind == "lines", dynamic_prompts=False, **common)


def adjust_inputs() -> list[Any]:
    """The input whose choice shows the main settings of a method; none on hosts without such inputs.

    It is the last input of a node: saved workflows identify widgets by order.
    """
    if not hasattr(io, "DynamicCombo"):
        return []
    options = [io.DynamicCombo.Option(AS_PRESET, [])]
    options += [
        io.DynamicCombo.Option(name, [field_input(field) for field in main_fields(method)])
        for name, method in all_methods().items()
    ]
    return [
        io.DynamicCombo.Input(
            "adjust",
            options=options,
            optional=True,
            tooltip=f"{AS_PRESET}: the settings of the preset. The name of the method: its main settings as fields, "
            "which the preset fills in. A settings node has all of them.",
        )
    ]


@dataclass(frozen=True)
class RequestInputs:
    """A validated request and everything else that a node's inputs provide for it."""

    plan: Plan
    notes: tuple[str, ...]
    settings: MethodSettings | None
    images: Pictures
    fisher: FisherFile | None
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
        fisher: FisherFile | None = None,
        adjust: Mapping[str, Any] | None = None,
        theme: str = NO_THEME,
    ) -> RequestInputs:
        """Read a node's inputs, and reject everything that can be rejected before a model is loaded.

        Raises:
            ForgetConceptError: If an input is invalid; the message names it.
        """
        theme = "" if theme == NO_THEME else theme
        request = parse_request(concept, kind, replacement, preserve, method, preset, strength, seed, settings, theme)
        notes = []
        if fields := _adjusted(adjust, method, preset):
            if method_settings is None:
                request = with_settings(request, fields)
            else:
                notes.append("the fields of 'adjust' are ignored: a settings node is connected.")
        if method_settings is not None:
            request = with_settings(request, method_settings)
            if (method, preset) != (request.method, request.preset):
                notes.append("method and preset are those of the connected settings node.")
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
        fisher: FisherFile | None = None,
    ) -> RequestInputs:
        """As :meth:`read`, for a request that is parsed already."""
        plan = plan_request(request, host.theme_folders())
        if images and vae is None:
            raise RequestError("The input 'vae' is empty, but reference images need it: connect the checkpoint's VAE.")
        if fisher is not None and request.method != SelectiveAmnesia.id:
            raise RequestError(
                f"Fisher information is for Selective Amnesia ('{SelectiveAmnesia.id}'), but the method is "
                f"'{request.method}': disconnect the input 'fisher', or choose that method."
            )
        return cls(plan, tuple(notes), settings, tuple(images or ()), fisher, preview_every, vae)

    def inputs(self, diffusion: LatentDiffusion) -> Inputs:
        """Inputs of the fit besides the request: reference images at the model's size, and the work folder.

        Raises:
            RequestError: If the Fisher information belongs to another model or other settings, or it is unclear which
                concept the reference images show.
        """
        if self.fisher is not None:
            self._check_fisher(self.fisher, diffusion)
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
                    f"There are {len(names)} concepts, but some reference images do not name theirs: name the concept "
                    "in Reference Images for Concept."
                )
            # the core rejects a name that is not one of the concepts
            whose = names.get(canonical_phrase(name), name) if name else next(iter(names.values()))
            found.setdefault(whose, []).append(fit_images(pictures, size, f"'{whose}'"))
        return {name: cat(pictures) for name, pictures in found.items()}

    def _check_fisher(self, fisher: FisherFile, diffusion: LatentDiffusion) -> None:
        settings = self.plan.settings
        prompts, measurement = fisher_measurement(settings)
        if fisher_key(diffusion, SelectiveAmnesia().keys(diffusion, settings), prompts, measurement) != fisher.key:
            raise RequestError(
                "The Fisher information was measured on another model or with other settings: connect the same MODEL "
                "and the same settings to both nodes."
            )


def _adjusted(adjust: Mapping[str, Any] | None, method: str, preset: str) -> MethodSettings | None:
    """The settings of the fields below ``adjust``; ``None`` if it leaves the preset as it is."""
    if not adjust or adjust["adjust"] == AS_PRESET:
        return None
    if adjust["adjust"] != method:
        raise RequestError(
            f"The input 'adjust' has the settings of '{adjust['adjust']}', but the method is '{method}': choose the "
            f"same method in both, or '{AS_PRESET}'."
        )
    known = all_methods()[method]
    values = {name: value for name, value in adjust.items() if name != "adjust"}
    return settings_of(known, preset, {**presets(known).get(preset, {}), **values})


@contextmanager
def fit_context(
    node: str | None, model: Any, clip: Any, request_inputs: RequestInputs
) -> Iterator[tuple[LatentDiffusion, Progress, Inputs]]:
    """Load the host's model for a fit; yields it with a progress callback for ``node`` and the fit's inputs."""
    with host.latent_diffusion(model, clip, request_inputs.vae) as diffusion:
        request = request_inputs.request
        concept = request.concepts[0]
        prompt = templates(concept.kind)[0].format(concept.name)
        preview = host.ConceptPreview(diffusion, model, prompt, request.seed, request_inputs.preview_every)
        yield diffusion, host.progress(node, preview), request_inputs.inputs(diffusion)
