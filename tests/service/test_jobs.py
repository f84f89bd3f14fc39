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
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.errors import ForgetConceptError, ModelError, RequestError
from forget_concept.core.formats import load_patch
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import Progress, ProgressEvent
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.errors import BusyError, NotFoundError
from forget_concept.core.service.evaluate_job import EvaluateJob
from forget_concept.core.service.forget_job import ForgetJob, comparison_pictures
from forget_concept.core.service.host_interface import LoadedModel
from forget_concept.core.service.jobs import Job, Outcome
from forget_concept.core.service.patch_store import PatchStore

STAR = ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon", "heart"))
PLAN = plan_request(STAR)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return mini.load()


@pytest.fixture(scope="module")
def patch(model: LatentDiffusion) -> Patch:
    return fit(model, STAR)


@pytest.fixture()
def store(model: LatentDiffusion, tmp_path: Path) -> PatchStore:
    return PatchStore(FakeWebui(model, tmp_path))


def over(store: PatchStore, job: Job, seconds: float = 60) -> Job:
    return until(lambda: store.jobs.get(job.id).over and store.jobs.get(job.id), seconds)


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


def test_a_job_is_told_step_by_step(store: PatchStore, steps: Steps) -> None:
    job = store.jobs.start("forget", "forgetting 'star'", steps.work, steps.finish)
    assert job.state == "queued"
    steps.go.release()
    seen = until(lambda: (now := store.jobs.get(job.id)).step == 1 and now)
    assert (seen.state, seen.total, seen.loss, seen.message, seen.left) == ("running", 4, 1.0, "training", None)
    steps.go.release()
    seen = until(lambda: (now := store.jobs.get(job.id)).step == 2 and now)
    assert seen.left is not None and seen.left > 0
    steps.go.release()
    steps.go.release()
    done = over(store, job)
    assert (done.state, done.error, done.left) == ("done", "", None)
    assert done.outcome is not None and done.outcome.summary == "it is done"
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


def test_a_second_job_is_refused_in_words_and_the_first_goes_on(store: PatchStore, steps: Steps) -> None:
    first = store.jobs.start("forget", "forgetting 'star'", steps.work, steps.finish)
    with pytest.raises(BusyError, match=r"Another job is running \(forgetting 'star'\)"):
        store.forget(ForgetJob(PLAN))
    for _ in range(4):
        steps.go.release()
    assert over(store, first).state == "done"
    store.jobs.check_free()


def test_a_patch_is_not_put_on_or_taken_off_under_a_job(store: PatchStore, steps: Steps, patch: Patch) -> None:
    """Else the caller would wait for the queue as long as the job takes."""
    name = store.library.save(patch, "", "").name
    store.apply(name, 1.0)
    job = store.jobs.start("forget", "forgetting 'star'", steps.work, steps.finish)
    until(lambda: store.jobs.get(job.id).state == "running")
    for work in (lambda: store.apply(name, 0.5), lambda: store.remove(name)):
        with pytest.raises(BusyError, match=r"Another job is running \(forgetting 'star'\)"):
            work()
    store.jobs.cancel(job.id)
    steps.go.release()
    assert over(store, job).state == "cancelled"
    store.remove(name)


def test_only_one_of_many_that_start_at_once_runs(store: PatchStore, steps: Steps) -> None:
    began, refused = [], []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            began.append(store.jobs.start("forget", "one", steps.work, steps.finish))
        except BusyError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(began) == 1 and len(refused) == 7


def test_a_job_that_is_interrupted_writes_nothing(store: PatchStore, steps: Steps) -> None:
    job = store.jobs.start("forget", "one", steps.work, steps.finish)
    steps.go.release()
    until(lambda: store.jobs.get(job.id).step == 1)
    assert store.jobs.cancel(job.id).stopping
    steps.go.release()
    assert over(store, job).state == "cancelled"
    assert steps.written == []
    assert store.jobs.cancel(job.id).state == "cancelled"


def test_the_webuis_own_interrupt_ends_a_job(store: PatchStore, steps: Steps) -> None:
    job = store.jobs.start("forget", "one", steps.work, steps.finish)
    store.host.interrupted.set()
    steps.go.release()
    assert over(store, job).state == "cancelled"
    assert steps.written == []


def test_a_job_waits_for_the_queue_and_can_be_interrupted_there(store: PatchStore, steps: Steps) -> None:
    with store.host.queue:
        job = store.jobs.start("forget", "one", steps.work, steps.finish)
        time.sleep(0.05)
        waiting = store.jobs.get(job.id)
        assert (waiting.state, waiting.message) == ("queued", "waiting for the queue")
        store.jobs.cancel(job.id)
    assert over(store, job).state == "cancelled"
    assert not store.host.events and steps.written == []


def test_another_checkpoint_meanwhile_is_told_and_nothing_is_saved(store: PatchStore, steps: Steps) -> None:
    job = store.jobs.start("forget", "one", steps.work, steps.finish)
    steps.go.release()
    until(lambda: store.jobs.get(job.id).step == 1)
    store.host.loaded = LoadedModel("another.safetensors [1111]", "sd1", 2)
    for _ in range(4):
        steps.go.release()
    failed = over(store, job)
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
def test_a_job_that_fails_says_why_and_the_next_one_runs(store: PatchStore, error: Exception, words: str) -> None:
    def work(told: Progress) -> None:
        raise error

    failed = over(store, store.jobs.start("forget", "one", work, lambda made: Outcome("", {})))
    assert failed.state == "failed"
    assert re.search(words, failed.error)
    assert not store.host.queue.locked()
    after = store.jobs.start("forget", "two", lambda told: None, lambda made: Outcome("fine", {}))
    assert over(store, after).state == "done"


