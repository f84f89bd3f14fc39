"""A damaged checkpoint is named as the cause before anything is fitted or drawn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import clip_parts, fit, tiny_model

from forget_concept.core.errors import ForgetConceptError, ModelError
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.finite import check_weights, not_finite
from forget_concept.core.models.text_encoders import CLIPText, EncodedPrompts, SDXLText, encode_prompts
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

BAD = [math.nan, math.inf, -math.inf]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODEL = tiny_model()
STAR = ForgetRequest((Concept("star", replacement="circle"),))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_parts(tmp_path_factory.mktemp("clip"))


def spoiled(tensor, value=math.nan, place=-1):
    with torch.no_grad():
        tensor.view(-1)[place] = value


@given(st.data())
def test_one_bad_value_in_any_weight_is_found(data):
    name, tensor = data.draw(st.sampled_from(list(MODEL.unet.named_parameters())))
    place = data.draw(st.integers(0, tensor.numel() - 1))
    own = float(tensor.detach().view(-1)[place])
    spoiled(tensor, data.draw(st.sampled_from(BAD)), place)
    try:
        with pytest.raises(ModelError, match="is damaged: its UNet") as raised:
            check_weights(MODEL)
        assert name in str(raised.value)
    finally:
        spoiled(tensor, own, place)
    check_weights(MODEL)


def test_a_mask_that_no_checkpoint_holds_is_no_damage():
    """open_clip's text encoders, SD 2's and SDXL's second, have one with minus infinity."""
    model = tiny_model()
    mask = torch.full((4, 4), -math.inf).triu(1)
    model.unet.register_buffer("attn_mask", mask, persistent=False)
    check_weights(model)
    model.unet.register_buffer("table", torch.tensor([math.inf]))
    with pytest.raises(ModelError, match="its UNet has NaN or infinite values in table"):
        check_weights(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
def test_every_dtype_is_read_and_large_values_are_no_damage(dtype, bad):
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    damaged = torch.ones(1000, dtype=dtype)
    damaged[7] = bad
    plain = [("largest", largest), ("zeros", torch.zeros(0)), ("ids", torch.arange(3))]
    assert not_finite(plain) == []
    assert not_finite([*plain, ("damaged", damaged), ("meta", damaged.to("meta"))]) == ["damaged"]


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8_weights_are_read():
    fine = torch.ones(8).to(torch.float8_e4m3fn)
    damaged = torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)
    assert not_finite([("fine", fine), ("damaged", damaged)]) == ["damaged"]


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_no_method_fits_on_a_damaged_checkpoint(method, monkeypatch):
    """The message names the tensor, not the patch, 'ridge' or the learning rate."""
    monkeypatch.setattr(all_methods()[method], "fit", lambda *_, **__: pytest.fail("the fit began"))
    model = tiny_model()
    name = model.survey.sites[0].weight_path("to_k") + ".weight"
    spoiled(dict(model.unet.named_parameters())[name])
    with pytest.raises(ModelError, match="damaged") as raised:
        fit(model, ForgetRequest(STAR.concepts, method=method))
    assert name in str(raised.value)


def test_a_damaged_token_table_is_named_even_where_the_concept_does_not_use_it(clip):
    text, tokenizer = clip
    model = tiny_model()
    model.text = CLIPText(text, tokenizer)
    table = text.get_input_embeddings().weight
    model_xl, own = tiny_model(), table[-3, 0].item()
    model_xl.text = SDXLText(copy.deepcopy(text), text, tokenizer, tokenizer)
    try:
        with torch.no_grad():
            table[-3, 0] = math.nan
        with pytest.raises(ModelError, match=r"its text encoder .*token_embedding\.weight"):
            fit(model, STAR)
        with pytest.raises(ModelError, match=r"token_embedding\.weight"):
            check_weights(model_xl)
    finally:
        with torch.no_grad():
            table[-3, 0] = own


def test_a_projection_that_no_checkpoint_has_is_no_damage(clip):
    """A host makes it in memory that it leaves as it finds it, and reads no result of it."""
    text, tokenizer = clip
    text = copy.deepcopy(text)
    text.text_projection = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        text.text_projection.weight[1, 2] = math.nan
    model = tiny_model()
    model.text = CLIPText(text, tokenizer)
    check_weights(model)


def test_text_states_that_are_not_finite_name_their_prompt():
    """A host may hide the text encoder's weights: then the states tell."""
    model = tiny_model()
    model.text.table[model.text.phrase_ids("moon")[0]] = math.inf
    model.text.table[model.text.phrase_ids("moon")[0], 0] = -math.inf
    model.text.mix[:] = math.nan
    for encode in (encode_prompts, EncodedPrompts):
        with pytest.raises(ModelError, match="NaN or infinite values for the prompt 'a moon'"):
            encode(model.text, ["a moon", "a star"])
    with pytest.raises(ModelError, match="text encoder gives NaN"):
        fit(model, STAR)


class Decoder:
    def __init__(self, value):
        self.value = value

    def decode(self, latents):
        return torch.full((len(latents), 3, 8, 8), self.value)


def test_pictures_that_are_not_finite_are_an_error():
    model = tiny_model()
    spoiled(model.unet.conv_in.bias)
    with pytest.raises(ModelError, match=r"conv_in\.bias"):
        model.sample(["a star"], [0], steps=1)
    model = tiny_model()
    model._call = lambda x, *_: torch.full_like(x, math.inf)
    with pytest.raises(ForgetConceptError, match="'a star' came out NaN"):
        model.sample(["a star"], [0], steps=2)
    model.vae = Decoder(math.nan)
    with pytest.raises(ForgetConceptError, match="autoencoder gives NaN"):
        model.decode(torch.zeros(1, 4, 8, 8))
    model.vae = Decoder(0.5)
    assert model.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 8, 8)


def test_the_weights_of_an_autoencoder_are_looked_at():
    from diffusers import AutoencoderKL

    from forget_concept.core.models.autoencoders import DiffusersAutoencoder

    model = tiny_model()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    model.vae = DiffusersAutoencoder(vae)
    check_weights(model)
    spoiled(vae.post_quant_conv.weight)
    with pytest.raises(ModelError, match=r"its autoencoder has NaN or infinite values in .*post_quant_conv\.weight"):
        check_weights(model)
