"""Text entries of a raw diffusion transformer, under one canonical name in every library.

A canonical key is the dotted path in the authors' naming, which is ComfyUI's and the checkpoints'. Only the shapes of
weights are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from ..errors import ModelError
from .families.family import EntryPath, Family, submodules
from .model_survey import Layer, ModelSurvey, is_linear, plain_linear
from .recording import RECORDED, remember
from .text_entries import POOLED, TOKENS, TextEntry
from .text_states import TextStates

__all__ = ["TransformerSurvey", "entries_alone", "survey_transformer"]


@dataclass(frozen=True)
class TransformerSurvey(ModelSurvey):
    """The layers of one diffusion transformer that read text first."""

    kind: Family = field(repr=False)

    @cached_property
    def entries(self) -> tuple[TextEntry, ...]:
        """The layers that read text first, the tokens' before the others."""
        modules = dict(self.unet.named_modules())
        found = []
        for entry in self.kind.entries:
            path = self._path(entry.original, entry.diffusers)
            if path not in modules:
                continue
            linear = plain_linear(modules[path], path)
            norm = modules.get(self.path_of_norm(entry)) if entry.norm else None
            found.append(TextEntry(entry.original, entry.stream, linear, linear.in_features, norm=norm))
        return tuple(found)

    def predict(self, x: Tensor, sigma: Tensor, states: TextStates) -> Tensor:
        """Call the transformer as its own library does.

        Args:
            x: Noisy latents, ``(n, c, h, w)``.
            sigma: Share of noise in them, ``(n,)``.
            states: Text states of ``n`` prompts.

        Returns:
            The velocity, like ``x``.

        Raises:
            ModelError: If the text states lack what the model reads, or this family is not called from here.
        """
        if self.kind.predict is None or self.layout != "diffusers":
            raise ModelError(
                f"Drawing with a {self.kind.title} model is not implemented here: only a closed form ('uce') works on "
                "it."
            )
        if self.width(POOLED) is not None and states.pooled is None:
            raise ModelError(
                f"A {self.kind.title} model also reads a vector of the whole prompt, and the text encoder gives none."
            )
        found: Tensor = self.kind.predict(self.unet, x, sigma, states)
        return found

    def path_of_norm(self, entry: EntryPath) -> str:
        """The path of the norm before an entry in this model's naming; empty where there is none."""
        return self._path(entry.norm, entry.norm_diffusers)

    def _path(self, original: str, diffusers: str) -> str:
        return diffusers if self.layout == "diffusers" else original

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """The text entries, and the layers of the blocks that trained methods change, by canonical key."""
        paths = {entry.original: self._path(entry.original, entry.diffusers) for entry in self.kind.entries}
        found = [Layer(one.key, one.key, paths[one.key], one.module) for one in self.entries]
        return {layer.key: layer for layer in [*found, *self._of_blocks()]}

    def _of_blocks(self) -> Iterator[Layer]:
        known = {entry.key for entry in self.entries}
        named = self.kind.key_of if self.layout == "diffusers" else self.kind.original_name
        for path, module in self.unet.named_modules():
            # one that is quantised cannot be trained, and is no reason to refuse a closed form
            if (key := named(path)) is not None and key not in known and is_linear(module):
                yield Layer(key, key, path, plain_linear(module, path))

    def trained_keys(self, projections: Sequence[str]) -> list[str]:
        """Keys of the layers that trained methods change, whatever the projections.

        They are the layer that reads the tokens, and those of the blocks; none if these are not known.
        """
        entries = {entry.key: entry.stream for entry in self.entries}
        blocks = [key for key in self.layers if key not in entries]
        return [key for key, stream in entries.items() if stream == TOKENS] + blocks if blocks else []

    def find(self, key: str) -> Layer | None:
        """Return the layer with a canonical key, or ``None`` if this model lacks it."""
        return self.layers.get(key)

    @property
    def caution(self) -> str:
        return self.kind.caution

    def fingerprint(self) -> str:
        """Hash of the architecture: the family, and shapes of the text entries. Equal in both layouts."""
        lines = [self.family, *(f"{one.key}:{tuple(one.module.weight.shape)}" for one in self.entries)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def survey_transformer(model: nn.Module, family: Family, layout: str) -> TransformerSurvey:
    """Find the text entries of a raw diffusion transformer.

    Args:
        model: The transformer itself, not a host's wrapper or a pipeline. The meta device works too.
        family: Its family.
        layout: Its naming, ``original`` or ``diffusers``.

    Raises:
        ModelError: If the layer that reads the tokens is missing, or is not a plain linear layer.
    """
    first = family.entries[0]
    path = first.diffusers if layout == "diffusers" else first.original
    if path not in dict(model.named_modules()):
        raise ModelError(f"This {family.title} model has no layer '{path}', through which it would read the text.")
    width = plain_linear(model.get_submodule(path), path).in_features
    return TransformerSurvey(model, (), layout, family.id, width, family)


def entries_alone(found: TransformerSurvey, weight: Callable[[str], Tensor]) -> nn.Module:
    """A module of the same family with nothing in it but the layers that read text, and what stands before them.

    For a host that keeps a model's weights in a format of its own, or not in memory: a closed form reads no others.

    Args:
        found: The survey of the whole model.
        weight: Returns the weight of the layer at a path of the whole model, ``(d_out, d_in)``.

    Raises:
        ModelError: A weight has another shape than its layer, because it is quantised in an unknown format.
    """
    alone = nn.Module()
    modules = dict(found.unet.named_modules())
    norms = {found.path_of_norm(entry) for entry in found.kind.entries} & (set(modules) - {""})
    for path in sorted(submodules(found.unet) | norms | {layer.path for layer in found.layers.values()}):
        place, names = alone, path.split(".")
        for name in names:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
    for path in norms:
        _put(alone, path, modules[path])
    for entry in found.entries:
        layer = found.layers[entry.key]
        value = weight(layer.path)
        wanted = (layer.module.out_features, layer.module.in_features)
        if tuple(value.shape) != wanted or not value.is_floating_point():
            raise ModelError(
                f"The layer '{layer.path}', which reads the text, is quantised in a format that cannot be read here: "
                "load the model unquantised, or as fp8."
            )
        linear = nn.Linear(wanted[1], wanted[0], bias=False, device="meta")
        linear.weight = nn.Parameter(value, requires_grad=False)
        _put(alone, layer.path, linear)
    if found.family == RECORDED:
        remember(alone, found.kind)
    return alone


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
