"""One disk: judges a request, has the backend do it, answers with a status.

Whatever a guest asks for that the disk does not have, and whatever goes wrong in a backend,
ends here as a status for the guest and a line in the log. The backend sees only requests
that lie inside it, are aligned to its sectors and are allowed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Callable

from . import statistics as count
from .backends import Backend
from .backends.loader import user_line
from .blkif import (
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    OKAY,
    READ,
    SECTOR,
    SECTORS_PER_PAGE,
    Discard,
    Features,
    Transfer,
)
from .statistics import Statistics

log = logging.getLogger("xen_disk_py")


class Disk:
    """A backend as the guest may use it.

    Args:
        backend: open and checked; only :meth:`close` closes it.
        statistics: where to count.
    """

    def __init__(self, backend: Backend, statistics: Statistics | None = None) -> None:
        self.backend = backend
        self.statistics = statistics if statistics is not None else Statistics()
        self.read_only = backend.read_only
        self.sectors = backend.size // SECTOR
        self._alignment = backend.sector_size // SECTOR
        self._quiet_until = 0.0
        self._unsaid = 0

    def features(self, max_indirect_segments: int, max_ring_page_order: int) -> Features:
        """Describe the disk to a frontend."""
        backend = self.backend
        return Features(
            sectors=self.sectors,
            sector_size=backend.sector_size,
            physical_sector_size=backend.physical_sector_size,
            read_only=self.read_only,
            discard=backend.can_discard and not self.read_only,
            discard_granularity=max(backend.discard_granularity, backend.sector_size),
            max_indirect_segments=max_indirect_segments,
            max_ring_page_order=max_ring_page_order,
        )

    def refusal(self, request: Transfer) -> str | None:
        """Say why ``request`` must not reach the backend; None if it may."""
        if not request.sectors:
            return None  # a flush alone; Linux gives it sector 2**64 - 1, which means nothing
        if request.sector + request.sectors > self.sectors:
            return (
                f"sectors {request.sector} to {request.sector + request.sectors} of {self.sectors}"
            )
        if self.read_only and request.operation != READ:
            return "write to a read-only disk"
        step = self._alignment
        if step > 1 and (
            request.sector % step
            or any(first % step for first in request.firsts)
            or any((last + 1) % step for last in request.lasts)
        ):
            return f"sector {request.sector} or a segment is not aligned to {step * SECTOR} bytes"
        return None

    def refuse(self, reason: str, status: int = ERROR) -> int:
        """Count and log a request that is answered without the backend."""
        self.statistics.add(count.REFUSED)
        self._say(logging.WARNING, f"refused a request of the guest: {reason}")
        return status

    def transfer(self, request: Transfer, pages: Sequence[memoryview]) -> int:
        """Do a read, write or flush that :meth:`refusal` let pass; each page has 4096 bytes."""
        buffers = _segments(request, pages)
        length = request.sectors * SECTOR
        offset = request.sector * SECTOR
        words = self.statistics.words
        if request.operation == READ:
            words[count.READS] += 1
            words[count.BYTES_READ] += length
            return self._attempt("read", lambda: self.backend.read(buffers, offset), length)
        if request.operation == FLUSH:
            words[count.FLUSHES] += 1
            status = self._attempt("flush", self.backend.flush)
            if status != OKAY or not length:
                return status
        words[count.WRITES] += 1
        words[count.BYTES_WRITTEN] += length
        status = self._attempt("write", lambda: self.backend.write(buffers, offset), length)
        self._count_memory()
        if status == OKAY and request.operation == FLUSH:
            status = self._attempt("flush", self.backend.flush)
        return status

    def discard(self, request: Discard) -> int:
        """Do a discard, or refuse it."""
        backend = self.backend
        if self.read_only:
            return self.refuse("discard on a read-only disk")
        if request.secure or not backend.can_discard:
            return self.refuse("discard that is not offered", EOPNOTSUPP)
        if request.sector + request.sectors > self.sectors:
            return self.refuse("discard beyond the end")
        if request.sector % self._alignment or request.sectors % self._alignment:
            return self.refuse("discard not aligned to the sector size")
        length = request.sectors * SECTOR
        self.statistics.add(count.DISCARDS)
        self.statistics.add(count.BYTES_DISCARDED, length)
        status = self._attempt("discard", lambda: backend.discard(request.sector * SECTOR, length))
        self._count_memory()
        return status

    def _count_memory(self) -> None:
        try:
            self.statistics.words[count.MEMORY] = self.backend.memory
        except Exception as error:  # noqa: BLE001 - it may be an author's own property
            self._say(logging.ERROR, f"memory of {self.backend}: {user_line(error, self.backend)}")

    def _attempt(self, what: str, call: Callable[[], int | None], length: int | None = None) -> int:
        try:
            done = call()
        except BaseException as error:  # noqa: BLE001 - whatever an author's code raises, exit() too
            reason = user_line(error, self.backend)
        else:
            if length is None or done is None or done == length:
                return OKAY
            reason = f"{done} of {length} bytes"
        self.statistics.add(count.ERRORS)
        self._say(logging.ERROR, f"{what} failed in {self.backend}: {reason}")
        return ERROR

    def _say(self, level: int, text: str) -> None:
        """Log, but not more than once a second: the guest decides how often this is called."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} lines like it before)" if self._unsaid else ""
        self._quiet_until, self._unsaid = now + 1, 0
        log.log(level, "%s%s", text, more)

    def close(self) -> None:
        """Close the backend; what goes wrong there is logged."""
        try:
            self.backend.close()
        except Exception as error:  # noqa: BLE001 - an author's code must not stop our clean-up
            log.error("close failed in %s: %s", self.backend, user_line(error, self.backend))


def _segments(request: Transfer, pages: Sequence[memoryview]) -> list[memoryview]:
    """Cut each page down to its segment's sectors."""
    if request.sectors == len(pages) * SECTORS_PER_PAGE:
        return list(pages)
    return [
        page[first * SECTOR : (last + 1) * SECTOR]
        for page, first, last in zip(pages, request.firsts, request.lasts)
    ]
