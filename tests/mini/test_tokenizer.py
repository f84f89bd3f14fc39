"""The tokenizer's training: a byte-complete vocabulary in CLIP's format; names stay words of several tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forget_concept.core.mini.train import tokenizer
from forget_concept.core.mini.vocabulary import IDENTITIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer.build(made, pictures=300)
    return made


def test_every_text_of_bytes_comes_back(folder: Path) -> None:
    from transformers import CLIPTokenizer

    made = CLIPTokenizer.from_pretrained(folder)
    for text in ("a neon picture of a red star", "zebra, 17 % & ünïcödé 猫"):
        ids = made(text, add_special_tokens=False).input_ids
        assert made.unk_token_id not in ids
        assert made.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert len(made("picture of a", add_special_tokens=False).input_ids) == 3


def test_ids_are_in_clips_order(folder: Path) -> None:
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert sorted(ids.values()) == list(range(len(ids)))
    assert 0 < len(merges) <= tokenizer.MERGES and len(ids) == 512 + len(merges) + 2
    assert [ids["".join(merge.split(" "))] for merge in merges] == list(range(512, 512 + len(merges)))
    assert ids[tokenizer.START] == len(ids) - 2 and ids[tokenizer.END] == len(ids) - 1


def test_the_same_captions_give_the_same_vocabulary(folder: Path, tmp_path: Path) -> None:
    tokenizer.build(tmp_path, pictures=300)
    assert (tmp_path / "merges.txt").read_bytes() == (folder / "merges.txt").read_bytes()


def test_names_stay_words_of_several_tokens(folder: Path) -> None:
    from transformers import CLIPTokenizer

    made = CLIPTokenizer.from_pretrained(folder)
    lengths = [len(made(word.name, add_special_tokens=False).input_ids) for word in IDENTITIES]
    assert min(lengths) >= 2
