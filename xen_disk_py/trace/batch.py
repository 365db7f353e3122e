"""Notes requests that one queue does one after another, a batch at a time.

What that costs for each of them is a look at the clock: when a request is over, the next begins.
Operations and sectors are taken from the slots of the ring, when the batch is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns as now

from ..blkif import INDIRECT, SECTOR, WRITE, Abi
from .format import MAX_DATA, status_of
from .sink import Page, Place, Sink

_PRIVATE = 1 << 20  # bytes


class BatchNotes:
    """Notes the reads and writes of one queue; for its thread alone.

    Whoever does a request appends its length to :attr:`lengths`, and to :attr:`ends` what
    :func:`now` shows when it is over. What is noted so is of contiguous slots, and succeeded; all
    else ends the run: :meth:`skip`. Before a guest sees an answer it must be :meth:`put`, so that
    what the guest asks for then comes behind it.

    Args:
        sink: where to.
        queue: its number.
        abi: of its slots.
    """

    def __init__(self, sink: Sink, queue: int, abi: Abi) -> None:
        self.lengths: list[int] = []
        self.ends: list[int] = []
        self.has_data = sink.has_data
        self._sink = sink
        self._queue = queue
        self._size = abi.slot_size
        self._columns, self._heads = abi.columns, abi.heads
        self._slots = b""
        self._at = 0  # where the slots of the run begin
        self._began = 0
        self._place: Place | None = None  # where its data is; then data_lock is ours
        # For when another thread puts data into the page.
        self._private = memoryview(bytearray(_PRIVATE if sink.has_data else 0))
        self._data = self._private
        self._start = self._used = self._room = 0  # of these bytes

    def begin(self, slots: bytes, at: int) -> None:
        """Expect the requests of these slots, from byte ``at`` on; nothing is noted yet."""
        self._slots, self._at, self._began = slots, at, now()

    def skip(self, at: int) -> None:
        """Put what is noted; the next to be noted is the request of the slot at byte ``at``."""
        self.put()
        self._at, self._began = at, now()

    def copy(self, buffers: tuple[memoryview, ...], length: int) -> tuple[memoryview, ...]:
        """Return a copy of what is to be written: it, and no other, is to be written and noted."""
        at = self._used
        if at + length > self._room:
            if not self._have_room(length):
                return buffers
            at = self._used
        self._used = end = at + length
        data = self._data[at:end]
        if len(buffers) == 1:
            data[:] = buffers[0]
        else:
            to = 0
            for buffer in buffers:
                data[to : to + len(buffer)] = buffer
                to += len(buffer)
        return (data,)

    def _have_room(self, length: int) -> bool:
        """Have room for data, where the trace is written from if no other thread puts it there."""
        self.put()
        sink = self._sink
        if sink.is_over:
            return False
        if sink.data_lock.acquire(blocking=False):
            page: Page | None = sink.page
            assert page is not None
            if page.filled + length > MAX_DATA:
                page = sink.turn(0, length) if length <= MAX_DATA else None
            if page is not None:
                self._start = self._used = page.filled
                self._place, self._data = (page, page.filled), page.data
                self._room = MAX_DATA
                return True
            sink.data_lock.release()
            if sink.is_over:
                return False
        if length > len(self._private):
            self._private = memoryview(bytearray(length))
        self._data = self._private
        self._start = self._used = 0
        self._room = min(len(self._private), MAX_DATA)
        return True

    def put(self) -> None:
        """Hand on what is noted."""
        ends = self.ends
        if ends:
            stop = self._at + len(ends) * self._size
            slots = self._slots[self._at : stop]
            data: memoryview | bytes = b""
            if self._used > self._start:
                data = self._data[self._start : self._used]
            if data and self._place is None:
                with self._sink.data_lock:
                    self._put(slots, data)
            else:
                self._put(slots, data)
            self._at, self._began = stop, ends[-1]
            ends.clear()
            self.lengths.clear()
        if self._room:
            self._room = self._start = self._used = 0
            if self._place is not None:
                self._place = None
                self._sink.data_lock.release()

    def _put(self, slots: bytes, data: memoryview | bytes) -> None:
        sink, ends, lengths = self._sink, self.ends, self.lengths
        if len(ends) > 1:
            operations, sectors = self._columns(slots)
            sink.put_batch(
                self._began, ends, lengths, sectors, operations, data, self._queue, self._place
            )
            return
        operation, second, _, _, sector, _ = next(self._heads(slots))
        if operation == INDIRECT:
            operation = second
        at, took = self._began - sink.clock, ends[0] - self._began
        fields = (at, took, sector * SECTOR, lengths[0], len(data), 0, self._queue, operation)
        with sink.lock:
            sink.put(fields, data, self._place)
        if not sink.is_awake:
            sink.rouse()

    def note(
        self,
        operation: int,
        buffers: Sequence[memoryview],
        offset: int,
        length: int,
        error: BaseException | None = None,
    ) -> None:
        """Note a request by itself, which failed or was done in part, and skip its slot.

        Args:
            operation: a read or a write.
            buffers: of a write, what :meth:`copy` returned.
            offset: bytes.
            length: of what was done, or tried.
            error: why it failed.
        """
        began = self.ends[-1] if self.ends else self._began
        took, status = now() - began, 0 if error is None else status_of(error)
        data = b""
        if operation == WRITE and self.has_data:
            data = b"".join(buffers)
        self.drop(len(data))
        data = data[:length]
        if data:
            self._sink.wrote(began, took, offset, data, status, self._queue)
        elif length:
            at = began - self._sink.clock
            self._sink.note((at, took, offset, length, 0, status, self._queue, operation))

    def drop(self, length: int) -> None:
        """Forget the copy of so many bytes that was made last, and skip a slot."""
        self._used = max(self._start, self._used - length)
        self.put()
        self._at += self._size
        self._began = now()
