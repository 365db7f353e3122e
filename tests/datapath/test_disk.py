"""A disk judges requests, calls its backend and survives it."""

from __future__ import annotations

import logging
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.backends import Backend
from xen_disk_py.backends.filter import Filter
from xen_disk_py.backends.loader import open_backend, wrap
from xen_disk_py.blkif import (
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    FLUSH_FAILED,
    OKAY,
    READ,
    WRITE,
    WRITE_BARRIER,
    Discard,
    Transfer,
)
from xen_disk_py.datapath import disk as disk_module
from xen_disk_py.datapath import statistics as count
from xen_disk_py.datapath.disk import RETRY, Disk
from xen_disk_py.errors import DeviceError

pytestmark = pytest.mark.shared
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


class Shredding(Discarding):
    def discard_securely(self, offset, length):
        self.calls.append(("discard securely", offset, length))


def transfer(operation, sector, segments):
    firsts, lasts = zip(*segments) if segments else ((), ())
    sectors = sum(last - first + 1 for first, last in segments)
    return Transfer(1, operation, sector, sectors, (9,) * len(segments), firsts, lasts)


def buffers(*contents):
    return [memoryview(bytearray(content)) for content in contents]


def judge(disk, request):
    """Return the status of a request that is not let pass; None for one that is."""
    refusal = disk.refusal(request)
    return None if refusal is None else refusal[1]


# -- judging -------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [READ, WRITE, WRITE_BARRIER, FLUSH])
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
    end = sector + transfer(0, 0, segments).sectors
    assert refusal == ((f"sectors {sector} to {end} of 64", ERROR) if is_refused else None)


@pytest.mark.parametrize("sector", [0, SECTORS, SECTORS + 1, 2**64 - 1])
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("operation", [FLUSH, WRITE_BARRIER])
def test_an_empty_flush_is_of_no_place(sector, read_only, operation):
    """Linux gives it sector 2**64 - 1, and turns flushes off for good if one fails."""
    disk = Disk(Recording(read_only=read_only, sector_size=4096))
    request = transfer(operation, sector, [])
    assert disk.refusal(request) is None
    assert disk.transfer(request, []) == OKAY
    assert {("flush",)} == set(disk.backend.calls)


@pytest.mark.parametrize(
    ("operation", "segments", "is_refused"),
    [
        (READ, [(0, 7)], False),
        (WRITE, [(0, 7)], True),
        (FLUSH, [(0, 7)], True),
        (WRITE_BARRIER, [(0, 7)], True),
    ],
)
def test_read_only(operation, segments, is_refused):
    disk = Disk(Recording(read_only=True))
    refusal = disk.refusal(transfer(operation, 0, segments))
    assert refusal == (("write to a read-only disk", ERROR) if is_refused else None)


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
        reason, status = refusal
        assert f"not aligned to {sector_size // 512}" in reason
        assert status == ERROR


# -- doing ---------------------------------------------------------------------------------


def do(disk, operation, data, sector=0):
    """Do a request at once or however long it takes, as a queue does."""
    length = sum(map(len, data))
    at_once = {READ: disk.serve_read, WRITE: disk.serve_write}.get(operation)
    status = at_once(data, sector * 512, length) if at_once else None
    if status is None:
        status = disk.transfer(whole(operation, sector, length), data)
    return status


