"""The documents are true where a program can tell: links, commands, code, requests, routes and figures."""

from __future__ import annotations

import ast
import csv
import importlib
import itertools
import json
import re
import runpy
import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from forget_concept.core.cli import COMMANDS, build_parser
from forget_concept.core.evaluation.intervals import wilson
from forget_concept.core.methods.registry import get
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
MOST_WORDS = 1200

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_LINK = re.compile(r"!?\[(?:[^\]\[]|`[^`]*`)*\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text, and where it is for a failing test to say."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text.strip().splitlines()[0][:60]}"


def blocks(language: str | None = None) -> list[Block]:
    found = [Block(page, *match.groups()) for page in PAGES for match in _FENCE.finditer(text_of(page))]
    return [block for block in found if language is None or block.language == language]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def commands(program: str) -> Iterator[tuple[Block, list[str]]]:
    """The arguments of every call of ``program`` in a fenced block without a language."""
    for block in blocks(""):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            # the prompt of a terminal, variables that are set for one command, and where its output goes
            words = shlex.split(line.removeprefix("$ "), comments=True) if program in line else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == [program]:
                yield block, list(itertools.takewhile(lambda word: word != ">", words[1:]))


# -- README ---------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(text_of(README).split()) <= MOST_WORDS


def test_the_readme_begins_with_a_sentence_and_a_picture():
    title, sentence, picture = text_of(README).split("\n\n")[:3]
    assert title.startswith("# ")
    assert sentence.endswith(".")
    assert picture.startswith("![") and "docs/before_after.png" in picture


def test_the_readme_links_every_page_of_the_documentation():
    linked = set(_LINK.findall(text_of(README)))
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= linked


# -- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for target in _LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        inside = place.is_relative_to(ROOT) and place.exists()
        if not inside or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


# -- commands -------------------------------------------------------------------------------------------------------


def test_every_command_is_one_that_the_command_line_takes():
    found = list(commands("forget-concept"))
    assert len(found) >= 10
    for block, words in found:
        try:
            args = build_parser().parse_args(words)
        except Exception as error:
            pytest.fail(f"{block}: forget-concept {shlex.join(words)}: {error}")
        method = getattr(args, "method", None)
        if method is not None:
            assert (getattr(args, "preset", None) or "tuned") in get(method).presets, f"{block}: {words}"


