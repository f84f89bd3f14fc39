"""Stage `tokenizer`: a byte-complete BPE vocabulary in CLIP's file format, learned from the world's captions.

Ids: 256 byte letters, 256 byte letters that end a word, the merges, start-of-text, end-of-text (the last id, also the
padding). Names get a low weight, so that they consist of several tokens, like people's names in Stable Diffusion.

The distributed vocabulary was learned with ties between equally frequent pairs broken by spelling; the `tokenizers`
library breaks them differently. A new run therefore gives another vocabulary, which fits only the weights that are
trained with it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from ..vocabulary import IDENTITIES
from . import dataset

MERGES = 400
START, END = "<|startoftext|>", "<|endoftext|>"


def _words(count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for index in range(count):
        for text in dataset.captions(dataset.scene(index), index, 2):
            found.update(text.lower().replace(",", " ").replace(":", " ").replace("-", " ").split())
    for word in IDENTITIES:
        for part in f"{word.name} {word.synonym}".lower().split():
            found[part] = 1 + found[part] // 400
    return found


def _learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """The first ``count`` merges of byte pair encoding (Sennrich et al. 2016) of words with ``</w>`` at their ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # below this frequency only the down-weighted names are left: they stay in pieces
    trainer = trainers.BpeTrainer(
        vocab_size=2**16, min_frequency=4, end_of_word_suffix="</w>", special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator((word for word in words.elements() if word.isascii()), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    # older versions write a pair as one line
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges[:count]]
    return [(first, second) for first, second in pairs]


def _byte_letters() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in its order: printable ones as they are, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def build(folder: Path, pictures: int = 6000) -> None:
    """Write `vocab.json`, `merges.txt` and the tokenizer's configuration into `folder`."""
    merges = _learn_merges(_words(pictures), MERGES)
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise RuntimeError("two merges spell the same token")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    special = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
