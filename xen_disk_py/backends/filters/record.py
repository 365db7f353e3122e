"""``record``: writes a trace of every request, with the data of writes if wanted.

``--filter record:file=trace.xdt,data=yes``. A thread writes the file, so no request waits for it:

* If the file cannot be written any more (no space, an I/O error), the recording ends and the disk
  works as before. The log has a line, and the trace can be read up to there.
* If the trace's storage is too slow, a trace without data leaves requests out and says how many. A
  trace with data would be useless then, so the guest waits as long as the storage makes progress;
  after ``trace.sink.PATIENCE`` seconds without any, the recording ends.
* If the process is killed, another one writes what was noted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Callable, Optional
from zlib import crc32

from ...errors import ImageError, UsageError
from ...host import trace_writer
from ...host.identity import boot_id
from ...trace import sink as sinks
from ...trace.batch import BatchNotes
from ...trace.claims import Claims
from ...trace.format import (
    DISCARD,
    DISCARD_SECURELY,
    FLUSH,
    GAP,
    MIN_RING,
    READ,
    RESIZED,
    RESUMED,
    WRITE,
    Header,
    status_of,
)
from ...trace.reader import TraceReader
from ...trace.shared import ORPHANED
from ...trace.sink import Sink
from ...trace.writer import TraceWriter, event, fields_of
from ...units import format_size, parse_size
from .. import Backend, asynchronous, sharing
from ..asynchronous import Asynchronous, Done
from ..filter import Filter, Noting, is_succeeding
from ..newfile import why
from ..queues import here

log = logging.getLogger("xen_disk_py")

_SAMPLES = 32
_CLAIMED = 64 << 20  # bytes of a discard that may meet writes: a guest that has more be discarded
# while it writes there has no word for what it wants
_OPERATIONS = {
    asynchronous.READ: READ,
    asynchronous.WRITE: WRITE,
    asynchronous.FLUSH: FLUSH,
    asynchronous.DISCARD: DISCARD,
}

Move = Callable[["Sequence[memoryview]", int], Optional[int]]
_now = time.perf_counter_ns  # CLOCK_MONOTONIC


class Recorder(Filter):
    """Notes each request when the storage has done it.

    Args:
        source: the disk below.
        file: the trace. It is created with mode 0600, and must not exist, unless this process
            takes over a disk: then it continues the trace.
        data: also record the data of writes.
        ring: size of the trace in bytes; when it is full, the oldest part is overwritten. 0: no
            limit.
        on: no: record nothing for now; no file is needed then.
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
        self._guest: tuple[str, str] | None = None
        if source.asynchronous is not None:
            self.threads = source.threads
            self.asynchronous = _Recorded(source.asynchronous, self)
        self.configure(file=file, data=data, ring=ring, on=on)
        self._is_in_use = True

    def configure(self, *, file: str, data: bool, ring: str, on: bool) -> None:
        """Record with these settings from now on, in a new file.

        Requests under way are in neither file.
        """
        settings = (file, data, ring, on)
        if settings == self._settings:
            return
        size = parse_size(ring)
        if size and size < MIN_RING:
            raise UsageError(f"--filter record: ring={ring}: at least {format_size(MIN_RING)}")
        if on and not file:
            raise UsageError("--filter record needs file=…, or on=no")
        writer = None
        if on and not sharing.is_looking():
            writer = _open(self.source, file, data=data, ring=size, in_use=self._is_in_use)
        source, before = self.source, self._sink
        claims = Claims() if data and source.threads > 1 else None
        sink = _sink(writer, file, claims, in_use=self._is_in_use)
        self._sink = sink
        self._settings = settings
        self._describe()
        read, write = source.read, source.write
        read_at_once, write_at_once = source.read_nowait, source.write_nowait
        if writer is not None:
            read = _noted(sink, READ, read)
            read_at_once = _noted(sink, READ, read_at_once, only_whole=True)
        if data and writer is not None:
            write = _copied(sink, write)
            write_at_once = _copied(sink, write_at_once, only_whole=True)
        elif writer is not None:
            write = _noted(sink, WRITE, write)
            write_at_once = _noted(sink, WRITE, write_at_once, only_whole=True)
        # In the place of the methods: each would be one call more for each request.
        self.read, self.read_nowait = read, read_at_once  # type: ignore[method-assign]
        self.write, self.write_nowait = write, write_at_once  # type: ignore[method-assign]
        before.close()

    def serves(self, guest: str, vdev: str) -> None:
        """Write the guest and its device into the trace's header."""
        self._guest = guest, vdev
        self._describe()

    def know_base(self, samples: Sequence[tuple[int, int]]) -> None:
        """Note samples of the disk as it was when recording began, of a disk that was in use."""
        self._describe(samples=tuple(samples))

    def _describe(self, **more: Any) -> None:
        writer = self._sink.writer
        if writer is None:
            return
        if self._guest is not None and writer.header.guest is None:
            more["guest"], more["vdev"] = self._guest
        if more:
            with suppress(OSError):  # who writes the rest will hear of it
                writer.describe(replace(writer.header, **more))

    @property
    def file(self) -> str | None:
        """The trace that is being written; None: nothing is recorded."""
        return None if self._sink.is_over else str(self._settings[0])

    @property
    def has_data(self) -> bool:
        """Whether the data of writes is recorded."""
        return self._sink.has_data

    @property
    def is_begun(self) -> bool:
        """Whether it was told to record; :attr:`file` tells whether it still does."""
        return bool(self._settings[3])

    @property
    def has_ended(self) -> bool:
        """Whether the recording ended because of an error."""
        return self._sink.has_failed

    def finish(self) -> None:
        """End the recording, and leave the source open."""
        self._sink.close()

    def passes_on(self, method: str) -> bool:
        """Every method, while recording is off."""
        return not self._settings[3]

    def noting(self) -> Noting | None:
        """Let a queue call the source, and note its requests a batch at a time."""
        sink = self._sink
        return lambda queue, only_whole: BatchNotes(sink, queue, only_whole=only_whole)

    def counters(self) -> dict[str, int]:
        """Requests in the file, requests that were lost, and whether it is still recording."""
        sink = self._sink
        return {"recorded": sink.recorded, "lost": sink.lost, "recording": int(not sink.is_over)}

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read, and note that; :meth:`configure` puts another in its place."""
        return self.source.read(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write, and note that; with data, from a copy: the guest may change its pages."""
        return self.source.write(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read without waiting; noted only if it is complete."""
        return self.source.read_nowait(buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write without waiting; noted only if it is complete, since otherwise it is repeated."""
        return self.source.write_nowait(buffers, offset)

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
        sink = self._sink
        if sink.claims is not None and 0 < length <= _CLAIMED:
            with sink.claims.held(offset, length):
                self._do_now(sink, operation, offset, length, call)
        else:
            self._do_now(sink, operation, offset, length, call)

    def _do_now(
        self, sink: Sink, operation: int, offset: int, length: int, call: Callable[[], None]
    ) -> None:
        start = _now()
        try:
            call()
        except BaseException as error:
            self._failed(sink, operation, start, offset, length, error)
            raise
        _note(sink, operation, start, offset, length)

    @staticmethod
    def _failed(
        sink: Sink, operation: int, start: int, offset: int, length: int, error: BaseException
    ) -> None:
        took = _now() - start
        fields = (start - sink.clock, took, offset, length, 0, status_of(error))
        sink.note((*fields, here.number, operation))

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


def _note(sink: Sink, operation: int, start: int, offset: int, length: int) -> None:
    took = _now() - start
    sink.note((start - sink.clock, took, offset, length, 0, 0, here.number, operation))


def _noted(sink: Sink, operation: int, call: Move, *, only_whole: bool = False) -> Any:
    """Return ``call``, noted without its data.

    Args:
        sink: takes the records.
        operation: reads or writes.
        call: does that.
        only_whole: what was done in part will be done again, and is not noted.
    """

    def move(buffers: Sequence[memoryview], offset: int) -> int | None:
        length = sum(map(len, buffers))
        start = _now()
        try:
            done = call(buffers, offset)
        except BaseException as error:
            Recorder._failed(sink, operation, start, offset, length, error)
            raise
        if done is None or done == length or not only_whole:
            _note(sink, operation, start, offset, length if done is None else done)
        return done

    return move


def _copied(sink: Sink, call: Move, *, only_whole: bool = False) -> Any:
    """Return ``call``, which writes, noted with a copy of the data, which is what is written.

    Args:
        sink: takes the records.
        call: writes.
        only_whole: what was done in part will be done again, and is not noted.
    """
    claims = sink.claims

    def move(buffers: Sequence[memoryview], offset: int) -> int | None:
        if sink.is_over:
            return call(buffers, offset)
        data = b"".join(buffers)
        start = _now()
        try:
            done = call((memoryview(data),), offset)
        except BaseException as error:
            sink.wrote(start, _now() - start, offset, data, status_of(error), here.number)
            raise
        took = _now() - start
        if done is None or done == len(data) or not only_whole:
            sink.wrote(start, took, offset, data if done is None else data[:done], 0, here.number)
        return done

    def claimed(buffers: Sequence[memoryview], offset: int) -> int | None:
        assert claims is not None
        length = sum(map(len, buffers))
        if only_whole and not claims.are_free(offset, length):
            return 0  # it would have to wait
        with claims.held(offset, length):
            return move(buffers, offset)

    return move if claims is None else claimed


class _Recorded(Asynchronous):
    """Notes the requests of an asynchronous backend when they are complete.

    Args:
        source: does the requests.
        owner: its sink takes the records.
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
        number = here.number
        noted = _Noted(token, _OPERATIONS[operation], offset, length, data, number, _now())
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
            sink.wrote(noted.start, took, noted.offset, noted.data, status, noted.queue)
        else:
            at = noted.start - sink.clock
            fields = (at, took, noted.offset, noted.length, 0, status)
            sink.note((*fields, noted.queue, noted.operation))
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
        """Give up what is under way: nothing touches a request's buffers afterwards."""
        self._source.close()


class _Noted:
    """A request under way, with what its record will say."""

    __slots__ = ("data", "length", "offset", "operation", "queue", "start", "token")

    def __init__(
        self,
        token: Any,
        operation: int,
        offset: int,
        length: int,
        data: bytes | None,
        queue: int,
        start: int,
    ) -> None:
        self.token = token
        self.operation = operation
        self.offset = offset
        self.length = length
        self.data = data
        self.queue = queue
        self.start = start


def _sink(writer: TraceWriter | None, file: str, claims: Claims | None, *, in_use: bool) -> Sink:
    if writer is None:
        return Sink(None, "")
    try:
        return Sink(writer, file, claims, start=trace_writer.start)
    except OSError as error:
        writer.close()
        if is_succeeding() and not in_use:
            log.error("not recorded any longer: %s: %s; the disk is still served", file, error)
            return Sink(None, "")
        raise ImageError(f"{file}: not recorded: {error.strerror}") from error


def _open(source: Backend, file: str, *, data: bool, ring: int, in_use: bool) -> TraceWriter | None:
    """Create the file; a successor continues the one that exists, or records nothing."""
    if is_succeeding() and not in_use:
        try:
            return _continue(source, file, data=data)
        except FileNotFoundError:
            pass
        except (OSError, ImageError) as error:
            log.error("not recorded any longer: %s; the disk is still served", error)
            return None
    writer = TraceWriter.create(file, _describe(source, data=data, ring=ring, in_use=in_use))
    fcntl.flock(writer.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return writer


def _continue(source: Backend, file: str, *, data: bool) -> TraceWriter:
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _lock(fd)
        with TraceReader(file) as reader:
            header = reader.header
            writer = TraceWriter.resume(fd, reader)
            ending = reader.ending
            _check(reader, data=data)
            at = _now() - header.clock
        missing = [] if ending is not None and ending.text == ORPHANED else [event(GAP, at)]
        try:
            writer.append([event(RESUMED, at), *missing, event(RESIZED, at, size=source.size)])
        except OSError as error:
            raise ImageError(f"{file}: {why(error, file)}") from error
    except BaseException:
        os.close(fd)
        raise
    return writer


def _lock(fd: int) -> None:
    """Have the trace for us alone, when the earlier process's writer has written all it had."""
    until = time.monotonic() + sinks.PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise ImageError("another process still writes its trace") from None
            time.sleep(0.01)
        else:
            return


def _check(reader: TraceReader, *, data: bool) -> None:
    """Check that a trace, read to its end, can be continued."""
    if reader.header.boot != _boot() or reader.header.data != data:
        raise ImageError(f"{reader.path}: the trace of another disk")
    ending = reader.ending
    if ending is not None and ending.is_complete and ending.text != ORPHANED:
        raise ImageError(f"{reader.path}: its recording has ended: {ending.text}")


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
        samples=tuple(samples_of(source)) if data and not in_use else (),
    )


def samples_of(source: Backend) -> Iterator[tuple[int, int]]:
    """Checksums of some places of the disk, to know its base by: offsets, and CRC-32 there."""
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
        return boot_id()
    return ""
