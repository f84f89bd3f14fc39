"""The benchmarks' harness: costs counted exactly, rows made once, pictures drawn once, plans said before they run."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from drawn import DrawnModel, DrawnProbe, labels_named_in
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyText, flags, rand, random_patch, tiny_model, tiny_unet

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import continual
import harness
import learning_rates
import methods as bench
import runs
from tiny import fit

from forget_concept.core.errors import RequestError
from forget_concept.core.evaluation import (
    UNEDITED,
    EvaluationTarget,
    Picture,
    SamplingSettings,
    Variant,
    evaluate,
    wilson,
)
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import get
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE, find
from forget_concept.core.mini.world import Labels
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.model_survey import PROJECTIONS
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.adapters import Deltas

QUICK = SamplingSettings(steps=3, batch=16, precision="float32")

COUNTS_PASSES = pytest.mark.skipif(
    "mode" not in inspect.signature(torch.autograd.graph.register_multi_grad_hook).parameters,
    reason="passes back are counted with torch 2.4 or later",
)


class DrawnOnTiny(LatentDiffusion):
    """A tiny model to fit, whose evaluation pictures show exactly what their prompts name."""

    def __init__(self, device: str = "cpu") -> None:
        unet = tiny_unet().to(device)
        super().__init__(unet, TinyText(), sd_alphas_cumprod(), latent_shape=(4, 8, 8), name="tiny")
        self.drawn = DrawnModel()

    def sample(self, prompts, seeds, steps=30, *args, **kwargs):
        if steps == QUICK.steps:  # what the evaluations here ask for, and no method
            return self.drawn.sample(prompts, seeds, steps, **kwargs)
        return super().sample(prompts, seeds, steps, *args, **kwargs)

    def decode(self, latents, batch=16):
        return self.drawn.decode(latents, batch)


# -- passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "each"), [(5.0, 2), (1.0, 1)])
def test_a_sampled_picture_is_as_many_passes_as_it_has_steps_and_sides(guidance, each):
    model = tiny_model()
    with harness.Passes(model.unet) as passes:
        model.sample(["a star", "a heart", ""], [1, 2, 3], steps=4, guidance=guidance, batch=2)
    assert (passes.forward, passes.backward) == (each * 3 * 4, 0)


def predicted(model, rows):
    states = model.text.encode([""] * rows)
    return model.predict_noise(rand(rows, 4, 8, 8), torch.full((rows,), 100), states)


@COUNTS_PASSES
def test_a_pass_back_is_counted_each_time_a_gradient_goes_through_the_unet():
    model = tiny_model()
    model.unet.requires_grad_(False)
    keys = [site.key(which) for site in model.survey for which in PROJECTIONS]
    deltas = Deltas(model, keys, 2, torch.Generator().manual_seed(0))
    with deltas.attached(), harness.Passes(model.unet) as passes:
        loss = predicted(model, 3).square().mean()
        assert (passes.forward, passes.backward) == (3, 0)
        loss.backward(retain_graph=True)
        assert passes.backward == 3
        torch.autograd.grad(loss, deltas.parameters())
        assert passes.backward == 6
        with torch.no_grad():
            predicted(model, 5)
        assert (passes.forward, passes.backward) == (8, 6)
        one, other = predicted(model, 1), predicted(model, 2)
        (one.mean() + other.mean()).backward()
        assert (passes.forward, passes.backward) == (11, 9)
    with deltas.attached():
        predicted(model, 1).mean().backward()
    assert (passes.forward, passes.backward) == (11, 9)


@COUNTS_PASSES
@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [
        # attention maps alone make the loss: the gradient never sees the prediction
        ({"preserve_weight": 0.0, "steer_weight": 0.0}, 1, 1),
        # what is kept is predicted now and by the base model
        ({"steer_weight": 0.0}, 3, 2),
    ],
)
def test_the_passes_of_a_training_are_its_steps_times_its_batch(settings, forward, backward):
    model = tiny_model()
    before = flags(model.unet)
    request = ForgetRequest(
        (Concept("star"),),
        method="forget_me_not",
        settings={"steps": 3, "batch_size": 2, "latents": "zeros", "gradient": "sum"} | settings,
    )
    with harness.costing(model) as cost:
        fit(model, request)
    assert (cost.forward, cost.backward) == (forward * 6, backward * 6)
    assert cost.seconds > 0
    assert flags(model.unet) == before


@COUNTS_PASSES
def test_what_a_method_draws_for_itself_is_counted():
    model = tiny_model()
    settings = {"steps": 1, "batch_size": 1, "n_images": 3, "sample_steps": 2, "guidance": 3.0}
    settings |= {"latents": "generated", "preserve_weight": 0.0, "steer_weight": 0.0}
    with harness.costing(model) as cost:
        fit(model, ForgetRequest((Concept("star"),), method="forget_me_not", settings=settings))
    assert (cost.forward, cost.backward) == (3 * 2 * 2 + 1, 1)


# -- memory -------------------------------------------------------------------------------------------------------


def test_peak_memory_sees_what_was_held_for_a_moment(device):
    with harness.PeakMemory(torch.device(device)) as memory:
        held = torch.ones(50_000_000, device=device)
        held = held * 2
        del held
    if device == "cpu" and not harness.STATM.exists():
        assert memory.bytes is None
    else:
        assert 3.5e8 <= memory.bytes <= 6e8  # a sample every few milliseconds may miss the very top


# -- the table ----------------------------------------------------------------------------------------------------


def test_rows_are_on_disk_at_once_and_known_again(tmp_path):
    path = tmp_path / "new" / "table.csv"
    table = harness.Table(path, ["name", "seed", "value"], ["name", "seed"])
    table.append({"name": "a, b", "seed": 1, "value": 0.123456789})
    again = harness.Table(path, ["name", "seed", "value"], ["name", "seed"])
    assert again.rows == [{"name": "a, b", "seed": "1", "value": "0.12346"}]
    assert again.has({"name": "a, b", "seed": 1})
    assert not again.has({"name": "a, b", "seed": 2})
    again.append({"name": "c", "seed": 0, "value": None})
    assert path.read_text() == 'name,seed,value\n"a, b",1,0.12346\nc,0,\n'
    with pytest.raises(ValueError, match="does not fit"):
        again.append({"name": "d", "seed": 0})


@pytest.mark.parametrize("strength", [1.0, 0.7, 1 / 3])
def test_a_number_in_a_key_is_known_again(tmp_path, strength):
    """It is written as a cell: 1.0 was not found as the 1 that it became, and its row was made a second time."""
    harness.Table(tmp_path / "t.csv", ["strength", "value"], ["strength"]).append({"strength": strength, "value": 2})
    again = harness.Table(tmp_path / "t.csv", ["strength", "value"], ["strength"])
    assert again.has({"strength": strength}) and again.row({"strength": strength})["value"] == "2"


def test_a_row_that_was_cut_short_is_made_again(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("name,value\na,1\nb,")
    table = harness.Table(path, ["name", "value"], ["name"])
    assert table.has({"name": "a"})
    assert not table.has({"name": "b"})
    table.append({"name": "b", "value": 2})
    assert path.read_text() == "name,value\na,1\nb,2\n"


def test_cells_of_a_row_are_filled_in_place(tmp_path):
    path = tmp_path / "table.csv"
    table = harness.Table(path, ["name", "value", "more"], ["name"])
    for name in ("a", "b"):
        table.append({"name": name, "value": 1, "more": None})
    table.fill({"name": "a"}, {"more": 0.5})
    assert path.read_text() == "name,value,more\na,1,0.5\nb,1,\n"
    assert harness.Table(path, ["name", "value", "more"], ["name"]).row({"name": "a"})["more"] == "0.5"
    with pytest.raises(KeyError):
        table.fill({"name": "c"}, {"more": 1})
    with pytest.raises(ValueError, match="cannot be filled"):
        table.fill({"name": "a"}, {"name": "d"})


def test_another_table_is_not_added_to(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("name,other\na,1\n")
    with pytest.raises(RequestError, match="a table with other columns"):
        harness.Table(path, ["name", "value"], ["name"])
    assert path.read_text() == "name,other\na,1\n"


# -- the pictures -------------------------------------------------------------------------------------------------


def test_the_unedited_models_pictures_are_drawn_once_for_all_runs_and_processes(tmp_path):
    def measure(model, by="probe"):
        cache = harness.SharedSampleCache(model, DrawnProbe(), QUICK, Workspace(tmp_path), by)
        (found,) = evaluate(
            model, DrawnProbe(), [EvaluationTarget("star", ())], 8, 0, baselines=(UNEDITED,), cache=cache
        )
        return found, cache

    first = DrawnOnTiny()
    found, cache = measure(first)
    assert len(first.drawn.calls) == 3 * 8
    second = DrawnOnTiny()
    again, _ = measure(second)
    assert not second.drawn.calls
    assert again.as_dict() == found.as_dict()
    assert torch.equal(again.target_examples[0].before.picture, found.target_examples[0].before.picture)
    third = DrawnOnTiny()
    measure(third, by="another probe")
    assert len(third.drawn.calls) == 3 * 8

    negative = Variant(negative="star")
    picture = Picture("a red star", 5)
    cache.request(negative, [picture])
    cache.generate()
    assert cache.get(negative, [picture])[0].labels == Labels(NONE, NONE, NONE, "red")
    cache.release()
    with pytest.raises(KeyError):
        cache.get(negative, [picture])


# -- the intervals ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(4, 200))
def test_an_interval_of_runs_holds_their_mean_and_is_never_narrower_than_of_all_pictures(values, n):
    mean, low, high = harness.mean_interval(values, n)
    assert 0 <= low <= mean <= high
    pooled = wilson(round(mean * n * len(values)), n * len(values))
    assert low <= pooled[0] or low == mean
    assert high >= pooled[1] or high == mean


def test_an_interval_of_few_runs_that_differ_is_students():
    # mean 0.5, standard error 0.5 / √3 · … : three runs, two degrees of freedom
    mean, low, high = harness.mean_interval([0.4, 0.5, 0.6], 10_000)
    assert mean == pytest.approx(0.5)
    half = 4.303 * 0.1 / 3**0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


# -- the runs -----------------------------------------------------------------------------------------------------


@pytest.fixture()
def command(tmp_path, capsys):
    """Runs the benchmark on a model whose pictures are known; gives the exit status, the model and what it printed."""

    def run(*args: str):
        model = DrawnOnTiny()
        args = ("--precision", "float32", *(() if "--stress" in args else ("--no-stress",)), *args)
        args = tuple(one for one in args if one != "--stress")
        status = bench.main(
            [*("--out", str(tmp_path / "out.csv")), *f"--count 4 --steps {QUICK.steps} --batch 4".split(), *args],
            load=lambda device: (model, DrawnProbe(), ""),
        )
        return status, model, capsys.readouterr()

    return run


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_second_call_runs_nothing_and_a_wider_one_only_what_is_new(command, tmp_path):
    wanted = ["--method", "none", "--method", "negative_prompt", "--method", "uce", "--preset", "tuned"]
    status, model, _ = command(*wanted, "--concept", "star")
    assert status == 0
    assert model.drawn.calls
    rows = rows_of(tmp_path)
    assert list(rows[0]) == [
        *("model", "method", "preset", "gradient", "category", "concept", "replacement", "seed", "ua", "ira", "cra"),
        *("n", "drift", "seconds", "forward_passes", "backward_passes", "peak_bytes", "patch_bytes"),
        *bench.CELLS,
        *("attack_budget", "attack_success", "attack_rephrased", "attack_homoglyphs"),
        *("attack_discrete", "attack_soft_prompt", "attack_inversion_recall"),
    ]
    assert [(row["method"], row["preset"], row["gradient"]) for row in rows] == [
        ("none", "", ""),
        ("negative_prompt", "", ""),
        ("uce", "tuned", ""),
        ("uce", "tuned", ""),
    ]
    assert [row["replacement"] for row in rows] == ["", "", "circle", ""]
    none, negative, uce, _ = rows
    assert (none["ua"], none["ira"], none["cra"], none["drift"], none["seconds"]) == ("0", "1", "1", "0", "0")
    assert (negative["ua"], negative["ira"], negative["cra"]) == ("1", "1", "1")
    assert (uce["model"], uce["category"], uce["concept"], uce["seed"], uce["n"]) == (
        "tiny",
        "object",
        "star",
        "0",
        "4",
    )
    assert float(uce["seconds"]) > 0
    assert int(uce["patch_bytes"]) > 0
    # a closed form works on the text alone
    assert (uce["forward_passes"], uce["backward_passes"]) == ("0", "0")

    text = (tmp_path / "out.csv").read_text()
    status, model, said = command(*wanted, "--concept", "star")
    assert (status, model.drawn.calls) == (0, [])
    assert "0 runs completed" in said.err
    assert (tmp_path / "out.csv").read_text() == text

    command(*wanted, "--concept", "star", "--concept", "fish")
    assert (tmp_path / "out.csv").read_text().startswith(text)
    assert [row["concept"] for row in rows_of(tmp_path)] == ["star"] * 4 + ["fish"] * 4


def test_a_row_measured_without_attacks_is_attacked_later_and_keeps_its_figures(command, tmp_path, monkeypatch):
    synonym = find("star")[1].synonym
    monkeypatch.setattr("drawn.labels_named_in", lambda prompt: labels_named_in(prompt.replace(synonym, "star")))
    wanted = ["--method", "none", "--method", "negative_prompt", "--concept", "star"]
    command(*wanted, "--attack", "none")
    before = rows_of(tmp_path)
    assert [row["attack_budget"] for row in before] == ["", ""]
    status, model, _ = command(*wanted)
    assert status == 0
    after = rows_of(tmp_path)
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in old.items() if "attack" not in k} == {
            k: v for k, v in new.items() if "attack" not in k
        }
        assert new["attack_budget"] == "quick"
        shares = [float(new[f"attack_{name}"]) for name in ("rephrased", "homoglyphs")]
        assert float(new["attack_success"]) == max(shares)
        # the attacks along gradients need a text encoder that lets them through
        assert [new[f"attack_{name}"] for name in ("discrete", "soft_prompt", "inversion_recall")] == ["", "", ""]
    none, negative = after
    # this model knows the synonym, and a negative prompt takes the concept away all the same
    assert float(none["attack_rephrased"]) == 1
    assert float(negative["attack_rephrased"]) == 0
    _, model, _ = command(*wanted)
    assert model.drawn.calls == []
    assert rows_of(tmp_path) == after


@COUNTS_PASSES
def test_what_a_preset_refuses_is_left_out_and_the_summary_says_so(command, tmp_path):
    status, _, _ = command(
        "--method", "none", "--method", "forget_me_not", "--preset", "published", "--concept", "neon"
    )
    assert status == 0
    row = rows_of(tmp_path)[1]
    assert (row["method"], row["preset"], row["gradient"]) == ("forget_me_not", "published", "sum")
    assert int(row["backward_passes"]) > 0
    text = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "- `forget_me_not published sum`: without a replacement and a preserve list." in text
    assert "| forget_me_not * | published | sum | yes | 1 × 4 | 0.0 (0.0–49.0) |" in text
    assert harness.device_name(torch.device("cpu")) in text


def test_a_run_that_is_refused_altogether_is_said_and_the_others_are_made(command, tmp_path):
    status, _, said = command(
        *("--method", "forget_me_not", "--method", "uce", "--preset", "published", "--gradient", "restricted"),
        *("--concept", "star"),
    )
    assert status == 1
    assert "forget_me_not published restricted star seed 0: " in " ".join(said.err.split())
    assert [row["method"] for row in rows_of(tmp_path)] == ["uce"]


def test_a_dry_run_lists_what_is_left_to_do_with_an_estimate_and_writes_nothing(command, tmp_path):
    wanted = ["--method", "none", "--method", "uce", "--preset", "tuned", "--concept", "star"]
    status, _, said = command(*wanted, "--dry-run")
    assert status == 0
    assert not (tmp_path / "out.csv").exists()
    assert said.out.splitlines()[:2] == ["none star seed 0: nothing to fit", "uce tuned star seed 0: about 0 s to fit"]
    # 4 of the target and 3 pools of 4 by the unedited model, 3 cells of 4 by each of the two patched ones
    assert "3 runs: about 0 min to fit, and 40 pictures to measure" in said.out
    # in each of 8 wordings 4 of the target and 1 of each of the 33 others, 48 continued ones, by the unedited model and
    # by each patched one, and 2 cells of 4 at 2 lower strengths by each patched one
    _, _, said = command(*wanted, "--dry-run", "--stress")
    assert f"and {40 + 3 * (8 * (4 + 33) + 48) + 2 * 2 * 2 * 4} pictures to measure" in said.out
    command(*wanted)
    _, _, said = command(*wanted, "--dry-run")
    assert said.out.startswith("0 runs:")


def test_the_plans_are_the_protocols():
    every = ["none", "negative_prompt", "uce", "forget_me_not"]
    runs = bench.planned(every, bench.PRESETS, [], bench.SCREENING, [0])
    # two baselines and two methods of two and three presets, one of which also without a replacement, for each of three
    # concepts
    assert len(runs) == (2 + 3 + 4) * 3
    assert [concept.kind for concept in bench.SCREENING] == ["object", "style", "identity"]
    assert len(bench.planned(every, bench.PRESETS, [], bench.CONCEPTS, bench.SEEDS)) == (2 + 3 + 4) * 9 * 3
    rules = ["sum", "restricted"]
    both = bench.planned(["forget_me_not", "uce"], ["tuned"], rules, bench.SCREENING[:1], [0])
    # a rule is for what is trained
    assert [(run.method, run.gradient) for run in both if run.replaced] == [
        ("forget_me_not", "sum"),
        ("forget_me_not", "restricted"),
        ("uce", ""),
    ]
    # the model that never knew was trained without three concepts
    never = bench.planned(["retrained"], bench.PRESETS, [], bench.CONCEPTS, [0])
    assert [run.concept for run in never] == list(bench.SCREENING)


def test_the_stress_tests_are_run_and_an_older_row_gets_them_later(command, tmp_path):
    wanted = ["--method", "none", "--method", "uce", "--preset", "tuned", "--concept", "fish", "--attack", "none"]
    command(*wanted)
    assert {row["shown_wordings"] for row in rows_of(tmp_path)} == {""}
    status, _, _ = command(*wanted, "--stress")
    assert status == 0
    none, replaced, dropped = rows_of(tmp_path)
    for row in (none, replaced, dropped):
        # what these pictures show is what their prompts name, whatever the patch
        assert float(row["shown_unedited"]) == float(row["shown_wordings"])
        assert int(row["n_wordings"]) == 4 * 8 and float(row["kept_wordings"]) == 1
        assert float(row["lowest_kept"]) == 1 and row["lowest"] != "fish"
        assert row["kid_retrained"] == ""
        shares = [float(row[f"drawn_{what}"] or 0) for what in ("replacement", "nothing", "other")]
        assert sum(shares) == pytest.approx(float(row["ua"]))
    assert none["ua_0.7"] == "" and float(replaced["ua_0.7"]) == float(dropped["ua_0.5"]) == 0
    assert dropped["drawn_replacement"] == ""
    _, model, _ = command(*wanted, "--stress")
    assert model.drawn.calls == []


def test_what_does_not_forget_is_not_attacked(command, tmp_path):
    command("--method", "uce", "--preset", "published", "--concept", "fish")
    (row,) = rows_of(tmp_path)
    assert (row["ua"], row["attack_budget"]) == ("0", "")


def test_none_of_the_reported_concepts_chose_the_settings():
    names = {concept.name for concept in bench.CONCEPTS}
    assert not names & {"tree", "mosaic", "Hugo Marsh"}
    # what is shown instead is nowhere to be forgotten
    assert not names & {concept.replacement for concept in bench.CONCEPTS}
    assert sorted(c.kind for c in bench.CONCEPTS) == ["identity"] * 3 + ["object"] * 3 + ["style"] * 3


def test_pictures_of_a_concept_show_it():
    for concept in bench.SCREENING:
        pictures = runs.pictures_of(concept, 3, 0)
        assert pictures.shape == (3, 3, 128, 128)
        assert pictures.min() >= -1
        assert pictures.max() <= 1
        assert torch.equal(pictures, runs.pictures_of(concept, 3, 0))
    assert isinstance(Inputs(images={"star": pictures}), Inputs)


# -- requests in sequence -----------------------------------------------------------------------------------------


@pytest.fixture()
def course(tmp_path):
    """Runs the sequence benchmark with the closed form; gives the exit status, the model and the rows."""

    def run(*args: str, load: bool = True):
        model = DrawnOnTiny()

        def loaded(device):
            assert load, "there is nothing to run"
            return model, DrawnProbe(), ""

        wanted = f"--method uce --count 4 --steps {QUICK.steps} --batch 4 --precision float32".split()
        places = ["--out", str(tmp_path / "out.csv"), "--plot", str(tmp_path / "plot.png")]
        status = continual.main([*wanted, *places, "--work", str(tmp_path / "work"), *args], load=loaded)
        return status, model, rows_of(tmp_path)

    return run


def test_a_sequence_is_measured_step_by_step_and_only_once(course, tmp_path):
    status, _, rows = course("--requests", "3")
    assert status == 0
    assert list(rows[0]) == ["method", "seed", "step", "ua_all", "ira", "cra", "weight_drift", "seconds"]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(rows[0][name]) for name in ("ua_all", "ira", "cra", "weight_drift", "seconds")] == [0, 1, 1, 0, 0]
    drifts = [float(row["weight_drift"]) for row in rows]
    assert drifts[1] > 0
    assert drifts[1] != drifts[2] != drifts[3]
    status, _, again = course("--requests", "3", load=False)
    assert (status, again) == (0, rows)

    # one request more: the three before are taken up, not forgotten anew
    fits = []
    original = continual.History.forget

    def counted(self, model, plan, *rest):
        fits.append(plan.request.concepts[0].name)
        return original(self, model, plan, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual.History, "forget", counted)
        _, _, longer = course("--requests", "4")
    assert longer[:4] == rows
    assert fits == ["fish"]
    # as if it had never been cut short
    (tmp_path / "out.csv").unlink()
    for file in (tmp_path / "work" / "continual").iterdir():
        file.unlink()
    _, _, whole = course("--requests", "4")
    for one, other in zip(longer, whole, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_half_of_every_category_is_always_kept():
    for category, every in CATEGORIES.items():
        retained = continual.retain_set(category)
        assert len(retained) >= len(every) / 2
        assert {c.replacement for c in continual.REQUESTS if c.kind == category} <= set(retained)
    assert len(continual.REQUESTS) == len(set(continual.TARGETS)) == 12
    assert not {"tree", "mosaic", "Hugo Marsh"} & set(continual.TARGETS)
    orders = [[c.name for c in continual.ordered(seed)] for seed in range(3)]
    assert orders[0] == list(continual.TARGETS)
    assert sorted(orders[1]) == sorted(orders[2]) == sorted(orders[0])
    assert orders[1] != orders[0] != orders[2] != orders[1]


def test_weight_drift_is_the_change_of_the_weights_against_all_of_them():
    model = tiny_model()
    patch = random_patch(model.survey, which=("to_k", "to_v"))
    state = model.unet.state_dict()
    change = sum(float((w - state[k]).double().square().sum()) for k, w in patch.merged_state(model.survey).items())
    base = sum(float(w.double().square().sum()) for k, w in state.items() if "attn2" in k and k.endswith("weight"))
    assert continual.weight_drift(model.survey, patch).whole == pytest.approx((change / base) ** 0.5, rel=1e-4)


def test_the_plot_shows_each_methods_curve():
    def rows(value: float):
        return [
            {"method": m, "seed": "0", "step": str(k), "ua_all": str(value), "ira": "0.9", "cra": "1.01"}
            for m in ("duge", "uce")
            for k in range(13)
        ]

    image = continual.plot(rows(0.5))
    assert image.size[0] > 1200
    colours = {colour for _, colour in image.getcolors(image.width * image.height)}
    assert set(continual.PALETTE[1:2]) <= colours  # the later of two lines on one another, and its name's key
    assert image.tobytes() != continual.plot(rows(0.6)).tobytes()


# -- the learning rate of published_scaled ----------------------------------------------------------------------------


@given(st.integers(0, len(learning_rates.FACTORS)), st.integers(1, len(learning_rates.FACTORS)))
def test_the_factor_is_the_smallest_that_forgets_or_else_the_largest_that_keeps(forgets, spoils):
    factors = learning_rates.FACTORS

    def reached(factor, score):
        at = factors.index(factor)
        return at >= forgets if score == "ua" else at < spoils

    found = learning_rates.chosen_factor(reached)
    assert found == (factors[forgets] if forgets < len(factors) else factors[spoils - 1])


def test_a_factor_is_given_up_as_soon_as_its_mean_cannot_reach_the_bar():
    asked = []

    def row(scores):
        asked.clear()
        return lambda concept: asked.append(concept.name) or {"ua": scores[len(asked) - 1]}

    for scores, reached, count in (
        ((1, 0.9, 0.85), True, 3),
        ((1, 0.9, 0.75), False, 3),
        ((1, 0.6), False, 2),
        ((0.1,), False, 1),
        ((1.2, 0.75, 1), True, 3),
        ((1.2, 0.65), False, 2),
    ):
        assert learning_rates.reaches("ua", row(scores)) is reached and len(asked) == count


def test_the_presets_have_the_factors_that_the_table_gives():
    with Path(learning_rates.__file__).with_suffix(".csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for method in learning_rates.METHODS:
        factor = learning_rates.chosen_factor(
            lambda factor, score, method=method: learning_rates.reaches(
                score, partial(learning_rates.tabled, rows, method, factor)
            )
        )
        published, scaled = (get(method).presets[name] for name in ("published", "published_scaled"))
        assert scaled.lr == pytest.approx(published.lr * factor)
        assert dataclasses.replace(scaled, lr=published.lr) == published
        assert all(row["concept"] not in {c.name for c in bench.CONCEPTS} for row in rows)
