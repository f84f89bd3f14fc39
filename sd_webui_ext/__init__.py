"""The extension for AUTOMATIC1111's webui and for Forge. Importing it imports no host; :func:`register` does."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .webui import WebUI

__all__ = ["register", "running"]

log = logging.getLogger(__name__)
_running: WebUI | None = None


def running() -> WebUI:
    """The adapter to the running webui, created once: it keeps track of what is in the weights."""
    global _running
    if _running is None:
        _running = _detect()
    return _running


def _detect() -> WebUI:
    if find_spec("modules_forge") is not None and find_spec("backend") is not None:
        try:
            from .host_forge import Forge
        except ImportError as error:
            log.warning("Forget Concept: this fork of Forge is not supported (%s); patches only work as LoRAs.", error)
        else:
            return Forge()
    if find_spec("modules_forge") is None and find_spec("modules.sd_hijack") is not None:
        from .host import A1111

        return A1111()
    from .webui import WebUI

    return WebUI()


def register() -> type:
    """Register tab, REST routes and settings with the webui.

    Call it each time the webui runs its scripts, because Reload UI drops the callbacks.

    Returns:
        The class of the always-on script.
    """
    from .always_on import script_of
    from .plot_axes import add_axes
    from .webui import allowed_origins, api_auth, listen, serves_api

    host = running()

    def tabs() -> list[tuple[Any, str, str]]:
        from . import tab

        return [(tab.build(host, allowed_origins()), "Forget Concept", "forget_concept")]

    def started(app: Any) -> None:
        if serves_api():
            from . import api

            api.mount(app, host, api_auth(), allowed_origins())

    def settings() -> Any:
        from ..core.service.options import SECTION, options

        return SECTION, options()

    listen(host, tabs, started, settings, lambda: add_axes(host))
    return script_of(host)
