"""Locales and help pages are what nodes and settings say of themselves."""

from __future__ import annotations

import json
import re
import warnings

import pytest

from forget_concept.core.methods.registry import all_methods
from forget_concept.core.service.forms import form_fields
from forget_concept.nodes import generate, help_pages
from forget_concept.nodes.declared import declared_nodes
from forget_concept.nodes.fields import node_id
from forget_concept.nodes.generate import ROOT, escaped, plain

METHODS = [pytest.param(method, id=name) for name, method in all_methods().items()]
LANGUAGES = ["en", "zh"]


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_every_generated_file_is_up_to_date() -> None:
    files = generate.generated()
    outdated = [str(path.relative_to(ROOT)) for path, text in files.items() if path.read_bytes() != text.encode()]
    assert not outdated, "run 'make generated'"
    assert {path.relative_to(ROOT).as_posix() for path in files} >= {
        f"locales/{one}/nodeDefs.json" for one in LANGUAGES
    }


def test_an_outdated_file_is_found_and_written(monkeypatch, tmp_path, capsys) -> None:
    path = tmp_path / "page.md"
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "generated", lambda: {path: "new\n"})
    monkeypatch.setattr(generate, "missing_translations", lambda: {"xx": ["A text."]})
    for old in (None, "old\n", "new\r\n"):
        if old is not None:
            path.write_bytes(old.encode())
        assert generate.main(["--check"]) == 1
        assert "page.md" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert path.read_bytes() == b"new\n" and "A text." in capsys.readouterr().out
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_help_page_of_a_method_explains_every_field(method) -> None:
    page = help_pages.place(method).read_text(encoding="utf-8")
    for field in form_fields(method):
        assert f"| **{field.name}** | {field.help} |" in page
    for language in LANGUAGES:
        entry = locale(language)[node_id(method)]
        assert list(entry["inputs"]) == ["preset", *(field.name for field in form_fields(method))]


def test_every_node_has_a_page_and_texts_in_every_language() -> None:
    nodes = declared_nodes()
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(nodes)
    for language in LANGUAGES:
        texts = locale(language)
        assert set(texts) == set(nodes)
        for name, node in nodes.items():
            assert name.startswith("ForgetConcept")
            assert plain(texts[name]["display_name"]) and plain(texts[name]["description"])
            assert list(texts[name]["inputs"]) == [socket.id for socket in node.inputs]
            assert list(texts[name]["outputs"]) == [str(i) for i in range(len(node.outputs))]
            for entry in [*texts[name]["inputs"].values(), *texts[name]["outputs"].values()]:
                assert plain(entry["name"]) and plain(entry["tooltip"])
    assert re.search("[\u4e00-\u9fff]", locale("zh")["ForgetConcept"]["display_name"])


def test_texts_without_a_translation_are_listed_and_few() -> None:
    """They are ``null`` in the language's texts.json, English on the page, and named by a warning here."""
    for language, missing in generate.missing_translations().items():
        catalogue = json.loads((ROOT / "locales" / language / "texts.json").read_text(encoding="utf-8"))
        assert missing == [text for text, known in catalogue["texts"].items() if known is None]
        if missing:
            warnings.warn(f"not translated into {language}: {'; '.join(missing)}", stacklevel=1)
        assert len(missing) <= len(catalogue["texts"]) / 10, f"too little is translated into {language}: {missing}"


def test_a_catalogue_follows_the_texts() -> None:
    """A new text is null and shown in English; a text that is gone is put aside, and found again when it comes back."""
    english = {"Node": {"display_name": "Old", "description": "Kept", "inputs": {}, "outputs": {}}}
    catalogue = {"texts": {"Old": "alt", "Kept": "behalten"}, "in_place": {"Gone/description": "weg"}, "unused": {}}
    assert generate._merged(english, catalogue) == {**catalogue, "in_place": {}}
    english["Node"]["display_name"] = "New"
    merged = generate._merged(english, catalogue)
    assert merged == {"texts": {"New": None, "Kept": "behalten"}, "in_place": {}, "unused": {"Old": "alt"}}
    translated = generate._translated(english, merged)["Node"]
    assert (translated["display_name"], translated["description"]) == ("New", "behalten")
    english["Node"]["display_name"] = "Old"
    assert generate._merged(english, merged)["texts"] == {"Old": "alt", "Kept": "behalten"}
    merged["in_place"] = {"Node/description": "anders"}
    assert generate._translated(english, merged)["Node"]["description"] == "anders"


@pytest.mark.parametrize("text", ["plain", 'JSON: {"rank": 8}', "a@b|c", "{}", "{'@'}"])
def test_a_locales_text_compiles_to_what_it_says(text: str) -> None:
    assert plain(escaped(text)) == text
    if re.search("[{}@|]", text):
        with pytest.raises(ValueError):
            plain(text.replace("{'@'}", "@"))


def test_reading_the_nodes_leaves_no_host_behind() -> None:
    import sys

    before = set(sys.modules)
    assert declared_nodes().keys() == declared_nodes().keys()
    assert not {name for name in set(sys.modules) - before if name.startswith("comfy") or ".nodes." in name}
    with pytest.raises(ImportError):
        import forget_concept.nodes.settings_nodes  # noqa: F401


# what graphs in API format of every version have: an input that is added later must be optional
REQUIRED = {
    "ForgetConcept": "model clip concept kind replacement preserve method preset strength seed",
    "ForgetConceptApplyPatch": "model lora strength",
    "ForgetConceptAttentionMap": "model clip vae prompt phrase seed steps guidance",
    "ForgetConceptByRequest": "model clip request",
    "ForgetConceptCombinePatches": "lora_a strength_a strength_b strength_c strength_d max_rank",
    "ForgetConceptEvaluate": "model clip vae lora strength concept count seed steps baselines attacks m_score "
    "benchmark clip_judge filename",
    "ForgetConceptFisherInformation": "model clip preset",
    "ForgetConceptInSequence": "model clip concept kind replacement preserve method preset strength seed",
    "ForgetConceptInspectPatch": "lora",
    "ForgetConceptLoadEmbeddedModel": "",
    "ForgetConceptLoadPatch": "file",
    "ForgetConceptReferenceImages": "images concept",
    "ForgetConceptSavePatch": "lora filename precision",
    "ForgetConceptTakeBack": "model clip lora which",
}


def test_no_node_requires_more_than_saved_graphs_have() -> None:
    settings = {node_id(method): "preset" for method in all_methods().values()}
    for name, node in declared_nodes().items():
        required = {socket.id for socket in node.inputs if not socket.optional}
        assert required == set({**REQUIRED, **settings}[name].split()), name
