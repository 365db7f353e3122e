"""What a flush may answer, when the last one failed.

Linux tells of a write-back error once for each open file, and marks the pages clean that it could
not write: the next ``fdatasync`` succeeds, and the data is gone. So a flush that failed is not
asked again as if nothing had happened:

* By default the disk remembers. Every later flush fails, of whatever queue or thread, and of the
  process that takes the disk over: the record says so. QEMU's file driver does the same, and
  PostgreSQL ends itself.
* A disk that retries (``--on-error hold``) keeps copies of what was written since the last good
  flush. After a failed one it writes them again, and flushes that; until then nobody reads there,
  for the page cache may have dropped it. Copies die with the process: a successor has none, and
  does as above.

One flush is under way at a time, since the error is told to one of several. Where several processes
serve a disk, that holds for all of them together, and each looks before each write whether a flush
has failed in another.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import MutableSequence, Sequence
from contextlib import AbstractContextManager
from typing import Any, Callable, Optional, cast

from ..backends import Backend, StorageError, passing
from ..backends.copies import Copies, Piece, cut
from ..host.atomic import load_fence
from ..host.shared_lock import SharedLock
from ..synchronizing import HAS_GIL
from .statistics import Statistics

COPIES = 64 << 20
"""Bytes of copies that are kept; when there are as many, the disk is flushed before more is
written."""

Move = Callable[["Sequence[memoryview]", int], Optional[int]]

_LOST = (
    "an earlier flush failed, and what was written before it may be lost: no flush and no write "
    "succeeds until the disk is connected anew"
)


class FlushFailed(OSError):
    """An earlier flush failed, and what it was for may be lost."""


def passes(error: BaseException) -> bool:
    """Tell whether the storage may be able to do later what failed with ``error``."""
    return not isinstance(error, FlushFailed) and passing.passes(error)


class Durability:
    """The flushes of one disk.

    Args:
        backend: open; whatever moves data does so through :meth:`reading` and :meth:`writing`.
        statistics: where it is noted that a flush has failed, for a successor.
        keeps: keep copies, to write them again.
    """

    def __init__(self, backend: Backend, statistics: Statistics, *, keeps: bool) -> None:
        self.statistics = statistics
        self.backend = backend
        self._flushing: AbstractContextManager[Any] = threading.Lock()
        self._flushes: MutableSequence[int] = [0, 0]  # started; the last that succeeded
        # Without the GIL nothing else orders what two threads do: see flush().
        self._fence: Callable[[], None] = _nothing if HAS_GIL else load_fence().barrier
        self._is_shared = False
        self._copies = _SharedCopies() if keeps and not backend.repeats_flush else None

    def share(self) -> None:
        """Do it together with the processes that are forked from now on; keeps no copies."""
        assert not self.keeps
        self._is_shared = True
        self._flushing = SharedLock()
        # Anonymous, and so shared with them.
        self._flushes = cast("MutableSequence[int]", memoryview(mmap.mmap(-1, 16)).cast("Q"))
        self._fence = load_fence().barrier

    @property
    def keeps(self) -> bool:
        """Whether it keeps copies, and so has writes wait for a flush."""
        return self._copies is not None

    def reading(self, move: Move) -> Move:
        """Wrap a way to read, so that it fails where the storage may have lost something."""
        copies = self._copies
        if copies is None:
            return move

        def read(buffers: Sequence[memoryview], offset: int) -> int | None:
            if copies.lost and copies.is_lost(offset, offset + sum(map(len, buffers))):
                raise StorageError(errno.EIO, "what was written here is not on the storage yet")
            return move(buffers, offset)

        return read

    def writing(self, move: Move, *, may_wait: bool) -> Move:
        """Wrap a way to write, so that what it writes is kept.

        Args:
            move: writes.
            may_wait: where it would have to wait for a flush, it does; else nothing is written.
        """
        copies = self._copies
        if copies is None:
            return self._unless_lost(move) if self._is_shared else move

        def write(buffers: Sequence[memoryview], offset: int) -> int | None:
            if copies.size >= COPIES:
                if not may_wait:
                    return 0
                self.flush()
            if not copies.enter(may_wait=may_wait):
                return 0
            try:
                moved = move(buffers, offset)
                copies.add(buffers, offset, moved)
            finally:
                copies.leave()
            return moved

        return write

    def _unless_lost(self, move: Move) -> Move:
        """Wrap a way to write, so that it fails when a flush has failed in any process."""
        failed, refuse = self.statistics.flush_failed_word, self.refuse

        def write(buffers: Sequence[memoryview], offset: int) -> int | None:
            return refuse(buffers, offset) if failed[0] else move(buffers, offset)

        return write

    def discarding(self, discard: Callable[[int, int], None], offset: int, length: int) -> None:
        """Discard an extent with ``discard``; what was written there must not come back."""
        copies = self._copies
        if copies is None:
            discard(offset, length)
            return
        copies.enter()
        try:
            discard(offset, length)
            copies.forget(offset, length)
        finally:
            copies.leave()

    @property
    def is_lost(self) -> bool:
        """Whether a flush has failed, and what was written before it cannot be written again."""
        copies = self._copies
        return self.statistics.flush_failed and not (copies and copies.are_all_there)

    def refuse(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write nothing, where that can never become durable."""
        raise FlushFailed(errno.EIO, _LOST)

    def flush(self) -> None:
        """Return when everything that was written before is on stable storage.

        Raises:
            FlushFailed: nobody can say that any longer.
            Exception: the backend's own, if it cannot be had now.
        """
        self._fence()  # what was written before is there before we look
        seen = self._flushes[0]
        with self._flushing:
            if self._flushes[1] > seen:
                return  # one that began after we asked was for us as well
            if self.is_lost:
                raise FlushFailed(errno.EIO, _LOST)
            copies = self._copies
            self._flushes[0] += 1
            self._fence()  # and whoever writes from now on sees that it has begun
            end = 0
            if copies is not None:
                copies.write_again(self.backend.write)
                end = copies.end
            try:
                self.backend.flush()
            except BaseException as error:
                if not self.backend.repeats_flush:
                    # Noted before anybody hears of it: nobody may take the next for a good one.
                    self.statistics.flush_failed = True
                    if copies is not None:
                        copies.lose(for_good=not passes(error))
                raise
            self._flushes[1] = self._flushes[0]
            if copies is not None:
                copies.flushed(end)
                self.statistics.flush_failed = False


