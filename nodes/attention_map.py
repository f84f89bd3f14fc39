"""Node *Concept Attention Map*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError
from ..core.formats.lora_state import patch_of
from ..core.request.request import MAX_SEED
from ..core.service.summaries import concept_names
from . import host
from .common import LORA, Node, reported, schema

__all__ = ["ConceptAttentionMap"]


class ConceptAttentionMap(Node):
    """Shows how much cross-attention each region of a picture pays to a phrase, without and with a patch.

    The core's own sampler generates the picture on the host's loaded model, which stays bit-identical.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptAttentionMap",
            display_name="Concept Attention Map",
            description="Generates a picture and shows which regions attend to a phrase of the prompt; with a patch, "
            "a second map on the same scale.",
            inputs=[
                io.Model.Input("model", tooltip="The model without the patch."),
                io.Clip.Input("clip", tooltip="The model's text encoder, after any CLIP Set Last Layer."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    placeholder="a photo of a red star",
                    dynamic_prompts=False,
                    tooltip="The prompt of the picture; it must contain the phrase.",
                ),
                io.String.Input(
                    "phrase",
                    default="",
                    placeholder="star",
                    dynamic_prompts=False,
                    tooltip="The words whose attention is shown. Empty: the first concept that the patch forgets.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Seed of the picture's initial noise.",
                ),
                io.Int.Input("steps", default=16, min=1, max=1000, tooltip="Sampling steps."),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale. 0: the model's usual value (7.5; 2.5 for the embedded model).",
                ),
                LORA.Input("lora", optional=True, tooltip="A patch; the second picture is the map with it applied."),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplier of the patch. 1: as it was made.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The map over the picture; with a patch, a second one."),
                io.String.Output("REPORT", tooltip="The share of the attention that the phrase receives."),
            ],
            hidden=[io.Hidden.unique_id],
            search_aliases=["daam", "heat map", "cross attention"],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompt: str,
        phrase: str,
        seed: int,
        steps: int,
        guidance: float,
        lora: Any = None,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        from ..core.evaluation import Picture, SamplingSettings
        from ..core.evaluation.attention_pictures import attention_maps, attention_pairs
        from ..core.service import evaluation_text

        if vae is None:
            raise RequestError("The input 'vae' is empty: connect the checkpoint's VAE to decode the picture.")
        survey = host.surveyed(model)
        patch = None if lora is None else patch_of(lora, survey)
        if patch is not None:
            patch.check_fits(survey)
        shown_phrase = phrase.strip() or next(iter(concept_names({} if patch is None else patch.metadata)), "")
        if not shown_phrase:
            raise RequestError("The input 'phrase' is empty, and no patch names a concept: write words of the prompt.")
        pictures = [Picture(prompt, seed)]
        with host.latent_diffusion(model, clip, vae) as diffusion:
            sampling = SamplingSettings(steps, guidance or diffusion.guidance, 1, "float32")
            progress = host.progress(cls.hidden.unique_id)
            if patch is None:
                (found,) = attention_maps(diffusion, pictures, [shown_phrase], (), sampling, progress)
                picture, words = (
                    evaluation_text.attention_sheet(found),
                    evaluation_text.attention_summary(found, shown_phrase),
                )
            else:
                (pair,) = attention_pairs(diffusion, pictures, [shown_phrase], [(patch, strength)], sampling, progress)
                picture, words = (
                    evaluation_text.attention_sheet(pair),
                    evaluation_text.attention_summary(pair, shown_phrase),
                )
        return reported(cls.hidden.unique_id, words, picture, words)
