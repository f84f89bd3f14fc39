"""The patches that a picture's infotext names come back from it; what a stranger wrote there is skipped, quickly."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forget_concept.sd_webui_ext.infotext import read_infotext, write_infotext

NAMES = st.text(st.characters(blacklist_characters=":", blacklist_categories=("Cs",)), min_size=1, max_size=30)
# a name begins at a letter that is not blank, as every file's does
ENTRIES = st.lists(
    st.tuples(
        NAMES.filter(lambda name: name == name.lstrip()),
        st.floats(-10, 10).map(lambda weight: float(f"{weight:g}")),
        st.text("0123456789abcdef", max_size=12),
    ),
    max_size=5,
)


@given(ENTRIES)
def test_what_was_written_is_read(entries):
    assert read_infotext(write_infotext(entries)) == entries


@pytest.mark.parametrize("weight", ["e", "--", "1-2", ".", "1e999", "-1e999", "nan", "", "1" * 500])
def test_an_entry_without_a_number_is_skipped_and_the_others_are_not(weight):
    assert read_infotext(f"a:{weight}:0f, b:0.5:ff") == [("b", 0.5, "ff")]


@pytest.mark.parametrize("part", [" ", "a", ":", "a:", "1:", ":1", "\n", "a:1", ", "])
def test_a_text_of_any_length_is_read_at_once(part):
    began = time.process_time()
    read_infotext(part * 1_000_000)
    assert time.process_time() - began < 1
