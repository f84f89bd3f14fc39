"""The work folder: what is found is what was put there, and never another model's."""

from __future__ import annotations

import pytest
import torch

from forget_concept.core.errors import RequestError
from forget_concept.core.files.safetensors_io import write_safetensors
from forget_concept.core.files.workspace import Workspace, key_of


def test_tensors_and_words_come_back_as_they_were(tmp_path):
    work = Workspace(tmp_path / "new" / "folder")
    assert work.load("fisher", "a") is None and work.metadata("fisher", "a") == {}
    tensors = {"x": torch.randn(3, 2)[:, :1], "n": torch.tensor(5), "state": torch.Generator().get_state()}
    path = work.save("fisher", "a", tensors, model="m")
    assert path.exists() and work.metadata("fisher", "a") == {"model": "m"}
    again = Workspace(tmp_path / "new" / "folder").load("fisher", "a")
    assert set(again) == set(tensors) and all(torch.equal(again[k], v) for k, v in tensors.items())
    assert work.load("fisher", "b") is None and work.load("pictures", "a") is None
    work.remove("fisher", "a")
    work.remove("fisher", "a")
    assert work.load("fisher", "a") is None


def test_a_key_is_the_same_for_equal_parts_and_no_others():
    x = torch.arange(6.0).reshape(2, 3)
    made = key_of("m", ["a", "b"], {"y": 1, "x": 2.0}, x, None)
    assert made == key_of("m", ("a", "b"), {"x": 2.0, "y": 1}, x.clone(), None)
    others = [
        key_of("m", ["a"], "b", {"y": 1, "x": 2.0}, x, None),
        key_of("m", ["ab"], {"y": 1, "x": 2.0}, x, None),
        key_of("m", ["a", "b"], {"y": 1, "x": 2.5}, x, None),
        key_of("m", ["a", "b"], {"y": 1, "x": 2.0}, x.reshape(3, 2), None),
        key_of("m", ["a", "b"], {"y": 1, "x": 2.0}, x.double(), None),
        key_of("m", ["a", "b"], {"y": 1, "x": 2.0}, x.T.contiguous().T + 1e-6, None),
        key_of("m", ["a", "b"], {"y": 1, "x": 2.0}, x),
    ]
    assert len({made, *others}) == 1 + len(others)


def test_what_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match=r"work folder.*cannot be created"):
        Workspace(tmp_path / "file" / "below")
    work = Workspace(tmp_path)
    for kind, key in (("..", "/etc"), ("a", "../b"), ("a b", "c")):
        with pytest.raises(RequestError, match="cannot be the name"):
            work.path(kind, key)


@pytest.mark.parametrize("damage", ["short", "bit", "cut", "checksum", "other", "missing"])
def test_what_was_damaged_is_made_anew_with_a_word(tmp_path, caplog, damage):
    work = Workspace(tmp_path)
    path = work.save("kind", "key", {"x": torch.ones(3), "n": torch.tensor(2)}, about="a")
    shapes = {"x": (3,), "n": ()}
    assert work.load("kind", "key", shapes)["n"] == 2 and work.metadata("kind", "key") == {"about": "a"}
    data = bytearray(path.read_bytes())
    if damage == "short":
        path.write_bytes(b"short")
    elif damage == "bit":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "checksum":
        write_safetensors({"x": torch.ones(3), "n": torch.tensor(2)}, path)
    elif damage == "other":
        work.save("kind", "key", {"x": torch.ones(4), "n": torch.tensor(2)})
    else:
        work.save("kind", "key", {"x": torch.ones(3)})
    with caplog.at_level("WARNING"):
        assert work.load("kind", "key", shapes) is None
    assert "made anew" in caplog.text and not path.exists() and work.metadata("kind", "key") == {}
    assert work.load("kind", "key", shapes) is None
