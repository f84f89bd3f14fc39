"""Themes: lists of concepts that are forgotten in one request, as text files that a user can copy and edit.

A theme is a file ``NAME.txt``: one entry per line, read as in a page's box of concepts (``neon (style) -> sketch``),
and lines that begin with ``#`` are comments. The lists of this package are starting points. A file of the same name in
a folder of the user takes their place.

Reference:
    Zhang et al., Forget-Me-Not, arXiv 2303.17591, forgets a theme as several target phrases.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import RequestError, listed
from ..files.reading import read_text
from .concept import Concept, canonical_phrase
from .parsing import parse_concepts
from .request import ForgetRequest

__all__ = ["PACKAGE_THEMES", "Theme", "expanded", "load_theme", "themes", "user_theme_folder"]

PACKAGE_THEMES = Path(__file__).with_name("theme_lists")
VARIABLE = "FORGET_CONCEPT_THEMES"


@dataclass(frozen=True)
class Theme:
    """A list of concepts.

    Attributes:
        name: The file's name without its ending.
        path: The file.
        about: Its first comment.
        concepts: Its entries.
    """

    name: str
    path: Path
    about: str
    concepts: tuple[Concept, ...]


def user_theme_folder() -> Path:
    """The user's own folder of themes: ``FORGET_CONCEPT_THEMES``, or else ``~/.forget-concept/themes``."""
    named = os.environ.get(VARIABLE, "").strip()
    return Path(named) if named else Path("~/.forget-concept/themes").expanduser()


def themes(folders: Iterable[Path] | None = None) -> dict[str, Path]:
    """The file of every theme by its name, sorted.

    Args:
        folders: Folders of the user, which need not exist; a name in an earlier one takes the place of the same name in
            a later one and in this package (``None``: :func:`user_theme_folder`).
    """
    found: dict[str, Path] = {}
    for folder in (*([user_theme_folder()] if folders is None else folders), PACKAGE_THEMES):
        own: dict[str, Path] = {}
        for path in sorted(folder.glob("*.txt")) if folder.is_dir() else ():
            own.setdefault(_key(path.stem), path)
        found = own | found
    return dict(sorted(found.items()))


def load_theme(name: str, folders: Iterable[Path] | None = None) -> Theme:
    """Read a theme.

    Args:
        name: Its name; case does not matter, and blanks, hyphens and underscores are the same.
        folders: As for :func:`themes`.

    Raises:
        RequestError: There is no such theme (the message lists those that there are), or the file cannot be read, is
            not UTF-8, or has no entries.
    """
    known = themes(folders)
    if (path := known.get(_key(name))) is None:
        raise RequestError(f"The theme '{name}' is not known: choose one of {listed(list(known), 30)}.")
    lines = read_text(path, "The theme file", RequestError).splitlines()
    comments = [line.lstrip("# \t").strip() for line in lines if line.startswith("#")]
    entries = "\n".join(line for line in lines if not line.startswith("#"))
    if not entries.strip():
        raise RequestError(f"The theme file '{path}' has no entries: write one phrase per line.")
    try:
        concepts = parse_concepts(entries)
    except RequestError as error:
        raise RequestError(f"In the theme file '{path}': {error}") from error
    return Theme(_key(path.stem), path, comments[0] if comments else "", concepts)


def expanded(request: ForgetRequest, folders: Sequence[Path] | None = None) -> ForgetRequest:
    """The request with the concepts of its theme in the theme's place; a request without one is returned as it is.

    The request's own concepts come first, and an entry of the theme that names one of them is left out. Entries that
    state no replacement get the request's ``theme_replacement``.

    Raises:
        RequestError: As :func:`load_theme`.
    """
    if request.theme is None:
        return request
    own = {canonical_phrase(concept.name) for concept in request.concepts}
    added = []
    for concept in load_theme(request.theme, folders).concepts:
        if (key := canonical_phrase(concept.name)) in own:
            continue
        own.add(key)
        given = request.theme_replacement if concept.replacement is None else concept.replacement
        added.append(replace(concept, replacement=given))
    return replace(request, concepts=(*request.concepts, *added), theme=None, theme_replacement=None)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip()).casefold()
