"""Attacks: what they search for they find, what they claim is counted by hand, and the model never notices."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

import pytest
import torch
from drawn import DrawnModel, DrawnProbe, labels_named_in
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyText, clip_parts, clip_states, flags, rand, random_patch, state_hash, tiny_model, tiny_unet

from forget_concept.core.errors import Cancelled, ForgetConceptError, ModelError, PatchError, RequestError, TokenError
from forget_concept.core.evaluation import SamplingSettings, Variant
from forget_concept.core.evaluation.attacks import (
    ATTACKS,
    BUDGETS,
    WHITE_BOX,
    AttackBudget,
    AttackContext,
    ProbeJudge,
    SearchResult,
    Target,
    attack_budget,
    run_attacks,
)
from forget_concept.core.evaluation.attacks.context import example_latents, with_hash_of
from forget_concept.core.evaluation.attacks.denoising import denoising_losses, noised_rows
from forget_concept.core.evaluation.attacks.discrete import Prefixes, _Search, discrete
from forget_concept.core.evaluation.attacks.homoglyphs import LOOKALIKES, other_spellings, plain, spellings
from forget_concept.core.evaluation.attacks.run import _measure_prompts
from forget_concept.core.evaluation.attacks.soft_prompt import soft_prompt
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.safe_guidance import SafetyGuidance
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.text_encoders import CLIPText
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.request.concept import Concept
from forget_concept.core.training.frozen import frozen
from forget_concept.core.training.textual_inversion import PLACEHOLDER

TINY = AttackBudget("tiny", 4, 1, 2, 3, 2, 3, 2, 0.1, 3, 3, 4, 8, 4)
SOME = ("discrete", "soft_prompt")
OTHERWISE = ("a five-pointed shape", "what shines at night", "the sign of a sheriff")
STAR = Target(Concept("star"), ("a photo of a star", "star"), OTHERWISE)
QUICK = SamplingSettings(steps=1, batch=8, precision="float32")


class Pixels:
    """Latents as pictures eight times as large, and back."""

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images, 8).clamp(-0.99, 0.99).atanh()
        return torch.cat([small, small[:, :1]], 1)

    def decode(self, latents):
        return latents[:, :3].tanh().repeat_interleave(8, 2).repeat_interleave(8, 3)


class Reddish:
    """Finds the concept in about half of all pictures."""

    description = "reddish"

    def __init__(self):
        self.looked = 0

    def shows(self, images):
        self.looked += len(images)
        return (images[:, 0].flatten(1).mean(1) > 0).tolist()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


@pytest.fixture()
def model(parts):
    return LatentDiffusion(
        tiny_unet(), CLIPText(*parts), sd_alphas_cumprod(), vae=Pixels(), latent_shape=(4, 8, 8), name="tiny"
    )


class Spy(Reddish):
    """Keeps what it was shown, call by call of an attack's measuring."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def shows(self, images):
        if len(images) == TINY.pictures:
            self.seen.append(images)
        return super().shows(images)


def patch_of(model, seed=0):
    return random_patch(model.survey, scale=0.3, seed=seed)


def context_of(model, budget=TINY, patches=(), workspace=None, seed=0):
    return AttackContext(
        with_hash_of(model, patches),
        Variant(patches),
        STAR,
        Reddish(),
        rand(3, 4, 8, 8),
        budget,
        QUICK,
        seed,
        workspace,
    )


def run(model, patches=(), attacks=None, judge=None, **rest):
    return run_attacks(model, patches, STAR, judge or Reddish(), TINY, attacks=attacks, sampling=QUICK, **rest)


# -- words over the vocabulary ------------------------------------------------------------------------------------


def search_of(model, count=TINY.rows):
    generator = torch.Generator().manual_seed(0)
    rows = noised_rows(model, rand(3, 4, 8, 8), count, generator)
    return _Search(model, model.text, Prefixes(model.text, STAR.prompts), rows, generator)


