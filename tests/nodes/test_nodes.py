"""What of the ComfyUI pack can be looked at without a ComfyUI."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forget_concept
from forget_concept.core.errors import ModelError, PatchError, RequestError
from forget_concept.core.evaluation import (
    PATCHED,
    UNEDITED,
    Evaluation,
    Example,
    LabeledImage,
    Score,
    Scores,
    load_bench,
)
from forget_concept.core.evaluation.attention_pictures import AttentionMap, AttentionPair
from forget_concept.core.evaluation.outcomes import Disagreement, Outcome
from forget_concept.core.evaluation.report import Attack, Metric, MScore, Provenance, Report
from forget_concept.core.evaluation.report.verdict import verdict
from forget_concept.core.evaluation.stress import ImageToImage
from forget_concept.core.formats.lora_state import LoraState, patch_of, state_of
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.mini.world import Labels
from forget_concept.core.patch.history import read_history
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.evaluation_text import (
    attention_sheet,
    attention_summary,
    chosen_benchmark,
    evaluation_summary,
    evaluators,
    known_only,
    sheet,
)

ROOT = Path(forget_concept.__file__).parent


def imported(path: Path) -> set[str]:
    """The top names of every absolute import of a file."""
    names = set()
    for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(item, ast.Import):
            names |= {alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.level == 0 and item.module:
            names.add(item.module.split(".")[0])
    return names


def test_the_root_imports_neither_a_host_nor_torch() -> None:
    code = (
        "import sys, forget_concept as f; print(sorted({'torch', 'comfy', 'comfy_api', 'server'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_one_folder_names_the_host() -> None:
    for path in [*ROOT.glob("*.py"), *(ROOT / "core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        hosts = imported(path) & {"comfy", "server", "folder_paths", "nodes", "execution"}
        assert not hosts or path.parent == ROOT / "nodes" / "host", path
        if path.parent != ROOT / "nodes":
            assert "comfy_api" not in imported(path), path


def test_the_page_finds_its_folder() -> None:
    assert (ROOT / forget_concept.WEB_DIRECTORY / "docs" / "ForgetConcept.md").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_an_example_workflow_hangs_together(path: Path) -> None:
    """As the page's own schema 0.4 wants it: every link has both of its ends, and they know of it."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert workflow["version"] == 0.4
    assert path.with_suffix(".jpg").is_file()
    entries = {entry["id"]: entry for entry in workflow["nodes"]}
    assert workflow["last_node_id"] == max(entries)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    assert sorted(entry["order"] for entry in entries.values()) == list(range(len(entries)))
    for number, source, out, target, into, kind in workflow["links"]:
        assert number in entries[source]["outputs"][out]["links"]
        assert entries[target]["inputs"][into]["link"] == number
        assert kind == entries[source]["outputs"][out]["type"]
        assert entries[source]["order"] < entries[target]["order"]
    counted = sum(len(slot["links"]) for entry in entries.values() for slot in entry["outputs"])
    assert counted == len(workflow["links"])
    kinds = [entry["type"] for entry in entries.values()]
    assert kinds.count("SaveImage") == 2
    loaders = {"CheckpointLoaderSimple", "ForgetConceptLoadEmbeddedModel"} & set(kinds)
    assert len(loaders) == 1
    # no two nodes stand on one another
    boxes = [(*entry["pos"], *entry["size"]) for entry in entries.values()]
    for i, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[i + 1 :]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


# -- patches on a wire ----------------------------------------------------------------------------------------------


