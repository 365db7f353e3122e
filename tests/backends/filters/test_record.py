"""``record``: what a guest asked for is in the trace, whatever becomes of that."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from zlib import crc32

import pytest

from backends.blocks import buffers, read, write
from backends.filters.test_filters import Memory
from xen_disk_py.backends.asynchronous import FLUSH as BEGIN_FLUSH
from xen_disk_py.backends.asynchronous import WRITE as BEGIN_WRITE
from xen_disk_py.backends.asynchronous import Asynchronous
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.filter import succeeding
from xen_disk_py.backends.loader import open_backend, wrap
from xen_disk_py.backends.queues import here
from xen_disk_py.errors import ImageError, UsageError
from xen_disk_py.trace import sink as sinks
from xen_disk_py.trace import writer as writers
from xen_disk_py.trace.format import (
    DISCARD,
    FLUSH,
    GAP,
    READ,
    RESIZED,
    RESUMED,
    STOPPED,
    UNKNOWN_ERROR,
    WRITE,
)
from xen_disk_py.trace.reader import TraceReader


class TestConformance(BackendConformance):
    @pytest.fixture(autouse=True)
    def _no_process_for_each_of_many(self, monkeypatch):
        monkeypatch.setattr(sinks.Sink, "_begin_standby", lambda _: None)

    def open_disk(self, tmp_path):
        path = tmp_path / "disk"
        if not path.exists():
            path.write_bytes(bytes(2 << 20))
        name = f"{tmp_path}/{len(os.listdir(tmp_path))}.xdt"
        return open_backend("raw", {"path": str(path)}, [f"record:file={name},data=yes"])


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "t.xdt")


def recorded(path, options=""):
    return wrap(Memory(), [f"record:file={path}{options}"])


def trace(path, *, data=True):
    with TraceReader(path) as reader:
        return list(reader.records(data=data)), reader.ending


def test_what_is_done_is_noted(path):
    disk = recorded(path)
    write(disk, 4096, b"x" * 512)
    read(disk, 512, 1024)
    disk.flush()
    disk.discard(8192, 4096)
    disk.close()
    found, ending = trace(path)
    assert [(WRITE, 4096, 512), (READ, 512, 1024), (FLUSH, 0, 0), (DISCARD, 8192, 4096)] == [
        (each.operation, each.offset, each.length) for each in found[:-1]
    ]
    assert [0, 1, 2, 3] == [each.number for each in found[:-1]]
    for earlier, later in zip(found, found[1:]):
        assert earlier.end <= later.start
    assert STOPPED == found[-1].operation
    assert ending.is_complete


def test_with_data_what_was_written_is_there_and_what_was_there_before_is_known(path):
    disk = recorded(path, ",data=yes")
    write(disk, 4096, b"x" * 512)
    write(disk, 4096, b"y" * 1024)
    disk.close()
    found, _ = trace(path)
    assert [b"x" * 512, b"y" * 1024] == [each.data for each in found[:-1]]
    with TraceReader(path) as reader:
        content = Memory()
        for at, crc in reader.header.samples:
            page = bytearray(min(reader.header.sample, content.size - at))
            content.read([memoryview(page)], at)
            assert crc == crc32(page)


def test_a_guest_that_changes_its_page_meanwhile_changes_neither_alone(path):
    page = bytearray(b"a" * 512)

    class Late(Memory):
        def write(self, buffers, offset):
            page[:] = b"b" * 512
            return super().write(buffers, offset)

    disk = wrap(Late(), [f"record:file={path},data=yes"])
    disk.write([memoryview(page)], 0)
    there = read(disk, 0, 512)
    disk.close()
    assert there == trace(path)[0][0].data


def test_what_failed_is_noted_with_its_error(path):
    class Failing(Memory):
        def write(self, buffers, offset):
            raise OSError(errno.ENOSPC, "full")

        def flush(self):
            raise ValueError("odd")

    disk = wrap(Failing(), [f"record:file={path},data=yes"])
    with pytest.raises(OSError, match="full"):
        write(disk, 0, b"x" * 512)
    with pytest.raises(ValueError, match="odd"):
        disk.flush()
    disk.close()
    found, _ = trace(path)
    assert [errno.ENOSPC, UNKNOWN_ERROR] == [each.status for each in found[:-1]]
    assert b"x" * 512 == found[0].data


def test_a_file_that_exists_is_refused(path, tmp_path):
    recorded(path).close()
    with pytest.raises(ImageError, match="never overwritten"):
        recorded(path)
    with pytest.raises(ImageError, match="there is no directory"):
        recorded(str(tmp_path / "no" / "t.xdt"))
    with pytest.raises(UsageError, match="at least 64 MiB"):
        recorded(str(tmp_path / "ring"), ",ring=1M")


def test_a_successor_continues_and_says_that_something_may_be_missing(path, monkeypatch):
    monkeypatch.setattr(sinks.Sink, "rouse", lambda _: None)  # nor the process that would write all
    first = recorded(path, ",data=yes")
    write(first, 0, b"1" * 512)
    first._sink._write()  # as its thread does; then it is killed
    os.close(first._sink.writer.fd)
    os.close(first._sink._shared.fd)
    first._sink.writer.fd = -1
    first._sink._over = True
    monkeypatch.undo()
    with succeeding():
        second = recorded(path, ",data=yes")
    write(second, 512, b"2" * 512)
    second.close()
    found, ending = trace(path)
    assert [WRITE, RESUMED, GAP, RESIZED, WRITE, STOPPED] == [each.operation for each in found]
    assert [0, 1, 1, 1, 1, 2] == [each.number for each in found]
    assert found[0].end < found[1].start
    assert ending.is_complete


KILLED = """
import os, signal, sys
from backends.blocks import write
from backends.filters.test_record import recorded
from xen_disk_py.trace.sink import Sink

