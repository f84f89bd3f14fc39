"""The embedded models of other shapes: their training stages resume exactly, and diffusers' pipelines load the result.

The weights are those of a few steps on noise; how well a trained one draws is measured by `forget-concept mini-table`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import rand, tiny_model, tiny_xl_model
from torch import nn
from transformers_of_diffusers import SMALL

from forget_concept.core import mini
from forget_concept.core.errors import ModelError
from forget_concept.core.evaluation.drawing import SamplingSettings
from forget_concept.core.evaluation.pooled_use import pooled_use
from forget_concept.core.files.safetensors_io import read_safetensors
from forget_concept.core.mini import config_flow, config_xl, ldm_xl
from forget_concept.core.mini.config import SCHEDULE
from forget_concept.core.mini.train import flow, reflow, xl
from forget_concept.core.mini.world import Labels
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.models.survey import survey
from forget_concept.core.models.text_entries import POOLED, TOKENS
from forget_concept.core.models.text_states import TextStates

# enough captions that some name every kind of label
PICTURES, BATCH, CAPTIONS = 12, 4, 16


needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="the training of mini-flow needs torch 2.9 or later"
)


def hashes(path: Path) -> dict[str, int]:
    """Every weight of a stage's checkpoint as a sum that differs in any bit."""
    modules = torch.load(path, weights_only=True)["modules"]
    weights = ((f"{part}.{name}", tensor) for part, state in modules.items() for name, tensor in state.items())
    return {name: hash(tensor.numpy().tobytes()) for name, tensor in weights}


@pytest.fixture(scope="module")
def latents():
    return rand(PICTURES, 4, 16, 16).half()


@pytest.fixture(scope="module")
def xl_work(tmp_path_factory, latents):
    """A folder with the stages of `mini-xl` after three steps each, and another one that was stopped after one."""
    unet, text, tokenizer, _ = mini.load_modules()
    folders = []
    for stops in ((3,), (1, 3)):
        folder = tmp_path_factory.mktemp("xl")
        for stop in stops:
            xl.pretrain_text(folder, tokenizer, PICTURES, steps=stop, batch=CAPTIONS)
        for stop in stops:
            xl.train(folder, tokenizer, latents, unet.state_dict(), steps=stop, batch=BATCH)
        for stop in stops:
            xl.distil(folder, tokenizer, latents, (unet, text), steps=stop, batch=BATCH)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def flow_work(tmp_path_factory, latents):
    """The same of `mini-flow`."""
    unet, text, clip, _ = mini.load_modules()
    folders = []
    for stops in ((3,), (1, 3)):
        folder = tmp_path_factory.mktemp("flow")
        flow.build_tokenizer(folder / "flow-tokenizer", pictures=200)
        tokens = flow.load_tokenizer(folder / "flow-tokenizer")
        stages = [
            partial(flow.pretrain_text, folder, clip, tokens, PICTURES, batch=CAPTIONS),
            partial(flow.train_teacher, folder, clip, tokens, latents, batch=BATCH),
            *(
                partial(flow.distil, folder, stage, clip, tokens, latents, (unet, text), batch=BATCH)
                for stage in flow.DISTIL_STAGES
            ),
        ]
        for stage in stages:
            for stop in stops:
                stage(steps=stop)
        model = mini.load()
        for stop in stops:
            reflow.draw_pairs(folder, model, PICTURES, count=BATCH + stop, steps=2)
        for stop in stops:
            reflow.train(folder, model, clip, tokens, PICTURES, steps=stop, batch=BATCH)
        folders.append(folder)
    return folders


def test_a_stage_of_mini_xl_that_was_stopped_goes_on_to_the_same_weights(xl_work):
    whole, stopped = xl_work
    for stage in ("xl-text.pt", "xl-unet.pt", "xl-distil.pt"):
        assert hashes(whole / stage) == hashes(stopped / stage)


def test_it_starts_from_what_it_shares_with_mini():
    torch.manual_seed(0)
    unet, source = config_xl.new_unet(), mini.load_modules()[0].state_dict()
    copied = xl.start_from_mini(unet, source)
    state = unet.state_dict()
    assert copied > len(state) / 2
    assert torch.equal(state["conv_in.weight"], source["conv_in.weight"])
    # what reads two text encoders side by side is its own
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert state[name].shape != source[name].shape


def test_the_second_tokenizer_pads_with_another_token():
    tokenizer = mini.load_modules()[2]
    ids = torch.tensor(tokenizer(["a star", ""], padding="max_length", max_length=77).input_ids)
    end = tokenizer.eos_token_id
    found = xl.second_ids(ids, end)
    assert [(row == end).sum().item() for row in found] == [1, 1] and (found == config_xl.PAD_2).sum() > 100
    from transformers import CLIPTokenizer

    second = CLIPTokenizer.from_pretrained(mini.weights_folder() / "tokenizer", pad_token="!")
    own = torch.tensor(second(["a star", ""], padding="max_length", max_length=77).input_ids)
    assert torch.equal(found, own)


