"""The M-Score: cosines that are the concept's own, inversions that are shared, and what it tells apart."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from sklearn.metrics import roc_auc_score
from tiny import TinyText, clip_parts, clip_states, flags, rand, random_patch, state_hash, tiny_unet

from forget_concept.core.errors import Cancelled, ModelError, RequestError, TokenError
from forget_concept.core.evaluation import m_score as module
from forget_concept.core.evaluation.m_score import SPACES, concept_latents, m_score, quick_inversion, similarities
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.models.token_positions import end_position
from forget_concept.core.request.concept import Concept, templates
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.textual_inversion import InversionSettings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import m_score as bench  # noqa: E402

STAR = Concept("star", "object")
QUICK = InversionSettings(tokens=2, steps=4, lr=1e-2, batch_size=1, templates=("a {}", "{}"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


class Autoencoder:
    def encode(self, images):
        return torch.cat([images, images[:, :1]], 1)[:, :, ::8, ::8] * 0.5


@pytest.fixture()
def model(parts):
    return LatentDiffusion(
        tiny_unet(), CLIPText(*parts), sd_alphas_cumprod(), vae=Autoencoder(), latent_shape=(4, 8, 8), name="tiny"
    )


def rows(model, words):
    table = model.text.model.get_input_embeddings().weight.detach()
    return table[model.text.phrase_ids(words)].clone()


def state_of(model):
    return [(state_hash(part), flags(part)) for part in (model.unet, model.text.model)]


# -- the cosines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["star", "a blue lighthouse"])
@pytest.mark.parametrize("kind", ["object", "style"])
def test_the_names_own_embeddings_are_found_to_be_the_name(model, name, kind):
    found = similarities(model, rows(model, name), name, templates(kind))
    assert set(found) == set(SPACES)
    assert list(found.values()) == pytest.approx([1.0] * len(SPACES), abs=1e-5)
    # at another length they are the same direction, though to the encoder not the same word
    longer = similarities(model, 3 * rows(model, name), name, templates(kind))
    assert longer["input"] == pytest.approx(1, abs=1e-5)
    assert longer["output"] < 1 - 1e-4


def test_each_space_is_the_cosine_it_says(model):
    vectors, name, said = rand(3, 32), "blue star", ("a photo of a {}", "{}, drawn")
    found = similarities(model, vectors, name, said)
    own = rows(model, name).numpy()
    assert found["input"] == pytest.approx(1 - cosine(vectors.mean(0), own.mean(0)), abs=1e-5)
    best = [max(1 - cosine(v, word) for v in vectors.numpy()) for word in own]
    assert found["nearest"] == pytest.approx(np.mean(best), abs=1e-5)

    def end(prompt, extra=None):
        """The end's state, with the embeddings of the words between `<` and `>` given by hand."""
        ids = torch.tensor([model.text.token_ids(prompt)])
        table = model.text.model.get_input_embeddings()(ids)
        at = end_position(model.text, prompt)
        if extra is not None:
            where, width = extra
            table[0, where : where + width] = vectors[:width]
        return clip_states(model.text.model, table)[0, at].detach().numpy()

    raw, less = [], []
    for template in said:
        # three one-token words hold the places of the three vectors
        before = len(model.text.phrase_ids(template.split("{}")[0])) if template.split("{}")[0].strip() else 0
        held = template.format("star star star")
        inverted = end(held, (1 + before, 3))
        wanted, plain = end(template.format(name)), end(" ".join(template.replace("{}", " ").split()))
        raw.append(1 - cosine(inverted, wanted))
        less.append(1 - cosine(inverted - plain, wanted - plain))
    assert found["output_raw"] == pytest.approx(np.mean(raw), abs=1e-4)
    assert found["output"] == pytest.approx(np.mean(less), abs=1e-4)


# -- the score ----------------------------------------------------------------------------------------------------


def test_without_an_edit_nothing_drops_and_with_one_something_moves(model):
    latents = rand(3, 4, 8, 8)
    plain = m_score(model, STAR, latents, (), QUICK, restarts=1)
    assert (plain.drop, plain.before) == (0, plain.after)
    off = m_score(model, STAR, latents, ((random_patch(model.survey), 0.0),), QUICK, restarts=1)
    assert off.similarities == plain.similarities
    patch = random_patch(model.survey, scale=0.5)
    found = m_score(model, STAR, latents, ((patch, 1.0),), QUICK, restarts=1)
    assert found.before == plain.before
    assert found.after != found.before
    assert found.drop == found.before - found.after
    assert (found.concept, found.pictures, found.space) == ("star", 3, "input")
    other = m_score(model, STAR, latents, ((patch, 1.0),), QUICK, space="output", restarts=1)
    assert other.similarities == found.similarities
    assert (other.before, other.after) == found.similarities["output"]
    # as the patch works where it is merged, so it does where it is applied
    merged = tiny_unet()
    state = merged.state_dict()
    state.update(patch.merged_state(model.survey))
    merged.load_state_dict(state)
    edited = LatentDiffusion(merged, model.text, sd_alphas_cumprod(), latent_shape=(4, 8, 8))
    assert m_score(edited, STAR, latents, (), QUICK, restarts=1).before == pytest.approx(found.after, abs=1e-3)


