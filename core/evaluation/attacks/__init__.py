"""Adversarial recall: attacks that try to recover a forgotten concept, each with an explicit budget."""

from __future__ import annotations

from .budget import BUDGETS, AttackBudget, AttackCost, attack_budget
from .context import AttackContext, SearchResult
from .judge import ProbeJudge, SuccessJudge
from .result import AttackReport, AttackResult, PromptSuccess
from .run import ATTACKS, BEYOND_TEXT, WHITE_BOX, run_attacks
from .target import Target

__all__ = [
    "ATTACKS",
    "BEYOND_TEXT",
    "BUDGETS",
    "WHITE_BOX",
    "AttackBudget",
    "AttackContext",
    "AttackCost",
    "AttackReport",
    "AttackResult",
    "ProbeJudge",
    "PromptSuccess",
    "SearchResult",
    "SuccessJudge",
    "Target",
    "attack_budget",
    "run_attacks",
]
