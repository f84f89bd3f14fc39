"""The English locale, made of what the nodes say of themselves: ``python tests/comfyui/nodetexts.py <ComfyUI folder>``.

The page compiles every text of a locale: braces, ``@`` and ``|`` mean something to it and are written as literals.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "locales" / "en" / "nodeDefs.json"


def escaped(text: str) -> str:
    """``text`` as a locale has it."""
    return re.sub(r"[{}@|]", lambda match: "{'" + match[0] + "'}", text)


def plain(text: str) -> str:
    """What the page shows of a locale's text. Raises :class:`ValueError` where it would not compile."""
    rest = re.sub(r"\{'[{}@|]'\}", "", text)
    if re.search(r"[{}@|]", rest):
        raise ValueError(text)
    return re.sub(r"\{'([{}@|])'\}", r"\1", text)


def english(info: dict[str, Any]) -> dict[str, Any]:
    """What the nodes of an ``/object_info`` say, as a locale."""
    found: dict[str, Any] = {}
    for name, node in sorted(info.items()):
        inputs = {key: spec for part in ("required", "optional") for key, spec in node["input"].get(part, {}).items()}
        found[name] = {
            "display_name": escaped(node["display_name"]),
            "description": escaped(node["description"]),
            "inputs": {
                key: {"name": escaped(key), "tooltip": escaped((spec[1] if len(spec) > 1 else {}).get("tooltip", ""))}
                for key, spec in inputs.items()
            },
            "outputs": {
                str(i): {"name": escaped(label), "tooltip": escaped(words or "")}
                for i, (label, words) in enumerate(
                    zip(node["output_name"], node["output_tooltips"], strict=True), start=0
                )
            },
        }
    return found


def ours(info: dict[str, Any]) -> dict[str, Any]:
    """This pack's nodes of an ``/object_info``."""
    return {name: node for name, node in info.items() if name.startswith("ForgetConcept")}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from comfyhost import ComfyUI

    host = ComfyUI(Path(sys.argv[1]), Path(tempfile.mkdtemp()), "forget-concept")
    host.start()
    try:
        told = english(ours(host.get("/object_info")))
    finally:
        host.stop()
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    PLACE.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
