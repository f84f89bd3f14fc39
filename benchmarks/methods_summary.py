"""Markdown summary of the table of `methods.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness import Table, mean_interval

from forget_concept.core.mini.vocabulary import CATEGORIES

# method, preset, gradient rule
Kind = tuple[str, str, str]
HEADER = (
    *("method", "preset", "gradient", "replaced", "n", "UA", "IRA", "CRA", "other wordings", "kept there"),
    *("UA at 0.7", "KID", "recovered", "drift", "seconds", "forward", "backward", "peak", "patch"),
)
BY_WORDS, BY_VECTORS = ("rephrased", "homoglyphs", "discrete"), ("soft_prompt", "inversion_recall")


def summary(
    rows: Iterable[Mapping[str, str]], baselines: Sequence[str], notes: Mapping[Kind, str], devices: str
) -> str:
    """Render the Markdown: a section per category, a line per method, preset and rule, over concepts and seeds.

    Args:
        rows: Rows of the table.
        baselines: Names of the baselines, which come first and have no fit.
        notes: For each kind, what its request left out or added.
        devices: The devices on which times and memory were measured.
    """
    rows = list(rows)
    lines = [
        "# Every method on the embedded model",
        "",
        "Written by `make bench-methods` from `methods.csv`; `methods.py` explains the columns.",
        f"Seconds and bytes measured on: {devices}",
        "",
        "Means over concepts and seeds with 95 % intervals, in percent: Wilson's over all pictures (ratios above 100 %",
        "count as 100), widened to Student's over the runs if there are several. `n`: runs × pictures in a cell.",
        "Other wordings: pictures of held-out wordings that show the concept, over the unedited model's. Kept there:",
        "retain accuracy in these wordings, over all others. UA at 0.7: at this strength of the patch. KID: distance",
        "of the concept's own prompts' pictures from those of a model that never knew it.",
        "Recovered: share of pictures that show the concept again under an attack with words (the strongest of",
        "rephrasing, other spellings and a gradient search) / with learned embeddings; measured on few pictures.",
    ]
    for category in CATEGORIES:
        here = [row for row in rows if row["category"] == category]
        if not here:
            continue
        names = ", ".join(dict.fromkeys(row["concept"] for row in here))
        lines += [
            "",
            f"## {category.capitalize()}: {names}",
            "",
            f"| {' | '.join(HEADER)} |",
            f"| {' | '.join(['---'] * 4 + ['---:'] * (len(HEADER) - 4))} |",
        ]
        groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
        for row in here:
            replaced = "" if row["method"] in baselines else "yes" if row["replacement"] else "no"
            groups.setdefault((row["method"], row["preset"], row["gradient"], replaced, row["n"]), []).append(row)
        for (method, preset, gradient, replaced, n), several in sorted(
            groups.items(), key=lambda item: _order(item[0], baselines)
        ):
            cells = [f"{method}{' *' if notes.get((method, preset, gradient)) else ''}", preset, gradient]
            cells.append(replaced)
            cells.append(f"{len(several)} × {n}")
            for score in ("ua", "ira", "cra"):
                cells.append("{:.1f} ({:.1f}–{:.1f})".format(*(100 * v for v in _interval(several, score, int(n)))))
            cells += _stressed(several)
            cells.append(_recovered(several))
            cells.append(f"{_mean(several, 'drift'):.3f}")
            cells.append(f"{_mean(several, 'seconds'):.2f}" if method not in baselines else "")
            for name in ("forward_passes", "backward_passes"):
                cells.append(f"{_mean(several, name):.0f}" if method not in baselines else "")
            for name in ("peak_bytes", "patch_bytes"):
                known = method not in baselines and all(row[name] for row in several)
                cells.append(_bytes(_mean(several, name)) if known else "")
            lines.append(f"| {' | '.join(cells)} |")
    footnotes = [
        f"`{' '.join(filter(None, kind))}`: {note}." for kind, note in sorted(notes.items()) if note and _in(kind, rows)
    ]
    if footnotes:
        lines += [
            "",
            "\\* options left out because the preset rejects them, or added because it needs them:",
            *(f"- {line}" for line in footnotes),
        ]
    return "\n".join(lines) + "\n"


def _order(kind: tuple[str, ...], baselines: Sequence[str]) -> tuple[object, ...]:
    return (baselines.index(kind[0]) if kind[0] in baselines else len(baselines), *kind)


def _in(kind: Kind, rows: Iterable[Mapping[str, str]]) -> bool:
    return any((row["method"], row["preset"], row["gradient"]) == kind for row in rows)


def _interval(rows: Sequence[Mapping[str, str]], score: str, n: int) -> tuple[float, float, float]:
    return mean_interval([float(row[score]) for row in rows], n)


def _mean(rows: Sequence[Mapping[str, str]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def _stressed(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Other wordings, what is kept in them, UA at 0.7 and the KID; of several runs the mean."""
    wordings = [
        min(float(row["shown_wordings"]) / float(row["shown_unedited"]), 1.0)
        for row in rows
        if row["shown_wordings"] and float(row["shown_unedited"] or 0)
    ]
    kept, weaker, kid = (
        [float(row[name]) for row in rows if row[name]] for name in ("kept_wordings", "ua_0.7", "kid_retrained")
    )
    return [
        f"{100 * sum(wordings) / len(wordings):.1f}" if wordings else "",
        f"{100 * sum(kept) / len(kept):.1f}" if kept else "",
        f"{100 * sum(weaker) / len(weaker):.1f}" if weaker else "",
        f"{sum(kid) / len(kid):.2g}" if kid else "",
    ]


def _recovered(rows: Sequence[Mapping[str, str]]) -> str:
    """Success of the strongest attack with words, and with vectors; mean over the attacked runs."""
    strongest = []
    for attacks in (BY_WORDS, BY_VECTORS):
        each = [[float(row[f"attack_{name}"]) for name in attacks if row[f"attack_{name}"]] for row in rows]
        most = [max(shares) for shares in each if shares]
        strongest.append(f"{100 * sum(most) / len(most):.0f}" if most else "")
    return " / ".join(strongest) if any(strongest) else ""


def _bytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e3:.0f} kB"


def first_of_each_kind(table: Table, model: str) -> dict[Kind, Mapping[str, str]]:
    """The first row of every method, preset and rule for a model."""
    found: dict[Kind, Mapping[str, str]] = {}
    for row in table.rows:
        if row["model"] == model:
            found.setdefault((row["method"], row["preset"], row["gradient"]), row)
    return found


DEVICES = "Seconds and bytes measured on: "


def write_summary(
    table: Table, model: str, baselines: Sequence[str], notes: Mapping[Kind, str], device: str = ""
) -> Path:
    """Write ``<table>.md`` beside the table, with ``device`` added to the devices of earlier runs; returns its path."""
    path = table.path.with_suffix(".md")
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    before = next((line.removeprefix(DEVICES) for line in old if line.startswith(DEVICES)), "")
    devices = dict.fromkeys(filter(None, [*before.split("; "), device]))
    rows = [row for row in table.rows if row["model"] == model]
    path.write_text(summary(rows, baselines, notes, "; ".join(devices)), encoding="utf-8")
    return path