begin = Sink._begin_standby


def begin_and_be_killed(sink):
    begin(sink)
    os.kill(os.getpid(), signal.SIGKILL)


if sys.argv[2] == "before anything is written":
    Sink._begin_standby = begin_and_be_killed
    Sink.rouse, rouse = lambda _: None, Sink.rouse
    disk = recorded(sys.argv[1], ",data=yes")
    for number in range(100):
        write(disk, number * 512, bytes([number]) * 512)
    rouse(disk._sink)
else:
    disk = recorded(sys.argv[1], ",data=yes")
    for number in range(100):
        write(disk, number * 512, bytes([number]) * 512)
        if number == 50:
            while disk._sink.recorded < 51:  # its thread has begun the other process before
                pass
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""


@pytest.mark.parametrize("when", ["before anything is written", "amid that"])
def test_what_a_process_that_was_killed_had_noted_is_written_and_its_successor_misses_nothing(
    path, when
):
    killed = subprocess.run([sys.executable, "-c", KILLED, path, when], check=False)
    assert -signal.SIGKILL == killed.returncode
    with succeeding():
        second = recorded(path, ",data=yes")
    write(second, 512, b"2" * 512)
    second.close()
    found, ending = trace(path)
    assert [bytes([number]) * 512 for number in range(100)] == [each.data for each in found[:100]]
    assert [STOPPED, RESUMED, RESIZED, WRITE, STOPPED] == [each.operation for each in found[100:]]
    assert b"the disk's process ended" == found[100].data
    assert ending.is_complete


def test_a_successor_that_cannot_continue_serves_all_the_same(path, caplog):
    recorded(path).close()
    with succeeding():
        disk = recorded(path)
    write(disk, 0, b"x" * 512)
    assert b"x" * 512 == read(disk, 0, 512)
    disk.close()
    assert "not recorded any longer" in caplog.text
    assert 1 == len(trace(path)[0])


