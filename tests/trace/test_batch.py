"""What queues note in batches is what the storage did, in an order in which it can have been."""

from __future__ import annotations

import errno
import os
import random
import threading

import pytest

from xen_disk_py.backends import Backend
from xen_disk_py.backends.loader import wrap
from xen_disk_py.blkif import (
    FLUSH,
    OKAY,
    READ,
    WRITE,
    X86_32,
    X86_64,
    Indirect,
    Transfer,
    encode_segments,
)
from xen_disk_py.datapath import durability, queue_thread, retry
from xen_disk_py.datapath import queue as queues
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.ring import BackRing
from xen_disk_py.trace import batch as batches
from xen_disk_py.trace import format as layout
from xen_disk_py.trace import sink as sinks
from xen_disk_py.trace.reader import TraceReader

SECTORS = 2048
NOTED = {FLUSH: layout.FLUSH, READ: layout.READ, WRITE: layout.WRITE}


class Witness(Backend):
    """A disk in memory that does some requests in part, or not, and notes what it did."""

    def __init__(self, threads, seed):
        self.size = SECTORS * 512
        self.threads = threads
        self.data = bytearray(self.size)
        self.log = []
        self.is_faulty = False
        self._dice = random.Random(seed)
        self._lock = threading.Lock()

    def _do(self, operation, buffers, offset, *, at_once):
        with self._lock:
            length = sum(map(len, buffers))
            chance = self._dice.random() if self.is_faulty else 1
            done, status = length, 0
            if at_once and chance < 0.1:
                return 0
            if chance < 0.2:
                done = self._dice.randrange(length // 512 + 1) * 512 if at_once else length
                if self.threads == 1 and length > 512:
                    done = self._dice.randrange(1, length // 512) * 512
            elif chance < 0.3:
                status = errno.EIO
            content = b"".join(buffers)
            if not status and operation == WRITE:
                self.data[offset : offset + done] = content[:done]
            if done == length or not at_once:
                data = content[:done] if operation == WRITE else None
                self.log.append((NOTED[operation], offset, done, status, data))
            if status:
                raise OSError(status, os.strerror(status))
            if not status and operation == READ:
                for buffer in buffers:
                    buffer[:] = self.data[offset : offset + len(buffer)]
                    offset += len(buffer)
            return done

    def read(self, buffers, offset):
        return self._do(READ, buffers, offset, at_once=False)

    def write(self, buffers, offset):
        return self._do(WRITE, buffers, offset, at_once=False)

    def read_nowait(self, buffers, offset):
        return self._do(READ, buffers, offset, at_once=True)

    def write_nowait(self, buffers, offset):
        return self._do(WRITE, buffers, offset, at_once=True)

    def flush(self):
        with self._lock:
            self.log.append((layout.FLUSH, 0, 0, 0, None))


class Asker:
    """Asks for all kinds of requests by one queue, a batch at a time, on its own sectors."""

    def __init__(self, host, line, number, count):
        self.line, self._pages, self._lists = line, host.share(64), host.share(32)
        self._first, self._sectors = number * SECTORS // count, SECTORS // count
        self._dice = random.Random(number)

    def batch(self):
        """Send some, none of which touches what another does, and have the answers."""
        dice, requests = self._dice, []
        at, end = self._first, self._first + self._sectors
        number = 0
        while len(requests) < 32 and at < end and number < 64:
            at += dice.choice((0, 0, 1, 8))
            kind = dice.random()
            if kind < 0.05:
                requests.append(Transfer(len(requests), FLUSH, 0, 0, (), (), ()))
                continue
            count = 1 if kind < 0.7 else dice.randrange(1, 20)
            first, last = (0, 7) if count > 1 or kind < 0.4 else (3, 3 + dice.randrange(5))
            sectors = count * (last - first + 1)
            if at + sectors > end or number + count > 64:
                break
            requests.append(self._request(len(requests), at, sectors, number, count, first, last))
            number += count
            at += sectors
        self.line.put(*requests)
        self.line.kick()
        return self.line.responses(len(requests))

    def _request(self, id_, sector, sectors, page, count, first, last):
        operation = self._dice.choice((READ, WRITE, WRITE))
        refs = self._pages.refs[page : page + count]
        if operation == WRITE:
            for number in range(page, page + count):
                self._pages.view[number * 4096 : number * 4096 + 4096] = self._dice.randbytes(4096)
        if count > 11:
            listed = encode_segments([(ref, first, last) for ref in refs])
            self._lists.view[id_ * 4096 : id_ * 4096 + len(listed)] = listed
            return Indirect(id_, operation, sector, count, (self._lists.refs[id_],))
        return Transfer(
            id_, operation, sector, sectors, tuple(refs), (first,) * count, (last,) * count
        )


def noted(path):
    """What a trace has, without its end; what was cut into pieces is one again."""
    found = []
    begun = {}  # by when and whose: the last piece so far
    with TraceReader(path) as reader:
        for record in reader.records(data=True):
            key = (record.operation, record.start, record.queue)
            number = begun.get(key)
            last = None if number is None else found[number]
            if record.data and last is not None and record.offset == last.offset + last.length:
                found[number] = last._replace(
                    length=last.length + record.length, data=last.data + record.data
                )
            else:
                begun[key] = len(found)
                found.append(record)
        assert reader.ending.is_complete
    return [each for each in found if each.operation != layout.STOPPED]


@pytest.mark.parametrize(
    ("abi", "data", "lines", "room"),
    [
        (X86_64, True, 1, "much"),
        (X86_32, True, 1, "little"),
        (X86_64, False, 1, "little"),
        (X86_64, True, 2, "little"),
        (X86_32, True, 2, "much"),
        (X86_64, False, 2, "much"),
    ],
    ids=str,
)
def test_each_request_is_noted_once_as_it_was_done(
    host, tmp_path, monkeypatch, abi, data, lines, room
):
    pending, push = [], BackRing.push

    def look(ring):
        for asker in askers:
            queue = asker.line.queue
            if queue._ring is ring and queue._notes is not None:
                pending.append(queue._notes._noted[:])
        return push(ring)

    monkeypatch.setattr(BackRing, "push", look)
    monkeypatch.setattr(queues, "_LATE", -1.0)  # answers are published amid a batch, too
    if room == "little":
        monkeypatch.setattr(sinks, "MAX_DATA", 96 << 10)
        for each in (sinks, batches):
            monkeypatch.setattr(each, "CHUNK", 96 << 10)
        if data:
            monkeypatch.setattr(sinks, "MAX_RECORDS", 40)
    path = str(tmp_path / "t.xdt")
    backend = Witness(threads=1 if lines == 1 else 4, seed=lines)
    disk = wrap(backend, [f"record:file={path}" + (",data=yes" if data else "")])
    backend.log.clear()  # a trace has samples of what was there
    backend.is_faulty = True
    served = Disk(disk)
    askers = [
        Asker(host, host.line(served, abi, persistent=True, number=number), number, lines)
        for number in range(lines)
    ]
    threads = [
        threading.Thread(target=lambda asker=each: [asker.batch() for _ in range(15)])
        for each in askers
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    disk.finish()
    assert [[]] * len(
        pending
    ) == pending  # what a guest knows of comes before what it asks for then
    assert len(pending) > 30 * lines
    records = noted(path)
    found = [(r.operation, r.offset, r.length, r.status, r.data) for r in records]
    expected = [each if data else (*each[:4], None) for each in backend.log]
    assert len(expected) > 200 * lines
    assert {READ, WRITE} <= {each.operation for each in records}
    if lines == 1:
        assert expected == found
        for earlier, later in zip(records, records[1:]):
            assert earlier.end <= later.start
    else:
        assert sorted(expected, key=repr) == sorted(found, key=repr)
        assert {0, 1} == {each.queue for each in records}
    assert list(range(len(records))) == [each.number for each in records]
    if data:
        content = bytearray(backend.size)
        for each in records:
            if each.operation == layout.WRITE:  # of one that failed, any part may be there
                place = slice(each.offset, each.offset + each.length)
                content[place] = backend.data[place] if each.status else each.data
        assert backend.data == content


def test_a_storage_without_room_has_what_fits(tmp_path, monkeypatch):
    path, pwritev = str(tmp_path / "t.xdt"), os.pwritev
    disk = wrap(Witness(1, 1), [f"record:file={path},data=yes"])
    sink = disk._sink
    monkeypatch.setattr(sinks.Sink, "rouse", lambda _: None)  # its thread does not come to it
    for number in range(4):
        sink.wrote(sink.clock + number, 1, number * 512, bytes([number]) * 512)

    def full(fd, parts, at):
        if at + sum(map(len, parts)) > 4096 + 1400:
            pwritev(fd, [b"part"], at)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(fd, parts, at)

    monkeypatch.setattr(os, "pwritev", full)
    disk.finish()
    found, reason = [], "No space left on device"
    with TraceReader(path) as reader:
        found = list(reader.records(data=True))
        assert (True, reason) == (reader.ending.is_complete, reader.ending.text)
    assert [b"\0" * 512, b"\1" * 512] == [each.data for each in found[:-1]]
    assert {"recorded": 2, "lost": 0, "recording": 0} == disk.counters()
    assert os.path.getsize(path) < 4096 + 1400


def test_a_write_that_has_others_be_written_again_is_noted_behind_them(host, tmp_path, monkeypatch):
    """The disk retries; copies are full when a flush has failed."""
    monkeypatch.setattr(durability, "COPIES", 1)
    monkeypatch.setattr(retry, "_PAUSES", (600.0, 600.0))
    is_failing = [True]

    class Failing(Witness):
        def flush(self):
            if is_failing:
                is_failing.pop()
                raise OSError(errno.EIO, "broken")

    path = str(tmp_path / "t.xdt")
    backend = Failing(threads=1, seed=1)
    disk = wrap(backend, [f"record:file={path},data=yes"])
    line, page = host.line(Disk(disk, holds=True), persistent=True), host.share()

    def write(number):
        page.view[:512] = number.to_bytes(512, "little")
        return Transfer(number, WRITE, number, 1, (page.refs[0],), (0,), (0,))

    assert OKAY == line.ask(write(1)).status
    line.put(Transfer(2, FLUSH, 0, 0, (), (), ()))
    line.kick()
    host.until(lambda: not is_failing)
    line.put(write(3))
    line.kick()
    assert [(3, WRITE, OKAY)] == line.responses(1)
    assert line.queue.stop(host.PATIENCE)
    disk.finish()
    found = [(each.operation, each.offset // 512, each.status) for each in noted(path)]
    wrote, flushed = layout.WRITE, layout.FLUSH
    assert [
        (wrote, 1, 0),
        (flushed, 0, errno.EIO),
        (wrote, 1, 0),
        (flushed, 0, 0),
        (wrote, 3, 0),
    ] == found


def test_what_is_left_of_a_write_is_what_the_guest_wrote(host, tmp_path, monkeypatch):
    """The page that has the copy is written and begun anew, when a part of it is noted."""
    monkeypatch.setattr(sinks, "MAX_RECORDS", 2)

    class Partial(Witness):
        def write(self, buffers, offset):
            data = b"".join(buffers)[:512]
            self.data[offset : offset + 512] = data
            return len(data)

    path = str(tmp_path / "t.xdt")
    backend = Partial(threads=1, seed=1)
    disk = wrap(backend, [f"record:file={path},data=yes"])
    disk._sink._most = 1
    line, pages = host.line(Disk(disk), persistent=True), host.share(2)

    def write():
        pages.view[:] = backend._dice.randbytes(2 * 4096)
        requests = [
            Transfer(number, WRITE, 8 * number, 8, (ref,), (0,), (7,))
            for number, ref in enumerate(pages.refs)
        ]
        return [each.status for each in line.ask(*requests)]

    for _ in range(3):  # their pages are known from the second on
        assert [OKAY, OKAY] == write()
        assert pages.view == backend.data[: 2 * 4096]
    assert line.queue.stop(host.PATIENCE)
    disk.finish()
    content = bytearray(2 * 4096)
    for each in noted(path):
        content[each.offset : each.offset + each.length] = each.data
    assert pages.view == content


class Hasty(Witness):
    """Does some writes not at once, or in part then; all succeed."""

    def write_nowait(self, buffers, offset):
        data = b"".join(buffers)
        with self._lock:
            part = self._dice.choice((0, len(data) // 1024 * 512, len(data), len(data)))
            self.data[offset : offset + part] = data[:part]
            return part


@pytest.mark.parametrize("room", ["much", "little"])
def test_of_overlapping_writes_of_several_queues_the_trace_has_the_last_one_last(
    host, tmp_path, monkeypatch, room
):
    if room == "little":
        monkeypatch.setattr(sinks, "MAX_DATA", 96 << 10)
        for each in (sinks, batches):
            monkeypatch.setattr(each, "CHUNK", 96 << 10)
    path = str(tmp_path / "t.xdt")
    backend = Hasty(threads=12, seed=1)
    disk = wrap(backend, [f"record:file={path},data=yes"])
    served = Disk(disk)
    askers = []
    for number in range(3):
        line = host.line(served, persistent=True, number=number)
        askers.append(Asker(host, line, number, 3))
        askers[-1]._first, askers[-1]._sectors = 0, 96  # all of them write there
    threads = [
        threading.Thread(target=lambda asker=each: [asker.batch() for _ in range(25)])
        for each in askers
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    disk.finish()
    content = bytearray(backend.size)
    for each in noted(path):
        if each.operation == layout.WRITE:
            content[each.offset : each.offset + each.length] = each.data
    assert backend.data == content
    assert {} == disk._sink.claims.owners


class Gated(Witness):
    """A disk that writes at its first sector only when it may."""

    def __init__(self, at_once):
        super().__init__(threads=4, seed=1)
        self._is_at_once = at_once
        self.is_inside, self.may = threading.Event(), threading.Event()
        self.is_shut = False

    def _do(self, operation, buffers, offset, *, at_once):
        if self.is_shut and operation == WRITE and not offset:
            if at_once and not self._is_at_once:
                return 0
            self.is_inside.set()
            assert self.may.wait(60)
        return super()._do(operation, buffers, offset, at_once=at_once)


@pytest.mark.parametrize("at_once", [True, False], ids=["in the queue", "in a worker"])
def test_a_slow_write_makes_no_other_queue_wait(host, tmp_path, monkeypatch, at_once):
    if at_once:  # each queue in a thread of its own, as without the GIL
        monkeypatch.setattr(queue_thread, "HAS_GIL", False)
    backend = Gated(at_once)
    disk = wrap(backend, [f"record:file={tmp_path}/t.xdt,data=yes"])
    served = Disk(disk)
    lines = [host.line(served, persistent=True, number=number) for number in range(2)]
    pages = [host.share(), host.share()]

    def write(number, id_, sector):
        return Transfer(id_, WRITE, sector, 8, (pages[number].refs[0],), (0,), (7,))

    for number, line in enumerate(lines):
        assert OKAY == line.ask(write(number, 0, 1024 * number)).status  # its page is known now
    backend.is_shut = True
    lines[0].put(write(0, 1, 0))
    lines[0].kick()
    assert backend.is_inside.wait(host.PATIENCE)
    for number in range(20):
        assert OKAY == lines[1].ask(write(1, number, 1024 + 8 * number)).status
    if not at_once:
        assert OKAY == lines[0].ask(write(0, 2, 512)).status
    backend.may.set()
    with served.drained.entered(host.PATIENCE):
        assert {0, 1024} <= {each[1] // 512 for each in backend.log if each[0] == layout.WRITE}
    disk.finish()


def test_what_cannot_be_noted_ends_the_recording_and_not_the_disk(
    host, tmp_path, monkeypatch, caplog
):
    path = str(tmp_path / "t.xdt")
    disk = wrap(Witness(1, 1), [f"record:file={path},data=yes"])
    line, page = host.line(Disk(disk), persistent=True), host.share()
    for number in range(3):
        assert OKAY == line.ask(Transfer(number, WRITE, 8, 8, (page.refs[0],), (0,), (7,))).status
    pack = sinks.pack_record_into

    def fail(*arguments):
        monkeypatch.setattr(sinks, "pack_record_into", pack)
        raise MemoryError

    monkeypatch.setattr(sinks, "pack_record_into", fail)
    for number in range(3):
        assert OKAY == line.ask(Transfer(number, WRITE, 8, 8, (page.refs[0],), (0,), (7,))).status
    assert line.queue.stop(host.PATIENCE)
    disk.close()
    assert "recording ended: requests could not be noted (MemoryError())" in caplog.text
    with TraceReader(path) as reader:
        assert 3 >= sum(each.is_request for each in reader.records())
        assert "could not be noted" in reader.ending.text
