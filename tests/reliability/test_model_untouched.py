"""Whatever breaks a method off, and wherever: the model is bit-identical, and the next run gives the same patch.

The list of fault points is complete by construction: a method's phases are the messages of its looks at Cancel, its
operations are the functions of the core below, and a method that goes through others than those of :data:`POINTS`
fails here until they are named. The short form takes some points of one case a method; the others are ``long``.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from contextlib import contextmanager

import pytest
import torch
from tiny import clip_parts, fit
from trained_cases import CASES, Pixels, clip_model, made, same

from forget_concept.core.errors import Cancelled, ForgetConceptError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods import uce
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models import text_cache
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training import loop
from forget_concept.core.training.adapters import Deltas
from forget_concept.core.training.attention import AttentionCapture
from forget_concept.core.training.fisher import FisherSum

# of each case, behind `long`; 0: all of them
POINTS_OF_A_CASE = int(os.environ.get("FORGET_CONCEPT_FAULTS", "40"))

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
FAULTS = (RuntimeError, Cancelled, OUT_OF_MEMORY, MemoryError, KeyboardInterrupt)

# where a method works: an owner and the name of its function, and whether what it returns can be made NaN
OPERATIONS = {
    "encode": (CLIPText, "states", True),
    "predict": (LatentDiffusion, "predict_noise", True),
    "sample": (LatentDiffusion, "sample", True),
    "encode pictures": (Pixels, "encode", True),
    "loss": (loop.Term, "weighted", True),
    "attention": (AttentionCapture, "masses", False),
    "backward": (torch.Tensor, "backward", False),
    "gradient": (torch.autograd, "grad", False),
    "step of AdamW": (torch.optim.AdamW, "step", False),
    "step of SGD": (torch.optim.SGD, "step", False),
    "measure": (FisherSum, "add", False),
    "factors": (Deltas, "factors", False),
    "solve": (uce, "solve_context_map", False),
    "expand": (uce, "expand", False),
    "save": (Workspace, "save", False),
}

_TRAINED = {"encoding the prompts", "encode", "predict", "loss", "factors", "save"}
_DRAWN = {"sampling N images", "sample"}
_ADAMW, _SGD = {"step of AdamW", "backward"}, {"step of SGD", "backward"}
_RESTRICTED = {"step of AdamW", "gradient"}
_DUGE = _TRAINED | _DRAWN | {"unlearning"}
_FORGET_ME_NOT = _TRAINED | {"re-steering attention", "attention"}
_AMNESIA = _TRAINED | _DRAWN | {"learning the surrogate", "measuring Fisher information", "measure", "gradient"}

# everything that each case goes through: phases, by the messages of its looks, and operations
POINTS = {
    "uce": {
        *("aligning the prompts", "encoding the prompts", "solving", "expanding to every site", "done"),
        *("encode", "solve", "expand"),
    },
    "duge, site by site": _DUGE | _ADAMW | {"recording what the layers read"},
    "duge, site by site, concepts dropped": _DUGE | _ADAMW | {"recording what the layers read"},
    "duge, whole network": _DUGE | _ADAMW,
    "duge, attention maps, null space": _DUGE | _SGD,
    "duge, restricted step": _DUGE | _RESTRICTED | {"recording what the layers read"},
    "forget_me_not": _FORGET_ME_NOT | _DRAWN | _ADAMW,
    "forget_me_not, restricted step": _FORGET_ME_NOT | _DRAWN | _RESTRICTED,
    "forget_me_not, correction": _FORGET_ME_NOT | _DRAWN | _ADAMW,
    "forget_me_not, dense, whole unet": _FORGET_ME_NOT | _DRAWN | _ADAMW,
    "forget_me_not, inversion": _FORGET_ME_NOT
    | _DRAWN
    | _ADAMW
    | {"encoding the pictures", "learning vectors of the images", "encode pictures"},
    "selective_amnesia": _AMNESIA | _ADAMW,
    "selective_amnesia, noise, restricted": _AMNESIA | {"step of SGD", "encoding the pictures", "encode pictures"},
}
SHORT = ("uce", "duge, site by site", "forget_me_not, inversion", "selective_amnesia")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


def of_case(case, parts):
    if case == "uce":
        request = ForgetRequest(
            (Concept("star"), Concept("wash", "style")), ("moon",), settings={"contexts": False, "keep_common": False}
        )
        return clip_model(parts), request, {}
    return made(case, parts, clip=True)


def snapshot(model):
    """All that a host could notice of a model's modules and of torch itself."""
    found = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    found += [torch.get_num_threads(), torch.get_rng_state().numpy().tobytes()]
    for module in (model.unet, model.text.model):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            about = (tensor.dtype, tuple(tensor.shape), str(tensor.device), tensor.requires_grad, tensor.grad is None)
            found.append((name, hashlib.sha256(data).hexdigest(), about, bool(tensor._backward_hooks)))
        for name, part in module.named_modules():
            hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
            found.append((name, part.training, [len(one) for one in hooks], sorted(vars(part)), type(part)))
    return found


