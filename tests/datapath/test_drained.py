"""A disk is changed between two requests: none is lost, none is done twice, none is half in it."""

from __future__ import annotations

import os
import random
import threading

import pytest
from backends.filters.test_record import Library

from xen_disk_py.backends.filters.record import Recorder
from xen_disk_py.blkif import OKAY, READ, WRITE, Transfer
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.drained import DrainedSection
from xen_disk_py.errors import DeviceError
from xen_disk_py.trace.format import WRITE as WROTE
from xen_disk_py.trace.reader import TraceReader
from xen_disk_py.trace.sink import Sink

SECTORS = 64
pytestmark = pytest.mark.shared


class Many(Library):
    """Does requests of a disk in memory, some when they are begun, some later."""

    def __init__(self, disk):
        super().__init__()
        self._disk = disk

    def _begin(self, request):
        super()._begin(request)
        self._tell()

    def _progress(self):
        self._told()
        while self.begun:
            request = self.begun.pop()
            if request.operation == READ:
                self._disk.read([memoryview(request.memory)], request.offset)
            elif request.operation == WRITE:
                self._disk.write([memoryview(request.memory)], request.offset)
            self._end(request, None)


class Guest:
    """Writes sectors that are its own, as fast as it can, in a thread."""

    def __init__(self, line, pages, first):
        self._line, self._pages, self._first = line, pages, first
        self._stop = threading.Event()
        self._random = random.Random(first)
        self.written = {}
        self.failed = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        refs, size = self._pages.refs, len(self._pages.refs)
        while not self._stop.is_set():
            requests = []
            for number in range(size):
                sector = self._first + self._random.randrange(SECTORS)
                data = self._random.randbytes(8) * 64
                if sector in [each.sector for each in requests]:
                    continue
                self._pages.view[number * 4096 : number * 4096 + 512] = data
                self.written[sector] = data
                requests.append(Transfer(number, WRITE, sector, 1, (refs[number],), (0,), (0,)))
            self._line.put(*requests)
            self._line.kick()
            for answer in self._line.responses(len(requests)):
                self.failed += answer.status != OKAY

    def end(self):
        self._stop.set()
        self._thread.join()
        assert 0 == self.failed


@pytest.mark.parametrize("kind", ["one thread", "many threads", "asynchronous"])
def test_a_recording_that_comes_and_goes_has_each_write_once(host, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Sink, "_begin_standby", lambda _: None)  # a process for each of many
    queues = 2 if kind == "many threads" else 1

    class Busy(type(host.memory())):
        def write(self, buffers, offset):
            for _ in range(10):  # others may do something just here
                os.sched_yield()
            super().write(buffers, offset)

    backend = Busy(threads=4 if queues > 1 else 1)
    if kind == "asynchronous":
        backend.asynchronous = Many(backend)
        backend.repeats_flush = True
    disk = Disk(backend)
    lines = [host.line(disk, number=number) for number in range(queues)]
    pages = [host.share(8) for _ in lines]
    guests = [
        Guest(line, shared, number * SECTORS)
        for number, (line, shared) in enumerate(zip(lines, pages))
    ]
    try:
        for number in range(10):
            name = str(tmp_path / f"{number}.xdt")
            recorder = Recorder(disk.backend, on=False)
            recorder.configure(file=name, data=True, ring="0", on=True)
            before, after = [], []

            def put(source, copies=before, filter_=recorder):
                copies.append(bytes(backend.data))
                return filter_

            def take(filter_, copies=after):
                copies.append(bytes(backend.data))
                return filter_.source

            disk.recompose(put)
            done = len(backend.calls)
            host.until(lambda done=done: len(backend.calls) > done + 50)
            disk.recompose(take)
            recorder.finish()
            image = bytearray(before[0])
            with TraceReader(name) as reader:
                records = list(reader.records(data=True))
                assert reader.ending.is_complete
            for each in records:
                if each.operation == WROTE:
                    image[each.offset : each.offset + each.length] = each.data
            assert after[0] == image
            assert len(records) > 50
    finally:
        for guest in guests:
            guest.end()
        if kind == "asynchronous":
            for line in lines:
                line.queue.stop(30)
            backend.asynchronous.close()
    for guest in guests:
        for sector, data in guest.written.items():
            assert data == backend.data[sector * 512 : sector * 512 + 512]


def test_a_queue_that_sleeps_is_woken_and_sleeps_again(host):
    backend = host.memory()
    disk = Disk(backend)
    line = host.line(disk)
    (page,) = host.share().refs
    ask = Transfer(1, READ, 0, 8, (page,), (0,), (7,))
    assert OKAY == line.ask(ask).status
    seen = []
    disk.recompose(lambda source: seen.append(source) or source)
    assert [backend] == seen
    assert OKAY == line.ask(ask).status


def test_a_disk_without_a_queue_is_drained(host):
    disk = Disk(host.memory())
    other = host.memory()
    disk.recompose(lambda source: other)
    assert disk.backend is other


def test_a_request_that_does_not_return_is_not_waited_for(host, monkeypatch):
    monkeypatch.setattr("xen_disk_py.datapath.disk.SETTLING", 0.05)
    entered, leave = threading.Event(), threading.Event()

    class Slow(type(host.memory())):
        def read(self, buffers, offset):
            entered.set()
            assert leave.wait(30)
            super().read(buffers, offset)

    disk = Disk(Slow())
    line = host.line(disk)
    (page,) = host.share().refs
    ask = Transfer(1, READ, 0, 8, (page,), (0,), (7,))
    line.put(ask)
    line.kick()
    assert entered.wait(30)
    with pytest.raises(DeviceError, match="has not returned within"):
        disk.recompose(lambda source: pytest.fail("changed amid a request"))
    leave.set()
    line.responses(1)
    assert OKAY == line.ask(ask).status


def test_a_change_that_fails_changes_nothing(host):
    backend = host.memory()
    disk = Disk(backend)
    line = host.line(disk)
    (page,) = host.share().refs

    def fail(source):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        disk.recompose(fail)
    assert disk.backend is backend
    assert OKAY == line.ask(Transfer(1, READ, 0, 8, (page,), (0,), (7,))).status


def test_a_queue_can_be_stopped_meanwhile(host):
    """It ends as soon as the change is over, and does not serve again."""
    disk = Disk(host.memory())
    line = host.line(disk)
    disk.recompose(lambda source: line.queue.ask_to_stop() or source)
    assert line.queue.stop(30)
    disk.recompose(lambda source: source)


def test_who_comes_while_a_disk_is_changed_waits():
    quiet, served = DrainedSection(), threading.Event()

    def serve():
        quiet.enter("queue", lambda: None)
        served.set()

    with quiet.entered(30):
        thread = threading.Thread(target=serve)
        thread.start()
        assert not served.wait(0.01)
    assert served.wait(30)
    thread.join()
