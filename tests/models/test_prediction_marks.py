"""A host does not run a file that says that it predicts v as a model of epsilon."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from forget_concept.core.errors import ModelError
from forget_concept.core.models.prediction_marks import PredictionMarks, check_prediction, read_marks


def file(path, *marks, stated=None):
    metadata = None if stated is None else {"modelspec.prediction_type": stated}
    save_file({"weight": torch.zeros(1)} | {mark: torch.zeros(0) for mark in marks}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("marks", "stated", "expected"),
    [
        ((), None, PredictionMarks()),
        (("v_pred",), None, PredictionMarks("v_prediction")),
        (("v_pred", "ztsnr"), "V-Prediction", PredictionMarks("v_prediction", True)),
        ((), "eps", PredictionMarks("epsilon")),
        (("ztsnr",), "", PredictionMarks(None, True)),
    ],
)
def test_marks_are_read_and_only_a_v_model_run_as_epsilon_is_refused(tmp_path, marks, stated, expected):
    path = file(tmp_path / "x.safetensors", *marks, stated=stated)
    assert read_marks(path) == expected
    check_prediction(path, "v_prediction", "do this")
    if expected.prediction_type == "v_prediction":
        with pytest.raises(ModelError, match=r"'x.safetensors' says that it predicts v.*: do this\.$"):
            check_prediction(path, "epsilon", "do this")
    else:
        check_prediction(path, "epsilon", "do this")


def test_what_cannot_be_read_has_no_marks_and_what_contradicts_itself_is_said(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02pickle")
    check_prediction(tmp_path / "x.ckpt", "epsilon", "do this")
    check_prediction(tmp_path / "gone.safetensors", "epsilon", "do this")
    with pytest.raises(ModelError, match="contradicts itself"):
        check_prediction(file(tmp_path / "y.safetensors", "v_pred", stated="epsilon"), "epsilon", "do this")
