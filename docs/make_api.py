"""Writes docs/api.md from the docstrings of the library's public names; ``--check`` only compares.

Run it as ``python docs/make_api.py`` in an environment in which the package is installed.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forget_concept.core import api
from forget_concept.core.patch.apply import PatchHandle
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

PAGE = Path(__file__).with_name("api.md")
HEAD = """<!-- Made from the docstrings by docs/make_api.py (make generated): edit those. -->
# The Python library

```
pip install 'forget-concept[torch,mini]'
```

`import forget_concept` imports neither torch nor a host; each name is imported when it is first used. The package is
typed. Errors that a user can act on are subclasses of `forget_concept.core.errors.ForgetConceptError`, a `ValueError`.

```python
import forget_concept as fc

model = fc.load_model("mini")
patch = fc.fit(model, "star", replacement="circle", preserve=["moon"])
patch.save("no-star.safetensors")
patch.apply(pipe, name="no-star")
pipe.set_adapters(["no-star"], [0.8])
report = fc.evaluate(model, patch)
```

`pipe` is a diffusers pipeline of the same model. On it, a patch is a peft adapter: `set_adapters` weighs it, several
stack, and `delete_adapters` removes it, after which the output is bit-identical to that before.
"""
CONTENTS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("load_model", api.load_model, ()),
    ("fit", api.fit, ()),
    ("evaluate", api.evaluate, ()),
    ("load_patch", api.load_patch, ()),
    (
        "Patch",
        Patch,
        (
            "save",
            "apply",
            "applied",
            "scaled",
            "truncated",
            "combined",
            "check_fits",
            "merged_state",
        ),
    ),
    ("Concept", Concept, ()),
    ("ForgetRequest", ForgetRequest, ("check", "to_json", "from_json", "from_file")),
    ("PatchHandle", PatchHandle, ("remove",)),
)
# what an instance is called in the examples
SPOKEN = {"Patch": "patch", "ForgetRequest": "request", "PatchHandle": "handle"}
SECTIONS = ("Args", "Returns", "Raises", "Example", "Yields", "Reference", "Attributes")


def markdown(text: str) -> str:
    """A paragraph of a docstring: roles and double backquotes become code."""
    text = re.sub(r":\w+:`[~.]*([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`")


def entries(lines: list[str]) -> list[str]:
    """``name: text`` entries of a section, each in one line, continued lines joined."""
    found: list[str] = []
    for line in lines:
        if line.startswith(" ") and found:
            found[-1] += " " + line.strip()
        elif line.strip():
            found.append(line.strip())
    return found


def body(docstring: str) -> str:
    """A docstring in Google style as Markdown."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            parts.append((line[:-1], []))
        else:
            parts[-1][1].append(line)
    out = []
    for name, lines in parts:
        text = textwrap.dedent("\n".join(lines)).strip("\n")
        if not text:
            continue
        if name == "":
            out.append(markdown(text))
        elif name == "Example":
            out.append(f"```pycon\n{text}\n```")
        elif name in ("Args", "Raises", "Attributes"):
            items = [entry.partition(": ") for entry in entries(text.splitlines())]
            out.append(f"**{name}**\n\n" + "\n".join(f"- `{key}`: {markdown(what)}" for key, _, what in items))
        else:
            out.append(f"**{name}** {markdown(' '.join(text.split()))}")
    return "\n\n".join(out)


def parameter(p: inspect.Parameter) -> str:
    """One parameter as it is written: name, annotation and default."""
    text = p.name if p.annotation is p.empty else f"{p.name}: {p.annotation}"
    if p.default is p.empty:
        return text
    default = json.dumps(p.default) if isinstance(p.default, str) else repr(p.default)
    return f"{text} = {'{}' if default == '<factory>' else default}"  # the only factory of a public class is dict


def signature(name: str, function: Callable[..., Any]) -> str:
    """The call as code: one line, or a line for each parameter where that is too long."""
    found = inspect.signature(function)
    lines: list[str] = []
    for p in found.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        lines.append(parameter(p))
    back = "" if found.return_annotation in (found.empty, None, "None") else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(lines)}){back}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {text},\n" for text in lines) + f"){back}"


def page() -> str:
    """The whole page."""
    out = [HEAD]
    for name, thing, members in CONTENTS:
        called = name if name == "PatchHandle" else f"fc.{name}"
        out.append(f"## {name}\n\n```\n{signature(called, thing)}\n```\n\n{body(thing.__doc__)}\n")
        for member in members:
            found = getattr(thing, member)
            bound = isinstance(inspect.getattr_static(thing, member), (staticmethod, classmethod))
            owner = name if bound else SPOKEN[name]
            call = signature(f"{owner}.{member}", inspect.unwrap(found))
            out.append(f"### {name}.{member}\n\n```\n{call}\n```\n\n{body(found.__doc__ or '')}\n")
    return "\n".join(out)


def main(arguments: list[str]) -> int:
    text = page()
    if "--check" in arguments:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print("docs/api.md is out of date: run `make generated`.", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
