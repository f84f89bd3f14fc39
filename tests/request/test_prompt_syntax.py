"""Prompt syntax in a request is refused with the words to write instead; names with brackets are names."""

from __future__ import annotations

import dataclasses
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forget_concept.core.errors import RequestError
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.prompt_syntax import check_no_syntax, plain_words
from forget_concept.core.request.request import ForgetRequest

WORD = st.text(string.ascii_lowercase, min_size=1, max_size=8)
WORDS = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
WEIGHT = (
    st.floats(0, 3).map("{:.2f}".format) | st.integers(0, 9).map(str) | st.sampled_from(["+1.1", ".5", "1.", "1e0"])
)
# each with the words that it stands for; None: there are none
SYNTAX = {
    "a weight": st.builds(lambda w, n: (f"({w}:{n})", w), WORDS, WEIGHT),
    "a weight with blanks": st.builds(lambda w, n: (f"( {w} : {n} )", w), WORDS, WEIGHT),
    "emphasis": st.builds(lambda w, k: ("(" * k + w + ")" * k, w), WORDS, st.integers(2, 4)),
    "less emphasis": st.builds(lambda w, k: ("[" * k + w + "]" * k, w), WORDS, st.integers(1, 3)),
    "braces": st.builds(lambda w, k: ("{" * k + w + "}" * k, w), WORDS, st.integers(1, 3)),
    "a section": st.builds(lambda a, b: (f"{a} BREAK {b}", f"{a} break {b}"), WORDS, WORDS),
    "a conjunction": st.builds(lambda a, b: (f"{a} AND {b}", f"{a} and {b}"), WORDS, WORDS),
    "a textual inversion": WORD.map(lambda w: (f"embedding:{w}", None)),
    "a weighted textual inversion": st.builds(lambda w, n: (f"(embedding:{w}:{n})", None), WORD, WEIGHT),
    "a LoRA": st.builds(
        lambda w, n, kind: (f"<{kind}:{w}:{n}>", None), WORD, WEIGHT, st.sampled_from(["lora", "lyco"])
    ),
    "a wildcard": WORD.map(lambda w: (f"__{w}__", None)),
    "a wildcard of a folder": st.builds(lambda a, b: (f"__{a}/{b}*__", None), WORD, WORD),
    "a choice": st.lists(WORDS, min_size=2, max_size=4).map(
        lambda several: ("{" + "|".join(several) + "}", several[0])
    ),
    "turns": st.lists(WORDS, min_size=2, max_size=4).map(lambda several: ("[" + "|".join(several) + "]", several[0])),
    "an exchange": st.builds(lambda a, b, n: (f"[{a}:{b}:{n}]", a), WORDS, WORDS, WEIGHT),
}
ANY = st.one_of(*SYNTAX.values())


def refusal(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        check_no_syntax(text, "The concept")
    return str(caught.value)


@pytest.mark.parametrize("kind", SYNTAX)
@given(st.data())
def test_every_kind_is_refused_with_the_words_that_it_stands_for(kind: str, data: st.DataObject) -> None:
    text, words = data.draw(SYNTAX[kind])
    message = refusal(text)
    assert message.startswith(f"The concept '{text}'")
    assert f"write '{words}'." in message if words else "write in words what it shows" in message


@given(WORDS, ANY, WORDS)
def test_it_is_found_inside_of_other_words_and_the_advice_is_accepted(before: str, syntax, after: str) -> None:
    text = f"{before} {syntax[0]} {after}"
    if syntax[0].startswith(("[", "{")) and not set("|:") & set(syntax[0]) and syntax[0][:2] not in ("[[", "{{"):
        return  # a bracket inside of a name is a part of the name
    refusal(text)
    words = plain_words(text)
    check_no_syntax(words, "The concept")
    assert before in words and after in words


@given(st.text("abAND (:1.3)[]{}|<>lora_\\", max_size=30))
def test_the_advice_is_always_accepted(text: str) -> None:
    words = plain_words(text)
    check_no_syntax(words, "The concept")
    assert plain_words(words) == words


@pytest.mark.parametrize(
    "name",
    [
        *("saber_(fate)", r"saber_\(fate\)", "house (small)", "Guns (N) Roses", "(o)_(o)", ":(", ">:(", ":[", "((("),
        *(
            "rock and roll",
            "BREAKFAST",
            "BRANDING",
            "A_AND_B",
            "k-on!",
            "<3",
            ">_<",
            "<|>_<|>",
            "^_^",
            "foo__bar",
            "__",
        ),
        *("star:1.3", "episode 4: a new hope", "re:zero", "ratio 16:9", "nier (series) 2b", "sword [old] art", r"\m/"),
        *("100%", "a|b", "C{", "l'été", "gundam_00", "((a) b)", "", "embedding", "an embedding of x"),
    ],
)
def test_names_are_names(name: str) -> None:
    check_no_syntax(name, "The concept")


@given(WORD, WORD)
def test_a_tag_with_brackets_is_a_name_and_its_escapes_are_read(name: str, series: str) -> None:
    tag, escaped = f"{name}_({series})", rf"{name}_\({series}\)"
    plan = plan_request(ForgetRequest((Concept(escaped, replacement=escaped + "x"),), (f"{escaped} y",)))
    assert plan.request.concepts == (Concept(tag, replacement=tag + "x"),)
    assert plan.request.preserve == (f"{tag} y",)
    assert plan_request(plan.request) == plan


@given(ANY)
def test_a_plan_refuses_it_in_every_input(syntax) -> None:
    text, _ = syntax
    for changes, where in (
        ({"concepts": (Concept(text),)}, f"The concept '{text}'"),
        ({"concepts": (Concept("star", replacement=text),)}, f"The replacement of 'star', '{text}'"),
        ({"concepts": (Concept("star"), Concept(text))}, f"The concept '{text}'"),
        ({"preserve": ("moon", text)}, f"The entry of the preserve list '{text}'"),
        (
            {"settings": {"preserve_prompts": ["a house", text]}},
            f"The setting 'preserve_prompts' with the text '{text}'",
        ),
    ):
        with pytest.raises(RequestError) as caught:
            plan_request(dataclasses.replace(ForgetRequest((Concept("star"),)), **changes))
        assert str(caught.value).startswith(where)


def test_escapes_in_settings_are_read_and_templates_stay() -> None:
    asked = ForgetRequest(
        (Concept("star"),), settings={"templates": ["a photo of {}"], "preserve_prompts": [r"saber \(fate\)"]}
    )
    plan = plan_request(asked)
    assert plan.settings.templates == ("a photo of {}",)
    assert plan.settings.preserve_prompts == ("saber (fate)",)
    assert plan_request(plan.request) == plan


def test_a_very_long_text_takes_no_long_time() -> None:
    for text in ("(" * 100_000, "[" * 50_000 + "]" * 50_000, ":" * 100_000, " " * 100_000 + "x", "{|" * 50_000):
        plain_words(text)
