"""HTML for any page: a job's state, pictures before and after, cards of patches, the active patches.

The classes are those of ``style.css``. Every text is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from ..errors import ForgetConceptError, listed
from ..files.pictures import check_pixels, decoding
from ..files.reading import size_of_file
from ..models.images import to_pil
from .applied import DroppedPatch
from .host_interface import ActivePatch
from .jobs import Job, Pair
from .patch_library import Entry
from .progress_text import clock_time

__all__ = [
    "active_table",
    "badge",
    "cards",
    "details",
    "dropped_patches",
    "notice",
    "outcome",
    "problem",
    "question",
    "report_frame",
    "state",
]

_STATES = {
    "queued": "waiting",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "interrupted, nothing was saved",
}
MOST_CARDS = 60
_CARD = 256


def problem(text: str) -> str:
    """An error message, which screen readers announce at once."""
    return f'<div class="fc-problem" role="alert">{_text(text)}</div>'


def notice(text: str) -> str:
    """A message about something that was done."""
    return f'<div class="fc-notice" role="status">{_text(text)}</div>' if text else ""


def _text(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def state(job: Job | None, heartbeat: int) -> str:
    """A job's state, step, loss and times.

    The page's script polls while a job is running; ``heartbeat`` is another number in every answer, 0 in a page that
    was never updated.
    """
    if job is None:
        return f'<div class="fc-state" data-state="idle" data-beat="{heartbeat}" data-say=""></div>'
    status = "stopping after this step" if job.stopping and not job.over else _STATES[job.state]
    parts = [job.message] if job.message else []
    if not job.over and job.total:
        parts.append(f"step {job.step} of {job.total}")
        if job.loss is not None:
            parts.append(f"loss {job.loss:.4g}")
        if job.left is not None:
            parts.append(f"{clock_time(job.left)} left")
    if job.seconds:
        parts.append(f"{clock_time(job.seconds)} so far" if not job.over else f"took {clock_time(job.seconds)}")
    share = 100 * job.step / job.total if job.total else 0.0
    lines = [
        f'<div class="fc-state" data-state="{job.state}" data-beat="{heartbeat}" '
        f'data-say="{escape(f"{job.title}: {status}. {job.message}")}">',
        f'<div class="fc-title"><strong>{escape(job.title)}</strong>: {escape(status)}</div>',
        f'<div class="fc-detail">{escape(", ".join(parts))}</div>',
    ]
    if not job.over:
        lines.append(
            f'<div class="fc-bar" role="progressbar" aria-label="{escape(job.message or status)}" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div></div>'
        )
    if job.error:
        lines.append(problem(job.error))
    return "".join([*lines, "</div>"])


def outcome(job: Job | None) -> str:
    """A job's result: pictures before and after, then the summary."""
    if job is None or job.outcome is None:
        return ""
    found = _pairs(job.outcome.pairs)
    return f'{found}<pre class="fc-words" tabindex="0" aria-label="What was done">{escape(job.outcome.summary)}</pre>'


def _pairs(pairs: Iterable[Pair]) -> str:
    figures = []
    for pair in pairs:
        about = escape(f"{pair.prompt}, seed {pair.seed}")
        shown = "".join(
            f'<div><img src="{_data(to_pil(image))}" alt="{label}: {about}">'
            f'<span aria-hidden="true">{label}</span></div>'
            for label, image in (("before", pair.before), ("after", pair.after))
        )
        figures.append(f'<figure><div class="fc-pair">{shown}</div><figcaption>{about}</figcaption></figure>')
    return f'<div class="fc-pairs">{"".join(figures)}</div>' if figures else ""


def _data(image: Any) -> str:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def cards(
    entries: Sequence[Entry], chosen: str | None, active: Sequence[str], unreadable: Sequence[tuple[str, str]] = ()
) -> str:
    """The library: a button for each patch, which the page's script selects when it is clicked.

    A file that cannot be read has a grey card with the reason.
    """
    strange = "".join(
        f'<div class="fc-card fc-unreadable"><strong>{escape(place)}</strong>'
        f'<span class="fc-about">{escape(why)}</span></div>'
        for place, why in unreadable[:MOST_CARDS]
    )
    if strange:
        strange = f'<div class="fc-cards" role="group" aria-label="Files that cannot be read">{strange}</div>'
    if not entries:
        return strange + (
            '<div class="fc-empty">There are no patches yet: make one under <em>Forget</em>. Those that ComfyUI or the '
            "command line made appear here as soon as they lie in the Lora folder.</div>"
        )
    found = []
    for entry in entries[:MOST_CARDS]:
        about = ", ".join(entry.concepts) or "says nothing of what it forgets"
        mark = '<span class="fc-on">in the model</span>' if entry.name in active else ""
        picture = _thumbnail(entry.preview, entry.written) if entry.preview else ""
        image = f'<img src="{picture}" alt="">' if picture else '<span class="fc-none"></span>'
        found.append(
            f'<button type="button" class="fc-card" data-name="{escape(entry.name)}" '
            f'aria-pressed="{"true" if entry.name == chosen else "false"}">{image}<strong>{escape(entry.name)}</strong>'
            f'<span class="fc-about">{escape(about)}; {escape(entry.method)}</span>{mark}</button>'
        )
    more = len(entries) - MOST_CARDS
    tail = f'<div class="fc-empty">{more} older ones are in the list “Patch”.</div>' if more > 0 else ""
    return f'<div class="fc-cards" role="group" aria-label="Patches">{"".join(found)}</div>{tail}{strange}'


