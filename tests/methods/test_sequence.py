"""A sequence of requests: it equals what it promises to equal, survives a file, and refuses what makes no sense."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import WIDTH, TinyText, fit, flags, rand, random_patch, state_hash, tiny_model

from forget_concept.core.errors import PatchError, RequestError
from forget_concept.core.formats import context_map, kohya
from forget_concept.core.methods import text_columns
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import all_methods, get, plan_request
from forget_concept.core.methods.sequence import History, Part
from forget_concept.core.methods.sequence_rules import is_closed_form
from forget_concept.core.patch.history import RequestRecord, read_history
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings
from forget_concept.core.training.adapters import Deltas
from forget_concept.core.training.frozen import frozen

QUICK = {"steps": 2, "latents": "zeros", "batch_size": 2, "lr": 1e-2, "train": ("to_q", "to_k")}
FEW = {"contexts": False, "keep_common": False}
STAR = ForgetRequest((Concept("star", replacement="circle"),), ("moon", "house"), settings=FEW)
WASH = ForgetRequest((Concept("watercolour", "style"),), ("mosaic",), settings=FEW)
KEY = ForgetRequest((Concept("key"), Concept("cup")), ("house", "fish"), settings=FEW)


def trained(name, rank=2, **more):
    return ForgetRequest(
        (Concept(name),),
        ("moon",),
        more.pop("method", "forget_me_not"),
        settings={**QUICK, "rank": rank, **more.pop("settings", {})},
        **more,
    )


def history(model, *requests, **more):
    found = History(**more)
    for request in requests:
        found = found.forget(model, plan_request(request))
    return found


def same(one: Patch, other: Patch) -> bool:
    """Bit for bit the same change, key by key."""
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(f.up, other.factors[k].up) and torch.equal(f.down, other.factors[k].down)
        for k, f in one.factors.items()
    )


def as_stored(one: Patch, read: Patch, dtype: torch.dtype) -> bool:
    """The same change as after a file of this dtype, which scales whole layers by powers of two.

    In half precision a value can become subnormal then, with steps of 2⁻²⁴, and is scaled back with its error.
    """
    steps = {torch.float32: 0.0, torch.float16: 2.0**-24 * 64}[dtype]
    one = one.to(dtype).to(torch.float32)
    return one.factors.keys() == read.factors.keys() and all(
        torch.allclose(f.up, read.factors[k].up, rtol=0, atol=steps)
        and torch.allclose(f.down, read.factors[k].down, rtol=0, atol=steps)
        for k, f in one.factors.items()
    )


def through_a_file(found, tmp_path, dtype=torch.float32):
    kohya.save(found.patch, tmp_path / "p.safetensors", dtype=dtype)
    return History.from_patch(kohya.load(tmp_path / "p.safetensors"))


# -- closed forms -------------------------------------------------------------------------------------------------


def test_a_sequence_of_closed_forms_is_the_joint_solve_in_any_order(device):
    model = tiny_model()
    model.unet.to(device)
    before, flagged = state_hash(model.unet), flags(model.unet)
    orders = list(itertools.permutations((STAR, WASH, KEY)))[::2]
    found = [history(model, *order) for order in orders]
    assert all(same(found[0].patch, other.patch) for other in found[1:])
    # what plain `fit` makes of everything at once
    everything = ForgetRequest(
        STAR.concepts + WASH.concepts + KEY.concepts, (*STAR.preserve, *WASH.preserve, "fish"), settings=FEW
    )
    whole = fit(model, everything)
    for key, factor in whole.factors.items():
        torch.testing.assert_close(found[0].patch.factors[key].delta(), factor.delta(), atol=2e-5, rtol=1e-4)
    # and no sum of single solves
    single = [fit(model, request).factors[key].delta() for request in (STAR, WASH, KEY)]
    assert float((sum(single) - whole.factors[key].delta()).norm() / whole.factors[key].delta().norm()) > 0.1
    assert state_hash(model.unet) == before and flags(model.unet) == flagged


def test_kept_words_are_not_said_beside_what_another_request_forgot(model, monkeypatch):
    """A context may name a target of another kind: 'a cartoon picture' of what an object request keeps."""
    said: list[str] = []
    encode = text_columns._encode

    def noted(encoder, texts, *rest):
        said.extend(texts)
        return encode(encoder, texts, *rest)

    monkeypatch.setattr(text_columns, "_encode", noted)
    style = ForgetRequest((Concept("cartoon", "style"),), ("impressionism",))
    requests = (ForgetRequest((Concept("tree"),), ("moon",)), style)
    found = history(model, requests[0])
    assert any("cartoon" in text and "moon" in text for text in said)
    said.clear()
    found.forget(model, plan_request(requests[1]))
    assert not any("moon" in text and "cartoon" in text for text in said)
    assert not any("tree" in text and "cartoon" in text for text in said)
    # an object's own context may well name what is kept
    assert {text for text in said if "impressionism" in text and "tree" in text} == {
        "a purple tree in the style of impressionism"
    }


def test_taking_a_closed_form_back_is_solving_for_the_others(model, tmp_path):
    three = history(model, STAR, WASH, KEY)
    assert three.solves_anew("star") and not history(model, STAR).solves_anew("star")
    for which in (1, "star", "The  Star"):
        assert same(three.without(which, model).patch, history(model, WASH, KEY).patch)
    assert same(through_a_file(three, tmp_path).without("watercolour", model).patch, history(model, STAR, KEY).patch)
    # one concept of a request that had two
    less = three.without("cup", model)
    assert [c.name for c in less.concepts] == ["star", "watercolour", "key"]
    alone = ForgetRequest((KEY.concepts[0],), KEY.preserve, settings=FEW)
    assert same(less.patch, history(model, STAR, WASH, alone).patch)
    assert [one.number for one in three.without(2, model).records] == [1, 3]
    empty = history(model, STAR).without("star")
    assert empty.requests == () and empty.concepts == ()
    with pytest.raises(PatchError, match="Nothing is forgotten"):
        _ = empty.patch
    with pytest.raises(RequestError, match=r"'star'.*needs the base model"):
        three.without("star")


def test_closed_forms_that_are_solved_together_share_settings_and_strength(model):
    first = history(model, STAR)
    other = ForgetRequest((Concept("fish"),), settings={**FEW, "ridge": 0.5})
    with pytest.raises(RequestError, match=r"'ridge' is 1\.0 in request 1 and 0\.5"):
        first.forget(model, plan_request(other))
    with pytest.raises(RequestError, match=r"strength: it is 1 in request 1 and 0\.5"):
        first.forget(model, plan_request(ForgetRequest((Concept("fish"),), settings=FEW, strength=0.5)))
    # written otherwise, and the same
    first.check(plan_request(ForgetRequest((Concept("fish"),), settings={**FEW, "ridge": 1, "columns": "tail"})))


def test_strength_is_in_the_parts(model):
    half = history(model, *(replace(request, strength=0.5) for request in (STAR, WASH)))
    whole = history(model, STAR, WASH)
    for key, factor in whole.patch.factors.items():
        torch.testing.assert_close(half.patch.factors[key].delta(), 0.5 * factor.delta())


def test_a_joint_solve_still_has_its_context_map(model, tmp_path):
    found = history(model, STAR, WASH)
    context_map.save(found.patch, tmp_path / "m.safetensors")
    loaded, metadata = context_map.load(tmp_path / "m.safetensors")
    again = History.from_patch(context_map.expand(loaded, model.survey, metadata))
    assert again.requests == (STAR, WASH)
    assert same(again.forget(model, plan_request(KEY)).patch, found.forget(model, plan_request(KEY)).patch)


# -- trained methods ----------------------------------------------------------------------------------------------


def test_each_trained_request_is_trained_on_what_the_earlier_ones_left(device):
    model = tiny_model()
    model.unet.to(device)
    before, flagged = state_hash(model.unet), flags(model.unet)
    one, two = trained("star"), trained("fish", rank=3)
    first = history(model, one)
    assert same(first.patch, fit(model, one))
    both = first.forget(model, plan_request(two))
    on_top = fit(model, two, inputs=Inputs(earlier=first.patch))
    assert same(both.parts[0].patch, first.patch) and same(both.parts[1].patch, on_top)
    assert not same(on_top, fit(model, two))  # the earlier part was on while it was trained
    assert both.patch.rank == 5
    with first.patch.applied(model.unet), on_top.applied(model.unet):
        wanted = predicted(model)
    with both.patch.applied(model.unet):
        torch.testing.assert_close(predicted(model), wanted, atol=1e-5, rtol=1e-4)
    assert state_hash(model.unet) == before and flags(model.unet) == flagged


def predicted(model):
    with torch.no_grad():
        return model.predict_noise(rand(2, 4, 8, 8), torch.tensor([100, 800]), model.text.encode(["a star", ""]))


def test_a_trained_request_is_taken_back_by_leaving_its_part_away(model):
    found = history(model, trained("star"), trained("fish", rank=3), trained("boat"))
    less = found.without("fish")
    assert [part.patch for part in less.parts] == [found.parts[0].patch, found.parts[2].patch]
    assert [one.number for one in less.records] == [1, 3] and less.patch.rank == 4
    for key, factor in less.patch.factors.items():
        wanted = found.parts[0].patch.factors[key].delta() + found.parts[2].patch.factors[key].delta()
        torch.testing.assert_close(factor.delta(), wanted)
    assert not found.solves_anew(2)
    # the number is free again only where nothing came after it
    assert less.forget(model, plan_request(trained("fish"))).records[-1].number == 4
    pair = history(model, ForgetRequest((Concept("star"), Concept("cup")), (), "forget_me_not", settings=QUICK))
    with pytest.raises(RequestError, match=r"'cup' was forgotten together.*number, 1,"):
        pair.without("cup")
    assert pair.without(1).parts == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_can_be_read_back_and_continued(model, tmp_path, dtype):
    """Parts of different ranks and projections, closed form and trained ones, in one file."""
    values = {"train": ("to_v", "to_out"), "lr": 1e-3}
    requests = (trained("star", 3), WASH, trained("boat", 40, settings=values))
    found = history(model, *requests)
    again = through_a_file(found, tmp_path, dtype)
    assert again.requests == found.requests and again.records == found.records
    assert len(again.parts) == 3
    for part, read in zip(found.parts, again.parts, strict=True):
        assert as_stored(part.patch, read.patch, dtype) and part.records == read.records
        assert {k: v for k, v in part.patch.metadata.items() if k.endswith((".trained", ".projections"))} == {
            k: v for k, v in read.patch.metadata.items() if k.endswith((".trained", ".projections"))
        }
    ranks = {rank for part in found.parts for rank in {f.rank for f in part.patch.factors.values()}}
    assert len(ranks) > 3  # a LoRA of rank 40 is narrower where the layer is
    assert same(again.without("star").patch, again.patch) is False
    assert as_stored(history(model, WASH).patch, again.without("star").without("boat").patch, dtype)
    if dtype == torch.float32:
        assert same(again.forget(model, plan_request(KEY)).patch, found.forget(model, plan_request(KEY)).patch)
        last = trained("fish")
        assert same(again.forget(model, plan_request(last)).patch, found.forget(model, plan_request(last)).patch)
        assert json.loads(again.patch.metadata["forget_concept.history"]) == json.loads(
            found.patch.metadata["forget_concept.history"]
        )


def test_a_plain_patch_is_a_history_of_one(model, tmp_path):
    kohya.save(fit(model, STAR), tmp_path / "p.safetensors")
    found = History.from_patch(kohya.load(tmp_path / "p.safetensors"))
    assert found.requests == (STAR,) and found.records[0].number == 1
    said = found.patch.metadata
    assert ForgetRequest.from_json(said["forget_concept.request"]) == STAR
    assert said["forget_concept.method"] == "uce" and said["forget_concept.preset"] == "tuned"
    assert same(found.forget(model, plan_request(WASH)).patch, history(model, STAR, WASH).patch)


def test_the_record_says_what_was_asked(model):
    found = history(model, STAR, trained("fish", seed=7), WASH)
    said = found.patch.metadata
    assert json.loads(said["forget_concept.concepts"]) == ["star", "fish", "watercolour"]
    assert said["forget_concept.method"] == "uce + forget_me_not"
    assert said["forget_concept.base_model"] == model.model_hash and said["forget_concept.family"] == "other"
    assert "forget_concept.request" not in said and all(isinstance(text, str) for text in said.values())
    record = json.loads(said["forget_concept.history"])
    assert [[one["number"] for one in part["requests"]] for part in record["parts"]] == [[1, 3], [2]]
    one = record["parts"][1]["requests"][0]
    assert one["request"]["seed"] == 7 and one["request"]["method"] == "forget_me_not"
    assert one["settings"]["rank"] == 2 and one["settings"]["steps"] == 2
    assert record["parts"][1]["ranks"] == {"to_k": 2, "to_q": 2, "to_v": 0}
    assert [one.request for one in read_history(said).records] == list(found.requests)


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


@given(st.data())
def test_whatever_the_parts_ranks_each_is_found_again(data):
    keys = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.{w}" for i in range(3) for w in PROJECTIONS]
    parts = []
    for n in range(1, data.draw(st.integers(1, 4)) + 1):
        ranks = data.draw(st.dictionaries(st.sampled_from(keys), st.integers(1, 3), min_size=1))
        factors = {key: LowRank(rand(4, r, seed=n), rand(r, 5, seed=10 + n)) for key, r in ranks.items()}
        asked = RequestRecord(n, ForgetRequest((Concept(f"thing {n}"),), method="forget_me_not"), {"rank": n})
        parts.append(Part(Patch(factors, {"forget_concept.base_model": "x"}), (asked,)))
    found = History(tuple(parts))
    again = History.from_patch(found.patch)
    assert again.records == found.records
    assert all(same(a.patch, b.patch) for a, b in zip(again.parts, found.parts, strict=True))


# -- a bound of the whole rank ------------------------------------------------------------------------------------


def test_a_bound_cuts_to_the_nearest_change_and_says_what_is_lost(model, tmp_path):
    one, two, three = trained("star", 3), trained("fish", 3), trained("boat", 2)
    free = history(model, one, two)
    found = history(model, one, two, max_rank=4)
    assert found.patch.rank == 4 and len(found.parts) == 1
    key = next(iter(free.patch.factors))
    u, s, v = torch.linalg.svd(free.patch.factors[key].delta().double())
    nearest = (u[:, :4] * s[:4]) @ v[:4]
    torch.testing.assert_close(found.patch.factors[key].delta().double(), nearest, atol=1e-6, rtol=1e-4)
    again = through_a_file(found, tmp_path)
    assert again.max_rank == 4 and again.requests == found.requests
    for which in (1, "fish"):
        with pytest.raises(RequestError, match="cannot be taken back: the patch was cut to rank 4, and its 2 requests"):
            again.without(which)
    # where the bound is lifted, what comes after can be taken back; what came before still cannot
    more = again.bounded(None).forget(model, plan_request(three))
    assert more.patch.rank == 6 and same(more.without("boat").patch, found.patch)
    with pytest.raises(RequestError, match="'star' cannot be taken back"):
        more.without("star")
    # under the bound nothing is cut
    assert len(history(model, one, two, max_rank=6).parts) == 2
    with pytest.raises(RequestError, match="at least 1"):
        History(max_rank=0)


def test_a_bounded_closed_form_is_still_solved_again(model):
    found = history(model, STAR, WASH, max_rank=2)
    assert found.patch.rank == 2 and len(found.records) == 2
    assert same(found.without("watercolour", model).patch, history(model, STAR, max_rank=2).patch)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (STAR, r"'star' is already forgotten, by request 1"),
        (ForgetRequest((Concept("boat"), Concept("A  Star"))), r"'A  Star' is already forgotten, by request 1"),
        (trained("star"), "'star' is already forgotten"),
        (
            ForgetRequest((Concept("Moon"),)),
            r"'Moon' cannot be forgotten, because request 1 \('star'\) preserves 'moon'",
        ),
        (ForgetRequest((Concept("mosaic", "style"),)), "request 2 .'watercolour'. preserves"),
        (ForgetRequest((Concept("fish"),), ("a star",)), "contains 'a star', and request 1 forgot 'star'"),
        (ForgetRequest((Concept("fish"),), ("a photo of a star",)), "request 1 forgot 'star'"),
        (ForgetRequest((Concept("fish", replacement="the star"),)), "'the star' cannot replace 'fish'"),
        (
            ForgetRequest((Concept("circle"),)),
            "'circle' cannot be forgotten, because request 1 shows it instead of 'star'",
        ),
        (ForgetRequest((Concept(""),)), "empty"),
        (ForgetRequest((Concept("fish"),), method="amnesia"), "'amnesia' is not known"),
    ],
)
def test_a_request_that_cannot_follow_is_refused_before_any_work(model, request_, words):
    found = history(model, STAR, WASH)
    encoded = len(model.text.encoded)
    for refuse in (lambda: found.check(plan_request(request_)), lambda: found.forget(model, plan_request(request_))):
        with pytest.raises(RequestError, match=words):
            refuse()
    assert len(model.text.encoded) == encoded


def test_what_is_not_there_cannot_be_taken_back(model):
    found = history(model, STAR, trained("fish"))
    for which, words in (("boat", "'boat'"), (3, "a request number 3"), (0, "number 0"), ("circle", "'circle'")):
        with pytest.raises(RequestError, match=rf"does not forget {words}.*1 \('star'\), 2 \('fish'\)|{words}"):
            found.without(which)
    with pytest.raises(RequestError, match="its requests are none"):
        History().without("star")


def test_another_base_model_is_refused(model):
    found = history(model, STAR, WASH)
    other = tiny_model(seed=1)
    for act in (lambda: found.forget(other, plan_request(KEY)), lambda: found.without("star", other)):
        with pytest.raises(PatchError, match="another base model"):
            act()
    skipped = tiny_model()
    skipped.text = TinyText(WIDTH)
    skipped.text.layer = "clip_skip=2"
    with pytest.raises(PatchError, match=r"other text states.*clip skip"):
        found.forget(skipped, plan_request(KEY))
    with pytest.raises(RequestError, match="leave 'earlier' out"):
        found.forget(model, plan_request(KEY), inputs=Inputs(earlier=found.patch))


def test_a_patch_without_a_readable_record_is_refused(model):
    found = history(model, trained("star"), trained("fish"))
    said = found.patch.metadata
    one, two = fit(model, STAR), fit(model, WASH)
    strange = random_patch(model.survey)
    record = json.loads(said["forget_concept.history"])

    def written(change):
        changed = json.loads(json.dumps(record))
        change(changed)
        return Patch(found.patch.factors, {**said, "forget_concept.history": json.dumps(changed)})

    for patch, words in (
        (strange, "does not say which requests"),
        (Patch.combined([(one, 1.0), (two, 1.0)]), "put together from several"),
        (Patch(one.factors, {k: v for k, v in one.metadata.items() if "base_model" not in k}), "which model it was"),
        (Patch(found.patch.factors, {**said, "forget_concept.history": "{"}), "cannot be read"),
        (Patch(found.patch.factors, {**said, "forget_concept.history": "[]"}), "cannot be read"),
        (written(lambda r: r.update(schema=2)), "schema 2"),
        (written(lambda r: r["parts"][0].update(requests=[])), "without a request"),
        (written(lambda r: r["parts"].clear()), "no request"),
        (written(lambda r: r["parts"][1]["requests"][0].update(number=1)), "twice"),
        (written(lambda r: r["parts"][0]["requests"][0]["request"].update(concepts=[])), "Nothing to forget"),
        (found.patch.truncated(3), "another program has changed its ranks"),
    ):
        with pytest.raises(PatchError, match=words):
            History.from_patch(patch)


def test_which_methods_are_closed_forms():
    assert is_closed_form("uce") and not is_closed_form("forget_me_not")
    with pytest.raises(RequestError, match="not known"):
        is_closed_form("amnesia")


# -- what a later request would bring back -------------------------------------------------------------------------

SHORT = {"steps": 2, "n_images": 1, "sample_steps": 1}
TRAINED = {
    "duge": SHORT | {"bank": 2, "local": False},
    "forget_me_not": SHORT,
    "selective_amnesia": SHORT | {"replay_images": 2, "ewc_weight": 0.0},
}


def test_all_trained_methods_are_here():
    assert set(TRAINED) == {name for name, method in all_methods().items() if method.trained}


@pytest.mark.parametrize("name", list(TRAINED))
def test_every_trained_method_holds_what_was_forgotten_earlier_where_it_left_it(model, name):
    """Prompts of an earlier concept have a term of their own: zero at the start, off as soon as something is moved; and
    none of them is kept as the base model has it."""
    change = random_patch(model.survey, rank=2, scale=0.05)
    earlier = change.with_metadata(request=ForgetRequest((Concept("fish"),)))
    method, settings = get(name)(), resolve_settings(get(name), "tuned", TRAINED[name])
    request = ForgetRequest((Concept("star", replacement="circle"),), ("moon", "blue fish"), name, "tuned")
    inputs = Inputs(earlier=earlier)
    material = method.batches(model, request, settings, inputs)
    assert any("moon" in text for text in material.retain) and not any("fish" in text for text in material.retain)
    assert material.earlier and all("fish" in text for text in material.earlier)
    with frozen(model.unet):
        method.fill_pools(material, settings, inputs, None)
        deltas = Deltas(model, method.keys(model, settings), settings.rank, material.generator, earlier)
        with deltas.attached():
            objective = method.objective(material, deltas, request, settings, inputs, None)
            term = objective(1)["earlier"]
            assert float(term.value) == 0 and term.weight > 0 and term.side == "retain"
            with torch.no_grad():
                for parameter in deltas.parameters():
                    parameter.add_(0.05)
            assert float(objective(2)["earlier"].value.detach()) > 0
    assert (
        "earlier"
        not in json.loads(fit(model, replace(request, settings=TRAINED[name])).metadata["forget_concept.terms"])[
            "first"
        ]
    )
