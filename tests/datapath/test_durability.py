"""A flush that failed is not taken for a good one when it is asked again.

The storage really loses pages: a loop device over a file on a tmpfs that is full, which is what a
thin volume is when its pool has run out.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import socket
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.backends import Backend, StorageError
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import (
    DISCARD,
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
from xen_disk_py.datapath import durability
from xen_disk_py.datapath.disk import RETRY, Disk
from xen_disk_py.datapath.durability import FlushFailed, passes
from xen_disk_py.datapath.statistics import WORDS, Statistics

MIB = 1 << 20
pytestmark = pytest.mark.shared
SIZE = 32 * MIB
ROOM = 8  # MiB
CHUNK = 64 << 10


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr}")
    return done.stdout.strip()


class Thin:
    """A block device of 32 MiB with room for fewer."""

    def __init__(self, directory, stack):
        run("mount", "-t", "tmpfs", "-o", f"size={ROOM}M", "tmpfs", str(directory))
        stack.callback(run, "umount", "-l", str(directory))
        self.directory = directory
        backing = directory / "backing"
        with open(backing, "wb") as file:
            file.truncate(SIZE)
        self.path = run("losetup", "-f", "--show", str(backing))
        stack.callback(run, "losetup", "-d", self.path)

    def grow(self):
        run("mount", "-o", f"remount,size={2 * SIZE >> 20}M", str(self.directory))

    def stored(self):
        """What is on stable storage, past every cache."""
        run("blockdev", "--flushbufs", self.path)
        with open(self.directory / "backing", "rb") as file:
            return file.read()


@pytest.fixture
def thin(tmp_path):
    directory = tmp_path / "pool"
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            made = Thin(directory, stack)
        except (OSError, FileNotFoundError) as error:
            pytest.skip(f"needs root, tmpfs and loop devices: {error}")
        yield made


def pattern(seed):
    return random.Random(seed).randbytes(CHUNK)


def flush(disk):
    return disk.transfer(Transfer(1, FLUSH, 0, 0, (), (), ()), [])


def write(disk, offset, data):
    status = disk.serve_write([memoryview(bytearray(data))], offset, len(data))
    assert status is not None
    return status


def fill(disk, first=0, last=16 * MIB):
    """Write more than there is room for; what was written, by offset."""
    written = {}
    for offset in range(first, last, CHUNK):
        written[offset] = pattern(offset)
        assert OKAY == write(disk, offset, written[offset])
    return written


def is_stored(thin, written):
    stored = thin.stored()
    return all(stored[offset : offset + len(data)] == data for offset, data in written.items())


@pytest.mark.parametrize("backend", [RawBackend, MmapBackend])
def test_no_flush_is_good_after_one_that_failed(thin, backend):
    disk = Disk(backend(thin.path))
    written = fill(disk)
    assert FLUSH_FAILED == flush(disk)
    for _ in range(3):
        assert FLUSH_FAILED == flush(disk)
    thin.grow()
    assert FLUSH_FAILED == flush(disk)
    assert FLUSH_FAILED == disk.transfer(
        Transfer(1, WRITE_BARRIER, 0, 8, (1,), (0,), (7,)), [memoryview(bytearray(4096))]
    )
    disk.close()
    assert not is_stored(thin, written)  # the storage did lose what the flush was for


@pytest.mark.parametrize("backend", [RawBackend, MmapBackend])
def test_no_write_is_good_after_a_flush_that_failed(thin, backend):
    """A guest that is told so flushes no more: Linux's takes what is answered then for durable."""
    first = Disk(backend(thin.path))
    fill(first)
    assert FLUSH_FAILED == flush(first)
    thin.grow()
    request, page = Transfer(1, WRITE, 0, 8, (1,), (0,), (7,)), [memoryview(bytearray(4096))]
    for disk in (first, Disk(first.backend)):
        disk.statistics = first.statistics  # the record's
        assert ERROR == disk.transfer(request, page)
    first.close()


def test_nor_is_one_of_a_successor(thin):
    words = memoryview(bytearray(8 * WORDS)).cast("Q")
    first = Disk(RawBackend(thin.path), Statistics(words))
    fill(first)
    assert FLUSH_FAILED == flush(first)
    first.close()
    thin.grow()
    for holds in (False, True):
        second = Disk(RawBackend(thin.path), holds=holds)
        second.statistics = Statistics(words)  # the record's
        assert ERROR == write(second, 0, pattern(1))
        assert FLUSH_FAILED == flush(second)
        second.close()


def test_of_flushes_at_once_none_is_good(thin):
    disk = Disk(RawBackend(thin.path))
    fill(disk)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(flush(disk))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.close()
    assert [FLUSH_FAILED] * 8 == statuses


