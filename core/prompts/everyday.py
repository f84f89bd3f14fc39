"""A default retain set of everyday words, and everyday contexts in which a concept appears.

A closed form changes every prompt that shares a direction with the concept, and all prompts share some ("a photo of a
…", the padding). Concepts outside the retain set may be affected. These words stand for the rest of the vocabulary:
objects, styles and people, none of them a brand or a living person.
"""

from __future__ import annotations

from ..request.concept import KINDS

__all__ = ["COMMON", "CONTEXTS"]

COMMON: dict[str, tuple[str, ...]] = {
    "object": (
        *("star", "heart", "moon", "sun", "house", "tree", "flower", "mushroom", "umbrella", "key", "cup", "bottle"),
        *(
            "arrow",
            "crown",
            "ring",
            "circle",
            "square",
            "fish",
            "bird",
            "cat",
            "dog",
            "horse",
            "boat",
            "car",
            "bicycle",
        ),
        *(
            "train",
            "anchor",
            "shell",
            "chair",
            "table",
            "bed",
            "lamp",
            "book",
            "clock",
            "phone",
            "apple",
            "cake",
            "shoe",
        ),
        *("hat", "balloon", "mountain", "river", "cloud", "bridge", "street", "bat", "bow", "ball"),
    ),
    "style": (
        *("striped", "dotted", "checkered", "sketch", "neon", "mosaic", "watercolour", "blueprint", "stained glass"),
        *("comic", "oil painting", "pencil", "cartoon", "pixel art", "photograph", "impressionism", "cubism"),
        *("baroque", "minimalism", "graffiti", "woodcut", "pop art", "origami", "embroidery"),
    ),
    "identity": (
        *("a man", "a woman", "a boy", "a girl", "an old man", "an old woman", "a child", "a king", "a queen"),
        *("a doctor", "a soldier", "a farmer", "a pilot", "a teacher", "a dancer", "a singer", "a clown"),
        *("a man with a beard", "a woman with long hair", "a person with glasses", "a crowd of people"),
    ),
}

# A concept beside a colour, a background or a style has another state in the text encoder than alone.
CONTEXTS: dict[str, tuple[str, ...]] = {
    "object": (
        "a red {}",
        "a blue {} on a white background",
        "a drawing of a green {}",
        "a neon picture of a yellow {}",
        "a purple {} in the style of watercolour",
        "a photo of a black {} in the style of mosaic",
        "a pink {}, sketch style",
        "a comic illustration showing an orange {}",
    ),
    "style": (
        "{} style",
        "a picture of a red house in the style of {}",
        "a {} drawing of a blue star",
        "a green tree in the {} style",
        "a {} picture of a person",
        "{} art of a yellow cup",
        "a purple fish, {} style",
    ),
    "identity": (
        "a neon picture of {}",
        "{} in the style of watercolour",
        "{}, sketch style",
        "a mosaic drawing of {}",
        "{} with a hat",
        "{} on a white background",
        "a comic illustration showing {}",
    ),
}

assert set(COMMON) == set(CONTEXTS) == set(KINDS)
