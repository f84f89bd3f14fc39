"""The extension in a real webui: it loads under any folder name, beside anybody, again and again, and costs little."""

from __future__ import annotations

import time
import urllib.error
from pathlib import Path

import pytest
from webuihost import ROOT, ProbeError, WebUI

STARTUP = 0.5


def complaints(host: WebUI) -> list[str]:
    """Errors in the log that name this extension's files; what it refuses in words, as other tests want, is none."""
    told = host.log.read_text(encoding="utf-8", errors="replace").split("*** ")[1:]
    # the host ends each of them with a line of its own
    parts = (part.partition("\n---")[0] for part in told)
    return [part for part in parts if f"/{host.extension}/" in part and "RequestError" not in part]


def neighbour(host: WebUI, name: str) -> None:
    """Another extension with a ``core`` of its own, as some have."""
    folder = host.folder / "extensions" / name
    for place in ("scripts", "core"):
        (folder / place).mkdir(parents=True)
    (folder / "core" / "__init__.py").write_text(f"WHO = {name!r}\n", encoding="utf-8")
    (folder / "scripts" / "other.py").write_text("import core\nassert core.WHO\n", encoding="utf-8")


def test_it_loads_under_another_folder_name_and_says_where_it_is(webui: WebUI) -> None:
    told = webui.probe("imported")
    assert told["host"][0] == {"webui": "AUTOMATIC1111", "forge": "Forge"}[webui.kind]
    assert not complaints(webui)
    assert Path(told["lora_folder"]) == webui.loras
    assert Path(told["data_folder"]).parent == webui.folder
    model = webui.probe("model")
    assert "forget-concept-mini" in model["title"]


def test_it_adds_at_most_half_a_second_to_the_start(webui: WebUI) -> None:
    seconds = webui.probe("imported")["seconds"]
    own = {name: seconds[name] for name in ("forget_concept.py", "ui_settings", "ui_tabs", "app_started")}
    print(own)
    assert sum(own.values()) < STARTUP, own


def test_its_script_and_settings_are_there(webui: WebUI) -> None:
    scripts = webui.get("/sdapi/v1/scripts")
    assert "forget concept" in scripts["txt2img"] and "forget concept" in scripts["img2img"]
    assert webui.probe("imported")["method"] == "uce"


def test_a_diffusion_transformer_is_refused_by_the_name_of_its_family(webui: WebUI) -> None:
    family = {"webui": "Stable Diffusion 3", "forge": "Flux"}[webui.kind]
    with pytest.raises(ProbeError, match=f"This is a {family} model.*only Stable Diffusion 1, 2 and XL"):
        webui.probe("transformer")
    assert "forget-concept-mini" in webui.probe("model")["title"]


def test_reload_ui_keeps_one_host_and_all_callbacks(webui: WebUI) -> None:
    def starts() -> int:
        return webui.log.read_text(encoding="utf-8", errors="replace").count("Startup time:")

    webui.probe("forget", name="no_star")
    webui.probe("apply", patch="no_star")
    before, drawn, begun = webui.probe("imported"), webui.draw("a star").pixels, starts()
    webui.probe("reload_ui")
    deadline = time.monotonic() + 120
    while starts() == begun:
        assert time.monotonic() < deadline, webui.tail()
        time.sleep(0.5)
    after = webui.probe("imported")
    assert after["id"] == before["id"] and after["names"] == before["names"]
    assert not complaints(webui)
    assert webui.get("/sdapi/v1/scripts")["txt2img"].count("forget concept") == 1
    assert webui.probe("active")["active"] == [["no_star", 1.0, True]]
    assert webui.draw("a star").pixels == drawn
    webui.probe("remove", name="no_star")


@pytest.mark.parametrize("name", ["a-neighbour", pytest.param("z-neighbour", marks=pytest.mark.long)])
def test_a_neighbour_with_a_core_of_its_own_and_no_page(stopped: WebUI, name: str) -> None:
    """Before it and after it; with ``--nowebui`` there are routes and scripts all the same."""
    neighbour(stopped, name)
    stopped.start("--nowebui")
    assert not complaints(stopped)
    assert stopped.probe("neighbour")["who"] == name
    assert stopped.probe("model")["key"] >= 1
    assert "forget concept" in stopped.get("/sdapi/v1/scripts")["txt2img"]
    assert stopped.probe("imported")["method"] == "uce"


@pytest.mark.long
def test_switched_off_it_is_not_there(stopped: WebUI) -> None:
    stopped.folder.joinpath("config.json").write_text(
        f'{{"disabled_extensions": ["{stopped.extension}"]}}', encoding="utf-8"
    )
    stopped.start("--nowebui")
    assert "forget concept" not in stopped.get("/sdapi/v1/scripts")["txt2img"]
    with pytest.raises(urllib.error.HTTPError):
        stopped.get("/forget-concept/v1/methods")


def test_the_shim_is_the_only_script() -> None:
    assert [path.name for path in (ROOT / "scripts").glob("*.py")] == ["forget_concept.py"]
