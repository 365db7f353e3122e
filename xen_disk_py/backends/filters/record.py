"""``record``: every request, and what was written if that is wanted, in a file.

``--filter record:file=trace.xdt,data=yes``. A thread writes, so that requests wait for nothing:

* What cannot be written for good (no space, an I/O error) ends the recording, not the disk: there
  is a line in the log, and the trace is readable up to there.
* Of a trace without data, requests are left out while its storage does not keep up, and the trace
  says how many. One with data would be worth nothing then: the guest waits, as long as something
  moves; if nothing does for :data:`PATIENCE` seconds, the recording ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Optional
from zlib import crc32

from ...errors import ImageError, UsageError
from ...trace.format import (
    DISCARD,
    DISCARD_SECURELY,
    EVENTS,
    FLUSH,
    GAP,
    MAX_DATA,
    MIN_RING,
    NO_QUEUE,
    READ,
    RESIZED,
    RESUMED,
    STOPPED,
    UNKNOWN_ERROR,
    WRITE,
    Fields,
    Header,
)
from ...trace.reader import TraceReader
from ...trace.writer import TraceWriter, event, fields_of
from ...units import format_size, parse_size
from .. import Backend, asynchronous
from ..asynchronous import Asynchronous, Done
from ..filter import Filter, is_succeeding

log = logging.getLogger("xen_disk_py")

PATIENCE = 5.0
"""Seconds without progress of the trace's storage."""
MAX_WAITING = 64 << 20
"""Bytes of data that wait to be written."""
MAX_RECORDS = 100_000
"""Records that do."""
_GATHERING = 0.2  # seconds that the writer sleeps to have more to write at once
_PLENTY = MAX_DATA  # bytes of data for which it does not
_BLOCK = 16_384  # records in a block, at most
_SAMPLES = 32
_OPERATIONS = {
    asynchronous.READ: READ,
    asynchronous.WRITE: WRITE,
    asynchronous.FLUSH: FLUSH,
    asynchronous.DISCARD: DISCARD,
}

Move = Callable[["Sequence[memoryview]", int], Optional[int]]
_operation = itemgetter(7)  # of a record's fields
_now = time.perf_counter_ns  # CLOCK_MONOTONIC


