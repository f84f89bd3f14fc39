"""States of fixed prompts are encoded once for as long as their encoder lives, and are bit for bit what it returns."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from tiny import clip_parts, fit, tiny_model

from forget_concept.core.errors import Cancelled
from forget_concept.core.models import text_cache
from forget_concept.core.models.text_cache import StateCache, cache_of
from forget_concept.core.models.text_encoders import ENCODE_ROWS, CLIPText, SDXLText, encode_prompts
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

PROMPTS = [f"a photo of a {word}" for word in ("star", "moon", "heart", "cat", "fish", "boat", "tree", "sun", "cup")]


class Counted(CLIPText):
    """A CLIP that notes every prompt it encodes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.encoded: list[str] = []

    def encode(self, prompts):
        self.encoded += prompts
        return super().encode(prompts)


@pytest.fixture()
def text(tmp_path) -> Counted:
    return Counted(*clip_parts(tmp_path))


def same(one, other) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(factors.up, other.factors[site].up) and torch.equal(factors.down, other.factors[site].down)
        for site, factors in one.factors.items()
    )


def afresh(text: CLIPText, prompts: list[str]) -> torch.Tensor:
    """The states as an encoder of these weights returns them that has never encoded anything."""
    return encode_prompts(CLIPText(copy.deepcopy(text.model), text.tokenizer, text.clip_skip), prompts).hidden


def test_what_is_remembered_is_what_the_encoder_returns(text):
    first = encode_prompts(text, PROMPTS).hidden
    assert len(text.encoded) == 2 * ENCODE_ROWS
    again = encode_prompts(text, PROMPTS)
    assert len(text.encoded) == 2 * ENCODE_ROWS and torch.equal(again.hidden, first)
    again.hidden.zero_()  # nobody's change reaches what is remembered
    assert torch.equal(encode_prompts(text, PROMPTS).hidden, first)
    assert torch.equal(first, afresh(text, PROMPTS))
    # another object on the same model, such as that of the next request
    other = Counted(text.model, text.tokenizer)
    assert torch.equal(encode_prompts(other, PROMPTS).hidden, first) and not other.encoded


def in_place(text):
    text.model.get_input_embeddings().weight.data[:, 0] += 1


def other_precision(text):
    text.model.to(torch.bfloat16)


def other_layer(text):
    text.clip_skip = 2


def other_tokens(text):
    from transformers import CLIPTokenizer

    text.tokenizer = copy.deepcopy(text.tokenizer)
    text.tokenizer.add_tokens(["star"])
    assert isinstance(text.tokenizer, CLIPTokenizer)
    text.model.resize_token_embeddings(len(text.tokenizer), mean_resizing=False)


def hook(text):
    text.model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)


def replaced_forward(text):
    table = text.model.get_input_embeddings()
    own = table.forward
    table.forward = lambda ids: own(ids) + 1


@pytest.mark.parametrize("change", [in_place, other_precision, other_layer, other_tokens, hook, replaced_forward])
def test_whatever_changes_the_states_is_noticed(text, change):
    before = encode_prompts(text, PROMPTS).hidden
    change(text)
    after = encode_prompts(text, PROMPTS).hidden
    assert not torch.equal(after.double(), before.double())
    assert torch.equal(after, afresh(text, PROMPTS))


def test_an_adapter_that_is_scaled_is_noticed(text):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        text.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    text.model = adapted.base_model.model
    found = [encode_prompts(text, PROMPTS).hidden]
    for part in text.model.modules():
        if hasattr(part, "set_scale"):
            part.set_scale("default", 0.5)
    found.append(encode_prompts(text, PROMPTS).hidden)
    with adapted.disable_adapter():
        found.append(encode_prompts(text, PROMPTS).hidden)
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:i])


def test_sdxls_second_encoder_and_pooled_vectors_count(tmp_path):
    text = SDXLText(*[part for pair in zip(clip_parts(tmp_path), clip_parts(tmp_path, projection=True, seed=1),
                                           strict=True) for part in pair])  # fmt: skip
    first = encode_prompts(text, PROMPTS)
    again = encode_prompts(text, PROMPTS)
    assert torch.equal(again.hidden, first.hidden) and torch.equal(again.pooled, first.pooled)
    text.model_2.text_projection.weight.data.zero_()
    assert not encode_prompts(text, PROMPTS).pooled.any()


def test_the_next_request_encodes_only_its_own_prompts(text):
    model = tiny_model()
    model.text = text
    first = ForgetRequest((Concept("star", replacement="moon"),), ("heart",))
    second = ForgetRequest((Concept("cat", replacement="fish"),), ("heart",))
    patch = fit(model, first)
    whole, text.encoded = len(text.encoded), []
    assert same(fit(model, first), patch) and not text.encoded
    after = fit(model, second)
    assert 0 < len(text.encoded) < whole / 4
    # and it is the patch of a model that has never seen another request
    alone = tiny_model()
    alone.text = CLIPText(copy.deepcopy(text.model), text.tokenizer)
    assert same(fit(alone, second), after)


def test_the_progress_counts_prompts_and_can_be_cancelled_among_them(text):
    model = tiny_model()
    model.text = text
    request = ForgetRequest((Concept("star", replacement="moon"),))
    events = []
    fit(model, request, progress=events.append)
    before = [event for event in events if event.message == "aligning the prompts"]
    assert before == events[: len(before)] and {event.step for event in before} == {0}
    events = events[len(before) :]
    steps, total = [event.step for event in events], events[-1].total
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == total > 100
    assert {event.total for event in events} == {total}
    assert max(after - before for before, after in pairwise(steps)) <= ENCODE_ROWS

    def cancel(event):
        if event.step >= 2 * ENCODE_ROWS:
            raise Cancelled

    model.text = Counted(copy.deepcopy(text.model), text.tokenizer)
    with pytest.raises(Cancelled):
        fit(model, request, progress=cancel)
    assert len(model.text.encoded) == 2 * ENCODE_ROWS


def test_the_memory_is_bounded_and_what_was_not_asked_for_longest_goes_first():
    states = TextStates(torch.ones(1, 4, 8), torch.ones(1, 2))
    cache = StateCache(3 * states.nbytes)
    for name in "abc":
        cache.put((name,), states)
    assert cache.get(("a",)) is not None
    cache.put(("d",), states)
    assert cache.get(("b",)) is None and all(cache.get((name,)) is not None for name in "acd")
    cache.put(("e",), TextStates(torch.ones(4, 4, 8)))  # larger than all
    assert cache.get(("e",)) is None and cache.nbytes == 3 * states.nbytes


def test_the_states_go_with_their_model(tmp_path):
    model, tokenizer = clip_parts(tmp_path)
    text = CLIPText(model, tokenizer)
    encode_prompts(text, PROMPTS)
    found = cache_of(text)
    assert found is not None and found[0].nbytes > 0
    gone, count = weakref.ref(found[0]), len(text_cache._CACHES)
    del model, text, found
    gc.collect()
    assert gone() is None and len(text_cache._CACHES) < count