@pytest.mark.parametrize("backend", [RawBackend, MmapBackend])
def test_a_disk_that_retries_has_everything_in_the_end(thin, backend, monkeypatch):
    disk = Disk(backend(thin.path), holds=True)
    written = fill(disk)
    assert RETRY == flush(disk)
    assert RETRY == flush(disk)
    assert disk.statistics.flush_failed
    thin.grow()
    assert OKAY == flush(disk)
    assert not disk.statistics.flush_failed
    assert is_stored(thin, written)
    more = fill(disk, 16 * MIB, 20 * MIB)
    assert OKAY == flush(disk)
    disk.close()
    assert is_stored(thin, {**written, **more})


def test_copies_are_bounded_and_a_write_waits_when_nothing_can_be_flushed(thin, monkeypatch):
    monkeypatch.setattr(durability, "COPIES", 12 * MIB)
    disk = Disk(RawBackend(thin.path), holds=True)
    written = fill(disk, last=12 * MIB)
    data = pattern(99)
    assert disk.serve_write([memoryview(bytearray(data))], 13 * MIB, CHUNK) is None
    request = Transfer(1, WRITE, 13 * MIB // 512, CHUNK // 512, (1,), (0,), (7,))
    assert RETRY == disk.transfer(request, [memoryview(bytearray(data))])
    thin.grow()
    assert OKAY == disk.transfer(request, [memoryview(bytearray(data))])
    assert OKAY == flush(disk)
    disk.close()
    assert is_stored(thin, {**written, 13 * MIB: data})


class Fork:
    """A process that does with a disk what it is told, a word at a time."""

    def __init__(self, number, disk):
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        try:
            disk.after_fork(number)
            do = {"flush": flush, "fill": fill, "fsync": fsync}
            while word := theirs.recv(100).decode():
                found = write(disk, 0, pattern(0)) if word == "write" else do[word](disk)
                theirs.send(str(found if word != "fill" else 0).encode())
        finally:
            os._exit(0)

    def ask(self, word):
        self._ours.send(word.encode())
        return int(self._ours.recv(100))

    def end(self):
        self._ours.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def fsync(disk):
    """What the kernel says to this process, whatever is known of others."""
    try:
        disk.backend.flush()
    except OSError as error:
        return error.errno
    return 0


@pytest.fixture
def forks(thin):
    """Three processes that serve one disk."""
    disks, made = [], []

    def forks(backend):
        disk = Disk(backend(thin.path), Statistics(memoryview(mmap.mmap(-1, 8 * WORDS)).cast("Q")))
        disks.append(disk)
        disk.share()
        for number in range(3):
            made.append(Fork(number, disk))
        return made

    yield forks
    for each in made:
        each.end()
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("backend", [RawBackend, MmapBackend])
def test_no_process_of_several_takes_a_flush_or_write_for_good_after_one_that_failed(
    thin, forks, backend
):
    """One writes, another flushes: the storage loses what was written."""
    writer, flusher, other = forks(backend)
    assert OKAY == other.ask("write")
    assert OKAY == flusher.ask("flush")
    writer.ask("fill")
    assert FLUSH_FAILED == flusher.ask("flush")
    thin.grow()
    for each in (other, writer, flusher):
        assert FLUSH_FAILED == each.ask("flush")
        assert ERROR == each.ask("write")


@pytest.mark.parametrize("backend", [RawBackend, MmapBackend])
def test_the_kernel_tells_each_process_of_an_error(thin, forks, backend):
    """So none depends on what the others say of it."""
    everyone = forks(backend)
    everyone[0].ask("fill")
    assert [True] * 3 == [each.ask("fsync") in (errno.EIO, errno.ENOSPC) for each in everyone]
    thin.grow()
    assert [0] * 3 == [each.ask("fsync") for each in everyone]


def test_a_flush_in_one_process_is_for_what_all_have_written(forks):
    everyone = forks(RawBackend)
    for each in everyone:
        assert OKAY == each.ask("write")
    assert [OKAY] * 6 == [each.ask("flush") for each in everyone * 2]


# -- what is no matter of the storage -------------------------------------------------------


class Cache(Backend):
    """A disk whose cache loses what a failed flush was for, as Linux' does; fails when told to."""

    size = 64 << 10

    def __init__(self, threads=1, repeats_flush=False):
        self.threads = threads
        self.repeats_flush = repeats_flush
        self.stable = bytearray(self.size)
        self.cached = {}
        self.is_broken = False
        self.flushes = 0

    def read(self, buffers, offset):
        raise NotImplementedError

    def write(self, buffers, offset):
        for buffer in buffers:
            for at in range(0, len(buffer), 512):
                self.cached[offset + at] = bytes(buffer[at : at + 512])
            offset += len(buffer)

    def flush(self):
        self.flushes += 1
        if self.is_broken:
            if not self.repeats_flush:
                self.cached.clear()
            raise OSError(errno.EIO, "lost")
        for offset, data in self.cached.items():
            self.stable[offset : offset + 512] = data
        self.cached.clear()

    def discard(self, offset, length):
        pass


SECTORS = 8
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SECTORS - 1), st.integers(1, 3)),
        st.tuples(st.just("discard"), st.integers(0, SECTORS - 1), st.integers(1, 3)),
        st.tuples(st.just("flush"), st.booleans()),
    ),
    max_size=30,
)


