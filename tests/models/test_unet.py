"""The survey: every published architecture, both namings, and what is refused."""

from __future__ import annotations

import pytest
import torch
from configs import SD15, SD21, SDXL
from hypothesis import given
from hypothesis import strategies as st
from ldm_unet import ldm_unet, ldm_unet_class
from tiny import WIDTH, TinyText, rand, tiny_unet, tiny_unet_config
from torch import nn

from forget_concept.core.errors import ModelError
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.model_survey import PROJECTIONS
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.survey import survey
from forget_concept.core.models.unet import canonical_from_ldm, ldm_from_canonical


def on_meta(config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(
    ("config", "family", "count", "width", "weights"),
    [
        (SD15, "sd1", 16, 768, 19.2e6),
        (SD21, "sd2", 16, 1024, None),
        (SDXL, "sdxl", 70, 2048, 340.8e6),
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_published_architectures(config, family, count, width, weights):
    found = survey(on_meta(config))
    assert (found.layout, found.family, len(found), found.context_dim) == ("diffusers", family, count, width)
    assert len({site.name for site in found}) == len({site.ldm_name for site in found}) == count
    assert all(site.path == site.name for site in found)
    if weights:
        assert sum(s.projection(w).weight.numel() for s in found for w in ("to_k", "to_v")) == pytest.approx(
            weights, rel=0.01
        )
    for site in found:  # these have two layers a block, so the names alone tell as much
        assert ldm_from_canonical(site.name) == site.ldm_name
        assert canonical_from_ldm(site.ldm_name) == site.name
    names = {site.name: site.ldm_name for site in found}
    if family == "sdxl":
        assert (
            names["down_blocks.2.attentions.1.transformer_blocks.9.attn2"]
            == "input_blocks.8.1.transformer_blocks.9.attn2"
        )
        assert (
            names["up_blocks.0.attentions.2.transformer_blocks.3.attn2"]
            == "output_blocks.2.1.transformer_blocks.3.attn2"
        )
    else:
        assert (
            names["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
            == "input_blocks.1.1.transformer_blocks.0.attn2"
        )
        assert (
            names["up_blocks.3.attentions.2.transformer_blocks.0.attn2"]
            == "output_blocks.11.1.transformer_blocks.0.attn2"
        )
    assert names["mid_block.attentions.0.transformer_blocks.0.attn2"] == "middle_block.1.transformer_blocks.0.attn2"


def test_order_is_that_of_the_data():
    stages = [site.name.split(".")[0] for site in survey(on_meta(SD15))]
    assert stages == ["down_blocks"] * 6 + ["mid_block"] + ["up_blocks"] * 9


def test_a_custom_two_level_unet():
    found = survey(tiny_unet())
    assert (len(found), found.family, found.context_dim) == (11, "other", WIDTH)
    assert found.by_name("mid_block.attentions.0.transformer_blocks.0.attn2").heads == 4
    key = found.sites[0].key("to_out")
    assert found.linear(key) is found.sites[0].module.to_out[0]
    assert found.sites[0].weight_path("to_out").endswith("to_out.0")


def test_every_linear_layer_of_the_transformer_blocks_is_found():
    unet = tiny_unet()
    found = survey(unet).layers
    inside = {name for name, part in unet.named_modules() if ".transformer_blocks." in name and type(part) is nn.Linear}
    assert {layer.path for layer in found.values()} == inside and len(inside) == 110
    assert {site.key(which) for site in survey(unet) for which in PROJECTIONS} <= set(found)
    assert {key.split(".transformer_blocks.0.")[1] for key in found} == {
        *(f"attn{n}.{which}" for n in (1, 2) for which in PROJECTIONS),
        "ff.net.0.proj",
        "ff.net.2",
    }


def test_other_layers_than_these_are_not_there():
    found, block = survey(tiny_unet()), "down_blocks.0.attentions.0.transformer_blocks.0"
    for key in (
        f"{block}.norm1",
        f"{block}.ff.net.1",
        f"{block}.attn1.to_q.0",
        "down_blocks.0.attentions.0.proj_in",
        "",
    ):
        assert found.find(key) is None
        with pytest.raises(ModelError, match="no projection"):
            found.linear(key)
    unet = tiny_unet()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[2] = nn.Identity()
    with pytest.raises(ModelError, match=r"ff\.net\.2' is a Identity"):
        survey(unet).layers  # noqa: B018


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_ldm_and_diffusers_name_the_same_weights(layers):
    """One LDM UNet's weights, converted by diffusers: under every canonical key both surveys have the same matrix."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    original = ldm_unet(num_res_blocks=layers)
    for n, parameter in enumerate(original.parameters()):  # LDM starts some layers at zero, which would prove nothing
        parameter.data = rand(*parameter.shape, seed=n) * 0.05
    config = tiny_unet_config(layers_per_block=layers, norm_num_groups=32)
    state = {f"model.diffusion_model.{k}": v for k, v in original.state_dict().items()}
    twin = UNet2DConditionModel(**config).eval()
    twin.load_state_dict(
        convert_ldm_unet_checkpoint(state, config | {"class_embed_type": None, "addition_embed_type": None})
    )
    ours, theirs = survey(original), survey(twin)
    assert (ours.layout, theirs.layout) == ("ldm", "diffusers")
    assert [s.name for s in ours] == [s.name for s in theirs]
    assert len(ours) == 2 * layers + 1 + 2 * (layers + 1)
    assert [s.ldm_name for s in ours] == [s.ldm_name for s in theirs] == [s.path for s in ours]
    for site in ours:
        for which in PROJECTIONS:
            assert torch.equal(site.projection(which).weight, theirs.linear(site.key(which)).weight)
    assert ours.fingerprint() == theirs.fingerprint()
    assert set(ours.layers) == set(theirs.layers) and len(ours.layers) == 10 * len(ours)
    for key, layer in ours.layers.items():
        other = theirs.layers[key]
        assert torch.equal(layer.module.weight, other.module.weight) and other.path in (key, f"{key}.0")
        assert layer.ldm_key == other.ldm_key and layer.path in (layer.ldm_key, f"{layer.ldm_key}.0")
        assert original.get_submodule(layer.path) is layer.module is ours.linear(key)
    # and both are called aright: the same noise, the same hash of the weights
    models = [LatentDiffusion(u, TinyText(), sd_alphas_cumprod(), latent_shape=(4, 8, 8)) for u in (original, twin)]
    x, t, states = rand(2, 4, 8, 8), torch.tensor([10, 700]), TinyText().encode(["a star", ""])
    with torch.no_grad():
        first, second = (m.predict_noise(x, t, states) for m in models)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
    assert models[0].model_hash == models[1].model_hash


def test_the_original_sd1_unet_has_the_names_of_diffusers_sd1():
    with torch.device("meta"):
        original = ldm_unet_class()(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            num_res_blocks=2,
            channel_mult=[1, 2, 4, 4],
            num_heads=8,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=768,
            use_checkpoint=False,
            legacy=False,
        )
    ours, theirs = survey(original), survey(on_meta(SD15))
    assert [s.name for s in ours] == [s.name for s in theirs]
    assert [s.ldm_name for s in theirs] == [s.path for s in ours]
    assert ours.family == "sd1" and ours.fingerprint() == theirs.fingerprint()


def test_fingerprint_tells_architectures_apart_and_not_weights():
    first = survey(tiny_unet(seed=0)).fingerprint()
    assert first == survey(tiny_unet(seed=1)).fingerprint()
    assert first != survey(tiny_unet(cross_attention_dim=48)).fingerprint()
    assert first != survey(tiny_unet(attention_head_dim=8)).fingerprint()


def test_refusals_in_words():
    with pytest.raises(ModelError, match="no cross-attention"):
        survey(nn.Linear(3, 3))
    plain = tiny_unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D"
    )
    with pytest.raises(ModelError, match="no cross-attention"):
        survey(plain)
    adapted = tiny_unet()
    adapted.mid_block.attentions[0].transformer_blocks[0].attn2.to_k = nn.Sequential(nn.Linear(WIDTH, 64))
    with pytest.raises(ModelError, match=r"to_k.*Sequential.*unload"):
        survey(adapted)
    with pytest.raises(ModelError, match="no cross-attention site 'x'"):
        survey(tiny_unet()).by_name("x")
    for name in (
        "input_blocks.3.1.transformer_blocks.0.attn2",
        "time_embed.0",
        "output_blocks.1.0.x",
        "middle_block.0.x",
    ):
        with pytest.raises(ModelError):
            canonical_from_ldm(name)
    with pytest.raises(ModelError):
        ldm_from_canonical("conv_in")


@given(
    st.sampled_from(["down_blocks", "up_blocks"]),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_names_go_there_and_back(stage, block, layers, attention, depth):
    if attention >= layers + (stage == "up_blocks"):
        return
    name = f"{stage}.{block}.attentions.{attention}.transformer_blocks.{depth}.attn2"
    assert canonical_from_ldm(ldm_from_canonical(name, layers), layers) == name


class HostLinear(nn.Module):
    """A host's linear layer with a weight of the host's own type."""

    def __init__(self, own: nn.Linear, weight: torch.Tensor):
        super().__init__()
        self.in_features, self.out_features = own.in_features, own.out_features
        self.register_parameter("weight", None)
        self._parameters["weight"] = weight


class OwnTensor(torch.Tensor):
    """What a host keeps a quantised weight in."""


class ReadLinear(HostLinear):
    def convert_weight(self, weight, **_):
        return weight


@pytest.mark.parametrize(
    ("kind", "typed", "accepted"),
    [(HostLinear, nn.Parameter, True), (HostLinear, OwnTensor, False), (ReadLinear, OwnTensor, True)],
)
def test_a_hosts_own_linear_is_accepted_if_its_weight_can_be_read(kind, typed, accepted):
    unet = tiny_unet()
    site = survey(unet).sites[0]
    own = site.projection("to_k")
    site.module.to_k = kind(
        own, nn.Parameter(own.weight.data) if typed is nn.Parameter else own.weight.data.as_subclass(typed)
    )
    if accepted:
        assert survey(unet).sites[0].projection("to_k") is site.module.to_k
        return
    with pytest.raises(ModelError, match="instead of a plain linear layer"):
        survey(unet)
