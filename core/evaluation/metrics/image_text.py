"""Pictures and words in one space: CLIP by transformers or by open_clip, or the embedded model's probe in its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...errors import ModelError, RequestError
from ...mini.vocabulary import CATEGORIES, NONE, SENSES
from ...mini.world import LABELS
from ...models.images import to_bytes, to_pil
from .extra import require

if TYPE_CHECKING:
    from ...mini.probe import Probe

__all__ = ["ImageText", "OpenClip", "ProbeImageText", "TransformersClip"]


class ImageText(Protocol):
    """Pictures ``(n, 3, H, W)`` in [-1, 1] and texts to vectors ``(n, d)`` of one space, fp32 on the CPU."""

    name: str

    def image_features(self, images: Tensor) -> Tensor: ...

    def text_features(self, texts: Sequence[str]) -> Tensor: ...


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


class TransformersClip:
    """A CLIP by transformers: ``model`` is its name on the Hugging Face hub, or a folder of one's own.

    What is not on this machine transformers downloads, unless ``local_only``. Pictures are resized with anti-aliasing,
    cut to a square about the centre and normalised as the model's own configuration says; a text is read up to the
    model's 77 tokens. Raises :class:`ModelError` where transformers is missing or the model cannot be had whole.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        device: torch.device | str = "cpu",
        local_only: bool = False,
    ) -> None:
        clip = require("transformers", "The CLIP score and the CLIP accuracy", 'pip install "forget-concept[cli]"')
        try:
            self._model, found = clip.CLIPModel.from_pretrained(
                model, output_loading_info=True, local_files_only=local_only
            )
            self._tokenizer = clip.CLIPTokenizer.from_pretrained(model, local_files_only=local_only)
            prepare = clip.CLIPImageProcessor.from_pretrained(model, local_files_only=local_only)
            self._short = int(prepare.size["shortest_edge"])
            self._side = int(prepare.crop_size["height"]), int(prepare.crop_size["width"])
            self._mean = torch.tensor(prepare.image_mean).view(1, 3, 1, 1)
            self._deviation = torch.tensor(prepare.image_std).view(1, 3, 1, 1)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            if local_only:
                raise ModelError(
                    f"The CLIP model '{model}' is not on this machine, or is none ({_first_line(error)}): nothing is "
                    "downloaded here. Give a folder with one, or the name of one that was downloaded before."
                ) from error
            raise ModelError(
                f"The CLIP model '{model}' can neither be read nor downloaded ({error}): give the name of a CLIP on "
                "the Hugging Face hub, or a folder with one."
            ) from error
        if lacking := found["missing_keys"]:
            # transformers would go on with random ones
            raise ModelError(f"The CLIP model '{model}' lacks {len(lacking)} of its weights: it is damaged or no CLIP.")
        self._model = self._model.to(device).eval()
        self.device = torch.device(device)
        self.name = f"clip {Path(model).name}"

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        features: Tensor = self._model.get_image_features(pixel_values=self._prepared(images)).float().cpu()
        return features

    def _prepared(self, images: Tensor) -> Tensor:
        pixels = to_bytes(images).to(self.device).float()
        height, width = pixels.shape[2:]
        scale = self._short / min(height, width)
        size = max(int(height * scale), self._short), max(int(width * scale), self._short)
        # whole 8-bit values, as Pillow gives them
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (size[0] - self._side[0]) // 2, (size[1] - self._side[1]) // 2
        pixels = pixels[:, :, top : top + self._side[0], left : left + self._side[1]]
        return (pixels / 255 - self._mean.to(self.device)) / self._deviation.to(self.device)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        length = int(self._model.config.text_config.max_position_embeddings)
        said = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        features: Tensor = self._model.get_text_features(**said).float().cpu()
        return features


class OpenClip:
    """A CLIP by open_clip, with the preprocessing it was trained with.

    ``model`` and ``pretrained`` are open_clip's names, or a path of weights for the latter; a folder of one's own is
    ``model="local-dir:<folder>"``. What is not on this machine open_clip downloads. Raises :class:`ModelError` where
    the extra is missing or the model cannot be had.
    """

    def __init__(
        self, model: str = "ViT-B-32", pretrained: str | None = "openai", device: torch.device | str = "cpu"
    ) -> None:
        clip = require("open_clip", "The CLIP score and the CLIP accuracy")
        require("PIL.Image", "The CLIP score and the CLIP accuracy")
        given: dict[str, Any] = {"require_pretrained": True}  # or open_clip would go on with random weights
        if ":" not in model:
            # some weights were trained with another activation than their architecture's name says
            known = clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
            quick = bool((known or {}).get("quick_gelu", False))
            given |= {"pretrained": pretrained, "force_quick_gelu": quick or model.endswith("-quickgelu")}
        try:
            self._model = clip.create_model(model, device=device, **given).eval()
            self._tokenize = clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"The CLIP model '{model}' ({pretrained}) can neither be read nor downloaded ({error}): "
                "open_clip.list_pretrained() lists the names; a folder of one's own is 'local-dir:<folder>'."
            ) from error
        settings = clip.transform.PreprocessCfg(**self._model.visual.preprocess_cfg)
        self._prepare: Any = clip.transform.image_transform_v2(settings, is_train=False)
        self.device = torch.device(device)
        self.name = f"open_clip {Path(model).name}" + (f" {Path(str(pretrained)).name}" if ":" not in model else "")

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        ready = torch.stack([self._prepare(to_pil(picture)) for picture in to_bytes(images)])
        features: Tensor = self._model.encode_image(ready.to(self.device)).float().cpu()
        return features

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        features: Tensor = self._model.encode_text(self._tokenize(list(texts)).to(self.device)).float().cpu()
        return features


class ProbeImageText:
    """The embedded model's probe in CLIP's place: its probabilities are a picture's vector, the words named a text's.

    Both have an entry for each class of each category of the probe. A text's entry is 1 where it says the class's name,
    synonym or description, and 0 elsewhere, also for *none*: what nobody sees in a picture makes it less like any text.
    Raises :class:`RequestError` for a text that names nothing of the world.
    """

    name = "probe"

    def __init__(self, probe: Probe) -> None:
        self.probe = probe.eval()
        self._places: dict[str, int] = {}
        ways: dict[str, tuple[str, ...]] = {}
        for words in CATEGORIES.values():
            ways |= {word.name: (word.name, word.synonym, word.description) for word in words}
        ways |= {sense.shape: (sense.shape, sense.synonym, *sense.hints) for sense in SENSES}
        classes = [label for labels in LABELS.values() for label in labels]
        for at, label in enumerate(classes):
            if label != NONE:
                self._places |= dict.fromkeys((said.casefold() for said in ways.get(label, (label,))), at)
        self.width = len(classes)
        # the longest first: a description may hold another one's name
        said = sorted(self._places, key=len, reverse=True)
        self._said = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, said))})(?!\w)", re.IGNORECASE)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        logits = self.probe(images.to(next(self.probe.parameters()).device))
        return torch.cat([logits[name].float().softmax(1) for name in LABELS], 1).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(texts), self.width)
        for row, text in enumerate(texts):
            for match in self._said.finditer(text):
                found[row, self._places[match[0].casefold()]] = 1
            if not found[row].any():
                raise RequestError(f"The prompt '{text}' names nothing that the probe knows, so it cannot be compared.")
        return found
