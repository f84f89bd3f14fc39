"""The embedded models: small trained latent diffusion models, each in the shape of a family, and the world they draw.

They measure forgetting on a CPU in seconds. `mini` has the shape of Stable Diffusion 1, `mini-xl` that of Stable
Diffusion XL and `mini-flow` that of Flux. All consist of diffusers' and transformers' own classes and share the
autoencoder, CLIP's tokenizer and the probe that classifies their images. :mod:`.train` trains all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import NAMES, weights_folder

if TYPE_CHECKING:
    from ..models.latent_diffusion import LatentDiffusion
    from ..models.text_encoders import TextEncoder
    from .probe import Probe

__all__ = [
    "NAMES",
    "load",
    "load_flow_modules",
    "load_modules",
    "load_probe",
    "load_xl_modules",
    "weights_folder",
]


def _read(device: str, *parts: tuple[str, Path]) -> list[Any]:
    """The modules of some folders by the names of their classes, in fp32 and frozen.

    Raises:
        ModelError: If the weights are missing, or diffusers or transformers is not installed.
    """
    from ..errors import ModelError

    for _, folder in parts:
        if not folder.is_dir():
            raise ModelError(f"The embedded model's weights are not in {folder.parent}: install the package again.")
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ModelError(
            f"The embedded model needs diffusers and transformers ({error}): pip install diffusers transformers."
        ) from error
    from ..models.loading import without_progress_bars

    found = []
    with without_progress_bars():
        for name, folder in parts:
            kind = getattr(transformers if name.startswith(("CLIP", "T5")) else diffusers, name)
            found.append(kind.from_pretrained(folder, variant="fp16"))
    for module in found:
        module.eval().requires_grad_(False).to(device).float()
    return found


def _tokenizer(folder: Path, **changes: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, **changes)


def load_modules(device: str = "cpu", folder: Path | None = None) -> tuple[Any, Any, Any, Any]:
    """Load the modules of `mini` as diffusers' and transformers' objects, in fp32.

    Args:
        device: Device of the modules.
        folder: Folder of its UNet and text encoder. Default: :func:`weights_folder`. Tokenizer and autoencoder are
            the distributed ones if it has none.

    Returns:
        UNet, text encoder, tokenizer and autoencoder.

    Raises:
        ModelError: If the weights are missing, or diffusers or transformers is not installed.
    """
    shared = weights_folder()
    folder = folder or shared
    unet, text, vae = _read(
        device,
        ("UNet2DConditionModel", folder / "unet"),
        ("CLIPTextModel", folder / "text_encoder"),
        ("AutoencoderKL", _first(folder, shared, "vae") / "vae"),
    )
    return unet, text, _tokenizer(_first(folder, shared, "tokenizer")), vae


def _first(folder: Path, shared: Path, part: str) -> Path:
    """The folder that has a part: the model's own, or that of the distributed one."""
    return folder if (folder / part).is_dir() else shared


def load_xl_modules(device: str = "cpu", folder: Path | None = None) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Load the modules of `mini-xl` as diffusers' and transformers' objects, in fp32.

    Args:
        device: Device of the modules.
        folder: Folder of its own parts. Default: :func:`weights_folder`. The others are `mini`'s.

    Returns:
        UNet, both text encoders, both tokenizers (they differ in the padding token, as in SDXL) and autoencoder.

    Raises:
        ModelError: As :func:`load_modules`.
    """
    own, shared = folder or weights_folder("mini-xl"), weights_folder()
    unet, first, second, vae = _read(
        device,
        ("UNet2DConditionModel", own / "unet"),
        ("CLIPTextModel", own / "text_encoder"),
        ("CLIPTextModelWithProjection", own / "text_encoder_2"),
        ("AutoencoderKL", shared / "vae"),
    )
    return unet, first, second, _tokenizer(shared), _tokenizer(shared, pad_token="!"), vae


def load_flow_modules(device: str = "cpu", folder: Path | None = None) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Load the modules of `mini-flow` as diffusers' and transformers' objects, in fp32.

    Args:
        device: Device of the modules.
        folder: Folder of its own parts. Default: :func:`weights_folder`. The others are `mini`'s.

    Returns:
        Transformer, CLIP and T5, their tokenizers, and autoencoder.

    Raises:
        ModelError: As :func:`load_modules`.
    """
    own, shared = folder or weights_folder("mini-flow"), weights_folder()
    transformer, clip, vae = _read(
        device,
        ("FluxTransformer2DModel", own / "transformer"),
        ("CLIPTextModel", own / "text_encoder"),
        ("AutoencoderKL", shared / "vae"),
    )
    (t5,) = _read(device, ("T5EncoderModel", own / "text_encoder_2"))
    from transformers import T5TokenizerFast

    second = T5TokenizerFast.from_pretrained(own / "tokenizer_2", local_files_only=True)
    return transformer, clip, t5, _tokenizer(shared), second, vae


def load(device: str = "cpu", folder: Path | None = None, name: str = "mini") -> LatentDiffusion:
    """Load an embedded model in fp32, under its name; see :func:`load_modules` for errors.

    Args:
        device: Device of the modules.
        folder: Folder of the model. Default: :func:`weights_folder`.
        name: ``"mini"``, ``"mini-xl"`` or ``"mini-flow"``.
    """
    from ..errors import ModelError
    from ..models.autoencoders import DiffusersAutoencoder
    from ..models.latent_diffusion import LatentDiffusion
    from ..models.schedules import sd_alphas_cumprod
    from ..models.text_encoders import CLIPText, FluxText, SDXLText
    from .config import GUIDANCE
    from .config_flow import TOKENS

    encoder: TextEncoder
    if name == "mini":
        model, text, tokenizer, vae = load_modules(device, folder)
        encoder = CLIPText(text, tokenizer)
    elif name == "mini-xl":
        model, first, second, tokenizer, tokenizer_2, vae = load_xl_modules(device, folder)
        encoder = SDXLText(first, second, tokenizer, tokenizer_2)
    elif name == "mini-flow":
        model, clip, t5, tokenizer, tokenizer_2, vae = load_flow_modules(device, folder)
        encoder = FluxText(clip, t5, tokenizer, tokenizer_2, TOKENS)
    else:
        raise ModelError(f"There is no embedded model '{name}': choose mini, mini-xl or mini-flow.")
    flow = name == "mini-flow"
    return LatentDiffusion(
        model,
        encoder,
        None if flow else sd_alphas_cumprod(),
        "flow" if flow else "epsilon",
        vae=DiffusersAutoencoder(vae),
        latent_shape=(4, 16, 16),
        name=name,
        guidance=1.0 if flow else GUIDANCE,
    )


def load_probe(folder: Path | None = None) -> Probe:
    """Load the trained probe, from ``folder`` or from :func:`weights_folder`."""
    from .probe import load_probe as read

    return read(folder)
