"""The webui's jobs: one at a time, in a thread, told, interrupted, and nothing left behind that was not asked for."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fakewebui import FakeWebui

from forget_concept.core import mini
from forget_concept.core.errors import ForgetConceptError, ModelError, RequestError
from forget_concept.core.formats import load_patch
from forget_concept.core.methods.fit import fit
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import Progress, ProgressEvent
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.errors import Busy, Missing
from forget_concept.core.service.evaluate_job import Evaluating
from forget_concept.core.service.forget_job import Forgetting, asked_pictures
from forget_concept.core.service.host_interface import LoadedModel
from forget_concept.core.service.jobs import Job, Outcome
from forget_concept.core.service.patch_store import Desk

STAR = ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon", "heart"))


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return mini.load()


@pytest.fixture(scope="module")
def patch(model: LatentDiffusion) -> Patch:
    return fit(model, STAR)


@pytest.fixture()
def desk(model: LatentDiffusion, tmp_path: Path) -> Desk:
    return Desk(FakeWebui(model, tmp_path))


def over(desk: Desk, job: Job, seconds: float = 60) -> Job:
    return until(lambda: desk.jobs.get(job.id).over and desk.jobs.get(job.id), seconds)


def until(found: Callable[[], object], seconds: float = 10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


class Steps:
    """Work that goes a step each time it is let."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.written: list[str] = []

    def work(self, told: Progress) -> str:
        for step in range(1, 5):
            assert self.go.acquire(timeout=20)
            told(ProgressEvent(step, 4, loss=1 / step, message="training"))
        return "made"

    def finish(self, made: str) -> Outcome:
        self.written.append(made)
        return Outcome("it is done", {"what": made})


@pytest.fixture()
def steps() -> Iterator[Steps]:
    found = Steps()
    yield found
    for _ in range(10):
        found.go.release()


def test_a_job_is_told_step_by_step(desk: Desk, steps: Steps) -> None:
    job = desk.jobs.start("forget", "forgetting 'star'", steps.work, steps.finish)
    assert job.state == "queued"
    steps.go.release()
    seen = until(lambda: (now := desk.jobs.get(job.id)).step == 1 and now)
    assert (seen.state, seen.total, seen.loss, seen.message, seen.left) == ("running", 4, 1.0, "training", None)
    steps.go.release()
    seen = until(lambda: (now := desk.jobs.get(job.id)).step == 2 and now)
    assert seen.left is not None and seen.left > 0
    steps.go.release()
    steps.go.release()
    done = over(desk, job)
    assert (done.state, done.error, done.left) == ("done", "", None)
    assert done.outcome is not None and done.outcome.words == "it is done"
    assert steps.written == ["made"]
    plain = json.loads(json.dumps(done.as_dict()))
    assert plain["result"] == {"what": "made"} and plain["pictures"] == 0


def test_the_time_left_is_that_of_the_part(model: LatentDiffusion, tmp_path: Path) -> None:
    """Ten seconds a step: three steps of a part are left after the second, whatever came before."""
    now = [0.0]
    from forget_concept.core.service.jobs import Jobs

    jobs = Jobs(FakeWebui(model, tmp_path), clock=lambda: now[0])
    seen: list[float | None] = []

    def work(told: Progress) -> None:
        for message, total in (("drawing", 3), ("training", 5)):
            for step in range(total + 1):
                told(ProgressEvent(step, total, message=message))
                seen.append(jobs.all()[0].left)
                now[0] += 10

    job = jobs.start("forget", "x", work, lambda made: Outcome("", {}))
    until(lambda: jobs.get(job.id).over)
    assert seen == [None, 20, 10, None, None, 40, 30, 20, 10, None]


def test_a_second_job_is_refused_in_words_and_the_first_goes_on(desk: Desk, steps: Steps) -> None:
    first = desk.jobs.start("forget", "forgetting 'star'", steps.work, steps.finish)
    with pytest.raises(Busy, match=r"Another job is under way \(forgetting 'star'\)"):
        desk.forget(Forgetting(STAR))
    for _ in range(4):
        steps.go.release()
    assert over(desk, first).state == "done"
    desk.jobs.check_free()


def test_a_patch_is_not_put_on_or_taken_off_under_a_job(desk: Desk, steps: Steps, patch: Patch) -> None:
    """Else the caller would wait for the queue as long as the job takes."""
    name = desk.library.save(patch, "", "").name
    desk.apply(name, 1.0)
    job = desk.jobs.start("forget", "forgetting 'star'", steps.work, steps.finish)
    until(lambda: desk.jobs.get(job.id).state == "running")
    for work in (lambda: desk.apply(name, 0.5), lambda: desk.remove(name)):
        with pytest.raises(Busy, match=r"Another job is under way \(forgetting 'star'\)"):
            work()
    desk.jobs.cancel(job.id)
    steps.go.release()
    assert over(desk, job).state == "cancelled"
    desk.remove(name)