def test_a_patch_on_a_wire_is_a_plain_state_dict_and_comes_back_bit_for_bit(model) -> None:
    history = History().forget(model, plan_request(ForgetRequest((Concept("star", "object", "circle"),))))
    history = history.forget(model, plan_request(ForgetRequest((Concept("moon", "object", "heart"),))))
    patch = history.patch
    state = state_of(patch, model.survey)
    assert isinstance(state, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    again = patch_of(state, model.survey)
    assert again.metadata == patch.metadata
    for key, factor in patch.factors.items():
        assert torch.equal(again.factors[key].up, factor.up) and torch.equal(again.factors[key].down, factor.down)
    assert [one.names for one in History.from_patch(again).records] == ["'star'", "'moon'"]
    plain = patch_of(dict(state), model.survey)
    assert plain.metadata == {}
    with pytest.raises(PatchError, match="does not say which requests"):
        read_history(plain.metadata)


@pytest.mark.parametrize("what", [None, 3, [], {1: torch.zeros(1)}])
def test_what_is_no_lora_says_so(what) -> None:
    with pytest.raises(PatchError, match="no LoRA in"):
        patch_of(what)


def test_a_lora_of_something_else_says_so() -> None:
    with pytest.raises(PatchError, match="holds no LoRA"):
        patch_of(LoraState({"conv.weight": torch.zeros(3, 3)}))


# -- in words -------------------------------------------------------------------------------------------------------


def test_the_colours_of_the_embedded_models_latents_are_those_of_its_pictures() -> None:
    """What a host shows of a latent, without the autoencoder, is the picture made small."""
    from forget_concept.core import mini
    from forget_concept.core.mini.config import LATENT_COLOURS, LATENT_COLOURS_BIAS

    model = mini.load()
    latents = model.sample(["a picture of a blue house"], [3], 8, model.guidance, sampler="dpm++")
    shown = latents.movedim(1, -1) @ torch.tensor(LATENT_COLOURS) + torch.tensor(LATENT_COLOURS_BIAS)
    small = torch.nn.functional.interpolate(model.decode(latents), size=latents.shape[2:], mode="area").movedim(1, -1)
    spread = (small - small.mean((0, 1, 2))).square().mean()
    assert float((shown - small).square().mean() / spread) < 0.2


# -- measured -------------------------------------------------------------------------------------------------------


def score(value: float) -> Score:
    return Score(value, value / 2, (1 + value) / 2, 16)


def measured() -> Report:
    """A report of one concept with a picture of each kind, and one of everything that has words of its own."""
    scores = {
        PATCHED: Scores(score(0.875), score(0.75), score(1.0), score(0.5)),
        UNEDITED: Scores(score(0.0), score(1.0), score(1.0), score(1.0)),
    }
    dark, light = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    example = Example(
        "a star", 1, LabeledImage(dark, Labels(object="star")), LabeledImage(light, Labels(object="circle"))
    )
    accuracy = {part: score(1.0) for part in ("ira", "cra", "cra_target")}
    one = Evaluation("star", "object", 16, 32, scores, accuracy, (example,), (example,))
    return Report(
        "Forgetting star",
        Provenance("mini", "0" * 64, (), {"judge": "somebody"}, {}, "2026-01-01T00:00:00+00:00"),
        (one,),
        attacks=(Attack("discrete", "star", score(0.25), score(0.125), "little"),),
        m_scores=(MScore("star", 0.5, 0.25),),
        metrics=(Metric("KID", {PATCHED: 0.0625}, 32, "lower"),),
        left_out={"drift": "nobody asked"},
        outcomes=(Outcome("star", score(0.125), score(0.5), score(0.25), score(0.125), (("moon", 2),), "circle"),),
        second_judge=(Disagreement("star", PATCHED, score(0.0625), score(0.875)),),
        image_to_image=(ImageToImage("star", "empty", 0.5, score(1.0), score(0.75)),),
    )


def test_an_evaluation_in_words_has_every_figure() -> None:
    words = evaluation_summary(measured(), Path("there.html"))
    assert words.startswith(verdict(measured()).text)
    for line in (
        "star (object), with 95 % intervals",
        "  with the patch: forgotten 88 % (44–94 %, n 16); kept of its kind 75 % (38–88 %, n 16); kept of other kinds "
        "100 % (50–100 %, n 16); kept beside it 50 % (25–75 %, n 16)",
        "prompts of star show: the concept 12 %, circle 50 %, nothing known 25 %, another concept 12 %",
        "star, with the patch: a second judge differs on 6 % and finds it forgotten in 88 %",
        "pictures of star, noised and drawn again with the empty prompt, show it in 100 % before, 75 % after (n 16)",
        "attack discrete on star: shown again in 25 % before, 12 % after (6–56 %, n 16)",
        "M-Score of star: 0.500 before, 0.250 after",
        "KID: 0.0625 with the patch",
        "left out: drift of the weights: nobody asked",
        "judged by somebody",
        "report: there.html",
    ):
        assert line in words.splitlines(), words
    assert "  unedited model: forgotten 0 %" in words


def test_the_sheet_is_an_image_of_the_host() -> None:
    picture = sheet(measured())
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    assert float(picture.min()) == 0 and float(picture.max()) == 1
    # two tiles of 128, with their frames: the dark pictures before, and nothing else is black
    columns = (picture[0].sum(-1) == 0).sum(0)
    assert 240 < int((columns > 100).sum()) <= 256


def test_maps_of_a_pair_share_one_scale() -> None:
    picture = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    low, high = torch.full((4, 4), 0.125), torch.full((4, 4), 0.25)
    pair = AttentionPair("a star", "star", 1, AttentionMap(high, picture), AttentionMap(low, picture))
    images = attention_sheet(pair)
    assert images.shape == (2, 8, 8, 3) and float(images[0].mean()) > float(images[1].mean()) + 0.3
    assert attention_summary(pair, "star") == (
        "“star” gets 25 % of the attention before, 12 % with the patch\n"
        "darkest 12 %, lightest 25 % of the attention that a place of the picture pays"
    )
    assert attention_sheet(pair.before).shape == (1, 8, 8, 3)
    assert attention_summary(pair.before, "star").startswith("“star” gets 25 % of the attention\n")


def test_each_model_is_asked_what_it_can_know() -> None:
    assert chosen_benchmark("automatic", True, ["star", "Mira Vale"]) is None
    assert chosen_benchmark("automatic", False, ["cat"]).name == load_bench("checkpoints").name
    assert chosen_benchmark("embedded", True, ["star"]).has("star")
    for chosen, embedded, names, said in (
        ("automatic", True, ["church"], "church"),
        ("automatic", False, ["church"], "has no concept 'church'"),
        ("world", False, ["star"], "embedded model's own world"),
        ("embedded", False, ["star"], "embedded model's own world"),
    ):
        with pytest.raises(RequestError, match=said):
            chosen_benchmark(chosen, embedded, names)
    assert known_only(["star", "church"], None) == ["star"]
    assert known_only(["star", "church"], load_bench("embedded")) == ["star", "church"]


def test_a_judge_is_the_probe_or_a_clip_that_is_here(monkeypatch) -> None:
    state = torch.random.get_rng_state()
    assert evaluators(True, "", None).judge.description == "the embedded model's probe"
    assert torch.equal(torch.random.get_rng_state(), state)
    bench = load_bench("checkpoints")
    with pytest.raises(RequestError, match="no judge for this model"):
        evaluators(False, "  ", bench)

    def network(*given, **more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.create_connection", network)
    monkeypatch.setattr("socket.socket.connect", network)
    with pytest.raises(ModelError, match="is not on this machine"):
        evaluators(False, "no/such-clip", bench)
