"""What a person writes into boxes, and what is said of what was done: no host in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import fit

from forget_concept.core.errors import ForgetConceptError, RequestError
from forget_concept.core.files.names import fresh_file, patch_name
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.patch.history import requests_to_restore
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import ProgressEvent
from forget_concept.core.request.concept import KINDS, Concept
from forget_concept.core.request.parsing import parse_request, split_list
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.progress_text import ProgressText
from forget_concept.core.service.summaries import (
    base_model_summary,
    concept_names,
    fit_summary,
    patch_summary,
    surviving_share_summary,
)


def request(**more) -> ForgetRequest:
    return ForgetRequest((Concept("star", "object", "circle"),), **more)


def test_lists_are_by_commas_or_lines() -> None:
    assert split_list(" star,\n Mira Vale ,,\n") == ["star", "Mira Vale"]
    assert split_list("") == []
    assert split_list("红星、月亮,房子\r\nنجمة، قمر") == ["红星", "月亮", "房子", "نجمة", "قمر"]
    assert split_list("\u200eכוכב\u200f, \ufeff, 👩\u200d🚀") == ["כוכב", "👩\u200d🚀"]


def test_boxes_make_a_request() -> None:
    request = parse_request("star\nmoon", "object", "circle", "heart, tree", "uce", "published", 0.5, 7, '{"rank": 8}')
    assert request.concepts == (Concept("star", "object", "circle"), Concept("moon", "object", "circle"))
    assert request.preserve == ("heart", "tree")
    assert (request.method, request.preset, request.strength, request.seed) == ("uce", "published", 0.5, 7)
    assert dict(request.settings) == {"rank": 8}
    assert parse_request("star").concepts == (Concept("star"),)
    each = parse_request("star, moon", replacement="circle, heart").concepts
    assert [concept.replacement for concept in each] == ["circle", "heart"]


def test_a_concept_says_its_own_kind_and_replacement() -> None:
    text = "star -> circle\nneon (style) \u2192 sketch\nLena Frost (identity)\nhouse (small)->\nfish"
    assert parse_request(text, replacement="Nadia Pell, arrow").concepts == (
        Concept("star", "object", "circle"),
        Concept("neon", "style", "sketch"),
        Concept("Lena Frost", "identity", "Nadia Pell"),
        Concept("house (small)", "object", None),
        Concept("fish", "object", "arrow"),
    )
    assert parse_request("neon (style)", "object", "sketch").concepts == (Concept("neon", "style", "sketch"),)


@given(
    st.from_regex(r"[a-z]{1,6}(_[a-z]{1,6})?", fullmatch=True),
    st.sampled_from(["", "_"]),
    st.sampled_from([*KINDS, "fate", "series"]),
    st.booleans(),
)
def test_a_tag_with_its_qualifier_is_a_name(word: str, joint: str, qualifier: str, escaped: bool) -> None:
    """Booru tags qualify names in brackets; only a blank before the bracket makes it a kind."""
    tag = f"{word}{joint}({qualifier})"
    typed = tag.replace("(", r"\(").replace(")", r"\)") if escaped else tag
    (concept,) = parse_request(f"{typed} -> {typed}x", "identity").concepts
    assert concept == Concept(tag, "identity", f"{tag}x")
    (concept,) = parse_request(f"{typed} (style)", "identity").concepts
    assert concept == Concept(tag, "style")
    assert parse_request("moon", replacement=typed).concepts == (Concept("moon", "object", tag),)


def test_an_escaped_bracket_never_states_a_kind() -> None:
    assert parse_request(r"poster \(object\)", "style").concepts == (Concept("poster (object)", "style"),)


def test_a_name_that_looks_like_a_kind_is_explained(model) -> None:
    asked = parse_request("poster_(object), hatsune_miku, moon (object)", "style")
    patch = fit(model, request())
    notes = [line for line in fit_summary(asked, patch, 1.0, "T").splitlines() if "was read as a name" in line]
    assert len(notes) == 1 and "'poster_(object)'" in notes[0] and "kind style" in notes[0]
    assert "'poster (object)'" in notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"concept": "  \n, "}, "The concept is empty"),
        ({"concept": "a, b, c", "replacement": "d, e"}, "3 concepts and 2 replacements"),
        ({"concept": "star -> circle, moon -> heart", "replacement": "ship"}, "leave the replacement empty"),
        (
            {"concept": "star -> circle, moon", "replacement": "ship, tree"},
            "1 concepts and 2 replacements",
        ),
        ({"concept": "-> circle"}, "nothing before its arrow"),
        ({"concept": "(style)"}, "nothing before its arrow"),
        ({"concept": "star", "settings": "[1]"}, "must be a JSON object"),
        ({"concept": "star", "settings": "{"}, "not JSON"),
        ({"concept": "star", "settings": "[" * 100000}, "not JSON"),
    ],
)
def test_boxes_that_make_none_say_why(words: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request(**words)


def test_a_patch_in_words(model) -> None:
    asked = request(preserve=("moon",), settings={"ridge": 2.0})
    patch = fit(model, asked)
    words = patch_summary(patch)
    assert "1. forgotten: star (object), shown as 'circle'; uce, preset tuned, strength 1, seed 0" in words
    assert "kept: moon" in words and "ridge" in words and f"rank {patch.rank}" in words
    sum_words = patch_summary(Patch.combined([(patch, 1.0), (patch, -0.5)]))
    assert "part at strength 1: star" in sum_words and "part at strength -0.5: star" in sum_words
    assert "not written by Forget Concept" in patch_summary(Patch(patch.factors))
    both = Patch.combined([(patch, 1.0), (Patch.combined([(patch, 1.0), (patch, 1.0)]), 1.0)])
    assert base_model_summary(both.metadata, model.model_hash) == "it was made on this very model"
    assert "another model" in base_model_summary(both.metadata, "0" * 64)
    other = patch.with_metadata(base_model="1" * 64)
    assert "different models" in base_model_summary(
        Patch.combined([(patch, 1.0), (other, 1.0)]).metadata, model.model_hash
    )
    assert "does not say" in base_model_summary({}, model.model_hash)
    many = ForgetRequest(tuple(Concept(f"thing {i}") for i in range(200)))
    assert "188 more" in fit_summary(many, patch, 1.0, "T")


def test_a_high_strength_is_warned_of(model) -> None:
    patch = fit(model, request())
    assert "warning" not in fit_summary(request(strength=1.5), patch, 1.0, "T")
    assert "warning: The strength 3 " in fit_summary(request(strength=3.0), patch, 1.0, "T")


def test_a_share_below_a_half_is_a_warning() -> None:
    assert surviving_share_summary(None) == []
    assert surviving_share_summary((0.5, "float16")) == ["in the host's weights (float16) 50.0 % of the edit survives"]
    assert "warning" in surviving_share_summary((0.499, "float16"))[1]


def test_time_left_is_that_of_the_steps_of_this_kind() -> None:
    now = 0.0
    text = ProgressText(lambda: now)
    assert text.line(ProgressEvent(0, 4, message="sampling")) == "sampling 0/4"
    now = 10.0
    assert text.line(ProgressEvent(1, 4, message="sampling")) == "sampling 1/4, 0:30 left"
    # another kind of work: the clock begins again
    now = 100.0
    assert text.line(ProgressEvent(1, 1001, 0.123456, message="training")) == "training 1/1001, loss 0.1235"
    now = 102.0
    assert text.line(ProgressEvent(2, 1001, 0.5, message="training")) == "training 2/1001, loss 0.5, 33:18 left"
    now = 202.0
    assert text.line(ProgressEvent(3, 1001, message="training")).endswith("14:08:18 left")
    assert "left" not in text.line(ProgressEvent(1001, 1001, message="training"))


def test_what_is_taken_back_is_named_or_numbered(model) -> None:
    asked = (
        History()
        .forget(model, plan_request(request()))
        .forget(model, plan_request(ForgetRequest((Concept("7"),))))
        .records
    )
    assert requests_to_restore("star, 1, #2,7", asked) == ["star", 1, 2, "7"]
    with pytest.raises(RequestError, match="Nothing is named"):
        requests_to_restore(" ,", asked)


def test_names_of_files() -> None:
    assert patch_name("forget/%concept%", ["Mira Vale", "red star"]) == ("forget", "mira-vale-red-star")
    assert patch_name("a\\b/c", ["x"]) == ("a", "b", "c")
    assert patch_name("%concept%", ["نجمة", "🌟"]) == ("نجمة",)
    assert patch_name("%concept%", ["🌟"]) == ("concept",)
    assert patch_name("%concept%", [f"c{i}" for i in range(200)]) == ("c0-c1-c2-and-197-more",)
    assert patch_name("v1..2", []) == ("v1..2",)


@given(st.text(max_size=40))
def test_no_name_leads_out_of_the_folder(text: str) -> None:
    root = Path("/loras")
    try:
        parts = patch_name(text, ["star"])
    except RequestError:
        return
    place = root.joinpath(*parts)
    assert place.resolve() == place and root in place.parents
    assert not any(set(part) & set('<>:"|?*\\/\0') or part.endswith((".", " ")) for part in parts)


def test_a_patch_says_what_it_forgets() -> None:
    assert concept_names({"forget_concept.concepts": '["star", "moon", "star"]'}) == ["star", "moon"]
    for other in ({}, {"forget_concept.concepts": "{"}, {"forget_concept.concepts": '{"a": 1}'}):
        assert concept_names(other) == []


def test_a_new_files_number_is_free_for_every_ending(tmp_path: Path) -> None:
    (tmp_path / "Star_00001.json").touch()
    (tmp_path / "star_00002.html").touch()
    assert fresh_file(tmp_path, "star", ".html") == tmp_path / "star_00003.html"
    assert fresh_file(tmp_path, "sta", ".html") == tmp_path / "sta_00001.html"
    with pytest.raises(RequestError, match="not inside the output folder"):
        patch_name("../x", [], "the output folder")
    with pytest.raises(ForgetConceptError, match="cannot be read"):
        fresh_file(tmp_path / "none", "star", ".html")
