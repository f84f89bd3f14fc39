"""One language: identifiers that STYLE's glossary replaced do not come back, and prose stays plain."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# replaced by: replace_phrase, RETAIN_POOL, ProgressText, RequestRecord, JointRequests, HostLatentDiffusion,
# host weights, detached_view, BatchSampler, null_space_projection, retain_basis, captured activations, AttackContext,
# Evaluators, PatchStore, job heartbeat, required_request_inputs, optional_request_inputs, fit_context,
# usual_size_and_guidance, PLAIN_DTYPES, ConceptPreview, fisher_measurement, differentiable_copy, RequestSequence,
# fullest_request, _check_inputs, _retain_queue, _LinearCapture, _earlier_loss, _matching_loss, _with_phrases,
# _learn_vectors, _check_replacement, _side_loss, retain_pool, check_captured, _DenoisingObjective, _restore, _type_name
REPLACED = frozenset(
    [
        "said_instead",
        "KEPT",
        "Story",
        "story",
        "Asked",
        "Together",
        "requested",
        "lending",
        "LentDiffusion",
        "laundered",
        "Material",
        "material",
        "blind_projection",
        "kept_basis",
        "site_outputs",
        "SiteRecorder",
        "AttentionRecorder",
        "Recorder",
        "Ground",
        "ground",
        "Instruments",
        "instruments",
        "_Heart",
        "Desk",
        "desk",
        "desk_of",
        "about_patch",
        "base_words",
        "history_words",
        "share_words",
        "concepts_in",
        "takes_back",
        "should_stop",
        "FEWEST_IMAGES",
        "Forgetting",
        "Evaluating",
        "asked_inputs",
        "more_inputs",
        "at_work",
        "habits",
        "PLAIN",
        "_InWords",
        "_carried",
        "_lent",
        "Fading",
        "asked_fisher",
        "opened_text",
        "_complain",
        "_quieten",
        "SPOKEN",
        "doomed",
        "Course",
        "dealt",
        "_refuse_without_use",
        "_kept_turn",
        "_Taps",
        "_as_earlier",
        "_matched",
        "_in_place",
        "_inverted",
        "_refuse_the_same",
        "_of_side",
        "any_pool",
        "check_seen",
        "_Denoising",
        "_restored",
        "_spoken",
    ]
)


def sources() -> list[Path]:
    folders = ("core", "nodes", "sd_webui_ext", "scripts", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def identifiers(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME} | {*path.with_suffix("").parts}


def test_identifiers_of_the_old_language_are_gone() -> None:
    found = {str(path.relative_to(ROOT)): found for path in sources() if (found := identifiers(path) & REPLACED)}
    assert not found


def prose(path: Path) -> str:
    """Docstrings, messages and comments of a Python file."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return "\n".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize("phrase", [r"\bshall\b", r"nobody's business", r"\bbit for bit\b", r"\blaunder", r"\blent\b"])
def test_prose_is_plain(phrase: str) -> None:
    found = [path.relative_to(ROOT) for path in sources() if re.search(phrase, prose(path), re.IGNORECASE)]
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found += [path.relative_to(ROOT) for path in documents if re.search(phrase, path.read_text(encoding="utf-8"))]
    assert not found
