"""The report: whole in itself, true to its figures, readable by everyone, and safe whatever its words are."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from html.parser import HTMLParser

import jsonschema
import pytest
import torch
from drawn import DrawnModel, DrawnProbe, forgets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import TinyText, random_patch, tiny_model

from forget_concept.core.errors import ForgetConceptError, RequestError
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    UNEDITED,
    Evaluation,
    EvaluationTarget,
    SamplingSettings,
    Score,
    Scores,
    evaluate,
)
from forget_concept.core.evaluation.attention_pictures import AttentionMap, AttentionPair
from forget_concept.core.evaluation.outcomes import Disagreement, Outcome
from forget_concept.core.evaluation.report import (
    SCHEMA_PATH,
    SCHEMA_VERSION,
    Attack,
    Drift,
    ErosionStep,
    Grid,
    KindScores,
    Metric,
    MScore,
    Pair,
    PatchFacts,
    Provenance,
    Report,
    grids,
    render_html,
    report_dict,
    write_report,
)
from forget_concept.core.evaluation.report.plots import bars, dots, interval, lines
from forget_concept.core.evaluation.report.verdict import percent, verdict
from forget_concept.core.evaluation.retention import Retained
from forget_concept.core.evaluation.stress import ImageToImage, StrengthScores, WordingScores
from forget_concept.core.models.images import to_bytes

EVIL = "<script>alert('x')</script>\"&<b>"
SITES = [f"{part}.attentions.0.attn2.to_k" for part in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def share(hits, n=24):
    return Score.share([True] * hits + [False] * (n - hits))


def kept(hits, n=24):
    return Score.ratio([True] * hits + [False] * (n - hits), [True] * n)


def scores(ua, ira=24, cra=24, target=24):
    return Scores(share(ua), kept(ira), kept(cra), kept(target))


def evaluation(concept="star", ua=24, ira=24, negative=(22, 20)):
    return Evaluation(
        concept,
        "object",
        24,
        48,
        {PATCHED: scores(ua, ira), UNEDITED: scores(1), NEGATIVE: scores(*negative)},
        {"ira": share(23), "cra": share(24), "cra_target": share(22)},
        drift={PATCHED: 0.0212, UNEDITED: 0.0, NEGATIVE: 0.04},
        retained=(
            Retained("moon", "object", kept(22), 24, "possessive", 0.21),
            Retained("mosaic", "style", kept(24), 24, None, 0.6),
            Retained("key", "object", None, 12),
        ),
    )


def picture(seed, size=16):
    return torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def provenance(word=""):
    facts = PatchFacts(
        0.5, 22, 7, 123_456, f"forget-{word or 'star'}.safetensors", ("star", *([word] if word else [])), "uce",
        "tuned", 3, "0.1.0", "abc", "clip_skip=1", {"scale": 0.01, "columns": word or "tail", "rank": None},
        {"schema": 1, "concepts": [{"name": word or "star"}]},
    )  # fmt: skip
    return Provenance("mini", "abc", (facts,), {"pictures a cell": 24, "sampler": word or "dpm++"}, {"torch": "2.13"},
                      "2025-11-22T16:00:00+00:00")  # fmt: skip


def full(word=""):
    """A report with every part; ``word`` stands wherever a person's or a file's words may."""
    concept = word or "star"
    pairs = tuple(
        Pair(f"a red {concept}", picture(i), picture(10 + i), 40 + i, f"{concept}, red", "circle, red")
        for i in range(2)
    )
    mass = torch.linspace(0.01, 0.09, 16).reshape(4, 4)
    maps = AttentionMap(mass, picture(7)), AttentionMap(mass / 3, picture(8))
    return Report(
        f"Forgetting {concept}",
        provenance(word),
        evaluations=(evaluation(concept), evaluation("neon", 20, 23)),
        by_kind=(KindScores(concept, "plain", {PATCHED: share(24), UNEDITED: share(0)}),
                 KindScores(concept, word or "indirect", {PATCHED: share(9)})),
        outcomes=(Outcome(concept, share(1), share(18), share(2), share(3), (("moon", 2), ("key", 1)),
                          word or "circle"),
                  Outcome("neon", share(0), None, share(24), share(0))),
        second_judge=(Disagreement(concept, UNEDITED, share(1), share(0)),
                      Disagreement(concept, PATCHED, share(2), share(23))),
        wordings=(WordingScores(concept, "possessive", share(20), share(18, 20), kept(22)),
                  WordingScores(concept, "typo", share(0), None, None)),
        strengths=(StrengthScores(concept, 0.5, share(9), kept(24)), StrengthScores(concept, 1.0, share(24), kept(24))),
        image_to_image=(ImageToImage(concept, "named", 0.5, share(24), share(3)),
                        ImageToImage(concept, "empty", 0.5, share(24), share(21))),
        attacks=(Attack(word or "soft prompt", concept, share(24), share(11), f"40 steps {word}", (f"a {concept}",)),
                 Attack("spelling", concept, None, share(2), "8 spellings")),
        m_scores=(MScore(concept, 0.81, 0.12), MScore("moon", 0.79, 0.78, False)),
        metrics=(Metric(word or "FID", {PATCHED: 11.5, UNEDITED: 10.25}, 300, "lower", word),
                 Metric("CLIP score", {PATCHED: 0.3125}, 300, "higher", errors={PATCHED: 0.002})),
        drift=Drift(f"relative norm {word}",
                    {site: 0.001 * (i + 1) for i, site in enumerate(SITES)} | ({word: 1e-4} if word else {})),
        erosion=tuple(ErosionStep(i, concept, kept(24 - i), share(24 - i // 2)) for i in range(1, 6)),
        pictures=(Grid(concept, "target", pairs), Grid(concept, "kept", pairs[:1])),
        attention=(AttentionPair(f"a {concept}", concept, 7, *maps),),
        timings={f"drawing {word}": 12.3},
        left_out={f"inversion {word}": f"no pictures {word}"},
    )  # fmt: skip


VOID = {"meta", "link", "img", "br", "input", "path", "circle", "rect", "stop", "polygon", "polyline"}


class Page(HTMLParser):
    """Reads a page into elements ``(tag, attributes, parents, text)``, and holds it to being well-formed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"doubled attribute in <{tag}>"
        element = [tag, dict(attrs), [e[0] for e in self.open], ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[3] += data

    def all(self, *tags):
        return [element for element in self.elements if element[0] in tags]


@pytest.fixture(scope="module")
def report():
    return full()


@pytest.fixture(scope="module")
def html(report):
    return render_html(report)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def schema():
    return json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))


