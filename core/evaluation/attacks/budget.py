"""What an attack may spend, by name, and what one has spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...errors import RequestError

__all__ = ["BUDGETS", "AttackBudget", "AttackCost", "attack_budget"]


@dataclass(frozen=True)
class AttackBudget:
    """How much every attack may spend on one model.

    - ``pictures``: that success is measured on; ``trials``: pictures of each prompt that choose the ``strongest`` ones
      before, under other seeds;
    - ``examples``: pictures of the concept the attacker has;
    - ``vectors``, ``steps``, ``batch``: of a soft prompt and of textual inversion; a step moves a vector by about
      ``stride`` of the spread of the text encoder's own ones (Adam's learning rate is that times this spread);
    - ``tokens``, ``rounds``, ``candidates``, ``likely``, ``rows``: of the discrete search; each round tries so many
      candidates, drawn from the ``likely`` best tokens of each place, on so many noised pictures.
    """

    name: str
    pictures: int
    trials: int
    strongest: int
    examples: int
    vectors: int
    steps: int
    batch: int
    stride: float
    tokens: int
    rounds: int
    candidates: int
    likely: int
    rows: int

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if field != "name" and not value > 0:
                raise RequestError(f"An attack's budget must be above 0 in everything, and its '{field}' is {value}.")

    def as_dict(self) -> dict[str, str | int | float]:
        return asdict(self)


BUDGETS: dict[str, AttackBudget] = {
    "quick": AttackBudget("quick", 16, 1, 4, 8, 4, 80, 4, 0.1, 4, 8, 12, 32, 8),
    "standard": AttackBudget("standard", 48, 2, 4, 16, 4, 400, 4, 0.1, 4, 40, 24, 64, 12),
}


def attack_budget(budget: str | AttackBudget) -> AttackBudget:
    """The budget of a name, or the budget itself. Raises :class:`RequestError` for an unknown name."""
    if isinstance(budget, AttackBudget):
        return budget
    if budget not in BUDGETS:
        raise RequestError(f"The attack budget '{budget}' is not known: choose one of {', '.join(BUDGETS)}.")
    return BUDGETS[budget]


@dataclass(frozen=True)
class AttackCost:
    """What one attack took: steps along a gradient, pictures through the UNet in its search (forward), prompts that
    were tried, and pictures drawn to choose among these and to measure the strongest."""

    gradient_steps: int
    unet_passes: int
    prompts_tried: int
    pictures: int

    @property
    def summary(self) -> str:
        """The same as a phrase."""
        drawn = f"{_counted(self.prompts_tried, 'prompt')} tried, {_counted(self.pictures, 'picture')} drawn"
        if not self.unet_passes:
            return f"no gradient, {drawn}"
        steps = _counted(self.gradient_steps, "gradient step")
        return f"{steps}, {self.unet_passes} pictures through the UNet to search, {drawn}"

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self) | {"words": self.summary}


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
