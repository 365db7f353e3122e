"""A disk judges requests, calls its backend and survives it."""

from __future__ import annotations

import logging
import re

import pytest

from xen_disk_py import disk as disk_module
from xen_disk_py.backends import Backend
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.blkif import (
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    OKAY,
    READ,
    WRITE,
    Discard,
    Transfer,
)
from xen_disk_py.disk import Disk

SECTORS = 64


class Recording(Backend):
    """Notes what it is called with; returns what it is told to."""

    size = SECTORS * 512
    result = None

    def __init__(self, **attributes):
        self.calls = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def read(self, buffers, offset):
        self.calls.append(("read", [bytes(buffer) for buffer in buffers], offset))
        return self.result

    def write(self, buffers, offset):
        self.calls.append(("write", [bytes(buffer) for buffer in buffers], offset))
        return self.result

    def flush(self):
        self.calls.append(("flush",))


class Discarding(Recording):
    def discard(self, offset, length):
        self.calls.append(("discard", offset, length))


def transfer(operation, sector, segments):
    firsts, lasts = zip(*segments) if segments else ((), ())
    sectors = sum(last - first + 1 for first, last in segments)
    return Transfer(1, operation, sector, sectors, (9,) * len(segments), firsts, lasts)


def pages(*letters):
    return [memoryview(bytearray(letter * 4096)) for letter in letters]


# -- judging -------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [READ, WRITE, FLUSH])
@pytest.mark.parametrize(
    ("sector", "segments", "is_refused"),
    [
        (0, [(0, 7)], False),
        (SECTORS - 8, [(0, 7)], False),
        (SECTORS - 1, [(3, 3)], False),
        (0, [(0, 7)] * 8, False),
        (SECTORS - 7, [(0, 7)], True),
        (SECTORS, [(0, 0)], True),
        (1, [(0, 7)] * 8, True),
        (2**64 - 1, [(0, 0)], True),
        (2**64 - 1, [(0, 7)], True),
    ],
)
def test_range(operation, sector, segments, is_refused):
    refusal = Disk(Recording()).refusal(transfer(operation, sector, segments))
    assert is_refused is (refusal is not None)
    if is_refused:
        assert f"sectors {sector} to {sector + transfer(0, 0, segments).sectors} of 64" == refusal


