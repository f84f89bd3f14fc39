"""The tab *Forget Concept*: its three parts, and the heartbeat that updates them while a job runs.

It uses only what gradio 3.41 and 4.40 share. While a job runs, the page's script (``javascript/forget_concept.js``)
clicks a hidden button, so that updates use gradio's own connection, with its login and behind any proxy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import gradio as gr

from ..core.errors import ForgetConceptError
from ..core.service import html
from ..core.service.host_interface import Host
from ..core.service.jobs import Job
from ..core.service.patch_store import PatchStore, patch_store_of
from .guard import foreign_origin
from .tab_evaluate import EvaluatePart
from .tab_forget import ForgetPart
from .tab_patches import PatchesPart

__all__ = ["build"]

_QUICK = {"queue": False, "show_progress": "hidden"}
_KINDS = ("forget", "evaluate")


def build(host: Host, origins: Collection[str] = ()) -> gr.Blocks:
    """Build the tab's blocks.

    Args:
        host: The webui.
        origins: Origins of other sites whose pages may press its buttons.
    """
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
        glance = gr.Button("Look at the model", elem_id="forget_concept_glance", elem_classes=["fc-hidden"])
        opened = gr.Button("Page opened", elem_id="forget_concept_opened", elem_classes=["fc-hidden"])
        shown = gr.Textbox("", visible=False)  # the jobs and states that this page shows
        heartbeat = _JobHeartbeat(store, forget, patches, evaluate, shown)
        heartbeat.outputs = [
            shown,
            *heartbeat.live,
            *evaluate.results[1:],
            *patches.live,
            evaluate.chosen,
        ]
        poll.click(heartbeat.look, [shown, patches.chosen, evaluate.chosen], heartbeat.outputs, **_QUICK)
        glance.click(patches.looked, [], patches.in_model, **_QUICK)
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
    # a list in gradio 3, a mapping in gradio 4
    for event in blocks.fns.values() if isinstance(blocks.fns, Mapping) else blocks.fns:
        if event.fn is not None:
            event.fn = _for_own_pages(event.fn, lambda: {*origins, *store.settings.hosts})
    return blocks


def _for_own_pages(handle: Callable[..., Any], known: Callable[[], Collection[str]]) -> Callable[..., Any]:
    """The handler of an event, closed to pages of other sites: gradio itself takes their requests."""

    # gradio puts the request in the place of a parameter of this type
    def guarded(request: gr.Request, *values: Any) -> Any:
        headers = dict(request.headers.items()) if request is not None and request.headers is not None else {}
        refused = foreign_origin({str(name).casefold(): str(value) for name, value in headers.items()}, known())
        if refused is not None:
            raise gr.Error(refused)
        return handle(*values)

    return guarded


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
        return [*self.forget.status, self.forget.result, *self.evaluate.status, self.evaluate.words]

    def _status(self, changed: Collection[str], problems: Mapping[str, str] | None = None) -> list[Any]:
        """Values for :attr:`live`.

        Args:
            changed: The kinds of jobs whose state and result are sent again.
            problems: Why no job was started, by kind: shown alone, because the last job's state and result would read
                as those of what is in the form now.
        """
        number = next(self._heartbeats)
        busy = any(not job.over for job in self.store.jobs.all())
        found: list[Any] = []
        for kind in _KINDS:
            job = self.store.jobs.latest(kind)
            running = job is not None and not job.over
            words = (problems or {}).get(kind, "")
            state: Any = gr.update()
            result: Any = gr.update()
            if words and not running:
                state, result = html.state(None, number) + html.problem(words), ""
            elif kind in changed:
                state, result = html.state(job, number) + (html.problem(words) if words else ""), html.outcome(job)
            found += [state, gr.update(interactive=not busy), gr.update(interactive=running), result]
        return found

    def started(self, kind: str, begin: Any) -> list[Any]:
        """Start a job; an error is shown beside the button, in place of the last job's result."""
        problems = {}
        try:
            begin()
        except ForgetConceptError as error:
            problems[kind] = str(error)
        return self._status([kind], problems)

    def stopped(self) -> list[Any]:
        """Interrupt the running job."""
        job = self.store.jobs.latest()
        if job is None:
            return self._status([])
        self.store.jobs.cancel(job.id)
        return self._status([job.kind])

    def look(self, shown: str, chosen: str | None, evaluated: str | None) -> list[Any]:
        """Everything that may have changed since this page last polled; ``shown`` is empty for a page just opened."""
        jobs = self.store.jobs.all()
        latest = {kind: self.store.jobs.latest(kind) for kind in _KINDS}
        known = shown.split(",")
        changed = [kind for kind, job in latest.items() if _sign(job) not in known or (job and not job.over)]
        status = self._status(changed)
        now = ",".join([_sign(None), *map(_sign, jobs)])
        if now == shown:
            rest: list[Any] = [gr.update()] * (len(self.outputs) - 1 - len(status))
            return [shown, *status, *rest]
        forget, evaluate = latest["forget"], latest["evaluate"]
        made = forget is not None and forget.outcome is not None and jobs and jobs[-1].id == forget.id
        name = forget.outcome.data["name"] if made and forget and forget.outcome else None
        return [
            now,
            *status,
            *self.evaluate.outcome(evaluate)[1:],
            *self.patches.refreshed(name or chosen),
            self.evaluate.listed(name or evaluated),
        ]


def _sign(job: Job | None) -> str:
    """What a page remembers of a job that it shows; of none, that it was opened."""
    return "opened" if job is None else f"{job.id}:{job.state}"
