"""Load a :class:`LatentDiffusion` from a diffusers folder, a single-file checkpoint or a pipeline.

diffusers' and transformers' own loaders read the files; they are extras and are imported only here, when needed. Pickle
files can run code and are refused, in folders too.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ForgetConceptError, ModelError, PatchError
from ..files.json_text import parse_json
from ..files.reading import read_text
from ..files.safetensors_io import SUFFIX, read_names
from .autoencoders import DiffusersAutoencoder
from .families.flux import FLUX
from .families.registry import family_of
from .latent_diffusion import LatentDiffusion
from .prediction_marks import read_marks
from .text_encoders import CLIPText, FluxText, SDXLText

__all__ = ["from_pipeline", "load_checkpoint", "without_progress_bars"]

_CHOICES = "'mini', a folder in diffusers' layout or a single .safetensors file"


def load_checkpoint(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clip_skip: int = 1,
    config: str | os.PathLike[str] | None = None,
) -> LatentDiffusion:
    """Load a Stable Diffusion 1.x, 2.x or XL model, or one of the same structure.

    Args:
        source: A folder in diffusers' layout or a single-file safetensors checkpoint, whatever its ending.
        device: Device of the modules.
        dtype: Dtype of the weights.
        clip_skip: Text encoder layer counted from the last one, as in the webui; not used for SDXL.
        config: A diffusers folder with the configuration and tokenizer of a single-file checkpoint. Without it,
            diffusers reads those of the model family from the Hugging Face hub or its local cache.

    Raises:
        ModelError: If the source is missing, a pickle, incomplete, or not a supported model.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, device, dtype, clip_skip)
    if not path.exists():
        raise ModelError(f"There is no model '{source}': give {_CHOICES}.")
    return _from_single_file(path, device, dtype, clip_skip, config)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Load local files without the progress bars that diffusers and transformers draw on the terminal."""
    loaded: list[Any] = [sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    shown = [each for each in loaded if each is not None and each.is_progress_bar_enabled()]
    for each in shown:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()


def _need_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"Loading a checkpoint needs diffusers and transformers ({error}): pip install diffusers transformers."
        ) from error


def _from_folder(folder: Path, device: torch.device | str, dtype: torch.dtype, clip_skip: int) -> LatentDiffusion:
    _need_diffusers()
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    missing = [n for n in ("unet", "text_encoder", "tokenizer", "scheduler") if not (folder / n).is_dir()]
    if missing:
        raise ModelError(
            f"'{folder}' is not a model in diffusers' layout: it has no folder '{missing[0]}'. Give {_CHOICES}."
        )

    def part(kind: Any, name: str, **given: Any) -> Any:
        weights = [p.name for p in (folder / name).iterdir() if p.suffix in (SUFFIX, ".bin")]
        safe = [w for w in weights if w.endswith(SUFFIX)]
        if weights and not safe:
            raise ModelError(
                f"'{folder / name}' has its weights only as a pickle ({weights[0]}): pickles can run code and are not "
                "read. Get the safetensors version."
            )
        half = bool(safe) and all(".fp16." in w for w in safe)
        try:
            with without_progress_bars():
                loaded = kind.from_pretrained(
                    str(folder / name),
                    use_safetensors=True,
                    local_files_only=True,
                    **({"variant": "fp16"} if half else {}),
                    **given,
                )
        except Exception as error:  # third-party loaders raise arbitrary errors; the cause is chained
            raise ModelError(f"'{folder / name}' cannot be loaded: {_first_line(error)}") from error
        # transformers renamed its argument for the dtype, and its default differs between versions
        return loaded.to(device, dtype).eval()

    def tokenizer(name: str) -> Any:
        try:
            return CLIPTokenizer.from_pretrained(str(folder / name), local_files_only=True)
        except Exception as error:  # as above
            raise ModelError(f"'{folder / name}' cannot be loaded: {_first_line(error)}") from error

    try:
        settings = parse_json(read_text(folder / "scheduler" / "scheduler_config.json", "The noise schedule"))
        scheduler = DDIMScheduler.from_config(settings)
    except (ForgetConceptError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"The noise schedule of '{folder}' cannot be read: {_first_line(error)}") from error
    unet = part(UNet2DConditionModel, "unet", torch_dtype=dtype)
    if (folder / "text_encoder_2").is_dir():
        text: Any = SDXLText(
            part(CLIPTextModel, "text_encoder"),
            part(CLIPTextModelWithProjection, "text_encoder_2"),
            tokenizer("tokenizer"),
            tokenizer("tokenizer_2"),
        )
    else:
        text = CLIPText(part(CLIPTextModel, "text_encoder"), tokenizer("tokenizer"), clip_skip)
    vae = part(AutoencoderKL, "vae", torch_dtype=dtype) if (folder / "vae").is_dir() else None
    return _assembled(unet, text, scheduler, vae, folder.name)


def _from_single_file(
    path: Path, device: torch.device | str, dtype: torch.dtype, clip_skip: int, config: str | os.PathLike[str] | None
) -> LatentDiffusion:
    try:
        names = read_names(path)
    except PatchError as error:
        raise ModelError(str(error)) from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ModelError(f"'{path}' is not a complete checkpoint: it has no UNet. Give {_CHOICES}.")
    _need_diffusers()
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    marks = read_marks(path)
    sdxl = any(name.startswith("conditioner.embedders.1.") for name in names)
    kind = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    extra: dict[str, Any] = {} if sdxl else {"safety_checker": None, "feature_extractor": None}
    if config is not None:
        extra |= {"config": str(config), "local_files_only": True}
    try:
        with _under_its_ending(path) as named, without_progress_bars():
            pipe = kind.from_single_file(str(named), torch_dtype=dtype, **extra)
    except Exception as error:  # third-party loaders raise arbitrary errors; the cause is chained
        help_ = (
            "diffusers needs the configuration of this model family from the Hugging Face hub once: connect, or give a "
            "diffusers folder of the same family as 'config'."
            if config is None
            else f"The configuration in '{config}' may be of another model."
        )
        raise ModelError(f"'{path}' cannot be loaded: {_first_line(error)} {help_}") from error
    changes: dict[str, Any] = {}
    if marks.prediction_type is not None:
        changes["prediction_type"] = marks.prediction_type
    if marks.zero_snr:
        # the last time step is pure noise then, and sampling must begin there
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    return from_pipeline(pipe.to(device), path.stem, clip_skip)


@contextmanager
def _under_its_ending(path: Path) -> Iterator[Path]:
    """A safetensors file under a name by which diffusers, which takes every other ending for a pickle's, reads it."""
    if path.suffix == SUFFIX:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="forget-concept-", ignore_cleanup_errors=True) as folder:
        named = Path(folder, path.stem + SUFFIX)
        try:
            named.symlink_to(path.resolve())
        except OSError:  # Windows lets only some users make links
            shutil.copyfile(path, named)
        yield named


