"""The parts of the webui's adapters that need no webui: patches in weights, and words that mean themselves."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from tiny import tiny_model
from torch import nn

from forget_concept.core.errors import PatchError
from forget_concept.core.models.survey import survey
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.service.live_weights import LiveWeights
from forget_concept.sd_webui_ext.prompts import literal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Host:
    """What a webui does to the same weights: its LoRA is written over them, from a backup that it keeps."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.survey = unet, survey(unet)
        self.backups: dict[nn.Module, torch.Tensor] = {}

    @torch.no_grad()
    def lora(self, seed: int | None) -> None:
        for site in self.survey.sites:
            module = site.projection("to_k")
            if module in self.backups:
                module.weight.copy_(self.backups[module])
            if seed is not None:
                self.backups.setdefault(module, module.weight.detach().clone())
                generator = torch.Generator().manual_seed(seed)
                module.weight.add_(torch.randn(module.weight.shape, generator=generator).to(module.weight))

    @torch.no_grad()
    def settle(self, module: nn.Module) -> None:
        if (backup := self.backups.pop(module, None)) is not None:
            module.weight.copy_(backup)  # type: ignore[operator]

    def settled(self, module: nn.Module) -> torch.Tensor:
        return self.backups.get(module, module.weight)  # type: ignore[arg-type]

    def live(self) -> LiveWeights:
        return LiveWeights(self.survey, self.settle, self.settled)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.unet.state_dict().items()}


@pytest.fixture(params=DTYPES, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    return Host(tiny_model().unet.to(request.param))


def patch_of(found: Host, seed: int, which: str = "to_k", sites: int = 4, size: float = 0.1) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for site in random.Random(seed).sample(list(found.survey.sites), sites):
        out, into = site.projection(which).weight.shape
        up, down = torch.randn(out, 2, generator=generator), torch.randn(2, into, generator=generator)
        factors[site.key(which)] = LowRank(up * size, down * size)
    return Patch(factors)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_any_order_among_loras_leaves_the_weights_bit_for_bit(host: Host) -> None:
    live, before, rng = host.live(), host.weights(), random.Random(0)
    patches = [patch_of(host, seed) for seed in range(4)]
    for _ in range(200):
        action = rng.random()
        if action < 0.4:
            live.apply(rng.choice("abcd"), rng.choice(patches), rng.choice([1.0, 0.3, -2.0]))
        elif action < 0.7 and live.patches:
            live.remove(rng.choice(list(live.patches)))
        else:
            host.lora(rng.choice([None, 7, 8]))
        assert live.state() == "in force"
    for name in list(live.patches):
        live.remove(name)
    host.lora(None)
    assert same(host.weights(), before)


def test_what_stands_in_the_weights_is_the_sum(host: Host) -> None:
    live, one, two = host.live(), patch_of(host, 1), patch_of(host, 2)
    before = host.weights()
    host.lora(5)
    with_lora = host.weights()
    live.apply("one", one, 1.0)
    live.apply("two", two, -0.5)
    expected = Patch.combined([(one, 1.0), (two, -0.5)])
    for key in expected.factors:
        layer = host.survey.layer(key)
        wide = before[f"{layer.path}.weight"].double() + expected.factors[key].to(dtype=torch.float64).delta()
        assert torch.equal(layer.module.weight, wide.to(layer.module.weight.dtype))
    # on top of the patches the host's LoRA is what it was without them
    host.lora(5)
    moved = host.weights()
    live.remove("one")
    live.remove("two")
    host.lora(5)
    assert same(host.weights(), with_lora)
    assert not same(moved, with_lora)


def test_aside_and_back_whatever_happens(host: Host) -> None:
    live, before = host.live(), host.weights()
    live.apply("one", patch_of(host, 1), 1.0)
    patched = host.weights()
    with pytest.raises(RuntimeError, match="on purpose"), live.aside():
        assert same(host.weights(), before) and live.state() == "in force"
        raise RuntimeError("on purpose")
    assert same(host.weights(), patched)


def test_it_may_be_asked_for_at_any_moment(host: Host) -> None:
    """The list on the page is looked at while patches go in and out."""
    live, patches = host.live(), [patch_of(host, seed, sites=2) for seed in range(3)]
    told: set[str] = set()
    over = threading.Event()

    def ask() -> None:
        try:
            while not over.is_set():
                told.add(live.state())
        except Exception as error:
            told.add(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for turn in range(60):
            live.apply("abc"[turn % 3], patches[turn % 3], 1.0)
            with live.aside():
                time.sleep(0)
            if turn % 2:
                live.remove("abc"[turn % 3])
    finally:
        over.set()
        asking.join()
    assert told == {"in force"}


def test_what_fails_on_the_way_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    live, before = host.live(), host.weights()
    live.apply("one", patch_of(host, 1), 1.0)
    patched = host.weights()

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("on purpose")

    monkeypatch.setattr(Patch, "merged_state", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        live.apply("two", patch_of(host, 2), 1.0)
    monkeypatch.undo()
    assert same(host.weights(), patched) and list(live.patches) == ["one"]
    live.remove("one")
    assert same(host.weights(), before)


def test_others_hands_on_the_weights(host: Host) -> None:
    live, one = host.live(), patch_of(host, 1)
    live.apply("one", one, 1.0)
    first, *rest = (host.survey.linear(key).weight for key in one.factors)
    with torch.no_grad():
        first.add_(1)
    assert live.state() == "mixed"
    for act in (lambda: live.remove("one"), lambda: live.apply("two", one, 1.0), lambda: live.aside().__enter__()):
        with pytest.raises(PatchError, match="Something else has changed"):
            act()
    with torch.no_grad():
        for weight in rest:
            weight.add_(1)
    assert live.state() == "gone"
    changed = host.weights()
    with live.aside():
        assert same(host.weights(), changed)
    live.remove("one")
    assert same(host.weights(), changed) and not live.patches
    live.apply("two", one, 1.0)
    live.remove("two")
    assert same(host.weights(), changed)


def test_an_edit_that_rounding_takes_away_is_no_success(host: Host) -> None:
    live, before = host.live(), host.weights()
    tiny = patch_of(host, 1, size=1e-20)
    with pytest.raises(PatchError, match="changes nothing here: at strength 1 all of it is lost in the rounding"):
        live.apply("one", tiny, 1.0)
    assert not live.patches and same(host.weights(), before)
    live.apply("one", patch_of(host, 1), 0.0)  # nothing was asked for, and nothing done
    assert live.state() == "in force"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a (red) star", r"a \(red\) star"),
        (r"a \(red\) star", r"a \(red\) star"),
        ("[from:to:0.5]", r"\[from:to:0.5\]"),
        ("a BREAK b, BREAKFAST", "a break b, BREAKFAST"),
        ("back\\slash", r"back\\slash"),
        ("(a:1.3)", r"\(a:1.3\)"),
    ],
)
def test_the_syntax_of_prompts_is_escaped(text: str, prompt: str) -> None:
    assert literal(text) == prompt
