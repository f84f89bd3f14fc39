"""Patches: applied as merged, exact removal, their algebra, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import flags, forward, rand, random_patch, state_hash, tiny_unet

from forget_concept.core.errors import PatchError
from forget_concept.core.models.survey import survey
from forget_concept.core.models.text_entries import TOKENS
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def patch(unet):
    return random_patch(survey(unet))


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
def test_applied_is_merged_and_leaves_no_trace(unet, patch, strength):
    before, flagged, base = state_hash(unet), flags(unet), forward(unet)
    with patch.applied(unet, strength):
        hooked = forward(unet)
        assert state_hash(unet) == before
    assert state_hash(unet) == before and flags(unet) == flagged and torch.equal(forward(unet), base)
    merged = copy.deepcopy(unet)
    merged.load_state_dict(patch.merged_state(unet, strength), strict=False)
    assert float((hooked - base).abs().max()) > 1e-3
    torch.testing.assert_close(hooked, forward(merged), atol=2e-5, rtol=1e-3)


def test_removed_after_an_error_and_twice(unet, patch):
    flagged = flags(unet)
    with pytest.raises(RuntimeError), patch.applied(unet):
        raise RuntimeError
    handle = patch.apply(survey(unet))
    assert flags(unet) != flagged
    handle.remove()
    handle.remove()
    assert flags(unet) == flagged
    with patch.apply(unet):
        assert flags(unet) != flagged
    assert flags(unet) == flagged


def test_patches_stack_and_combine(unet, patch):
    found = survey(unet)
    other = random_patch(found, rank=3, seed=77, which=("to_k", "to_v"))
    with patch.applied(unet, 0.5), other.applied(unet, 2.0):
        stacked = forward(unet)
    both = Patch.combined([(patch, 0.5), (other, 2.0)])
    assert both.rank == 5 and len(both) == len(patch)
    with both.applied(unet):
        torch.testing.assert_close(forward(unet), stacked, atol=1e-5, rtol=1e-4)
    assert '"strength": 2.0' in both.metadata["forget_concept.parts"]
    assert Patch.combined([(patch, 1.0)]).metadata == patch.metadata
    with pytest.raises(PatchError, match="no patches"):
        Patch.combined([])
    with pytest.raises(PatchError, match="sd1, sdxl"):
        Patch.combined([(patch.with_metadata(family="sd1"), 1), (other.with_metadata(family="sdxl"), 1)])


def test_half_precision_layers_get_the_patch_in_their_own_dtype(patch):
    unet = tiny_unet().to(torch.bfloat16)
    x, c = rand(1, 4, 8, 8).bfloat16(), rand(1, 77, 32, seed=9).bfloat16()
    with torch.no_grad(), patch.applied(unet):
        assert unet(x, torch.tensor([100]), encoder_hidden_states=c).sample.dtype == torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(d_out=st.integers(1, 20), d_in=st.integers(1, 20), rank=st.integers(1, 25), seed=st.integers(0, 50))
def test_truncation_with_the_defaults_keeps_everything_but_rank(d_out, d_in, rank, seed):
    factor = LowRank(rand(d_out, rank, seed=seed), rand(rank, d_in, seed=seed + 1))
    cut = factor.truncated()
    torch.testing.assert_close(cut.delta(), factor.delta(), atol=1e-4, rtol=1e-4)
    assert cut.rank <= min(d_out, d_in, rank)
    torch.testing.assert_close(cut.up.norm(dim=0), cut.down.norm(dim=1), atol=1e-4, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 6), energy=st.floats(0.1, 1.0), seed=st.integers(0, 50))
def test_truncation_is_the_best_of_its_rank_and_keeps_its_energy(rank, energy, seed):
    factor = LowRank(rand(12, 8, seed=seed), rand(8, 9, seed=seed + 1))
    values = torch.linalg.svdvals(factor.delta().double())
    by_rank = factor.truncated(rank=rank)
    assert by_rank.rank == rank
    error = float((by_rank.delta() - factor.delta()).norm())
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-4)
    by_energy = factor.truncated(energy=energy)
    kept = float((values[: by_energy.rank] ** 2).sum() / (values**2).sum())
    assert kept >= energy - 1e-6
    if by_energy.rank > 1 and energy < 1:
        assert float((values[: by_energy.rank - 1] ** 2).sum() / (values**2).sum()) < energy + 1e-6


def test_truncation_of_nothing_and_nonsense(patch):
    zero = LowRank(torch.zeros(4, 3), torch.zeros(3, 5)).truncated()
    assert zero.rank == 1 and not zero.delta().any()
    for bad in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(PatchError):
            patch.truncated(**bad)
    with_map = Patch(patch.factors, {}, {TOKENS: LowRank(rand(4, 2), rand(2, 4))})
    assert with_map.truncated().context_maps
    assert not with_map.truncated(rank=1).context_maps and with_map.truncated(rank=1).rank == 1


def test_scaling(patch):
    key = next(iter(patch.factors))
    torch.testing.assert_close(patch.scaled(-2).factors[key].delta(), -2 * patch.factors[key].delta())
    assert patch.scaled(0).max_abs() == 0 < patch.max_abs()
    assert all(float(f.delta().abs().max()) <= patch.max_abs() for f in patch.factors.values())
    with pytest.raises(PatchError, match="finite"):
        patch.scaled(float("inf"))
    half = patch.to(torch.float16)
    assert half.nbytes * 2 == patch.nbytes and half.factors[key].up.dtype == torch.float16


def test_what_does_not_fit_is_refused_and_nothing_is_put_on(unet, patch):
    flagged = flags(unet)
    elsewhere = tiny_unet(cross_attention_dim=48)
    with pytest.raises(PatchError, match=r"another architecture.*×32"):
        patch.apply(elsewhere)
    deeper = survey(tiny_unet(layers_per_block=3))
    with pytest.raises(PatchError, match=r"another architecture: .* are not in this"):
        random_patch(deeper).apply(unet)
    with pytest.raises(PatchError, match="No layer of this model matches"):
        Patch({"transformer.0.to_q": LowRank(rand(3, 1), rand(1, 3))}).apply(unet)
    key = next(iter(patch.factors))
    broken = LowRank(patch.factors[key].up.clone(), patch.factors[key].down)
    broken.up[0, 0] = float("nan")
    with pytest.raises(PatchError, match=f"NaN.*{key}"):
        Patch({**patch.factors, key: broken}).apply(unet)
    with pytest.raises(PatchError, match="finite"):
        patch.apply(unet, float("nan"))
    with pytest.raises(PatchError, match="empty"):
        Patch({})
    with pytest.raises(PatchError, match="fit together"):
        LowRank(rand(3, 2), rand(3, 3))
    assert flags(unet) == flagged


def test_surviving_share(unet):
    found = survey(unet)
    strong = random_patch(found, scale=0.3, which=("to_k",))
    assert strong.surviving_share(unet) == pytest.approx(1, abs=1e-4)
    assert strong.surviving_share(unet, torch.bfloat16) > 0.99
    weak = random_patch(found, scale=1e-3, which=("to_k",))  # changes of 1e-6, far below bf16's spacing
    assert weak.surviving_share(unet, torch.float32) > 0.99
    assert weak.surviving_share(unet, torch.bfloat16) < 0.2
    with pytest.raises(PatchError, match="changes nothing"):
        strong.scaled(0).surviving_share(unet)


@given(st.floats(min_value=10, exclude_min=True) | st.just(float("nan")), st.booleans())
def test_a_strength_out_of_range_is_refused_everywhere(unet, patch, size, negative):
    """1e30 overflows every picture; there is one bound, whatever the patch is used for."""
    strength = -size if negative else size
    for use in (
        lambda: patch.scaled(strength),
        lambda: patch.apply(unet, strength),
        lambda: patch.merged_state(unet, strength),
        lambda: Patch.combined([(patch, 1.0), (patch, strength)]),
    ):
        with pytest.raises(PatchError, match="from -10 to 10"):
            use()
    assert not any(module._forward_hooks for module in unet.modules())