# -- nothing leaves the page, nothing gets in -----------------------------------------------------------------------


def test_the_page_asks_for_nothing(page, html):
    assert not page.all("script", "iframe", "object", "embed", "base", "form")
    for tag, attributes, _, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "srcset", "action"), f"<{tag} {name}>"
            if name in ("src", "href"):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", html)
    assert page.all("link") == [["link", {"rel": "icon", "href": "data:,"}, ["html", "head"], ""]]


def test_the_policy_lets_in_the_style_sheet_by_its_hash_and_nothing_else(page):
    (meta,) = [e for e in page.all("meta") if e[1].get("http-equiv") == "Content-Security-Policy"]
    (style,) = page.all("style")
    digest = base64.b64encode(hashlib.sha256(style[3].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in meta[1]["content"].split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # before anything that could load something
    head = [e[0] for e in page.elements if "head" in e[2]]
    assert head.index("meta") < head.index("link") < head.index("style")


def test_words_stay_words():
    """Whatever a concept, a file or an attack is called, the page has the same elements as with harmless words."""
    evil = render_html(full(EVIL))
    assert "<script" not in evil
    harmless, hostile = Page(render_html(full("word"))), Page(evil)
    assert [(e[0], e[2], sorted(e[1])) for e in harmless.elements] == [
        (e[0], e[2], sorted(e[1])) for e in hostile.elements
    ]
    (title,) = hostile.all("title")[:1]
    assert title[3] == f"Forgetting {EVIL}"
    images = hostile.all("img")
    assert all(EVIL in image[1]["alt"] for image in images)
    texts = [e[3] for e in hostile.all("td", "th", "h3", "summary", "figcaption", "code", "pre", "desc", "caption")]
    assert sum(EVIL in text for text in texts) >= 20
    assert json.loads(json.dumps(report_dict(full(EVIL))))["evaluations"][0]["concept"] == EVIL


# -- for everyone ---------------------------------------------------------------------------------------------------


def test_headings_are_in_order(page):
    levels = [int(tag[1]) for tag, _, _, _ in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(e[3].strip() for e in page.all("h1", "h2", "h3", "h4"))


def test_language_title_and_viewport(page):
    assert page.all("html")[0][1] == {"lang": "en"}
    assert page.all("title")[0][3] == page.all("h1")[0][3] == "Forgetting star"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [e[1] for e in page.all("meta")]


def test_every_picture_says_what_it_is(page, report):
    images = [image[1] for image in page.all("img")]
    pairs = [pair for grid in report.pictures for pair in grid.pairs]
    assert len(images) == 2 * len(pairs) + 2 * len(report.attention)
    for i, pair in enumerate(pairs):
        before, after = images[2 * i]["alt"], images[2 * i + 1]["alt"]
        for alt, model, seen in (
            (before, "Unedited model", pair.before_seen),
            (after, "With the patch", pair.after_seen),
        ):
            assert alt == f"{model}, prompt “{pair.prompt}”, seed {pair.seed}: shows {seen}"
    first, second = (image["alt"] for image in images[-2:])
    assert first == ("Attention to “star”. Unedited model, prompt “a star”, seed 7: 5 % of the attention on average, "
                     "at most 9 %, 88 % from the left and 88 % from the top")  # fmt: skip
    assert second.startswith("Attention to “star”. With the patch") and "at most 3 %" in second


def test_drawings_and_tables_are_named(page):
    ids = [e[1]["id"] for e in page.elements if "id" in e[1]]
    assert len(ids) == len(set(ids))
    for _, attributes, _, _ in page.all("svg"):
        if attributes.get("role") == "img":
            assert set(attributes["aria-labelledby"].split()) <= set(ids)
        else:
            assert attributes["aria-hidden"] == "true"
    assert all(e[3].strip() for e in page.all("desc"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(e[1].get("scope") in ("row", "col") for e in page.all("th"))
    assert all(e[3].strip() for e in page.all("th", "caption", "summary", "legend", "label"))
    # what scrolls can be reached by the keyboard, and has its own name
    regions = [e[1] for e in page.elements if e[1].get("role") == "region"]
    assert regions and all(e["tabindex"] == "0" and e["aria-label"] for e in regions)
    assert len({e["aria-label"] for e in regions}) == len(regions)
    targets = [e[1]["href"][1:] for e in page.all("a")]
    assert set(targets) <= set(ids) and len(targets) == 15


def test_colours_have_contrast(page):
    """WCAG 2.2, 1.4.3 (AA): text on every background it stands on, in the light, the dark and the printed page."""
    css = page.all("style")[0][3]
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", css)]
    assert len(palettes) == 3

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for palette in palettes:
        for text in ("ink", "faint", "accent", "other"):
            for ground in ("paper", "soft"):
                light, dark = sorted((luminance(palette[text]), luminance(palette[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, palette)
    # every colour is one of the palette's, so that none is left over in the other scheme
    rest = re.sub(r":root \{[^}]*\}", "", css)
    assert not re.search(r"#[0-9a-f]{3,8}\b|rgba?\(|hsla?\(", rest)


# -- true to its figures --------------------------------------------------------------------------------------------


def cells(page):
    """Every table row as its texts, blanks made one."""
    rows = []
    for tag, _, _, text in page.elements:
        if tag == "tr":
            rows.append([])
        elif tag in ("td", "th") and rows:
            rows[-1].append(" ".join(text.split()))
    return rows


def told(score):
    low, high = f"{100 * score.low:.0f}", percent(score.high)
    return f"{percent(score.value)} {low}–{high}n {score.n}"


def test_the_tables_hold_every_score(page, report):
    rows = cells(page)
    for one in report.evaluations:
        for variant, name in ((PATCHED, "with the patch"), (UNEDITED, "unedited model"), (NEGATIVE, "negative prompt")):
            s = one.scores[variant]
            assert [name, *map(told, (s.ua, s.ira, s.cra, s.cra_target))] in rows
    attack = report.attacks[0]
    assert ["soft prompt on star", told(attack.before), told(attack.after), "40 steps"] in rows
    assert ["indirect", told(report.by_kind[1].ua[PATCHED]), "–"] in rows
    assert ["star", "forgotten", "0.810", "0.120", "-0.690"] in rows
    assert ["moon", "kept", "0.790", "0.780", "-0.010"] in rows
    assert ["FID", "11.5", "10.25", "lower", "300"] in rows
    assert ["CLIP score", "0.3125 ± 0.002", "–", "higher", "300"] in rows
    assert ["spelling on star", "–", told(share(2)), "8 spellings"] in rows
    assert "inversion : no pictures" in [" ".join(e[3].split()) for e in page.all("li")]
    assert ["3", "star", told(report.erosion[2].kept), told(report.erosion[2].forgotten)] in rows
    assert ["star → circle", told(share(1)), told(share(18)), told(share(2)), told(share(3))] in rows
    assert ["neon", told(share(0)), "–", told(share(24)), told(share(0))] in rows
    assert ["star", "with the patch", told(share(2)), told(share(23))] in rows
    assert ["moon", "object", told(kept(22)), "possessive", "0.21"] in rows
    assert ["key", "object", "–", "–", "–"] in rows
    assert ["possessive of star", told(share(20)), told(share(18, 20)), told(kept(22))] in rows
    assert ["typo of star", told(share(0)), "–", "–"] in rows
    assert ["0.5 of star", told(share(9)), told(kept(24))] in rows
    assert ["empty star", "50 %", told(share(24)), told(share(21))] in rows
    assert [SITES[1], "0.002"] in rows
    assert ["drawing", "12.3"] in rows
    for row in (["Method", "uce (tuned)"], ["Strength when measured", "0.5"], ["Made for", "abc (this model)"],
                ["Size", "22 layers, rank 7, 123 kB"], ["rank", "null"], ["sampler", "dpm++"],
                ["torch", "2.13"]):  # fmt: skip
        assert row in rows
    (request,) = page.all("pre")
    assert json.loads(request[3]) == report.provenance.patches[0].request


def test_pictures_are_the_very_pixels(page, report):
    images = page.all("img")
    shown = []
    for image in images:
        kind, _, data = image[1]["src"].partition(";base64,")
        assert kind == "data:image/png"
        found = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert found.size == (int(image[1]["width"]), int(image[1]["height"]))
        shown.append(
            torch.tensor(list(found.convert("RGB").tobytes()), dtype=torch.uint8)
            .reshape(*found.size[::-1], 3)
            .permute(2, 0, 1)
        )
    wanted = [side for grid in report.pictures for pair in grid.pairs for side in (pair.before, pair.after)]
    wanted += [side for pair in report.attention for side in pair.overlays()]
    assert all(torch.equal(a, b) for a, b in zip(shown, wanted, strict=True))


def test_large_pictures_are_made_small(report):
    large = torch.zeros(3, 600, 1200, dtype=torch.uint8)
    large[0] = 200
    grid = Grid("star", "target", (Pair("a star", large, large),))
    text = render_html(Report("Large", report.provenance, pictures=(grid,)))
    first = Page(text).all("img")[0][1]
    assert (first["width"], first["height"]) == ("512", "256")
    assert first["src"].startswith("data:image/jpeg") and len(text) < 100_000
    assert first["alt"] == "Unedited model, prompt “a star”"


def test_the_verdict_says_the_figures(report):
    words = verdict(report)
    assert words.text == (
        "“star” is forgotten: 24 of 24 prompts that name it no longer show it (95 % interval 86–100 %). The rest "
        "stays: 100 % of what the unedited model draws right, at worst. “neon” is partly forgotten: 20 of 24 prompts "
        "that name it no longer show it (95 % interval 64–93 %). The rest stays: 96 % of what the unedited model draws "
        "right, at worst. A negative prompt alone forgets 92 % and keeps 83 % at worst, the patch 83 % and 96 %. "
        "The concept that suffers most beside “star” is “moon”: 92 % of what the unedited model draws right (95 % "
        "interval 79–106 %), least in the wording “possessive”. In wordings that no fit uses it is forgotten least as "
        "“possessive” of “star”: in 90 % of the images that showed it (95 % interval 70–97 %); 1 of 2 say nothing, "
        "because the unedited model does not follow them. At strength 0.5 “star” is still shown in 62 %. "
        "Attacked, the strongest of 2 attacks (soft prompt) brings “star” back in 46 % of its tries (95 % interval "
        "28–65 %); on the unedited model it succeeds in 100 %."
    )
    assert [one.as_dict() for one in words.concepts] == [
        {"concept": "star", "forgotten": "yes", "kept": "yes", "returns": True},
        {"concept": "neon", "forgotten": "partly", "kept": "yes", "returns": None},
    ]


def test_an_attack_that_brings_the_concept_along_is_no_return(report):
    brought = Attack("completion", "star", share(24), share(24), "one try")
    found = verdict(replace(report, attacks=(brought,)))
    assert found.concepts[0].returns is None
    assert "Whether it comes back with other words was not tested." in found.text
    known = verdict(replace(report, attacks=(*report.attacks, brought)))
    assert known.text == verdict(report).text and known.concepts == verdict(report).concepts


@given(st.integers(0, 24), st.integers(0, 24), st.integers(0, 24), st.integers(0, 24))
def test_the_grades_are_their_rules(ua, ira, negative, again):
    one = evaluation("star", ua, ira, (negative, 20))
    attack = Attack("x", "star", share(24), share(again), "one try")
    found = verdict(Report("x", provenance(), (one,), attacks=(attack,)))
    (grade,) = found.concepts
    assert grade.forgotten == ("yes" if ua >= 22 else "partly" if ua >= 12 else "no")
    assert grade.kept == ("yes" if ira >= 22 else "partly" if ira >= 17 else "no")
    assert grade.returns == (again >= 3)
    assert ("does as well" in found.text) == (negative >= ua and ira <= 20)
    assert f"{ua} of 24 prompts" in found.text


def test_many_concepts_are_summed_up():
    many = tuple(evaluation(f"thing {i}", 24 - i, 24 - 2 * i) for i in range(5))
    text = verdict(Report("x", provenance(), many)).text
    assert text.startswith("3 of 5 concepts are forgotten; the least is “thing 4”, which 83 % of the prompts")
    assert "The rest stays for 2 of them; it suffers most for “thing 4”: 67 %" in text
    assert "was not tested" in text


@given(st.floats(0, 2))
def test_only_all_is_all(value):
    text = percent(value)
    assert (text == "100 %") == (100 * value == 100)
    assert (text == "0 %") == (value == 0)
    assert abs(float(text.removesuffix(" %")) - 100 * value) <= 0.5 + 1e-9


def test_intervals_and_plots_are_to_scale(report):
    for score in (share(0), share(12), kept(24), share(24)):
        at = interval(score)
        assert 3 <= at.low <= at.at <= at.high <= 61
        assert at.at - 3 == pytest.approx(score.value * (at.one - 3), abs=0.02)
    drawn = bars(report.drift)
    heights = [bar.height for bar in drawn.bars]
    assert heights == pytest.approx([heights[0] * (i + 1) for i in range(4)], abs=0.05)
    assert [group.label for group in drawn.groups] == ["down 0", "down 1", "mid", "up 1"]
    assert all(
        bar.y + bar.height == pytest.approx(drawn.base) and bar.y >= drawn.ticks[-1].at - 0.01 for bar in drawn.bars
    )
    per_unit = (drawn.base - drawn.ticks[-1].at) / float(drawn.ticks[-1].label)
    assert heights[-1] == pytest.approx(0.004 * per_unit, rel=0.01)
    plotted = lines(report.erosion)
    zero, one = plotted.ticks[0].at, plotted.ticks[-1].at
    for series, which in zip(plotted.series, ("kept", "forgotten"), strict=True):
        wanted = [zero + getattr(step, which).value * (one - zero) for step in report.erosion]
        assert [y for _, y in series.points] == pytest.approx(wanted, abs=0.01)
    placed = dots(report.evaluations[0].retained, "object")
    assert [dot.name for dot in placed.dots] == ["moon", "mosaic"] and [dot.same for dot in placed.dots] == [
        True,
        False,
    ]
    zero, one = placed.ticks[0].at, placed.ticks[-1].at
    assert [dot.y for dot in placed.dots] == pytest.approx([zero + 22 / 24 * (one - zero), one], abs=0.01)
    left, right = placed.marks[0].at, placed.marks[-1].at
    wide = float(placed.marks[-1].label)
    assert [dot.x for dot in placed.dots] == pytest.approx(
        [left + d / wide * (right - left) for d in (0.21, 0.6)], abs=0.01
    )
    assert dots((Retained("key", "object", None, 12, None, 0.3),), "object") is None
    single = lines(report.erosion[:1])
    assert single.series[0].points[0][0] > 100
    assert bars(Drift("nothing", {"mid_block.x": 0.0})).bars[0].height == 0


def test_the_plots_have_as_much_in_them_as_was_measured(page, report):
    assert len([e for e in page.all("rect") if e[1].get("class") == "bar"]) == len(report.drift.values)
    assert len(page.all("polyline")) == len(page.all("polygon")) == 2
    points = [e for e in page.all("circle") if "figure" in e[2]]
    # and one concept of the forgotten one's category in each of two plots
    assert len(points) == len(report.erosion) + 2


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_the_json_is_what_the_schema_says(schema, report):
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    checker.check_schema(schema)
    assert schema["properties"]["schema"]["const"] == SCHEMA_VERSION
    data = json.loads(json.dumps(report_dict(report), allow_nan=False))
    checker.validate(data)
    assert data["evaluations"][0] == json.loads(json.dumps(report.evaluations[0].as_dict()))
    assert data["not_measured"] == []
    assert data["attention"][0]["share_before"] == pytest.approx(0.05)
    assert data["erosion"][2]["kept"]["value"] == pytest.approx(21 / 24)
    # every part and every field is described
    assert set(data) == set(schema["properties"])


PARTS = tuple(Report.PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_can_stand_alone(name, report, schema):
    alone = Report("One part", report.provenance, **{name: getattr(report, name)})
    jsonschema.Draft202012Validator(schema).validate(report_dict(alone))
    assert alone.measured == (name,)
    page = Page(render_html(alone))
    text = next(e[3] for e in page.all("p") if e[3].startswith("Not measured here"))
    assert [Report.PARTS[other] in text for other in PARTS] == [other != name for other in PARTS]
    assert len(page.all("h2")) == 3  # in short, the part, how it was made
    with pytest.raises(AttributeError):
        alone.title = "another"


def bad(data, change):
    data = copy.deepcopy(data)
    change(data)
    return data


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(extra=1),
        lambda d: d.pop("provenance"),
        lambda d: d.update(schema=2),
        lambda d: d["evaluations"][0]["scores"].pop("patched"),
        lambda d: d["evaluations"][0]["scores"]["patched"]["ua"].pop("low"),
        lambda d: d["verdict"]["concepts"][0].update(forgotten="maybe"),
        lambda d: d.update(attacks=[]),
        lambda d: d["attacks"][0].update(budget=3),
        lambda d: d["provenance"]["patches"][0].update(path="/home/me"),
        lambda d: d["timings"].update(waiting=-1),
        lambda d: d["left_out"].update(inversion=None),
        lambda d: d["not_measured"].append("sleep"),
        lambda d: d["attention"][0].update(scale=[0.1]),
    ],
)
def test_the_schema_refuses_what_is_not_a_report(change, schema, report):
    data = json.loads(json.dumps(report_dict(report)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(bad(data, change))


# -- where it comes from --------------------------------------------------------------------------------------------


def test_a_real_evaluation_becomes_a_report(tmp_path, schema):
    patch = forgets("star", "object")
    model = DrawnModel()
    (found,) = evaluate(
        model,
        DrawnProbe(),
        [EvaluationTarget("star", ((patch, 1.0),))],
        12,
        0,
        SamplingSettings(2, precision="float32"),
    )
    shown = grids(found)
    assert [grid.about for grid in shown] == ["target", "kept"]
    assert all(len(grid.pairs) == 3 for grid in shown)
    for pair, example in zip(shown[0].pairs, found.target_examples, strict=True):
        assert torch.equal(pair.before, example.before.picture) and torch.equal(pair.after, example.after.picture)
        assert "star" in pair.before_seen and "star" not in pair.after_seen
    made = Provenance.of(tiny_model(), [PatchFacts.of(random_patch(tiny_model().survey))], {"seed": 0})
    html = write_report(Report("Star", made, (found,), pictures=shown), tmp_path / "out")
    assert html == tmp_path / "out" / "report.html"
    data = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, schema)
    assert data["evaluations"] == [json.loads(json.dumps(found.as_dict()))]
    page = Page(html.read_text(encoding="utf-8"))
    assert len(page.all("img")) == 12
    assert ["Method", "not stated"] in cells(page)


def test_nothing_known_is_said_where_a_judge_finds_nothing():
    from forget_concept.core.evaluation import Example, LabeledImage
    from forget_concept.core.mini.world import Labels

    blank = LabeledImage(to_bytes(torch.zeros(3, 4, 4)), Labels())
    one = replace(evaluation(), target_examples=(Example("a star", 3, blank, blank),))
    (grid,) = grids(one)
    assert grid.pairs[0].before_seen == "nothing known"


def test_a_patch_tells_where_it_comes_from():
    from tiny import fit

    from forget_concept.core.request.concept import Concept
    from forget_concept.core.request.request import ForgetRequest

    model = tiny_model()
    assert isinstance(model.text, TinyText)
    request = ForgetRequest((Concept("star", "object", "circle"),), seed=4, strength=0.8)
    patch = fit(model, request)
    facts = PatchFacts.of(patch, 0.5, "forget-star.safetensors")
    assert (facts.method, facts.preset, facts.seed, facts.strength) == ("uce", "tuned", 4, 0.5)
    assert facts.concepts == ("star",) and facts.base_model == model.model_hash and facts.text_layer == "tiny"
    assert ForgetRequest.from_json(json.dumps(facts.request)) == request
    assert facts.settings == json.loads(patch.metadata["forget_concept.settings"])
    made = Provenance.of(model, [facts], {"seed": 0}, datetime(2025, 11, 22, 16, tzinfo=timezone.utc))
    assert made.date == "2025-11-22T16:00:00+00:00"
    assert made.versions["torch"] == torch.__version__.partition("+")[0] or torch.__version__ == made.versions["torch"]
    assert (made.model, made.model_hash) == ("tiny", model.model_hash)


def test_another_programs_patch_is_no_fault():
    odd = random_patch(tiny_model().survey, metadata={"forget_concept.settings": "{", "forget_concept.concepts": "3",
                                                      "forget_concept.seed": "x", "ss_network": "lora"})  # fmt: skip
    facts = PatchFacts.of(odd)
    assert (facts.settings, facts.concepts, facts.seed, facts.request) == ({}, (), None, {})


# -- bad input, bad places ------------------------------------------------------------------------------------------


def test_what_is_no_report_is_refused(report):
    with pytest.raises(RequestError, match="nothing was measured"):
        Report("Empty", report.provenance)
    with pytest.raises(RequestError, match="no title"):
        Report(" ", report.provenance, report.evaluations)
    with pytest.raises(RequestError, match="no scores of the patched model"):
        one = evaluation()
        Report("x", report.provenance, (replace(one, scores={UNEDITED: one.scores[UNEDITED]}),))
    nan = Score(float("nan"), 0.0, 1.0, 3)
    for part in (
        {"erosion": (ErosionStep(1, "star", nan),)},
        {"by_kind": (KindScores("star", "plain", {PATCHED: nan}),)},
        {"attacks": (Attack("a", "star", None, nan, ""),)},
        {"attacks": (Attack("a", "star", nan, share(1), ""),)},
        {"evaluations": (replace(evaluation(), drift={PATCHED: float("inf")}),)},
    ):
        with pytest.raises(RequestError, match=r"cannot hold (nan|inf)"):
            Report("x", report.provenance, **part)
    for make in (
        lambda v: MScore("star", v, 0.0),
        lambda v: Drift("d", {"a": v}),
        lambda v: Metric("F", {"a": v}, 1, "lower"),
    ):
        with pytest.raises(RequestError, match="cannot hold inf"):
            make(float("inf"))


def test_files_are_whole_or_not_there(tmp_path, report, monkeypatch):
    html = write_report(report, tmp_path / "star.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["star.html", "star.json"]
    assert html.read_text(encoding="utf-8") == render_html(report)  # the same report is the same page
    old = html.read_bytes()

    def broken(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(ForgetConceptError, match="cannot be written: No space left on device"):
        write_report(full("other"), html)
    monkeypatch.undo()
    assert html.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["star.html", "star.json"]


def test_places_that_cannot_be_written_are_told(tmp_path, report):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ForgetConceptError, match="is a file"):
        write_report(report, tmp_path / "file")
    with pytest.raises(ForgetConceptError, match="there is no folder"):
        write_report(report, tmp_path / "none" / "x.html")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(ForgetConceptError, match="is a folder"):
        write_report(report, tmp_path / "taken.html")
    assert not (tmp_path / "taken.html").exists()
    assert write_report(report, tmp_path / "v0.5").parent.name == "v0.5"


def test_a_missing_library_is_named_with_its_pip_line(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ForgetConceptError, match=r'pip install "forget-concept\[cli\]"'):
        render_html(report)


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_it(tmp_path, report):
    """The style sheet's hash is right and the pictures are pictures: their very colours are on the screen."""
    vivid = torch.zeros(3, 64, 64, dtype=torch.uint8)
    vivid[0], vivid[1], vivid[2] = 13, 201, 77
    grid = Grid("star", "target", (Pair("a star", vivid, vivid, 1, "star", "circle"),))
    html = write_report(replace(report, pictures=(grid,)), tmp_path / "page.html")
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,1400", f"--screenshot={shot}", html.as_uri(),
        ],
        capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert shot.exists(), done.stderr[-500:]
    counts = {colour[:3]: n for n, colour in Image.open(shot).getcolors(1 << 24)}
    css = Page(html.read_text(encoding="utf-8")).all("style")[0][3]
    accents = {tuple(bytes.fromhex(c)) for c in re.findall(r"--accent: #(\w{6})", css)}
    assert any(counts.get(accent, 0) > 200 for accent in accents), "the verdict's coloured edge is not there"
    assert counts.get((13, 201, 77), 0) > 2000, "the pictures are not there"