def test_the_last_jobs_are_kept(store: PatchStore) -> None:
    ids = []
    for _ in range(22):
        job = store.jobs.start("forget", "one", lambda told: None, lambda made: Outcome("", {}))
        ids.append(job.id)
        over(store, job)
    assert [job.id for job in store.jobs.all()] == ids[-20:]
    with pytest.raises(NotFoundError, match="There is no job"):
        store.jobs.get(ids[0])
    assert store.jobs.latest("evaluate") is None
    assert store.jobs.latest().id == ids[-1]


# -- forgetting and evaluating, on the embedded model ---------------------------------------------------------------


def test_forgetting_gives_the_core_s_own_patch_with_picture_and_card(
    store: PatchStore, model: LatentDiffusion, patch: Patch
) -> None:
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    job = over(store, store.forget(ForgetJob(PLAN, folder="forget", apply=0.5, pairs=2, steps=2)))
    assert job.state == "done", job.error
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    (entry,) = store.library.entries()
    assert (entry.name, entry.place) == ("star_00001", "forget/star_00001.safetensors")
    own, core = load_patch(entry.path), patch
    assert all(torch.equal(own.factors[k].up, f.up) for k, f in core.factors.items())
    assert all(torch.equal(own.factors[k].down, f.down) for k, f in core.factors.items())
    card = json.loads(entry.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert "star" in card["description"] and card["activation text"] == "" and card["preferred weight"] == 1.0
    assert ForgetRequest.from_json(json.dumps(job.outcome.data["request"])) == STAR
    assert [(one.name, one.strength) for one in store.active()] == [("star_00001", 0.5)]
    assert store.host.refreshed == 1
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
    store.remove("star_00001")
    assert store.active() == []


def test_a_patch_that_cannot_be_put_on_is_saved_all_the_same(store: PatchStore) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("This model is in fp8.")

    store.host.apply = refuse
    job = over(store, store.forget(ForgetJob(PLAN, apply=1.0, pairs=0)))
    assert job.state == "done"
    assert "could not be applied to the loaded model: This model is in fp8." in job.outcome.summary
    assert store.library.names() == ["star_00001"] and job.outcome.data["applied"] is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../out"}, "not inside the Lora folder"),
        ({"name": "con"}, "is not a valid file name"),
        ({"pairs": 17}, "picture pairs"),
        ({"apply": float("nan")}, "strength"),
        ({"apply": 11.0}, "strength"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_begins(store: PatchStore, change: dict, words: str) -> None:
    with pytest.raises(ForgetConceptError, match=words):
        store.forget(dataclasses.replace(ForgetJob(PLAN), **change))
    assert store.jobs.all() == [] and store.library.entries() == []


def test_without_a_model_nothing_begins(store: PatchStore) -> None:
    store.host.loaded = None
    with pytest.raises(ModelError, match="No checkpoint is loaded"):
        store.forget(ForgetJob(PLAN))
    assert store.jobs.all() == []


def test_the_pictures_asked_for_are_of_both_kinds_each_once() -> None:
    request = ForgetRequest((Concept("star"), Concept("Vermeer", "style")), preserve=("moon",), seed=7)
    found = [(picture.prompt, picture.seed) for picture in comparison_pictures(request, 6)]
    assert found == [
        ("a photo of star", 7),
        ("a photo in the style of Vermeer", 7),
        ("a photo of star", 8),
        ("a photo of moon", 7),
        ("a photo of moon", 8),
        ("a photo of moon", 9),
    ]
    assert comparison_pictures(request, 0) == []
    assert [p.prompt for p in comparison_pictures(ForgetRequest((Concept("star"),)), 1)] == ["a photo of star"]
    high = comparison_pictures(dataclasses.replace(request, seed=2**64 - 1), 3)
    assert all(torch.Generator().manual_seed(picture.seed) for picture in high)


def test_an_evaluation_writes_a_report_that_finds_the_concept_gone(store: PatchStore, patch: Patch) -> None:
    name = store.library.save(patch, "", "").name
    job = over(store, store.evaluate(EvaluateJob(name, count=4, steps=4)))
    assert job.state == "done", job.error
    (report,) = store.reports.names()
    assert job.outcome.data["report"] == report == "star_00001"
    page = store.reports.find(report).read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>") and "star" in page
    figures = json.loads(store.reports.find(report, ".json").read_text(encoding="utf-8"))
    ua = figures["evaluations"][0]["scores"]["patched"]["ua"]
    assert ua["value"] >= 0.75 and ua["n"] == 4
    assert figures["provenance"]["patches"][0]["file"] == "star_00001.safetensors"
    assert str(store.host.folder) not in job.outcome.summary
    with pytest.raises(RequestError, match="no report"):
        store.reports.find("../star_00001")


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
def test_an_evaluation_that_cannot_be_is_refused(store: PatchStore, patch: Patch, change: dict, words: str) -> None:
    store.library.save(patch, "", "")
    with pytest.raises(ForgetConceptError, match=words):
        store.evaluate(dataclasses.replace(EvaluateJob("star_00001"), **change))
    assert store.jobs.all() == []