def _nothing() -> None:
    """No fence: the GIL orders what threads do."""


class _SharedCopies:
    """What was written and not flushed, oldest first; several threads write.

    Attributes:
        lost: what a failed flush may have lost, the newest of each sector, until it is written
            again; in no order, no two overlap.
        are_all_there: nothing that was written before a flush failed is missing here.
    """

    def __init__(self) -> None:
        self.lost: list[Piece] = []
        self.are_all_there = False
        self._copies = Copies()
        self._changed = threading.Condition()
        self._writers = 0
        self._is_alone = False

    @property
    def size(self) -> int:
        """Bytes of all copies."""
        return self._copies.size

    @property
    def end(self) -> int:
        """The number that the next copy will have."""
        with self._changed:
            return self._copies.end

    def enter(self, *, may_wait: bool = True) -> bool:
        """Begin to write, once nothing is written again; False if that would take waiting."""
        with self._changed:
            while self._is_alone:
                if not may_wait:
                    return False
                self._changed.wait()
            self._writers += 1
            return True

    def leave(self) -> None:
        """End what :meth:`enter` began."""
        with self._changed:
            self._writers -= 1
            self._changed.notify_all()

    def add(self, buffers: Sequence[memoryview], offset: int, moved: int | None) -> None:
        """Copy what was written: ``moved`` bytes of ``buffers``, or all of them."""
        data = bytes(buffers[0]) if len(buffers) == 1 else b"".join(buffers)
        if moved is not None:
            data = data[: max(0, moved)]
        if data:
            with self._changed:
                self._copies.add(offset, data)
                self._found(offset, offset + len(data))

    def forget(self, offset: int, length: int) -> None:
        """Cut an extent out of all copies."""
        end = offset + length
        with self._changed:
            self._copies.forget(offset, length)
            self._found(offset, end)

    def _found(self, start: int, end: int) -> None:
        if self.lost:
            self.lost = [left for piece in self.lost for left in cut(piece, start, end)]

    def is_lost(self, start: int, end: int) -> bool:
        """Tell whether some of an extent is."""
        with self._changed:
            return any(at < end and at + len(data) > start for at, data in self.lost)

    def flushed(self, end: int) -> None:
        """Drop the copies before number ``end``."""
        with self._changed:
            self.are_all_there = False
            self._copies.flushed(end)

    def lose(self, *, for_good: bool) -> None:
        """Note that nothing of this may be on the storage."""
        with self._changed:
            self.are_all_there = not for_good
            self.lost = [] if for_good else list(self._copies.newest())

    def write_again(self, write: Move) -> None:
        """Write what was lost, while nobody else writes; what cannot be written stays lost."""
        if not self.lost:
            return
        with self._changed:
            while self._writers:
                self._changed.wait()
            self._is_alone = True
        try:
            while self.lost:
                offset, data = self.lost[-1]
                view, done = memoryview(data), 0
                while done < len(data):
                    moved = write([view[done:]], offset + done)
                    if moved is None:
                        break
                    if moved <= 0:
                        raise OSError(errno.EIO, f"{done} of {len(data)} bytes written again")
                    done += moved
                self.lost.pop()
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()
