"""The requests of a trace once more: in the recorded order, and compared."""

from __future__ import annotations

import errno
import threading

import pytest

from backends.filters.test_filters import Memory
from xen_disk_py.backends import Backend
from xen_disk_py.backends.asynchronous import Asynchronous
from xen_disk_py.backends.replay import Replay
from xen_disk_py.errors import BackendError
from xen_disk_py.trace.format import (
    DISCARD,
    DISCARD_SECURELY,
    FLUSH,
    GAP,
    READ,
    STOPPED,
    WRITE,
    Record,
)

SECTOR = 512


def write(number, start, latency, sector, letter, status=0):
    data = letter * SECTOR
    return Record(number, WRITE, start, latency, sector * SECTOR, SECTOR, status, data=data)


def read(number, start, latency, sector, sectors=1, status=0):
    return Record(number, READ, start, latency, sector * SECTOR, sectors * SECTOR, status)


def replay(disk, records, **options):
    done = Replay(disk, **{"speed": None, "compare": True, **options})
    done.run(records)
    return done


class Library(Asynchronous):
    def __init__(self, disk):
        super().__init__()
        self.disk = disk

    def _begin(self, request):
        error = None
        try:
            if request.operation == 0:
                self.disk.read([memoryview(request.memory)], request.offset)
            elif request.operation == 1:
                self.disk.write([memoryview(request.memory)], request.offset)
        except OSError as failure:
            error = failure
        self._end(request, error)

    def _progress(self):
        self._told()


class Many(Memory):
    def __init__(self):
        super().__init__()
        self.threads = 8


class AsynchronousMemory(Memory):
    def __init__(self):
        super().__init__()
        self.asynchronous = Library(self)


def test_too_few_threads_end_it_and_nothing_stays(monkeypatch):
    before = set(threading.enumerate())
    start = threading.Thread.start

    def start_few(thread):
        if len(threading.enumerate()) > len(before) + 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    with pytest.raises(BackendError, match="3 of 8 threads are to be had: can't start new thread"):
        replay(Many(), [write(0, 0, 1, 0, b"a")])
    assert before == set(threading.enumerate())


@pytest.fixture(params=[Memory, Many, AsynchronousMemory])
def disk(request):
    disk = request.param()
    yield disk
    if disk.asynchronous is not None:
        disk.asynchronous.close()


def test_what_was_written_is_read_again(disk):
    records = [
        write(0, 0, 10, 1, b"a"),
        write(1, 20, 10, 1, b"b"),
        Record(2, FLUSH, 40, 5, 0, 0),
        Record(3, GAP, 45, 0, 0, 0),
        read(3, 50, 5, 0, 3),
        Record(4, STOPPED, 60, 0, 0, 0),
    ]
    done = replay(disk, records)
    assert (4, 0, 0) == (done.requests, done.failed, done.different)
    assert SECTOR == done.compared  # nobody knows what the other sectors had before


def test_something_else_is_found(disk):
    records = [write(0, 0, 10, 1, b"a"), write(1, 0, 10, 2, b"b"), read(2, 20, 5, 1, 2)]
    disk.source_write = disk.write

    def lazy(buffers, offset):
        if offset != SECTOR:
            disk.source_write(buffers, offset)

    disk.write = lazy
    done = replay(disk, records)
    assert (2 * SECTOR, SECTOR, 2) == (done.compared, done.different, done.first_different)


def test_what_is_written_meanwhile_may_be_read_or_not(disk):
    records = [write(0, 0, 10, 1, b"a"), read(2, 21, 50, 1), write(1, 20, 60, 1, b"b")]
    assert 0 == replay(disk, records).different


def test_of_two_writes_at_once_nobody_knows_the_outcome(disk):
    records = [write(0, 0, 30, 1, b"a"), write(1, 10, 30, 1, b"b"), read(2, 50, 5, 1)]
    assert 0 == replay(disk, records).different


def test_a_discard_makes_the_content_unknown():
    class Discards(Memory):
        def discard(self, offset, length):
            pass

    records = [write(0, 0, 1, 1, b"a"), Record(1, DISCARD, 5, 1, 0, 4096), read(2, 9, 1, 1)]
    assert 0 == replay(Discards(), records).compared


def test_what_the_disk_cannot_discard_is_skipped():
    class Plain(Memory):
        discard_securely = Backend.discard_securely

    records = [Record(0, DISCARD_SECURELY, 0, 1, 0, 4096), read(1, 5, 1, 0, 0)]
    assert 2 == replay(Plain(), records).skipped


def test_other_outcomes_are_counted():
    class Failing(Memory):
        def write(self, buffers, offset):
            raise OSError(errno.ENOSPC, "full")

    records = [write(0, 0, 1, 0, b"a"), write(1, 5, 1, 0, b"b", status=28), read(2, 9, 1, 0, 1, 5)]
    done = replay(Failing(), records)
    assert (1, 1) == (done.failed, done.succeeded)


def test_as_many_are_under_way_as_were():
    """Two overlapped in the recording: each waits here for the other."""
    met = threading.Barrier(2)

    class Meeting(Many):
        def read(self, buffers, offset):
            met.wait(30)
            return super().read(buffers, offset)

    done = replay(Meeting(), [read(0, 0, 20, 0), read(1, 10, 20, 1)])
    assert 0 == done.failed


def test_nothing_begins_before_what_had_ended_has_ended():
    order = []

    class Slow(Many):
        def write(self, buffers, offset):
            order.append("begins")
            order.append("ends")

        def flush(self):
            order.append("flush")

    records = [write(0, 0, 10, 0, b"a"), Record(1, FLUSH, 20, 5, 0, 0), write(2, 30, 1, 0, b"b")]
    replay(Slow(), records, compare=False)
    assert ["begins", "ends", "flush", "begins", "ends"] == order


def test_requests_wait_for_their_time(disk):
    done = replay(disk, [read(0, 0, 1, 0), read(1, 200_000_000, 1, 0)], speed=10.0)
    assert done.seconds >= 0.02
    assert done.behind >= 0