@pytest.mark.parametrize("patched", [False, True])
def test_the_discrete_search_never_takes_a_higher_loss_and_says_what_it_used(model, patched):
    patches = ((patch_of(model), 1.0),) if patched else ()
    context = context_of(model, replace(TINY, rounds=6), patches)
    rows = []
    handle = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = discrete(context)
    handle.remove()
    assert found.unet_passes == sum(rows)
    assert len(found.losses) > 1
    assert all(later < earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    # one gradient for each prefix that was taken, but for the last where it came at the very end
    assert len(found.losses) - 1 <= found.gradient_steps <= len(found.losses)
    # the loss it ended with is that of the text it gives, asked anew
    with context.edited(), torch.no_grad():
        same = noised_rows(model, context.latents, TINY.rows, torch.Generator().manual_seed(0))
        states = model.text.encode(found.prompts).index([i % len(found.prompts) for i in range(TINY.rows)])
        assert float(denoising_losses(model, same, states).mean()) == pytest.approx(found.losses[-1], rel=1e-5)
    assert discrete(context) == found


def test_the_words_read_back_as_the_tokens_that_were_searched_for(model):
    context = context_of(model)
    (first, *others), ids = discrete(context).prompts, []
    prefix = first.removesuffix(STAR.prompts[0])
    assert prefix.isprintable()
    ids = model.text.phrase_ids(prefix)
    assert len(ids) == TINY.tokens
    for prompt, text in zip(STAR.prompts, (first, *others), strict=True):
        assert text == prefix + prompt
        assert model.text.phrase_ids(text) == [*ids, *model.text.phrase_ids(prompt)]
        assert model.text.token_ids(text)[1 : 1 + TINY.tokens] == ids
    prefixes = Prefixes(model.text, STAR.prompts)
    start, end = model.text.token_ids("")[:2]
    assert not {start, end} & set(prefixes.words)
    assert len(prefixes.words) > 50
    assert all(word.isprintable() and "\ufffd" not in word for word in prefixes.words.values())
    assert all(prefixes.reads_back([i]) for i, word in prefixes.words.items() if word.isascii() and word.islower())
    # two words that a tokenizer reads as one are no prefix: "st" "ar" is not "star", but a tokenizer that joins them is
    joined = CLIPText(model.text.model, model.text.tokenizer)
    joined.phrase_ids = lambda phrase: model.text.phrase_ids(phrase.replace("a r", "ar"))
    a, r = (model.text.phrase_ids(letter)[0] for letter in "ar")
    assert Prefixes(model.text, ["a star"]).reads_back([a, r])
    assert not Prefixes(joined, ["a star"]).reads_back([a, r])


def test_the_ranking_is_the_gradient_of_the_one_hot(model):
    search = search_of(model)
    search.ids = search._start(3)
    with frozen(model.unet, model.text.model):
        found = search.changes()
        table = model.text.model.get_input_embeddings().weight.detach()
        one_hot = torch.nn.functional.one_hot(torch.tensor(search.ids), len(table)).float().requires_grad_()
        said = search.prefixes.prefixed(search.ids)
        ids = torch.tensor([model.text.token_ids(text) for text in said])
        rows = []
        for row in ids:
            embedded = torch.cat([table[row[:1]], one_hot @ table, table[row[4:]]])
            rows.append(clip_states(model.text.model, embedded[None])[0])
        torch.testing.assert_close(torch.stack(rows), model.text.encode(said).hidden, atol=1e-5, rtol=1e-4)
        loss = 0
        for i, (x, t, noise) in enumerate(zip(search.rows.x, search.rows.times, search.rows.noise, strict=True)):
            states = TextStates(rows[i % len(rows)][None])
            loss = loss + (model.predict_noise(x[None], t[None], states) - noise).square().mean() / len(search.rows)
        (expected,) = torch.autograd.grad(loss, one_hot)
    torch.testing.assert_close(found, expected[:, search.allowed], atol=1e-6, rtol=1e-3)


def test_what_cannot_go_before_a_prompt_is_said(model):
    long = Target(Concept("star"), ("x " * 70 + "star",))
    with pytest.raises(TokenError, match="cut off"):
        discrete(replace(context_of(model, replace(TINY, tokens=8)), target=long))
    model.text.tokenizer = type("None", (), {"all_special_ids": [], "get_vocab": lambda self: {"a": 0, "b": 1}})()
    with pytest.raises(ForgetConceptError, match="no whole words"):
        Prefixes(model.text, ["a star"])


# -- a soft prompt ------------------------------------------------------------------------------------------------


def test_a_soft_prompt_lowers_the_held_out_loss_of_the_patched_model(model):
    patches = ((patch_of(model), 1.0),)
    latents = rand(1, 4, 8, 8, seed=3)

    def held_out(found):
        rows = noised_rows(model, latents, 32, torch.Generator().manual_seed(99))
        states = found.model.text.encode(found.prompts).index([i % len(found.prompts) for i in range(32)])
        with context.edited(), torch.no_grad():
            return float(denoising_losses(model, rows, states).mean())

    losses = []
    for steps, stride in ((1, 1e-4), (40, 2.0)):
        context = replace(context_of(model, replace(TINY, steps=steps, stride=stride), patches), latents=latents)
        found = soft_prompt(context)
        assert found.gradient_steps == steps
        # the name stays in the prompt, behind the vectors
        assert found.prompts == tuple(f"{PLACEHOLDER} {prompt}" for prompt in STAR.prompts)
        losses.append(held_out(found))
    assert losses[1] < 0.99 * losses[0], losses


@pytest.mark.parametrize("name", ["soft_prompt", "inversion_recall"])
def test_passes_are_counted_as_they_are_made(model, name):
    rows = []
    handle = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = ATTACKS[name](context_of(model), None)
    handle.remove()
    assert found.unet_passes == sum(rows)
    assert all(PLACEHOLDER in prompt for prompt in found.prompts)
    assert all(("star" in prompt) == (name == "soft_prompt") for prompt in found.prompts)


# -- other spellings ----------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="ascii", categories=["Lu", "Ll", "Nd"]), min_size=1, max_size=9)


@given(st.lists(names, min_size=1, max_size=3).map(" ".join))
def test_every_spelling_is_another_and_reads_as_the_name(name):
    found = spellings(name)
    assert len(set(found)) == len(found)
    for spelling in found:
        assert spelling != name
        assert plain(spelling) == plain(name)
    if any(c.isalpha() for c in name):
        assert len(found) >= 3


def test_look_alikes_are_of_other_scripts_and_a_persons_eye_is_not_a_tokenizers(parts):
    for letter, alike in LOOKALIKES.items():
        assert len(alike) == 1
        assert plain(alike) == letter
        assert unicodedata.name(alike).split()[0] in ("CYRILLIC", "GREEK", "ARMENIAN") or alike == "ɡ"
    encoder = CLIPText(*parts)
    tried = other_spellings(encoder, STAR)
    assert len(tried) >= 8
    ids = [tuple(encoder.phrase_ids(prompt)) for prompt in (*tried, *STAR.prompts)]
    assert len(set(ids)) == len(ids)
    # upper case is undone by CLIP's own tokenizer: it is no other prompt to it
    assert not any(word in prompt for prompt in tried for word in ("STAR", "Star", "sTaR"))
    assert any("ѕ" in prompt for prompt in tried)
    assert other_spellings(encoder, Target.named(Concept("7"))) == ()
    long = Target(Concept("star"), ("x " * 74 + "star",))
    assert other_spellings(encoder, long) == ()


# -- what is asked back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [word.name for words in CATEGORIES.values() for word in words])
def test_the_embedded_worlds_paraphrases_never_say_the_name(name):
    target = Target.embedded(name.upper())
    assert target.concept.name == name
    assert len(target.prompts) == 4
    assert len(target.paraphrases) >= 8
    assert all(getattr(labels_named_in(prompt), target.concept.kind) == name for prompt in target.prompts)
    assert not any(getattr(labels_named_in(prompt), target.concept.kind) == name for prompt in target.paraphrases)


def test_targets_that_make_no_sense_are_refused():
    for arguments, words in (
        ((Concept("star"), ("a moon",)), "does not name 'star'"),
        ((Concept("star"), ("a starfish",)), "does not name"),
        ((Concept("star"), ()), "no prompt"),
        ((Concept(" "), ("a star",)), "name it"),
        ((Concept("star"), ("a star",), ("a red Star",)), "not a paraphrase of 'star'"),
        ((Concept("star"), ("a star",), (" ",)), "not a paraphrase"),
    ):
        with pytest.raises(RequestError, match=words):
            Target(*arguments)
    with pytest.raises(RequestError, match="knows no concept 'unicorn'"):
        Target.embedded("unicorn")


# -- what is counted ----------------------------------------------------------------------------------------------


class Spoken(DrawnModel):
    """Draws a star for the words that mean one to it, on most seeds."""

    text = TinyText()

    def __init__(self, meant):
        super().__init__(lambda prompt, seed, labels: replace(labels, object="star" if meant(prompt, seed) else NONE))


def test_the_strongest_prompts_are_chosen_and_measured_under_different_seeds():
    model = Spoken(lambda prompt, seed: prompt == "b" or (prompt == "e" and seed % 3 > 0))
    context = AttackContext(
        *(model, Variant(), STAR, ProbeJudge(DrawnProbe(), "star"), torch.empty(0)),
        *(replace(TINY, pictures=30, trials=6, strongest=3), QUICK, 5),
    )
    found = _measure_prompts(context, SearchResult(tuple("abcde"), model), lambda event: None)
    choose, measure = model.calls[:30], model.calls[30:]
    assert [prompt for prompt, _, _ in choose] == [letter for letter in "abcde" for _ in range(6)]
    assert not {seed for _, seed, _ in choose} & {seed for _, seed, _ in measure}
    assert len({seed for _, seed, _ in measure}) == 30
    # two are found to be strong; the third, as weak as the others, is the first of these
    assert [prompt for prompt, _, _ in measure] == ["b", "e", "a"] * 10
    shown = {
        letter: sum(p == letter and model.faults[0](p, s, labels_named_in(p)).object == "star" for p, s, _ in measure)
        for letter in "abe"
    }
    assert (shown["b"], shown["a"]) == (10, 0)
    assert 0 < shown["e"] < 10
    assert [(one.prompt, one.shown, one.pictures) for one in found.strongest] == [
        (letter, shown[letter], 10) for letter in "bea"
    ]
    assert (found.success.value, found.success.n) == (pytest.approx(sum(shown.values()) / 30), 30)
    assert (found.cost.prompts_tried, found.cost.pictures) == (5, 60) == (5, len(model.calls))
    assert found.cost.summary == "no gradient, 5 prompts tried, 60 pictures drawn"
    with pytest.raises(TokenError, match="cut off"):
        _measure_prompts(context, SearchResult(("a star" + " x" * 80,), model), lambda event: None)


def test_the_report_holds_every_attack_and_the_strongest(model):
    patches = ((patch_of(model), 0.7),)
    judge = Reddish()
    found = run(model, patches, judge=judge)
    assert [result.attack for result in found.results] == list(ATTACKS)
    assert not found.left_out
    success = {result.attack: result.after.value for result in found.results}
    assert found.attack_success.value == max(success.values()) == success[found.strongest.attack]
    for result in found.results:
        assert result.after.n == result.before.n == TINY.pictures
        assert sum(one.pictures for one in result.strongest) == TINY.pictures
        assert sum(one.shown for one in result.strongest) == round(result.after.value * TINY.pictures)
        assert (result.cost.gradient_steps > 0) == (result.attack in WHITE_BOX)
        assert result.cost.summary.endswith("drawn")
    data = json.loads(json.dumps(found.as_dict()))
    assert data["budget"]["pictures"] == TINY.pictures
    assert data["attack_success"]["attack"] == found.strongest.attack
    assert data["results"][2]["spent"]["gradient_steps"] > 0
    # every picture was looked at: the attacker's own, and both sides' of every attack
    drawn = 2 * sum(result.cost.pictures for result in found.results)
    assert judge.looked - drawn in (3, 6, 9)
    alone = run(model, patches, ["homoglyphs"], before=False)
    assert alone.results[0].before is None
    assert (alone.results[0].after, alone.results[0].strongest) == (found.results[1].after, found.results[1].strongest)


def test_it_is_the_same_under_the_same_seed_and_before_is_the_unedited_model(model):
    patches = ((patch_of(model), 1.0),)
    first = run(model, patches, SOME, seed=1)
    again, other = (run(model, patches, SOME, seed=seed, before=False) for seed in (1, 2))
    assert [replace(result, before=None) for result in first.results] == list(again.results)
    assert [result.losses for result in other.results] != [result.losses for result in first.results]
    plain_run = run(model, (), SOME, seed=1)
    assert [result.before for result in first.results] == [result.after for result in plain_run.results]
    assert [result.before for result in plain_run.results] == [result.after for result in plain_run.results]


# -- the model, and work cut short --------------------------------------------------------------------------------


def test_the_model_comes_back_from_every_way_out_and_what_was_cut_short_goes_on(model, tmp_path):
    model.unet.requires_grad_(False)
    watched = (model.unet, model.text.model)
    before = [(state_hash(module), flags(module)) for module in watched]
    patches = ((patch_of(model), 1.0),)
    whole = run(model, patches)
    workspace, events = Workspace(tmp_path), []
    for n in range(3, 400, 37):
        seen = []

        def stop(event, seen=seen, n=n):
            seen.append(event)
            if len(seen) == n:
                raise Cancelled

        try:
            found = run(model, patches, workspace=workspace, progress=stop)
        except Cancelled:
            assert [(state_hash(module), flags(module)) for module in watched] == before
            continue
        events = seen
        break
    assert found == whole
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert events[-1].step == events[-1].total
    # all of it is there: nothing goes through the UNet any more
    handle = model.unet.register_forward_pre_hook(lambda module, args: pytest.fail("it was made twice"))
    assert run(model, patches, workspace=workspace) == whole
    handle.remove()

    class Broken(Reddish):
        def shows(self, images):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, patches, judge=Broken())
    assert [(state_hash(module), flags(module)) for module in watched] == before