def options_of(command: str) -> set[str]:
    (subcommands,) = (action for action in build_parser()._actions if action.dest == "command")
    return set(subcommands.choices[command]._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_running_text_exists_with_its_options(page):
    for code in _INLINE.findall(prose_of(page)):
        words = code.split()
        if words[0] != "forget-concept" or len(words) == 1 or words[1].startswith("--"):
            continue
        assert words[1] in COMMANDS, code
        unknown = {word for word in words if word.startswith("--")} - options_of(words[1])
        assert not unknown, code


def test_the_command_line_page_lists_every_command_with_its_keys():
    page = text_of(DOCS / "cli.md")
    assert re.findall(r"^\| `forget-concept ([\w-]+)` \|", page, re.MULTILINE) == [
        *("demo", "forget", "restore", "generate", "evaluate", "bench", "inspect"),
        *("themes", "methods", "mini-table", "export"),
    ]
    assert set(re.findall(r"^\| `([\w-]+)` \| `schema`", page, re.MULTILINE)) == set(COMMANDS)


def test_every_make_target_exists():
    rules = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    found = {words[0] for _, words in commands("make")}
    for page in PAGES:
        found |= set(re.findall(r"`make ([\w-]+)", prose_of(page)))
    assert {"demo", "test"} <= found <= rules


def test_every_benchmark_is_a_script_that_takes_its_options():
    written: list[list[str]] = [words for _, words in commands("python") if words[0].startswith("benchmarks/")]
    for page in PAGES:
        written += [code.split()[1:] for code in _INLINE.findall(prose_of(page)) if code.startswith("python bench")]
    assert {Path(words[0]).name for words in written} >= {"forgetting.py", "methods.py", "continual.py"}
    for script, *words in written:
        constants = {
            node.value
            for node in ast.walk(ast.parse(text_of(ROOT / script)))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert {word for word in words if word.startswith("--")} <= constants, (script, words)


def test_every_table_of_a_benchmark_is_explained():
    page = text_of(DOCS / "benchmarks.md")
    assert not [file.name for file in BENCHMARKS.glob("*.csv") if file.name not in page]


# -- code -----------------------------------------------------------------------------------------------------------


# api.md is generated from docstrings, whose examples run as doctests, and shows signatures that are no code
WRITTEN = [block for block in blocks("python") if block.page.name != "api.md"]


@pytest.mark.parametrize("block", WRITTEN, ids=str)
def test_python_compiles_and_imports_what_is_there(block):
    for node in ast.walk(compile(block.text, str(block), "exec", ast.PyCF_ONLY_AST)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("forget_concept"):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.long
def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    (block,) = [block for block in blocks("python") if block.page == README]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.py").write_text(block.text, encoding="utf-8")
    runpy.run_path("readme.py")
    assert (tmp_path / "no-star.safetensors").stat().st_size > 100_000
    assert "value=" in capsys.readouterr().out


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_parses_and_requests_are_requests(block):
    if "concepts" in json.loads(block.text):
        ForgetRequest.from_json(block.text).check()


def test_the_webui_page_lists_every_route():
    source = text_of(ROOT / "sd_webui_ext" / "api.py")
    made = re.findall(r"@router\.(get|post|delete)\(\s*\"([^\"]+)\"", source)
    routes = {(verb.upper(), re.sub(r"\{\w+\}", "{}", path)) for verb, path in made}
    listed = re.findall(r"`(GET|POST|DELETE) (/[^`]+)`", text_of(DOCS / "webui.md"))
    assert {(verb, re.sub(r"\{\w+\}", "{}", path)) for verb, path in listed} == routes


def test_the_comfyui_page_lists_every_workflow():
    files = {file.stem for file in (ROOT / "example_workflows").glob("*.json")}
    assert set(re.findall(r"^\| `(\w+)` \|", text_of(DOCS / "comfyui.md"), re.MULTILINE)) == files


# -- figures --------------------------------------------------------------------------------------------------------


def rows(name: str) -> list[dict[str, str]]:
    with (BENCHMARKS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def share(value: str, n: str | int) -> str:
    """A share with its 95 % interval, as the tables give it."""
    low, high = wilson(round(float(value) * int(n)), int(n))
    return f"{float(value):.2f} ({low:.2f} – {high:.2f})"


def line_of_results(row: dict[str, str]) -> str:
    """A line of the README's table of results."""
    cells = [f"{row['concept']} ({row['category']})", row["replacement"] or "none"]
    cells += [share(row["ua"], row["n"]), share(row["shown_wordings"], row["n_wordings"])]
    cells += [f"{float(row[name]):.2f}" for name in ("ira", "cra", "kept_wordings", "ua_0.7")]
    return f"| {' | '.join(cells)} |"


def line_of_stress(strengths: list[dict[str, str]]) -> str:
    """A line of the table of stress tests, from the rows of one patch at its strengths."""
    full = strengths[0]
    assert [float(row["strength"]) for row in strengths] == [1, 0.7, 0.5]
    cells = [f"{full['concept']} ({full['category']})", full["replacement"] or "none"]
    cells += [f"{float(full['shown_unedited']):.2f}"]
    cells += [f"{float(row['shown']):.2f} / {float(row['shown_second']):.2f}" for row in strengths]
    cells += [f"{float(full[name]):.2f}" for name in ("kept", "kept_of_its_kind")]
    return f"| {' | '.join(cells)} |"


def line_of_factor(method: str, factor: str, found: list[dict[str, str]]) -> str:
    """A line of the table of learning rates, from the rows of one method and factor."""
    scores = [" / ".join(f"{float(row[part]):.2f}" for row in found) for part in ("ua", "ira", "cra")]
    lr = get(method).presets["published_scaled"].lr
    return f"| `{method}` | {factor} ({lr:g}) | {' | '.join(scores)} |"


def test_the_table_of_learning_rates_has_the_chosen_factors():
    text, by_factor = text_of(DOCS / "benchmarks.md"), defaultdict(list)
    for row in rows("learning_rates.csv"):
        by_factor[row["method"], row["factor"], float(row["lr"])].append(row)
    for method in ("forget_me_not", "duge", "selective_amnesia"):
        chosen = get(method).presets["published_scaled"].lr
        ((key, found),) = [
            (key, found) for key, found in by_factor.items() if key[0] == method and key[2] == pytest.approx(chosen)
        ]
        found = sorted(found, key=lambda row: ["tree", "mosaic", "Hugo Marsh"].index(row["concept"]))
        assert len(found) == 3 and line_of_factor(method, key[1], found) in text


def test_the_table_of_stress_tests_is_that_of_the_benchmark():
    text, by_patch = text_of(DOCS / "benchmarks.md"), defaultdict(list)
    for row in rows("stress.csv"):
        by_patch[row["concept"], row["replacement"]].append(row)
    assert len(by_patch) == 12
    for strengths in by_patch.values():
        assert line_of_stress(strengths) in text


def test_the_readmes_results_are_those_of_the_benchmark():
    """With a replacement and without one, in other wordings and at a lower strength."""
    text = text_of(README)
    found = [row for row in rows("methods.csv") if (row["method"], row["preset"]) == ("uce", "tuned")]
    assert len(found) == 6 and {row["n"] for row in found} == {"100"}
    for row in found:
        assert line_of_results(row) in text


def line_beyond_text(probe: str, found: list[dict[str, str]]) -> str:
    """A line of the table of probes beyond the prompt: the four models, each with the three concepts."""
    cells = []
    for method, replaced in (("unedited", False), ("retrained", False), ("uce", True), ("uce", False)):
        mine = [
            r for r in found if r["method"] == method and bool(r["replacement"]) == replaced and r["probe"] == probe
        ]
        cells.append(" / ".join(f"{float(row['shown']):.2f}" for row in mine) or "–")
    return f"| {probe} | {' | '.join(cells)} |"


def test_the_table_beyond_the_prompt_is_that_of_the_benchmark():
    text, found = text_of(DOCS / "benchmarks.md"), rows("beyond_text.csv")
    probes = list(dict.fromkeys(row["probe"] for row in found))
    assert {"completion", "inpainting", "latent_inversion", "noise_probe", "several", "fine-tuned"} <= set(probes)
    for probe in probes:
        assert line_beyond_text(probe, found) in text


def test_the_results_are_those_of_the_benchmark():
    text, patched = (
        text_of(DOCS / "benchmarks.md"),
        [row for row in rows("forgetting.csv") if row["variant"] == "patched"],
    )
    assert len(patched) == 6
    for row in patched:
        assert (row["method"], row["preset"], row["n"]) == ("uce", "tuned", "200")
        cells = [
            f"{float(row[part]):.2f} ({float(row[part + '_low']):.2f} – {float(row[part + '_high']):.2f})"
            for part in ("ua", "ira", "cra", "cra_target")
        ]
        line = " | ".join([f"{row['concept']} ({row['category']})", row["replacement"], *cells])
        assert f"| {line} |" in text


def test_the_table_of_methods_is_that_of_the_benchmark():
    text = text_of(DOCS / "benchmarks.md")
    titles = {"negative_prompt": "negative prompt", "safe_guidance": "Safe Latent Diffusion", "retrained": "retrained"}
    by_method: dict[str, list[dict[str, str]]] = {}
    for row in rows("methods.csv"):
        if row["method"] != "none":
            title = titles.get(row["method"], f"`{row['method']}` {row['preset']}")
            if row["preset"] == "tuned" and not row["replacement"]:
                title += ", no replacement"
            by_method.setdefault(title, []).append(row)
    for title, found in by_method.items():
        assert [row["concept"] for row in found] == ["star", "neon", "Lena Frost"]
        columns: list[list[float | None]] = [
            [float(row[part]) for row in found] for part in ("ua", "ira", "cra", "drift")
        ]
        for attacks in (("rephrased", "homoglyphs", "discrete"), ("soft_prompt", "inversion_recall")):
            # a row whose UA is low is not attacked
            shares = [[float(row[f"attack_{name}"]) for name in attacks if row[f"attack_{name}"]] for row in found]
            columns.append([max(each) if each else None for each in shares])
        cells = [" / ".join("–" if value is None else f"{value:.2f}" for value in column) for column in columns]
        assert f"| {' | '.join([title, *cells])} |" in text


def test_the_table_of_attacks_agrees_with_the_benchmark():
    """Its first and last columns: the unedited model, and the patch that preserves the whole category."""
    text = text_of(DOCS / "benchmarks.md")
    found = {
        row["method"]: row
        for row in rows("methods.csv")
        if row["concept"] == "star" and row["preset"] != "published" and (row["replacement"] or not row["preset"])
    }
    for name, title in (
        ("rephrased", "rephrased"),
        ("homoglyphs", "other spellings"),
        ("discrete", "words found along the gradient"),
        ("soft_prompt", "learned vectors before the prompt"),
        ("inversion_recall", "textual inversion"),
    ):
        before, after = (float(found[method][f"attack_{name}"]) for method in ("none", "uce"))
        assert re.search(rf"^\| {title} \| {before:.2f} \| .* \| {after:.2f} \(", text, re.MULTILINE), title


def test_the_table_of_gradient_rules_is_that_of_the_benchmark():
    text = text_of(DOCS / "benchmarks.md")
    found = [row for row in rows("gradients.csv") if (row["method"], row["concept"]) == ("forget_me_not", "star")]
    for rule in ("sum", "restricted", "restricted_step"):
        mine = [row for row in found if row["gradient"] == rule and row["backtracks"] in ("", "2")]
        cells = []
        for optimiser in ("adamw", "sgd"):
            ordered = sorted((row for row in mine if row["optimiser"] == optimiser), key=lambda row: -float(row["lr"]))
            assert len(ordered) == 3
            cells.append(" / ".join(f"{float(row['either_rose']):.2f}" for row in ordered))
        assert f"| {' | '.join([f'`{rule}`', *cells])} |" in text


# -- files for the repository ---------------------------------------------------------------------------------------


def loaded(place: str) -> dict:
    return yaml.safe_load(text_of(ROOT / place))


def test_the_citation_is_of_this_version():
    citation = loaded("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The forget-concept developers"}]
    assert (citation["version"], citation["license"]) == (VERSION, "MIT")


def test_the_workflow_runs_what_ci_runs_on_three_pythons():
    job = loaded(".github/workflows/test.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.12", "3.13"]
    assert job["steps"][-1]["run"] == "bash .ci/run"
    # the Makefile's variables
    makefile = text_of(ROOT / "Makefile")
    assert all(re.search(rf"^{name} \?=", makefile, re.MULTILINE) for name in job["env"])


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_github_wants(name):
    form = loaded(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"checkboxes", "dropdown", "input", "textarea"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert all(field["attributes"]["options"] for field in fields if field["type"] == "dropdown")


def test_hooks_are_pinned():
    for repository in loaded(".pre-commit-config.yaml")["repos"]:
        assert re.fullmatch(r"v\d+\.\d+\.\d+", repository["rev"])
        assert repository["hooks"]
