"""Joint image and text encoders: CLIP by transformers or open_clip, or the embedded model's probe as a substitute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...errors import ModelError, RequestError
from ...mini.vocabulary import CATEGORIES, NONE, SENSES
from ...mini.world import LABELS
from ...models.images import to_bytes, to_pil
from ...models.loading import without_progress_bars
from ...request.concept import normalized_phrase
from .extra import require

if TYPE_CHECKING:
    from ...mini.probe import Probe

__all__ = ["ImageText", "OpenClip", "ProbeImageText", "TransformersClip"]


class ImageText(Protocol):
    """Encodes images and texts in one vector space."""

    name: str

    def image_features(self, images: Tensor) -> Tensor:
        """Return vectors ``(n, d)``, fp32 on the CPU, of images ``(n, 3, H, W)`` in [-1, 1]."""
        ...

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(n, d)``, fp32 on the CPU, of texts."""
        ...


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def _projected(found: Any) -> Tensor:
    """The projected features ``(n, d)``, which transformers 5 returns as ``pooler_output`` and older versions bare."""
    features: Tensor = getattr(found, "pooler_output", found)
    return features


class TransformersClip:
    """CLIP by transformers.

    Images are resized with anti-aliasing, center-cropped and normalized as the model's configuration specifies; texts
    are truncated to the model's 77 tokens.

    Args:
        model: Name on the Hugging Face hub, or a local folder.
        device: Device of the model.
        local_only: Whether to use local files only and never download.

    Raises:
        ModelError: If transformers is not installed, or the model cannot be loaded completely.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        device: torch.device | str = "cpu",
        local_only: bool = False,
    ) -> None:
        clip = require("transformers", "The CLIP score and the CLIP accuracy", 'pip install "forget-concept[cli]"')
        # only its settings are read; where there are two kinds, the other one wants torchvision
        processor = "CLIPImageProcessorPil" if hasattr(clip, "CLIPImageProcessorPil") else "CLIPImageProcessor"
        # a download draws its bar; reading what is there takes a moment
        bars = without_progress_bars() if local_only or Path(model).is_dir() else nullcontext()
        try:
            with bars:
                self._model, found = clip.CLIPModel.from_pretrained(
                    model, output_loading_info=True, local_files_only=local_only
                )
            self._tokenizer = clip.CLIPTokenizer.from_pretrained(model, local_files_only=local_only)
            prepare = getattr(clip, processor).from_pretrained(model, local_files_only=local_only)
            self._short = int(prepare.size["shortest_edge"])
            self._side = int(prepare.crop_size["height"]), int(prepare.crop_size["width"])
            self._mean = torch.tensor(prepare.image_mean).view(1, 3, 1, 1)
            self._deviation = torch.tensor(prepare.image_std).view(1, 3, 1, 1)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            if local_only:
                raise ModelError(
                    f"The CLIP model '{model}' is not on this machine, or is not a CLIP ({_first_line(error)}), and "
                    "downloads are off here: give a local folder, or the name of a model that was downloaded before."
                ) from error
            raise ModelError(
                f"The CLIP model '{model}' can neither be read nor downloaded ({error}): give the name of a CLIP on "
                "the Hugging Face hub, or a local folder."
            ) from error
        if lacking := found["missing_keys"]:
            # transformers would continue with random weights
            raise ModelError(
                f"The CLIP model '{model}' lacks {len(lacking)} of its weights, so it is damaged or not a CLIP: "
                "download it again, or choose another one."
            )
        self._model = self._model.to(device).eval()
        self.device = torch.device(device)
        self.name = f"clip {Path(model).name}"

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        return _projected(self._model.get_image_features(pixel_values=self._prepared(images))).float().cpu()

    def _prepared(self, images: Tensor) -> Tensor:
        pixels = to_bytes(images).to(self.device).float()
        height, width = pixels.shape[2:]
        scale = self._short / min(height, width)
        size = max(int(height * scale), self._short), max(int(width * scale), self._short)
        # rounded to 8-bit values, as Pillow does
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (size[0] - self._side[0]) // 2, (size[1] - self._side[1]) // 2
        pixels = pixels[:, :, top : top + self._side[0], left : left + self._side[1]]
        return (pixels / 255 - self._mean.to(self.device)) / self._deviation.to(self.device)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        length = int(self._model.config.text_config.max_position_embeddings)
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        return _projected(self._model.get_text_features(**tokens)).float().cpu()


class OpenClip:
    """CLIP by open_clip, with the preprocessing of its training. open_clip downloads missing weights.

    Args:
        model: open_clip's name of the architecture, or ``"local-dir:<folder>"``.
        pretrained: open_clip's name of the weights, or a path.
        device: Device of the model.

    Raises:
        ModelError: If open_clip is not installed, or the model can be neither loaded nor downloaded.
    """

    def __init__(
        self, model: str = "ViT-B-32", pretrained: str | None = "openai", device: torch.device | str = "cpu"
    ) -> None:
        clip = require("open_clip", "The CLIP score and the CLIP accuracy")
        require("PIL.Image", "The CLIP score and the CLIP accuracy")
        given: dict[str, Any] = {"require_pretrained": True}  # otherwise open_clip continues with random weights
        if ":" not in model:
            # some weights were trained with another activation than the architecture's default
            known = clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
            quick = bool((known or {}).get("quick_gelu", False))
            given |= {"pretrained": pretrained, "force_quick_gelu": quick or model.endswith("-quickgelu")}
        try:
            self._model = clip.create_model(model, device=device, **given).eval()
            self._tokenize = clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"The CLIP model '{model}' ({pretrained}) can neither be read nor downloaded ({error}): "
                "choose a name from open_clip.list_pretrained(), or a local folder as 'local-dir:<folder>'."
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
    """The embedded model's probe as a substitute for CLIP.

    An image's vector contains the probe's probabilities of all classes of all categories. A text's vector is 1 for each
    class whose name, synonym or description it contains, and 0 otherwise, including *none*. Encoding a text that names
    no class raises :class:`RequestError`.
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
                self._places |= dict.fromkeys((normalized_phrase(term) for term in ways.get(label, (label,))), at)
        self.width = len(classes)
        # longest first, because a description may contain the name of another class
        terms = sorted(self._places, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, terms))})(?!\w)")

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        logits = self.probe(images.to(next(self.probe.parameters()).device))
        return torch.cat([logits[name].float().softmax(1) for name in LABELS], 1).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(texts), self.width)
        for row, text in enumerate(texts):
            for match in self._pattern.finditer(normalized_phrase(text)):
                found[row, self._places[match[0]]] = 1
            if not found[row].any():
                raise RequestError(
                    f"The prompt '{text}' names nothing that the probe knows, so it cannot be compared: name a concept "
                    "of the embedded world."
                )
        return found
