"""The tab's part *Patches*: the patches on the loaded model, and the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..core.errors import ForgetConceptError, listed
from ..core.service import html
from ..core.service.forget_job import MOST_STRENGTH
from ..core.service.patch_store import PatchStore
from .hints import strength_hint, strength_words

__all__ = ["PatchesPart"]

_QUICK = {"queue": False, "show_progress": "hidden"}
_ID = "forget_concept_"
SLOTS = 4


class PatchesPart:
    """Creates its components in the enclosing gradio blocks; :meth:`wire` then connects their events."""

    def __init__(self, store: PatchStore) -> None:
        self.store = store
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=380):
                self.active = gr.HTML("", elem_id=f"{_ID}active")
                self.dropped = gr.HTML("", elem_id=f"{_ID}dropped")
                # the page's script presses these for the buttons beside the words, here and on the badges
                self.again = gr.Button("Apply again", elem_id=f"{_ID}again", elem_classes=["fc-hidden"])
                self.dismiss = gr.Button("Leave out", elem_id=f"{_ID}dismiss", elem_classes=["fc-hidden"])
                with gr.Row():
                    self.refresh = gr.Button("Look again", size="sm", elem_id=f"{_ID}refresh")
                    self.clear = gr.Button("Take all patches out", size="sm", elem_id=f"{_ID}clear")
                self.cards = gr.HTML("", elem_id=f"{_ID}cards")
                # the page's script selects a card through these two
                self.pressed = gr.Textbox(
                    "", elem_id=f"{_ID}pressed", elem_classes=["fc-hidden"], label="Patch pressed"
                )
                self.press = gr.Button("Choose it", elem_id=f"{_ID}press", elem_classes=["fc-hidden"])
            with gr.Column(scale=5, min_width=340):
                self._chosen()
        self._combining()
        # the pages that generate pictures show it: the page's script copies it there
        self.badge = gr.HTML("", elem_id=f"{_ID}badge", elem_classes=["fc-hidden"])
        self.in_model = [self.badge, self.active, self.dropped]
        self.live = [*self.in_model, self.cards, self.chosen, self.tag, self.details, *self.parts]

    def _chosen(self) -> None:
        self.chosen = gr.Dropdown([], value=None, label="Patch", elem_id=f"{_ID}chosen")
        self.strength = gr.Slider(
            -MOST_STRENGTH, MOST_STRENGTH, value=1.0, step=0.05, label="Strength", elem_id=f"{_ID}patch_strength"
        )
        strength_hint(self.strength)
        with gr.Row():
            self.apply = gr.Button("Put into the model", variant="primary", elem_id=f"{_ID}apply_now")
            self.remove = gr.Button("Take out of the model", elem_id=f"{_ID}remove_now")
        self.message = gr.HTML("", elem_id=f"{_ID}patch_message")
        self.tag = gr.Textbox(
            "",
            label="For a prompt",
            info="Works in programs that load LoRAs, without this extension",
            interactive=False,
            show_copy_button=True,
            elem_id=f"{_ID}tag",
        )
        self.details = gr.HTML("", elem_id=f"{_ID}details")
        with gr.Row():
            self.new_name = gr.Textbox(label="New name", max_lines=1, elem_id=f"{_ID}new_name", scale=3)
            self.rename = gr.Button("Rename", size="sm", elem_id=f"{_ID}rename", scale=1, min_width=90)
        with gr.Row():
            self.folder = gr.Button("Open the folder", size="sm", elem_id=f"{_ID}open_folder")
            self.delete = gr.Button("Delete …", size="sm", elem_id=f"{_ID}delete")
        with gr.Group(visible=False, elem_id=f"{_ID}sure") as self.sure:
            self.question = gr.HTML("")
            with gr.Row():
                self.really = gr.Button("Delete for good", variant="stop", elem_id=f"{_ID}really")
                self.keep = gr.Button("Keep it", elem_id=f"{_ID}keep")
        self.to_delete = gr.Textbox("", visible=False)  # the patch that the question is about

    def _combining(self) -> None:
        self.parts: list[Any] = []
        self.part_strengths: list[Any] = []
        with gr.Accordion("Combine several patches into one", open=False, elem_id=f"{_ID}combine"):
            gr.HTML(
                '<p class="fc-hint">Sums several patches, each at its strength, into one file; exact unless the rank '
                "is bounded. Strength 0 leaves a patch out.</p>"
            )
            for i in range(SLOTS):
                with gr.Row():
                    self.parts.append(gr.Dropdown([], value=None, label=f"Patch {i + 1}", elem_id=f"{_ID}part_{i + 1}"))
                    self.part_strengths.append(
                        gr.Slider(
                            -MOST_STRENGTH,
                            MOST_STRENGTH,
                            value=1.0,
                            step=0.05,
                            label=f"Strength {i + 1}",
                            elem_id=f"{_ID}part_strength_{i + 1}",
                        )
                    )
            with gr.Row():
                self.whole_name = gr.Textbox(
                    label="Name of the combined patch", placeholder="%concept%", max_lines=1, elem_id=f"{_ID}whole_name"
                )
                self.max_rank = gr.Number(
                    0, precision=0, label="Maximum rank", info="0: no bound, the sum is exact", elem_id=f"{_ID}max_rank"
                )
            self.combine = gr.Button("Combine", elem_id=f"{_ID}combine_now")
            self.combined = gr.HTML("", elem_id=f"{_ID}combined")

    # -- events --------------------------------------------------------------------------------------------------

    def wire(self) -> None:
        """Connect events."""
        live = self.live
        self.refresh.click(self.refreshed, [self.chosen], live, **_QUICK)
        self.chosen.input(self.refreshed, [self.chosen], live, **_QUICK)
        self.press.click(self.refreshed, [self.pressed], live, **_QUICK)
        self.apply.click(self._applied, [self.chosen, self.strength], [self.message, *live], **_QUICK)
        self.remove.click(self._removed, [self.chosen], [self.message, *live], **_QUICK)
        self.clear.click(self._cleared, [self.chosen], [self.message, *live], **_QUICK)
        self.again.click(self._applied_again, [self.chosen], [self.message, *live], **_QUICK)
        self.dismiss.click(self._dismissed, [self.chosen], [self.message, *live], **_QUICK)
        self.rename.click(self._renamed, [self.chosen, self.new_name], [self.message, self.new_name, *live], **_QUICK)
        self.folder.click(self._opened, [self.chosen], [self.message], **_QUICK)
        self.delete.click(
            self._confirm_deletion, [self.chosen], [self.sure, self.question, self.to_delete, self.message], **_QUICK
        )
        self.keep.click(lambda: gr.update(visible=False), [], [self.sure], **_QUICK)
        self.really.click(self._deleted, [self.to_delete, self.chosen], [self.message, self.sure, *live], **_QUICK)
        self.combine.click(
            self._combine,
            [self.chosen, self.whole_name, self.max_rank, *self.parts, *self.part_strengths],
            [self.combined, *live],
            **_QUICK,
        )

    def refreshed(self, chosen: str | None) -> list[Any]:
        """Values for :attr:`live`, with ``chosen`` selected if it exists, else the newest patch."""
        active: list[str] = []
        try:
            self.store.host.model()
        except ForgetConceptError as error:
            in_model = ["", html.problem(str(error)), ""]
        else:
            in_model, active = self._now()
        try:
            entries, unreadable = self.store.library.entries(), self.store.library.unreadable()
        except ForgetConceptError as error:
            rest = len(self.live) - len(in_model) - 1
            return [*in_model, html.problem(str(error)), *[gr.update()] * rest]
        names = [entry.name for entry in entries]
        chosen = chosen if chosen in names else names[0] if names else None
        entry = next((entry for entry in entries if entry.name == chosen), None)
        return [
            *in_model,
            html.cards(entries, chosen, active, unreadable),
            gr.update(choices=names, value=chosen),
            entry.tag if entry else "",
            self._details(chosen),
            *[gr.update(choices=names) for _ in self.parts],
        ]

    def looked(self) -> list[Any]:
        """Values for :attr:`in_model`, without loading a checkpoint."""
        try:
            return self._now()[0]
        except ForgetConceptError as error:
            return ["", html.problem(str(error)), ""]

    def _now(self) -> tuple[list[Any], list[str]]:
        """Values for :attr:`in_model`, and the names of the active patches."""
        active, dropped = self.store.active(), self.store.dropped()
        by_itself = self.store.settings.reapply
        found = [
            html.badge(active, dropped, by_itself),
            html.active_table(active, self.store.host.checkpoint() or "the model"),
            html.dropped_patches(dropped, by_itself),
        ]
        return found, [one.name for one in active]

    def _details(self, name: str | None) -> str:
        if name is None:
            return ""
        try:
            return html.details(self.store.library.inspect(name))
        except ForgetConceptError as error:
            return html.problem(str(error))

    def _done(self, chosen: str | None, work: Callable[[], str]) -> list[Any]:
        """Run ``work`` on the selected patch; returns its message, or its error, and values for :attr:`live`."""
        try:
            if not chosen:
                raise ForgetConceptError("No patch is chosen: choose one first.")
            message = html.notice(work())
        except ForgetConceptError as error:
            message = html.problem(str(error))
        return [message, *self.refreshed(chosen)]

    def _applied(self, chosen: str | None, strength: float) -> list[Any]:
        def work() -> str:
            self.store.apply(chosen or "", float(strength))
            return f"'{chosen}' is applied to the loaded model at strength {strength:g}."

        message, *rest = self._done(chosen, work)
        return [message + strength_words(strength), *rest]

    def _removed(self, chosen: str | None) -> list[Any]:
        def work() -> str:
            self.store.remove(chosen or "")
            return f"'{chosen}' is removed from the loaded model; its weights are restored."

        return self._done(chosen, work)

    def _applied_again(self, chosen: str | None) -> list[Any]:
        try:
            names = [f"'{one.name}'" for one in self.store.apply_again()]
            message = html.notice(f"Applied to the loaded model again: {listed(names)}.") if names else ""
        except ForgetConceptError as error:
            message = html.problem(str(error))
        return [message, *self.refreshed(chosen)]

    def _dismissed(self, chosen: str | None) -> list[Any]:
        names = [f"'{one.name}'" for one in self.store.dismiss_dropped()]
        message = html.notice(f"Left out of the loaded model: {listed(names)}.") if names else ""
        return [message, *self.refreshed(chosen)]

    def _cleared(self, chosen: str | None) -> list[Any]:
        try:
            names = [one.name for one in self.store.active()]
            for name in names:
                self.store.remove(name)
            message = html.notice(
                "All patches are removed; the weights are restored."
                if names
                else "No patch is applied to the loaded model."
            )
        except ForgetConceptError as error:
            message = html.problem(str(error))
        return [message, *self.refreshed(chosen)]

    def _renamed(self, chosen: str | None, new: str) -> list[Any]:
        try:
            if not chosen:
                raise ForgetConceptError("No patch is chosen: choose one first.")
            entry = self.store.rename(chosen, new or "")
        except ForgetConceptError as error:
            return [html.problem(str(error)), gr.update(), *self.refreshed(chosen)]
        return [html.notice(f"'{chosen}' is renamed to '{entry.name}'."), "", *self.refreshed(entry.name)]

    def _opened(self, chosen: str | None) -> str:
        try:
            folder = self.store.library.find(chosen).path.parent if chosen else self.store.host.lora_folder()
            self.store.host.open_folder(folder)
        except ForgetConceptError as error:
            return html.problem(str(error))
        return html.notice(f"The folder is opened on the machine that runs the webui: {folder}")

    def _confirm_deletion(self, chosen: str | None) -> list[Any]:
        try:
            if not chosen:
                raise ForgetConceptError("No patch is chosen: choose one first.")
            self.store.check_not_applied(chosen, "delete")
        except ForgetConceptError as error:
            return [gr.update(visible=False), "", "", html.problem(str(error))]
        words = f"Delete '{chosen}', its picture and its card from the disk? This cannot be undone."
        return [gr.update(visible=True), html.question(words), chosen, ""]

    def _deleted(self, to_delete: str, chosen: str | None) -> list[Any]:
        def work() -> str:
            self.store.delete(to_delete)
            return f"'{to_delete}' is deleted."

        message, *_ = self._done(to_delete, work)
        return [message, gr.update(visible=False), *self.refreshed(chosen)]

    def _combine(self, chosen: str | None, name: str, max_rank: float | None, *values: Any) -> list[Any]:
        parts = [
            (part, float(strength))
            for part, strength in zip(values[:SLOTS], values[SLOTS:], strict=True)
            if part is not None and part != ""
        ]
        try:
            entry, words = self.store.combine(parts, name or "", int(max_rank) if max_rank else None)
        except ForgetConceptError as error:
            return [html.problem(str(error)), *self.refreshed(chosen)]
        return [html.notice(f"saved: {entry.place}\n{words}"), *self.refreshed(entry.name)]
