"""Nothing of a guest's or a file's text is obeyed by a terminal, or begins a line of its own."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("myvm/xvdb: 5 %", "myvm/xvdb: 5 %"),
        ("größe 中", "größe 中"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nerror: b\r", "a\\nerror: b\\r"),
        ("\x9b5m", "\\x9b5m"),  # CSI in one character
        ("\u202eeslaf", "\\u202eeslaf"),
        ("\u2028", "\\u2028"),
        (os.fsdecode(b"disk\xff.raw"), "disk\\xff.raw"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_shown(text, shown):
    assert shown == printable(text)


@given(st.lists(st.integers(0, sys.maxunicode).map(chr)).map("".join))
def test_it_is_one_printable_line_that_can_be_encoded(text):
    shown = printable(text)
    assert shown.isprintable()
    assert shown == printable(shown)
    shown.encode()
