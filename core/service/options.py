"""The options on a host's settings page, as data; the host builds its own controls from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from ..errors import RequestError
from ..methods.registry import all_methods
from .host_interface import Host

__all__ = ["SECTION", "Option", "Settings", "options"]

SECTION = ("forget_concept", "Forget Concept")
_PREFIX = "forget_concept_"


@dataclass(frozen=True)
class Option:
    """One option; ``low``, ``high`` and ``step`` are for numbers, ``choices`` for a choice."""

    key: str
    kind: Literal["choice", "switch", "whole", "text"]
    default: Any
    label: str
    info: str = ""
    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 100
    step: int = 1


def options() -> tuple[Option, ...]:
    """Every option, in the order of the page."""
    methods = all_methods()
    return (
        Option(
            _PREFIX + "method",
            "choice",
            "uce",
            "Method that the tab starts with",
            "UCE takes seconds; the others train for minutes",
            tuple(methods),
        ),
        Option(
            _PREFIX + "preset",
            "choice",
            "tuned",
            "Preset that the tab starts with",
            "published: the authors' settings; tuned: those that did best here",
            # those of any method that is chosen above
            tuple(name for name in methods["uce"].presets if all(name in one.presets for one in methods.values())),
        ),
        Option(
            _PREFIX + "folder",
            "text",
            "forget",
            "Folder for new patches",
            "within the Lora folder; empty: the Lora folder itself",
        ),
        Option(
            _PREFIX + "precision",
            "choice",
            "float32",
            "Precision of new patches",
            "float16: half the size, and nearly always as good",
            ("float32", "float16"),
        ),
        Option(
            _PREFIX + "pairs",
            "whole",
            4,
            "Pictures before and after forgetting",
            "pairs at equal seeds; 0: none, which saves their time",
            high=16,
        ),
        Option(_PREFIX + "steps", "whole", 20, "Sampling steps of these pictures", low=1, high=150),
        Option(
            _PREFIX + "reapply",
            "switch",
            False,
            "Put patches back into a checkpoint by itself when it is loaded again",
            "switching the checkpoint takes patches out of the weights; off: the pages say so and offer to apply them",
        ),
        Option(
            _PREFIX + "hosts",
            "text",
            "",
            "Host names under which others reach this webui",
            "separated by commas; names of a local network, addresses and gradio.live need not be listed",
        ),
        Option(_PREFIX + "remember", "switch", True, "Let the tab remember what was last asked for"),
    )


@dataclass(frozen=True)
class Settings:
    """The values of the options, as the user has set them now."""

    method: str
    preset: str
    place: str
    precision: str
    pairs: int
    steps: int
    reapply: bool
    remember: bool
    hosts: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where new patches go. Raises :class:`RequestError` where that is not within the LoRA folder."""
        folder = self.place.strip().replace("\\", "/").strip("/")
        if ".." in PurePath(folder).parts or ":" in folder:
            raise RequestError(
                f"The folder for new patches on the settings page, '{folder}', must lie within the Lora folder."
            )
        return folder

    @classmethod
    def of(cls, host: Host) -> Settings:
        """Read every option from the host."""
        found = {option.key.removeprefix(_PREFIX): host.option(option.key) for option in options()}
        return cls(
            str(found["method"]),
            str(found["preset"]),
            str(found["folder"] or ""),
            str(found["precision"]),
            int(found["pairs"]),
            int(found["steps"]),
            bool(found["reapply"]),
            bool(found["remember"]),
            tuple(name.strip().casefold() for name in str(found["hosts"] or "").split(",") if name.strip()),
        )