@pytest.mark.parametrize("sector", [0, SECTORS, SECTORS + 1, 2**64 - 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_an_empty_flush_is_of_no_place(sector, read_only):
    """Linux gives it sector 2**64 - 1, and turns flushes off for good if one fails."""
    disk = Disk(Recording(read_only=read_only, sector_size=4096))
    request = transfer(FLUSH, sector, [])
    assert disk.refusal(request) is None
    assert disk.transfer(request, ()) == OKAY
    assert [("flush",)] == disk.backend.calls


@pytest.mark.parametrize(
    ("operation", "segments", "is_refused"),
    [(READ, [(0, 7)], False), (WRITE, [(0, 7)], True), (FLUSH, [(0, 7)], True)],
)
def test_read_only(operation, segments, is_refused):
    disk = Disk(Recording(read_only=True))
    refusal = disk.refusal(transfer(operation, 0, segments))
    assert refusal == ("write to a read-only disk" if is_refused else None)


@pytest.mark.parametrize(
    ("sector_size", "sector", "segments", "is_refused"),
    [
        (512, 1, [(1, 1), (3, 6)], False),
        (1024, 2, [(2, 3), (0, 7), (4, 5)], False),
        (1024, 1, [(0, 1)], True),
        (1024, 0, [(1, 2)], True),
        (1024, 0, [(0, 7), (0, 2)], True),
        (2048, 4, [(4, 7)], False),
        (2048, 4, [(2, 5)], True),
        (4096, 8, [(0, 7)], False),
        (4096, 8, [(0, 3), (4, 7)], True),
        (4096, 4, [(0, 7)], True),
    ],
)
def test_alignment(sector_size, sector, segments, is_refused):
    disk = Disk(Recording(sector_size=sector_size))
    refusal = disk.refusal(transfer(READ, sector, segments))
    assert is_refused is (refusal is not None)
    if is_refused:
        assert f"not aligned to {sector_size} bytes" in refusal


# -- doing ---------------------------------------------------------------------------------


def test_read_hands_out_the_segments():
    backend = Recording()
    disk = Disk(backend)
    assert disk.transfer(transfer(READ, 3, [(1, 2), (0, 7)]), pages(b"a", b"b")) == OKAY
    assert [("read", [b"a" * 1024, b"b" * 4096], 1536)] == backend.calls
    counters = disk.statistics.as_dict()
    assert (1, 5120, 0) == (counters["reads"], counters["bytes_read"], counters["errors"])


def test_segments_are_the_pages_themselves():
    class Filling(Recording):
        def read(self, buffers, offset):
            for buffer in buffers:
                buffer[:] = b"x" * len(buffer)

    page = memoryview(bytearray(4096))
    Disk(Filling()).transfer(transfer(READ, 0, [(2, 4)]), [page])
    assert bytes(1024) + b"x" * 1536 + bytes(1536) == page


def test_flush_with_data_writes_first():
    backend = Recording()
    disk = Disk(backend)
    assert disk.transfer(transfer(FLUSH, 0, [(0, 0)]), pages(b"a")) == OKAY
    assert [("flush",), ("write", [b"a" * 512], 0), ("flush",)] == backend.calls
    assert (1, 1) == (disk.statistics.as_dict()["flushes"], disk.statistics.as_dict()["writes"])


@pytest.mark.parametrize("operation", [READ, WRITE])
@pytest.mark.parametrize(
    ("result", "status"),
    [(None, OKAY), (1024, OKAY), (1023, ERROR), (0, ERROR), (1025, ERROR), ("all", ERROR)],
)
def test_what_the_backend_returns(operation, result, status, caplog):
    disk = Disk(Recording(result=result))
    assert status == disk.transfer(transfer(operation, 0, [(0, 1)]), pages(b"a"))
    assert ("1024 bytes" in caplog.text) is (status == ERROR)
    assert disk.statistics.as_dict()["errors"] == (status == ERROR)


@pytest.mark.parametrize(
    ("attributes", "request_", "status"),
    [
        ({}, (0, 8, False), OKAY),
        ({}, (SECTORS - 1, 1, False), OKAY),
        ({}, (SECTORS, 1, False), ERROR),
        ({}, (0, SECTORS + 1, False), ERROR),
        ({}, (1, 2**64 - 1, False), ERROR),
        ({}, (0, 8, True), EOPNOTSUPP),
        ({"read_only": True}, (0, 8, False), ERROR),
        ({"read_only": True}, (0, 8, True), ERROR),
        ({"sector_size": 4096}, (0, 8, False), OKAY),
        ({"sector_size": 4096}, (0, 4, False), ERROR),
        ({"sector_size": 4096}, (4, 8, False), ERROR),
    ],
)
def test_discard(attributes, request_, status):
    backend = Discarding(**attributes)
    sector, sectors, secure = request_
    disk = Disk(backend)
    assert status == disk.discard(Discard(1, DISCARD, sector, sectors, secure))
    expected = [("discard", sector * 512, sectors * 512)] if status == OKAY else []
    assert expected == backend.calls
    assert disk.statistics.as_dict()["refused"] == (status != OKAY)


def test_discard_that_the_backend_cannot():
    disk = Disk(Recording())
    assert disk.discard(Discard(1, DISCARD, 0, 8, secure=False)) == EOPNOTSUPP


def test_memory_is_counted():
    backend = Discarding()
    type(backend).memory = property(lambda self: len(self.calls) * 4096)
    try:
        disk = Disk(backend)
        disk.transfer(transfer(WRITE, 0, [(0, 7)]), pages(b"a"))
        assert disk.statistics.as_dict()["memory"] == 4096
        disk.discard(Discard(1, DISCARD, 0, 8, secure=False))
        assert disk.statistics.as_dict()["memory"] == 8192
    finally:
        del type(backend).memory


@pytest.mark.parametrize("value", [-1, None, "much", ZeroDivisionError()])
def test_memory_that_is_no_number(value, caplog):
    class Odd(Recording):
        @property
        def memory(self):
            if isinstance(value, Exception):
                raise value
            return value

    disk = Disk(Odd())
    assert disk.transfer(transfer(WRITE, 0, [(0, 7)]), pages(b"a")) == OKAY
    assert "memory of Odd" in caplog.text


def test_features():
    features = Disk(Discarding(sector_size=1024)).features(256, 4)
    assert features.sectors == SECTORS
    assert features.sector_size == 1024
    assert features.discard
    assert not features.read_only
    assert features.max_indirect_segments == 256
    assert features.max_ring_page_order == 4
    assert not Disk(Discarding(read_only=True)).features(0, 0).discard
    assert not Disk(Recording()).features(0, 0).discard
    small = Disk(Discarding(sector_size=4096, discard_granularity=512)).features(0, 0)
    assert small.discard_granularity == 4096


# -- surviving -----------------------------------------------------------------------------

USERS_DISK = """\
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 1 << 20
    def read(self, buffers, offset):
        int("seven")              # line 6
    def write(self, buffers, offset):
        exit(3)                   # line 8
    def flush(self):
        raise KeyboardInterrupt   # line 10
    def discard(self, offset, length):
        self.deeper()             # line 12
    def deeper(self):
        raise OSError(28, "full") # line 14
    def close(self):
        [][1]                     # line 16
"""


@pytest.fixture
def users_disk(tmp_path):
    (tmp_path / "mine.py").write_text(USERS_DISK)
    return Disk(open_backend(str(tmp_path / "mine.py"), {}))


def test_an_exception_is_an_error_and_a_line_that_names_the_place(users_disk, caplog, monkeypatch):
    monkeypatch.setattr(disk_module.time, "monotonic", iter(range(0, 100, 2)).__next__)
    assert users_disk.transfer(transfer(READ, 0, [(0, 7)]), pages(b"a")) == ERROR
    assert users_disk.transfer(transfer(WRITE, 0, [(0, 7)]), pages(b"a")) == ERROR
    assert users_disk.transfer(transfer(FLUSH, 0, []), ()) == ERROR
    assert users_disk.discard(Discard(1, DISCARD, 0, 8, secure=False)) == ERROR
    users_disk.close()
    lines = [record.getMessage() for record in caplog.records]
    places = [re.search(r"(\w+) failed in Disk: mine\.py:(\d+): (\w+)", line) for line in lines]
    assert [
        ("read", "6", "ValueError"),
        ("write", "8", "SystemExit"),
        ("flush", "10", "KeyboardInterrupt"),
        ("discard", "14", "OSError"),
        ("close", "16", "IndexError"),
    ] == [place.groups() for place in places]
    assert {"ERROR"} == {record.levelname for record in caplog.records}
    assert users_disk.statistics.as_dict()["errors"] == 4


def test_log_lines_are_rationed(users_disk, caplog, monkeypatch):
    """The guest decides how often a request fails, we decide how often we say so."""
    now = [100.0]
    monkeypatch.setattr(disk_module.time, "monotonic", lambda: now[0])
    for _ in range(1000):
        users_disk.transfer(transfer(READ, 0, [(0, 7)]), pages(b"a"))
    assert len(caplog.records) == 1
    now[0] += 1
    for _ in range(1000):
        users_disk.refuse("whatever")
    assert len(caplog.records) == 2
    last = caplog.records[-1]
    assert last.levelno == logging.WARNING
    assert "refused a request of the guest: whatever (and 999 lines like it before)" == (
        last.getMessage()
    )
    now[0] += 60
    users_disk.transfer(transfer(READ, 0, [(0, 7)]), pages(b"a"))
    assert caplog.records[-1].getMessage().endswith("(and 999 lines like it before)")
    assert users_disk.statistics.as_dict()["errors"] == 1001


def test_no_buffer_is_kept_in_a_traceback(users_disk):
    """Else the page could not be unmapped before the answer."""
    (page,) = pages(b"a")
    users_disk.transfer(transfer(READ, 0, [(2, 4)]), [page])
    array = page.obj
    page.release()
    array.append(0)  # impossible while a view of it exists
