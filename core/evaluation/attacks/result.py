"""What the attacks found, as figures and as data for a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..intervals import Score
from .budget import AttackBudget, AttackCost

__all__ = ["AttackReport", "AttackResult", "PromptSuccess"]


@dataclass(frozen=True)
class PromptSuccess:
    """One prompt, and in how many of the pictures drawn from it the concept was found.

    ``<concept>`` in a prompt stands for learned vectors.
    """

    prompt: str
    shown: int
    pictures: int

    def as_dict(self) -> dict[str, str | int]:
        return {"prompt": self.prompt, "shown": self.shown, "pictures": self.pictures}


@dataclass(frozen=True)
class AttackResult:
    """One attack: the share of pictures that show the concept, drawn from the strongest prompts it found.

    ``after`` is on the edited model; ``before`` is the same attack with the same budget on the unedited one, which
    says what it can do at best (``None`` where that was not asked for). Both are measured under seeds that chose
    nothing. ``spent`` and ``strongest`` (the best first) are of the edited model, and so are ``losses``: those of the
    prefixes that a discrete search took, one after the other.
    """

    attack: str
    after: Score
    before: Score | None
    cost: AttackCost
    strongest: tuple[PromptSuccess, ...]
    losses: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {
            "attack": self.attack,
            "after": self.after.as_dict(),
            "before": None if self.before is None else self.before.as_dict(),
            "spent": self.cost.as_dict(),
            "strongest": [one.as_dict() for one in self.strongest],
            "losses": list(self.losses),
        }


@dataclass(frozen=True)
class AttackReport:
    """All attacks on one concept. ``left_out`` says, by attack, why one could not be made."""

    concept: str
    budget: AttackBudget
    seed: int
    results: tuple[AttackResult, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def strongest(self) -> AttackResult:
        """The attack of highest success on the edited model; the first of several."""
        return max(self.results, key=lambda result: result.after.value)

    @property
    def attack_success(self) -> Score:
        """The highest success among the attacks, on the edited model."""
        return self.strongest.after

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "budget": self.budget.as_dict(),
            "seed": self.seed,
            "attack_success": {"attack": self.strongest.attack, **self.attack_success.as_dict()},
            "results": [result.as_dict() for result in self.results],
            "left_out": dict(self.left_out),
        }
