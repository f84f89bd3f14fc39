"""Node *Evaluate Forgetting*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..core.errors import RequestError
from ..core.files.names import fresh_file, patch_name
from ..core.files.writing import check_folder, check_writable, make_folder
from ..core.formats.lora_state import patch_of
from ..core.request.parsing import split_list
from ..core.request.request import MAX_SEED
from ..core.service.summaries import concept_names
from . import host
from .common import LORA, Node, reported, schema

__all__ = ["EvaluateForgetting"]

# batch sizes: side of a latent that counts as small, batch for small latents, batch for all others
_SMALL, _AT_ONCE, _FEW = 32, 16, 4


class EvaluateForgetting(Node):
    """Measures what a patch forgets and retains, from judged pictures with and without it, and writes a report.

    The MODEL is measured as it comes in, and with the patch applied; it stays bit-identical. The report never
    overwrites a file.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptEvaluate",
            display_name="Evaluate Forgetting",
            description="Generates pictures with and without a patch and judges them: is the concept gone, is the rest "
            "intact, can the concept be recovered? Writes a report to the output folder. Slow on a checkpoint.",
            inputs=[
                io.Model.Input("model", tooltip="The model without the patch."),
                io.Clip.Input("clip", tooltip="The model's text encoder, after any CLIP Set Last Layer."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE, which decodes the pictures to judge."),
                LORA.Input("lora", tooltip="The patch to measure, from Load Forget Patch or Forget Concept."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplier of the patch. 1: as it was made.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    dynamic_prompts=False,
                    tooltip="The concepts to measure, one per line or separated by commas. Empty: all of the patch.",
                ),
                io.Int.Input(
                    "count",
                    default=16,
                    min=4,
                    max=1000,
                    tooltip="Pictures in each of the three cells: prompts that name the concept, prompts for others of "
                    "its kind, and all other prompts. More narrow the intervals: 16 show a trend, 100 a result.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Seed of the prompts and pictures.",
                ),
                io.Int.Input("steps", default=16, min=1, max=1000, tooltip="Sampling steps per picture."),
                io.Boolean.Input(
                    "baselines",
                    default=False,
                    tooltip="Also measure a negative prompt and safe guidance, without the patch. Takes about twice as "
                    "long.",
                ),
                io.Combo.Input(
                    "attacks",
                    options=["none", "quick", "standard"],
                    default="none",
                    tooltip="Also try to recover the concept: paraphrases, other spellings, searched tokens, learned "
                    "embeddings. Slow; results are cached in the user folder.",
                ),
                io.Boolean.Input(
                    "m_score",
                    default=False,
                    tooltip="Also compute Forget-Me-Not's M-Score, by textual inversion before and after. Slow.",
                ),
                io.Combo.Input(
                    "benchmark",
                    options=["automatic", "world", "embedded", "checkpoints"],
                    default="automatic",
                    tooltip="The prompts to measure with. world: the embedded model's own vocabulary. embedded, "
                    "checkpoints: ConceptBench. automatic: world for the embedded model, checkpoints for others.",
                ),
                io.String.Input(
                    "clip_judge",
                    default="",
                    placeholder="openai/clip-vit-base-patch32",
                    dynamic_prompts=False,
                    tooltip="The CLIP that judges a checkpoint's pictures: a folder, or the hub name of a downloaded "
                    "one; this node downloads nothing. The embedded model has its own judge.",
                ),
                io.String.Input(
                    "filename",
                    default="forget/evaluation-%concept%",
                    dynamic_prompts=False,
                    tooltip="Path of the report in the output folder; %concept% stands for the measured concepts. A "
                    "number is appended, so that no file is overwritten.",
                ),
                io.Boolean.Input(
                    "full",
                    optional=True,  # a graph of version 0.1 does not have it
                    default=False,
                    tooltip="Also measure wordings that no fit uses, every kept concept by itself, lower strengths, "
                    "and pictures that start from the concept. Draws several times as many pictures.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="Pictures before and after, one row per concept."),
                io.String.Output("REPORT", tooltip="The verdict and the scores, as text."),
                io.String.Output(
                    "FILE", tooltip="Path of the report, an .html file with its scores as .json beside it."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["measure unlearning", "benchmark", "unlearning accuracy"],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        lora: Any,
        strength: float,
        concept: str,
        count: int,
        seed: int,
        steps: int,
        baselines: bool,
        attacks: str,
        m_score: bool,
        benchmark: str,
        clip_judge: str,
        filename: str,
        full: bool = False,
    ) -> io.NodeOutput:
        from ..core.evaluation import BASELINES, UNEDITED, SamplingSettings
        from ..core.evaluation.assess import EvaluationSettings, assess
        from ..core.evaluation.report import write_report
        from ..core.evaluation.stress import FULL
        from ..core.files.workspace import Workspace
        from ..core.service import evaluation_text

        if vae is None:
            raise RequestError("The input 'vae' is empty: connect the checkpoint's VAE to decode the pictures.")
        survey = host.surveyed(model, lora)
        patch = patch_of(lora, survey)
        patch.check_fits(survey)
        forgotten = concept_names(patch.metadata)
        names = split_list(concept) or forgotten
        if not names:
            raise RequestError("The patch does not name the concepts it forgets: fill in the input 'concept'.")
        *folders, stem = patch_name(filename, names, "the output folder")
        root = host.output_folder()
        folder = check_folder(root.joinpath(*folders), f"{stem}_00000.html")
        embedded = host.embedded_name(model) is not None
        bench = evaluation_text.chosen_benchmark(benchmark, embedded, names)
        with host.latent_diffusion(model, clip, vae, differentiable_text=m_score or attacks != "none") as diffusion:
            judges = evaluation_text.evaluators(embedded, clip_judge, bench)
            small = max(diffusion.latent_shape[1:]) <= _SMALL
            sampling = SamplingSettings(steps, diffusion.guidance, _AT_ONCE if small else _FEW, "float32")
            settings = EvaluationSettings(
                count,
                seed,
                BASELINES if baselines else (UNEDITED,),
                sampling,
                m_score=m_score,
                attacks=None if attacks == "none" else attacks,
                stress=FULL if full else None,
            )
            report = assess(
                diffusion,
                judges,
                [(patch, strength)],
                names,
                settings,
                bench=bench,
                # other concepts that the same patch forgets are not part of the retain set
                without=evaluation_text.known_only(forgotten, bench),
                progress=host.progress(cls.hidden.unique_id),
                workspace=Workspace(host.work_folder()),
            )
        file = write_report(report, check_writable(fresh_file(make_folder(folder), stem, ".html")))
        words = evaluation_text.evaluation_summary(report, file)
        if patches := host.patched_weights(model):
            words += (
                f"\nnote: the MODEL already carries patches on {patches} weights (LoRAs, a forget patch): "
                "'unedited' includes them"
            )
        picture = evaluation_text.sheet(report)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        # for the page's slider; without it, the sheet shows the same pictures
        captions, pictures = evaluation_text.pairs(report)
        if captions:
            files = ui.PreviewImage(pictures, cls=cls).values
            shown["forget_concept_pairs"] = [
                {**caption, "before": before, "after": after}
                for caption, before, after in zip(captions, files[::2], files[1::2], strict=True)
            ]
        return reported(cls.hidden.unique_id, words, picture, words, str(file), ui=shown)