@given(steps=steps)
def test_a_good_flush_means_that_all_is_stable(steps):
    """Whatever is written, discarded and lost before."""
    disk = Disk(Cache(), holds=True)
    expected, number = {}, 0
    for what, *how in steps:
        if what == "write":
            sector, length = how[0], min(how[1], SECTORS - how[0])
            number += 1
            data = bytes([number]) * 512 * length
            assert OKAY == write(disk, sector * 512, data)
            for at in range(sector, sector + length):
                expected[at] = data[:512]
        elif what == "discard":
            sector, length = how[0], min(how[1], SECTORS - how[0])
            assert OKAY == disk.serve_discard(Discard(1, DISCARD, sector, length, secure=False))
            for at in range(sector, sector + length):
                expected.pop(at, None)
        else:
            disk.backend.is_broken = how[0]
            assert (RETRY if how[0] else OKAY) == flush(disk)
            if not how[0]:
                for at, data in expected.items():
                    assert data == disk.backend.stable[at * 512 : at * 512 + 512]


@given(
    writes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=8),
    cuts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=3),
)
def test_of_what_was_lost_the_newest_is_written_again_once(writes, cuts):
    copies, expected = durability._SharedCopies(), {}
    for number, (offset, length) in enumerate(writes):
        copies.add([memoryview(bytes([number + 1]) * length)], offset, None)
        expected.update(dict.fromkeys(range(offset, offset + length), number + 1))
    copies.lose(for_good=False)
    for offset, length in cuts:
        copies.forget(offset, length)
        for at in range(offset, offset + length):
            expected.pop(at, None)
    found = {}
    for offset, data in copies.lost:
        for at, byte in enumerate(data, offset):
            assert at not in found
            found[at] = byte
    assert expected == found
    assert copies.is_lost(0, 40) == bool(expected)


def test_nobody_reads_what_may_be_lost():
    class Reading(Cache):
        def read(self, buffers, offset):
            for buffer in buffers:
                buffer[:] = b"r" * len(buffer)

    disk = Disk(Reading(), holds=True)
    page = [memoryview(bytearray(512))]
    write(disk, 512, b"a" * 512)
    disk.backend.is_broken = True
    assert RETRY == flush(disk)
    assert disk.serve_read(page, 512, 512) is None
    assert RETRY == disk.transfer(Transfer(1, READ, 1, 1, (1,), (0,), (0,)), page)
    assert OKAY == disk.serve_read(page, 1024, 512)
    write(disk, 512, b"b" * 512)
    assert OKAY == disk.serve_read(page, 512, 512)  # it is in the cache again
    disk.backend.is_broken = False
    assert OKAY == flush(disk)
    assert b"b" * 512 == disk.backend.stable[512:1024]


@given(offset=st.integers(0, 40), length=st.integers(1, 40))
def test_what_is_discarded_is_not_written_again(offset, length):
    disk = Disk(Cache(), holds=True)
    disk.backend.is_broken = True
    assert OKAY == write(disk, 10 * 512, b"".join(bytes([n]) * 512 for n in range(1, 21)))
    assert RETRY == flush(disk)
    assert OKAY == disk.serve_discard(Discard(1, DISCARD, offset, length, secure=False))
    disk.backend.is_broken = False
    assert OKAY == flush(disk)
    for sector in range(64):
        is_there = 10 <= sector < 30 and not offset <= sector < offset + length
        data = bytes([sector - 9]) * 512 if is_there else bytes(512)
        assert data == disk.backend.stable[sector * 512 : sector * 512 + 512]


def test_a_disk_that_can_repeat_its_flush_is_asked_again():
    disk = Disk(Cache(repeats_flush=True))
    write(disk, 0, b"a" * 512)
    disk.backend.is_broken = True
    assert FLUSH_FAILED == flush(disk)
    disk.backend.is_broken = False
    assert OKAY == flush(disk)
    assert b"a" * 512 == disk.backend.stable[:512]
    assert not disk.statistics.flush_failed


