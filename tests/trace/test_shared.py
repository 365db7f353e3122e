"""What a killed process had noted is in the trace, however far its own thread had come."""

from __future__ import annotations

import mmap
import os
import random
import resource
from contextlib import suppress

import pytest

from xen_disk_py.synchronizing import HAS_GIL
from xen_disk_py.trace import sink as sinks
from xen_disk_py.trace.format import FLUSH, READ, STOPPED, WRITE, Header
from xen_disk_py.trace.reader import TraceReader
from xen_disk_py.trace.shared import ORPHANED, finish
from xen_disk_py.trace.writer import TraceWriter


@pytest.fixture
def sink(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "MAX_DATA", 16 << 10)
    monkeypatch.setattr(sinks, "CHUNK", 8 << 10)
    monkeypatch.setattr(sinks.Sink, "rouse", lambda _: None)  # its thread does not come to it
    header = Header(1 << 20, 512, 0, 0, os.urandom(16), data=True)
    sink = sinks.Sink(TraceWriter.create(str(tmp_path / "t.xdt"), header), "t.xdt")
    yield sink
    sink.close()


def noted(path):
    with TraceReader(str(path)) as reader:
        records = list(reader.records(data=True))
        assert reader.ending.is_complete
    assert list(range(len(records))) == [each.number for each in records]
    assert [STOPPED] == [each.operation for each in records[-1:]]
    return [(each.operation, each.offset, each.data) for each in records[:-1]], records[-1].data


@pytest.mark.parametrize("seed", range(12))
def test_what_was_not_written_is(sink, tmp_path, seed):
    dice, expected = random.Random(seed), []
    chunks = [sink.exchange(None) for _ in range(2)]
    used = [0, 0]
    for moment in range(1, 200):
        kind = dice.random()
        if kind < 0.2:
            sink.note((moment, 1, 0, 0, 0, 0, 0, FLUSH))
            expected.append((FLUSH, 0, None))
        elif kind < 0.4:
            data = dice.randbytes(512 * dice.randrange(1, 5))
            sink.wrote(moment, 1, 512, data)
            expected.append((WRITE, 512, data))
        elif kind < 0.9:
            queue = dice.randrange(2)
            batch, size = [], dice.randrange(1, 5) * 512
            if used[queue] + 3 * size > 8 << 10:
                chunks[queue], used[queue] = sink.exchange(chunks[queue]), 0
            start = used[queue]
            for number in range(dice.randrange(1, 4)):
                data = dice.randbytes(size)
                chunks[queue].memory[used[queue] : used[queue] + size] = data
                used[queue] += size
                batch.append((moment + number, size, 4096 * number, WRITE))
                expected.append((WRITE, 4096 * number, data))
            batch.append((moment + 4, 512, 512, READ))
            expected.append((READ, 512, None))
            sink.put_batch(moment, batch, (chunks[queue], start, used[queue]), queue)
        if dice.random() < 0.1:
            sink._write(only_full=dice.random() < 0.5)
    finish(sink._shared.fd, sink.writer.fd)
    assert (expected, ORPHANED.encode()) == noted(tmp_path / "t.xdt")


def test_a_trace_that_was_closed_stays_as_it_is(sink, tmp_path):
    sink.wrote(1, 1, 512, b"x" * 512)
    memory, trace = os.dup(sink._shared.fd), os.dup(sink.writer.fd)
    try:
        sink.close()
        finish(memory, trace)
    finally:
        os.close(memory)
        os.close(trace)
    assert ([(WRITE, 512, b"x" * 512)], None) == noted(tmp_path / "t.xdt")


def test_nobody_else_writes_into_what_goes_to_the_disk(sink):
    """Another process of the same user may get at the descriptor of the one that waits."""
    chunk = sink.exchange(None)
    chunk.memory[:4] = b"data"
    fd = os.open(f"/proc/self/fd/{sink._shared.fd}", os.O_RDWR)
    try:
        for attempt in (
            lambda: os.pwrite(fd, b"evil", chunk.at),
            lambda: mmap.mmap(fd, 4096),
            lambda: os.ftruncate(fd, 0),
        ):
            with pytest.raises(PermissionError):
                attempt()
    finally:
        os.close(fd)
    chunk.memory[4:8] = b"more"
    assert b"datamore" == os.pread(sink._shared.fd, 8, chunk.at)


def test_where_there_is_no_room_for_all_what_fits_is_written(sink, tmp_path):
    expected = [(WRITE, 512 * number, bytes([number]) * 512) for number in range(20)]
    for _, offset, data in expected:
        sink.wrote(1, 1, offset, data)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sink.writer.at + 6000, before[1]))
    try:
        with suppress(OSError):  # as its end may not fit
            finish(sink._shared.fd, sink.writer.fd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with TraceReader(str(tmp_path / "t.xdt")) as reader:
        found = [(each.operation, each.offset, each.data) for each in reader.records(data=True)]
    found = [each for each in found if each[0] == WRITE]
    assert 5 < len(found) < 12
    assert expected[: len(found)] == found


@pytest.mark.skipif(HAS_GIL, reason="any thread may take parts of any view")
def test_no_two_threads_take_parts_of_one_view(sink):
    """A queue's thread does of its chunk's, and whoever writes of all there are."""
    chunks = [sink.exchange(None) for _ in range(2)]
    sink.note((1, 1, 0, 0, 0, 0, 0, FLUSH))
    views = [view for chunk in chunks for view in (chunk.memory, chunk.noted)]
    views.append(sink.page.records)
    assert len(views) == len({id(view.obj) for view in views})
