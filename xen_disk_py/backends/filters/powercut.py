"""``powercut``: a disk with a volatile write cache, whose power fails when it is told to.

``--filter powercut`` keeps what is written in memory until the guest flushes, as a drive's cache
does. At ``xen-disk filter VM VDEV cut``, or at the Nth flush (``flush=N``), the power fails: each
write since the last flush is kept, lost, or torn (some of its sectors are kept), in an order of its
own, as ``seed`` draws it. What is left then is in the source, and every request fails from then on.

The same requests, and the same seed, leave the same bytes. A sector holds what the last flush
covered, or what was written there since; never anything else.

A process that is killed loses what no flush has covered, so nobody takes such a disk over. When the
disk is disconnected, all is written first, as of a drive that is shut down.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
from collections.abc import Sequence
from typing import ClassVar

from ...errors import UsageError
from .. import Backend
from ..filter import Filter, do_all

log = logging.getLogger("xen_disk_py")

_OVERHEAD = 160  # bytes of memory that a sector costs beside its content, about


class Powercut(Filter):
    """Keeps writes in memory until a flush, and loses some when the power fails.

    Args:
        source: the disk below.
        seed: draws the same losses again.
        flush: the power fails at this flush, counted from 1, in its place; 0: at none.
        limit: bytes of memory for what is not flushed; the oldest goes to the source beyond that,
            as a drive's cache writes whenever it likes.
        cut: the power has failed.
    """

    actions: ClassVar = {"cut": {"cut": "yes"}}
    threads = 1
    survives = False

    def __init__(
        self,
        source: Backend,
        *,
        seed: int = 0,
        flush: int = 0,
        limit: int = 64 << 20,
        cut: bool = False,
    ) -> None:
        super().__init__(source)
        self._lock = threading.Lock()
        self._writes: dict[int, tuple[int, bytes]] = {}  # in their order, by number
        self._latest: dict[int, int] = {}  # the write that a sector was last written by
        self._number = self._bytes = 0
        self._is_cut = False
        self._kept = self._lost = self._flushes = 0
        self.configure(seed=seed, flush=flush, limit=limit, cut=cut)

    def configure(self, *, seed: int, flush: int, limit: int, cut: bool) -> None:
        """Fail at that flush, counted from now on, or at once."""
        if flush < 0 or limit < 1:
            raise UsageError(
                f"--filter powercut: flush={flush},limit={limit}: flush is 0 or more; with a limit "
                "of 0 no write would be kept"
            )
        with self._lock:
            if self._is_cut and not cut:
                raise UsageError("the power does not come back: connect the disk again")
            self._seed, self._limit = seed, limit
            self._cut_at = self._flushes + flush if flush else 0
            if cut and not self._is_cut:
                self._cut()

    def counters(self) -> dict[str, int]:
        """Bytes that no flush has covered; flushes; sectors that the cut has kept and lost."""
        return {
            "unflushed": self._bytes,
            "flushes": self._flushes,
            "kept": self._kept,
            "lost": self._lost,
        }

    @property
    def memory(self) -> int:
        """The source's, and what is not flushed."""
        return self.source.memory + self._bytes + _OVERHEAD * len(self._latest)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, what is not flushed included."""
        with self._lock:
            self._check()
            done = do_all(self.source.read, buffers, offset)
            if self._latest:
                self._put(buffers, offset)
            return done

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Remember a write; make room before that, if there are too many."""
        content = b"".join(buffers)
        with self._lock:
            self._check()
            while self._writes and self._cost() + len(content) > self._limit:
                self._write_oldest()
            self._number += 1
            self._writes[self._number] = offset, content
            self._bytes += len(content)
            size = self.source.sector_size
            for sector in range(offset // size, (offset + len(content)) // size):
                self._latest[sector] = self._number
            return len(content)

    def flush(self) -> None:
        """Write all that was remembered, and flush that; or have the power fail."""
        with self._lock:
            self._check()
            self._flushes += 1
            if self._flushes == self._cut_at:
                self._cut()
                self._check()
            self._write_all()
            self.source.flush()

    def discard(self, offset: int, length: int) -> None:
        """Discard behind all that was written before."""
        with self._lock:
            self._check()
            self._write_all()
            self.source.discard(offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard behind all that was written before."""
        with self._lock:
            self._check()
            self._write_all()
            self.source.discard_securely(offset, length)

    def resize(self, size: int | None) -> int:
        """As the source does, when all is written."""
        with self._lock:
            if size is not None:
                self._check()
                self._write_all()
            return super().resize(size)

    def close(self) -> None:
        """Write what is left, and close the source."""
        try:
            with self._lock:
                if self._writes and not self._is_cut:
                    self._write_all()
                    self.source.flush()
        finally:
            super().close()

    def _check(self) -> None:
        if self._is_cut:
            raise OSError(errno.ENODEV, "the power was cut (the powercut filter)")

    def _cost(self) -> int:
        return self._bytes + _OVERHEAD * len(self._latest)

    def _put(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Put what is not flushed over what the source has."""
        size = self.source.sector_size
        for buffer in buffers:
            for at in range(0, len(buffer), size):
                number = self._latest.get((offset + at) // size)
                if number is not None:
                    start, content = self._writes[number]
                    place = offset + at - start
                    buffer[at : at + size] = content[place : place + size]
            offset += len(buffer)

    def _write_all(self) -> None:
        while self._writes:
            self._write_oldest()

    def _write_oldest(self) -> None:
        number = next(iter(self._writes))
        offset, content = self._writes[number]
        self._store(offset, content)
        del self._writes[number]
        self._bytes -= len(content)
        size = self.source.sector_size
        for sector in range(offset // size, (offset + len(content)) // size):
            if self._latest.get(sector) == number:
                del self._latest[sector]

    def _store(self, offset: int, content: bytes) -> None:
        if do_all(self.source.write, [memoryview(content)], offset) != len(content):
            raise OSError(errno.EIO, "the disk below did not take all of a write")

    def _cut(self) -> None:
        """Leave in the source what a power failure would; never raises."""
        self._is_cut = True
        dice = random.Random(self._seed)
        size = self.source.sector_size
        writes = list(self._writes.values())
        dice.shuffle(writes)
        try:
            for offset, content in writes:
                share = dice.choice((0.0, 0.5, 1.0))
                for at in range(0, len(content), size):
                    if dice.random() < share:
                        self._store(offset + at, content[at : at + size])
                        self._kept += 1
                    else:
                        self._lost += 1
            self.source.flush()
        except Exception:
            log.exception("powercut: the disk below failed while the power did")
        log.warning(
            "the power was cut: of the sectors that no flush had covered, %d kept, %d lost",
            self._kept,
            self._lost,
        )
        self._writes, self._latest, self._bytes = {}, {}, 0
