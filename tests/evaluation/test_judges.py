"""Judges of any model, and the protocol of UA, IRA and CRA with a benchmark's prompts, counted by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from drawn import DrawnModel, DrawnProbe, forgets, labels_named_in
from tiny import flags, random_patch, state_hash, tiny_model
from torch import nn

from forget_concept.core.errors import Cancelled, ForgetConceptError, ModelError, RequestError
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    SAFE,
    UNEDITED,
    ClipJudge,
    EvaluationTarget,
    Picture,
    SampleCache,
    SamplingSettings,
    Score,
    Variant,
    WorldJudge,
    bench_questions,
    draw,
    evaluate_bench,
    faster_threads,
    load_bench,
)
from forget_concept.core.evaluation import drawing as drawing_module
from forget_concept.core.evaluation.bench.run import run_bench
from forget_concept.core.evaluation.judges import NOTHING, TEMPLATES
from forget_concept.core.evaluation.metrics import zero_shot
from forget_concept.core.evaluation.processes import SINGLE_PROCESS, ProcessGroup
from forget_concept.core.mini.vocabulary import NONE
from forget_concept.core.mini.world import LABELS

QUICK = SamplingSettings(steps=2, batch=16, precision="float32")
EMBEDDED = load_bench("embedded")
PLACES = {(c, name): i for i, (c, name) in enumerate((c, name) for c, names in LABELS.items() for name in names)}


# -- who judges ---------------------------------------------------------------------------------------------------


class Noise:
    """An encoder whose vectors are random, and the same for the same picture or text."""

    name = "noise"

    def __init__(self, width: int = 12) -> None:
        self.width = width
        self.asked: list[int] = []

    def image_features(self, images):
        self.asked.append(len(images))
        mix = torch.randn(images[0].numel(), self.width, generator=torch.Generator().manual_seed(1))
        return images.flatten(1) @ mix

    def text_features(self, texts):
        seeds = [int.from_bytes(text.encode()[-7:], "little") + len(text) for text in texts]
        return torch.stack([torch.randn(self.width, generator=torch.Generator().manual_seed(s)) for s in seeds])


class Drawn:
    """An encoder of what :class:`DrawnModel` draws: it reads the names from the picture, and from the text."""

    name = "drawn"

    def image_features(self, images):
        found = torch.zeros(len(images), len(PLACES))
        for row, labels in enumerate(DrawnProbe().classify(images)):
            for category in LABELS:
                found[row, PLACES[category, getattr(labels, category)]] = 1
        return found

    def text_features(self, texts):
        found = torch.full((len(texts), len(PLACES)), 1e-3)
        for row, text in enumerate(texts):
            for (category, name), place in PLACES.items():
                if re.search(rf"\b{category if name == NONE else name}\b", text) and (name != NONE or "no " in text):
                    found[row, place] = 1
        return found


def pictures(n=40, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_a_clip_judge_takes_the_name_nearest_to_the_picture():
    names = {"object": ("star", "moon", "fish"), "identity": ("Lena Frost", "Otto Brand")}
    encoder = Noise()
    judge = ClipJudge(encoder, names, batch=16)
    found = judge.classify(pictures())
    assert encoder.asked == [16, 16, 8]  # once for all categories
    images = nn.functional.normalize(encoder.image_features(pictures()).double(), dim=1).numpy()
    for category, known in names.items():
        phrases = [[template.format(name) for template in TEMPLATES[category]] for name in known]
        sums = []
        for group in (*phrases, NOTHING[category]):
            vectors = encoder.text_features(group).double().numpy()
            mean = sum(v / (v @ v) ** 0.5 for v in vectors) / len(vectors)
            sums.append(mean / (mean @ mean) ** 0.5)
        wanted = [(*known, NONE)[max(range(len(sums)), key=lambda k: float(image @ sums[k]))] for image in images]
        assert [getattr(labels, category) for labels in found] == wanted
        assert len(set(wanted)) > 1
    assert {labels.style for labels in found} == {NONE}
    assert judge.description == "zero-shot, noise"


def test_a_clip_judge_agrees_with_zero_shot_classification():
    names = ("star", "moon", "fish", "tree")
    away = {"object": ["nothing at all"]}

    class Far(Noise):
        """Nothing is like the words for nothing."""

        def image_features(self, images):
            return torch.cat([super().image_features(images), torch.zeros(len(images), 1)], 1)

        def text_features(self, texts):
            last = torch.tensor([[50.0 if text == "nothing at all" else 0.0] for text in texts])
            return torch.cat([super().text_features(texts), last], 1)

    encoder = Far()
    judge = ClipJudge(encoder, {"object": names}, nothing=away)
    found = [labels.object for labels in judge.classify(pictures())]
    wanted = zero_shot(encoder, pictures(), names, TEMPLATES["object"])
    same = [one == other for one, other in zip(found, wanted, strict=True)]
    # it differs only where all names are further away than what is at a right angle to every picture
    assert all(one in (other, NONE) for one, other in zip(found, wanted, strict=True))
    assert sum(same) > 20


@pytest.mark.parametrize(
    ("names", "batch", "says"),
    [
        ({"colour": ("red",)}, 8, "category 'colour'"),
        ({"object": ()}, 8, "no classes to distinguish"),
        ({}, 8, "no classes to distinguish"),
    ],
)
def test_a_judge_of_nothing_is_refused(names, batch, says):
    with pytest.raises(RequestError, match=says):
        ClipJudge(Noise(), names, batch=batch)
    with pytest.raises(RequestError, match="batch"):
        ClipJudge(Noise(), {"object": ("star",)}, batch=0)


def test_a_random_open_clip_judges_without_a_download(tmp_path):
    from forget_concept.core.evaluation.metrics import OpenClip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # torchvision of another build raises the latter
        with pytest.raises(ModelError, match=re.escape('pip install "forget-concept[evaluation]"')):
            OpenClip(f"local-dir:{tmp_path}")
        pytest.skip(f"open_clip does not run here: {error}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    judge = ClipJudge(OpenClip(f"local-dir:{tmp_path}"), EMBEDDED.names())
    found = judge.classify(pictures(6, 40))
    assert found == judge.classify(pictures(6, 40))
    assert all(getattr(labels, c) in (NONE, *judge.names[c]) for labels in found for c in judge.names)


# -- the protocol -------------------------------------------------------------------------------------------------


def test_the_protocol_is_the_same_whoever_judges():
    """A CLIP that sees what the probe sees comes to the same figures (it has no names for colours)."""
    subject = EvaluationTarget("star", ((forgets("star", "object", lambda seed: seed % 3 == 0), 1.0),))
    probe = WorldJudge(DrawnProbe())
    nothing = {category: (f"no {category}",) for category in ("object", "style", "identity")}
    clip = ClipJudge(Drawn(), EMBEDDED.names(), nothing=nothing)
    one, other = (evaluate_bench(DrawnModel(), judge, EMBEDDED, [subject], 24, 0, QUICK)[0] for judge in (probe, clip))
    for variant, scores in one.scores.items():
        for part in ("ua", "ira", "cra"):
            assert getattr(scores, part) == getattr(other.scores[variant], part)
    assert one.by_kind == other.by_kind
    assert one.drift == other.drift
    assert one.scores[PATCHED].cra_target.n > other.scores[PATCHED].cra_target.n > 0


@pytest.mark.parametrize(("name", "category"), [("star", "object"), ("neon", "style"), ("Lena Frost", "identity")])
def test_scores_are_counted_picture_by_picture(name, category):
    def weak(prompt, seed, labels):  # the unedited model's own mistakes
        return replace(labels, object="circle" if labels.object != NONE else NONE) if seed % 5 == 0 else labels

    patch = forgets(name, category, lambda seed: seed % 3 == 0)
    (found,) = evaluate_bench(
        DrawnModel(weak), WorldJudge(DrawnProbe()), EMBEDDED, [EvaluationTarget(name, ((patch, 1.0),))], 40, 3, QUICK
    )
    cells = bench_questions(EMBEDDED, WorldJudge(None).names, name, 40, 3, [name])

    def right(q, patched, attribute=None):
        attribute = attribute or q.category
        labels = weak(q.prompt.text, q.seed, labels_named_in(q.prompt.text))
        labels = patch.fault(q.prompt.text, q.seed, labels) if patched else labels
        return getattr(labels, attribute) == getattr(q.prompt.expected, attribute)

    scores = found.scores[PATCHED]
    assert scores.ua.value == sum(not right(q, True) for q in cells.target) / 40
    for score, questions in ((scores.ira, cells.in_domain), (scores.cra, cells.cross_domain)):
        before = sum(right(q, False) for q in questions)
        assert score.value == pytest.approx(sum(right(q, True) for q in questions) / before)
    trials = [(q, a) for q in cells.target for a in q.other_attributes()]
    ratio = sum(right(q, True, a) for q, a in trials) / sum(right(q, False, a) for q, a in trials)
    assert scores.cra_target.value == pytest.approx(ratio)
    near = [q for q in cells.in_domain if q.expected in EMBEDDED.find(name).neighbours]
    assert 5 < len(near) < 40
    before = [right(q, False) for q in near]
    assert found.neighbours[PATCHED] == Score.ratio([right(q, True) for q in near], before)
    assert found.neighbours[UNEDITED].value == 1
    for kind, by_variant in found.by_kind.items():
        of_kind = [q for q in cells.target if q.kind == kind]
        assert by_variant[PATCHED] == Score.share([not right(q, True) for q in of_kind])
    # the drawn model reads names alone: synonyms and descriptions draw nothing, whatever was forgotten
    unedited = {kind: by_variant[UNEDITED].value for kind, by_variant in found.by_kind.items()}
    assert unedited["paraphrased"] == unedited["indirect"] == 1
    assert unedited["plain"] < 0.5 > unedited["compositional"]


def test_several_concepts_share_the_unedited_models_pictures():
    names = [("star", "object"), ("moon", "object"), ("Lena Frost", "identity")]
    model = DrawnModel()
    targets = [EvaluationTarget(name, ((forgets(name, category), 1.0),)) for name, category in names]
    found = evaluate_bench(
        model, WorldJudge(DrawnProbe()), EMBEDDED, targets, 24, 0, QUICK, baselines=(UNEDITED, NEGATIVE)
    )
    assert [one.concept for one in found] == [name for name, _ in names]
    assert all(set(one.scores) == {PATCHED, UNEDITED, NEGATIVE} for one in found)
    assert len(model.calls) == len(set(model.calls)) + 3 * 72  # the patched ones look like the unedited ones
    # each is left out of the others' kept prompts, as a patch may hold all of them
    assert all(one.scores[PATCHED].ira.value == 1 for one in found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 3}, "at least 4"),
        ({"targets": []}, "no concept to evaluate"),
        ({"targets": [EvaluationTarget("unicorn", ())]}, "no concept 'unicorn'"),
        ({"baselines": ("magic",)}, "'magic' is not known"),
        (
            {"bench": load_bench("checkpoints"), "targets": [EvaluationTarget("cat", ())]},
            "judge knows no object 'cat'",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(changes, says):
    given = {"bench": EMBEDDED, "targets": [EvaluationTarget("star", ())], "count": 8} | changes
    with pytest.raises(RequestError, match=says):
        evaluate_bench(DrawnModel(), WorldJudge(DrawnProbe()), sampling=QUICK, **given)


def test_a_checkpoint_is_measured_with_real_hooks_and_given_back_as_it_was():
    model = tiny_model()
    model.vae = Repeating()
    before = flags(model.unet), state_hash(model.unet)
    patch = random_patch(model.survey, scale=0.5)
    bench = load_bench("checkpoints")
    judge = ClipJudge(Noise(), bench.names())
    cache = SampleCache(model, judge, SamplingSettings(2, 3.0, 8, "float32"))
    rows = list(run_bench(judge, bench, ["cat", "Rembrandt"], lambda *_: ((patch, 1.0),), cache, 6))
    assert [(row.concept, row.variant) for row in rows] == [
        (name, variant) for name in ("cat", "Rembrandt") for variant in (UNEDITED, NEGATIVE, SAFE, PATCHED)
    ]
    assert [row.drift > 0 for row in rows] == [False, True, True, True] * 2
    assert all(row.n_target == 6 and row.n_kept == 12 for row in rows)

    def stop(event):
        if event.step > 20:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(
            run_bench(
                judge, bench, ["cat"], lambda *_: ((patch, 1.0),), SampleCache(model, judge, QUICK), progress=stop
            )
        )
    assert (flags(model.unet), state_hash(model.unet)) == before


class Repeating:
    def encode(self, images):
        raise NotImplementedError

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


# -- a run over many concepts -------------------------------------------------------------------------------------


def patches_of(concept, progress):
    return ((forgets(concept.name, concept.category), 1.0),)


def test_a_run_measures_as_single_evaluations_do():
    judge = WorldJudge(DrawnProbe())
    names = ["star", "neon", "Otto Brand"]
    rows = list(run_bench(judge, EMBEDDED, names, patches_of, SampleCache(DrawnModel(), judge, QUICK), 12, 5))
    for name in names:
        subject = EvaluationTarget(name, patches_of(EMBEDDED.find(name), None))
        (alone,) = evaluate_bench(DrawnModel(), judge, EMBEDDED, [subject], 12, 5, QUICK)
        for row in rows:
            if row.concept == name:
                scores = alone.scores[row.variant].as_dict()
                assert {part: row.scores[part].as_dict() for part in scores} == scores
                assert row.drift == alone.drift[row.variant]
                assert {kind: row.scores[f"ua_{kind}"] for kind in alone.by_kind} == {
                    kind: by_variant[row.variant] for kind, by_variant in alone.by_kind.items()
                }


def test_a_run_draws_only_what_is_not_done_and_lets_go_of_it():
    judge, model = WorldJudge(DrawnProbe()), DrawnModel()
    cache = SampleCache(model, judge, QUICK)
    done = {("star", variant) for variant in (UNEDITED, NEGATIVE, PATCHED)} | {("moon", UNEDITED)}
    events = []
    rows = run_bench(
        judge,
        EMBEDDED,
        ["star", "moon"],
        patches_of,
        cache,
        12,
        baselines=(UNEDITED, NEGATIVE),
        done=done,
        progress=events.append,
    )
    assert [(row.concept, row.variant) for row in rows] == [("moon", NEGATIVE), ("moon", PATCHED)]
    # three cells: unedited, by negative prompt, patched
    assert len(model.calls) == 3 * 36
    assert {negative for _, _, negative in model.calls} == {"", "moon"}
    assert set(cache._variants) == {Variant().key}
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert events[-1].step == events[-1].total == 3 * 36


def test_a_part_that_cannot_be_measured_is_left_open_and_the_run_goes_on():
    blind = DrawnModel(lambda prompt, seed, labels: replace(labels, style=NONE))
    judge = WorldJudge(DrawnProbe())
    rows = list(run_bench(judge, EMBEDDED, ["neon"], patches_of, SampleCache(blind, judge, QUICK), 12, baselines=()))
    assert all(row.scores["ira"] is None and row.scores["neighbours"] is None for row in rows)
    assert all(row.scores["cra"].value == 1 for row in rows)
    with pytest.raises(ForgetConceptError, match="draws none of these prompts correctly"):
        evaluate_bench(
            blind, judge, EMBEDDED, [EvaluationTarget("neon", patches_of(EMBEDDED.find("neon"), None))], 12, 0, QUICK
        )


# -- threads and processes ----------------------------------------------------------------------------------------


def test_the_faster_number_of_threads_is_taken_and_put_back(monkeypatch):
    before = torch.get_num_threads()
    model, used = tiny_model(), []
    model.vae = Repeating()
    slow = {1: 1.0, 2: 2.0}
    monkeypatch.setattr(drawing_module, "_seconds", lambda *_: slow[torch.get_num_threads()])
    monkeypatch.setattr(drawing_module, "faster_precision", lambda *_: "float32")
    predict = model.predict_noise
    monkeypatch.setattr(model, "predict_noise", lambda *args: (used.append(torch.get_num_threads()), predict(*args))[1])
    try:
        torch.set_num_threads(2)
        assert faster_threads(model, "float32") == 1
        asked_for = [Picture("a red star", 4)]
        alone = list(draw(model, asked_for, sampling=SamplingSettings(2, 3.0, 2)))
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
        slow[1] = 3.0
        assert faster_threads(model, "float32") == 2
        together = list(draw(model, asked_for, sampling=SamplingSettings(2, 3.0, 2)))
        assert set(used) == {1, 2}
        assert (alone[0].int() - together[0].int()).abs().max() <= 1
        model.predict_noise = None  # breaks the drawing
        with pytest.raises(TypeError):
            list(draw(model, asked_for, sampling=SamplingSettings(2, 3.0, 2, "float32", threads=1)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(RequestError, match="threads must be at least 1"):
        SamplingSettings(threads=0)


class Half(ProcessGroup):
    """One of two processes, whose other one found ``found``."""

    count = 2

    def __init__(self, index, other):
        self.index, self.other, self.mine = index, other, []

    def split(self, items):
        from contextlib import nullcontext

        return nullcontext(list(items)[self.index :: 2])

    def gather(self, found):
        self.mine += found
        return self.other + found


def test_what_two_processes_draw_is_what_one_draws():
    """Batch by batch: each picture is worked out beside the same others."""
    asked_for = [Picture(f"a {name} star", seed) for seed, name in enumerate(["red", "blue", "green"] * 5)]
    parts = []
    for index in (0, 1):
        model = tiny_model()
        model.vae = Repeating()
        processes = Half(index, parts)
        cache = SampleCache(model, WorldJudge(DrawnProbe()), SamplingSettings(2, 3.0, 4, "float32"), processes)
        cache.probe = Count()
        cache.request(Variant(), asked_for)
        if index == 0:
            with pytest.raises(KeyError):  # the other half is not there yet
                cache.generate()
                cache.get(Variant(), asked_for)
            parts = processes.mine
        else:
            cache.generate()
            together = cache.get(Variant(), asked_for)
    alone = SampleCache(model, Count(), SamplingSettings(2, 3.0, 4, "float32"), SINGLE_PROCESS)
    alone.request(Variant(), asked_for)
    alone.generate()
    for one, other in zip(alone.get(Variant(), asked_for), together, strict=True):
        assert torch.equal(one.picture, other.picture)
        assert one.labels == other.labels


class Count:
    def classify(self, images):
        return [float(image.sum()) for image in images]