def test_only_one_of_many_that_start_at_once_runs(desk: Desk, steps: Steps) -> None:
    began, refused = [], []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            began.append(desk.jobs.start("forget", "one", steps.work, steps.finish))
        except Busy as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(began) == 1 and len(refused) == 7


def test_a_job_that_is_interrupted_writes_nothing(desk: Desk, steps: Steps) -> None:
    job = desk.jobs.start("forget", "one", steps.work, steps.finish)
    steps.go.release()
    until(lambda: desk.jobs.get(job.id).step == 1)
    assert desk.jobs.cancel(job.id).stopping
    steps.go.release()
    assert over(desk, job).state == "cancelled"
    assert steps.written == []
    assert desk.jobs.cancel(job.id).state == "cancelled"


def test_the_webuis_own_interrupt_ends_a_job(desk: Desk, steps: Steps) -> None:
    job = desk.jobs.start("forget", "one", steps.work, steps.finish)
    desk.host.interrupted.set()
    steps.go.release()
    assert over(desk, job).state == "cancelled"
    assert steps.written == []


def test_a_job_waits_for_the_queue_and_can_be_interrupted_there(desk: Desk, steps: Steps) -> None:
    with desk.host.queue:
        job = desk.jobs.start("forget", "one", steps.work, steps.finish)
        time.sleep(0.05)
        waiting = desk.jobs.get(job.id)
        assert (waiting.state, waiting.message) == ("queued", "waiting for the webui")
        desk.jobs.cancel(job.id)
    assert over(desk, job).state == "cancelled"
    assert not desk.host.events and steps.written == []


def test_another_checkpoint_meanwhile_is_told_and_nothing_is_saved(desk: Desk, steps: Steps) -> None:
    job = desk.jobs.start("forget", "one", steps.work, steps.finish)
    steps.go.release()
    until(lambda: desk.jobs.get(job.id).step == 1)
    desk.host.loaded = LoadedModel("another.safetensors [1111]", "sd1", 2)
    for _ in range(4):
        steps.go.release()
    failed = over(desk, job)
    assert failed.state == "failed" and steps.written == []
    assert "from 'embedded.safetensors [0000]' to 'another.safetensors [1111]'" in failed.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModelError("The model has no text encoder."), "^The model has no text encoder.$"),
        (ZeroDivisionError("division by zero"), r"a fault of the program \(ZeroDivisionError: division by zero\)"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "too little memory"),
    ],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(desk: Desk, error: Exception, words: str) -> None:
    def work(told: Progress) -> None:
        raise error

    failed = over(desk, desk.jobs.start("forget", "one", work, lambda made: Outcome("", {})))
    assert failed.state == "failed"
    assert re.search(words, failed.error)
    assert not desk.host.queue.locked()
    after = desk.jobs.start("forget", "two", lambda told: None, lambda made: Outcome("fine", {}))
    assert over(desk, after).state == "done"


def test_the_last_jobs_are_kept(desk: Desk) -> None:
    ids = []
    for _ in range(22):
        job = desk.jobs.start("forget", "one", lambda told: None, lambda made: Outcome("", {}))
        ids.append(job.id)
        over(desk, job)
    assert [job.id for job in desk.jobs.all()] == ids[-20:]
    with pytest.raises(Missing, match="There is no job"):
        desk.jobs.get(ids[0])
    assert desk.jobs.latest("evaluate") is None
    assert desk.jobs.latest().id == ids[-1]


# -- forgetting and evaluating, on the embedded model ---------------------------------------------------------------


