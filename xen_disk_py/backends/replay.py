"""The requests of a trace once more, against any disk.

A request begins when all those are done that were done when it began in the recording: what was
under way at once is so again, as far as the disk lets it, and nothing overtakes a flush. Besides,
it may have to wait for its time.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Callable
from zlib import crc32

from ..errors import BackendError
from ..hypervisor import Closing
from ..named import NamedTuple
from ..trace.export import by_start
from ..trace.format import DISCARD, DISCARD_SECURELY, FLUSH, OPERATIONS, READ, WRITE, Record
from ..trace.histogram import Histogram
from . import Backend, asynchronous
from .filter import do_all

_WINDOW = 1024  # requests that are put in order, with what they write
_MOST_KNOWN = 4 << 20  # sectors whose content is known, for comparing
_THREADS = 64
_SECTOR = 512
_BEGINS = {
    READ: asynchronous.READ,
    WRITE: asynchronous.WRITE,
    FLUSH: asynchronous.FLUSH,
    DISCARD: asynchronous.DISCARD,
}


class Over(NamedTuple):
    """A request that is done: its recorded one, when it began and ended, how it failed."""

    record: Record
    start: int
    end: int
    error: BaseException | None
    buffer: bytearray


class Replay:
    """What became of a trace's requests this time.

    Args:
        disk: open; closed by whoever opened it.
        speed: how many times as fast as recorded; None: as fast as possible.
        compare: see whether what is read is what the trace had written before.

    Attributes:
        requests, skipped: how many were done; and not, since the disk cannot discard.
        failed: how many failed that had succeeded.
        succeeded: how many succeeded that had failed.
        recorded, now: latencies by operation, in nanoseconds.
        behind: nanoseconds, by which a request began later than it should have, at most.
        compared, different: bytes that were read.
        first_different: the number of the first request that read something else, or None.
        seconds: how long it took.
    """

    def __init__(self, disk: Backend, *, speed: float | None, compare: bool) -> None:
        self._disk = disk
        self._speed = speed
        self._known = _Known() if compare else None
        self.requests = self.skipped = self.failed = self.succeeded = 0
        self.recorded = {each: Histogram() for each in range(len(OPERATIONS))}
        self.now = {each: Histogram() for each in range(len(OPERATIONS))}
        self.behind = 0
        self.compared = self.different = 0
        self.first_different: int | None = None
        self.seconds = 0.0

    def run(self, records: Iterable[Record]) -> None:
        """Do them all."""
        with _engine(self._disk) as engine:
            under_way: dict[int, Record] = {}
            first: int | None = None
            begun = time.perf_counter_ns()
            for record in by_start(records, window=_WINDOW):
                if not self._can(record):
                    self.skipped += 1
                    continue
                while any(other.end <= record.start for other in under_way.values()):
                    self._collect(engine, under_way)
                first = record.start if first is None else first
                if self._speed is not None:
                    self._await(engine, under_way, begun + (record.start - first) / self._speed)
                while len(under_way) >= engine.depth:
                    self._collect(engine, under_way)
                under_way[id(record)] = record
                if self._known is not None:
                    self._known.begin(record)
                engine.begin(record)
            while under_way:
                self._collect(engine, under_way)
            self.seconds = (time.perf_counter_ns() - begun) / 1e9

    def _can(self, record: Record) -> bool:
        disk = self._disk
        if record.operation == DISCARD:
            return disk.can_discard and not disk.read_only
        if record.operation == DISCARD_SECURELY:
            return disk.can_discard_securely and not disk.read_only
        return record.operation == FLUSH or record.length > 0

    def _await(self, engine: _Engine, under_way: dict[int, Record], due: float) -> None:
        while True:
            left = due - time.perf_counter_ns()
            if left <= 0:
                self.behind = max(self.behind, int(-left))
                return
            if under_way:
                self._collect(engine, under_way, left / 1e9)
            else:
                time.sleep(left / 1e9)

    def _collect(
        self, engine: _Engine, under_way: dict[int, Record], timeout: float | None = None
    ) -> None:
        for over in engine.collect(timeout):
            del under_way[id(over.record)]
            self._count(over)

    def _count(self, over: Over) -> None:
        record = over.record
        self.requests += 1
        self.recorded[record.operation].add(record.latency)
        self.now[record.operation].add(over.end - over.start)
        self.failed += over.error is not None and not record.status
        self.succeeded += over.error is None and bool(record.status)
        if self._known is None:
            return
        if record.operation == READ and over.error is None:
            compared, different = self._known.compare(record, over.buffer)
            self.compared += compared
            self.different += different
            if different and self.first_different is None:
                self.first_different = record.number
        self._known.end(record, over.error)


class _Known:
    """What a disk must have, as far as a trace says: the checksum of each sector."""

    def __init__(self) -> None:
        self._sectors: dict[int, tuple[int, int | None]] = {}  # version; None: not known
        self._version = 0
        self._seen: dict[int, list[tuple[int, int, int]]] = {}
        self._mine: dict[int, int] = {}

    def begin(self, record: Record) -> None:
        """Note that a request begins: what it changes is not known until it is done."""
        sectors = range(record.offset // _SECTOR, (record.offset + record.length) // _SECTOR)
        if record.operation == READ:
            found = ((sector, self._sectors.get(sector)) for sector in sectors)
            self._seen[id(record)] = [
                (sector, known[0], known[1])
                for sector, known in found
                if known is not None and known[1] is not None
            ]
        elif record.operation != FLUSH:
            self._version += 1
            self._mine[id(record)] = self._version
            if record.operation == WRITE and len(self._sectors) < _MOST_KNOWN:
                for sector in sectors:
                    self._sectors[sector] = (self._version, None)
            else:  # a discard may be of the whole disk
                for sector in [each for each in self._sectors if each in sectors]:
                    self._sectors[sector] = (self._version, None)

    def end(self, record: Record, error: BaseException | None) -> None:
        """Note that it is done."""
        version = self._mine.pop(id(record), None)
        data = record.data
        if record.operation != WRITE or data is None or error is not None:
            return
        first = record.offset // _SECTOR
        for number in range(len(data) // _SECTOR):
            known = self._sectors.get(first + number)
            if known is not None and known[0] == version:  # else another write came meanwhile
                piece = data[number * _SECTOR : (number + 1) * _SECTOR]
                self._sectors[first + number] = (known[0], crc32(piece))

    def compare(self, record: Record, buffer: bytearray) -> tuple[int, int]:
        """Return how many bytes of a read are known, and how many of these are not as they were."""
        compared = different = 0
        first = record.offset // _SECTOR
        view = memoryview(buffer)
        for sector, version, crc in self._seen.pop(id(record), ()):
            if self._sectors.get(sector, (0, 0))[0] != version:
                continue  # written meanwhile
            compared += _SECTOR
            at = (sector - first) * _SECTOR
            different += _SECTOR * (crc32(view[at : at + _SECTOR]) != crc)
        return compared, different


class _Engine(Closing):
    """Does requests.

    Attributes:
        depth: how many at once.
    """

    depth: int

    def begin(self, record: Record) -> None:
        """Begin one."""
        raise NotImplementedError

    def collect(self, timeout: float | None) -> list[Over]:
        """Return what is done; wait until something is, for so many seconds at most."""
        raise NotImplementedError


def _engine(disk: Backend) -> _Engine:
    if disk.asynchronous is not None:
        return _Library(disk)
    return _Threads(disk) if disk.threads > 1 else _Serial(disk)


def _do(disk: Backend, record: Record) -> Over:
    buffer = _buffer(record)
    start = time.perf_counter_ns()
    error: BaseException | None = None
    try:
        _call(disk, record, buffer)
    except Exception as failure:  # noqa: BLE001 - whatever an author's code raises
        error = failure
    return Over(record, start, time.perf_counter_ns(), error, buffer)


def _buffer(record: Record) -> bytearray:
    if record.operation == WRITE:
        data = record.data or b""
        return bytearray(data.ljust(record.length, b"\xa5"))
    return bytearray(record.length if record.operation == READ else 0)


def _call(disk: Backend, record: Record, buffer: bytearray) -> None:
    if record.operation in (READ, WRITE):
        call: Callable[..., Any] = disk.read if record.operation == READ else disk.write
        if do_all(call, [memoryview(buffer)], record.offset) < len(buffer):
            raise EOFError(f"fewer than {len(buffer)} bytes")
    elif record.operation == FLUSH:
        disk.flush()
    elif record.operation == DISCARD:
        disk.discard(record.offset, record.length)
    else:
        disk.discard_securely(record.offset, record.length)


class _Serial(_Engine):
    """One after the other, in the caller's thread."""

    depth = 1

    def __init__(self, disk: Backend) -> None:
        self._disk = disk
        self._over: list[Over] = []

    def begin(self, record: Record) -> None:
        self._over.append(_do(self._disk, record))

    def collect(self, timeout: float | None) -> list[Over]:
        over, self._over = self._over, []
        return over

    def close(self) -> None:
        """There is nothing."""


