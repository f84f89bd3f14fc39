"""What an adapter file holds, whether or not a patch can express it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import UnsupportedAdapterError
from ..models.model_survey import ModelSurvey
from ..patch.metadata import PatchMetadata
from . import kohya, naming

__all__ = ["Contents", "contents_of", "dtype_name"]


@dataclass(frozen=True)
class Contents:
    """The layers of an adapter's state dict, counted.

    Args:
        kinds: Number of layers by kind of adapter, such as ``{"LoKr": 12}``, most first.
        places: Number of layers by place in the model.
        ranks: The different ranks, ascending; a full matrix has none.
        dtype: Dtype of the tensors, several joined by ``", "``.
        unknown: Names of tensors that belong to no known kind.
        why_not: Why it cannot be applied as a patch; ``None`` where it can.
    """

    kinds: Mapping[str, int]
    places: Mapping[str, int]
    ranks: tuple[int, ...]
    dtype: str
    unknown: tuple[str, ...]
    why_not: str | None

    @property
    def layers(self) -> int:
        """Number of layers that it changes."""
        return sum(self.kinds.values())


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """The dtypes of a state dict without its alphas, such as ``float16``."""
    names = {str(t.dtype).removeprefix("torch.") for n, t in tensors.items() if not n.endswith(".alpha")}
    return ", ".join(sorted(names))


def contents_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    survey: ModelSurvey | None = None,
    source: str = "the patch",
) -> Contents:
    """Count the layers of an adapter's state dict, in any naming.

    Args:
        tensors: The state dict.
        metadata: Metadata of its file.
        survey: Survey of the base model; needed for LDM names of a UNet without two layers per block.
        source: What error messages call it.

    Raises:
        PatchError: It is no adapter at all, or a damaged one.
    """
    try:
        kohya.from_state(tensors, metadata, survey, source)
        why_not = None
    except UnsupportedAdapterError as error:
        why_not = str(error)
    ldm_keys = {} if survey is None else {layer.ldm_key: key for key, layer in survey.layers.items()}
    family = PatchMetadata.from_strings(metadata or {}).family if survey is None else survey.family
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if (found := naming.parse(name)) is None:
            unknown.append(name)
        elif found.part != "alpha":
            parts.setdefault(found.layer, {})[name] = (found.kind, tensor)
    kinds: Counter[str] = Counter()
    places: Counter[str] = Counter()
    ranks = set()
    for layer, tensors_of in parts.items():
        found_kinds = {kind for kind, _ in tensors_of.values()}
        # the other kinds are what makes it more than a LoRA
        kinds[" and ".join(sorted(found_kinds - {"LoRA"})) or "LoRA"] += 1
        places[naming.place_of(layer, ldm_keys, family)] += 1
        ranks |= {rank for name, (_, tensor) in tensors_of.items() if (rank := _rank(name, tensor)) is not None}
    return Contents(
        dict(kinds.most_common()),
        dict(places.most_common()),
        tuple(sorted(ranks)),
        dtype_name(tensors),
        tuple(unknown),
        why_not,
    )


def _rank(name: str, tensor: Tensor) -> int | None:
    """The rank that a tensor of an adapter shows; ``None`` for those that do not."""
    found = naming.parse(name)
    if found is None or not tensor.ndim:
        return None
    if found.part == "down" or ".hada_w1_b" in name or ".hada_w2_b" in name:
        return tensor.shape[0]
    if ".lokr_w1_b" in name or ".lokr_w2_b" in name:
        return tensor.shape[0]
    return None
