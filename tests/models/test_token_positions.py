"""Where a phrase stands: sub-words, several occurrences, cut-off prompts; and the encoders of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyText, clip_parts

from forget_concept.core.errors import ModelError, TokenError
from forget_concept.core.models.text_encoders import CLIPText, SDXLText
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.models.token_positions import end_position, phrase_span, tail_positions, token_positions

TEXT = TinyText()


@settings(max_examples=150, deadline=None)
@given(
    phrase=st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=3),
    gaps=st.lists(st.lists(st.text("xyz", min_size=1, max_size=9), max_size=4), min_size=2, max_size=4),
)
def test_positions_spell_the_phrase_and_are_all(phrase, gaps):
    phrase = " ".join(phrase)
    prompt = " ".join(w for i, gap in enumerate(gaps) for w in ([phrase] if i else []) + gap)
    wanted = TEXT.phrase_ids(phrase)
    if len(TEXT.phrase_ids(prompt)) > 75:
        with pytest.raises(TokenError, match="cut off"):
            if end_position(TEXT, prompt):
                pytest.fail("a cut-off prompt has no end of its own")
        return
    found = token_positions(TEXT, phrase, prompt)
    ids = TEXT.token_ids(prompt)
    assert [ids[i] for i in found] == wanted * (len(gaps) - 1)
    assert found == sorted(set(found))
    assert tail_positions(TEXT, phrase, prompt) == list(range(found[0], 77))
    assert phrase_span(TEXT, phrase, prompt) == (found[0], len(wanted))
    assert end_position(TEXT, prompt) > max(found)
    assert TEXT.token_ids(prompt)[end_position(TEXT, prompt)] == TEXT.END


def test_words_inside_other_words_are_no_occurrence():
    with pytest.raises(TokenError, match="does not occur"):
        token_positions(TEXT, "rain", "a rainbow")
    assert token_positions(TEXT, "RAIN", "rain, rainbow") == [1]


@pytest.mark.parametrize(
    ("phrase", "prompt", "wanted"),
    [
        # "starfish" is "star" + "fish_" here: its last sub-word is all of "fish"
        ("fish", "a starfish and a fish", [6]),
        ("fish", "a FISH, starfish", [2]),
        ("house (small)", "a house (small), red", [2, 3, 4, 5, 6, 7]),
        ("star", "the star's star_shape (star)", [2, 9]),
        ("caf\u00e9", "the cafe\u0301", [2]),
        ("stained  glass", "a stained\nglass", [2, 3, 4, 5]),
        ("C++", "c++, c", [1, 2, 3]),
    ],
)
def test_a_phrase_is_found_as_words(phrase, prompt, wanted):
    assert token_positions(TEXT, phrase, prompt) == wanted


def test_a_longer_word_that_ends_in_the_phrases_sub_words_is_none_of_it():
    assert TEXT.phrase_ids("starfish")[-1:] == TEXT.phrase_ids("fish")
    with pytest.raises(TokenError, match="does not occur"):
        token_positions(TEXT, "fish", "a starfish")


def test_what_cannot_be_found_is_said():
    with pytest.raises(TokenError, match="no tokens"):
        token_positions(TEXT, "  ", "a star")
    with pytest.raises(TokenError, match=r"cut off.*77"):
        token_positions(TEXT, "star", "a " * 75 + "star")
    with pytest.raises(TokenError, match="cut off"):  # half of it is before the cut, half after
        token_positions(TEXT, "butterfly", "a " * 74 + "butterfly")
    with pytest.raises(TokenError, match="cut off"):  # one of two
        token_positions(TEXT, "star", "star " + "a " * 75 + "star")
    assert token_positions(TEXT, "star", "a " * 74 + "star") == [75]


def test_states():
    states = TextStates(torch.arange(12.0).view(3, 2, 2), torch.arange(3.0)[:, None])
    assert len(states) == 3
    picked = states.index([2, 0, 2])
    assert picked.hidden[0].equal(states.hidden[2]) and picked.pooled[:, 0].tolist() == [2, 0, 2]
    both = TextStates.cat([states, picked])
    assert len(both) == 6 and both.pooled.shape == (6, 1)
    assert states.to(dtype=torch.float64).hidden.dtype == torch.float64
    assert TextStates(states.hidden).index([1]).pooled is None


def test_clip(tmp_path):
    model, tokenizer = clip_parts(tmp_path)
    text = CLIPText(model, tokenizer)
    ids = text.token_ids("a star, Starfish")
    assert len(ids) == text.max_length == 77
    assert len(text.phrase_ids("star")) == 1 and text.phrase_ids("Star") == text.phrase_ids("star")
    assert token_positions(text, "star", "a star, Starfish") == [2]
    assert end_position(text, "a star") == 3
    assert len(text.phrase_ids("x " * 200)) == 200
    with pytest.raises(TokenError, match="cut off"):
        token_positions(text, "star", "a " * 80 + "star")
    # this tokenizer too reads "),": one run of punctuation, whose sub-words are not those of ")"
    found = token_positions(text, "star (a)", "a star (a), b")
    assert found[0] == 2 and found == list(range(2, found[-1] + 1))
    assert found[-1] == len(text.phrase_ids("a star (a),"))
    hidden = text.encode(["a star", ""]).hidden
    assert hidden.shape == (2, 77, 32) and not hidden.requires_grad
    both = text.encode(["a star", "a star on grass"]).hidden
    torch.testing.assert_close(both[0, :3], both[1, :3], atol=1e-5, rtol=1e-4)  # causal
    assert not torch.allclose(both[0, 4:], both[1, 4:], atol=1e-2)


def test_clip_skip_counts_layers_from_the_end(tmp_path):
    model, tokenizer = clip_parts(tmp_path)
    first, second = CLIPText(model, tokenizer), CLIPText(model, tokenizer, clip_skip=2)
    ids = torch.tensor([first.token_ids("a star")])
    layers = model(ids, output_hidden_states=True).hidden_states
    norm = getattr(model, "text_model", model).final_layer_norm  # transformers 5 has no text_model
    torch.testing.assert_close(first.encode(["a star"]).hidden, norm(layers[-1]))
    torch.testing.assert_close(second.encode(["a star"]).hidden, norm(layers[-2]))
    assert first.layer != second.layer
    with pytest.raises(ModelError, match="1 to 3"):
        CLIPText(model, tokenizer, clip_skip=4)


def test_sdxl(tmp_path):
    model, tokenizer = clip_parts(tmp_path)
    model_2, tokenizer_2 = clip_parts(tmp_path / "2", projection=True, seed=1)
    text = SDXLText(model, model_2, tokenizer, tokenizer_2)
    states = text.encode(["a star", ""])
    assert states.hidden.shape == (2, 77, 64) and states.pooled.shape == (2, 16)
    ids = torch.tensor([text.token_ids("a star")])
    torch.testing.assert_close(states.hidden[:1, :, :32], model(ids, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(states.pooled[:1], model_2(ids).text_embeds)
    assert token_positions(text, "star", "a star") == [2]
