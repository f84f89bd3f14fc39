"""The same request with another number of threads, which changes only the order of sums."""

from __future__ import annotations

import pytest
import torch
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

# largest relative difference of a layer's change, Frobenius norm
CASES = {
    "uce": (ForgetRequest((Concept("star", replacement="circle"),), ("moon",)), 1e-6),
    "uce without a replacement": (ForgetRequest((Concept("Ivy Stone", "identity"),)), 1e-6),
    "forget_me_not": (
        ForgetRequest((Concept("star"),), method="forget_me_not", preset="published", settings={"steps": 4}),
        1e-3,
    ),
}


@pytest.fixture()
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", list(CASES))
def test_another_number_of_threads_gives_the_same_patch_within_a_tolerance(threads, case):
    request, tolerance = CASES[case]
    found = {}
    for count in (1, 2, 4):
        threads(count)
        found[count] = fit(mini.load(), request)  # a model remembers its text states
    worst = 0.0
    for count in (2, 4):
        assert found[count].factors.keys() == found[1].factors.keys()
        for key, factor in found[1].factors.items():
            delta, other = (one.to(dtype=torch.float64).delta() for one in (factor, found[count].factors[key]))
            worst = max(worst, float((delta - other).norm() / delta.norm()))
    print(f"{case}: {worst:.2g}")
    assert worst <= tolerance


def test_the_same_number_of_threads_gives_the_same_bits(threads):
    request, _ = CASES["uce"]
    threads(2)
    one, other = fit(mini.load(), request), fit(mini.load(), request)
    for key, factor in one.factors.items():
        assert torch.equal(factor.up, other.factors[key].up) and torch.equal(factor.down, other.factors[key].down)
