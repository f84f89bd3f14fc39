"""The node that shows where a word looks."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError
from ..core.formats.lora_state import patch_of
from ..core.request.request import MAX_SEED
from ..core.service.summaries import concept_names
from . import host
from .common import LORA, schema

__all__ = ["ConceptAttentionMap"]


class ConceptAttentionMap(io.ComfyNode):
    """A picture being drawn, and how much of its attention each place of it pays to a phrase; twice with a patch.

    Drawn by the core's own sampler on the host's loaded model, which stays bit-identical.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptAttentionMap",
            display_name="Concept Attention Map",
            description="Draws a picture and shows which places of it look at a phrase of the prompt: without a patch, "
            "and with it on the same scale.",
            inputs=[
                io.Model.Input("model", tooltip="The model as it was, without the patch."),
                io.Clip.Input("clip", tooltip="Its text encoder, after any CLIP Set Last Layer."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    placeholder="a photo of a red star",
                    dynamic_prompts=False,
                    tooltip="What is drawn; the phrase must stand in it.",
                ),
                io.String.Input(
                    "phrase",
                    default="",
                    placeholder="star",
                    dynamic_prompts=False,
                    tooltip="The words whose attention is shown. Empty: what the patch forgets.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Of the picture's noise.",
                ),
                io.Int.Input("steps", default=16, min=1, max=1000, tooltip="Sampling steps."),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the prompt is followed; 0: as is usual for the model (7.5; the embedded one "
                    "2.5).",
                ),
                LORA.Input("lora", optional=True, tooltip="A patch: the map with it on is the second picture."),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strong the patch is put on.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The map over the picture; with a patch a second one."),
                io.String.Output("REPORT", tooltip="How much of the attention the phrase gets, in words."),
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
        from ..core.service import evaluation_text as measuring

        if vae is None:
            raise RequestError("There is no VAE to see the picture with: connect the checkpoint's VAE.")
        survey = host.surveyed(model)
        patch = None if lora is None else patch_of(lora, survey)
        if patch is not None:
            patch.check_fits(survey)
        said = phrase.strip() or next(iter(concept_names({} if patch is None else patch.metadata)), "")
        if not said:
            raise RequestError("The phrase is empty, and there is no patch to name one: write words of the prompt.")
        pictures = [Picture(prompt, seed)]
        with host.latent_diffusion(model, clip, vae) as diffusion:
            sampling = SamplingSettings(steps, guidance or diffusion.guidance, 1, "float32")
            progress = host.progress(cls.hidden.unique_id)
            if patch is None:
                (found,) = attention_maps(diffusion, pictures, [said], (), sampling, progress)
                picture, words = measuring.attention_sheet(found), measuring.attention_summary(found, said)
            else:
                (pair,) = attention_pairs(diffusion, pictures, [said], [(patch, strength)], sampling, progress)
                picture, words = measuring.attention_sheet(pair), measuring.attention_summary(pair, said)
        host.show_text(cls.hidden.unique_id, words)
        return io.NodeOutput(picture, words)
