"""Target of an attack: the concept, prompts that name it, and paraphrases without its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import RequestError
from ...mini import vocabulary as v
from ...request.concept import Concept, templates
from ..questions import find_concept

__all__ = ["Target", "with_name"]

# subjects of the paraphrases of a style
_SUBJECT, _OTHER_SUBJECT = "a house", "a cup"


def _named(name: str) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, name.split())) + r"(?!\w)", re.IGNORECASE)


def with_name(prompt: str, name: str, replacement: str) -> str:
    """Return ``prompt`` with every occurrence of ``name`` replaced by ``replacement``."""
    return _named(name).sub(lambda _: replacement, prompt)


@dataclass(frozen=True)
class Target:
    """The concept under attack.

    Args:
        concept: The concept.
        prompts: Prompts that contain its name.
        paraphrases: Prompts that describe it without its name.

    Raises:
        RequestError: If a prompt does not name the concept, or a paraphrase does.
    """

    concept: Concept
    prompts: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(self.prompts)))
        object.__setattr__(self, "paraphrases", tuple(dict.fromkeys(self.paraphrases)))
        name = self.concept.name
        if not name.strip():
            raise RequestError("There is no concept to attack: name it.")
        if not self.prompts:
            raise RequestError(f"There is no prompt to attack '{name}' with: give at least one that names it.")
        for prompt in self.prompts:
            if not _named(name).search(prompt):
                raise RequestError(f"The prompt '{prompt}' does not name '{name}': give it as a paraphrase instead.")
        for prompt in self.paraphrases:
            if not prompt.strip() or _named(name).search(prompt):
                raise RequestError(f"'{prompt}' is not a paraphrase of '{name}': give one that does not name it.")

    @classmethod
    def named(cls, concept: Concept, paraphrases: Sequence[str] = ()) -> Target:
        """Create a target for any model, with the templates of the concept's kind as prompts."""
        prompts = tuple(template.format(concept.name) for template in templates(concept.kind))
        return cls(concept, prompts, tuple(paraphrases))

    @classmethod
    def embedded(cls, name: str) -> Target:
        """Create a target in the embedded model's world, with its synonyms and descriptions as paraphrases.

        Raises:
            RequestError: If the world does not contain the concept.
        """
        name, category = find_concept(name)
        word = v.find(name)[1]
        concept = Concept(name, category)
        if category == "style":
            prompts = tuple(template.format(style=name) for template in v.TEMPLATES_STYLE_ONLY)
            paraphrases = [template.format(style=word.synonym) for template in v.TEMPLATES_STYLE_ONLY]
            paraphrases += [template.format(np=_SUBJECT, style=word.synonym) for template in v.TEMPLATES_STYLED[:4]]
            for subject in (_SUBJECT, _OTHER_SUBJECT):
                paraphrases += [
                    template.format(np=subject, style=word.description) for template in v.TEMPLATES_DESCRIBED_STYLE
                ]
            return cls(concept, prompts, tuple(paraphrases))
        plain = v.TEMPLATES_PLAIN[:4]
        shown, synonym = ((f"{v.article(w)} {w}" if category == "object" else w) for w in (name, word.synonym))
        paraphrases = [template.format(np=noun) for template in plain for noun in (synonym, word.description)]
        if category == "object":
            paraphrases += [
                template.format(np=f"{word.description} in {c}") for template, c in zip(plain, v.COLOURS, strict=False)
            ]
        return cls(concept, tuple(template.format(np=shown) for template in plain), tuple(paraphrases))
