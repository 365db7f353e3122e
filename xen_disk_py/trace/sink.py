"""Takes records from the threads that do requests, and writes them from one of its own.

What is noted goes into a :class:`Page`, ready to be written: a record, or a batch of them
(:mod:`.batch`), is packed where it stays. Data stays where the write's only copy is. The thread
writes what pages hold, without looking at single records; all that takes long there (checksums,
``pwritev``) is done without Python's lock. The sink's own lock is held for moments, and never while
a disk is asked for anything. Pages and copies are in :mod:`.shared` memory: if the whole process is
killed, another one, which waits for that, writes what is left.

Nothing depends on the file: if it cannot be written, the recording ends, with a line in the log.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter_ns
from typing import Callable

from ..named import NamedTuple
from ..synchronizing import apart
from .claims import Claims
from .format import (
    BATCHED_SIZE,
    EVENTS,
    FLUSH,
    GAP,
    MAX_DATA,
    NO_QUEUE,
    RECORD_SIZE,
    STOPPED,
    WRITE,
    Fields,
    pack_batch_into,
    pack_record_into,
)
from .shared import IS_OVER, PAGE_WORDS, PIECES, SERIAL, USED, Shared, pieces_at
from .writer import TraceWriter, event, fields_of

log = logging.getLogger("xen_disk_py")

PATIENCE = 5.0
"""Seconds without progress of the trace's storage."""
MAX_WAITING = 64 << 20
"""Bytes of data that wait to be written."""
MAX_RECORDS = 100_000
"""Records that do, of a trace without data."""
_GATHERING = 0.2  # seconds that the writer sleeps to have more to write at once
_BLOCK = 16_384  # records in a page, at most
_EMPTY = (0, 0, 0, 0)
CHUNK = 1 << 20
"""Bytes of memory for copies of what is written."""

Starter = Callable[[int, int, int, str], None]
"""Starts the process that waits for the end of this one: takes descriptors of the memory, of the
trace and of a pipe that is closed then, and the file's name."""


class Chunk(NamedTuple):
    """Memory for copies of what is written.

    Attributes:
        memory: for the thread that has the chunk.
        noted: the same, for whoever writes the trace.
        at: where it is in what is shared.
    """

    memory: memoryview
    noted: memoryview
    at: int


Piece = tuple[Chunk, int, int]
"""Data: where it is, from what byte on, and up to what byte."""


class Page:
    """What was noted and is not written yet.

    Attributes:
        records: packed.
        pieces: of their data, what is not being written yet.
        chunks: memory that is free when the page is written.
        done: how many bytes of records and of data, how many requests, and how many of these are
            flushes that succeeded.
        written: how much of it is in the file.
    """

    __slots__ = ("_places", "chunks", "done", "pieces", "records", "words", "written")

    def __init__(self, memory: memoryview, records: int) -> None:
        self.records = memory[PAGE_WORDS : PAGE_WORDS + records]
        self.words = memory[:PAGE_WORDS].cast("Q")
        self._places = memory[pieces_at(records) :].cast("Q")
        self.pieces: list[Piece] = []
        self.chunks: list[Chunk] = []
        self.done = self.written = _EMPTY

    def begin(self, serial: int) -> None:
        """Begin anew, as the page of that number."""
        self.done = self.written = _EMPTY
        self.words[USED] = self.words[PIECES] = 0
        self.words[SERIAL] = serial

    def put(
        self, used: int, filled: int, requests: int, flushes: int, data: Piece | None = None
    ) -> None:
        """Have records count that were packed behind the others, and their data."""
        if data is not None:
            self._add(data)
        before = self.done
        self.done = before[0] + used, before[1] + filled, before[2] + requests, before[3] + flushes
        self.words[USED] = self.done[0]

    def _add(self, data: Piece) -> None:
        """Put data behind the rest; a batch's is often contiguous with that of the one before."""
        chunk, start, end = data
        words, places, pieces = self.words, self._places, self.pieces
        number = words[PIECES]
        if number and places[2 * number - 1] == chunk.at + start:
            places[2 * number - 1] = chunk.at + end
        else:
            places[2 * number], places[2 * number + 1] = chunk.at + start, chunk.at + end
            words[PIECES] = number + 1
        if pieces and pieces[-1][0] is chunk and pieces[-1][2] == start:
            pieces[-1] = chunk, pieces[-1][1], end
        else:
            pieces.append(data)