def test_the_same_seed_gives_the_same_score_and_its_dictionary_says_all(model):
    latents, patches = rand(2, 4, 8, 8), ((random_patch(model.survey, scale=0.5), 1.0),)
    first, again, other = (m_score(model, STAR, latents, patches, QUICK, seed, restarts=2) for seed in (3, 3, 4))
    assert first == again
    assert first.similarities != other.similarities
    one = [m_score(model, STAR, latents, patches, QUICK, seed, restarts=1) for seed in (3, 4)]
    assert first.drops == tuple(each.drop for each in one)
    assert first.drop == pytest.approx(sum(first.drops) / 2)
    for space in SPACES:
        assert first.similarities[space] == pytest.approx(np.mean([each.similarities[space] for each in one], 0))
    found = first.as_dict()
    assert (found["before"], found["after"], found["drop"]) == (first.before, first.after, first.drop)
    assert found["similarities"]["nearest"]["after"] == first.similarities["nearest"][1]
    assert found["inversion"]["templates"] == ["a {}", "{}"]
    assert found["seed"] == 3


@pytest.mark.parametrize("way", ["success", "cancel before", "cancel after", "error"])
def test_the_model_comes_back_bit_for_bit(model, way, monkeypatch):
    before = state_of(model)
    steps = []

    def progress(event):
        if event.terms:
            steps.append((event.step, event.total))
        if (way, event.step) in (("cancel before", 2), ("cancel after", 14)):
            raise Cancelled

    if way == "error":
        predict = model.predict_noise

        def broken(*args):
            if len(steps) > 13:
                raise RuntimeError("out of memory")
            return predict(*args)

        monkeypatch.setattr(LatentDiffusion, "predict_noise", lambda self, *args: broken(*args))
    patches = ((random_patch(model.survey), 1.0), (random_patch(model.survey, seed=7), 0.5))
    errors = {"success": (), "error": RuntimeError}.get(way, Cancelled)
    if errors:
        with pytest.raises(errors):
            m_score(model, STAR, rand(2, 4, 8, 8), patches, QUICK, progress=progress, restarts=2)
    else:
        m_score(model, STAR, rand(2, 4, 8, 8), patches, QUICK, progress=progress, restarts=2)
        # all inversions are one work
        assert steps == [(step, 16) for step in range(1, 17)]
    assert state_of(model) == before


def test_in_a_workspace_the_unedited_inversion_serves_every_patch_and_none_is_mixed_up(model, tmp_path):
    latents, patches = rand(2, 4, 8, 8), [random_patch(model.survey, seed=s, scale=0.5) for s in (0, 50)]
    plain = [m_score(model, STAR, latents, ((patch, 1.0),), QUICK, restarts=1) for patch in patches]
    half = m_score(model, STAR, latents, ((patches[0], 0.5),), QUICK, restarts=1)
    assert len({one.after for one in (*plain, half)}) == 3
    workspace, steps = Workspace(tmp_path), []

    def count(event):
        if event.terms:
            steps.append(event.step)

    def score(patch, strength=1.0, progress=count):
        patched = ((patch, strength),)
        return m_score(model, STAR, latents, patched, QUICK, progress=progress, workspace=workspace, restarts=1)

    assert score(patches[0]) == plain[0]
    assert len(steps) == 8
    assert score(patches[1]) == plain[1]
    assert score(patches[0], 0.5) == half
    assert len(steps) == 8 + 4 + 4
    assert [score(patch) for patch in patches] == plain
    assert len(steps) == 16

    def cancel(event):
        if event.step == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        score(patches[1], 0.25, cancel)
    assert score(patches[1], 0.25) == m_score(model, STAR, latents, ((patches[1], 0.25),), QUICK, restarts=1)


def test_what_cannot_be_scored_is_said(model):
    latents = rand(2, 4, 8, 8)
    with pytest.raises(RequestError, match="leave 'init'"):
        m_score(model, STAR, latents, (), InversionSettings(init="star"))
    with pytest.raises(RequestError, match="one restart, not 0"):
        m_score(model, STAR, latents, (), QUICK, restarts=0)
    with pytest.raises(RequestError, match="no space 'taste'"):
        m_score(model, STAR, latents, (), QUICK, space="taste")
    with pytest.raises(RequestError, match="this model's are"):
        m_score(model, STAR, rand(2, 4, 8, 9), (), QUICK)
    with pytest.raises(TokenError, match="cut off"):
        m_score(model, Concept("x " * 90), latents, (), QUICK)
    other = LatentDiffusion(model.unet, TinyText(), sd_alphas_cumprod(), latent_shape=(4, 8, 8))
    with pytest.raises(ModelError, match="TinyText: leave it out"):
        m_score(other, STAR, latents)
    with pytest.raises(RequestError, match="'taste' is not known"):
        quick_inversion(model, "taste")


