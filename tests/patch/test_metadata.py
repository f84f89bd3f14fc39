"""A patch's metadata: read and written without loss, tolerant of what others write, spelled in one place."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from tiny import random_patch, tiny_model

from forget_concept.core.errors import PatchError
from forget_concept.core.patch.metadata import CombinedPart, PatchMetadata, own_entries, with_output_name
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

ROOT = Path(__file__).resolve().parents[2]
REQUEST = ForgetRequest((Concept('Λένα, "x"', "identity", ""),), ("a moon",), seed=3, strength=0.5)
# as version 0.1 wrote them
OLD = {
    "forget_concept.version": "0.1.0",
    "forget_concept.method": "forget_me_not",
    "forget_concept.preset": "tuned",
    "forget_concept.settings": '{"rank": 8, "templates": null, "train": ["to_k", "to_v"], "lr": 1e-05}',
    "forget_concept.request": '{"schema": 1, "concepts": [{"name": "été", "kind": "style"}], "preserve": [], '
    '"method": "forget_me_not", "preset": "tuned", "settings": {"rank": 8}, "strength": 1.0, "seed": 0}',
    "forget_concept.concepts": '["été"]',
    "forget_concept.strength": "1.0",
    "forget_concept.seed": "18446744073709551615",
    "forget_concept.base_model": "0" * 64,
    "forget_concept.base_name": "mini",
    "forget_concept.family": "other",
    "forget_concept.architecture": "abc",
    "forget_concept.text_layer": "last",
    "forget_concept.trained": "to_k,to_v",
    "forget_concept.terms": '{"first": {"attention": 0.25}, "last": {"attention": 0.0625}}',
    "ss_network_dim": "8",
    "workflow": "{}",
    "forget_concept.of_a_newer_version": "x",
}


def test_a_file_of_an_earlier_version_is_read_typed_and_written_as_it_was():
    about = PatchMetadata.from_strings(OLD)
    assert about.to_strings() == OLD and not about.malformed
    assert (about.method, about.seed, about.strength) == ("forget_me_not", 2**64 - 1, 1.0)
    assert about.settings is not None and about.settings["train"] == ["to_k", "to_v"]
    assert about.request is not None and about.request.concepts == (Concept("été", "style"),)
    assert (about.concepts, about.trained, about.projections) == (("été",), ("to_k", "to_v"), None)
    assert about.foreign.keys() == {"ss_network_dim", "workflow", "forget_concept.of_a_newer_version"}
    assert "seed" in about and "projections" not in about and "foreign" not in about
    about.check()


def test_every_field_comes_back_from_its_text():
    part = CombinedPart(-0.5, {"forget_concept.method": "uce", "other": "1"})
    values = {
        **dict.fromkeys(("method", "preset", "base_model", "base_name", "family", "architecture"), "x = é"),
        **dict.fromkeys(("text_layer", "version", "note", "format"), ""),
        "settings": {"rank": None, "lr": 1e-5},
        "request": REQUEST,
        "concepts": ('Λένα, "x"', ""),
        "strength": 0.1,
        "seed": 0,
        "projections": ("to_v",),
        "trained": ("to_q", "to_k"),
        "terms": {"first": {}, "last": {}},
        "history": {"schema": 1},
        "parts": (part, CombinedPart(1.0, {})),
    }
    about = PatchMetadata(**values)
    fields = {field.name for field in dataclasses.fields(PatchMetadata)} - {"malformed", "foreign"}
    assert values.keys() == fields
    strings = about.to_strings()
    assert strings.keys() == {f"forget_concept.{name}" for name in fields}
    assert all(isinstance(text, str) for text in strings.values())
    assert PatchMetadata.from_strings(strings) == about == PatchMetadata.from_entries(about.to_entries())
    assert about.parts is not None and about.parts[0].about.method == "uce"
    assert PatchMetadata().to_strings() == {}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("settings", "{", "Expecting"),
        ("settings", "[1]", "not a JSON object"),
        ("concepts", '{"a": 1}', "not a JSON list"),
        ("concepts", "[" * 100_000, "nested too deeply"),
        ("request", '{"schema": 1}', "lacks the field 'concepts'"),
        ("strength", "inf", "not a finite number"),
        ("strength", "much", "could not convert"),
        ("seed", "-1", "not a whole number"),
        ("history", "3", "not a JSON object"),
        ("parts", '[{"strength": 1}]', "'metadata' is missing"),
        ("parts", "3", "not iterable"),
    ],
)
def test_a_malformed_entry_reads_as_missing_stays_as_it_was_and_is_an_error_where_it_is_needed(name, text, says):
    about = PatchMetadata.from_strings({f"forget_concept.{name}": text, "forget_concept.method": "uce"})
    assert getattr(about, name) is None and name not in about and about.method == "uce"
    assert about.to_strings() == {f"forget_concept.{name}": text, "forget_concept.method": "uce"}
    about.check("method")
    for names in ((), (name,)):
        with pytest.raises(PatchError, match=f"'forget_concept.{name}'.* cannot be read: .*{re.escape(says)}"):
            about.check(*names)


def test_a_patch_shows_its_metadata_typed_and_changes_single_fields():
    patch = random_patch(tiny_model().survey, metadata=dict(OLD))
    assert patch.about == PatchMetadata.from_strings(OLD)
    changed = patch.with_metadata(seed=7, note="careful")
    assert changed.metadata == {**OLD, "forget_concept.seed": "7", "forget_concept.note": "careful"}
    assert patch.metadata == OLD and changed.about.seed == 7
    with pytest.raises(TypeError, match="sead"):
        patch.with_metadata(sead=7)


def test_what_belongs_to_the_base_and_to_the_method_is_told_apart():
    about = PatchMetadata.from_strings({**OLD, "forget_concept.terms": "broken"})
    base, method = about.of_base().to_entries(), own_entries(about.of_method().to_strings())
    assert base.keys() == {"base_model", "base_name", "family", "architecture", "text_layer"}
    assert method == {"trained": "to_k,to_v", "terms": "broken", "of_a_newer_version": "x"}


def test_the_sources_of_a_combined_patch_are_found_through_all_levels():
    survey = tiny_model().survey
    one, two, three = (random_patch(survey).with_metadata(base_model=letter, family="other") for letter in "abc")
    inner = Patch.combined([(one, 1.0), (two, 0.5)])
    outer = Patch.combined([(inner, 1.0), (three, 1.0)])
    assert [source.base_model for source in outer.about.sources()] == ["a", "b", "c"]
    assert outer.about.family == "other" and outer.about.method == "combined"
    assert [source.base_model for source in one.about.sources()] == ["a"]
    broken = PatchMetadata.from_strings({"forget_concept.parts": "[", "forget_concept.base_model": "a"})
    assert broken.sources() == (PatchMetadata(),)


def test_another_name_of_a_file_changes_one_entry():
    assert with_output_name({**OLD, "ss_output_name": "old"}, "new") == {**OLD, "ss_output_name": "new"}
    assert own_entries({"ss_output_name": "x", "workflow": "y"}) == {}


def test_no_other_file_spells_a_metadata_key():
    # modules (forget_concept.core …) and the webui's script are no metadata keys; a checkpoint's prediction type is not
    # a patch's
    key = re.compile(r"forget_concept\.(?!(core|nodes|sd_webui_ext|js)\b)|\bss_[a-z]|modelspec\.(?!prediction_type)")
    files = [
        *(file for room in ("core", "nodes", "sd_webui_ext", "scripts") for file in (ROOT / room).rglob("*.py")),
        *ROOT.glob("*.py"),
    ]
    found = {}
    for file in files:
        hits = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if key.search(line)]
        if hits:
            found[file.relative_to(ROOT).as_posix()] = hits
    assert found.pop("core/patch/metadata.py", None), "the one place that spells the keys has moved"
    assert not found