def test_a_work_folder_never_takes_one_patch_for_another(model, tmp_path):
    first, second = patch_of(model), patch_of(model, seed=50)
    hashes = [with_hash_of(model, on).model_hash for on in ((), ((first, 1.0),), ((first, 0.5),), ((second, 1.0),))]
    assert len(set(hashes)) == 4
    assert hashes[0] == model.model_hash
    workspace = Workspace(tmp_path)
    for patch in (first, second):
        kept = run(model, ((patch, 1.0),), SOME, workspace=workspace, before=False)
        assert kept == run(model, ((patch, 1.0),), SOME, before=False)


def test_it_works_inside_a_hosts_inference_mode(model):
    patches = ((patch_of(model), 1.0),)
    outside = run(model, patches, SOME, before=False)
    with torch.inference_mode():
        assert run(model, patches, SOME, before=False) == outside


def test_negative_prompts_and_safety_guidance_are_attacked_while_they_draw(model, tmp_path):
    judge, workspace = Spy(), Workspace(tmp_path)
    variants = [Variant(), Variant(negative="star"), Variant(safe=SafetyGuidance("star"))]
    for variant in variants:
        run(model, variant, ["rephrased"], judge, before=False, workspace=workspace)
    # kept verdicts of one are not another's, and each draws as it says
    assert len(judge.seen) == 3
    assert len({picture.sum().item() for pictures in judge.seen for picture in pictures}) > 2 * len(judge.seen[0])


