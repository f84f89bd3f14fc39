"""The node that measures what a patch forgot and what it kept."""

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
from .common import LORA, schema

__all__ = ["EvaluateForgetting"]

# pictures at a time: of small latents, and of any other, for which the host makes room
_SMALL, _AT_ONCE, _FEW = 32, 16, 4


class EvaluateForgetting(io.ComfyNode):
    """Pictures with and without a patch, looked at by a judge: is it gone, is the rest intact, does it come back?

    What is measured is the MODEL as it came in, and that with the patch on; it stays bit-identical. The report is
    written under a name that was never used before.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptEvaluate",
            display_name="Evaluate Forgetting",
            description="Draws pictures with and without a patch and has them judged: is the concept gone, is the rest "
            "intact, does it come back? Writes a report into the output folder. Takes minutes on a checkpoint.",
            inputs=[
                io.Model.Input("model", tooltip="The model as it was, without the patch."),
                io.Clip.Input("clip", tooltip="Its text encoder, after any CLIP Set Last Layer."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE: a judge looks at pictures."),
                LORA.Input("lora", tooltip="The patch to measure: from Load Forget Patch, Forget Concept or Combine."),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="How strong the patch is put on."
                ),
                io.String.Input(
                    "concept",
                    default="",
                    dynamic_prompts=False,
                    tooltip="What is to be gone, one a line or separated by commas. Empty: what the patch names.",
                ),
                io.Int.Input(
                    "count",
                    default=16,
                    min=4,
                    max=1000,
                    tooltip="Pictures in each of the three cells: prompts that name the concept, others of its kind, "
                    "others. More make the intervals narrower: 16 show a trend, 100 a result.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Of the prompts and pictures.",
                ),
                io.Int.Input("steps", default=16, min=1, max=1000, tooltip="Sampling steps of each picture."),
                io.Boolean.Input(
                    "baselines",
                    default=False,
                    tooltip="Also measure what a negative prompt and safe guidance alone would do; about twice the "
                    "time.",
                ),
                io.Combo.Input(
                    "attacks",
                    options=["none", "quick", "standard"],
                    default="none",
                    tooltip="Also try to bring the concept back: paraphrases, other spellings, found words, learned "
                    "vectors. Long; what was found is kept in the user folder.",
                ),
                io.Boolean.Input(
                    "m_score",
                    default=False,
                    tooltip="Also Forget-Me-Not's M-Score: what a textual inversion finds, before and after. Long.",
                ),
                io.Combo.Input(
                    "benchmark",
                    options=["automatic", "world", "embedded", "checkpoints"],
                    default="automatic",
                    tooltip="What is asked. automatic: the embedded model's own world, checkpoints for any other "
                    "model. embedded, checkpoints: ConceptBench's lists.",
                ),
                io.String.Input(
                    "clip_judge",
                    default="",
                    placeholder="openai/clip-vit-base-patch32",
                    dynamic_prompts=False,
                    tooltip="Who judges a checkpoint's pictures: a folder with a CLIP, or the hub name of one that was "
                    "downloaded before; nothing is downloaded here. The embedded model has its own judge.",
                ),
                io.String.Input(
                    "filename",
                    default="forget/evaluation-%concept%",
                    dynamic_prompts=False,
                    tooltip="The report's folders and name in the output folder; %concept% is what was measured. A "
                    "number comes behind it, so that nothing is ever written over.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="Pictures before and after, a row for each concept."),
                io.String.Output("REPORT", tooltip="The verdict and the figures, in words."),
                io.String.Output("FILE", tooltip="Where the report is: an .html file, with its figures as .json."),
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
    ) -> io.NodeOutput:
        from ..core.evaluation import BASELINES, UNEDITED, SamplingSettings
        from ..core.evaluation.assess import Measures, assess
        from ..core.evaluation.report import write_report
        from ..core.files.workspace import Workspace
        from ..core.service import evaluation_text as measuring

        if vae is None:
            raise RequestError("There is no VAE, and a judge looks at pictures: connect the checkpoint's VAE.")
        survey = host.surveyed(model)
        patch = patch_of(lora, survey)
        patch.check_fits(survey)
        forgotten = concept_names(patch.metadata)
        names = split_list(concept) or forgotten
        if not names:
            raise RequestError("The patch does not say what it forgets: write the concept.")
        *folders, stem = patch_name(filename, names, "the output folder")
        root = host.output_folder()
        folder = check_folder(root.joinpath(*folders))
        embedded = host.is_embedded(model)
        bench = measuring.chosen_benchmark(benchmark, embedded, names)
        with host.latent_diffusion(model, clip, vae, differentiable_text=m_score or attacks != "none") as diffusion:
            looking = measuring.evaluators(embedded, clip_judge, bench)
            small = max(diffusion.latent_shape[1:]) <= _SMALL
            sampling = SamplingSettings(steps, diffusion.guidance, _AT_ONCE if small else _FEW, "float32")
            measures = Measures(
                count,
                seed,
                BASELINES if baselines else (UNEDITED,),
                sampling,
                m_score=m_score,
                attacks=None if attacks == "none" else attacks,
            )
            report = assess(
                diffusion,
                looking,
                [(patch, strength)],
                names,
                measures,
                bench=bench,
                # another concept that the same patch forgets is not to be kept either
                without=measuring.known_only(forgotten, bench),
                progress=host.progress(cls.hidden.unique_id),
                workspace=Workspace(host.work_folder()),
            )
        file = write_report(report, check_writable(fresh_file(make_folder(folder), stem, ".html")))
        words = measuring.evaluation_summary(report, file)
        if patches := host.patched_weights(model):
            words += (
                f"\nnote: the MODEL that came in carries patches on {patches} weights (LoRAs, a forget patch): "
                "'unedited' is with them on"
            )
        picture = measuring.sheet(report)
        host.show_text(cls.hidden.unique_id, words)
        seen = ui.PreviewImage(picture, cls=cls).as_dict()
        # the page's own slider; where there is none, the sheet shows the same pictures
        captions, pictures = measuring.pairs(report)
        if captions:
            files = ui.PreviewImage(pictures, cls=cls).values
            seen["forget_concept_pairs"] = [
                {**caption, "before": before, "after": after}
                for caption, before, after in zip(captions, files[::2], files[1::2], strict=True)
            ]
        return io.NodeOutput(picture, words, str(file), ui=seen)
