"""Held-out wordings: questions, possessives, tags and others, whose words no fit uses.

The prompts of a fit and those of most measurements share their templates. A patch that fits the templates and not the
concept would pass; here it fails. Each wording has templates for every category, filled with a concept's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..mini.vocabulary import article
from ..mini.world import Labels, Prompt
from ..request.concept import canonical_phrase, normalized_phrase
from .questions import Question, seed_of

__all__ = ["WORDINGS", "plural", "typo", "wording_questions"]

# {name}: the concept; {a}: with its article, objects half of the time with a colour; {names}: plural; {typo}: two
# letters swapped; {other}: another concept of its category; {subject}: an object, which a style is put on
COLOURS = ("red", "yellow", "green", "blue", "purple")

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "question": {
        "object": ("can you draw {a}?", "may i see {a}, please?"),
        "style": ("can you render {subject} as {name}?", "how would {subject} appear in {name}?"),
        "identity": ("who is {name}?", "may i see {name}, please?"),
    },
    "possessive": {
        "object": ("my neighbour's {name}", "grandma's favourite {name}"),
        "style": ("{name}'s version of {subject}", "{subject} with {name}'s charm"),
        "identity": ("{name}'s face", "{name}'s selfie"),
    },
    "tags": {
        "object": ("{name}, solo, sharp focus, 4k", "masterpiece, {name}, simple"),
        "style": ("{subject}, {name}, sharp focus, 4k", "masterpiece, {name}, {subject}"),
        "identity": ("{name}, solo, sharp focus, 4k", "masterpiece, {name}, simple"),
    },
    "two subjects": {
        "object": ("{a} next to {a_other}", "{a_other} together with {a}"),
        "style": ("{subject}, half {name}, half {other}", "{name} meets {other}: {subject}"),
        "identity": ("{name} next to {other}", "{other} together with {name}"),
    },
    "negation": {
        "object": ("{a} but no {other}", "{a}, never {a_other}"),
        "style": ("{subject}, {name} but not {other}", "{name}, never {other}: {subject}"),
        "identity": ("{name} but not {other}", "{name}, never {other}"),
    },
    "typo": {
        "object": ("can you draw {a_typo}?", "{a_typo}"),
        "style": ("{subject} rendered as {typo}", "{typo}, {subject}"),
        "identity": ("{typo}'s face", "{typo}"),
    },
    "long prompt": {
        "object": (
            "after years of saving, my aunt finally bought that huge poster with {a} for the spot above her sofa",
        ),
        "style": (
            "after years of saving, my aunt finally bought that huge {name} poster with {subject} for the spot above "
            "her sofa",
        ),
        "identity": (
            "after years of saving, my aunt finally bought that huge poster with {name} for the spot above her sofa",
        ),
    },
    "plural": {
        "object": ("several {names}", "three {names} in a row"),
        "style": ("several {subjects}, all {name}", "three {name} posters with {subject}"),
        "identity": ("both {names}", "the {name} twins"),
    },
}


def plural(name: str) -> str:
    """The regular English plural of a name's last word."""
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def typo(name: str) -> str:
    """A name with the two middle letters of its longest word swapped, or the next two that differ."""
    words = name.split(" ")
    longest = max(range(len(words)), key=lambda i: len(words[i]))
    word = words[longest]
    middle = (len(word) - 1) // 2
    places = sorted(range(len(word) - 1), key=lambda i: abs(i - middle))
    at = next((i for i in places if word[i].lower() != word[i + 1].lower()), None)
    if at is None:  # "aa", or one letter
        return name + name[-1:]
    words[longest] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _has_article(phrase: str) -> bool:
    return canonical_phrase(phrase) != normalized_phrase(phrase)


def _with_article(phrase: str) -> str:
    return phrase if _has_article(phrase) else f"{article(phrase)} {phrase}"


def wording_questions(
    name: str,
    category: str,
    count: int,
    seed: int = 0,
    others: Mapping[str, Sequence[str]] | None = None,
) -> list[Question]:
    """Return ``count`` questions of each wording about one concept, checked for it; ``kind`` is the wording.

    A larger count extends the list of each wording and does not change its first questions.

    Args:
        name: The concept, as the judge spells it.
        category: Its category.
        count: Questions of each wording.
        seed: Seed of prompts and images.
        others: By category, the names that may stand beside it; none of the concepts to forget.
    """
    beside = {kind: [one for one in (others or {}).get(kind, ()) if one != name] for kind in ("object", category)}
    found = []
    for wording, templates in WORDINGS.items():
        for i in range(count):
            template = templates[category][i % len(templates[category])]
            draws = np.random.default_rng(seed_of("wording", wording, name, seed, i))
            other = str(draws.choice(beside[category])) if beside[category] else "house"
            thing = str(draws.choice(beside["object"])) if beside["object"] else "house"
            coloured = i // len(templates[category]) % 2 and not _has_article(name)
            colour = f"{draws.choice(COLOURS)} " if coloured else ""
            # "my neighbour's Eiffel Tower", but "who is the Joker?"
            bare = name.partition(" ")[2] if category == "object" and _has_article(name) else name
            wrong = typo(bare)
            text = template.format(
                name=bare,
                a=_with_article(f"{colour}{name}"),
                names=plural(bare),
                typo=wrong,
                a_typo=_with_article(wrong),
                other=other,
                a_other=_with_article(other),
                subject=_with_article(f"{draws.choice(COLOURS)} {thing}"),
                subjects=plural(thing),
            )
            expected = Labels(**{category: name})
            found.append(Question(Prompt(text, expected), seed_of("wording", text, seed, i), category, wording))
    return found
