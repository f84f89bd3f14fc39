"""``forget-concept bench``: its results on the disk, how it goes on, how it is spread, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import DrawnProbe, forgets
from tiny import clip_parts, flags, random_patch, state_hash, tiny_model

from forget_concept.core.cli import bench as command
from forget_concept.core.cli import options
from forget_concept.core.evaluation import WorldJudge
from forget_concept.core.evaluation.assess import Evaluators
from forget_concept.core.evaluation.drawing import torch_threads
from forget_concept.core.formats import kohya
from forget_concept.core.mini import weights_folder
from forget_concept.core.mini.vocabulary import NONE
from forget_concept.core.mini.world import Labels
from forget_concept.core.patch.metadata import PatchMetadata

QUICK = ("--count", "8", "--steps", "2", "--precision", "float32", "--batch", "8")
METHOD = ("bench", "--method", "uce", *QUICK)


@pytest.fixture()
def world(drawn, monkeypatch):
    """``--model mini`` draws what it is told to; a method makes a patch that forgets the concept it is given."""
    drawn.model_hash = "drawn"
    drawn.guidance = 2.5
    fitted = []

    def fit_on_main(model, plan, processes, progress):
        (concept,) = plan.request.concepts
        fitted.append(plan.request)
        patch = forgets(concept.name, concept.kind, lambda seed: seed % 4 == 0)
        return ((patch, 1.0),)

    monkeypatch.setattr(command, "fit_on_main", fit_on_main)
    drawn.fitted = fitted
    patch = forgets("star", "object")
    patch.about, patch.factors = PatchMetadata(concepts=("star", "a Moon")), {}
    monkeypatch.setattr(options, "load_patches", lambda given, model: [(patch, 1.0) for _ in given])
    return drawn


@pytest.fixture()
def checkpoint(monkeypatch):
    """``--model`` is a tiny real UNet, judged by what its pictures hash to."""
    model = tiny_model()

    class Repeating:
        def decode(self, latents):
            return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()

    class Coin:
        description = "a coin"
        names = WorldJudge(DrawnProbe()).names

        def classify(self, images):
            pick = [int((image.sum() * 1e4).abs()) for image in images]
            return [Labels(**{c: ([NONE, *names])[p % 3] for c, names in self.names.items()}) for p in pick]

    model.vae = Repeating()
    monkeypatch.setattr(options, "load_evaluators", lambda args, bench, console: (model, Evaluators(Coin())))
    return model


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_each_concept_of_the_benchmark_is_forgotten_in_turn(run, world):
    assert run(*METHOD, "--category", "identity", "--limit", "2", "--out", "r.jsonl", "--json") == 0
    head, *rows = rows_of("r.jsonl")
    assert head["settings"]["method"] == "uce"
    assert head["settings"]["judge"] == "the embedded model's probe"
    assert [(row["concept"], row["variant"]) for row in rows] == [
        (name, variant)
        for name in ("Mira Vale", "Otto Brand")
        for variant in ("unedited", "negative_prompt", "safe_guidance", "patched")
    ]
    assert rows == run.json["rows"]
    assert head["settings"] == run.json["settings"]
    patched = [row["scores"] for row in rows if row["variant"] == "patched"]
    assert all(scores["ua"]["value"] == 1 for scores in patched)
    assert run.json["means"]["patched"]["ira"] == pytest.approx(sum(s["ira"]["value"] for s in patched) / 2)
    # a request keeps the neighbours and shows the replacement that the benchmark says
    assert [request.concepts[0].replacement for request in world.fitted] == ["Nadia Pell", "Hugo Marsh"]
    assert world.fitted[0].preserve == ("Nadia Pell", "Lena Frost", "Zuri Okoye")
    assert run(*METHOD, "--category", "identity", "--limit", "2", "--out", "r.jsonl") == 0
    assert "identity (2)" in run.out
    assert "8 rows, 8 of them from an earlier run" in run.out
    assert len(world.fitted) == 2


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_an_interrupted_run_goes_on_and_ends_as_an_undisturbed_one(run, world, name):
    args = (*METHOD, "--concept", "star", "--concept", "neon", "--out")
    assert run(*args, f"whole-{name}") == 0
    drawn_alone = len(world.calls)
    world.calls.clear()
    sample, left = world.sample, iter(range(7))

    def interrupted(*given, **named):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return sample(*given, **named)

    world.sample = interrupted
    assert run(*args, name) == 130
    whole = Path(f"whole-{name}").read_bytes()
    part = Path(name).read_bytes()
    assert 0 < len(part) < len(whole)
    assert whole.startswith(part)
    # a row that was being written when the power went
    Path(name).write_bytes(part + whole[len(part) : len(part) + 20])
    world.sample = sample
    before = len(world.calls)
    assert run(*args, name) == 0
    assert Path(name).read_bytes() == whole
    assert len(world.calls) - before < drawn_alone
    assert run.left == {name, f"whole-{name}"}


def test_both_kinds_of_file_say_the_same(run, world):
    args = (*METHOD, "--concept", "star", "--no-baselines", "--out")
    assert run(*args, "r.jsonl") == 0
    assert run(*args, "r.csv", "--json") == 0
    _, *lines = rows_of("r.jsonl")
    with open("r.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == ["unedited", "patched"]
    for cells, row in zip(table, lines, strict=True):
        for part, score in row["scores"].items():
            for field, value in (score or {"value": "", "low": "", "high": "", "n": ""}).items():
                assert cells[part if field == "value" else f"{part}_{field}"] == str(value)
        assert float(cells["drift"]) == row["drift"]
    assert run.json["rows"] == lines


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("--count", "9"), "count: 8 there, 9 now"),
        (("--seed", "4"), "seed: 0 there, 4 now"),
        (("--preset", "published"), "preset: tuned there, published now"),
        (("--set", "ridge=0.5"), 'method_settings: {} there, {"ridge": 0.5} now'),
        (("--guidance", "3"), "guidance: 2.5 there, 3.0 now"),
        (("--precision", "bfloat16"), "precision: float32 there, bfloat16 now"),
    ],
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_results_of_other_settings_are_not_mixed(run, world, name, changes, says):
    args = (*METHOD, "--concept", "star", "--no-baselines", "--out", name)
    assert run(*args) == 0
    before = Path(name).read_bytes()
    assert run(*args, *changes) == 1
    assert says in run.err
    assert Path(name).read_bytes() == before
    # more concepts and more baselines are no other settings
    assert run(*METHOD, "--concept", "star", "--concept", "moon", "--out", name, "--precision", "auto") == 0
    assert Path(name).read_bytes().startswith(before)


@pytest.mark.parametrize(
    "content", ["hello\n", '{"schema": 1}\n', "[]\n", '{"schema": 2, "settings": {}}\n', "a,b\n1,2\n"]
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_a_file_of_something_else_is_left_alone(run, world, name, content):
    Path(name).write_text(content, encoding="utf-8")
    assert run(*METHOD, "--concept", "star", "--out", name) == 1
    assert f"'{name}'" in run.err
    assert Path(name).read_text(encoding="utf-8") == content
    assert not world.calls


def test_a_patch_is_measured_on_what_it_forgets(run, world):
    assert run("bench", "--patch", "p.safetensors:0.5", *QUICK, "--no-baselines", "--json") == 0
    assert [(row["concept"], row["variant"]) for row in run.json["rows"]] == [
        ("star", "unedited"),
        ("star", "patched"),
        ("moon", "unedited"),
        ("moon", "patched"),
    ]
    scores = {row["concept"]: row["scores"] for row in run.json["rows"] if row["variant"] == "patched"}
    # it takes the star away alone; what else it says to forget is not among what is to be kept
    assert scores["star"]["ua_plain"]["value"] == 1
    assert scores["moon"]["ua_plain"]["value"] == 0
    assert all(one["ira"]["value"] == 1 for one in scores.values())
    assert run.json["settings"]["patches"][0]["file"] == "p.safetensors"
    assert run.json["settings"]["patches"][0]["strength"] == 1.0
    assert not run.left
    assert run("bench", "--patch", "p", *QUICK, "--no-baselines", "--concept", "heart", "--json") == 0
    assert {row["concept"] for row in run.json["rows"]} == {"heart"}


def test_a_list_of_prompts_is_drawn_with_its_seeds(run, world):
    Path("l.csv").write_text("text,evaluation_seed\na red star on paper,77\nsomething else,78\n", encoding="utf-8")
    args = (*METHOD, "--concept", "star", "--no-baselines", "--count", "10")
    assert run(*args, "--prompts", "star=l.csv#text", "--json") == 0
    assert ("a red star on paper", 77, "") in world.calls
    unedited, patched = run.json["rows"]
    # the first draws a star, the second none
    assert unedited["scores"]["ua_listed"] == {
        "value": 0.5,
        "low": pytest.approx(0.0945, abs=1e-3),
        "high": pytest.approx(0.9055, abs=1e-3),
        "n": 2,
    }
    assert patched["scores"]["ua_listed"]["value"] == 1
    listed = run.json["settings"]["lists"]
    assert set(listed) == {"star"}
    Path("l.csv").write_text("text,evaluation_seed\na red star on paper,77\nsomething else,79\n", encoding="utf-8")
    assert run(*args, "--prompts", "star=l.csv#text", "--json") == 0
    assert run.json["settings"]["lists"] != listed
    assert run(*args, "--prompts", "star=l.csv") == 1
    assert "no column 'prompt'; its columns are text, evaluation_seed" in run.err


def test_a_file_of_ones_own_is_put_beside_the_shipped_one(run, world):
    mine = {
        "schema": 1,
        "name": "mine",
        "licence": "CC0-1.0",
        "concepts": [
            {
                "name": "bat animal",
                "category": "object",
                "synonyms": ["vampire bat"],
                "neighbours": ["moon"],
                "prompts": {
                    "plain": ["a bat animal"],
                    "compositional": ["a neon picture of a bat animal"],
                    "paraphrased": ["a vampire bat"],
                    "indirect": ["it sleeps head down"],
                },
            }
        ],
    }
    Path("mine.json").write_text(json.dumps(mine), encoding="utf-8")
    args = (*METHOD, "--bench", "embedded", "--bench", "mine.json", "--concept", "bat animal", "--no-baselines")
    assert run(*args, "--json") == 0
    assert run.json["settings"]["bench"] == "ConceptBench of the embedded world + mine"
    assert [row["concept"] for row in run.json["rows"]] == ["bat animal"] * 2
    mine["concepts"][0]["prompts"]["plane"] = ["a bat"]
    Path("mine.json").write_text(json.dumps(mine), encoding="utf-8")
    assert run(*args) == 1
    assert "mine.json" in run.err
    assert "unknown field 'plane'" in run.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "either --patch FILE or --method NAME"),
        (["--patch", "p", "--method", "uce"], "either --patch FILE or --method NAME"),
        (["--method", "magic"], "'magic' is not known"),
        (["--method", "uce", "--set", "size=3"], "no setting 'size'"),
        (["--method", "uce", "--count", "0"], "at least 4"),
        (["--method", "uce", "--limit", "0"], "at least 1"),
        (["--method", "uce", "--concept", "unicorn"], "no concept 'unicorn'"),
        (["--method", "uce", "--concept", "star", "--category", "style"], "in the category style"),
        (["--method", "uce", "--bench", "none.json"], "none.json"),
        (["--method", "uce", "--bench", "checkpoints"], "The judge knows no object 'bicycle'"),
        (["--method", "uce", "--out", "r.txt"], ".jsonl (JSON Lines) or .csv"),
        (["--method", "uce", "--out", "no/folder/r.csv"], "no folder"),
        (["--method", "uce", "--prompts", "star"], "NAME=FILE"),
        (["--method", "uce", "--prompts", "unicorn=l.csv"], "no concept 'unicorn'"),
        (["--method", "uce", "--prompts", "star=l.csv"], "l.csv"),
        (["--patch", "p", "--category", "style"], "the patch names (star, a Moon)"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(run, world, args, says):
    assert run("bench", *args) == 1
    assert says in run.err
    assert re.search(r"forget-concept: [^\n]+\n$", run.err)
    assert run.out == ""
    assert not run.left
    assert not world.calls


def test_a_checkpoint_without_a_judge_is_told_what_to_install(run, monkeypatch):
    args = ("bench", "--method", "uce", "--model", "some.safetensors")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert run(*args, "--clip", "ViT-B-32", "--clip-weights", "openai") == 1
    assert 'pip install "forget-concept[evaluation]"' in run.err
    assert run(*args, "--clip", str(Path.cwd() / "nothing")) == 1
    assert "can neither be read nor downloaded" in run.err


def test_a_real_model_is_benched_and_given_back_as_it_was(run, checkpoint):
    before = flags(checkpoint.unet), state_hash(checkpoint.unet)
    args = ("--bench", "embedded", "--model", "some", *QUICK, "--guidance", "3", "--out", "r.jsonl", "--json")
    assert run("bench", "--method", "uce", "--concept", "star", *args) == 0
    assert [row["variant"] for row in run.json["rows"]][-1] == "patched"
    assert run.json["rows"][-1]["drift"] > 0
    kohya.save(random_patch(checkpoint.survey, metadata={"forget_concept.concepts": '["star"]'}), "p.safetensors")
    other = tiny_model(block_out_channels=(64, 64), norm_num_groups=8)
    kohya.save(random_patch(other.survey), "other.safetensors", other.survey)
    assert run("bench", "--patch", "p.safetensors", *args) == 1
    assert "other settings (patches: none there" in run.err
    assert run("bench", "--patch", "p.safetensors", *args[:-3], "--json") == 0
    assert run("bench", "--patch", "other.safetensors", *args[:-3]) == 1
    assert "for another architecture" in run.err
    assert (flags(checkpoint.unet), state_hash(checkpoint.unet)) == before


def test_a_model_of_a_folder_is_judged_by_a_clip_of_a_folder(run, tmp_path):
    """Everything as a person has it on the disk; here the embedded model, and a CLIP of random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    _, tokenizer = clip_parts(tmp_path / "clip")
    end = len(tokenizer) - 1
    ids = {"vocab_size": end + 1, "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, **ids, "max_position_embeddings": 77},
        vision_config={**small, "image_size": 48, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    size = {"height": 48, "width": 48}
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=size).save_pretrained(tmp_path / "clip")
    args = ("bench", "--method", "uce", "--model", weights_folder(), "--clip", tmp_path / "clip", "--concept", "cat")
    quick = ("--count", "4", "--steps", "1", "--precision", "float32", "--no-baselines", "--device", "cpu")
    assert run(*args, *quick, "--json") == 0
    assert run.json["settings"]["bench"] == "ConceptBench"
    assert run.json["settings"]["judge"] == "zero-shot, clip clip"
    assert run.json["settings"]["guidance"] == 7.5
    assert [(row["concept"], row["variant"]) for row in run.json["rows"]] == [("cat", "unedited"), ("cat", "patched")]
    assert run.json["rows"][1]["drift"] > 0


def test_two_processes_come_to_the_same_results(run):
    """On the embedded model, by accelerate: the file is byte for byte that of one process."""
    pytest.importorskip("accelerate", reason="accelerate is in the extra 'evaluation'")
    args = ["bench", "--method", "uce", "--concept", "Lena Frost", "--count", "4", "--steps", "2", "--batch", "4"]
    args += ["--precision", "float32", "--device", "cpu", "--no-baselines"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "-m", "forget_concept.core.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *args, "--out", "two.jsonl", "--json"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)  # by one of them alone
    with torch_threads(1):
        assert run(*args, "--out", "one.jsonl", "--json") == 0
    assert Path("two.jsonl").read_bytes() == Path("one.jsonl").read_bytes()
    assert said == run.json
    assert [row["variant"] for row in said["rows"]] == ["unedited", "patched"]


def test_several_processes_without_accelerate_are_told_what_to_install(run, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert run(*METHOD, "--concept", "star") == 1
    assert "'accelerate'" in run.err
    assert 'pip install "forget-concept[evaluation]"' in run.err
    assert not world.calls


def test_threads_are_as_before_afterwards(run, world):
    before = torch.get_num_threads()
    assert run(*METHOD, "--concept", "star", "--no-baselines") == 0
    assert torch.get_num_threads() == before
