"""The scale of a LoRA that has no alpha tensors: the adapter's configuration in the metadata that diffusers writes.

diffusers' ``save_lora_weights`` and ``save_lora_adapter`` write peft's configuration as JSON under
``lora_adapter_metadata``, with the names of the model's parts before its keys (``unet.lora_alpha``) or without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PatchError
from ..files.json_text import parse_json

__all__ = ["KEY", "AdapterConfig", "compiled_pattern"]

KEY = "lora_adapter_metadata"

_PARTS = ("unet.", "")
# Patterns are regular expressions of whoever wrote the file. Names of layers, wildcards and alternatives are enough for
# them; nested or many repetitions could take forever to match.
_PATTERN = re.compile(r"[\w.^$*+\\|()\-]*")
_NESTED = re.compile(r"\)[*+{?]")
_MOST_REPETITIONS = 3


@dataclass(frozen=True)
class AdapterConfig:
    """What peft's configuration of a LoRA says of its scale.

    Args:
        alpha: Alpha of layers that no pattern matches.
        alpha_pattern: Alphas by pattern of the layer's name; the first that matches counts, as in peft.
        rslora: Whether the scale is ``alpha / √rank`` (rank-stabilized LoRA) instead of ``alpha / rank``.
        dora: Whether it is a DoRA, which is no plain LoRA.
    """

    alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str = "the patch") -> AdapterConfig | None:
        """The configuration of the UNet's adapter; ``None`` where the metadata has none.

        Args:
            metadata: Metadata of the file.
            source: What error messages call the file.

        Raises:
            PatchError: The entry cannot be read: the effect would be silently wrong without it.
        """
        if KEY not in metadata:
            return None
        try:
            values = parse_json(metadata[KEY])
            if not isinstance(values, dict):
                raise ValueError("it is not a JSON object")
            part = next((part for part in _PARTS if f"{part}lora_alpha" in values), None)
            if part is None:
                return None
            given: dict[str, Any] = {
                name: values.get(part + name) for name in ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
            }
            patterns = {str(key): _finite(value) for key, value in (given["alpha_pattern"] or {}).items()}
            for pattern in patterns:
                compiled_pattern(pattern)
            return cls(_finite(given["lora_alpha"]), patterns, bool(given["use_rslora"]), bool(given["use_dora"]))
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise PatchError(
                f"The entry '{KEY}' in the metadata of '{source}', which holds the LoRA's alpha, cannot be read: "
                f"{str(error).rstrip('.')}. Save the LoRA again with the program that made it."
            ) from error

    def scale(self, layer: str, rank: int) -> float:
        """The factor of ``up @ down``.

        Args:
            layer: The layer's name in diffusers' naming, such as ``….attn2.to_out.0``.
            rank: Rank of its factors.
        """
        found = (alpha for pattern, alpha in self.alpha_pattern.items() if compiled_pattern(pattern).match(layer))
        alpha = next(found, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of layers' names in a peft configuration.

    Raises:
        ValueError: It could take forever to match, or is not a regular expression (:class:`re.error`).
    """
    repetitions = sum(pattern.count(sign) for sign in "*+")
    if not _PATTERN.fullmatch(pattern) or _NESTED.search(pattern) or repetitions > _MOST_REPETITIONS:
        raise ValueError(f"the pattern '{pattern[:80]}' is not one of layers' names and wildcards")
    # peft matches a pattern with the end of a layer's name, from a dot on
    return re.compile(rf"(?:.*\.)?(?:{pattern})$")


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