def test_mini_xl_is_sdxls_shape_and_is_drawn_with_as_its_pipeline_does(xl_work, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    size = xl.pack(xl_work[0], tmp_path / "packed", mini.load_modules()[2])
    assert size < 12e6
    model = mini.load(folder=tmp_path / "packed", name="mini-xl")
    assert {entry.stream: entry.width for entry in model.survey.entries} == {TOKENS: 256, POOLED: 160}
    unet, first, second, tokenizer, tokenizer_2, vae = mini.load_xl_modules(folder=tmp_path / "packed")
    scheduler = DDIMScheduler(**SCHEDULE)
    pipe = StableDiffusionXLPipeline(vae, first, second, tokenizer, tokenizer_2, unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = model.initial_noise([5])
    wanted = pipe(
        "a red star", height=128, width=128, num_inference_steps=4, guidance_scale=model.guidance, negative_prompt="",
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    found = model.sample(["a red star"], [5], steps=4, guidance=model.guidance)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_its_checkpoint_has_sdxls_layout(xl_work, tmp_path):
    """diffusers' own converters of SDXL's single files read every weight back."""
    import yaml
    from diffusers.loaders import single_file_utils as single

    xl.pack(xl_work[0], tmp_path / "packed", mini.load_modules()[2])
    unet, first, second, _, _, _vae = mini.load_xl_modules(folder=tmp_path / "packed")
    text = tmp_path / "text"
    text.mkdir()
    ldm_xl.save_checkpoint(tmp_path / "packed", mini.weights_folder(), tmp_path / "xl.safetensors", text)
    state, _ = read_safetensors(tmp_path / "xl.safetensors")
    kinds = {name.split(".")[0] for name in state}
    assert kinds == {"model", "first_stage_model", "conditioner"}

    def own(module: nn.Module) -> dict[str, torch.Tensor]:
        named = module.state_dict().items()
        return {name.removeprefix("text_model."): tensor for name, tensor in named if "position_ids" not in name}

    read = {
        "unet": (unet, single.convert_ldm_unet_checkpoint(dict(state), dict(unet.config))),
        "first": (
            first,
            single.convert_ldm_clip_checkpoint(state, remove_prefix="conditioner.embedders.0.transformer."),
        ),
        "second": (second, single.convert_open_clip_checkpoint(second, state, prefix="conditioner.embedders.1.model.")),
    }
    for part, (module, found) in read.items():
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        wanted = own(module)
        assert set(wanted) <= set(found), part
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0, atol=0, msg=f"{part} {name}")
    tree = yaml.safe_load((tmp_path / "xl.yaml").read_text(encoding="utf-8"))["model"]["params"]
    network = tree["network_config"]["params"]
    assert (network["adm_in_channels"], network["context_dim"]) == (160 + 6 * 256, 256)
    shape = json.loads((text / "forget-concept-mini-xl.json").read_text(encoding="utf-8"))
    assert shape["text_cfg"]["width"] == 160 and shape["embed_dim"] == 160


class Says:
    """A text encoder whose pooled vector says whether a prompt names a star."""

    max_length = 77

    def token_ids(self, prompt: str) -> list[int]:
        return [0] * self.max_length

    phrase_ids = token_ids

    def encode(self, prompts) -> TextStates:
        named = torch.tensor([[1.0 if "star" in prompt else -1.0] for prompt in prompts])
        return TextStates(torch.tensor([float(len(p)) for p in prompts])[:, None, None].expand(-1, 2, 32), named)


class Bright:
    """An autoencoder and a probe in one: a bright picture is a star."""

    def decode(self, latents):
        return latents.mean((1, 2, 3)).sign()[:, None, None, None].expand(-1, 3, 8, 8)

    def classify(self, images):
        return [Labels(object="star") if image.mean() > 0 else Labels() for image in images]


def test_how_far_a_model_follows_its_pooled_vector_is_measured():
    """One that follows it alone shows a star under every prompt whose pooled vector is a star's, and none elsewhere."""

    def follows_pooled(x, times, states):
        assert not states.hidden.requires_grad
        return (x + states.pooled[:, 0, None, None, None] * -50).to(x)

    def follows_tokens(x, times, states):
        return x + 50

    sampling = SamplingSettings(steps=1, guidance=1.0, precision="float32", threads=1, batch=4)
    for eps, own in ((follows_pooled, 1.0), (follows_tokens, 0.0)):
        model = tiny_xl_model()
        model = LatentDiffusion(
            model.unet, Says(), sd_alphas_cumprod(), vae=Bright(), latent_shape=(4, 8, 8), eps_model=eps
        )
        found = pooled_use(model, Bright(), count=6, sampling=sampling)
        assert (found.own.value, found.own.n, found.other.value) == (own, 6, 0.0)
    with pytest.raises(ModelError, match="reads no pooled vector"):
        pooled_use(tiny_model(), Bright())


@needs_muon
def test_a_stage_of_mini_flow_that_was_stopped_goes_on_to_the_same_weights(flow_work):
    whole, stopped = flow_work
    for stage in ("flow-t5", "flow-clip", "flow-teacher", *flow.DISTIL_STAGES, reflow.LAST):
        assert hashes(whole / f"{stage}.pt") == hashes(stopped / f"{stage}.pt")


@needs_muon
def test_mini_flow_is_fluxs_shape_and_is_drawn_with_as_its_pipeline_does(flow_work, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    size = flow.pack(flow_work[0], tmp_path / "packed", mini.load_modules()[2], reflow.LAST)
    assert size < 12e6
    model = mini.load(folder=tmp_path / "packed", name="mini-flow")
    assert {entry.stream: entry.width for entry in model.survey.entries} == {TOKENS: 128, POOLED: 96}
    transformer, clip, t5, tokenizer, tokenizer_2, vae = mini.load_flow_modules(folder=tmp_path / "packed")
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=1.0), vae, clip, tokenizer, t5, tokenizer_2, transformer)
    pipe.set_progress_bar_config(disable=True)
    noise = model.initial_noise([5])
    wanted = pipe(
        "a red star", height=128, width=128, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
        sigmas=[1, 0.75, 0.5, 0.25], max_sequence_length=config_flow.TOKENS,
        latents=pipe._pack_latents(noise, 1, 4, 16, 16),
    ).images  # fmt: skip
    found = model.sample(["a red star"], [5], steps=4, guidance=1.0)
    torch.testing.assert_close(pipe._pack_latents(found, 1, 4, 16, 16), wanted, rtol=1e-3, atol=1e-3)


def test_a_tokenizer_of_t5s_kind_spells_names_and_unknown_words(tmp_path):
    flow.build_tokenizer(tmp_path, pictures=400)
    tokens = flow.load_tokenizer(tmp_path)
    assert tokens.tokenize("a red star") == ["▁a", "▁red", "▁star"]
    assert len(tokens.tokenize("Lena Frost")) == 4
    assert "<unk>" not in tokens.tokenize("a zebra's tail")
    assert tokens("").input_ids == [tokens.eos_token_id]


def test_every_weight_of_the_transformer_has_an_original_name() -> None:
    """Joined where diffusers has several layers for one, and nothing lost; hosts compare the outputs."""
    from forget_concept.core.mini.config_flow import TRANSFORMER, new_transformer
    from forget_concept.core.mini.flux_names import transformer_to_original

    model = new_transformer()
    state = model.state_dict()
    found = transformer_to_original(state, TRANSFORMER)
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in state.values())
    width = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    assert found["double_blocks.1.img_attn.qkv.weight"].shape == (3 * width, width)
    assert found["single_blocks.2.linear1.weight"].shape == (7 * width, width)
    # the halves of the last modulation stand in the other order
    shift, scale = found["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), state["norm_out.linear.weight"])


def test_an_embedded_model_is_known_by_its_weights_alone() -> None:
    from forget_concept.core.mini.recognition import embedded_name

    model = mini.load()
    assert embedded_name(model.survey, model.model_hash) == "mini"
    assert embedded_name(model.survey, "0" * 64) is None
    small = next(one for one in SMALL if one.family == "flux")
    assert embedded_name(survey(small.make()), model.model_hash) is None


def test_the_velocity_by_mini_is_that_of_a_perfect_prediction():
    """Of a UNet that knows the picture: its noise, whatever the share of it, leads to the velocity ``ε - x_0``."""
    table = sd_alphas_cumprod()
    clean, noise = rand(5, 4, 16, 16, seed=1), rand(5, 4, 16, 16, seed=2)
    sigma = torch.tensor([0.15, 0.3, 0.5, 0.8, 0.92])

    class Perfect:
        def __call__(self, x, times, hidden):
            signal = table[times][:, None, None, None]
            known = torch.cat([clean, clean])
            told = hidden[:, 0, 0][:, None, None, None]  # 1 for a caption, 0 for the empty prompt
            guess = (x - signal.sqrt() * known) / (1 - signal).sqrt()
            return SimpleNamespace(sample=guess + (1 - told) * 0.5)

    def reader(ids):
        return SimpleNamespace(last_hidden_state=ids[:, None, None].float())

    x = (1 - sigma[:, None, None, None]) * clean + sigma[:, None, None, None] * noise
    ids, empty = torch.ones(5), torch.zeros(1)
    found = flow._guided_by_mini((Perfect(), reader), x, sigma, ids, empty)
    # guidance goes as far beyond the caption's prediction as the empty prompt's is behind it
    beyond = 0.5 * (flow.GUIDANCE - 1) / (1 - sigma)[:, None, None, None]
    torch.testing.assert_close(found + beyond, noise - clean, rtol=0.05, atol=0.05)