def test_forgetting_gives_the_core_s_own_patch_with_picture_and_card(
    desk: Desk, model: LatentDiffusion, patch: Patch
) -> None:
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    job = over(desk, desk.forget(Forgetting(STAR, folder="forget", apply=0.5, pairs=2, steps=2)))
    assert job.state == "done", job.error
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    (entry,) = desk.library.entries()
    assert (entry.name, entry.place) == ("star_00001", "forget/star_00001.safetensors")
    own, core = load_patch(entry.path), patch
    assert all(torch.equal(own.factors[k].up, f.up) for k, f in core.factors.items())
    assert all(torch.equal(own.factors[k].down, f.down) for k, f in core.factors.items())
    card = json.loads(entry.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert "star" in card["description"] and card["activation text"] == "" and card["preferred weight"] == 1.0
    assert ForgetRequest.from_json(json.dumps(job.outcome.data["request"])) == STAR
    assert [(one.name, one.strength) for one in desk.active()] == [("star_00001", 0.5)]
    assert desk.host.refreshed == 1
    # the preview is the first pair, and the pairs are what the model draws without and with the patch
    from PIL import Image

    first, kept = job.outcome.pairs
    assert (first.prompt, kept.prompt) == ("a photo of star", "a photo of moon")
    assert not torch.equal(first.before, first.after)
    with Image.open(entry.preview) as picture:
        assert picture.size == (2 * first.before.shape[2], first.before.shape[1])
        left = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    whole = left.view(128, 256, 3).permute(2, 0, 1)
    assert torch.equal(whole[:, :, :128], first.before) and torch.equal(whole[:, :, 128:], first.after)
    desk.remove("star_00001")
    assert desk.active() == []


def test_a_patch_that_cannot_be_put_on_is_saved_all_the_same(desk: Desk) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("This model is in fp8.")

    desk.host.apply = refuse
    job = over(desk, desk.forget(Forgetting(STAR, apply=1.0, pairs=0)))
    assert job.state == "done"
    assert "could not be put into the loaded model: This model is in fp8." in job.outcome.words
    assert desk.library.names() == ["star_00001"] and job.outcome.data["applied"] is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request": ForgetRequest((Concept("star", "object", "a star"),))}, "the concept itself"),
        ({"request": dataclasses.replace(STAR, method="magic")}, "'magic' is not known"),
        ({"request": dataclasses.replace(STAR, settings={"rang": 1})}, "no setting 'rang'"),
        ({"request": ForgetRequest((Concept("star", images=("a.png",)),))}, "from words alone"),
        ({"name": "../out"}, "no place in the Lora folder"),
        ({"name": "con"}, "cannot be part of a file's name"),
        ({"pairs": 17}, "picture pairs"),
        ({"apply": float("nan")}, "strength"),
        ({"apply": 11.0}, "strength"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_begins(desk: Desk, change: dict, words: str) -> None:
    with pytest.raises(ForgetConceptError, match=words):
        desk.forget(dataclasses.replace(Forgetting(STAR), **change))
    assert desk.jobs.all() == [] and desk.library.entries() == []


def test_without_a_model_nothing_begins(desk: Desk) -> None:
    desk.host.loaded = None
    with pytest.raises(ModelError, match="No checkpoint is loaded"):
        desk.forget(Forgetting(STAR))
    assert desk.jobs.all() == []


def test_the_pictures_asked_for_are_of_both_kinds_each_once() -> None:
    request = ForgetRequest((Concept("star"), Concept("Vermeer", "style")), preserve=("moon",), seed=7)
    found = [(picture.prompt, picture.seed) for picture in asked_pictures(request, 6)]
    assert found == [
        ("a photo of star", 7),
        ("a photo in the style of Vermeer", 7),
        ("a photo of star", 8),
        ("a photo of moon", 7),
        ("a photo of moon", 8),
        ("a photo of moon", 9),
    ]
    assert asked_pictures(request, 0) == []
    assert [p.prompt for p in asked_pictures(ForgetRequest((Concept("star"),)), 1)] == ["a photo of star"]
    high = asked_pictures(dataclasses.replace(request, seed=2**64 - 1), 3)
    assert all(torch.Generator().manual_seed(picture.seed) for picture in high)


def test_an_evaluation_writes_a_report_that_finds_the_concept_gone(desk: Desk, patch: Patch) -> None:
    name = desk.library.save(patch, "", "").name
    job = over(desk, desk.evaluate(Evaluating(name, count=4, steps=4)))
    assert job.state == "done", job.error
    (report,) = desk.reports.names()
    assert job.outcome.data["report"] == report == "star_00001"
    page = desk.reports.find(report).read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>") and "star" in page
    figures = json.loads(desk.reports.find(report, ".json").read_text(encoding="utf-8"))
    ua = figures["evaluations"][0]["scores"]["patched"]["ua"]
    assert ua["value"] >= 0.75 and ua["n"] == 4
    assert figures["provenance"]["patches"][0]["file"] == "star_00001.safetensors"
    assert str(desk.host.folder) not in job.outcome.words
    with pytest.raises(RequestError, match="no report"):
        desk.reports.find("../star_00001")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": "nothing"}, "There is no patch 'nothing'"),
        ({"count": 3}, "4 to 1000"),
        ({"steps": 0}, "sampling steps must be 1"),
        ({"seed": -1}, "seed must be 0"),
        ({"strength": float("nan")}, "strength must be"),
        ({"attacks": "hard"}, "'hard' are not known"),
        ({"benchmark": "mine"}, "'mine' is not known"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(desk: Desk, patch: Patch, change: dict, words: str) -> None:
    desk.library.save(patch, "", "")
    with pytest.raises(ForgetConceptError, match=words):
        desk.evaluate(dataclasses.replace(Evaluating("star_00001"), **change))
    assert desk.jobs.all() == []
