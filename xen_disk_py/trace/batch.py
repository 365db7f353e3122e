"""Notes requests that one queue does one after another, a batch at a time.

What that costs for each of them is a look at the clock and a copy of what it writes: when a request
is over, the next begins. The rest is done once a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns as now
from typing import Callable, Optional

from .claims import GRAIN
from .format import READ, WRITE, status_of
from .sink import CHUNK, Chunk, Sink

Move = Callable[["Sequence[memoryview]", int], Optional[int]]


class BatchNotes:
    """Notes the reads and writes of one queue; for its thread alone.

    The queue calls what :meth:`reading` and :meth:`writing` return. Before it does anything in
    another way, and before a guest sees an answer, it calls :meth:`put`: what the guest asks for
    then comes behind it.

    Args:
        sink: where to.
        queue: its number.
        only_whole: what was done in part will be done again, and is noted then. That is so where
            several threads write, too: a write that overlaps another's, which is not noted yet, is
            not begun (see :mod:`.claims`).
    """

    def __init__(self, sink: Sink, queue: int, *, only_whole: bool) -> None:
        self._sink = sink
        self._queue = queue
        self._only_whole = only_whole
        # Of each request: when it was over, its length, offset and operation.
        self._noted: list[tuple[int, int, int, int]] = []
        self._began = 0  # when the first of them was
        # Where writes are copied to, and what of that is noted and not put.
        self._chunk: Chunk | None = None
        self._memory = memoryview(b"")  # its
        self._start = self._used = self._room = 0
        self._claims = sink.claims if only_whole and sink.has_data else None
        self._mine: set[int] = set()

    def reading(self, call: Move, operation: int = READ) -> Move:
        """Return ``call``, whose reads are noted; if one is done in part, call :meth:`amend`."""
        noted, note = self._noted, self._noted.append

        def move(buffers: Sequence[memoryview], offset: int) -> int | None:
            if not noted:
                self._began = now()
            try:
                done = call(buffers, offset)
            except BaseException as error:
                length = sum(map(len, buffers))
                self._note_alone(operation, offset, length, status_of(error))
                raise
            length = sum(map(len, buffers)) if done is None else done
            note((now(), length, offset, operation))
            return done

        return move

    def amend(self, operation: int, length: int) -> None:
        """Put what is noted, the last one as it counts: in part, or not at all.

        Args:
            operation: of one that was done in part.
            length: of the whole.
        """
        if operation == READ or not self._sink.has_data:
            done = self._noted[-1][1]
            if self._only_whole or not isinstance(done, int) or not 0 < done < length:
                self._noted.pop()
        self.put()

    def writing(self, call: Move) -> Move:
        """Return ``call``, whose writes are noted.

        Of a trace with data it gets a copy, so that it writes what is noted: the guest may change
        its pages meanwhile.
        """
        if not self._sink.has_data:
            return self.reading(call, WRITE)
        noted, note = self._noted, self._noted.append
        has_claims = self._claims is not None

        def move(buffers: Sequence[memoryview], offset: int) -> int | None:
            length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
            if self._used + length > self._room:
                if length > CHUNK:
                    return self._write_large(call, buffers, offset, length)
                if not self._make_room():
                    return call(buffers, offset)
            if has_claims and not self._claim(offset, length):
                return 0  # whoever does the request then waits for the other
            at = to = self._used
            if len(buffers) == 1:
                to += length
                data = self._memory[at:to]
                data[:] = buffers[0]
            else:
                for buffer in buffers:
                    begin, to = to, to + len(buffer)
                    self._memory[begin:to] = buffer
                data = self._memory[at:to]
            if not noted:
                self._began = now()
            try:
                done = call((data,), offset)
            except BaseException as error:
                self._note_alone(WRITE, offset, length, status_of(error), data)
                raise
            if done is None or done == length:
                self._used = to
                note((now(), length, offset, WRITE))
            elif not self._only_whole and isinstance(done, int) and 0 < done < length:
                self._note_alone(WRITE, offset, done, data=data)
            return done

        return move

    def _write_large(
        self, call: Move, buffers: Sequence[memoryview], offset: int, length: int
    ) -> int | None:
        """Write what fits into no chunk, and note that by itself."""
        if self._claims is not None and not self._claim(offset, length):
            return 0
        data = memoryview(b"".join(buffers))
        if not self._noted:
            self._began = now()
        try:
            done = call((data,), offset)
        except BaseException as error:
            self._note_alone(WRITE, offset, length, status_of(error), data)
            raise
        if done is None or done == length or (done > 0 and not self._only_whole):
            self._note_alone(WRITE, offset, length if done is None else done, data=data)
        return done

    def _claim(self, offset: int, length: int) -> bool:
        """Claim an extent until :meth:`put`; False: a part of it is another's."""
        assert self._claims is not None
        claim, mine = self._claims.owners.setdefault, self._mine
        for place in range(offset >> GRAIN, (offset + length - 1 >> GRAIN) + 1):
            if claim(place, mine) is not mine:
                return False
            mine.add(place)
        return True

    def put(self) -> None:
        """Hand on what is noted. If that cannot be, the recording ends: it never has a hole."""
        if self._noted:
            self._hand_on()
        if self._mine:
            claims = self._claims
            assert claims is not None
            for place in self._mine:
                del claims.owners[place]
            self._mine.clear()
            if claims.waiting:
                claims.tell()

    def _hand_on(self) -> None:
        chunk, start, end = self._chunk, self._start, self._used
        data = (chunk, start, end) if chunk is not None and end > start else None
        try:
            self._sink.put_batch(self._began, self._noted, data, self._queue)
        except Exception as error:  # noqa: BLE001 - the guest's request was done, and is answered
            self._sink.end(f"requests could not be noted ({error!r})")
        finally:
            self._noted.clear()
            self._start = self._used

    def _note_alone(
        self,
        operation: int,
        offset: int,
        length: int,
        status: int = 0,
        data: memoryview | None = None,
    ) -> None:
        """Note a request that failed, or was done in part: ``length`` bytes of it."""
        sink, began = self._sink, self._noted[-1][0] if self._noted else self._began
        took = now() - began
        if self._noted:
            self._hand_on()
        if data is not None:
            sink.wrote(began, took, offset, bytes(data[:length]), status, self._queue)
        else:
            at = began - sink.clock
            sink.note((at, took, offset, length, 0, status, self._queue, operation))

    def _make_room(self) -> bool:
        """Have memory for copies; False if nothing is recorded any longer."""
        if self._noted:
            self._hand_on()
        chunk, self._chunk = self._chunk, None
        self._chunk = self._sink.exchange(chunk)
        self._memory = memoryview(b"") if self._chunk is None else self._chunk.memory
        self._start = self._used = 0
        self._room = len(self._memory)
        return self._chunk is not None

    def __del__(self) -> None:
        if self._chunk is not None:
            self._sink.give_back(self._chunk)