def whole(operation, sector, length):
    """Ask for so many bytes; how they lie in pages does not matter any longer."""
    return Transfer(1, operation, sector, length // 512, (), (), ())


@pytest.mark.parametrize("threads", [1, 4])
def test_the_backend_gets_the_buffers_and_where_in_bytes(threads):
    backend = Recording(threads=threads)
    disk = Disk(backend)
    for operation in (READ, WRITE):
        assert OKAY == do(disk, operation, buffers(b"a" * 1024, b"b" * 4096), sector=3)
    given = [b"a" * 1024, b"b" * 4096], 1536
    assert [("read", *given), ("write", *given)] == backend.calls
    assert not any(disk.statistics.as_dict().values())  # the queue counts what was done


def test_buffers_are_not_copied():
    class Filling(Recording):
        def read(self, buffers, offset):
            for buffer in buffers:
                buffer[:] = b"x" * len(buffer)

    (page,) = buffers(bytes(4096))
    assert OKAY == do(Disk(Filling()), READ, [page[1024:2560]])
    assert bytes(1024) + b"x" * 1536 + bytes(1536) == page


class Quick(Recording):
    """Does at once as many bytes as it is told to."""

    threads = 2
    at_once = 0

    def read_nowait(self, buffers, offset):
        self.calls.append(("read_nowait", offset))
        return self.at_once

    def write_nowait(self, buffers, offset):
        self.calls.append(("write_nowait", offset))
        return self.at_once


@pytest.mark.parametrize("operation", [READ, WRITE])
@pytest.mark.parametrize(
    ("at_once", "status"), [(1024, OKAY), (0, None), (512, None), (1023, None), (2048, None)]
)
def test_what_takes_waiting_is_left_to_a_thread(operation, at_once, status):
    """All of it, though a part may have been done."""
    disk = Disk(Quick(at_once=at_once))
    name = {READ: "read", WRITE: "write"}[operation]
    assert status == getattr(disk, f"serve_{name}")(buffers(bytes(1000), bytes(24)), 512, 1024)
    assert [(f"{name}_nowait", 512)] == disk.backend.calls
    disk.backend.calls.clear()
    assert OKAY == disk.transfer(whole(operation, 1, 1024), buffers(b"a" * 1024))
    assert [(name, [b"a" * 1024], 512)] == disk.backend.calls


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_an_attempt_that_fails_is_an_error(operation, caplog):
    class Failing(Quick):
        def read_nowait(self, buffers, offset):
            raise OSError(5, "broken")

        write_nowait = read_nowait

    disk = Disk(Failing())
    assert ERROR == do(disk, operation, buffers(bytes(512)))
    assert "broken" in caplog.text
    assert [] == disk.backend.calls
    assert disk.statistics.as_dict()["errors"] == 1


def test_one_thread_is_asked_for_no_attempt():
    disk = Disk(Quick(threads=1))
    assert OKAY == do(disk, READ, buffers(bytes(512)))
    assert [("read", [bytes(512)], 0)] == disk.backend.calls


@pytest.mark.parametrize("data", [b"", b"a" * 512])
@pytest.mark.parametrize(
    ("operation", "calls"),
    [(FLUSH, ["write", "flush"]), (WRITE_BARRIER, ["flush", "write", "flush"])],
)
def test_the_order_of_flushing(operation, calls, data):
    """What came before a barrier is stable before what it writes (blkif.h)."""
    disk = Disk(Recording())
    assert do(disk, operation, buffers(data) if data else []) == OKAY
    expected = [name for name in calls if data or name == "flush"]
    assert expected == [name for name, *_ in disk.backend.calls]


@pytest.mark.parametrize("failing", ["write", "first flush", "last flush"])
def test_a_barrier_stops_where_it_fails(failing):
    class Failing(Recording):
        def write(self, buffers, offset):
            super().write(buffers, offset)
            if failing == "write":
                raise OSError(5, "broken")

        def flush(self):
            super().flush()
            if (len(self.calls) == 1) is (failing == "first flush") and failing != "write":
                raise OSError(5, "broken")

    disk = Disk(Failing())
    expected = ERROR if failing == "write" else FLUSH_FAILED
    assert expected == do(disk, WRITE_BARRIER, buffers(b"a" * 512))
    done = ["flush", "write", "flush"][: 1 + ["first flush", "write", "last flush"].index(failing)]
    assert done == [name for name, *_ in disk.backend.calls]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("operation", [READ, WRITE])
@pytest.mark.parametrize(
    ("result", "status"),
    [(None, OKAY), (1024, OKAY), (0, ERROR), (1025, ERROR), (-1, ERROR), ("all", ERROR)],
)
def test_what_the_backend_returns(operation, result, status, threads, caplog):
    disk = Disk(Recording(result=result, threads=threads))
    assert status == do(disk, operation, buffers(b"a" * 1000, b"b" * 24))
    assert ("failed in" in caplog.text) is (status == ERROR)
    assert disk.statistics.as_dict()["errors"] == (status == ERROR)
    assert 1 == len(disk.backend.calls)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_a_backend_is_called_again_for_what_it_left(operation, threads):
    """As often as it takes, each time with the rest and its place."""

    class Slow(Backend):
        size = 1 << 20

        def __init__(self, dice):
            self.threads = threads
            self.dice = dice
            self.data = bytearray(dice.randbytes(self.size))

        def _move(self, buffers, offset):
            room = sum(map(len, buffers))
            done = wanted = min(
                room, 512 * self.dice.choice([1, 2, self.dice.randint(1, room // 512)])
            )
            for buffer in buffers:
                part = buffer[: min(wanted, len(buffer))]
                if operation == READ:
                    part[:] = self.data[offset : offset + len(part)]
                else:
                    self.data[offset : offset + len(part)] = part
                offset += len(part)
                wanted -= len(part)
            return self.dice.choice([done, None]) if done == room else done

        read = write = _move

    dice = random.Random(operation)
    backend = Slow(dice)
    disk = Disk(backend)
    for _ in range(100):
        given = buffers(
            *[dice.randbytes(512 * dice.randint(1, 8)) for _ in range(dice.randint(1, 5))]
        )
        sector = dice.randrange(1900)
        before = b"".join(given)
        assert OKAY == do(disk, operation, given, sector)
        after = b"".join(given)
        if operation == WRITE:
            assert before == after
        assert after == backend.data[sector * 512 : sector * 512 + len(after)]


def test_a_backend_that_stops_half_way_says_how_far(caplog):
    class Half(Recording):
        def read(self, buffers, offset):
            return 0 if offset else 512

    disk = Disk(Half())
    assert ERROR == do(disk, READ, buffers(bytes(1024)))
    assert "EOFError: 512 of 1024 bytes" in caplog.text


@pytest.mark.parametrize(
    ("backend", "request_", "status"),
    [
        (Discarding(), (0, 8, False), OKAY),
        (Discarding(), (SECTORS - 1, 1, False), OKAY),
        (Discarding(), (SECTORS, 1, False), ERROR),
        (Discarding(), (0, SECTORS + 1, False), ERROR),
        (Discarding(), (1, 2**64 - 1, False), ERROR),
        (Discarding(), (0, 8, True), EOPNOTSUPP),
        (Shredding(), (0, 8, True), OKAY),
        (Shredding(), (0, 8, False), OKAY),
        (Shredding(), (1, 2**64 - 1, True), ERROR),
        (Shredding(read_only=True), (0, 8, True), ERROR),
        (Discarding(read_only=True), (0, 8, False), ERROR),
        (Discarding(read_only=True), (0, 8, True), ERROR),
        (Discarding(sector_size=4096), (0, 8, False), OKAY),
        (Discarding(sector_size=4096), (0, 4, False), ERROR),
        (Discarding(sector_size=4096), (4, 8, False), ERROR),
        (Recording(), (0, 8, False), EOPNOTSUPP),
        (Recording(), (0, 8, True), EOPNOTSUPP),
        (Recording(read_only=True), (0, 8, False), ERROR),
    ],
)
def test_discard(backend, request_, status):
    sector, sectors, secure = request_
    request = Discard(1, DISCARD, sector, sectors, secure)
    disk = Disk(backend)
    assert (None if status == OKAY else status) == judge(disk, request)
    if status == OKAY:
        backend.calls.clear()
        assert OKAY == disk.serve_discard(request)
        name = "discard securely" if secure else "discard"
        assert [(name, sector * 512, sectors * 512)] == backend.calls


@given(
    sector=st.integers(0, 2**34) | st.integers(0, 2**14).map(lambda part: part << 25),
    sectors=st.integers(1, 2**34),
)
def test_a_large_discard_is_done_in_parts(sector, sectors):
    """All of it, in order, each cut where no storage has a granule."""
    disk = Disk(Discarding(size=1 << 50))
    parts = []
    request = Discard(1, DISCARD, sector, sectors, secure=False)
    assert OKAY == disk.serve_discard(request, lambda: parts.append(len(disk.backend.calls)))
    calls = disk.backend.calls
    assert list(range(1, len(calls))) == parts
    offset = sector * 512
    for name, start, length in calls:
        assert ("discard", offset) == (name, start)
        assert 0 < length <= 16 << 30
        offset += length
        assert offset % (16 << 30) == 0 or (name, start, length) == calls[-1]
    assert offset == (sector + sectors) * 512


def test_a_large_discard_ends_at_the_first_error():
    class Full(Discarding):
        def discard(self, offset, length):
            super().discard(offset, length)
            if offset:
                raise OSError(28, "no space left on device")

    disk = Disk(Full(size=1 << 40))
    assert ERROR == disk.serve_discard(Discard(1, DISCARD, 0, 1 << 28, secure=False))
    assert [0, 16 << 30] == [offset for _, offset, _ in disk.backend.calls]


def test_memory_is_counted():
    class Growing(Recording):
        memory = 0

    disk = Disk(Growing())
    for memory in (4096, 8192, 0):
        disk.backend.memory = memory
        disk.count_memory()
        assert disk.statistics.as_dict()["memory"] == memory


@pytest.mark.parametrize("value", [-1, None, "much", ZeroDivisionError()])
def test_memory_that_is_no_number(value, caplog):
    class Odd(Recording):
        @property
        def memory(self):
            if isinstance(value, Exception):
                raise value
            return value

    Disk(Odd()).count_memory()
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
    assert (True, True, 1) == (features.flush, features.barrier, features.max_queues)
    assert (False, False) == (features.secure_discard, features.cdrom)
    shredding = Disk(Shredding()).features(0, 0, 8, cdrom=True)
    assert (True, True, 8) == (shredding.secure_discard, shredding.cdrom, shredding.max_queues)
    assert not Disk(Shredding(read_only=True)).features(0, 0).secure_discard
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
    for operation in (READ, WRITE):
        assert do(users_disk, operation, buffers(bytes(4096))) == ERROR
    assert do(users_disk, FLUSH, []) == FLUSH_FAILED
    assert users_disk.serve_discard(Discard(1, DISCARD, 0, 8, secure=False)) == ERROR
    users_disk.close()
    lines = [record.getMessage() for record in caplog.records]
    places = [
        re.search(r"(\w+) failed in mine\.py:Disk: mine\.py:(\d+): (\w+)", line) for line in lines
    ]
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
        do(users_disk, READ, buffers(bytes(4096)))
    assert len(caplog.records) == 1
    now[0] += 1
    for _ in range(1000):
        users_disk.refuse("whatever")
    assert len(caplog.records) == 2
    last = caplog.records[-1]
    assert last.levelno == logging.WARNING
    assert "refused a request of the guest: whatever (and 999 lines more before)" == (
        last.getMessage()
    )
    now[0] += 60
    do(users_disk, READ, buffers(bytes(4096)))
    assert caplog.records[-1].getMessage().endswith("(and 999 lines more before)")
    assert users_disk.statistics.as_dict()["errors"] == 1001


def test_whatever_a_guest_finds_to_be_told_of_has_one_ration(users_disk, caplog, monkeypatch):
    """By disk, not by what is said, nor by where."""
    now = [100.0]
    monkeypatch.setattr(disk_module.time, "monotonic", lambda: now[0])
    for number in range(1000):
        users_disk.say(logging.ERROR, f"cannot connect to the frontend: {number}")
        users_disk.refuse(f"{number}")
    assert len(caplog.records) == 5
    for _ in range(10):
        now[0] += 1
        for number in range(1000):
            users_disk.refuse(f"{number}")
    assert len(caplog.records) == 15


@pytest.mark.parametrize("operation", [READ, WRITE, FLUSH])
def test_no_buffer_is_kept_in_a_traceback(users_disk, operation):
    """Else the page could not be unmapped before the answer."""
    (page,) = buffers(bytes(4096))
    array = page.obj
    do(users_disk, operation, [page[1024:2560]])
    users_disk.transfer(whole(operation, 0, 1536), [page[1024:2560]])
    page.release()
    array.append(0)  # impossible while a view of it exists


# -- holding -------------------------------------------------------------------------------


class Storage(Discarding):
    """Moves as many bytes each time as it is told to, or raises what it is told to."""

    can_discard = True

    def __init__(self, *results, **attributes):
        super().__init__(**attributes)
        self.results = list(results)

    def _next(self, *call):
        self.calls.append(call)
        result = self.results.pop(0) if self.results else None
        if isinstance(result, BaseException):
            raise result
        return result

    def read(self, buffers, offset):
        return self._next("read", offset, sum(map(len, buffers)))

    def write(self, buffers, offset):
        return self._next("write", offset, sum(map(len, buffers)))

    def read_nowait(self, buffers, offset):
        return self._next("read", offset, sum(map(len, buffers)))

    def write_nowait(self, buffers, offset):
        return self._next("write", offset, sum(map(len, buffers)))

    def flush(self):
        self._next("flush")

    def discard(self, offset, length):
        self._next("discard", offset, length)


BROKEN = OSError(28, "No space left on device")


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_what_the_storage_cannot_do_is_not_done_rather_than_an_error(
    operation, threads, caplog, monkeypatch
):
    monkeypatch.setattr(disk_module.time, "monotonic", lambda: 100.0)
    disk = Disk(Storage(BROKEN, BROKEN, threads=threads), holds=True)
    do_first = {READ: disk.serve_read, WRITE: disk.serve_write}[operation]
    given = buffers(bytes(1024))
    assert do_first(given, 512, 1024) is None
    assert RETRY == disk.transfer(whole(operation, 1, 1024), given)
    assert OKAY == disk.transfer(whole(operation, 1, 1024), given)
    name = {READ: "read", WRITE: "write"}[operation]
    assert [(name, 512, 1024)] * 3 == disk.backend.calls
    assert 0 == disk.statistics.as_dict()["errors"]
    (line,) = caplog.messages  # not one for each failure
    assert line.startswith(f"{name} failed in Storage, to be retried: test_disk.py:")
    assert line.endswith("OSError: [Errno 28] No space left on device")


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_a_part_that_was_done_before_the_storage_failed_is_done_again(operation, threads):
    disk = Disk(Storage(512, BROKEN, 512, BROKEN, 1024, 512, threads=threads), holds=True)
    do_first = {READ: disk.serve_read, WRITE: disk.serve_write}[operation]
    given = buffers(bytes(1000), bytes(536))
    request = whole(operation, 1, 1536)
    assert do_first(given, 512, 1536) is None
    if threads > 1:  # the attempt did a part, and that is all
        assert RETRY == disk.transfer(request, given)
    assert RETRY == disk.transfer(request, given)
    assert OKAY == disk.transfer(request, given)
    name = {READ: "read", WRITE: "write"}[operation]
    parts = {
        1: [(512, 1536), (1024, 1024)] * 2 + [(512, 1536), (1536, 512)],
        4: [(512, 1536)] * 2 + [(512, 1536), (1024, 1024)] + [(512, 1536), (1536, 512)],
    }[threads]
    assert [(name, *part) for part in parts] == disk.backend.calls


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_barrier_is_done_again_from_its_beginning(failing):
    backend = Storage(*[None] * failing, BROKEN)
    disk = Disk(backend, holds=True)
    request = whole(WRITE_BARRIER, 0, 512)
    assert RETRY == disk.transfer(request, buffers(bytes(512)))
    backend.calls.clear()
    assert OKAY == disk.transfer(request, buffers(bytes(512)))
    again = ["write"] if failing == 2 else []  # what the second flush did not store
    assert [*again, "flush", "write", "flush"] == [name for name, *_ in backend.calls]


def test_flushes_and_discards_are_held():
    disk = Disk(Storage(BROKEN, None, BROKEN, None), holds=True)
    discard = Discard(1, DISCARD, 0, 8, secure=False)
    assert [RETRY, OKAY] == [disk.transfer(whole(FLUSH, 0, 0), []) for _ in range(2)]
    assert [RETRY, OKAY] == [disk.serve_discard(discard) for _ in range(2)]


@pytest.mark.parametrize("result", [ValueError("no"), SystemExit(3), 0, 2048, "all"], ids=repr)
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_what_is_wrong_with_the_backend_itself_is_an_error_at_once(operation, result):
    """It would be wrong again, and again."""
    disk = Disk(Storage(result), holds=True)
    assert ERROR == do(disk, operation, buffers(bytes(1024)))
    assert 1 == len(disk.backend.calls)
    assert 1 == disk.statistics.as_dict()["errors"]


@pytest.mark.parametrize("operation", [READ, WRITE, FLUSH])
def test_a_disk_that_does_not_hold_answers_with_an_error(operation):
    disk = Disk(Storage(BROKEN))
    assert ERROR == do(disk, operation, buffers(bytes(1024)))
    assert 1 == disk.statistics.as_dict()["errors"]


def test_retry_is_no_status_of_the_protocol():
    assert RETRY not in (OKAY, ERROR, EOPNOTSUPP)


def test_a_disk_is_not_made_smaller_while_a_request_is_queued_for_retry(monkeypatch):
    """It was judged by the size before, and will be tried again."""

    class Elastic(Storage):
        def resize(self, size):
            self.calls.append(("resize", size))
            return size

    monkeypatch.setattr(disk_module, "SETTLING", 0.01)
    disk = Disk(Elastic(), holds=True)
    words = disk.statistics.of_queue(0).words
    words[count.IN_FLIGHT] = words[count.HELD] = 1
    settled = disk.statistics.settled

    def later(*, in_order):
        is_settled = settled(in_order=in_order)
        words[count.REQUESTS] += 9  # others overtake it
        return is_settled

    monkeypatch.setattr(disk.statistics, "settled", later)
    with pytest.raises(DeviceError, match="a request has not returned"):
        disk.resize(SECTORS * 256, force=True)
    assert [] == disk.backend.calls
    words[count.IN_FLIGHT] = words[count.HELD] = 0
    disk.resize(SECTORS * 256, force=True)
    assert [("resize", SECTORS * 256)] == disk.backend.calls


def test_other_settings_of_a_filter_let_no_write_pass_after_a_flush_that_failed():
    backend = wrap(Recording(threads=4), ["error:operations=flush"])
    disk = Disk(backend)
    assert FLUSH_FAILED == disk._flush()
    backend.configure(
        rate=1.0,
        every=0,
        operations="flush",
        errno="EIO",
        range="",
        armed="no",
        sticky=False,
        seed=0,
    )
    disk.bind()
    with pytest.raises(OSError, match="an earlier flush failed"):
        disk._write([memoryview(bytes(512))], 0)
    with pytest.raises(OSError, match="an earlier flush failed"):
        disk.moves.write([memoryview(bytes(512))], 0)


def test_a_filter_whose_pause_is_broken_keeps_nobody_waiting(caplog):
    class Broken(Filter):
        def read(self, buffers, offset):
            return self.source.read(buffers, offset)

        def pause(self, operation, length):
            raise ValueError(operation)

    disk = Disk(Broken(Recording(threads=4)))
    call = object()
    assert (0.0, call) == disk.pause(Transfer(1, WRITE, 0, 1, (1,), (0,), (0,)), call)
    assert "ValueError: write" in caplog.text


def test_a_filter_that_is_broken_after_its_pause_has_the_request_answered(caplog):
    class Broken(Filter):
        def read(self, buffers, offset):
            return self.source.read(buffers, offset)

        def pause(self, operation, length):
            return 0.5

        def after_pause(self, call):
            raise ValueError("nothing is done")

    disk = Disk(Broken(Recording(threads=4)))
    for operation, status in ((WRITE, ERROR), (FLUSH, FLUSH_FAILED)):
        pause, call = disk.pause(Transfer(1, operation, 0, 1, (1,), (0,), (0,)), lambda: OKAY)
        assert pause
        assert status == call()
    assert "ValueError: nothing is done" in caplog.text


def test_a_flush_with_data_waits_for_both():
    disk = Disk(wrap(Recording(threads=4), ["delay:write=1s,flush=2s"]))
    for operation, sectors, expected in ((FLUSH, 1, 3.0), (FLUSH, 0, 2.0), (WRITE, 1, 1.0)):
        request = Transfer(1, operation, 0, sectors, (), (), ())
        assert expected == disk.pause(request, lambda: OKAY)[0]


class Elsewhere:
    """Other processes that serve a disk: notes what they are told, and what the storage was."""

    def __init__(self, disk, refuses=""):
        self.disk, self.refuses, self.told = disk, refuses, []
        disk.elsewhere = self

    def note(self, what, *values):
        self.told.append((what, *values, self.disk.backend.size // 512))
        if what == self.refuses:
            self.refuses = ""
            raise DeviceError("no memory")

    def check(self):
        self.note("check")

    def admit(self, sectors):
        self.note("admit", sectors)

    def resize(self, size):
        self.note("resize", size // 512)


class Growing(Recording):
    def resize(self, size):
        self.size = size or self.size
        return self.size


@pytest.mark.parametrize(
    ("sectors", "told"),
    [
        # admitted when there is room everywhere
        (96, [("check", 64), ("resize", 96, 96), ("admit", 96, 96)]),
        # refused before it is given up
        (32, [("check", 64), ("admit", 32, 64), ("resize", 32, 32)]),
    ],
)
def test_other_processes_follow_a_new_size(sectors, told):
    disk = Disk(Growing())
    elsewhere = Elsewhere(disk)
    assert sectors * 512 == disk.resize(sectors * 512, force=True)
    assert told == elsewhere.told
    assert sectors == disk.sectors


@pytest.mark.parametrize(
    ("refuses", "sectors", "told", "is_left"),
    [
        ("check", 96, [], 64),
        ("resize", 96, [("resize", 96, 96)], 64),
        # one admits it already: what it has answered stays in the backend, which is that long
        ("admit", 96, [("resize", 96, 96), ("admit", 96, 96), ("admit", 64, 96)], 64),
        ("check", 32, [], 64),
        # one refuses already what is there yet
        ("admit", 32, [("admit", 32, 64), ("admit", 64, 64)], 64),
        ("resize", 32, [("admit", 32, 64), ("resize", 32, 32)], 32),  # nothing is there any longer
    ],
)
def test_a_size_that_another_process_cannot_have_is_nobody_s(refuses, sectors, told, is_left):
    disk, noted = Disk(Growing()), []
    elsewhere = Elsewhere(disk, refuses)
    with pytest.raises(DeviceError, match="no memory"):
        disk.resize(sectors * 512, force=True, on_change=noted.append)
    assert is_left == disk.sectors
    assert [("check", 64), *told] == elsewhere.told
    assert noted == ([] if refuses == "check" else [sectors * 512])


def test_a_disk_of_several_processes_is_not_recomposed():
    disk = Disk(Growing())
    Elsewhere(disk)
    with pytest.raises(DeviceError, match="connect it without --queues-in processes"):
        disk.recompose(lambda backend: backend)