@lru_cache(maxsize=256)
def _thumbnail(path: Path, written: float) -> str:
    """A preview picture as a small data URL; empty for one that cannot be read."""
    from PIL import Image

    try:
        size_of_file(path)
        with decoding(path.name), Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            check_pixels(image, path.name)
            image.thumbnail((2 * _CARD, _CARD))
            return _data(image)
    except ForgetConceptError:
        return ""


def active_table(active: Sequence[ActivePatch], title: str) -> str:
    """The active patches, and whether each is in force."""
    if not active:
        return f'<div class="fc-empty">No patch is in <em>{escape(title)}</em>.</div>'
    rows = "".join(
        f"<tr><th scope='row'>{escape(one.name)}</th><td>{one.strength:g}</td><td class='fc-{_force(one)[0]}'>"
        f"{_force(one)[1]}</td></tr>"
        for one in active
    )
    return (
        f'<table class="fc-active"><caption>In <em>{escape(title)}</em> now</caption><thead><tr>'
        f'<th scope="col">Patch</th><th scope="col">Strength</th><th scope="col">In the weights</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _force(one: ActivePatch) -> tuple[str, str]:
    return ("yes", "yes, looked at just now") if one.in_force else ("no", "no: put it in again")


def dropped_patches(dropped: Sequence[DroppedPatch], by_itself: bool) -> str:
    """Which patches the current checkpoint lost, with buttons to apply them again or leave them out; empty for none.

    The page's script presses the tab's button that ``data-press`` names.

    Args:
        by_itself: Whether the host applies them again with the next picture.
    """
    if not dropped:
        return ""
    return (
        f'<div class="fc-problem" role="alert">{_text(_dropped(dropped, by_itself))}<div class="fc-presses">'
        '<button type="button" data-press="forget_concept_again">Apply again</button> '
        '<button type="button" data-press="forget_concept_dismiss">Leave out</button></div></div>'
    )


def _dropped(dropped: Sequence[DroppedPatch], by_itself: bool) -> str:
    lines = []
    if own := [f"'{one.name}' at strength {one.strength:g}" for one in dropped if one.same]:
        then = (
            "The next picture applies it again."
            if by_itself
            else "Pictures are generated without it until you apply it again."
        )
        lines.append(f"No longer in the model, because its checkpoint was loaded again: {listed(own)}. {then}")
    if others := [f"'{one.name}' ({one.checkpoint}, {one.strength:g})" for one in dropped if not one.same]:
        lines.append(f"Applied to another checkpoint, not to this one: {listed(others)}.")
    return "\n".join(lines)


def badge(active: Sequence[ActivePatch], dropped: Sequence[DroppedPatch], by_itself: bool) -> str:
    """The patches in the model and those it lost, for the pages that generate pictures; empty for none."""
    now = [f"{one.name} {one.strength:g}" for one in active if one.in_force]
    words = f'<span class="fc-on">Forget Concept</span> in the model: <strong>{escape(", ".join(now))}</strong>'
    shown = (f"<div>{words}</div>" if now else "") + dropped_patches(dropped, by_itself)
    return f'<div class="fc-badge-content">{shown}</div>'


def details(found: Mapping[str, Any]) -> str:
    """A patch's summary."""
    return f'<pre class="fc-words" tabindex="0" aria-label="About the patch">{escape(str(found["words"]))}</pre>'


def question(text: str) -> str:
    """Something to confirm."""
    return f'<div class="fc-question" role="alert">{_text(text)}</div>'


def report_frame(page: str, title: str) -> str:
    """A report within the page, in a frame that runs no scripts; reports have none."""
    return (
        f'<iframe class="fc-report" sandbox="" title="{escape(title)}" srcdoc="{escape(page)}" tabindex="0"></iframe>'
        if page
        else ""
    )
