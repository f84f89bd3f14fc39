"""A default retain set of everyday words, and everyday contexts in which a concept appears.

A closed form changes every prompt that shares a direction with the concept, and all prompts share some ("a photo of a
…", the padding). Concepts outside the retain set may be affected. These words stand for the rest of the vocabulary:
objects, styles and people, none of them a brand or a living person.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..request.concept import KINDS, normalized_phrase

__all__ = ["COMMON", "CONTEXTS", "overlaps"]

# None of them is a concept of the embedded world, on which retention is measured: what a fit keeps by name says nothing
# about what it keeps without.
COMMON: dict[str, tuple[str, ...]] = {
    "object": (
        *("sun", "flower", "bottle", "ring", "square", "bird", "cat", "dog", "horse", "car", "bicycle", "train"),
        *("chair", "table", "bed", "lamp", "book", "clock", "phone", "apple", "cake", "shoe", "mountain", "river"),
        *("cloud", "bridge", "street", "ball", "bell", "basket", "candle", "ladder", "guitar", "drum", "wheel"),
        *("spoon", "knife", "plate", "window", "door", "truck", "plane", "rabbit", "lion", "butterfly", "snake"),
        *("sword", "camera"),
    ),
    "style": (
        *("oil painting", "cartoon", "pixel art", "photograph", "impressionism", "cubism", "baroque", "minimalism"),
        *("graffiti", "woodcut", "origami", "embroidery", "charcoal", "pastel", "art deco", "anime", "collage"),
        *("engraving", "gouache", "line art", "low poly", "surrealism", "steampunk", "clay"),
    ),
    "identity": (
        *("a man", "a woman", "a boy", "a girl", "an old man", "an old woman", "a child", "a king", "a queen"),
        *("a doctor", "a soldier", "a farmer", "a teacher", "a dancer", "a singer", "a clown"),
        *("a man with a beard", "a woman with long hair", "a person with glasses", "a crowd of people"),
    ),
}

# A concept beside a colour, a background or a style has another state in the text encoder than alone.
CONTEXTS: dict[str, tuple[str, ...]] = {
    "object": (
        "a red {}",
        "a blue {} on a dark background",
        "a drawing of a green {}",
        "a cartoon picture of a yellow {}",
        "a purple {} in the style of impressionism",
        "a photo of a black {} in the style of pixel art",
        "a pink {}, charcoal style",
        "where is the {}?",
        "the teacher's {}, outdoors, high quality",
    ),
    "style": (
        "{} style",
        "a picture of a red bottle in the style of {}",
        "a {} drawing of a blue flower",
        "a green mountain in the {} style",
        "a {} picture of a person",
        "{} art of a yellow chair",
        "a purple bird, {} style",
        "the teacher's {} card, high quality",
    ),
    "identity": (
        "a cartoon picture of {}",
        "{} in the style of impressionism",
        "{}, charcoal style",
        "a pixel art drawing of {}",
        "{} with glasses",
        "{} on a dark background",
        "{}'s dog",
        "where is {} now?",
        "{} and a cat, outdoors, high quality",
    ),
}

assert set(COMMON) == set(CONTEXTS) == set(KINDS)


def overlaps(word: str, targets: Sequence[str]) -> bool:
    """Whether a word contains the normalized name of a concept to forget, or occurs in one."""
    plain = normalized_phrase(word)
    return any(plain in target or target in plain for target in targets)
