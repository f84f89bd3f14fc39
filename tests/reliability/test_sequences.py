"""Random sequences of everything that a user does with patches, beside a plain reference: nothing is ever left behind.

The reference knows the base weights and, by name, each patch with its strength: the weights are then the base plus the
sum of strength times patch, whatever was done before. It is compared after every action. Fits and fits that break off
come in between, beside what is applied at the time.
"""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
from tiny import fit, flags, forward, random_patch, state_hash, tiny_model
from trained_cases import SMALL, same

from forget_concept.core.errors import Cancelled, PatchError
from forget_concept.core.formats import kohya, load_patch
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.live_weights import LiveWeights

SHORT, LONG = 30, int(os.environ.get("FORGET_CONCEPT_SEQUENCES", "1000"))
ACTIONS = 10
NAMES = ("a", "b", "c", "d")
# the output of hooks and of merged weights, which add up in another order; outputs are near 1
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.2}
REQUESTS = {
    "uce": ForgetRequest((Concept("star"),), ("moon",), settings={"keep_common": False, "contexts": False}),
    "forget_me_not": ForgetRequest(
        (Concept("star"),),
        method="forget_me_not",
        settings={"steps": 1, "batch_size": 1, "n_images": 1, "sample_steps": 1, "contexts": False, "rank": 1},
    ),
}


class Model:
    """A model that all sequences share, as a host's user keeps one for days, with a copy of what it was."""

    def __init__(self, dtype):
        self.model = tiny_model(**SMALL)
        self.model.unet.to(dtype)
        self.base, self.merged = copy.deepcopy(self.model.unet), copy.deepcopy(self.model.unet)
        self.before = (state_hash(self.model.unet), flags(self.model.unet))
        self.untouched = out(self.model.unet)


class Reference:
    """What must be there: the patches that are applied, by way of application and name."""

    def __init__(self, shared):
        self.shared = shared
        self.ways = {"hooks": {}, "weights": {}}

    def merged(self, *ways):
        """The base weights, by path of a layer, plus strength times patch of everything applied in these ways."""
        changes = {}
        for way in ways:
            for patch, strength in self.ways[way].values():
                for key, factor in patch.factors.items():
                    change = strength * (factor.up.double() @ factor.down.double())
                    changes[key] = changes.get(key, 0) + change
        return changes

    def unet(self, survey, *ways):
        """The base as a module with these changes in its weights."""
        changed = self.shared.merged
        changed.load_state_dict(self.shared.base.state_dict())
        for key, change in self.merged(*ways).items():
            weight = changed.get_submodule(survey.layer(key).path).weight
            with torch.no_grad():
                weight.copy_((weight.double() + change).to(weight.dtype))
        return changed


def out(unet):
    if next(unet.parameters()).dtype == torch.float32:
        return forward(unet)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return forward(unet).float()