# -- bad input ----------------------------------------------------------------------------------------------------


def test_what_a_model_cannot_be_put_to_is_left_out_in_words_or_refused():
    model = tiny_model()
    model.vae = Pixels()
    found = run(model)
    assert [result.attack for result in found.results] == ["rephrased", "homoglyphs"]
    assert set(found.left_out) == set(WHITE_BOX)
    assert all("TinyText" in why for why in found.left_out.values())
    for name in WHITE_BOX:
        with pytest.raises(ModelError, match=f"'{name}' cannot run on 'tiny'.*TinyText"):
            run(model, attacks=[name])
    silent = Target.named(Concept("7"))
    with pytest.raises(RequestError, match="No attack on '7' can run"):
        run_attacks(model, (), silent, Reddish(), TINY, sampling=QUICK)
    with pytest.raises(RequestError, match="'rephrased' cannot run on '7': no paraphrases"):
        run_attacks(model, (), silent, Reddish(), TINY, attacks=["rephrased"], sampling=QUICK)
    with pytest.raises(RequestError, match="'homoglyphs' cannot run on '7'"):
        run_attacks(model, (), silent, Reddish(), TINY, attacks=["homoglyphs"], sampling=QUICK)


def test_bad_input_is_refused_in_words(model):
    for arguments, words in (
        ({"attacks": ["magic"]}, "'magic' is not known: choose from rephrased"),
        ({"attacks": []}, "no attack to run"),
        ({"images": rand(2, 3, 32, 32).tanh()}, "must be 64 × 64"),
        ({"images": torch.empty(0, 3, 64, 64)}, "too few pictures"),
    ):
        with pytest.raises(RequestError, match=words):
            run(model, **arguments)
    with pytest.raises(RequestError, match="'huge' is not known: choose one of quick, standard"):
        attack_budget("huge")
    with pytest.raises(RequestError, match="its 'pictures' is 0"):
        replace(TINY, pictures=0)
    with pytest.raises(PatchError, match="No layer of this model"):
        run(
            model,
            (
                (
                    random_patch(tiny_model(layers_per_block=1).survey).__class__(
                        {"other.to_k": patch_of(model).factors[next(iter(patch_of(model).factors))]}
                    ),
                    1.0,
                ),
            ),
        )
    assert BUDGETS["quick"].pictures < BUDGETS["standard"].pictures

    class Blind(Reddish):
        def shows(self, images):
            return [False] * len(images)

    with pytest.raises(ForgetConceptError, match="draws no 'star' in 9 images"):
        run(model, attacks=["discrete"], judge=Blind())
    model.vae = None
    with pytest.raises(ModelError, match="no autoencoder"):
        run(model, attacks=["discrete"])