def test_flushes_that_were_asked_for_together_are_one():
    class Slow(Cache):
        def __init__(self):
            super().__init__()
            self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

        def flush(self):
            super().flush()
            self.entered.release()
            assert self.go.acquire(timeout=30)

    disk = Disk(Slow())
    threads = [threading.Thread(target=flush, args=(disk,)) for _ in range(6)]
    threads[0].start()
    assert disk.backend.entered.acquire(timeout=30)
    for thread in threads[1:]:
        thread.start()
    lock = disk._durability._flushing
    disk.backend.go.release()
    assert disk.backend.entered.acquire(timeout=30)
    disk.backend.go.release(6)
    for thread in threads:
        thread.join(30)
    assert not lock.locked()
    assert 2 <= disk.backend.flushes <= 6


def test_without_the_gil_a_flush_is_between_two_fences(monkeypatch):
    """What was written is there before a flush looks which have begun; and its own number is."""
    seen = []

    class Fence:
        def barrier(self):
            seen.append(served._flushes[0])

    monkeypatch.setattr(durability, "HAS_GIL", False)
    monkeypatch.setattr(durability, "load_fence", Fence)
    served = durability.Durability(Cache(), Statistics(), keeps=False)
    served.flush()
    served.flush()
    assert [0, 1, 1, 2] == seen


def test_nothing_is_written_while_copies_are_written_again():
    """A newer write must not be overtaken by an older copy of the same sectors."""

    class Watched(Cache):
        def __init__(self):
            super().__init__(threads=4)
            self.entered, self.go = threading.Event(), threading.Event()
            self.again = False

        def write(self, buffers, offset):
            if self.again:
                self.again = False
                self.entered.set()
                assert self.go.wait(30)
            super().write(buffers, offset)

        def write_nowait(self, buffers, offset):
            super().write(buffers, offset)
            return sum(map(len, buffers))

    disk = Disk(Watched(), holds=True)
    request = Transfer(1, WRITE, 0, 1, (1,), (0,), (0,))
    assert OKAY == disk.transfer(request, [memoryview(bytearray(b"a" * 512))])
    disk.backend.is_broken = True
    assert RETRY == flush(disk)
    disk.backend.is_broken, disk.backend.again = False, True
    statuses = []
    flushing = threading.Thread(target=lambda: statuses.append(flush(disk)))
    flushing.start()
    assert disk.backend.entered.wait(30)
    newer = [memoryview(bytearray(b"b" * 512))]
    assert disk.serve_write(newer, 0, 512) is None  # not at once: a thread waits
    writing = threading.Thread(target=lambda: statuses.append(disk.transfer(request, newer)))
    writing.start()
    disk.backend.go.set()
    for thread in (flushing, writing):
        thread.join(30)
    assert [OKAY, OKAY] == statuses
    assert OKAY == flush(disk)
    assert b"b" * 512 == disk.backend.stable[:512]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, ""), True),
        (OSError(errno.EDQUOT, ""), True),
        (OSError(errno.EIO, ""), True),
        (OSError(errno.ETIMEDOUT, ""), True),
        (OSError(errno.ENOLINK, ""), True),
        (ConnectionResetError(errno.ECONNRESET, ""), True),
        (TimeoutError(), True),
        (StorageError("the server is away"), True),
        (OSError(errno.EINVAL, ""), False),
        (OSError(errno.EOPNOTSUPP, ""), False),
        (OSError(errno.EFBIG, ""), False),
        (OSError(errno.EROFS, ""), False),
        (OSError(errno.EPERM, ""), False),
        (OSError(errno.EBADF, ""), False),
        (OSError("no number"), False),
        (FlushFailed(errno.EIO, ""), False),
        (ValueError("a bug"), False),
    ],
    ids=repr,
)
def test_what_passes(error, expected):
    assert expected == passes(error)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("operation", [READ, WRITE, FLUSH])
def test_what_never_passes_is_an_error_at_once(number, operation):
    class Refusing(Cache):
        def read(self, buffers, offset):
            raise OSError(number, os.strerror(number))

        write = read

        def flush(self):
            self.read((), 0)

    disk = Disk(Refusing(), holds=True)
    if operation == FLUSH:
        assert FLUSH_FAILED == flush(disk)
        return
    request = Transfer(1, operation, 0, 1, (1,), (0,), (0,))
    assert ERROR == disk.transfer(request, [memoryview(bytearray(512))])


@pytest.mark.parametrize("holds", [False, True])
def test_a_discard_of_nothing_is_done(holds):
    class Picky(Cache):
        def discard(self, offset, length):
            raise OSError(errno.EINVAL, "length is 0")

    assert OKAY == Disk(Picky(), holds=holds).serve_discard(Discard(1, DISCARD, 0, 0, secure=False))