class Recorder(Filter):
    """Notes every request after the storage has done it.

    Args:
        source: the disk below.
        file: made for its owner alone; a file that exists is refused, except that a process that
            takes over a disk continues its trace.
        data: also note what is written.
        ring: keep the newest so many bytes of the trace; 0: all.
        on: no: record nothing for now; then it needs no file.
    """

    def __init__(
        self,
        source: Backend,
        *,
        file: str = "",
        data: bool = False,
        ring: str = "0",
        on: bool = True,
    ) -> None:
        super().__init__(source)
        self._sink = Sink(None, "")
        self._settings: tuple[object, ...] = ()
        self._is_in_use = False
        if source.asynchronous is not None:
            self.threads = source.threads
            self.asynchronous = _Recorded(source.asynchronous, self)
        self.configure(file=file, data=data, ring=ring, on=on)
        self._is_in_use = True

    def configure(self, *, file: str, data: bool, ring: str, on: bool) -> None:
        """Record so from now on, in a new file; what is under way is in neither."""
        settings = (file, data, ring, on)
        if settings == self._settings:
            return
        size = parse_size(ring)
        if size and size < MIN_RING:
            raise UsageError(f"--filter record: ring={ring}: at least {format_size(MIN_RING)}")
        if on and not file:
            raise UsageError("--filter record needs file=…, or on=no")
        writer = None
        if on:
            writer = _open(self.source, file, data=data, ring=size, in_use=self._is_in_use)
        before, self._sink = self._sink, Sink(writer, file)
        self._settings = settings
        self._read: Move = self.source.read
        self._write: Move = self.source.write
        if writer is not None:
            self._read = self._timed(READ, self.source.read)
            self._write = self._timed(WRITE, self.source.write)
        before.close()

    def passes_on(self, method: str) -> bool:
        """Everything while nothing is recorded."""
        return not self._settings[3]

    def counters(self) -> dict[str, int]:
        """How many requests are in the file, how many could not be noted, and whether it ended."""
        sink = self._sink
        return {"recorded": sink.recorded, "lost": sink.lost, "recording": int(not sink.is_over)}

    def _timed(self, operation: int, call: Move) -> Move:
        """Return ``call``, noted. All names are local: this is what a request costs more."""
        sink, failed = self._sink, self._failed
        note, origin = sink.note, sink.clock

        def move(buffers: Sequence[memoryview], offset: int) -> int | None:
            start = _now()
            try:
                done = call(buffers, offset)
            except BaseException as error:
                failed(operation, start, offset, sum(map(len, buffers)), error)
                raise
            took = _now() - start
            length = sum(map(len, buffers)) if done is None else done
            note((start - origin, took, offset, length, 0, 0, NO_QUEUE, operation))
            return done

        return move

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read, and note that."""
        return self._read(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what takes no waiting; noted if that is all."""
        start = _now()
        done = self.source.read_nowait(buffers, offset)
        if done and done == sum(map(len, buffers)):
            fields = (start - self._sink.clock, _now() - start, offset, done, 0, 0, NO_QUEUE, READ)
            self._sink.note(fields)
        return done

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write, and note that; with data, the very bytes: the guest may change its pages."""
        if not self._sink.has_data:
            return self._write(buffers, offset)
        data = b"".join(buffers)
        start = _now()
        try:
            done = self.source.write((memoryview(data),), offset)
        except BaseException as error:
            self._failed(WRITE, start, offset, len(data), error, data)
            raise
        self._sink.wrote(start, _now() - start, offset, data if done is None else data[:done])
        return done

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write if that takes no waiting; noted if it is all, for else it is done again."""
        data = None
        if self._sink.has_data:
            data = b"".join(buffers)
            buffers = (memoryview(data),)
        start = _now()
        done = self.source.write_nowait(buffers, offset)
        if done and done == sum(map(len, buffers)):
            took = _now() - start
            if data is None:
                self._sink.note(
                    (start - self._sink.clock, took, offset, done, 0, 0, NO_QUEUE, WRITE)
                )
            else:
                self._sink.wrote(start, took, offset, data)
        return done

    def flush(self) -> None:
        """Flush, and note that."""
        self._do(FLUSH, 0, 0, self.source.flush)

    def discard(self, offset: int, length: int) -> None:
        """Discard, and note that."""
        self._do(DISCARD, offset, length, lambda: self.source.discard(offset, length))

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard, and note that."""
        call = self.source.discard_securely
        self._do(DISCARD_SECURELY, offset, length, lambda: call(offset, length))

    def _do(self, operation: int, offset: int, length: int, call: Callable[[], None]) -> None:
        start = _now()
        try:
            call()
        except BaseException as error:
            self._failed(operation, start, offset, length, error)
            raise
        fields = (
            start - self._sink.clock,
            _now() - start,
            offset,
            length,
            0,
            0,
            NO_QUEUE,
            operation,
        )
        self._sink.note(fields)

    def _failed(
        self,
        operation: int,
        start: int,
        offset: int,
        length: int,
        error: BaseException,
        data: bytes | None = None,
    ) -> None:
        took, status = _now() - start, status_of(error)
        if data is not None:
            self._sink.wrote(start, took, offset, data, status)
            return
        at = start - self._sink.clock
        self._sink.note((at, took, offset, length, 0, status, NO_QUEUE, operation))

    def resize(self, size: int | None) -> int:
        """Resize, and note that."""
        done = super().resize(size)
        if size is not None:
            at = _now() - self._sink.clock
            self._sink.note(fields_of(event(RESIZED, at, size=done)))
        return done

    def close(self) -> None:
        """Write the rest, and close the file and the source."""
        try:
            self._sink.close()
        finally:
            super().close()


class _Recorded(Asynchronous):
    """Requests of a library that does many at once: noted when they are over.

    Args:
        source: does them.
        owner: has the sink where they are noted.
    """

    def __init__(self, source: Asynchronous, owner: Recorder) -> None:
        self._source = source  # its descriptors and lock: the base class's own are not made
        self._owner = owner

    @property
    def unfinished(self) -> int:  # type: ignore[override]  # only ever read from outside
        return self._source.unfinished

    def fileno(self) -> int:
        return self._source.fileno()

    def submit(
        self, operation: int, buffers: Sequence[memoryview], offset: int, length: int, token: Any
    ) -> None:
        data = None
        if operation == asynchronous.WRITE and self._owner._sink.has_data:
            data = b"".join(buffers)
            buffers = (memoryview(data),)
        noted = _Noted(token, _OPERATIONS[operation], offset, length, data, _now())
        self._source.submit(operation, buffers, offset, length, noted)

    def collect(self) -> list[Done]:
        return [self._over(done) for done in self._source.collect()]

    def _over(self, done: Done) -> Done:
        noted = done.token
        if not isinstance(noted, _Noted):
            return done
        took = _now() - noted.start
        status = 0 if done.error is None else status_of(done.error)
        sink = self._owner._sink
        if noted.data is not None:
            sink.wrote(noted.start, took, noted.offset, noted.data, status)
        else:
            at = noted.start - sink.clock
            fields = (at, took, noted.offset, noted.length, 0, status, NO_QUEUE, noted.operation)
            sink.note(fields)
        return Done(noted.token, done.error)

    def call(
        self,
        operation: int,
        buffers: Sequence[memoryview] = (),
        offset: int = 0,
        length: int | None = None,
    ) -> None:
        """As the source does; noted by the filter's own methods, which are what calls this."""
        self._source.call(operation, buffers, offset, length)

    def close(self) -> None:
        """The source's owner closes it."""


