"""The tab *Forget Concept*: its three parts, and the heartbeat that updates them while a job runs.

It uses only what gradio 3.41 and 4.40 share. While a job runs, the page's script (``javascript/forget_concept.js``)
clicks a hidden button, so that updates use gradio's own connection, with its login and behind any proxy.
"""

from __future__ import annotations

import itertools
from typing import Any

import gradio as gr

from ..core.errors import ForgetConceptError
from ..core.service import html
from ..core.service.host_interface import Host
from ..core.service.patch_store import PatchStore, patch_store_of
from .tab_evaluate import EvaluatePart
from .tab_forget import ForgetPart
from .tab_patches import PatchesPart

__all__ = ["build"]

_QUICK = {"queue": False, "show_progress": "hidden"}


def build(host: Host) -> gr.Blocks:
    """Build the tab's blocks."""
    store = patch_store_of(host)
    with gr.Blocks(analytics_enabled=False) as blocks:
        with gr.Tabs(elem_id="forget_concept_tabs"):
            with gr.TabItem("Forget", id="forget", elem_id="forget_concept_tab_forget"):
                forget = ForgetPart(store)
            with gr.TabItem("Patches", id="patches", elem_id="forget_concept_tab_patches") as patches_tab:
                patches = PatchesPart(store)
            with gr.TabItem("Evaluate", id="evaluate", elem_id="forget_concept_tab_evaluate") as evaluate_tab:
                evaluate = EvaluatePart(store)
        poll = gr.Button("Look again", elem_id="forget_concept_beat", elem_classes=["fc-hidden"])
        opened = gr.Button("Page opened", elem_id="forget_concept_opened", elem_classes=["fc-hidden"])
        shown = gr.Textbox("", visible=False)  # the jobs and states that this page shows
        heartbeat = _JobHeartbeat(store, forget, patches, evaluate, shown)
        heartbeat.outputs = [
            shown,
            *heartbeat.live,
            forget.result,
            *evaluate.results,
            *patches.live,
            evaluate.chosen,
        ]
        poll.click(heartbeat.look, [shown, patches.chosen, evaluate.chosen], heartbeat.outputs, **_QUICK)
        opened.click(
            lambda a, b: [*heartbeat.look("", a, b), *forget.recalled()],
            [patches.chosen, evaluate.chosen],
            [*heartbeat.outputs, *forget.form],
            **_QUICK,
        )
        forget.wire(heartbeat.started, heartbeat.stopped, heartbeat.live)
        evaluate.wire(heartbeat.started, heartbeat.stopped, heartbeat.live)
        patches.wire()
        patches_tab.select(patches.refreshed, [patches.chosen], patches.live, **_QUICK)
        evaluate_tab.select(evaluate.listed, [evaluate.chosen], [evaluate.chosen], **_QUICK)
    for block in blocks.blocks.values():
        # the webui stores defaults by label, and several methods have equal labels
        block.do_not_save_to_config = True
        # gradio treats fields that events fill in as read-only
        if getattr(block, "interactive", False) is None:
            block.interactive = True
    return blocks


class _JobHeartbeat:
    """The job heartbeat: what a page shows of the jobs, sent again while one is running."""

    outputs: list[Any]

    def __init__(
        self, store: PatchStore, forget: ForgetPart, patches: PatchesPart, evaluate: EvaluatePart, shown: gr.Textbox
    ) -> None:
        self.store, self.forget, self.patches, self.evaluate, self.shown = store, forget, patches, evaluate, shown
        self._heartbeats = itertools.count(1)

    @property
    def live(self) -> list[Any]:
        """The components that :meth:`started` and :meth:`stopped` update."""
        return [*self.forget.status, *self.evaluate.status]

    def _status(self, problems: tuple[str, str] = ("", "")) -> list[Any]:
        number = next(self._heartbeats)
        busy = any(not job.over for job in self.store.jobs.all())
        found: list[Any] = []
        for kind, words in zip(("forget", "evaluate"), problems, strict=True):
            job = self.store.jobs.latest(kind)
            text = html.state(job, number) + (html.problem(words) if words else "")
            running = job is not None and not job.over
            found += [text, gr.update(interactive=not busy), gr.update(interactive=running)]
        return found

    def started(self, kind: str, begin: Any) -> list[Any]:
        """Start a job; an error is shown beside the button."""
        words = ""
        try:
            begin()
        except ForgetConceptError as error:
            words = str(error)
        return self._status((words, "") if kind == "forget" else ("", words))

    def stopped(self) -> list[Any]:
        """Interrupt the running job."""
        job = self.store.jobs.latest()
        if job is not None:
            self.store.jobs.cancel(job.id)
        return self._status()

    def look(self, shown: str, chosen: str | None, evaluated: str | None) -> list[Any]:
        """Everything that may have changed since this page last polled."""
        jobs = self.store.jobs.all()
        now = ",".join(f"{job.id}:{job.state}" for job in jobs)
        status = self._status()
        if now == shown:
            rest: list[Any] = [gr.update()] * (len(self.outputs) - 1 - len(status))
            return [shown, *status, *rest]
        forget, evaluate = self.store.jobs.latest("forget"), self.store.jobs.latest("evaluate")
        made = forget is not None and forget.outcome is not None and jobs and jobs[-1].id == forget.id
        name = forget.outcome.data["name"] if made and forget and forget.outcome else None
        return [
            now,
            *status,
            html.outcome(forget),
            *self.evaluate.outcome(evaluate),
            *self.patches.refreshed(name or chosen),
            self.evaluate.listed(name or evaluated),
        ]
