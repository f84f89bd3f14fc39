"""What an attack wants back: the concept, prompts that name it, and prompts that mean it without its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import RequestError
from ...mini import vocabulary as v
from ...request.concept import Concept, templates
from ..scores import find_concept

__all__ = ["Target", "with_name"]

# what is shown in a style that is asked for in other words
_SUBJECT, _OTHER_SUBJECT = "a house", "a cup"


def _named(name: str) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, name.split())) + r"(?!\w)", re.IGNORECASE)


def with_name(prompt: str, name: str, instead: str) -> str:
    """``prompt`` with every occurrence of ``name`` written as ``instead``."""
    return _named(name).sub(lambda _: instead, prompt)


@dataclass(frozen=True)
class Target:
    """The concept under attack. ``prompts`` say its name; ``paraphrases`` do not, and mean it all the same."""

    concept: Concept
    prompts: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises :class:`RequestError` where a prompt does not name the concept or a paraphrase does."""
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(self.prompts)))
        object.__setattr__(self, "paraphrases", tuple(dict.fromkeys(self.paraphrases)))
        name = self.concept.name
        if not name.strip():
            raise RequestError("There is no concept to attack: name it.")
        if not self.prompts:
            raise RequestError(f"There is no prompt to attack '{name}' with: give at least one that names it.")
        for prompt in self.prompts:
            if not _named(name).search(prompt):
                raise RequestError(f"The prompt '{prompt}' does not name '{name}', as an attack's own prompts must.")
        for prompt in self.paraphrases:
            if not prompt.strip() or _named(name).search(prompt):
                raise RequestError(f"'{prompt}' is no paraphrase of '{name}': it must be words without that name.")

    @classmethod
    def named(cls, concept: Concept, paraphrases: Sequence[str] = ()) -> Target:
        """Any model's concept, in the templates of its kind; paraphrases have to be given."""
        prompts = tuple(template.format(concept.name) for template in templates(concept.kind))
        return cls(concept, prompts, tuple(paraphrases))

    @classmethod
    def embedded(cls, name: str) -> Target:
        """A concept of the embedded model's world, with that world's own synonyms and word-free descriptions.

        Raises :class:`RequestError` for one that the world does not hold.
        """
        name, category = find_concept(name)
        word = v.find(name)[1]
        concept = Concept(name, category)
        if category == "style":
            prompts = tuple(template.format(style=name) for template in v.TEMPLATES_STYLE_ONLY)
            said = [template.format(style=word.synonym) for template in v.TEMPLATES_STYLE_ONLY]
            said += [template.format(np=_SUBJECT, style=word.synonym) for template in v.TEMPLATES_STYLED[:4]]
            for subject in (_SUBJECT, _OTHER_SUBJECT):
                said += [
                    template.format(np=subject, style=word.description) for template in v.TEMPLATES_DESCRIBED_STYLE
                ]
            return cls(concept, prompts, tuple(said))
        plain = v.TEMPLATES_PLAIN[:4]
        shown, synonym = ((f"{v.article(w)} {w}" if category == "object" else w) for w in (name, word.synonym))
        said = [template.format(np=noun) for template in plain for noun in (synonym, word.description)]
        if category == "object":
            said += [
                template.format(np=f"{word.description} in {c}") for template, c in zip(plain, v.COLOURS, strict=False)
            ]
        return cls(concept, tuple(template.format(np=shown) for template in plain), tuple(said))
