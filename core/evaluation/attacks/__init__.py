"""Adversarial recall: attacks that try to bring a forgotten concept back, each with its budget stated."""

from __future__ import annotations

from .budget import BUDGETS, AttackBudget, Spent, attack_budget
from .context import AttackContext, Found
from .judge import ProbeJudge, SuccessJudge
from .result import AttackReport, AttackResult, PromptSuccess
from .run import ATTACKS, WHITE_BOX, run_attacks
from .target import Target

__all__ = [
    "ATTACKS",
    "BUDGETS",
    "WHITE_BOX",
    "AttackBudget",
    "AttackContext",
    "AttackReport",
    "AttackResult",
    "Found",
    "ProbeJudge",
    "PromptSuccess",
    "Spent",
    "SuccessJudge",
    "Target",
    "attack_budget",
    "run_attacks",
]
