"""The general rule: where a text enters a model of no known family is found by recording one prediction."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from tiny import TinyText, fit, rand, state_hash
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_of_diffusers import POOLED_WIDTH, SMALL, TEXT, TOKENS_READ, Small

from forget_concept.core.errors import ModelError, UnknownFamilyError
from forget_concept.core.formats import load_patch
from forget_concept.core.models import recording
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.survey import survey
from forget_concept.core.models.text_entries import POOLED, TOKENS
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.models.transformer import entries_alone
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

needs_rms_norm = pytest.mark.skipif(
    not hasattr(nn, "RMSNorm"), reason="diffusers' transformers need torch 2.4 or later"
)


def states(seed: int, pooled: bool = True) -> TextStates:
    return TextStates(rand(1, TOKENS_READ, TEXT, seed=seed), rand(1, POOLED_WIDTH, seed=seed + 50) if pooled else None)


@needs_rms_norm
@pytest.mark.parametrize("small", SMALL, ids=str)
def test_recording_finds_what_the_families_say_of_themselves(small: Small) -> None:
    model = small.make()
    before = state_hash(model)

    def predict(given: TextStates) -> Tensor:
        return small.call(model, given.hidden[0], None if given.pooled is None else given.pooled[0])

    found = recording.record(model, predict, states(1, small.pooled), states(2, small.pooled))
    own = survey(model)
    assert own.family == small.family  # a known family goes before what was recorded
    wanted = {(entry.stream, own.layer(entry.key).path) for entry in own.entries}
    assert {(entry.stream, entry.original) for entry in found.entries} == wanted
    assert [entry.norm for entry in found.entries if entry.stream == TOKENS] == [own.path_of_norm(own.kind.entries[0])]
    assert "all of what the text changes passes through them" in found.caution
    assert state_hash(model) == before and not any(part._forward_hooks for part in model.modules())


class Unknown(nn.Module):
    """A model of no family: two layers read the tokens, one the pooled vector, and there may be a way past them."""

    def __init__(self, past: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.read_first, self.read_second = nn.Linear(TEXT, 8), nn.Linear(TEXT, 8)
            self.vector = nn.Linear(POOLED_WIDTH, 8)
            self.behind = nn.Linear(8, 4)
        self.past = past

    def forward(self, x: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        read = F.silu(self.read_first(hidden)) + torch.tanh(self.read_second(hidden))
        out = self.behind(F.silu(read.mean(1) + self.vector(pooled)))
        return x + (out + self.past * hidden.mean((1, 2))[:, None])[:, :, None, None]


class Words(TinyText):
    layer = "words"


def unknown(past: float = 0.0) -> LatentDiffusion:
    model = Unknown(past)
    return LatentDiffusion(
        model,
        Words(TEXT, POOLED_WIDTH, max_length=12),
        sd_alphas_cumprod(),
        latent_shape=(4, 4, 4),
        name="unknown",
        eps_model=lambda x, times, given: model(x, given.hidden, given.pooled),
    )


def recorded(past: float = 0.0) -> tuple[LatentDiffusion, recording.Family]:
    model = unknown(past)
    x, times = model.initial_noise([0]), torch.tensor([500])
    one, other = (model.text.encode([words]) for words in ("a cat", "seven houses by the sea"))
    return model, recording.record(model.unet, lambda given: model.predict_noise(x, times, given), one, other)


def test_a_model_of_no_family_says_so_until_it_is_recorded() -> None:
    with pytest.raises(UnknownFamilyError, match="Unknown"):
        survey(Unknown())
    model, _ = recorded()
    found = survey(model.unet)
    assert found.family == recording.RECORDED and model.survey.context_dim == TEXT
    assert [(entry.stream, entry.key) for entry in found.entries] == [
        (TOKENS, "read_first"),
        (TOKENS, "read_second"),
        (POOLED, "vector"),
    ]


def test_a_closed_form_on_it_is_the_map_of_the_text_states_and_its_file_comes_back(tmp_path) -> None:
    model, _ = recorded()
    settings = {"contexts": False, "keep_common": False}
    patch = fit(model, ForgetRequest((Concept("star", replacement="circle"),), preserve=("tree",), settings=settings))
    assert "found by recording, and all of what the text changes" in (patch.about.note or "")
    x, times = model.initial_noise([3]), torch.tensor([500])
    given = model.text.encode(["a picture of a star"])
    maps = {stream: factor.delta() for stream, factor in patch.context_maps.items()}
    mapped = TextStates(
        given.hidden + given.hidden @ maps[TOKENS].T,
        given.pooled + given.pooled @ maps[POOLED].T,  # type: ignore[operator]
    )
    wanted = model.predict_noise(x, times, mapped)
    with patch.applied(model.survey):
        torch.testing.assert_close(model.predict_noise(x, times, given), wanted, rtol=1e-3, atol=1e-4)
    for form in ("kohya", "context-map"):
        path = tmp_path / f"{form}.safetensors"
        patch.save(path, form, survey=model.survey)
        again = load_patch(path, model.survey)
        assert set(again.factors) == set(patch.factors)
        for key, factor in patch.factors.items():
            torch.testing.assert_close(again.factors[key].delta(), factor.delta(), rtol=1e-4, atol=1e-6)
    # what a host copies of it is the same model to a closed form
    alone = entries_alone(survey(model.unet), lambda path: model.unet.get_submodule(path).weight.detach().clone())
    assert survey(alone).fingerprint() == model.survey.fingerprint()
    # a host that has not recorded it takes the file by the names in it
    plain = load_patch(tmp_path / "kohya.safetensors")
    other = Unknown()
    assert recording.adopt(other, plain.factors) and set(survey(other).layers) == set(plain.factors)
    plain.check_fits(survey(other))
    assert not recording.adopt(nn.Linear(2, 2), plain.factors)


@pytest.mark.parametrize(("past", "words"), [(0.02, r"about 9\d%"), (40.0, r"pass on only \d+%")])
def test_how_much_of_the_text_takes_other_ways_is_said(past: float, words: str) -> None:
    if past > 1:
        with pytest.raises(ModelError, match=words):
            recorded(past)
    else:
        assert re.search(words, recorded(past)[1].caution)


class Deaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x.mean((2, 3)))[:, :, None, None]


def test_a_model_that_reads_no_text_first_is_refused() -> None:
    model = Deaf()
    with pytest.raises(ModelError, match="none of its linear layers reads the text states"):
        recording.record(model, lambda given: model(rand(1, 4, 2, 2)), states(1), states(2))


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    yield
    recording._known.clear()
