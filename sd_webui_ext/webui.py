"""What all webuis have in common: queue, progress display, folders, settings and callbacks.

Only this file, ``host.py`` and ``host_forge.py`` import ``modules``. :class:`WebUI` itself stands for webuis whose
loaded model is not accessible (SD.Next and others); patches made elsewhere work there as LoRAs.
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
from torch import nn

from ..core.errors import Cancelled, ModelError, RequestError, UnknownFamilyError
from ..core.mini.config import GUIDANCE, UNET
from ..core.mini.recognition import embedded_name
from ..core.models.architectures import architecture_of
from ..core.models.host_weights import usual_latent_side
from ..core.models.model_survey import ModelSurvey
from ..core.models.unet import UNetSurvey, survey_unet
from ..core.patch.metadata import own_entries
from ..core.patch.patch import Patch
from ..core.progress import Progress, ProgressEvent
from ..core.service.host_interface import ActivePatch, LoadedModel

__all__ = [
    "V_REMEDY",
    "ExtraNetworkParams",
    "WebUI",
    "allowed_origins",
    "api_auth",
    "listen",
    "lora_extension",
    "plot_script",
    "refresh_button",
    "scripts",
    "serves_api",
    "surveyed",
    "usual_size_and_guidance",
]


# what makes a webui run a checkpoint as a v-prediction model
V_REMEDY = "put a .yaml file of its name beside it that has 'parameterization: \"v\"', and load the checkpoint again"


def lora_extension() -> Any:
    """The module of the built-in Lora extension; ``None`` if it is disabled."""
    found = sys.modules.get("networks")
    return found if hasattr(found, "available_networks") else None


def plot_script() -> Any:
    """The module of the X/Y/Z plot as loaded now; ``None`` before that, or if there is none."""
    modules = [one.module for one in scripts.scripts_data if one.path.endswith("xyz_grid.py")]
    return next((found for found in modules if hasattr(found, "axis_options")), None)


class WebUI:
    """The part of :class:`Host` that all webuis share."""

    name = "webui"

    def __init__(self) -> None:
        self._owner: int | None = None  # the thread that holds the queue lock

    @property
    def version(self) -> str:
        from modules.processing import program_version

        return str(program_version())

    # -- one at a time -------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the webui's queue lock, reentrantly: no picture is generated meanwhile."""
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
    def during_picture(self) -> Iterator[None]:
        """Inside of a script's callback: the webui holds its queue lock for this thread already, unlike ours."""
        if self._owner == threading.get_ident():
            yield
            return
        # another extension may generate pictures without the lock
        taken = call_queue.queue_lock.acquire(blocking=False)
        before, self._owner = self._owner, threading.get_ident()
        try:
            yield
        finally:
            self._owner = before
            if taken:
                call_queue.queue_lock.release()

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
                # otherwise an interruption of this job would stop the next one
                state.interrupted = state.skipped = state.stopping_generation = False
                state.textinfo = None
                state.sampling_step = state.sampling_steps = 0

    def check_job(self) -> None:
        if self._owner != threading.get_ident():
            raise RuntimeError("the model may be used only within a job, in the thread that started it")

    # -- the model -----------------------------------------------------------------------------------------------

    def model(self) -> LoadedModel:
        self._unsupported()

    def checkpoint(self) -> str:
        return ""

    def latent_diffusion(self) -> Any:
        self._unsupported()

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        self._unsupported()

    def remove(self, name: str) -> None:
        self._unsupported()

    def active(self) -> list[ActivePatch]:
        return []

    def model_loaded(self, model: Any) -> None:
        """Called by the webui whenever it has loaded other weights into a model object."""

    def _unsupported(self) -> NoReturn:
        raise ModelError(
            "This webui is neither AUTOMATIC1111's nor Forge, so its loaded model cannot be edited: make the patch in "
            "one of them, in ComfyUI or with the command line, and use it here as a LoRA, with <lora:name:1>."
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
            raise RequestError(
                "This webui does not open folders, because other machines can reach it or --hide-ui-dir-config is set: "
                "open the folder yourself."
            )
        util.open_folder(str(folder))

    # -- patches in prompts --------------------------------------------------------------------------------------

    def prompt_patches(self) -> dict[str, Any]:
        """The webui's entries of the patches of this extension in its Lora folder, by name."""
        networks = lora_extension()
        if networks is None:
            return {}
        return {name: entry for name, entry in networks.available_networks.items() if own_entries(entry.metadata)}


# the embedded models' states are narrower than any other text encoder's
_SMALLEST_TEXT = 512


def surveyed(model: nn.Module) -> UNetSurvey:
    """The survey of a checkpoint's UNet; a diffusion transformer is refused by the name of its family."""
    try:
        return survey_unet(model)
    except UnknownFamilyError:
        if (name := architecture_of(model)) is None:
            raise
        raise ModelError(
            f"This is a {name} model, and in the webui only Stable Diffusion 1, 2 and XL can be edited: load a "
            "checkpoint of one of these."
        ) from None


def usual_size_and_guidance(found: ModelSurvey, model_hash: str, prediction: str) -> tuple[int, float]:
    """The side of the latents that a model was trained at, and the guidance it is usually sampled with."""
    if found.context_dim < _SMALLEST_TEXT and embedded_name(found, model_hash) is not None:
        return int(UNET["sample_size"]), GUIDANCE
    return usual_latent_side(found.family, prediction), 7.5


def serves_api() -> bool:
    """Whether the webui was started with its API."""
    return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui)


def api_auth() -> str | None:
    """The value of ``--api-auth``: ``user:password``, or several separated by commas; ``None`` if unset."""
    return shared.cmd_opts.api_auth or None


def allowed_origins() -> tuple[str, ...]:
    """The sites whose pages may send requests, as ``--cors-allow-origins`` lists them."""
    given = getattr(shared.cmd_opts, "cors_allow_origins", None) or ""
    return tuple(origin.strip() for origin in given.split(",") if origin.strip())


def listen(
    host: WebUI,
    tabs: Callable[[], list[tuple[Any, str, str]]],
    started: Callable[[Any], None],
    settings: Callable[[], tuple[tuple[str, str], Sequence[Any]]],
    before: Callable[[], None],
) -> None:
    """Register callbacks with the webui, which drops them whenever its UI is reloaded."""

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

    if shared.cmd_opts.nowebui:  # without a page, the webui does not call ui_settings
        add_settings()
    before()  # the webui's own scripts come first, and without a page its API creates them before any callback
    _register("before_ui", before)
    _register("ui_settings", add_settings)
    _register("ui_tabs", tabs)
    _register("app_started", lambda demo, app: started(app))
    _register("model_loaded", host.model_loaded)


def _register(event: str, callback: Callable[..., Any]) -> None:
    add = script_callbacks.add_callback
    if "filename" not in inspect.signature(add).parameters:
        getattr(script_callbacks, f"on_{event}")(callback)
        return
    # without a file name, the webui searches all modules for the caller, which is slow
    waiting = script_callbacks.callback_map[f"callbacks_{event}"]
    add(waiting, callback, name="forget_concept", category=event, filename=__file__)