def test_the_quick_steps_are_of_the_vocabularys_own_scale(model, parts):
    first = quick_inversion(model, "style")
    assert first.templates == templates("style")
    with torch.no_grad():
        table = parts[0].get_input_embeddings().weight
        table *= 4
        try:
            assert quick_inversion(model).lr == pytest.approx(4 * first.lr, rel=1e-5)
        finally:
            table /= 4


# -- the pictures -------------------------------------------------------------------------------------------------


def test_pictures_are_the_persons_own_or_the_models(model, tmp_path):
    images = rand(3, 3, 64, 64).clamp(-1, 1)
    assert torch.equal(concept_latents(model, STAR, images), model.vae.encode(images))
    workspace, heard = Workspace(tmp_path), []
    first = concept_latents(model, STAR, count=3, seed=5, workspace=workspace, progress=heard.append)
    assert first.shape == (3, 4, 8, 8)
    # the prompts are encoded before the first step
    assert len([event for event in heard if event.step]) == module.DRAW_STEPS
    heard.clear()
    assert torch.equal(concept_latents(model, STAR, count=3, seed=5, workspace=workspace, progress=heard.append), first)
    assert not heard
    assert not torch.equal(concept_latents(model, STAR, count=3, seed=6), first)
    # each is drawn of its own prompt, so fewer are the same ones
    torch.testing.assert_close(concept_latents(model, STAR, count=2, seed=5), first[:2], atol=1e-4, rtol=1e-4)


def test_pictures_that_do_not_fit_are_said(model):
    for images, words in (
        (rand(2, 3, 32, 64).clamp(-1, 1), "64 × 64 pixels for this model"),
        (rand(0, 3, 64, 64), "too few pictures of 'star'"),
        (5 * torch.ones(1, 3, 64, 64), r"values in \[-1, 1\]"),
    ):
        with pytest.raises(RequestError, match=words):
            concept_latents(model, STAR, images)
    with pytest.raises(RequestError, match="at least one image, not 0"):
        concept_latents(model, STAR, count=0)
    model.vae = None
    with pytest.raises(RequestError, match="no autoencoder"):
        concept_latents(model, STAR, torch.zeros(1, 3, 64, 64))


# -- the benchmark ------------------------------------------------------------------------------------------------


def test_every_concept_is_forgotten_by_one_patch_and_kept_by_the_next():
    groups = bench.patch_groups()
    names = [concept.name for group in groups for concept in group]
    known = {word.name for words in CATEGORIES.values() for word in words}
    assert sorted(names) == sorted(known - set(bench.TUNED_ON))
    for group in groups:
        assert {concept.kind for concept in group} == set(CATEGORIES)
        gone = {concept.name for concept in group}
        for concept in group:
            assert concept.replacement not in gone
            assert concept.replacement in {word.name for word in CATEGORIES[concept.kind]}
    of = {concept.name: k for k, group in enumerate(groups) for concept in group}
    plans = bench.plans()
    assert len(plans) == 2 * len(names)
    assert all((of[c.name] == k) == (state == "forgotten") for c, state, k in plans)


def test_the_area_under_the_curve_is_scikit_learns():
    draws = np.random.default_rng(0)
    for size in (5, 40):
        a, b = draws.normal(1, 1, size).round(1), draws.normal(0, 1, size + 3).round(1)  # with ties
        wanted = roc_auc_score([1] * len(a) + [0] * len(b), [*a, *b])
        assert bench.auc(a, b) == pytest.approx(wanted)


def test_the_measured_table_separates_forgotten_from_kept():
    """The bar of the M-Score, worked out again from the table beside the benchmark."""
    with (BENCHMARKS / "m_score.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == bench.COLUMNS
    assert len({row["concept"] for row in found if row["state"] == "forgotten"}) >= 20
    assert not {row["concept"] for row in found} & set(bench.TUNED_ON)
    drops: dict[tuple[str, str], list[float]] = {}
    for row in found:
        if row["pictures"] == "rendered":  # drawn ones are there for fewer concepts
            drop = float(row["input_before"]) - float(row["input_after"])
            drops.setdefault((row["concept"], row["state"]), []).append(drop)
    assert len(drops) == 2 * len(bench.CONCEPTS)
    means = [sum(several) / len(several) for several in drops.values()]
    assert roc_auc_score([state == "forgotten" for _, state in drops], means) >= 0.95
    assert "input: AUC" in bench.summary(found)


# -- on the embedded model ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_forgotten_concepts_score_drops_and_a_kept_ones_does_not(tmp_path):
    from tiny import fit

    from forget_concept.core import mini

    model, workspace = mini.load(), Workspace(tmp_path)
    heartbeat, tree = Concept("heart", "object", "circle"), Concept("tree", "object")
    request = ForgetRequest((heartbeat,), preserve=tuple(w.name for w in CATEGORIES["object"] if w.name != "heart"))
    patches = ((fit(model, request), 1.0),)
    scores = []
    for concept in (heartbeat, tree):
        latents = concept_latents(model, concept, workspace=workspace)
        scores.append(m_score(model, concept, latents, patches, workspace=workspace))
    assert scores[0].before > 0.3
    assert scores[0].drop > scores[1].drop + 0.05
