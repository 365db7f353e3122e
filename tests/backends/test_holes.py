"""Holes in files, and zeros where the file system makes none, whatever it says."""

from __future__ import annotations

import errno
import os

import pytest

from xen_disk_py.backends import holes
from xen_disk_py.backends.holes import data_extents, punch_hole, put_zeros

SIZE = 4 << 20


@pytest.fixture
def fd(tmp_path):
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"x" * SIZE, 0)
    yield fd
    os.close(fd)


def test_a_hole_that_cannot_be_punched_raises_with_its_errno():
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
        punch_hole(-1, 0, 4096)
    assert errno.EBADF == caught.value.errno


def test_extents_are_where_a_file_has_data(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "w+b") as file:
        file.truncate(1 << 20)
        os.pwrite(file.fileno(), b"x" * 8192, 65536)
        assert [(65536, 73728)] == list(data_extents(file.fileno(), 0, 1 << 20))
        assert [(69632, 70000)] == list(data_extents(file.fileno(), 69632, 70000))
        assert [] == list(data_extents(file.fileno(), 0, 65536))
        assert [] == list(data_extents(file.fileno(), 1 << 19, 1 << 20))


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (65536, 2 << 20), (100, 200), (4000, 5)])
@pytest.mark.parametrize("says", [None, 0, -1])
def test_zeros_are_put_whether_a_hole_is_made_or_said_to_be(fd, monkeypatch, says, offset, length):
    if says is not None:
        monkeypatch.setattr(holes, "_fallocate", lambda *_: says)
    put_zeros(fd, offset, length)
    expected = b"x" * offset + bytes(length) + b"x" * (SIZE - offset - length)
    assert expected == os.pread(fd, SIZE + 1, 0)


def test_a_hole_takes_no_space(fd):
    try:
        punch_hole(fd, 0, 4096)
    except OSError as error:
        pytest.skip(f"this file system punches no holes: {error.strerror}")
    os.fsync(fd)
    before = os.fstat(fd).st_blocks
    put_zeros(fd, 1 << 20, 2 << 20)
    assert (2 << 20) // 512 == before - os.fstat(fd).st_blocks


def test_zeros_that_cannot_be_put_are_an_error():
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        put_zeros(-1, 0, 4096)
