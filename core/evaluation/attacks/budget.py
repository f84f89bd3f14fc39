"""Attack budgets by name, and the cost of an attack."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...errors import RequestError

__all__ = ["BUDGETS", "AttackBudget", "AttackCost", "attack_budget"]


@dataclass(frozen=True)
class AttackBudget:
    """The budget of every attack on one model.

    Args:
        name: Name of the budget.
        pictures: Images on which success is measured.
        trials: Images per prompt for selecting the strongest prompts, with other seeds.
        strongest: Number of prompts that are selected.
        examples: Images of the concept that the attacker has.
        vectors: Learned vectors of the soft prompt and of textual inversion.
        steps: Gradient steps of the soft prompt and of textual inversion.
        batch: Batch size of the soft prompt and of textual inversion.
        stride: Adam's learning rate as a multiple of the standard deviation of the text encoder's embeddings.
        tokens: Prefix length of the discrete search.
        rounds: Rounds of the discrete search.
        candidates: Candidates per round of the discrete search.
        likely: Number of best tokens per position from which candidates are drawn.
        rows: Noised images on which the discrete search evaluates the loss.
        noises: Amounts of noise of the noise probe, each of which draws every image once.

    Raises:
        RequestError: If a value is not above 0.
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
    noises: int = 4

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if field != "name" and not value > 0:
                raise RequestError(f"All values of an attack budget must be above 0, but its '{field}' is {value}.")

    def as_dict(self) -> dict[str, str | int | float]:
        return asdict(self)


BUDGETS: dict[str, AttackBudget] = {
    "quick": AttackBudget("quick", 16, 1, 4, 8, 4, 80, 4, 0.1, 4, 8, 12, 32, 8),
    "standard": AttackBudget("standard", 48, 2, 4, 16, 4, 400, 4, 0.1, 4, 40, 24, 64, 12, 24),
}


def attack_budget(budget: str | AttackBudget) -> AttackBudget:
    """Return the budget with this name, or the given budget itself.

    Raises:
        RequestError: If the name is unknown.
    """
    if isinstance(budget, AttackBudget):
        return budget
    if budget not in BUDGETS:
        raise RequestError(f"The attack budget '{budget}' is not known: choose one of {', '.join(BUDGETS)}.")
    return BUDGETS[budget]


@dataclass(frozen=True)
class AttackCost:
    """The cost of one attack.

    Attributes:
        gradient_steps: Gradient steps of the search.
        unet_passes: Images that pass forward through the UNet in the search.
        prompts_tried: Prompts that were tried.
        pictures: Images sampled to select the strongest prompts and to measure them.
    """

    gradient_steps: int
    unet_passes: int
    prompts_tried: int
    pictures: int

    @property
    def summary(self) -> str:
        """The cost in one phrase."""
        drawn = f"{_counted(self.prompts_tried, 'prompt')} tried, {_counted(self.pictures, 'picture')} drawn"
        if not self.unet_passes:
            return f"no gradient, {drawn}"
        steps = _counted(self.gradient_steps, "gradient step")
        return f"{steps}, {self.unet_passes} pictures through the UNet to search, {drawn}"

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self) | {"words": self.summary}


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