class _Threads(_Engine):
    """As many at once as the disk lets in, each in a thread."""

    def __init__(self, disk: Backend) -> None:
        self._disk = disk
        self.depth = min(disk.threads, _THREADS)
        self._todo: deque[Record | None] = deque()
        self._over: list[Over] = []
        lock = threading.Lock()
        # One each: who begins a request wakes one thread for it, and none that waits for an end.
        self._begun, self._ended = threading.Condition(lock), threading.Condition(lock)
        self._threads: list[threading.Thread] = []
        try:
            while len(self._threads) < self.depth:
                thread = threading.Thread(target=self._work)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()  # they would wait indefinitely
            raise BackendError(
                f"{len(self._threads)} of {self.depth} threads are to be had: {error}"
            ) from error

    def _work(self) -> None:
        while True:
            with self._begun:
                while not self._todo:
                    self._begun.wait()
                record = self._todo.popleft()
            if record is None:
                return
            over = _do(self._disk, record)
            with self._ended:
                self._over.append(over)
                self._ended.notify()

    def begin(self, record: Record) -> None:
        with self._begun:
            self._todo.append(record)
            self._begun.notify()

    def collect(self, timeout: float | None) -> list[Over]:
        with self._ended:
            self._ended.wait_for(lambda: self._over, timeout)
            over, self._over = self._over, []
            return over

    def close(self) -> None:
        """End the threads."""
        with self._begun:
            self._todo.extend([None] * len(self._threads))
            self._begun.notify_all()
        for thread in self._threads:
            thread.join()


class _Library(_Engine):
    """A library that does many at once by itself."""

    depth = _THREADS

    def __init__(self, disk: Backend) -> None:
        assert disk.asynchronous is not None
        self._disk = disk
        self._many = disk.asynchronous
        self._over: list[Over] = []
        self._poller = select.poll()
        self._poller.register(self._many.fileno(), select.POLLIN)

    def begin(self, record: Record) -> None:
        operation = _BEGINS.get(record.operation)
        if operation is None:
            self._over.append(_do(self._disk, record))
            return
        buffer = _buffer(record)
        buffers = [memoryview(buffer)] if buffer else []
        token = (record, time.perf_counter_ns(), buffer)
        self._many.submit(operation, buffers, record.offset, record.length, token)

    def collect(self, timeout: float | None) -> list[Over]:
        over, self._over = self._over, []
        if not over and self._many.unfinished:
            self._poller.poll(None if timeout is None else timeout * 1000)
        for done in self._many.collect():
            record, start, buffer = done.token
            over.append(Over(record, start, time.perf_counter_ns(), done.error, buffer))
        return over

    def close(self) -> None:
        """The disk closes its library."""