class _Noted:
    """A request under way, and what it is noted from."""

    __slots__ = ("data", "length", "offset", "operation", "start", "token")

    def __init__(
        self, token: Any, operation: int, offset: int, length: int, data: bytes | None, start: int
    ) -> None:
        self.token = token
        self.operation = operation
        self.offset = offset
        self.length = length
        self.data = data
        self.start = start


class Sink:
    """Takes records from any thread, and writes them from one of its own.

    Args:
        writer: of the file; None: nothing is recorded.
        name: of the file, for the log.
    """

    def __init__(self, writer: TraceWriter | None, name: str) -> None:
        self._writer = writer
        self._name = name
        self.clock = writer.header.clock if writer is not None else 0
        self.has_data = writer is not None and writer.header.data
        self._items: deque[Fields] = deque()
        self._data: deque[bytes] = deque()  # of those records that have some
        self._most = MAX_RECORDS if writer is not None else 0
        self._is_awake = writer is None
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._moved = threading.Condition()
        self._waiting = 0  # bytes of data
        self._lost = 0  # requests, since the last gap was noted
        self.recorded = self.lost = 0
        self._over = writer is None
        self._closing = False
        self._why = ""
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is recorded."""
        return self._over

    def note(self, fields: Fields) -> None:
        """Take the record of what has no data; never waits."""
        items = self._items
        if len(items) < self._most:
            items.append(fields)
        elif not self._over:
            with self._moved:
                self._lost += 1
                self.lost += 1
        if not self._is_awake:
            self._rouse()

    def wrote(self, start: int, took: int, offset: int, data: bytes, status: int = 0) -> None:
        """Take the record of a write with its data; waits while too much is not written yet."""
        if self._over:
            return
        with self._moved:
            self._waiting += len(data)
            if self._waiting > _PLENTY:
                self._hurry.set()
            while self._waiting > MAX_WAITING and not self._over:
                before = self._waiting
                if not self._moved.wait(PATIENCE) and self._waiting >= before:
                    self._end(f"its storage has not moved for {PATIENCE:g} s")
            begun = start - self.clock
            for at in range(0, len(data), MAX_DATA):
                part = data[at : at + MAX_DATA]
                length = len(part)
                self._data.append(part)  # first: the record says that it is there
                self._items.append(
                    (begun, took, offset + at, length, length, status, NO_QUEUE, WRITE)
                )
        if not self._is_awake:
            self._rouse()

    def _rouse(self) -> None:
        self._is_awake = True
        if self._over:
            return
        if self._thread is None:
            with self._starting:
                if self._thread is None:  # not before: who opens a disk may fork
                    thread = threading.Thread(target=self._run, name="trace", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:
                        self._end(f"there is no thread to be had ({error})")
                        return
                    self._thread = thread
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while True:
                if not self._closing:
                    self._hurry.wait(_GATHERING)
                self._hurry.clear()
                if not self._write():
                    break
            self._is_awake = False
            if self._items:  # came after the last look, and saw us awake
                self._rouse()
            if self._over:
                self._items.clear()
                self._data.clear()
                if self._writer is not None and self._writer.fd >= 0:
                    self._stop(self._why)  # another thread has given up waiting for this one
            if self._closing or self._over:
                return

    def _write(self) -> bool:
        """Write all that there is; False if that is nothing."""
        wrote = False
        while self._items and not self._over:
            wrote = True
            records, data, size = self._take()
            try:
                self._put(records, data)
            except OSError as error:
                self._end(error.strerror or str(error))
            with self._moved:
                self._waiting -= size
                self._moved.notify_all()
        return wrote

    def _take(self) -> tuple[list[Fields], list[bytes], int]:
        items = self._items
        data: list[bytes] = []
        size = 0
        if not self.has_data:
            records = [items.popleft() for _ in range(min(len(items), _BLOCK))]
        else:
            records = []
            while items and len(records) < _BLOCK and size + items[0][4] <= MAX_DATA:
                fields = items.popleft()
                records.append(fields)
                if fields[4]:
                    data.append(self._data.popleft())
                    size += fields[4]
        if self._lost:
            with self._moved:
                lost, self._lost = self._lost, 0
            last = records[-1]
            records.append(fields_of(event(GAP, last[0] + last[1], lost=lost)))
            log.warning("%s: %d requests not recorded: its storage is too slow", self._name, lost)
        return records, data, size

    def _put(self, records: Sequence[Fields], data: Sequence[bytes]) -> None:
        writer = self._writer
        assert writer is not None
        operations = list(map(_operation, records))
        requests, flushes = len(records), operations.count(FLUSH)
        if flushes:
            flushes = sum(each[7] == FLUSH and not each[5] for each in records)
        if max(operations) >= EVENTS:
            requests = sum(each < EVENTS for each in operations)
        writer.write(records, data, requests=requests, flushes=flushes)
        self.recorded += requests

    def _end(self, why: str) -> None:
        """Record nothing more, and say so, in the trace too if it can be."""
        if self._over:
            return
        self._why = why
        self._over = True
        self.has_data = False
        self._most = 0
        log.error("%s: recording ended: %s; the disk is served on", self._name, why)
        if self._thread is None or threading.current_thread() is self._thread:
            self._stop(why)

    def _stop(self, why: str) -> None:
        writer = self._writer
        if writer is not None and writer.fd >= 0:
            with suppress(OSError):
                writer.append([event(STOPPED, _now() - self.clock, text=why)])
                writer.sync()
            writer.close()

    def close(self) -> None:
        """Write the rest, within :data:`PATIENCE` seconds."""
        if self._over:
            return
        self._closing = True
        self._hurry.set()
        self._wake.set()
        thread = self._thread
        if thread is not None:
            thread.join(PATIENCE)
            if thread.is_alive():
                log.error("%s: its end is not recorded: its storage does not return", self._name)
                self._over = True
                return
        if not self._over:
            self._write()
            self._over, self._most, self.has_data = True, 0, False
            self._stop("")


def status_of(error: BaseException) -> int:
    """Return what a record says of an error."""
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) and 0 < number < UNKNOWN_ERROR else UNKNOWN_ERROR


def _open(source: Backend, file: str, *, data: bool, ring: int, in_use: bool) -> TraceWriter | None:
    """Make the file; a successor continues the one that there is, or does without."""
    if is_succeeding() and not in_use:
        try:
            return _continue(source, file, data=data)
        except FileNotFoundError:
            pass
        except (OSError, ImageError) as error:
            log.error("not recorded any longer: %s; the disk is served on", error)
            return None
    writer = TraceWriter.create(file, _describe(source, data=data, ring=ring, in_use=in_use))
    fcntl.flock(writer.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return writer


def _continue(source: Backend, file: str, *, data: bool) -> TraceWriter:
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with TraceReader(file) as reader:
            header = reader.header
            writer = TraceWriter.resume(fd, reader)
            _check(reader, data=data)
            at = _now() - header.clock
        try:
            writer.append(
                [event(RESUMED, at), event(GAP, at), event(RESIZED, at, size=source.size)]
            )
        except OSError as error:
            raise ImageError(f"{file}: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    return writer


def _check(reader: TraceReader, *, data: bool) -> None:
    """See that a trace, read to its end, can be continued."""
    if reader.header.boot != _boot() or reader.header.data != data:
        raise ImageError(f"{reader.path}: the trace of another disk")
    if reader.ending is not None and reader.ending.is_complete:
        raise ImageError(f"{reader.path}: its recording has ended: {reader.ending.text}")


def _describe(source: Backend, *, data: bool, ring: int, in_use: bool) -> Header:
    path = getattr(source, "path", None)
    return Header(
        size=source.size,
        sector_size=source.sector_size,
        started=time.time_ns(),
        clock=_now(),
        id=os.urandom(16),
        boot=_boot(),
        data=data,
        ring=ring,
        backend=str(source),
        path=os.path.abspath(path) if isinstance(path, str) and os.path.exists(path) else None,
        # Nobody else may read while the disk is in use, nor would it be one moment's content.
        samples=tuple(_samples(source)) if data and not in_use else (),
    )


def _samples(source: Backend) -> Iterator[tuple[int, int]]:
    """Checksums of some places of the disk, to know its base by."""
    sample = Header.sample
    last = (source.size - 1) // sample
    for number in sorted({last * step // (_SAMPLES - 1) for step in range(_SAMPLES)}):
        at = number * sample
        page = memoryview(bytearray(min(sample, source.size - at)))
        done = 0
        while done < len(page):
            count = source.read([page[done:]], at + done)
            if count is None:
                break
            if not count:
                return
            done += count
        yield at, crc32(page)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""
