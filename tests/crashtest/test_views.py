"""Images that have one state after another."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from xen_disk_py.backends.image import Image
from xen_disk_py.crashtest.views import View
from xen_disk_py.trace.powercut import ZEROS, Extent

SIZE = 64 << 10
DATA = bytes(range(256)) * 64


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def view(tmp_path, trace):
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * SIZE)
    with (
        closing(Image.open(str(path), writable=False)) as base,
        closing(View(str(tmp_path), "view.raw", base, trace, 512)) as view,
    ):
        yield view
    assert b"b" * SIZE == path.read_bytes()


def content(view):
    with open(view.path, "rb") as file:
        return file.read()


def put(content, *changes):
    content = bytearray(content)
    for offset, data in changes:
        content[offset : offset + len(data)] = data
    return bytes(content)


STORED, SHOWN = Extent(512, 1024, 100), [Extent(1024, 1024, 700), Extent(0, 512, ZEROS)]
BEHIND = put(b"b" * SIZE, (512, DATA[100:1124]))
STATE = put(BEHIND, (1024, DATA[700:1724]), (0, bytes(512)))


def test_a_state_is_shown_and_undone(view):
    view.advance([STORED])
    assert BEHIND == content(view)
    view.show(SHOWN)
    assert STATE == content(view)
    view.restore()
    assert BEHIND == content(view)


def write(path):
    with open(path, "r+b") as file:
        file.seek(SIZE - 10)
        file.write(b"x")


def replace(path):
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(b"other")


@pytest.mark.parametrize("harm", [write, os.unlink, replace, lambda path: os.truncate(path, 5)])
def test_what_a_command_did_is_undone(view, harm):
    view.advance([STORED])
    view.show(SHOWN)
    harm(view.path)
    view.restore()
    assert BEHIND == content(view)
    view.show(SHOWN)
    assert STATE == content(view)


def test_the_same_bytes_have_the_same_digest(view):
    view.advance([STORED])
    before = view.digest
    view.show([Extent(512, 1024, 100)])
    assert before == view.digest
    view.restore()
    view.show(SHOWN)
    shown = view.digest
    view.restore()
    assert before == view.digest != shown
    view.advance(SHOWN)
    assert shown == view.digest
