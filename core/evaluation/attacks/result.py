"""Results of attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..intervals import Score
from .budget import AttackBudget, AttackCost

__all__ = ["AttackReport", "AttackResult", "PromptSuccess"]


@dataclass(frozen=True)
class PromptSuccess:
    """A prompt, the number ``pictures`` of images sampled from it, and the number ``shown`` that show the concept.

    ``<concept>`` in a prompt is the placeholder of learned vectors.
    """

    prompt: str
    shown: int
    pictures: int

    def as_dict(self) -> dict[str, str | int]:
        return {"prompt": self.prompt, "shown": self.shown, "pictures": self.pictures}


@dataclass(frozen=True)
class AttackResult:
    """Success of one attack: the proportion of images from its strongest prompts that show the concept.

    Success is measured with other seeds than those that select the prompts.

    Attributes:
        attack: Name of the attack.
        after: Success on the edited model.
        before: Success of the same attack with the same budget on the unedited model, an upper bound; ``None`` if not
            measured.
        cost: Cost on the edited model.
        strongest: The strongest prompts on the edited model, best first.
        losses: Losses of the prefixes that the discrete search accepted on the edited model, in order.
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
    """Results of all attacks on one concept; ``left_out`` gives the reason for each attack that could not run."""

    concept: str
    budget: AttackBudget
    seed: int
    results: tuple[AttackResult, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def strongest(self) -> AttackResult:
        """The attack with the highest success on the edited model; the first of several equals."""
        return max(self.results, key=lambda result: result.after.value)

    @property
    def attack_success(self) -> Score:
        """The highest success of any attack on the edited model."""
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