def from_pipeline(pipe: Any, name: str = "model", clip_skip: int = 1) -> LatentDiffusion:
    """Wrap a ``StableDiffusionPipeline``, ``StableDiffusionXLPipeline`` or ``FluxPipeline``, sharing its modules.

    Args:
        pipe: The pipeline.
        name: Name of the model in messages and metadata.
        clip_skip: As in :func:`load_checkpoint`.

    Raises:
        ModelError: If the pipeline is an SDXL refiner, an inpainting model or has no cross-attention.
    """
    if (transformer := getattr(pipe, "transformer", None)) is not None:
        return _flow_model(pipe, transformer, name)
    if getattr(pipe, "text_encoder_2", None) is not None:
        if pipe.text_encoder is None:
            raise ModelError(
                f"'{name}' has only the second of SDXL's text encoders (a refiner?): that is not supported."
            )
        text: Any = SDXLText(pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2)
    else:
        text = CLIPText(pipe.text_encoder, pipe.tokenizer, clip_skip)
    return _assembled(pipe.unet, text, pipe.scheduler, pipe.vae, name)


def _flow_model(pipe: Any, transformer: Any, name: str) -> LatentDiffusion:
    family = family_of(transformer)
    if family is None or family[0] is not FLUX:
        what = type(transformer).__name__ if family is None else family[0].title
        raise ModelError(f"'{name}' is a {what} pipeline, of which only Flux is read here: give its parts by hand.")
    config = pipe.scheduler.config
    channels = transformer.config.in_channels // 4
    side = int(getattr(pipe, "default_sample_size", 128))
    length = int(getattr(pipe, "tokenizer_max_length_2", 512))
    return LatentDiffusion(
        transformer.eval(),
        FluxText(pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, length),
        None,
        "flow",
        DiffusersAutoencoder(pipe.vae) if pipe.vae is not None else None,
        (channels, side, side),
        name,
        # distilled: there is no unguided prediction
        guidance=1.0,
        shift=_shift(config, (side // 2) ** 2),
    )


def _shift(config: Any, tokens: int) -> float:
    """The shift of a flow model's time steps; a dynamic one grows with the number of image tokens, as in Flux dev."""
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (tokens - fewest) / (most - fewest))


def _assembled(unet: Any, text: Any, scheduler: Any, vae: Any, name: str) -> LatentDiffusion:
    config = scheduler.config
    if config.get("rescale_betas_zero_snr", False):
        # the samplers differ in whether and how they rescale
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(config)
    size = unet.config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    model = LatentDiffusion(
        unet.eval(),
        text,
        scheduler.alphas_cumprod,
        config.get("prediction_type", "epsilon"),
        DiffusersAutoencoder(vae) if vae is not None else None,
        (unet.config.in_channels, height, width),
        name,
        # "linspace" is a default of some samplers and says nothing about the model
        spacing="trailing" if config.get("timestep_spacing") == "trailing" else "leading",
    )
    if unet.config.in_channels != unet.config.out_channels:
        raise ModelError(
            f"'{name}' takes {unet.config.in_channels} channels (inpainting?): only plain models are supported."
        )
    _ = model.survey  # raise early if there is no cross-attention
    return model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