def phase(event):
    return re.sub(r"\d+", "N", event.message)


class Watch:
    """Counts the looks and the operations of a run, and breaks it off at one of them."""

    def __init__(self, point=None, at=1, fault=None):
        self.point, self.at, self.fault = point, at, fault
        self.counts = {}

    def count(self, point):
        """Count a point, and raise there if it is the one; returns whether what it gives is to be NaN."""
        self.counts[point] = self.counts.get(point, 0) + 1
        if (point, self.counts[point]) != (self.point, self.at):
            return False
        if self.fault is not None:
            raise self.fault("a fault of the test")
        return True

    def look(self, event):
        self.count(phase(event))

    def watched(self, name, plain):
        def call(*args, **kwargs):
            poisoned = self.count(name)
            found = plain(*args, **kwargs)
            if not poisoned:
                return found
            if isinstance(found, torch.Tensor):
                return found * float("nan")
            return type(found)(found.hidden * float("nan"), found.pooled, found.lengths)

        return call

    @contextmanager
    def watching(self):
        with pytest.MonkeyPatch.context() as patched:
            for name, (owner, attribute, _) in OPERATIONS.items():
                plain = getattr(owner, attribute)
                if isinstance(plain, property):
                    patched.setattr(owner, attribute, property(self.watched(name, plain.fget)))
                else:
                    patched.setattr(owner, attribute, self.watched(name, plain))
            yield


def run(model, request, inputs, folder, watch):
    text_cache._CACHES.clear()  # so that every run encodes
    with watch.watching():
        return fit(model, request, watch.look, Inputs(workspace=Workspace(folder), **inputs))


def every_point(counts):
    """Every point, at its first, middle and last time, with every fault that it may have."""
    found = []
    for point, count in counts.items():
        kinds = [*FAULTS]
        if point in OPERATIONS and OPERATIONS[point][2]:
            kinds.append(None)  # NaN
        found += [(point, at, kind) for at in sorted({1, (count + 1) // 2, count}) for kind in kinds]
    return found


def some_points(counts):
    """Every point once, each with another fault, and NaN wherever there can be some."""
    found = []
    for i, (point, count) in enumerate(counts.items()):
        found.append((point, (1, (count + 1) // 2, count)[i % 3], FAULTS[i % len(FAULTS)]))
        if point in OPERATIONS and OPERATIONS[point][2]:
            found.append((point, (count + 1) // 2, None))
    return found


def broken_off(model, request, inputs, folder, point, at, fault):
    """Break a run off; returns whether it was."""
    watch = Watch(point, at, fault)
    if fault is None:
        try:
            patch = run(model, request, inputs, folder, watch)
        except ForgetConceptError as error:
            assert str(error).strip()
            return None
        finally:
            assert watch.counts.get(point, 0) >= at
        return patch  # what was NaN is not used, such as an output where inputs are recorded
    with pytest.raises(fault) as raised:
        run(model, request, inputs, folder, watch)
    assert "a fault of the test" in str(raised.value)
    return None


def check(case, parts, tmp_path, choose, each):
    model, request, inputs = of_case(case, parts)
    model.unet.mid_block.train()  # flags that are not the usual ones
    model.unet.conv_in.requires_grad_(False)
    model.text.model.train(False).requires_grad_(True)
    before, watch = snapshot(model), Watch()
    whole = run(model, request, inputs, tmp_path / "whole", watch)
    assert snapshot(model) == before
    assert set(watch.counts) == POINTS[case], "the list of fault points is not that of the method any more"
    chosen = choose(watch.counts)
    for n, (point, at, fault) in enumerate(chosen):
        folder = tmp_path / str(n)
        patch = broken_off(model, request, inputs, folder, point, at, fault)
        assert snapshot(model) == before, (point, at, fault)
        if patch is not None:
            same(patch, whole)
        elif each or n in (len(chosen) // 2, len(chosen) - 1):
            # with what the broken run left in its work folder
            same(run(model, request, inputs, folder, Watch()), whole)
            assert snapshot(model) == before, (point, at, fault)


def test_every_method_is_in_the_list():
    assert set(POINTS) == {"uce", *CASES}
    assert {case.partition(",")[0] for case in SHORT} == set(all_methods())
    assert set(OPERATIONS) <= set().union(*POINTS.values())


@pytest.mark.parametrize("case", SHORT)
def test_broken_off_anywhere_a_method_leaves_the_model_as_it_was(case, parts, tmp_path):
    check(case, parts, tmp_path, some_points, each=False)


@pytest.mark.long
@pytest.mark.parametrize("case", list(POINTS))
def test_broken_off_anywhere_by_anything_a_method_leaves_the_model_as_it_was(case, parts, tmp_path):
    def choose(counts):
        every = every_point(counts)
        count = min(POINTS_OF_A_CASE or len(every), len(every))
        print(f"{case}: {count} of {len(every)} fault points")
        return random.Random(case).sample(every, count)

    check(case, parts, tmp_path, choose, each=True)
