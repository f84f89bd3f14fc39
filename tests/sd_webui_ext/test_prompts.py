"""A webui's text encoder: words mean words, and names of textual inversions are refused only where a person wrote them.

The host is none: the tiny text encoder, with a database of textual inversions as A1111 and Forge have it.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyText, fit, tiny_model

from forget_concept.core.errors import TokenError
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.text_encoders import check_words
from forget_concept.core.models.token_positions import tail_positions
from forget_concept.core.prompts.everyday import COMMON, CONTEXTS
from forget_concept.core.request.concept import KINDS, Concept, templates
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import quick_settings
from forget_concept.sd_webui_ext.prompts import WebText

# every word of the built-in prompts
BUILT_IN = sorted(
    {
        word.strip(",")
        for kind in KINDS
        for text in (*COMMON[kind], *CONTEXTS[kind], *templates(kind))
        for word in text.split()
        if word.strip("{},")
    }
)


class Database:
    """A1111's ``EmbeddingDatabase``, as far as prompts ask it."""

    def __init__(self, names, ids):
        self.known = [(name, ids(name)) for name in names]

    def find_embedding_at_position(self, tokens, offset):
        for name, ids in self.known:
            if tokens[offset : offset + len(ids)] == ids:
                return SimpleNamespace(name=name, vectors=1), len(ids)
        return None, None


class Engine:
    """The chunking text encoder: vectors of a textual inversion come as token 0."""

    id_end = id_pad = TinyText.END

    def __init__(self, names):
        self.text = TinyText()
        self.embeddings = Database(names, self.text.phrase_ids)

    def tokenize(self, texts):
        return [self.text.phrase_ids(text) for text in texts]

    def tokenize_line(self, line):
        tokens, found, at = self.text.phrase_ids(line.replace("\\", "")), [], 0
        while at < len(tokens):
            embedding, width = self.embeddings.find_embedding_at_position(tokens, at)
            found.append(tokens[at] if embedding is None else 0)
            at += 1 if embedding is None else width
        ids = [TinyText.START, *found[:75], TinyText.END]
        return [SimpleNamespace(tokens=ids + [TinyText.END] * (77 - len(ids)))], len(found)

    def __call__(self, prompts):
        rows = [self.tokenize_line(prompt)[0][0].tokens for prompt in prompts]
        text = TinyText()
        text.token_ids = lambda prompt: rows[int(prompt)]
        return text.encode([str(i) for i in range(len(rows))]).hidden, None


def web_text(*names):
    engine = Engine(names)
    return WebText(engine, [engine.embeddings], engine, [torch.nn.Linear(2, 2)], "tiny")


def model_with(*names):
    model = tiny_model()
    model.text = web_text(*names)
    return model


def fitted(model, request):
    return fit(model, request).factors


STAR = ForgetRequest((Concept("unicorn", replacement="circle"),), preserve=("moon",))
PLAIN = fitted(model_with(), STAR)


def free(word):
    """Not among the words of the request, also for this tokenizer, which gives some words the same ids."""
    text = web_text(word)
    return not any(text.reserved(written) for written in ("unicorn", "circle", "moon"))


FREE = [word for word in BUILT_IN if free(word)]


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k].up, b[k].up) and torch.equal(a[k].down, b[k].down) for k in a)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(FREE))
def test_a_built_in_word_that_is_an_embedding_changes_nothing(word):
    """Nobody wrote it: the patch is the same as without the file, bit for bit."""
    assert same(fitted(model_with(word), STAR), PLAIN)


def test_everything_built_in_at_once_may_be_an_embedding():
    assert len(FREE) > 100
    assert same(fitted(model_with(*FREE), STAR), PLAIN)


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_every_method_reads_built_in_prompts_as_words(method):
    cls = all_methods()[method]
    asked = ForgetRequest(STAR.concepts, STAR.preserve, method=method, settings=quick_settings(cls))
    assert same(fitted(model_with(*FREE), asked), fitted(model_with(), asked))


@pytest.mark.parametrize(
    "changes",
    [
        {"concepts": (Concept("sketch", replacement="circle"),)},
        {"concepts": (Concept("a sketch book"),)},
        {"concepts": (Concept("unicorn", replacement="Sketch"),)},
        {"concepts": (Concept("unicorn"), Concept("sketch"))},
        {"preserve": ("moon", "sketch")},
        {"settings": {"templates": ("a sketch of {}",)}},
        {"settings": {"preserve_prompts": ("a sketch of a house",)}},
        {"settings": {"neutral_object": "sketch"}},
    ],
)
def test_a_word_that_a_person_wrote_is_refused(changes):
    asked = ForgetRequest(**({"concepts": STAR.concepts, "preserve": STAR.preserve} | changes))
    with pytest.raises(TokenError, match=r"'sketch'.* is the name of a textual inversion"):
        fit(model_with("sketch"), asked)
    fit(model_with("moonlight"), asked)


def test_choices_and_presets_are_not_words_that_a_person_wrote():
    """ "art" stands in a preset, "last" is the value of a choice."""
    asked = ForgetRequest(STAR.concepts, preset="published", settings={"columns": "last"})
    fit(model_with("art", "last", "published", "uce"), asked)


def test_the_hosts_database_is_as_it_was():
    text = web_text("sketch")
    assert text.reserved("a sketch of it") == "sketch" and text.reserved("a star") is None
    plain = web_text()
    for prompt in ("a sketch of a star", "", "star"):
        assert torch.equal(text.encode([prompt]).hidden, plain.encode([prompt]).hidden)
        assert text.token_ids(prompt) == plain.token_ids(prompt)
    assert tail_positions(text, "star", "a sketch of a star") == tail_positions(plain, "star", "a sketch of a star")
    assert text._engine.tokenize_line("a sketch")[0][0].tokens[2] == 0, "the webui itself still puts its vectors in"
    assert vars(text._embeddings[0]).keys() == {"known"}


def test_an_error_while_encoding_leaves_the_database_as_it_was():
    text = web_text("sketch")

    def broken(prompts):
        raise RuntimeError

    text._encode = broken
    with pytest.raises(RuntimeError):
        text.encode(["a"])
    assert text.reserved("sketch") == "sketch"


def test_encoders_without_textual_inversions_reserve_nothing():
    check_words(TinyText(), ["embedding:x", "sketch"])
