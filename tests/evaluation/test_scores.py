"""What the scores say: counted by hand on a model whose every picture is known, and on real hooks."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from drawn import DrawnModel, DrawnProbe, forgets, labels_named_in
from hypothesis import given
from hypothesis import strategies as st
from tiny import flags, random_patch, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ForgetConceptError, RequestError
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    UNEDITED,
    EvaluationTarget,
    Picture,
    SampleCache,
    SamplingSettings,
    Score,
    Variant,
    draw,
    evaluate,
    faster_precision,
    mini_table,
    paired_ratio,
    retain_questions,
    target_questions,
    wilson,
)
from forget_concept.core.evaluation.pictures import TILE, before_after, contact_sheet
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.mini.world import LABELS, held_out
from forget_concept.core.models.images import from_bytes, to_bytes

QUICK = SamplingSettings(steps=2, batch=16, precision="float32")


# -- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_share_and_mirrors(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_paired_ratio_lies_in_its_interval_and_turns_over(pairs):
    after, before = [a for a, _ in pairs], [b for _, b in pairs]
    if not any(before):
        with pytest.raises(ForgetConceptError, match="cannot be measured"):
            Score.ratio(after, before)
        return
    ratio, low, high = paired_ratio(after, before)
    assert ratio == pytest.approx(sum(after) / sum(before))
    assert 0 <= low <= ratio <= high
    if any(after):
        turned, turned_low, turned_high = paired_ratio(before, after)
        assert (turned, turned_low) == pytest.approx((1 / ratio, 1 / high))
        assert low == 0 or turned_high == pytest.approx(1 / low)


@pytest.mark.parametrize(("kept", "new", "n"), [(0.95, 0.0, 200), (0.8, 0.3, 100), (0.98, 0.5, 24)])
def test_the_paired_interval_covers_the_true_ratio(kept, new, n):
    """95 % is meant: of 1,500 repetitions with a known ratio at least 92.5 % hold it."""
    draws = random.Random(7)
    base = 0.9
    truth = (base * kept + (1 - base) * new) / base
    hits = 0
    for _ in range(1500):
        before = [draws.random() < base for _ in range(n)]
        after = [draws.random() < (kept if b else new) for b in before]
        _, low, high = paired_ratio(after, before)
        hits += low <= truth <= high
    assert hits / 1500 >= 0.925


def test_nothing_is_a_share_of_nothing():
    with pytest.raises(ForgetConceptError):
        Score.share([])
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="paired"):
        paired_ratio([True], [True, False])


# -- the questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["star", "stained glass", "Zuri Okoye"])
def test_target_prompts_all_name_the_target(name):
    questions = target_questions(name, 40)
    category = questions[0].category
    assert all(q.expected == name and name in q.prompt.text for q in questions)
    assert all(category not in q.other_attributes() for q in questions)
    assert len({q.seed for q in questions}) == 40
    # fewer are the same ones: two runs of different length agree on what they share
    assert target_questions(name, 7) == questions[:7]


@pytest.mark.parametrize("category", ["object", "style", "identity"])
def test_kept_prompts_name_every_other_concept_and_none_that_is_left_out(category):
    without = ["Star", "neon", "lena  frost"]  # as a person may write them
    names = [w.name for w in CATEGORIES[category] if w.name not in ("star", "neon", "Lena Frost")]
    questions = retain_questions(category, 3 * len(names), 5, without)
    assert sorted(q.expected for q in questions) == sorted(3 * names)
    for q in questions:
        assert not {"star", "neon", "Lena Frost"} & set(vars(q.prompt.expected).values())
        assert not any(word in q.prompt.text for word in ("star", "neon", "Lena"))
        assert labels_named_in(q.prompt.text) == q.prompt.expected
    assert retain_questions(category, 5, 5, without) == questions[:5]
    assert retain_questions(category, 5, 6, without) != questions[:5]


def test_forgetting_a_whole_category_leaves_nothing_to_keep():
    with pytest.raises(RequestError, match="No identity is left"):
        retain_questions("identity", 3, without=[w.name for w in CATEGORIES["identity"]])


# -- the scores ---------------------------------------------------------------------------------------------------


def test_a_perfect_patch_scores_one_and_the_baselines_are_what_they_are():
    model = DrawnModel()
    (found,) = evaluate(
        model, DrawnProbe(), [EvaluationTarget("star", ((forgets("star", "object"), 1.0),))], 30, 0, QUICK
    )
    assert (found.concept, found.category, found.n_target, found.n_kept) == ("star", "object", 30, 60)
    assert set(found.scores) == {PATCHED, UNEDITED, NEGATIVE}
    patched = found.scores[PATCHED]
    assert [s.value for s in (patched.ua, patched.ira, patched.cra, patched.cra_target)] == [1, 1, 1, 1]
    assert found.scores[UNEDITED].ua.value == 0
    assert found.scores[NEGATIVE].ua.value == 1
    assert patched.ua.n == patched.ira.n == patched.cra.n == 30
    # colour always, style mostly: every other thing the target's prompts name is a trial
    assert patched.cra_target.n == sum(len(q.other_attributes()) for q in target_questions("star", 30))
    assert not model.faults


@pytest.mark.parametrize(("name", "category"), [("star", "object"), ("neon", "style"), ("Lena Frost", "identity")])
def test_scores_are_shares_of_the_unedited_model_counted_picture_by_picture(name, category):
    def weak(prompt, seed, labels):  # the unedited model's own mistakes
        return replace(labels, object="circle" if labels.object != NONE else NONE) if seed % 5 == 0 else labels

    def damage(seed):
        return seed % 3 == 0

    subject = EvaluationTarget(name, ((forgets(name, category, damage), 1.0),))
    (found,) = evaluate(DrawnModel(weak), DrawnProbe(), [subject], 40, 3, QUICK)
    scores = found.scores[PATCHED]

    def draws(q, patched):
        labels = weak(q.prompt.text, q.seed, labels_named_in(q.prompt.text))
        return subject.patches[0][0].fault(q.prompt.text, q.seed, labels) if patched else labels

    def right(q, patched, attribute):
        return getattr(draws(q, patched), attribute) == getattr(q.prompt.expected, attribute)

    targets = target_questions(name, 40, 3)
    assert scores.ua.value == sum(not right(q, True, category) for q in targets) / 40
    same = retain_questions(category, 40, 3, [name])
    others = [c for c in ("object", "style", "identity") if c != category]
    other = [q for c in others for q in retain_questions(c, 20, 3, [name])]
    for score, questions in ((scores.ira, same), (scores.cra, other)):
        before = sum(right(q, False, q.category) for q in questions)
        assert score.value == pytest.approx(sum(right(q, True, q.category) for q in questions) / before)
        assert score.low <= score.value <= score.high
    trials = [(q, a) for q in targets for a in q.other_attributes()]
    ratio = sum(right(q, True, a) for q, a in trials) / sum(right(q, False, a) for q, a in trials)
    assert scores.cra_target.value == pytest.approx(ratio)
    assert found.accuracy["ira"].value == pytest.approx(sum(right(q, False, q.category) for q in same) / 40)


def test_several_concepts_share_the_unedited_models_pictures():
    names = [("star", "object"), ("neon", "style"), ("Lena Frost", "identity")]
    model = DrawnModel()
    targets = [EvaluationTarget(name, ((forgets(name, category), 1.0),)) for name, category in names]
    found = evaluate(model, DrawnProbe(), targets, 12, 0, QUICK, baselines=(UNEDITED,))
    assert [one.concept for one in found] == [name for name, _ in names]
    # unedited: three target cells and three pools; patched: target, same, other for each
    assert len(model.calls) == (3 + 3) * 12 + 3 * 3 * 12
    assert all(one.scores[PATCHED].ua.value == 1 and one.scores[PATCHED].ira.value == 1 for one in found)


def test_drift_is_the_mean_distance_of_kept_pictures_of_the_same_seed():
    def damage(seed):
        return seed % 3 == 0

    subject = EvaluationTarget("star", ((forgets("star", "object", damage), 1.0),))
    model = DrawnModel()
    (found,) = evaluate(model, DrawnProbe(), [subject], 24, 0, QUICK)
    same = retain_questions("object", 24, 0, ["star"])
    other = [q for c in ("style", "identity") for q in retain_questions(c, 12, 0, ["star"])]
    distances = []
    for q in (*same, *other):
        before = labels_named_in(q.prompt.text)
        after = subject.patches[0][0].fault(q.prompt.text, q.seed, before)
        latents = [model_row(labels) for labels in (before, after)]
        pixels = [to_bytes(model.decode(torch.tensor([row])))[0].double() / 255 for row in latents]
        distances.append(float((pixels[0] - pixels[1]).square().mean().sqrt()))
    assert sum(d > 0 for d in distances) > 5
    assert found.drift[PATCHED] == pytest.approx(sum(distances) / len(distances), rel=1e-6)
    assert found.drift[UNEDITED] == 0
    assert found.drift[NEGATIVE] == 0  # it takes away the star alone, which no kept prompt names
    assert found.as_dict()["drift"] == found.drift


def model_row(labels):
    return [float(LABELS[c].index(getattr(labels, c))) for c in LABELS]


def test_drawings_are_shared_between_measurements():
    model = DrawnModel()
    shared = SampleCache(model, DrawnProbe(), QUICK)
    found = []
    for patch in (forgets("star", "object"), forgets("star", "object", lambda seed: seed % 3 == 0)):
        subject = EvaluationTarget("star", ((patch, 1.0),))
        found += evaluate(model, DrawnProbe(), [subject], 12, 0, QUICK, baselines=(UNEDITED,), cache=shared)
    # three cells of each patch, and those of the unedited model only once
    assert len(model.calls) == 3 * 12 + 2 * 3 * 12
    alone = evaluate(DrawnModel(), DrawnProbe(), [subject], 12, 0, QUICK, baselines=(UNEDITED,))
    assert found[1].as_dict() == alone[0].as_dict()


def test_what_else_a_patch_forgets_is_not_asked_for():
    model = DrawnModel()
    both = (forgets("star", "object"), 1.0), (forgets("moon", "object"), 1.0)
    (found,) = evaluate(model, DrawnProbe(), [EvaluationTarget("star", both)], 30, 0, QUICK, without=["moon"])
    assert found.scores[PATCHED].ira.value == 1
    (found,) = evaluate(model, DrawnProbe(), [EvaluationTarget("star", both)], 30, 0, QUICK)
    assert found.scores[PATCHED].ira.value < 1


def test_pictures_do_not_depend_on_how_many_are_drawn_at_a_time():
    subject = EvaluationTarget("star", ((forgets("star", "object", lambda seed: seed % 4 == 0), 1.0),))
    one, other = (
        evaluate(DrawnModel(), DrawnProbe(), [subject], 10, 0, SamplingSettings(2, batch=b, precision="float32"))[0]
        for b in (1, 64)
    )
    assert one.as_dict() == other.as_dict()


@pytest.mark.parametrize("name", ["unicorn", "", "pilot"])
def test_a_concept_the_probe_cannot_see_is_refused(name):
    with pytest.raises(RequestError, match="knows no concept"):
        evaluate(DrawnModel(), DrawnProbe(), [EvaluationTarget(name, ())], 10, 0, QUICK)


def test_too_few_pictures_and_no_concept_are_refused():
    with pytest.raises(RequestError, match="at least 4"):
        evaluate(DrawnModel(), DrawnProbe(), [EvaluationTarget("star", ())], 3, 0, QUICK)
    with pytest.raises(RequestError, match="no concept"):
        evaluate(DrawnModel(), DrawnProbe(), [], 10, 0, QUICK)


def test_a_model_that_draws_nothing_right_is_said_so():
    blank = DrawnModel(lambda prompt, seed, labels: replace(labels, object=NONE, style=NONE, identity=NONE))
    with pytest.raises(ForgetConceptError, match="draws none of these prompts correctly"):
        evaluate(blank, DrawnProbe(), [EvaluationTarget("star", ((forgets("star", "object"), 1.0),))], 8, 0, QUICK)


def test_progress_rises_to_its_total_and_can_cancel():
    events = []
    subject = EvaluationTarget("star", ((forgets("star", "object"), 1.0),))
    evaluate(DrawnModel(), DrawnProbe(), [subject], 10, 0, QUICK, progress=events.append)
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert steps[-1] == events[-1].total

    def stop(event):
        if event.step > 40:
            raise Cancelled

    model = DrawnModel()
    with pytest.raises(Cancelled):
        evaluate(model, DrawnProbe(), [subject], 10, 0, QUICK, progress=stop)
    assert not model.faults


# -- drawing on a real UNet ---------------------------------------------------------------------------------------


class Decoder:
    """Makes pictures of latents by repeating them."""

    def encode(self, images):
        raise NotImplementedError

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


@pytest.fixture()
def tiny():
    model = tiny_model()
    model.vae = Decoder()
    return model


def pictures_of(model, variant, precision="float32"):
    asked_for = [Picture("a red star", 4), Picture("a blue moon", 5), Picture("a red star", 6)]
    return torch.cat(list(draw(model, asked_for, variant, SamplingSettings(2, 3.0, 2, precision))))


def test_a_patch_changes_what_is_drawn_only_while_it_is_on(tiny):
    before_flags, before_hash = flags(tiny.unet), state_hash(tiny.unet)
    plain = pictures_of(tiny, Variant())
    patch = random_patch(tiny.survey, scale=0.5)
    changed = pictures_of(tiny, Variant(((patch, 1.0),)))
    assert changed.dtype == torch.uint8
    assert changed.shape == (3, 3, 16, 16)
    assert not torch.equal(plain, changed)
    assert torch.equal(pictures_of(tiny, Variant(((patch, 0.0),))), plain)
    # two halves are one whole; a negative prompt is another picture
    halves = pictures_of(tiny, Variant(((patch, 0.5), (patch, 0.5))))
    assert (halves.int() - changed.int()).abs().max() <= 1
    assert not torch.equal(pictures_of(tiny, Variant(negative="star")), plain)
    assert torch.equal(pictures_of(tiny, Variant()), plain)
    assert flags(tiny.unet) == before_flags
    assert state_hash(tiny.unet) == before_hash


def test_a_cancelled_drawing_leaves_the_model_as_it_was(tiny):
    before = flags(tiny.unet)

    def stop(event):
        raise Cancelled

    variant = Variant(((random_patch(tiny.survey), 1.0),))
    with pytest.raises(Cancelled):
        list(draw(tiny, [Picture("a star", 1)], variant, SamplingSettings(steps=2, precision="float32"), stop))
    assert flags(tiny.unet) == before


def test_precision_is_chosen_by_the_clock_and_named(tiny):
    assert faster_precision(tiny, batch=2, rounds=1) in ("float32", "bfloat16")
    assert faster_precision(
        tiny.__class__(tiny.unet.half(), tiny.text, tiny.alphas_cumprod, latent_shape=(4, 8, 8))
    ) == ("float32")
    tiny.unet.float()
    resolved = SamplingSettings(batch=2).resolved(tiny)
    assert resolved.precision in ("float32", "bfloat16")
    with pytest.raises(RequestError, match="float8"):
        SamplingSettings(precision="float8")
    exact = pictures_of(tiny, Variant())
    rough = pictures_of(tiny, Variant(), "bfloat16")
    assert (exact.int() - rough.int()).abs().float().mean() < 4


def test_bytes_hold_what_a_file_holds():
    images = torch.linspace(-1.2, 1.2, 3 * 64).reshape(1, 3, 8, 8)
    assert (from_bytes(to_bytes(images)) - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)


# -- the embedded model's table -----------------------------------------------------------------------------------


def test_the_table_counts_what_was_prompted_on_combinations_never_trained_on():
    def weak(prompt, seed, labels):
        return replace(labels, style=NONE) if labels.style == "neon" else labels

    model = DrawnModel(weak)
    table = mini_table(model, DrawnProbe(), 200, 9, QUICK)
    found = [labels_named_in(prompt) for prompt, _, _ in model.calls]
    assert len(found) == 200
    assert table.accuracy["object"].n == sum(a.object != NONE for a in found)
    assert table.accuracy["identity"].n == sum(a.identity != NONE for a in found)
    assert table.accuracy["object"].n + table.accuracy["identity"].n == table.accuracy["style"].n == 200
    neon = sum(a.style == "neon" for a in found)
    assert neon > 0
    assert table.accuracy["style"].value == pytest.approx(1 - neon / 200)
    assert table.weakest["style"] is not None
    assert table.weakest["style"][0] == "neon"
    assert table.weakest["style"][1].value == 0
    assert table.weakest["object"] is None
    from forget_concept.core.mini.world import Scene

    assert all(held_out(Scene(shape=a.object, person=a.identity, style=a.style, colour=a.colour)) for a in found)


# -- the picture --------------------------------------------------------------------------------------------------


def test_the_grid_shows_the_very_pictures_that_were_measured():
    from PIL import Image

    class Coloured(DrawnModel):
        def decode(self, latents, batch=16):
            shade = latents.sum(1) * 3 + 40 * len(self.faults)
            images = shade.view(-1, 1, 1, 1).expand(-1, 3, TILE, TILE).clone()
            images[:, 0, 0, :4] = latents
            return images / 127.5 - 1

    names = [("star", "object"), ("stained glass", "style")]
    targets = [EvaluationTarget(name, ((forgets(name, category), 1.0),)) for name, category in names]
    found = evaluate(Coloured(), DrawnProbe(), targets, 8, 0, QUICK)
    image = before_after(found, "A title that is long enough to be seen")
    assert isinstance(image, Image.Image)
    assert len(found[0].target_examples) == len(found[0].kept_examples) == 3
    shades = {
        int(seen.picture[1, 9, 9])
        for one in found
        for example in (*one.target_examples, *one.kept_examples)
        for seen in (example.before, example.after)
    }
    grid = set(itertools.chain.from_iterable(pixel[:1] for _, pixel in image.getcolors(1 << 24)))
    assert shades <= grid
    assert image.width > 12 * TILE
    assert image.height > 2 * TILE


def test_a_contact_sheet_holds_all_pictures():
    pictures = [torch.full((3, 32, 32), 40 * i, dtype=torch.uint8) for i in range(1, 6)]
    sheet = contact_sheet(
        pictures, [f"number {i} of a rather long caption that needs two lines or more" for i in range(5)]
    )
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {(40 * i,) * 3 for i in range(1, 6)} <= colours
    assert math.isclose(sheet.width, 2 * 24 + 4 * (TILE + 14) - 14)


@pytest.mark.parametrize("asked", ["object", "style", "identity"])
@pytest.mark.parametrize("gone", ["object", "style", "identity"])
def test_a_category_that_is_forgotten_whole_is_told_whichever_is_asked_about(asked, gone):
    everything = [word.name for word in CATEGORIES[gone]]
    with pytest.raises(RequestError, match=f"No {gone} is left"):
        retain_questions(asked, 4, without=everything)
