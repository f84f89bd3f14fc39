"""The tab's part *Forget*: the form of a request, and the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.errors import ForgetConceptError
from ..core.files.reading import read_text
from ..core.methods.base import Method
from ..core.methods.registry import all_methods
from ..core.request.concept import KINDS
from ..core.request.request import MAX_STRENGTH, ForgetRequest
from ..core.request.themes import themes
from ..core.service import html
from ..core.service.forget_job import MOST_PAIRS, MOST_STRENGTH, ForgetJob
from ..core.service.forms import FormField, form_fields, presets
from ..core.service.page_form import ROWS, Form, Line, recall, remember
from ..core.service.patch_store import PatchStore
from .hints import strength_hint

__all__ = ["ForgetPart"]

_QUICK = {"queue": False, "show_progress": "hidden"}
_ID = "forget_concept_"
_NO_THEME = "none"
_LONGEST_FILE = 2**20


class ForgetPart:
    """Creates its components in the enclosing gradio blocks; :meth:`wire` then connects their events."""

    def __init__(self, store: PatchStore) -> None:
        self.store = store
        # gradio only serves files from the system's temporary folder
        self._copies = tempfile.TemporaryDirectory(prefix="forget-concept-")
        self.methods = all_methods()
        # gradio 3 shows the value of a (name, value) choice, not its name
        self.titles = {one.title: name for name, one in self.methods.items()}
        settings = store.settings
        method = settings.method if settings.method in self.methods else "uce"
        preset = settings.preset if settings.preset in self.methods[method].presets else "tuned"
        gr.HTML(
            '<p class="fc-lead">Makes the loaded checkpoint forget an object, a style or a person, and retains the '
            "rest. The checkpoint itself stays unchanged: the result is a small LoRA file, which this webui and "
            "ComfyUI load without this extension.</p>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=420):
                self._concepts(method)
                self._how(method, preset)
                self._files()
            with gr.Column(scale=5, min_width=360):
                self._run()
        self.form = [
            self.count,
            *self.rows,
            *[part for line in self.lines for part in line],
            self.preserve,
            self.theme,
            self.theme_replacement,
            self.method,
            self.preset,
            self.strength,
            self.seed,
            self.about,
            *self.groups.values(),
            *[field for fields in self.fields.values() for field in fields],
            self.name,
            self.apply,
            self.apply_strength,
            self.pairs,
        ]

    # -- components ----------------------------------------------------------------------------------------------

    def _concepts(self, method: str) -> None:
        self.count = gr.State(1)
        self.rows: list[Any] = []
        self.lines: list[tuple[Any, Any, Any, Any]] = []
        self.removers: list[Any] = []
        takes = self.methods[method].takes_images
        for i in range(ROWS):
            with gr.Group(visible=i == 0, elem_id=f"{_ID}line_{i + 1}") as row:
                with gr.Row(elem_id=f"{_ID}line_{i + 1}_row"):
                    name = gr.Textbox(
                        label=f"Concept {i + 1} to forget",
                        placeholder="star",
                        elem_id=f"{_ID}concept_{i + 1}",
                        max_lines=1,
                        scale=4,
                        min_width=140,
                    )
                    replacement = gr.Textbox(
                        label="Show instead",
                        placeholder="nothing in particular",
                        elem_id=f"{_ID}replacement_{i + 1}",
                        max_lines=1,
                        scale=4,
                        min_width=140,
                    )
                    kind = gr.Dropdown(
                        list(KINDS),
                        value=KINDS[0],
                        label="Kind",
                        elem_id=f"{_ID}kind_{i + 1}",
                        scale=2,
                        min_width=110,
                    )
                    remover = gr.Button(
                        f"Remove {i + 1}", elem_id=f"{_ID}remove_{i + 1}", size="sm", scale=0, min_width=90
                    )
                images = gr.File(
                    label=f"Pictures of concept {i + 1}",
                    file_count="multiple",
                    file_types=["image"],
                    visible=takes,
                    height=90,
                    elem_id=f"{_ID}images_{i + 1}",
                )
            self.rows.append(row)
            self.lines.append((name, replacement, kind, images))
            self.removers.append(remover)
        self.adder = gr.Button("Add a concept", elem_id=f"{_ID}add", size="sm")
        self.preserve = gr.Textbox(
            label="Keep",
            info="Concepts that must not change, such as neighbours: one per line, or separated by commas",
            placeholder="moon, heart",
            lines=2,
            elem_id=f"{_ID}preserve",
        )
        with gr.Row():
            self.theme = gr.Dropdown(
                [_NO_THEME, *themes(self.store.theme_folders)],
                value=_NO_THEME,
                label="Theme",
                info="A list of concepts that is forgotten too. Your own lists: text files in the folder "
                f"{self.store.theme_folders[0]}",
                elem_id=f"{_ID}theme",
                scale=4,
                min_width=140,
            )
            self.theme_replacement = gr.Textbox(
                label="Show instead of the theme",
                placeholder="nothing in particular",
                elem_id=f"{_ID}theme_replacement",
                max_lines=1,
                scale=4,
                min_width=140,
            )

    def _how(self, method: str, preset: str) -> None:
        with gr.Row():
            self.method = gr.Dropdown(
                list(self.titles),
                value=self.methods[method].title,
                label="Method",
                elem_id=f"{_ID}method",
                scale=4,
                min_width=180,
            )
            self.preset = gr.Dropdown(
                list(self.methods[method].presets), value=preset, label="Preset", elem_id=f"{_ID}preset", min_width=120
            )
        self.about = gr.HTML(_about(self.methods[method]))
        with gr.Row():
            self.strength = gr.Slider(
                0.05, MAX_STRENGTH, value=1.0, step=0.05, label="Strength of the edit", elem_id=f"{_ID}strength"
            )
            self.seed = gr.Textbox("0", label="Seed", elem_id=f"{_ID}seed", max_lines=1, min_width=120)
        strength_hint(self.strength)
        self.groups: dict[str, Any] = {}
        self.fields: dict[str, list[Any]] = {}
        with gr.Accordion("Settings of the method", open=False, elem_id=f"{_ID}settings"):
            for name, one in self.methods.items():
                with gr.Column(visible=name == method, elem_id=f"{_ID}settings_{name}") as group:
                    self.fields[name] = _fields(one, preset if preset in one.presets else "tuned")
                self.groups[name] = group

    def _files(self) -> None:
        settings = self.store.settings
        with gr.Row():
            self.name = gr.Textbox(
                label="Name of the patch",
                placeholder="%concept%",
                info="%concept%: what it forgets. A number is appended, so that no file is overwritten",
                elem_id=f"{_ID}name",
                max_lines=1,
            )
            self.pairs = gr.Slider(
                0,
                MOST_PAIRS,
                value=settings.pairs,
                step=1,
                label="Pictures before and after",
                elem_id=f"{_ID}pairs",
            )
        with gr.Row():
            self.apply = gr.Checkbox(
                True, label="Apply it to the loaded model when done", elem_id=f"{_ID}apply", min_width=200
            )
            self.apply_strength = gr.Slider(
                -MOST_STRENGTH, MOST_STRENGTH, value=1.0, step=0.05, label="at strength", elem_id=f"{_ID}apply_strength"
            )
        strength_hint(self.apply_strength)
        with gr.Accordion("Request as a file", open=False, elem_id=f"{_ID}request"):
            gr.HTML(
                '<p class="fc-hint">A JSON file with everything above except pictures, in the format that ComfyUI and '
                "the command line use too.</p>"
            )
            with gr.Row():
                with gr.Column(min_width=160):
                    self.exporter = gr.Button("Export", elem_id=f"{_ID}export", size="sm")
                    self.exported = gr.File(label="The request", interactive=False, elem_id=f"{_ID}exported")
                with gr.Column(min_width=160):
                    self.imported = gr.File(
                        label="Fill in the form from a file",
                        file_types=[".json"],
                        height=110,
                        elem_id=f"{_ID}import",
                    )
            self.request_message = gr.HTML("", elem_id=f"{_ID}request_told")

    def _run(self) -> None:
        with gr.Row():
            self.start = gr.Button("Forget", variant="primary", elem_id=f"{_ID}start", scale=3)
            self.stop = gr.Button("Interrupt", variant="stop", interactive=False, elem_id=f"{_ID}stop", scale=1)
        self.state = gr.HTML(html.state(None, 0), elem_id=f"{_ID}state")
        self.result = gr.HTML("", elem_id=f"{_ID}result")
        self.status = [self.state, self.start, self.stop]

    # -- events --------------------------------------------------------------------------------------------------

    def wire(self, started: Callable[..., list[Any]], stopped: Callable[[], list[Any]], live: Sequence[Any]) -> None:
        """Connect events; ``started`` and ``stopped`` start and cancel a job and return values for ``live``."""
        lines = [part for line in self.lines for part in line]
        self.adder.click(self._added, [self.count], [self.count, *self.rows], **_QUICK)
        for i, remover in enumerate(self.removers):
            remover.click(
                lambda count, *values, i=i: self._removed(i, count, values),
                [self.count, *lines],
                [self.count, *self.rows, *lines],
                **_QUICK,
            )
        images = [line[3] for line in self.lines]
        self.method.input(
            self._chose,
            [self.method, self.preset],
            [self.preset, self.about, *self.groups.values(), *images, *self._all_fields()],
            **_QUICK,
        )
        self.preset.input(self._preset, [self.method, self.preset], self._all_fields(), **_QUICK)
        inputs = self._request_inputs()
        extra = [self.name, self.apply, self.apply_strength, self.pairs]
        self.start.click(
            lambda *values: started("forget", lambda: self._begin(values[: len(inputs)], *values[len(inputs) :])),
            [*inputs, *extra],
            list(live),
            **_QUICK,
        )
        self.stop.click(lambda: stopped(), [], list(live), **_QUICK)
        self.exporter.click(self._export, inputs, [self.exported, self.request_message], **_QUICK)
        self.imported.upload(self._import, [self.imported], [self.request_message, *self.form], **_QUICK)

    def _all_fields(self) -> list[Any]:
        return [field for fields in self.fields.values() for field in fields]

    def _request_inputs(self) -> list[Any]:
        lines = [part for line in self.lines for part in line]
        more = [self.preserve, self.theme, self.theme_replacement]
        more += [self.method, self.preset, self.strength, self.seed]
        return [self.count, *lines, *more, *self._all_fields()]

    def _added(self, count: int) -> list[Any]:
        count = min(count + 1, ROWS)
        return [count, *_visible(count)]

    def _removed(self, i: int, count: int, values: Sequence[Any]) -> list[Any]:
        lines = [_line(values, k) for k in range(ROWS)]
        lines = [*lines[:i], *lines[i + 1 :], Line()]
        count = max(count - 1, 1)
        return [count, *_visible(count), *[value for line in lines for value in _shown(line)]]

    def _chose(self, title: str, preset: str) -> list[Any]:
        method = self.titles[title]
        one = self.methods[method]
        preset = preset if preset in one.presets else "tuned"
        return [
            gr.update(choices=list(one.presets), value=preset),
            _about(one),
            *[gr.update(visible=name == method) for name in self.groups],
            *[gr.update(visible=one.takes_images) for _ in range(ROWS)],
            *self._preset(title, preset),
        ]

    def _preset(self, title: str, preset: str) -> list[Any]:
        method = self.titles[title]
        return self._filled(method, presets(self.methods[method])[preset])

    def _filled(self, method: str, values: Any) -> list[Any]:
        """Updates that fill in the fields of one method and leave those of the others."""
        found: list[Any] = []
        for name, one in self.methods.items():
            found += [
                gr.update(value=values[field.name]) if name == method else gr.update() for field in form_fields(one)
            ]
        return found

    def _read(self, values: Sequence[Any]) -> Form:
        """The form from the values of :meth:`_request_inputs`."""
        count, rest = int(values[0]), values[1:]
        lines = [_line(rest, k) for k in range(count)]
        preserve, theme, instead, title, preset, strength, seed, *fields = rest[4 * ROWS :]
        theme = "" if theme == _NO_THEME else theme
        method = self.titles[title]
        own: dict[str, Any] = {}
        for name, one in self.methods.items():
            found = form_fields(one)
            if name == method:
                own = {field.name: value for field, value in zip(found, fields, strict=False)}
            fields = fields[len(found) :]
        return Form(tuple(lines), preserve or "", method, preset, own, strength, seed, theme or "", instead or "")

    def _begin(self, values: Sequence[Any], name: str, apply: bool, strength: float, pairs: float) -> None:
        settings = self.store.settings
        form = self._read(values)
        plan = form.plan(self.store.theme_folders)
        job = ForgetJob(
            plan,
            name or "",
            settings.folder,
            settings.precision,
            float(strength) if apply else None,
            int(pairs),
            settings.steps,
        )
        self.store.forget(job)
        if settings.remember:
            more = {"name": name or "", "apply": bool(apply), "apply_strength": float(strength), "pairs": int(pairs)}
            remember(self.store.host.data_folder(), form.request(), more)

    # -- a request as a file -------------------------------------------------------------------------------------

    def _export(self, *values: Any) -> list[Any]:
        try:
            form = self._read(values)
            form.plan(self.store.theme_folders)
            request = form.request()
        except ForgetConceptError as error:
            return [gr.update(value=None), html.problem(str(error))]
        file = Path(tempfile.mkdtemp(dir=self._copies.name), "forget-request.json")
        file.write_text(request.without_images().to_json(indent=2) + "\n", encoding="utf-8")
        return [str(file), html.notice("The file is ready: click its size to download it.")]

    def _import(self, given: Any) -> list[Any]:
        keep = [gr.update() for _ in self.form]
        try:
            file = Path(getattr(given, "name", given))
            request = ForgetRequest.from_json(read_text(file, "The request file", longest=_LONGEST_FILE))
            form_values = self._form_of(Form.of(request, self.store.theme_folders), {})
        except ForgetConceptError as error:
            return [html.problem(str(error)), *keep]
        words = "The form is filled in."
        if any(concept.images for concept in request.concepts):
            words += " The request names pictures: add them again."
        return [html.notice(words), *form_values]

    def recalled(self) -> list[Any]:
        """Values for :attr:`form` as it was last used; no changes if nothing is stored."""
        folders = self.store.theme_folders
        found = recall(self.store.host.data_folder(), folders) if self.store.settings.remember else None
        if found is None or found[0].method not in self.methods:
            return [gr.update() for _ in self.form]
        return self._form_of(*found)

    def _form_of(self, form: Form, more: dict[str, Any]) -> list[Any]:
        """Values for :attr:`form`."""
        one = self.methods[form.method]
        count = len(form.lines)
        lines = [*form.lines, *[Line()] * (ROWS - count)]
        images = {"visible": one.takes_images}
        shown = [value for line in lines for value in (*_shown(line)[:3], gr.update(value=None, **images))]
        return [
            count,
            *_visible(count),
            *shown,
            form.preserve,
            form.theme or _NO_THEME,
            form.theme_replacement,
            one.title,
            gr.update(choices=list(one.presets), value=form.preset),
            form.strength,
            form.seed,
            _about(one),
            *[gr.update(visible=name == form.method) for name in self.groups],
            *self._filled(form.method, form.fields),
            *[more.get(name, gr.update()) for name in ("name", "apply", "apply_strength", "pairs")],
        ]


def _about(method: type[Method]) -> str:
    how = "It trains, which takes minutes to hours." if method.trained else "It takes seconds, without training."
    looks = " It can use your own pictures of a concept." if method.takes_images else ""
    return (
        f'<p class="fc-hint">{how}{looks} <a href="{method.paper}" target="_blank" rel="noreferrer">The paper</a></p>'
    )


def _visible(count: int) -> list[Any]:
    return [gr.update(visible=i < count) for i in range(ROWS)]


def _line(values: Sequence[Any], k: int) -> Line:
    name, replacement, kind, files = values[4 * k : 4 * k + 4]
    several = files if isinstance(files, (list, tuple)) else [files] if files else []
    # gradio 3 passes open files, gradio 4 paths
    return Line(name or "", replacement or "", kind, tuple(str(getattr(file, "name", file)) for file in several))


def _shown(line: Line) -> list[Any]:
    return [line.name, line.replacement, line.kind, list(line.images) or None]


def _fields(method: type[Method], preset: str) -> list[Any]:
    """A component for each field, in the order of :func:`form_fields`; advanced ones are in an accordion."""
    found = form_fields(method, preset)
    made: dict[str, Any] = {}
    usual, rare = ([field for field in found if field.info.advanced is flag] for flag in (False, True))
    for several, fold in ((usual, None), (rare, "Advanced")):
        if not several:
            continue
        if fold is None:
            made |= _grid(method, several)
            continue
        with gr.Accordion(fold, open=False, elem_id=f"{_ID}{method.id}_rare"):
            made |= _grid(method, several)
    return [made[field.name] for field in found]


def _grid(method: type[Method], several: Sequence[FormField]) -> dict[str, Any]:
    with gr.Row(elem_classes=["fc-fields"]):
        return {field.name: _field(method, field) for field in several}


def _field(method: type[Method], field: FormField) -> Any:
    label = field.setting.replace("_", " ") + (f": {field.member}" if field.member else "")
    known: dict[str, Any] = {
        "value": field.default,
        "label": label,
        "info": field.info.help,
        "elem_id": f"{_ID}{method.id}_{field.name}",
        "min_width": 200,
    }
    if field.kind == "switch":
        return gr.Checkbox(**known)
    if field.kind == "choice":
        return gr.Dropdown(list(field.options), **known)
    if field.kind == "whole":
        return gr.Number(precision=0, **known)
    if field.kind == "number":
        return gr.Number(**known)
    return gr.Textbox(lines=3 if field.kind == "lines" else 1, **known)
