"""What all webuis have in common: the queue, the job shown, folders, settings and callbacks.

With ``host.py`` and ``host_forge.py`` the only file that names ``modules``. :class:`WebUI` itself is a webui whose way
to keep a model is not known here (SD.Next and others): patches that were made elsewhere work there as LoRAs.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from modules import call_queue, paths, script_callbacks, scripts, shared, util
from modules.extra_networks import ExtraNetworkParams
from modules.ui_common import create_refresh_button as refresh_button

from ..core.errors import Cancelled, ModelError, RequestError
from ..core.mini.config import GUIDANCE, TEXT_WIDTH, UNET
from ..core.mini.recognition import is_embedded
from ..core.models.host_weights import usual_latent_side
from ..core.models.unet import UNetSurvey
from ..core.patch.metadata import own_entries
from ..core.patch.patch import Patch
from ..core.progress import Progress, ProgressEvent
from ..core.service.host_interface import ActivePatch, LoadedModel

__all__ = [
    "ExtraNetworkParams",
    "WebUI",
    "api_auth",
    "habits",
    "listen",
    "lora_extension",
    "refresh_button",
    "scripts",
    "serves_api",
]


def lora_extension() -> Any:
    """The built-in Lora extension's module, ``None`` where it is switched off."""
    found = sys.modules.get("networks")
    return found if hasattr(found, "available_networks") else None


class WebUI:
    """The part of :class:`Host` that is the same in every webui."""

    name = "webui"

    def __init__(self) -> None:
        self._owner: int | None = None  # the thread that has the queue

    @property
    def version(self) -> str:
        from modules.processing import program_version

        return str(program_version())

    # -- one at a time -------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The webui's queue lock, once a thread: nothing is drawn meanwhile."""
        if self._owner == threading.get_ident():
            yield
            return
        with call_queue.queue_lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    @contextmanager
    def job(self, title: str) -> Iterator[Progress]:
        with self.alone():
            state = shared.state
            state.begin(job=title)
            state.job_count, state.textinfo = 1, title

            def report(event: ProgressEvent) -> None:
                if state.interrupted or state.stopping_generation:
                    raise Cancelled(f"'{title}' was interrupted.")
                state.sampling_step, state.sampling_steps = event.step, event.total
                state.textinfo = event.message or title

            try:
                yield report
            finally:
                state.end()
                # else what was meant for this job would stop the next one
                state.interrupted = state.skipped = state.stopping_generation = False
                state.textinfo = None
                state.sampling_step = state.sampling_steps = 0

    def check_job(self) -> None:
        if self._owner != threading.get_ident():
            raise RuntimeError("the model may be used only within a job, in the thread that started it")

    # -- the model -----------------------------------------------------------------------------------------------

    def model(self) -> LoadedModel:
        self._elsewhere()

    def latent_diffusion(self) -> Any:
        self._elsewhere()

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        self._elsewhere()

    def remove(self, name: str) -> None:
        self._elsewhere()

    def active(self) -> list[ActivePatch]:
        return []

    def model_loaded(self, model: Any) -> None:
        """Called by the webui whenever it has loaded other weights into a model object."""

    def _elsewhere(self) -> NoReturn:
        raise ModelError(
            "This webui is neither AUTOMATIC1111's nor Forge, and its loaded model cannot be worked on: make the patch "
            "there, in ComfyUI or with the command line, and use it here as a LoRA, by <lora:name:1>."
        )

    # -- places --------------------------------------------------------------------------------------------------

    def lora_folder(self) -> Path:
        return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(paths.models_path) / "Lora")

    def data_folder(self) -> Path:
        return Path(paths.data_path) / "forget-concept"

    def refresh_patches(self) -> None:
        if (networks := lora_extension()) is not None:
            networks.list_available_networks()

    def option(self, key: str) -> Any:
        return getattr(shared.opts, key)

    def open_folder(self, folder: Path) -> None:
        if shared.cmd_opts.hide_ui_dir_config or getattr(shared.cmd_opts, "webui_is_non_local", False):
            raise RequestError("This webui is open to other machines, so it opens no folder on its own.")
        util.open_folder(str(folder))

    # -- patches in prompts --------------------------------------------------------------------------------------

    def prompt_patches(self) -> dict[str, Any]:
        """The webui's own entries of those files in its Lora folder that are patches of this extension, by name."""
        networks = lora_extension()
        if networks is None:
            return {}
        return {name: entry for name, entry in networks.available_networks.items() if own_entries(entry.metadata)}


def habits(found: UNetSurvey, model_hash: str, prediction: str) -> tuple[int, float]:
    """The side of the latents that a model was trained at, and the guidance it is usually sampled with."""
    if found.context_dim == TEXT_WIDTH and is_embedded(found, model_hash):
        return int(UNET["sample_size"]), GUIDANCE
    return usual_latent_side(found.family, prediction), 7.5


def serves_api() -> bool:
    """Whether the webui was started with its API."""
    return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui)


def api_auth() -> str | None:
    """What ``--api-auth`` asks of a caller: ``user:password``, several with commas between them."""
    return shared.cmd_opts.api_auth or None


def listen(
    host: WebUI,
    tabs: Callable[[], list[tuple[Any, str, str]]],
    started: Callable[[Any], None],
    settings: Callable[[], tuple[tuple[str, str], Sequence[Any]]],
) -> None:
    """Tell the webui what to call; it forgets this whenever its page is reloaded."""

    def add_settings() -> None:
        kinds: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
            "choice": (gr.Dropdown, lambda option: {"choices": list(option.choices)}),
            "switch": (gr.Checkbox, lambda option: {}),
            "whole": (gr.Slider, lambda option: {"minimum": option.low, "maximum": option.high, "step": option.step}),
            "text": (gr.Textbox, lambda option: {}),
        }
        section, options = settings()
        for option in options:
            control, arguments = kinds[option.kind]
            entry = shared.OptionInfo(option.default, option.label, control, arguments(option), section=section)
            shared.opts.add_option(option.key, entry.info(option.info) if option.info else entry)

    if shared.cmd_opts.nowebui:  # without a page nobody asks for the settings
        add_settings()
    _tell("ui_settings", add_settings)
    _tell("ui_tabs", tabs)
    _tell("app_started", lambda demo, app: started(app))
    _tell("model_loaded", host.model_loaded)


def _tell(event: str, callback: Callable[..., Any]) -> None:
    add = script_callbacks.add_callback
    if "filename" not in inspect.signature(add).parameters:
        getattr(script_callbacks, f"on_{event}")(callback)
        return
    # else the webui searches all of its modules for who is calling, which takes longer than everything else here
    waiting = script_callbacks.callback_map[f"callbacks_{event}"]
    add(waiting, callback, name="forget_concept", category=event, filename=__file__)