class Sink:
    """Takes records, from any thread.

    :meth:`note`, :meth:`wrote` and :meth:`put_batch` do; the order of these calls is that of the
    trace.

    Args:
        writer: of the file; None: nothing is recorded.
        name: of the file, for the log.
        claims: of those who write at once, if several threads do.
        start: starts the process that writes what is left when this one is killed.

    Attributes:
        page: where the next record goes.
        clock: what ``CLOCK_MONOTONIC`` showed when the trace began, in nanoseconds.
        has_data: what is written is recorded, too.
        is_awake: nobody needs to :meth:`rouse` the thread.
        recorded: requests that are in the file.
        lost: requests that were not recorded.

    Raises:
        OSError: there is no memory to be had.
    """

    def __init__(
        self,
        writer: TraceWriter | None,
        name: str,
        claims: Claims | None = None,
        *,
        start: Starter | None = None,
    ) -> None:
        self.writer = writer
        self._start = start
        self._alive = -1  # of a pipe: open as long as this process lives
        self._shared = None if writer is None else Shared(writer)
        self._serial = 0
        self._mine: Chunk | None = None  # for what :meth:`wrote` takes
        self._used = 0
        self.claims = claims
        self.clock = writer.header.clock if writer is not None else 0
        self.has_data = writer is not None and writer.header.data
        self._capacity = min(_BLOCK, MAX_RECORDS) * RECORD_SIZE  # bytes of the records of a page
        self.is_awake = writer is None
        self.recorded = self.lost = 0
        self._name = name
        # No room in it: the next request calls _turn().
        self._nothing = Page(memoryview(bytearray(pieces_at(0))), 0)
        self._nothing.done = self._nothing.written = (self._capacity, MAX_DATA + 1, 0, 0)
        self.page = self._filling = self._nothing
        self._full: deque[Page] = deque()
        self._free: list[Page] = []
        self._spare: list[Chunk] = []
        self._pages = 0  # how many there are
        waiting, size = MAX_RECORDS * RECORD_SIZE, self._capacity
        if self.has_data:
            waiting, size = MAX_WAITING, MAX_DATA  # so the chunks are bounded, too
        self._most = max(1, waiting // size)
        self.lock = threading.RLock()
        self._moved = threading.Condition(self.lock)
        self._moves = 0
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._gap = 0  # requests lost, since that was noted
        self._over = writer is None
        self._closing = False
        self._is_stuck = False
        self._why = ""
        self._thread: threading.Thread | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is recorded."""
        return self._over

    @property
    def has_failed(self) -> bool:
        """Whether that is so because the file could not be written."""
        return bool(self._why)

    # -- for those who do requests ---------------------------------------------------------

    def note(self, fields: Fields) -> None:
        """Take the record of what has no data."""
        if self._over:
            return
        with self.lock:
            self._put(fields)
        if not self.is_awake:
            self.rouse()

    def wrote(
        self,
        start: int,
        took: int,
        offset: int,
        data: bytes,
        status: int = 0,
        queue: int = NO_QUEUE,
    ) -> None:
        """Take the record of a write with its data; waits while too much is not written yet.

        Args:
            start: by ``CLOCK_MONOTONIC``, in nanoseconds.
            took: nanoseconds.
            offset: bytes.
            data: what was written.
            status: 0, or the errno.
            queue: its number.
        """
        if self._over:
            return
        begun = start - self.clock
        with self.lock:
            most = min(MAX_DATA, CHUNK)
            for at in range(0, len(data), most):
                part = data[at : at + most]
                place = self._copy(part)
                if place is None:
                    return
                length = len(part)
                fields = (begun, took, offset + at, length, length, status, queue, WRITE)
                self._put(fields, place)
        if not self.is_awake:
            self.rouse()

    def _copy(self, data: bytes) -> Piece | None:
        if self._mine is None or self._used + len(data) > CHUNK:
            mine, self._mine = self._mine, None  # another thread may come while we wait
            self._mine, self._used = self.exchange(mine), 0
        if self._mine is None:
            return None
        start, self._used = self._used, self._used + len(data)
        self._mine.memory[start : self._used] = data
        return self._mine, start, self._used

    def _put(self, fields: Fields, data: Piece | None = None) -> None:
        """Put a record, and its data, behind the others; the lock is held."""
        operation, status = fields[7], fields[5]
        requests, flushes = operation < EVENTS, operation == FLUSH and not status
        page = self._with_room_for(RECORD_SIZE, fields[4], requests)
        if page is not None:
            pack_record_into(page.records, page.done[0], *fields)
            page.put(RECORD_SIZE, fields[4], requests, flushes, data)

    def put_batch(
        self,
        began: int,
        noted: Sequence[tuple[int, int, int, int]],
        data: Piece | None,
        queue: int,
    ) -> None:
        """Take reads and writes that were done one after another, from any thread.

        Args:
            began: when the first was, by ``CLOCK_MONOTONIC``, in nanoseconds.
            noted: of each, when it was over (by the same clock), its length and offset in bytes,
                and whether it was a read or a write.
            data: of the writes; at most ``MAX_DATA`` bytes. It stays as it is until it is in the
                file.
            queue: its number.
        """
        count = len(noted)
        size = 0 if data is None else data[2] - data[1]
        with self.lock:
            if count == 1:
                end, length, offset, operation = noted[0]
                at, took = began - self.clock, end - began
                self._put((at, took, offset, length, size, 0, queue, operation), data)
            else:
                page = self._with_room_for(RECORD_SIZE + count * BATCHED_SIZE, size, count)
                if page is not None:
                    ends, lengths, offsets, operations = zip(*noted)
                    packed = pack_batch_into(
                        page.records,
                        page.done[0],
                        began,
                        self.clock,
                        ends,
                        lengths,
                        offsets,
                        bytes(operations),
                        size,
                        queue,
                    )
                    page.put(packed, size, count, 0, data)
        if not self.is_awake:
            self.rouse()

    def exchange(self, chunk: Chunk | None) -> Chunk | None:
        """Return :data:`CHUNK` bytes of memory.

        Args:
            chunk: what is given back for it: all data there that is noted was put.

        Returns:
            None if that cannot be had, or nothing is recorded any longer.
        """
        with self.lock:
            if chunk is not None:
                self.give_back(chunk)
            if self._over or self._shared is None:
                return None
            if self._spare:
                return self._spare.pop()
            try:
                at, memory = self._shared.more(CHUNK)
            except (MemoryError, OSError):
                self.end("there is no memory to be had")
                return None
            return Chunk(memory, apart(memory), at)

    def give_back(self, chunk: Chunk) -> None:
        """Have a chunk be free when what is noted of it is in the file."""
        with self.lock:
            page = self._filling
            if page is self._nothing and self._full:
                page = self._full[-1]
            (self._spare if page is self._nothing else page.chunks).append(chunk)

    def _with_room_for(self, size: int, length: int, requests: int) -> Page | None:
        """The page where records of that size go, with their data; None: do without."""
        page: Page | None = self.page
        assert page is not None
        used, filled, _, _ = page.done
        if used + size > self._capacity or filled + length > MAX_DATA:
            page = self._turn(size, length, requests)
        return page

    def _turn(self, size: int, length: int, requests: int) -> Page | None:
        """Return a page with room for more; None: there is none, do without.

        Args:
            size: bytes of records.
            length: bytes of their data, at most ``MAX_DATA``.
            requests: how many are lost if there is none.
        """
        with self.lock:
            try:
                found = self._with_room(size, length) if size <= self._capacity else None
            except (MemoryError, OSError):
                self.end("there is no memory to be had")
                found = None
            if found is None and not self._over:
                self._gap += requests
                self.lost += requests
            self.page = self._nothing if self._over else self._filling
            return found

    def _with_room(self, size: int, length: int) -> Page | None:
        """The page that is being filled, or another; of a trace with data, wait for one."""
        while not self._over:
            page = self._filling
            used, filled, _, _ = page.done
            if used + size <= self._capacity and filled + length <= MAX_DATA:
                return page
            can_have_another = bool(self._free) or self._pages < self._most
            if page is not self._nothing and (can_have_another or self.has_data):
                self._full.append(page)
                self._filling = self._nothing
                self._hurry.set()
            if can_have_another:
                self._filling = self._another()
            elif not self.has_data:
                return None
            else:
                self._await_page()
        return None

    def _another(self) -> Page:
        if self._free:
            page = self._free.pop()
        else:
            assert self._shared is not None
            page = Page(self._shared.page(self._capacity), self._capacity)
            self._pages += 1
        self._serial += 1
        page.begin(self._serial)
        if self._gap:
            lost, self._gap = self._gap, 0
            now = perf_counter_ns() - self.clock
            _append(page, fields_of(event(GAP, now, lost=lost)))
            log.warning("%s: %d requests not recorded: its storage is too slow", self._name, lost)
        return page

    def _await_page(self) -> None:
        self.page = self._nothing
        self.rouse()
        before = self._moves
        if not self._moved.wait(PATIENCE) and self._moves == before:
            self._is_stuck = True
            self.end(f"its storage has not moved for {PATIENCE:g} s")

    def rouse(self) -> None:
        """Have what is there be written."""
        self.is_awake = True
        if self._over:
            return
        if self._thread is None:
            with self._moved:
                if self._thread is None:  # not before: who opens a disk may fork
                    thread = threading.Thread(target=self._run, name="trace", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:
                        self.end(f"there is no thread to be had ({error})")
                        return
                    self._thread = thread
        self._wake.set()

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        self._begin_standby()
        while True:
            self._wake.wait()
            self._wake.clear()
            while True:
                is_hurried = not self._closing and self._hurry.wait(_GATHERING)
                self._hurry.clear()
                if not self._write(only_full=is_hurried and not self._closing):
                    break
            with self.lock:  # who puts more before sees us awake, and after that asleep
                self.is_awake = False
                is_more = self._full or self._filling.done != self._filling.written
            if is_more:
                self.rouse()
            if self._over and self.writer is not None and self.writer.fd >= 0:
                self._stop(self._why)  # another thread has given up waiting for this one
            if self._closing or self._over:
                return

    def _write(self, *, only_full: bool = False) -> bool:
        """Write all that there is; False if that is nothing.

        What comes meanwhile is written later, in one piece: each piece costs the queues time.

        Args:
            only_full: leave the page that is being filled.
        """
        wrote = is_last = False
        while not (self._over or is_last):
            with self._moved:
                is_full = bool(self._full)
                page = self._full[0] if is_full else self._filling
                if page is self._nothing or (
                    not is_full and (only_full or page.done == page.written)
                ):
                    break
                done, pieces = page.done, page.pieces
                page.pieces = []
            is_last = not is_full
            if done != page.written:
                wrote = True
                try:
                    self._write_part(page, done, pieces)
                except OSError as error:
                    self.end(error.strerror or str(error))
            with self._moved:
                page.written = done
                self._moves += 1
                if is_full and self._full:
                    self._full.popleft()
                    page.begin(0)
                    self._spare += page.chunks
                    page.chunks = []
                    self._free.append(page)
                self._moved.notify_all()
        return wrote

    def _write_part(self, page: Page, done: tuple[int, int, int, int], pieces: list[Piece]) -> None:
        writer = self.writer
        assert writer is not None
        first, _, before, earlier = page.written
        last, _, requests, flushes = done
        body = page.records[first:last]
        data = [chunk.noted[start:end] for chunk, start, end in pieces]
        requests -= before
        try:
            writer.write_packed(body, data, requests=requests, flushes=flushes - earlier)
        except OSError as error:
            before = writer.requests
            writer.write_what_fits(error, body, data)
            self.recorded += writer.requests - before
            raise
        if self._shared is not None:
            self._shared.reached(writer, page.words[SERIAL], last, done[1])
        self.recorded += requests

    # -- its end ---------------------------------------------------------------------------

    def end(self, why: str) -> None:
        """Record nothing more, and say so, in the trace too if it can be."""
        with self._moved:
            if self._over:
                return
            self._why = why
            self._over = True
            self.page = self._filling = self._nothing
            self._full.clear()
            self._free.clear()
            self._spare.clear()
            self._moved.notify_all()
        log.error("%s: recording ended: %s; the disk is still served", self._name, why)
        if self._thread is None or threading.current_thread() is self._thread:
            self._stop(why)
        self._hurry.set()
        self._wake.set()

    def _stop(self, why: str) -> None:
        writer = self.writer
        if writer is not None and writer.fd >= 0:
            with suppress(OSError):
                writer.cut()
                now = perf_counter_ns() - self.clock
                writer.append([event(STOPPED, now, text=why)])
                writer.sync()
            writer.close()
            self._end_standby()

    def _begin_standby(self) -> None:
        if self._start is None or self.writer is None or self._shared is None:
            return
        try:
            ended, self._alive = os.pipe2(os.O_CLOEXEC)
            try:
                self._start(self._shared.fd, self.writer.fd, ended, self._name)
            finally:
                os.close(ended)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning(
                "%s: what is not written will be lost if this process is killed: "
                "another one cannot be started (%s)",
                self._name,
                error,
            )

    def _end_standby(self) -> None:
        if self._shared is not None:
            self._shared.words[IS_OVER] = 1
            os.close(self._shared.fd)
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def close(self) -> None:
        """Write the rest, within :data:`PATIENCE` seconds."""
        thread = self._thread
        if self._over:
            is_mine = thread is threading.current_thread()
            if thread is not None and not is_mine and not self._is_stuck:
                thread.join(PATIENCE)  # it says in the file why it ends
            return
        self._closing = True
        self._hurry.set()
        self._wake.set()
        if thread is not None:
            thread.join(PATIENCE)
            if thread.is_alive():
                log.error("%s: its end is not recorded: its storage does not return", self._name)
                self._over, self.page = True, self._nothing
                return
        if self._over:
            return
        self._closing = False  # nobody writes but us now
        self._thread = threading.current_thread()
        with self._moved:
            self._note_gap()
        self._write()
        self._over, self.page = True, self._nothing
        self._stop("")

    def _note_gap(self) -> None:
        """Note what was lost, if no request came any more."""
        if self._gap:
            if self._filling is not self._nothing:
                self._full.append(self._filling)
            self._pages = 0  # one more can be had
            self._filling = self._another()


def _append(page: Page, fields: Fields) -> None:
    """Put the record of an event into a page that has room."""
    pack_record_into(page.records, page.done[0], *fields)
    page.put(RECORD_SIZE, 0, 0, 0)
