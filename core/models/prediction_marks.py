"""What a checkpoint file says about its own prediction type and noise schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ForgetConceptError, ModelError
from ..files.safetensors_io import read_metadata, read_names

__all__ = ["PredictionMarks", "check_prediction", "read_marks"]

_STATED = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "vpred": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}


@dataclass(frozen=True)
class PredictionMarks:
    """The marks of a file: empty tensors that trainers add and hosts read, and the metadata entry of ModelSpec.

    Attributes:
        prediction_type: ``"epsilon"`` or ``"v_prediction"``, from the tensor ``v_pred`` or the metadata entry
            ``modelspec.prediction_type``; ``None``: neither is there.
        zero_snr: Whether there is the tensor ``ztsnr``: trained with zero terminal SNR.
    """

    prediction_type: str | None = None
    zero_snr: bool = False


def read_marks(path: Path) -> PredictionMarks:
    """Read the marks from the header of a safetensors file.

    Raises:
        ModelError: They contradict each other, or name a prediction type that is not supported.
        PatchError: As :func:`..files.safetensors_io.read_names`.
    """
    names = read_names(path)
    stated = read_metadata(path).get("modelspec.prediction_type", "").strip().lower()
    if stated and stated not in _STATED:
        raise ModelError(
            f"'{path.name}' states the prediction type '{stated}' in its metadata (modelspec.prediction_type): only "
            "epsilon and v are supported."
        )
    prediction, marked = _STATED.get(stated), "v_pred" in names
    if marked and prediction == "epsilon":
        raise ModelError(
            f"'{path.name}' contradicts itself: it has the mark v_pred, and its metadata state the prediction type "
            f"'{stated}' (modelspec.prediction_type). Correct one of them."
        )
    return PredictionMarks("v_prediction" if marked else prediction, "ztsnr" in names)


def check_prediction(path: Path, prediction_type: str, remedy: str) -> None:
    """Check that a host does not run the v-prediction model of a file as one of epsilon, which gives noise.

    A file that states epsilon in its metadata may be wrong, and a host that runs it as v was told so by its user.

    Args:
        path: The file; what is no safetensors file has no marks.
        prediction_type: What the host takes the model for.
        remedy: What to do in this host, to end a sentence.

    Raises:
        ModelError: Names the file and the remedy.
    """
    if prediction_type != "epsilon":
        return
    try:
        stated = read_marks(path).prediction_type
    except ModelError:
        raise
    except (ForgetConceptError, OSError):  # a pickle, or a file that was moved after it was loaded
        return
    if stated == "v_prediction":
        raise ModelError(
            f"The checkpoint '{path.name}' says that it predicts v, but it is run as a model that predicts epsilon, so "
            f"that its pictures are noise: {remedy}."
        )
