"""Filters for sources that are slow, fail or lie."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.blocks import buffers, read, write
from backends.filters import test_more
from backends.filters.test_filters import Memory
from xen_disk_py.backends import stack
from xen_disk_py.backends.filters import waiting as waiting_module
from xen_disk_py.backends.loader import wrap
from xen_disk_py.errors import UsageError

OverAFile = test_more.OverAFile


class TestRetry(OverAFile):
    filter = "retry:pause=0"


class TestCache(OverAFile):
    filter = "cache:size=256K,block=16K"


class TestReadahead(OverAFile):
    filter = "readahead:window=128K,size=512K"


class TestChecksum(OverAFile):
    filter = "checksum:limit=64K"


# delay, from a file


def test_times_of_a_file_are_taken_in_turn(monkeypatch, tmp_path):
    waited = []
    monkeypatch.setattr(waiting_module.time, "sleep", waited.append)
    (tmp_path / "times").write_text("1ms\n2s\n\n3s\n")
    disk = wrap(Memory(), [f"delay:file={tmp_path}/times,write=5ms"])
    for _ in range(4):
        read(disk, 0, 512)
    write(disk, 0, bytes(512))
    disk.flush()
    assert [0.001, 2.0, 3.0, 0.001, 0.005] == waited
    assert {"delayed": 5} == disk.counters()


@pytest.mark.parametrize("content", ["", "\n\n", "1ms\nsoon\n"])
def test_a_file_without_times(tmp_path, content):
    (tmp_path / "times").write_text(content)
    with pytest.raises(UsageError, match="times"):
        wrap(Memory(), [f"delay:file={tmp_path}/times"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it has no times"):
        wrap(Memory(), [f"delay:file={tmp_path}/pipe"])
    with pytest.raises(UsageError, match="No such file"):
        wrap(Memory(), [f"delay:file={tmp_path}/nothing"])


def test_what_waits_for_nothing_is_done_at_once_until_that_changes():
    disk = wrap(Memory(), ["delay"])
    assert 512 == disk.read_nowait(buffers(bytes(512)), 0)
    assert 512 == disk.write_nowait(buffers(b"x" * 512), 0)
    assert ["read", "write"] == disk.source.calls
    stack.change([disk], disk, ["read=1us"], lambda texts: None)
    assert 0 == disk.read_nowait(buffers(bytes(512)), 0)
    with disk._inside:  # the source lets one in
        assert 0 == disk.write_nowait(buffers(bytes(512)), 0)


# retry


class Failing(Memory):
    """Fails some times, then no longer."""

    def __init__(self, times, error=None, **options):
        super().__init__(**options)
        self.left = times
        self.error = error or OSError(errno.EIO, "not now")

    def _try(self):
        if self.left:
            self.left -= 1
            raise self.error

    def read(self, buffers, offset):
        self.calls.append("try")
        self._try()
        super().read(buffers, offset)

    def write(self, buffers, offset):
        self._try()
        super().write(buffers, offset)

    def flush(self):
        super().flush()
        self._try()


def test_errors_that_pass_are_not_the_guests():
    disk = wrap(Failing(3), ["retry:times=3,pause=0"])
    write(disk, 0, b"x" * 512)
    disk.source.left = 2
    assert b"x" * 512 == read(disk, 0, 512)
    assert {"retries": 5, "saved": 2} == disk.counters()


def test_no_more_often_than_asked_for():
    disk = wrap(Failing(9), ["retry:times=3,pause=0"])
    with pytest.raises(OSError, match="not now"):
        read(disk, 0, 512)
    assert 5 == disk.source.left
    stack.change([disk], disk, ["times=0"], lambda texts: None)
    with pytest.raises(OSError, match="not now"):
        read(disk, 0, 512)
    assert 4 == disk.source.left


def test_pauses_become_longer_up_to_a_limit(monkeypatch):
    disk = wrap(Failing(5), ["retry:times=5,pause=1s,longest=3s"])
    waited = []
    monkeypatch.setattr(disk._closed, "wait", waited.append)
    read(disk, 0, 512)
    assert [1, 2, 3, 3, 3] == waited


@pytest.mark.parametrize("error", [OSError(errno.EINVAL, "never"), ValueError("never")])
def test_what_does_not_pass_is_an_error_at_once(error):
    disk = wrap(Failing(9, error), ["retry:pause=0"])
    with pytest.raises(type(error), match="never"):
        read(disk, 0, 512)
    assert 8 == disk.source.left


@pytest.mark.parametrize("repeats", [False, True])
def test_a_flush_is_tried_again_only_where_a_second_one_can_be_trusted(repeats):
    source = Failing(1)
    source.repeats_flush = repeats
    disk = wrap(source, ["retry:pause=0"])
    if repeats:
        disk.flush()
    else:
        with pytest.raises(OSError, match="not now"):
            disk.flush()
    assert 1 + repeats == source.calls.count("flush")


def test_at_once_means_without_a_retry():
    disk = wrap(Failing(1), ["retry:pause=0"])
    assert 0 == disk.read_nowait(buffers(bytes(512)), 0)
    assert 512 == disk.read_nowait(buffers(bytes(512)), 0)


def test_closing_ends_the_waiting():
    disk = wrap(Failing(9), ["retry:pause=1000s,longest=1000s"])
    errors = []

    def play():
        with pytest.raises(OSError, match="not now") as raised:
            read(disk, 0, 512)
        errors.append(raised)

    thread = threading.Thread(target=play)
    thread.start()
    disk.close()
    thread.join(30)
    assert 1 == len(errors)


# cache, readahead


def test_what_was_read_is_not_read_again_until_it_changes():
    disk = wrap(Memory(), ["cache:size=128K,block=64K"])
    for change in (
        lambda: write(disk, 4096, b"x" * 512),
        lambda: disk.discard(0, 4096),
        lambda: disk.discard_securely(0, 4096),
    ):
        change()
        disk.source.calls.clear()
        for _ in range(3):
            assert bytes(disk.source.data[:8192]) == read(disk, 0, 8192)
        assert ["read"] == disk.source.calls
    read(disk, 65536, 512)
    read(disk, 131072, 512)  # the first one goes
    assert 131072 == disk.memory
    read(disk, 0, 512)
    assert {"hits": 6, "misses": 6, "kept": 131072} == disk.counters()


def test_what_is_written_while_it_is_read_is_not_kept():
    """The source reads the old content, then somebody writes, then the read is over."""
    source = Memory(threads=8)
    disk = wrap(source, ["cache"])
    real = source.read

    def slow(views, offset):
        real(views, offset)
        source.read = real
        write(disk, 512, b"new!" * 128)

    source.read = slow
    assert bytes(512) == read(disk, 512, 512)
    assert b"new!" * 128 == read(disk, 512, 512)


def test_what_is_read_while_it_is_written_is_not_kept():
    source = Memory(threads=8)
    disk = wrap(source, ["cache"])
    real = source.write

    def slow(views, offset):
        assert bytes(512) == read(disk, 512, 512)
        real(views, offset)

    source.write = slow
    write(disk, 512, b"new!" * 128)
    assert b"new!" * 128 == read(disk, 512, 512)


def test_a_write_that_fails_leaves_nothing_behind():
    disk = wrap(Failing(0), ["cache"])
    read(disk, 0, 512)
    disk.source.left = 1
    with pytest.raises(OSError, match="not now"):
        write(disk, 0, b"x" * 512)
    disk.source.data[:512] = b"y" * 512  # some of it was done
    assert b"y" * 512 == read(disk, 0, 512)


def test_only_what_is_kept_is_read_at_once():
    disk = wrap(Memory(threads=8), ["cache"])
    assert 0 == disk.read_nowait(buffers(bytes(512)), 0)
    read(disk, 0, 512)
    disk.source.data[:512] = b"z" * 512
    views = buffers(b"x" * 512)
    assert 512 == disk.read_nowait(views, 0)
    assert bytes(512) == views[0].tobytes()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "write", "discard", "next"]),
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    max_size=60,
)


@pytest.mark.parametrize(
    "text", ["cache:size=32K,block=8K", "readahead:window=16K,size=64K", "checksum:limit=16K"]
)
@given(steps=OPERATIONS)
def test_it_reads_as_the_disk_does(text, steps):
    disk = wrap(Memory(), [text])
    at = 0
    for number, (step, place, most) in enumerate(steps):
        first = at if step == "next" else place
        count = min(most, 256 - first)
        offset, length = first * 512, count * 512
        if step in ("read", "next"):
            assert disk.source.data[offset : offset + length] == read(disk, offset, length)
            at = (first + count) % 256
        elif step == "write":
            write(disk, offset, bytes([number + 1]) * length)
        else:
            disk.source.data[offset : offset + length] = bytes(length)
            disk.discard(offset, length)


def test_a_reader_in_order_asks_the_source_less_often():
    disk = wrap(Memory(), ["readahead:window=256K,size=1M"])
    for offset in range(0, 1 << 20, 16384):
        read(disk, offset, 16384)
    assert disk.source.calls.count("read") <= 5
    disk.source.calls.clear()
    jumping = wrap(Memory(), ["readahead:window=256K,size=1M"])
    for offset in (0, 786432, 262144, 524288):
        read(jumping, offset, 16384)
    assert 4 == jumping.source.calls.count("read")
    assert 4 * 65536 == jumping.counters()["kept"]


# checksum


def test_what_comes_back_otherwise_is_an_error():
    disk = wrap(Memory(), ["checksum"])
    write(disk, 4096, b"x" * 8192)
    read(disk, 0, 65536)
    disk.source.data[5000] ^= 1
    disk.source.data[100] ^= 1  # nobody has written that
    with pytest.raises(OSError, match="512 bytes at 4608 are not what was written there") as raised:
        read(disk, 4096, 4096)
    assert errno.EIO == raised.value.errno
    read(disk, 0, 4096)
    assert 1 == disk.counters()["wrong"]
    write(disk, 4608, b"y" * 512)
    assert b"x" * 512 + b"y" * 512 == read(disk, 4096, 1024)


def test_a_write_that_fails_leaves_nothing_to_compare_with():
    disk = wrap(Failing(0), ["checksum"])
    write(disk, 0, b"x" * 512)
    disk.source.left = 1
    with pytest.raises(OSError, match="not now"):
        write(disk, 0, b"z" * 512)
    disk.source.data[:512] = b"z" * 512
    assert b"z" * 512 == read(disk, 0, 512)


def test_what_was_written_longest_ago_is_forgotten_when_memory_ends():
    source = Memory()
    source.size = 4 << 20
    source.data = bytearray(source.size)
    disk = wrap(source, ["checksum:limit=32K"])
    for mib in range(4):
        write(disk, mib << 20, b"x" * 512)
    assert 32768 == disk.memory
    assert 2 == disk.counters()["forgotten"]
    source.data[0] ^= 1
    read(disk, 0, 512)
    source.data[3 << 20] ^= 1
    with pytest.raises(OSError, match="are not what was written"):
        read(disk, 3 << 20, 512)


@pytest.mark.parametrize(
    "text",
    [
        "cache:size=1K",
        "cache:block=100",
        "cache:block=1K",
        "readahead:window=512",
        "readahead:size=1M,window=1M",
        "checksum:limit=1K",
        "retry:pause=soon",
        "powercut:flush=x",
    ],
)
def test_settings_that_make_no_sense(text):
    with pytest.raises(UsageError):
        wrap(Memory(), [text])
