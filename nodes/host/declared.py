"""What the embedded models' configurations say beside the host's own fields."""

from __future__ import annotations

from typing import Any

__all__ = ["declared"]


def declared(config: Any, name: str, usual: Any) -> Any:
    """A class attribute of an embedded model's config, else ``usual``.

    The host's config instances answer every unknown name with ``None`` and a warning, so the class is asked.
    """
    return getattr(type(config), name, usual)
