"""What the nodes that forget read and refuse, beside a stand-in for the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakenodes import loaded_nodes
from tiny import tiny_model

from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.history import read_history
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

BOXES = {
    "concept": "star",
    "kind": "object",
    "replacement": "",
    "preserve": "moon",
    "method": "uce",
    "preset": "tuned",
    "strength": 1.0,
    "seed": 0,
}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


@pytest.fixture()
def nodes(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    yield from loaded_nodes(model, monkeypatch)


@pytest.mark.parametrize(
    ("box", "text", "says"),
    [
        ("concept", "(star:1.3) -> circle", r"concept '\(star:1.3\)' is words with a weight.*write 'star'"),
        ("concept", "embedding:foo", "concept 'embedding:foo' is a textual inversion"),
        ("concept", "tree\nROCK AND ROLL", "write 'ROCK and ROLL'"),
        ("replacement", "[circle]", r"replacement of 'star', '\[circle\]' is words with emphasis"),
        ("preserve", "tree, {moon|sun}", "preserve list"),
        ("settings", '{"templates": ["a photo of {} <lora:x:1>"]}', "setting 'templates'"),
    ],
)
@pytest.mark.parametrize("node", ["ForgetConcept", "ForgetInSequence"])
def test_prompt_syntax_is_refused(nodes: SimpleNamespace, node: str, box: str, text: str, says: str) -> None:
    module = nodes.forget_concept if node == "ForgetConcept" else nodes.forget_in_sequence
    with pytest.raises(nodes.common.NodeError, match=says):
        getattr(module, node).execute(None, None, **BOXES | {box: text})


def test_prompt_syntax_is_refused_in_json(nodes: SimpleNamespace) -> None:
    text = ForgetRequest((Concept("star", replacement="(circle:1.2)"),)).to_json()
    with pytest.raises(nodes.common.NodeError, match="write 'circle'"):
        nodes.forget_by_request.ForgetByRequest.execute(None, None, request=text)


def test_escaped_brackets_are_brackets(nodes: SimpleNamespace) -> None:
    execute = nodes.forget_concept.ForgetConcept.execute
    _, plain, _ = execute(None, None, **BOXES | {"concept": "saber_(fate)", "preserve": "archer (fate)"})
    _, escaped, _ = execute(None, None, **BOXES | {"concept": r"saber_\(fate\)", "preserve": r"archer \(fate\)"})
    assert plain.metadata == escaped.metadata


@pytest.mark.parametrize("node", ["ForgetConcept", "ForgetInSequence"])
def test_a_theme_is_forgotten(nodes: SimpleNamespace, tmp_path: Path, node: str) -> None:
    (tmp_path / "birds.txt").write_text("hawk\nraven -> cloud\n", encoding="utf-8")
    module = nodes.forget_concept if node == "ForgetConcept" else nodes.forget_in_sequence
    nodes.common.host.theme_folders = lambda: [tmp_path]
    execute = getattr(module, node).execute
    boxes = BOXES | {"concept": "", "replacement": "leaf", "theme": "birds"}
    _, alone, _ = execute(None, None, **boxes)
    _, both, _ = execute(None, None, **boxes | {"concept": "star"})
    _, none, _ = execute(None, None, **BOXES | {"theme": "none"})
    assert concepts(alone) == [("hawk", "leaf"), ("raven", "cloud")]
    assert concepts(both) == [("star", "leaf"), ("hawk", "leaf"), ("raven", "cloud")]
    assert concepts(none) == [("star", None)]
    with pytest.raises(nodes.common.NodeError, match="'fun' is not known"):
        execute(None, None, **boxes | {"theme": "fun"})
    with pytest.raises(nodes.common.NodeError, match="concept is empty"):
        execute(None, None, **BOXES | {"concept": "", "theme": "none"})


def concepts(lora: Any) -> list[tuple[str, str | None]]:
    """Names and replacements of the concepts that a patch records."""
    return [(one.name, one.replacement) for one in read_history(lora.metadata).concepts]


def test_a_settings_node_of_an_older_graph_takes_what_it_lacks_from_the_preset(nodes: SimpleNamespace) -> None:
    """A graph in API format holds the inputs that existed when it was saved."""
    for node in nodes.settings_nodes.settings_nodes():
        method = node.METHOD
        for preset in method.presets:
            (settings,) = node.execute(preset)
            assert (settings.method, settings.preset, dict(settings.values)) == (method.id, preset, {})
