"""Names of files that every system has, and texts that a terminal shows as they are."""

from __future__ import annotations

import pytest

from forget_concept.core.cli.console import Console
from forget_concept.core.errors import RequestError
from forget_concept.core.files.names import patch_name, printable

BAD = [
    *("COM1", "com¹", "LPT²", "lpt³.txt", "conin$", "CONOUT$", "nul", "aux .x", "prn"),
    *(
        "a\u202eb",
        "a\u200bb",
        "\u2066x",
        "a\ufeff",
        "a\u00adb",
        "a\x7fb",
        "a\x85b",
        "a\u2028b",
        "\ue000",
        "a\x1b[31m",
        "a\x00b",
    ),
]


@pytest.mark.parametrize("name", BAD)
def test_names_that_deceive_or_that_a_system_has_not_are_refused(name):
    for given in (name, f"folder/{name}", f"{name}/x"):
        with pytest.raises(RequestError) as caught:
            patch_name(given, ["star"])
        assert printable(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "com",
        "com10x",
        "console",
        "über",
        "星",
        "naïve café",
        "a-b_c.d",
        "Ω²",
        "emoji \U0001f600",
        "\U0001f469\u200d\U0001f680",
        "می\u200cخواهم",
    ],
)
def test_and_ordinary_names_are_not(name):
    assert patch_name(name, ["star"]) == (name,)


def test_a_terminal_gets_no_escape_sequence(capsys):
    strange = "a\x1b[2Jb\x9bc\u202ed\u200be\r\x07\ud800 ü星\n\tz"
    shown = printable(strange)
    assert shown == "a\\x1b[2Jb\\x9bc\\u202ed\\u200be\\r\\x07\\ud800 ü星\n\tz"
    console = Console()
    console.say(strange)
    console.note(strange)
    console.table(["x", strange], [[strange, strange]])
    out, err = capsys.readouterr()
    for sign in "\x1b\x9b\u202e\u200b\x07":
        assert sign not in out and sign not in err