class Sequence:
    """A model, the reference beside it, and the actions."""

    def __init__(self, seed, models, whole, folder):
        self.rng, self.whole, self.folder = random.Random(seed), whole, folder
        self.dtype = torch.bfloat16 if self.rng.random() < 0.25 else torch.float32
        self.shared = models[self.dtype]
        self.model = self.shared.model
        self.unet, self.survey = self.model.unet, self.model.survey
        self.reference = Reference(self.shared)
        self.handles = {}
        self.live = LiveWeights(self.survey, lambda module: None, lambda module: module.weight)

    def patch(self):
        which = self.rng.choice((("to_k",), ("to_k", "to_v"), ("to_q", "to_out")))
        found = random_patch(self.survey, rank=self.rng.randint(1, 3), seed=self.rng.randrange(10**6), which=which)
        kind = self.rng.randrange(4)
        if kind == 0:  # by way of a file
            path = self.folder / "p.safetensors"
            kohya.save(found, path)
            return load_patch(path)
        if kind == 1:  # a stack of two as one
            return Patch.combined([(found, 0.5), (random_patch(self.survey, seed=7), -1.0)])
        return found

    def act(self):
        """One random action; returns its name."""
        action = self.rng.choice(self.ACTIONS)
        action(self)
        return action.__name__

    def apply(self):
        name, patch, strength = self.rng.choice(NAMES), self.patch(), self.rng.choice((1.0, 0.3, -1.0, 0.0, 2.0))
        handle = patch.apply(self.unet, strength)
        if name in self.handles:  # another strength or patch takes the place of the old one
            self.handles.pop(name).remove()
        self.handles[name] = handle
        self.reference.ways["hooks"][name] = (patch, strength)

    def remove(self):
        if self.handles:
            name = self.rng.choice(sorted(self.handles))
            self.handles.pop(name).remove()
            del self.reference.ways["hooks"][name]

    def write(self):
        name, patch, strength = self.rng.choice(NAMES), self.patch(), self.rng.choice((1.0, 0.3, -1.0, 2.0))
        self.live.apply(name, patch, strength)
        self.reference.ways["weights"][name] = (patch, strength)

    def write_another_strength(self):
        if known := self.reference.ways["weights"]:
            name = self.rng.choice(sorted(known))
            patch, strength = known[name][0], self.rng.choice((0.5, 1.5, -2.0, 0.0))
            self.live.apply(name, patch, strength)
            known[name] = (patch, strength)

    def unwrite(self):
        if known := self.reference.ways["weights"]:
            name = self.rng.choice(sorted(known))
            self.live.remove(name)
            del known[name]

    def apply_what_does_not_fit(self):
        patch = self.patch()
        key, factor = next(iter(patch.factors.items()))
        odd = Patch({**patch.factors, key: type(factor)(factor.up[:-1], factor.down)})
        for refuse in (lambda: odd.apply(self.unet), lambda: self.live.apply("odd", odd, 1.0)):
            with pytest.raises(PatchError):
                refuse()
        with pytest.raises(PatchError):
            self.live.apply("odd", patch, 1e9)

    def fit(self):
        method = self.rng.choice(sorted(REQUESTS))
        with self.live.aside():
            patch = fit(self.model, REQUESTS[method])
        if not self.handles and self.dtype == torch.float32:  # hooks are a part of what is trained
            same(patch, self.whole[method])

    def fail_to_fit(self):
        fault, left = (
            self.rng.choice((Cancelled, RuntimeError, MemoryError, KeyboardInterrupt)),
            self.rng.randrange(1, 9),
        )

        def progress(event):
            nonlocal left
            left -= 1
            if left == 0:
                raise fault("a fault of the test")

        with pytest.raises(fault, match="a fault of the test"), self.live.aside():
            fit(self.model, REQUESTS[self.rng.choice(sorted(REQUESTS))], progress)

    def pass_through(self):
        """The model's prediction is that of the reference with everything merged into its weights."""
        wanted = out(self.reference.unet(self.survey, "hooks", "weights"))
        torch.testing.assert_close(out(self.unet), wanted, atol=NEAR[self.dtype], rtol=NEAR[self.dtype])

    ACTIONS = (
        *(apply, apply, apply, remove, remove, write, write, write, unwrite, unwrite),
        *(write_another_strength, write_another_strength, apply_what_does_not_fit, fit, fail_to_fit, pass_through),
    )

    def check(self, done):
        """The weights and the hooks are those of the reference."""
        changes = {self.survey.layer(key).path: change for key, change in self.reference.merged("weights").items()}
        base = dict(self.shared.base.named_parameters())
        for name, parameter in self.unet.named_parameters():
            change = changes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if change is None:
                assert torch.equal(parameter, base[name]), (done, name)
            else:
                wanted = (base[name].double() + change).to(self.dtype)
                torch.testing.assert_close(parameter.detach(), wanted, msg=lambda text, n=name: f"{done} {n}: {text}")
        hooks = sum(len(part._forward_hooks) for part in self.unet.modules())
        assert hooks == sum(len(patch) for patch, _ in self.reference.ways["hooks"].values()), done

    def end(self):
        """Remove all in a random order: the model is bit-identical to the untouched one."""
        for name in self.rng.sample(sorted(self.handles), len(self.handles)):
            self.handles.pop(name).remove()
        for name in self.rng.sample(sorted(self.live.patches), len(self.live.patches)):
            self.live.remove(name)
        assert (state_hash(self.unet), flags(self.unet)) == self.shared.before
        assert torch.equal(out(self.unet), self.shared.untouched)


@pytest.fixture(scope="module")
def whole():
    """The patches of undisturbed fits."""
    return {method: fit(tiny_model(**SMALL), request) for method, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def models():
    return {dtype: Model(dtype) for dtype in NEAR}


def run(seed, models, whole, folder):
    sequence, done = Sequence(seed, models, whole, folder), []
    for _ in range(ACTIONS):
        done.append(sequence.act())
        sequence.check((seed, done))
    sequence.end()
    return done


def test_whatever_is_done_with_patches_nothing_is_left_behind(models, whole, tmp_path):
    done = {action for seed in range(SHORT) for action in run(seed, models, whole, tmp_path)}
    assert done == {action.__name__ for action in Sequence.ACTIONS}


@pytest.mark.long
def test_nor_after_many_more_sequences(models, whole, tmp_path):
    for seed in range(SHORT, SHORT + LONG):
        run(seed, models, whole, tmp_path)