def test_a_successor_that_has_no_memory_for_a_trace_serves_all_the_same(path, caplog, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", full)
        with pytest.raises(ImageError, match="not recorded: Cannot allocate memory"):
            recorded(path)
        with succeeding():
            disk = recorded(path)
    write(disk, 0, b"x" * 512)
    assert b"x" * 512 == read(disk, 0, 512)
    assert disk.file is None
    disk.close()
    assert "not recorded any longer" in caplog.text


def test_no_space_ends_the_recording_and_not_the_disk(path, caplog, monkeypatch):
    disk = recorded(path)
    ended = threading.Event()
    stop = sinks.Sink._stop

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(sink, why):
        monkeypatch.undo()
        stop(sink, why)
        ended.set()

    monkeypatch.setattr(sinks.Sink, "_stop", stopped)
    monkeypatch.setattr(writers.os, "pwritev", full)
    write(disk, 0, b"x" * 512)
    assert ended.wait(30)
    write(disk, 512, b"y" * 512)
    assert b"y" * 512 == read(disk, 512, 512)
    disk.close()
    assert "recording ended: No space left on device" in caplog.text
    found, ending = trace(path)
    assert [STOPPED] == [each.operation for each in found]
    assert "No space left on device" == ending.text


def test_requests_that_are_too_many_to_note_are_counted(path, monkeypatch):
    monkeypatch.setattr(sinks, "MAX_RECORDS", 3)
    monkeypatch.setattr(sinks.Sink, "rouse", lambda _: None)  # its thread does not come to it
    disk = recorded(path)
    for number in range(5):
        write(disk, number * 512, b"x" * 512)
    disk.close()
    found, _ = trace(path)
    assert [WRITE, WRITE, WRITE, GAP, STOPPED] == [each.operation for each in found]
    assert 2 == found[3].length


def test_a_resize_is_noted_between_the_requests(path):
    class Growing(Memory):
        def resize(self, size):
            return self.size if size is None else size

    disk = wrap(Growing(), [f"record:file={path},data=yes"])
    write(disk, 0, b"1" * 512)
    disk.resize(1 << 20)
    write(disk, 512, b"2" * 512)
    disk.resize(2 << 20)
    disk.close()
    found, _ = trace(path)
    assert [WRITE, RESIZED, WRITE, RESIZED, STOPPED] == [each.operation for each in found]
    assert [1 << 20, 2 << 20] == [each.offset for each in found if each.operation == RESIZED]


def test_many_blocks_pages_and_pieces(path, monkeypatch):
    monkeypatch.setattr(sinks, "MAX_DATA", 2048)
    monkeypatch.setattr(sinks, "MAX_RECORDS", 3)
    monkeypatch.setattr(sinks, "MAX_WAITING", 4096)
    disk = recorded(path, ",data=yes")
    expected = []
    for number in range(50):
        data = [bytes([number, piece]) * 256 for piece in range(1 + number % 6)]
        disk.write([memoryview(each) for each in data], 0)
        expected.append(b"".join(data))
        read(disk, 0, 512)
    disk.close()
    found, ending = trace(path)
    assert ending.is_complete
    written: list[bytes] = []
    for each in found:
        if each.operation == WRITE:
            written.append(each.data) if not each.offset else written.append(
                written.pop() + each.data
            )
    assert expected == written
    assert 50 == sum(each.operation == READ for each in found)


def test_whose_disk_it_is_and_by_which_queue_a_request_came(path):
    disk = recorded(path)
    disk.serves("guest", "xvdb")
    read(disk, 0, 512)
    try:
        here.number = 3
        read(disk, 0, 512)
    finally:
        here.number = -1
    disk.close()
    with TraceReader(path) as reader:
        assert ("guest", "xvdb") == (reader.header.guest, reader.header.vdev)
        assert [-1, 3] == [each.queue for each in list(reader.records())[:-1]]


class Library(Asynchronous):
    """Ends what is begun in the reverse order."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def _begin(self, request):
        self.begun.append(request)

    def _progress(self):
        while self.begun:
            self._end(self.begun.pop(), None)


def test_a_library_that_does_many_at_once_still_does(path):
    class Many(Memory):
        threads = 1
        repeats_flush = True

        def __init__(self):
            super().__init__()
            self.asynchronous = Library()

    source = Many()
    disk = wrap(source, [f"record:file={path},data=yes"])
    many = disk.asynchronous
    many.submit(BEGIN_WRITE, buffers(b"x" * 512), 512, 512, "first")
    many.submit(BEGIN_FLUSH, (), 0, 0, "second")
    assert (2, many.fileno()) == (many.unfinished, source.asynchronous.fileno())
    assert [("second", None), ("first", None)] == [tuple(each) for each in many.collect()]
    disk.close()
    source.asynchronous.close()
    found, _ = trace(path)
    assert [FLUSH, WRITE] == [each.operation for each in found[:-1]]
    assert found[1].start <= found[0].start
    assert b"x" * 512 == found[1].data


def test_a_disk_in_use_is_recorded_from_when_to_when_one_says(tmp_path):
    disk = wrap(Memory(), ["record:on=no"])
    assert disk.passes_on("read")
    assert disk.passes_on("write")
    with pytest.raises(UsageError, match="needs file"):
        disk.configure(file="", data=False, ring="0", on=True)
    write(disk, 0, b"0" * 512)
    for name in ("a", "b"):
        disk.configure(file=str(tmp_path / name), data=True, ring="0", on=True)
        assert not disk.passes_on("read")
        write(disk, 512, name.encode() * 512)
    disk.configure(file=str(tmp_path / "b"), data=True, ring="0", on=False)
    write(disk, 1024, b"1" * 512)
    assert {"recorded": 0, "lost": 0, "recording": 0} == disk.counters()
    with pytest.raises(ImageError, match="never overwritten"):
        disk.configure(file=str(tmp_path / "a"), data=True, ring="0", on=True)
    disk.close()
    for name in ("a", "b"):
        found, ending = trace(str(tmp_path / name))
        assert [name.encode() * 512] == [each.data for each in found[:-1]]
        assert ending.is_complete


def test_a_storage_that_does_not_move_ends_the_recording_and_a_write_waits_no_longer(
    path, caplog, monkeypatch
):
    stuck, ended = threading.Event(), threading.Event()
    pwritev, stop = os.pwritev, sinks.Sink._stop

    def wait(*arguments):
        assert stuck.wait(30)
        return pwritev(*arguments)

    def stopped(sink, why):
        stop(sink, why)
        ended.set()

    monkeypatch.setattr(sinks, "MAX_DATA", 1000)
    monkeypatch.setattr(sinks, "MAX_WAITING", 1000)
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    monkeypatch.setattr(writers.os, "pwritev", wait)
    monkeypatch.setattr(sinks.Sink, "_stop", stopped)
    disk = recorded(path, ",data=yes")
    for number in range(4):
        write(disk, number * 512, b"x" * 512)
    assert "has not moved" in caplog.text
    stuck.set()
    assert ended.wait(30)
    disk.close()
    assert "has not moved" in trace(path)[1].text