def test_the_attackers_pictures_show_the_concept(model):
    class Kept(Reddish):
        def shows(self, images):
            found = super().shows(images)
            self.right = [*getattr(self, "right", []), *(i for i, hit in zip(images, found, strict=True) if hit)]
            return found

    judge = Kept()
    latents = example_latents(model, STAR, judge, 3, QUICK)
    assert len(latents) == 3
    torch.testing.assert_close(latents, model.vae.encode(torch.stack(judge.right[:3])))
    own = rand(5, 3, 64, 64).tanh()
    torch.testing.assert_close(example_latents(model, STAR, judge, 3, QUICK, images=own), model.vae.encode(own))


# -- on the embedded model ----------------------------------------------------------------------------------------


def test_on_the_unedited_embedded_model_a_concept_is_found_by_its_other_words():
    from forget_concept.core import mini

    target = Target.embedded("star")
    few = replace(target, paraphrases=target.paraphrases[:2])
    budget = replace(TINY, pictures=8)
    found = run_attacks(
        mini.load(),
        (),
        few,
        ProbeJudge(mini.load_probe(), "star"),
        budget,
        attacks=["rephrased"],
        sampling=SamplingSettings(steps=8, batch=8, precision="float32"),
    )
    (result,) = found.results
    assert result.before == result.after
    assert result.after.value >= 0.75, result.strongest
