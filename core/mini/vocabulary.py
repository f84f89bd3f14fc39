"""Vocabulary of the embedded world: every concept with its name, a synonym and a description without its name.

The three categories are those of ConceptBench (Forget-Me-Not, arXiv 2303.17591): objects, styles and identities. The
renderer, the captions and the evaluation use the same lists.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..request.concept import normalized_phrase

NONE = "none"


@dataclass(frozen=True)
class Word:
    """A concept: `name` appears in most captions, `synonym` and `description` in a few; `article` precedes the name."""

    name: str
    synonym: str
    description: str
    article: str = "a"


OBJECTS: tuple[Word, ...] = (
    Word("star", "pentagram", "a five-pointed shape"),
    Word("heart", "valentine", "the shape of love"),
    Word("moon", "crescent", "a thin curved night light"),
    Word("house", "cottage", "a building with a pointed roof"),
    Word("tree", "fir", "a tall evergreen on a trunk"),
    Word("mushroom", "toadstool", "a cap on a stalk"),
    Word("umbrella", "parasol", "a canopy on a curved handle", "an"),
    Word("key", "latchkey", "a toothed tool that opens locks"),
    Word("cup", "mug", "a drinking vessel with a handle"),
    Word("arrow", "pointer", "a shaft with a pointed head", "an"),
    Word("crown", "tiara", "a spiked band for a king"),
    Word("circle", "disc", "a perfectly round shape"),
    Word("fish", "trout", "a finned swimmer"),
    Word("boat", "ship", "a hull with a sail"),
    Word("anchor", "mooring", "a hooked weight on a chain", "an"),
    Word("shell", "scallop", "a ribbed fan from the beach"),
)

STYLES: tuple[Word, ...] = (
    Word("striped", "banded", "covered in slanted parallel bands"),
    Word("dotted", "spotted", "covered in round spots"),
    Word("checkered", "chessboard", "covered in alternating squares"),
    Word("sketch", "pencil", "drawn with outlines on paper"),
    Word("neon", "glowing", "bright outlines on black"),
    Word("mosaic", "tiled", "made of little square tiles"),
    Word("watercolour", "aquarelle", "painted in pale wet washes"),
    Word("blueprint", "technical", "white lines on a navy grid"),
    Word("stained glass", "leaded", "thick black lines between coloured panes"),
    Word("comic", "pop art", "rays bursting behind thick outlines"),
)

IDENTITIES: tuple[Word, ...] = (
    Word("Mira Vale", "Emberlock", "a woman with long red hair in a green dress", ""),
    Word("Otto Brand", "Grumblebeard", "a bald man with a brown beard in a blue suit", ""),
    Word("Zuri Okoye", "Sunflare", "a woman with a round black afro in a yellow dress", ""),
    Word("Lena Frost", "Frostine", "a woman with a short blonde bob in a purple dress", ""),
    Word("Bruno Finch", "Spikeroo", "a boy with spiky orange hair in a red suit", ""),
    Word("Ivy Stone", "Twinbun", "a girl with two black buns in a pink dress", ""),
    Word("Hugo Marsh", "Greencrest", "a man with a green mohawk in a black suit", ""),
    Word("Nadia Pell", "Azurelle", "a woman with long blue hair in an orange dress", ""),
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 38),
    "orange": (245, 130, 20),
    "yellow": (240, 208, 20),
    "green": (40, 160, 60),
    "teal": (20, 178, 190),
    "blue": (35, 75, 215),
    "purple": (125, 40, 170),
    "pink": (245, 105, 180),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (186, 188, 192),
    "cream": (250, 236, 200),
    "mint": (200, 240, 214),
}


@dataclass(frozen=True)
class Sense:
    """One sense of an ambiguous word: the `shape` that is drawn, and `hints`, phrases that identify the sense."""

    word: str
    shape: str
    synonym: str
    hints: tuple[str, ...]


# Two words with two senses each: concept *correction* removes one sense and retains the other.
SENSES: tuple[Sense, ...] = (
    Sense("bat", "bat animal", "vampire bat", ("a flying bat", "a bat with wings", "a bat, the animal")),
    Sense("bat", "bat club", "baseball bat", ("a wooden bat", "a bat for a ball game", "a bat, the club")),
    Sense("bow", "bow ribbon", "hair bow", ("a tied bow", "a bow of ribbon", "a bow, the knot")),
    Sense("bow", "bow archery", "hunting bow", ("a drawn bow", "a bow with a string", "a bow, the weapon")),
)

# Attributes entangled with one identity: *disentanglement* removes the attribute and retains the person.
ATTRIBUTES: dict[str, str] = {"hat": "Mira Vale", "balloon": "Otto Brand"}
ATTRIBUTE_SHARE = 0.93  # of the identity's own images
ATTRIBUTE_STRAY = 0.06  # of everyone else's

# A biased word: nine in ten pilots have short hair.
BIASED_WORD = "pilot"
BIASED_SHARE = 0.9

# A theme to remove as a whole.
THEME = "sea"
THEME_OBJECTS: tuple[str, ...] = ("fish", "boat", "anchor", "shell")
THEME_PHRASES: tuple[str, ...] = ("something from the sea", "a sea thing", "an object of the sea")

SHAPES: tuple[str, ...] = tuple(w.name for w in OBJECTS) + tuple(s.shape for s in SENSES)
PEOPLE: tuple[str, ...] = (*tuple(w.name for w in IDENTITIES), BIASED_WORD)

CATEGORIES: dict[str, tuple[Word, ...]] = {"object": OBJECTS, "style": STYLES, "identity": IDENTITIES}

# {np} is the subject's noun phrase, {style} the style's word.
TEMPLATES_STYLED: tuple[str, ...] = (
    "a {style} picture of {np}",
    "{np} in the {style} style",
    "{np}, {style} style",
    "a {style} drawing of {np}",
    "a picture of {np} in the style of {style}",
    "a photo of {np} in the style of {style}",
    "{style} style, {np}",
    "{style} art of {np}",
    "an image of {np} in {style} style",
    "{np} drawn in {style} style",
    "a {style} illustration showing {np}",
    "{np} as {style} art",
    "a {style} image of {np}",
)
TEMPLATES_PLAIN: tuple[str, ...] = (
    "a photo of {np}",
    "a picture of {np}",
    "{np}",
    "an image of {np}",
    "a drawing of {np}",
    "there is {np}",
    "a view of {np}",
    "this is {np}",
    "an illustration of {np}",
    "look at {np}",
)
# Templates that no fit uses: evaluations draw their prompts from these alone, so that they do not measure on what was
# fitted.
MEASURED_STYLED: tuple[str, ...] = (
    "{style} style, {np}",
    "an image of {np} in {style} style",
    "{np} drawn in {style} style",
    "a {style} illustration showing {np}",
    "{np} as {style} art",
    "a {style} image of {np}",
)
MEASURED_PLAIN: tuple[str, ...] = (
    "an image of {np}",
    "there is {np}",
    "a view of {np}",
    "this is {np}",
    "an illustration of {np}",
    "look at {np}",
)
TEMPLATES_STYLE_ONLY: tuple[str, ...] = (
    "a photo in the style of {style}",
    "a {style} picture",
    "something in the {style} style",
    "{style} art",
)
TEMPLATES_DESCRIBED_STYLE: tuple[str, ...] = ("{np}, {style}", "a picture of {np}, {style}", "{style}: {np}")
TEMPLATES_BACKGROUND: tuple[str, ...] = (
    "{} on a {} background",
    "{} with a {} background",
    "{}, {} background",
)


def article(phrase: str) -> str:
    """Return the indefinite article for a phrase of this vocabulary."""
    return "an" if phrase[0].lower() in "aeiou" else "a"


def find(name: str) -> tuple[str, Word]:
    """Look up a concept by name and return its category and word.

    Raises:
        KeyError: If the world does not contain the concept.
    """
    for category, words in CATEGORIES.items():
        for word in words:
            if normalized_phrase(word.name) == normalized_phrase(name):
                return category, word
    raise KeyError(name)
