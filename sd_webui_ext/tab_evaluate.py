"""The tab's part *Evaluate*: measures what a patch forgot and what it retained."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..core.errors import ForgetConceptError, RequestError
from ..core.files.reading import read_text
from ..core.request.parsing import split_list
from ..core.service import html
from ..core.service.evaluate_job import ATTACKS, BENCHMARKS, FEWEST, EvaluateJob
from ..core.service.forget_job import MOST_STRENGTH
from ..core.service.jobs import Job
from ..core.service.patch_store import PatchStore
from .hints import strength_hint

__all__ = ["EvaluatePart"]

_QUICK = {"queue": False, "show_progress": "hidden"}
_ID = "forget_concept_"


class EvaluatePart:
    """Creates its components in the enclosing gradio blocks; :meth:`wire` then connects their events."""

    def __init__(self, store: PatchStore) -> None:
        self.store = store
        # gradio only serves files from the system's temporary folder
        self._copies = tempfile.TemporaryDirectory(prefix="forget-concept-")
        gr.HTML(
            '<p class="fc-lead">Generates pictures with and without a patch from the same seeds and judges them: is '
            "the concept gone, is the rest intact, can the concept be recovered? Other patches are taken out of the "
            "loaded checkpoint for the measurement.</p>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360):
                self._inputs()
            with gr.Column(scale=6, min_width=360):
                with gr.Row():
                    self.start = gr.Button("Evaluate", variant="primary", elem_id=f"{_ID}evaluate_start", scale=3)
                    self.stop = gr.Button(
                        "Interrupt", variant="stop", interactive=False, elem_id=f"{_ID}evaluate_stop", scale=1
                    )
                self.state = gr.HTML(html.state(None, 0), elem_id=f"{_ID}evaluate_state")
                self.words = gr.HTML("", elem_id=f"{_ID}evaluate_words")
                self.report = gr.Dropdown([], value=None, label="Report", elem_id=f"{_ID}report")
        self.frame = gr.HTML("", elem_id=f"{_ID}report_frame")
        self.files = gr.File(
            label="The report's files",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id=f"{_ID}report_files",
        )
        self.status = [self.state, self.start, self.stop]
        self.results = [self.words, self.report, self.frame, self.files]

    def _inputs(self) -> None:
        self.chosen = gr.Dropdown([], value=None, label="Patch", elem_id=f"{_ID}evaluated")
        self.strength = gr.Slider(
            -MOST_STRENGTH, MOST_STRENGTH, value=1.0, step=0.05, label="Strength", elem_id=f"{_ID}evaluate_strength"
        )
        strength_hint(self.strength)
        self.concepts = gr.Textbox(
            label="Concepts",
            info="Concepts to measure, separated by commas; empty: those that the patch names",
            elem_id=f"{_ID}evaluate_concepts",
            max_lines=2,
        )
        with gr.Row():
            self.count = gr.Slider(
                FEWEST,
                200,
                value=16,
                step=1,
                label="Pictures of each kind",
                info="Prompts for the concept, for others of its kind, and all others. 16 show a trend, 100 a result",
                elem_id=f"{_ID}evaluate_count",
            )
            self.steps = gr.Slider(1, 50, value=16, step=1, label="Sampling steps", elem_id=f"{_ID}evaluate_steps")
        with gr.Row():
            self.attacks = gr.Dropdown(
                list(ATTACKS),
                value=ATTACKS[0],
                label="Attacks",
                info="Try to recover the concept; slow",
                elem_id=f"{_ID}evaluate_attacks",
                min_width=140,
            )
            self.seed = gr.Number(0, precision=0, label="Seed", elem_id=f"{_ID}evaluate_seed", min_width=90)
        with gr.Row():
            self.baselines = gr.Checkbox(
                False,
                label="Compare with a negative prompt and safe guidance (takes about twice as long)",
                elem_id=f"{_ID}evaluate_baselines",
            )
            self.m_score = gr.Checkbox(
                False, label="M-Score, by textual inversion (slow)", elem_id=f"{_ID}evaluate_m_score"
            )
            self.full = gr.Checkbox(
                False,
                label="In full: unseen wordings, every kept concept, lower strengths (slow)",
                elem_id=f"{_ID}evaluate_full",
            )
        with gr.Accordion("Judge and prompts", open=False, elem_id=f"{_ID}evaluate_judge"):
            self.benchmark = gr.Dropdown(
                list(BENCHMARKS),
                value=BENCHMARKS[0],
                label="Benchmark",
                info="automatic: the embedded model's own vocabulary, checkpoints for any other model",
                elem_id=f"{_ID}evaluate_benchmark",
            )
            self.clip = gr.Textbox(
                label="CLIP judge",
                info="For checkpoints: a folder with a CLIP, or the hub name of a downloaded one; nothing is "
                "downloaded here. The embedded model has its own judge.",
                placeholder="openai/clip-vit-base-patch32",
                max_lines=1,
                elem_id=f"{_ID}evaluate_clip",
            )

    # -- events --------------------------------------------------------------------------------------------------

    def wire(self, started: Callable[..., list[Any]], stopped: Callable[[], list[Any]], live: Sequence[Any]) -> None:
        """Connect events; ``started`` and ``stopped`` start and cancel a job and return values for ``live``."""
        inputs = [
            self.chosen,
            self.strength,
            self.concepts,
            self.count,
            self.seed,
            self.steps,
            self.baselines,
            self.attacks,
            self.m_score,
            self.full,
            self.benchmark,
            self.clip,
        ]
        self.start.click(
            lambda *values: started("evaluate", lambda: self._begin(*values)), inputs, list(live), **_QUICK
        )
        self.stop.click(lambda: stopped(), [], list(live), **_QUICK)
        self.report.input(self._shown, [self.report], [self.frame, self.files], **_QUICK)

    def listed(self, chosen: str | None) -> Any:
        """An update of :attr:`chosen` with all patches, and this one selected if it exists."""
        try:
            names = self.store.library.names()
        except ForgetConceptError:  # the part Patches shows the reason
            names = []
        return gr.update(choices=names, value=chosen if chosen in names else names[0] if names else None)

    def outcome(self, job: Job | None) -> list[Any]:
        """Values for :attr:`results`: of the last evaluation, or else of the newest report."""
        try:
            names = self.store.reports.names()
        except ForgetConceptError as error:
            return [html.problem(str(error)), gr.update(), "", gr.update(visible=False)]
        name = names[0] if names else None
        if job is not None and job.outcome is not None:
            name = job.outcome.data["report"]
        return [html.outcome(job), gr.update(choices=names, value=name), *self._shown(name)]

    def _shown(self, name: str | None) -> list[Any]:
        if not name:
            return ["", gr.update(value=None, visible=False)]
        try:
            files = [self.store.reports.find(name, end) for end in (".html", ".json")]
            text = read_text(files[0], "The report")
            copies = [shutil.copy(file, self._copies.name) for file in files]
        except (ForgetConceptError, OSError) as error:
            return [html.problem(str(error)), gr.update(value=None, visible=False)]
        return [
            html.report_frame(text, f"Report {name}"),
            gr.update(value=copies, visible=True),
        ]

    def _begin(self, patch: str | None, strength: float, concepts: str, count: float, seed: Any, *rest: Any) -> None:
        if not patch:
            raise RequestError("No patch is selected: select one, or make one under Forget first.")
        if not isinstance(seed, (int, float)):
            raise RequestError("The seed is empty: enter a whole number.")
        steps, baselines, attacks, m_score, full, benchmark, clip = rest
        self.store.evaluate(
            EvaluateJob(
                patch,
                float(strength),
                tuple(split_list(concepts or "")),
                int(count),
                int(seed),
                int(steps),
                bool(baselines),
                attacks,
                bool(m_score),
                bool(full),
                benchmark,
                clip or "",
            )
        )
