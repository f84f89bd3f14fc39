"""Contact sheets of an evaluation: the same seeds before and after, one row per concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..models.images import to_pil
from .scores import Evaluation, Example

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["before_after", "contact_sheet"]

PAPER, INK, FAINT, GOOD, BAD = (255, 255, 255), (28, 30, 36), (120, 124, 132), (22, 120, 70), (170, 40, 40)
TILE, GAP, PAIR_GAP, GROUP_GAP, MARGIN = 128, 4, 14, 34, 24
LABEL_WIDTH, HEAD, CAPTION = 170, 64, 46


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _lines(draw: ImageDraw, text: str, size: int, width: int, limit: int) -> list[str]:
    """Wrap ``text`` to ``width`` pixels, and truncate it with an ellipsis after ``limit`` lines."""
    font, lines = _font(size), [""]
    words = text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < limit:
            lines.append(word)
        else:
            rest = f"{lines[-1]} {' '.join(words[i:])}"
            while draw.textlength(rest + "…", font=font) > width:
                rest = rest[:-1]
            lines[-1] = rest.rstrip() + "…"
            break
    return lines


def _write(
    draw: ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int] = INK,
    width: int = 10_000,
    limit: int = 1,
) -> None:
    for i, line in enumerate(_lines(draw, text, size, width, limit)):
        draw.text((at[0], at[1] + round(i * size * 1.3)), line, font=_font(size), fill=colour)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def before_after(evaluations: Sequence[Evaluation], title: str, variant: str = "patched") -> Image:
    """Draw a contact sheet of the examples of each evaluation: target prompts, then retain prompts.

    Each pair shows the unedited model on the left, and the patched model with the same prompt and seed on the right.

    Args:
        evaluations: At least one evaluation.
        title: Title of the sheet.
        variant: The variant whose scores are shown.

    Raises:
        ValueError: If there are no evaluations.
    """
    from PIL import Image, ImageDraw

    if not evaluations:
        raise ValueError("there is no evaluation to show")
    pair = 2 * TILE + GAP
    targets = max(len(evaluation.target_examples) for evaluation in evaluations)
    kept = max(len(evaluation.kept_examples) for evaluation in evaluations)
    group = [n * pair + max(n - 1, 0) * PAIR_GAP for n in (targets, kept)]
    starts = [MARGIN + LABEL_WIDTH, MARGIN + LABEL_WIDTH + group[0] + GROUP_GAP]
    width = starts[1] + group[1] + MARGIN
    top, row = MARGIN + 40 + HEAD, TILE + CAPTION + 14
    image = Image.new("RGB", (width, top + row * len(evaluations) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    _write(draw, (MARGIN, MARGIN), title, 24)
    heads = ("The prompt asks for the concept", "The prompt asks for something else")
    for text, start, size in zip(heads, starts, group, strict=True):
        _write(draw, (start, MARGIN + 44), text, 17)
        draw.line([(start, MARGIN + 70), (start + size, MARGIN + 70)], fill=FAINT)
    for k in range(targets + kept):
        x = _place(k, targets, starts, pair)
        _write(draw, (x, MARGIN + 76), "before", 13, FAINT)
        _write(draw, (x + TILE + GAP, MARGIN + 76), "after", 13, FAINT)
    for r, evaluation in enumerate(evaluations):
        y = top + r * row
        scores = evaluation.scores[variant]
        _write(draw, (MARGIN, y + 2), evaluation.concept, 20, INK, LABEL_WIDTH - 16, 2)
        _write(draw, (MARGIN, y + 56), evaluation.category, 14, FAINT)
        forgotten = f"{_percent(scores.ua.value)} forgotten"
        _write(draw, (MARGIN, y + 78), forgotten, 14, GOOD if scores.ua.value >= 0.9 else BAD)
        for line, (score, where) in enumerate(((scores.ira, "of its kind"), (scores.cra, "of others"))):
            words = f"{_percent(score.value)} kept {where}"
            _write(draw, (MARGIN, y + 98 + 20 * line), words, 14, GOOD if score.value >= 0.9 else BAD)
        for k, example in enumerate((*evaluation.target_examples, *evaluation.kept_examples)):
            at = k if k < len(evaluation.target_examples) else targets + k - len(evaluation.target_examples)
            _pair(image, draw, example, _place(at, targets, starts, pair), y)
    return image


def _place(k: int, targets: int, starts: list[int], pair: int) -> int:
    group, index = (0, k) if k < targets else (1, k - targets)
    return starts[group] + index * (pair + PAIR_GAP)


def _pair(image: Image, draw: ImageDraw, example: Example, x: int, y: int) -> None:
    from PIL.Image import Resampling

    for i, labeled in enumerate((example.before, example.after)):
        tile = to_pil(labeled.picture).resize((TILE, TILE), Resampling.LANCZOS)
        left = x + i * (TILE + GAP)
        image.paste(tile, (left, y))
        draw.rectangle([left, y, left + TILE - 1, y + TILE - 1], outline=(215, 217, 221))
    _write(draw, (x, y + TILE + 6), example.prompt, 13, INK, 2 * TILE + GAP, 2)


def contact_sheet(pictures: Sequence[Tensor], captions: Sequence[str], columns: int = 4) -> Image:
    """Draw images ``(3, H, W)``, uint8, in rows with ``columns`` columns, each with its caption below."""
    from PIL import Image, ImageDraw

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height, wide = pictures[0].shape[1:]
    step_x, step_y = max(wide, TILE) + PAIR_GAP, height + CAPTION
    image = Image.new("RGB", (2 * MARGIN + columns * step_x - PAIR_GAP, 2 * MARGIN + rows * step_y), PAPER)
    draw = ImageDraw.Draw(image)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = MARGIN + (i % columns) * step_x, MARGIN + (i // columns) * step_y
        image.paste(to_pil(picture), (x, y))
        _write(draw, (x, y + height + 6), caption, 13, INK, step_x - PAIR_GAP, 2)
    return image
