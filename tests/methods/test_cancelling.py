"""Cancel is looked at all the time: no part of any method keeps a user waiting."""

from __future__ import annotations

import time

import pytest
import torch

from forget_concept.core import mini
from forget_concept.core.errors import Cancelled
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import all_methods, plan_request
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import quick_settings

# seconds of this thread's processor time: at most 1 on an idle machine, half as much again where its core is shared
WAIT = 1.5


@pytest.fixture(scope="module")
def model():
    return mini.load()


def waits(model, request):
    """The processor seconds between two looks at Cancel, with what came before and after each, until the end."""
    found, last, message = [], time.thread_time(), "the start"

    def look(event):
        nonlocal last, message
        found.append((time.thread_time() - last, message, event.message))
        last, message = time.thread_time(), event.message

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = plan_request(request)
        last = time.thread_time()
        fit(model, plan, look, Inputs())
    finally:
        torch.set_num_threads(threads)
    return [*found, (time.thread_time() - last, message, "the end")]


@pytest.mark.parametrize("method", list(all_methods()))
def test_no_part_of_a_method_goes_on_without_a_look(model, method):
    settings = quick_settings(all_methods()[method])
    longest = max(waits(model, ForgetRequest((Concept("star", "object", "circle"),), method=method, settings=settings)))
    assert longest[0] < WAIT, longest


@pytest.mark.long
@pytest.mark.parametrize("method", [name for name, found in all_methods().items() if found.trained])
def test_nor_does_it_with_the_batches_of_real_use(model, method):
    settings = {"steps": 2} | ({"fisher_samples": 2} if method == "selective_amnesia" else {})
    longest = max(waits(model, ForgetRequest((Concept("star", "object", "circle"),), method=method, settings=settings)))
    assert longest[0] < WAIT, longest


def test_nor_does_one_of_many_concepts(model):
    concepts = tuple(Concept(f"thing {number}") for number in range(60))
    kept = tuple(f"kept {number}" for number in range(60))
    longest = max(waits(model, ForgetRequest(concepts, preserve=kept)))
    assert longest[0] < WAIT, longest


def test_cancelled_at_any_look_nothing_is_made(model):
    request = ForgetRequest((Concept("star"),))
    looks = len(waits(model, request))
    assert looks > 10
    for at in range(1, looks, max(looks // 12, 1)):
        left = at

        def cancel(event):
            nonlocal left
            left -= 1
            if left == 0:
                raise Cancelled

        with pytest.raises(Cancelled):
            fit(model, plan_request(request), cancel, Inputs())
