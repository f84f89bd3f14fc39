"""The survey of any supported raw model."""

from __future__ import annotations

from torch import nn

from .families.registry import family_of
from .model_survey import ModelSurvey
from .recording import recorded
from .transformer import survey_transformer
from .unet import survey_unet

__all__ = ["survey"]


def survey(model: nn.Module) -> ModelSurvey:
    """Find the layers of a raw UNet or diffusion transformer, in diffusers' or the authors' naming.

    Args:
        model: The module itself, not a host's wrapper or a pipeline. The meta device works too.

    Raises:
        UnknownFamilyError: If the model is of no known family; see :mod:`.recording`.
        ModelError: If its family is not supported, or a layer is not a plain linear layer (quantised, or wrapped by
            another library's adapter).
    """
    if (found := family_of(model)) is not None:
        return survey_transformer(model, *found)
    if (family := recorded(model)) is not None:
        return survey_transformer(model, family, "original")
    return survey_unet(model)
