"""``cow``: copy-on-write. What the guest writes lives in memory and ends with the connection.

The image is opened for reading only and mapped privately: the kernel copies a page when it is
first written. What is not written is read from the file. Many such disks can share one image.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Sequence

from ..errors import UsageError
from ..units import format_size
from . import Backend
from .image import IOV_MAX, PAGE, Image, MappedImage, transfer_all

log = logging.getLogger("xen_disk_py")

_ANONYMOUS = (
    mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
)  # no memory is set aside for it
_DISCARD_PAGES = 4096  # looked at in one go: their bytes in the dirty map are a page or two


class CowBackend(Backend):
    """A throw-away copy of an image that is never changed.

    Memory is counted by pages really written (4096 bytes each on x86) and bounded. A write
    that would go beyond the bound fails whole, as a full disk (``ENOSPC``); pages that were
    written before can always be written again.

    A discard gives the pages that lie wholly inside it back to the system: the *image's own*
    content is read there afterwards, not zeros. What it covers of other pages stays as it is.

    Args:
        path: the image; its lock is shared: other readers may come, a writer may not.
        cow_limit: the bound in bytes; by default half of the memory that is available
            (``MemAvailable``) when the disk is opened.
    """

    discard_granularity = PAGE

    def __init__(self, path: str, *, cow_limit: int | None = None) -> None:
        if cow_limit is None:
            cow_limit = _available_memory() // 2
        elif cow_limit < 0:
            raise UsageError(f"--cow-limit: {cow_limit} bytes is less than nothing")
        self._image = image = Image.open(path, writable=False)
        self._pages = -(-image.size // PAGE)
        try:
            self._dirty = mmap.mmap(-1, self._pages, flags=_ANONYMOUS)  # one byte a page: 0 or 1
            self._mapped = MappedImage(image, private=True)
        except BaseException:
            image.close()
            raise
        self._fd = image.fd
        self.path = image.path
        self.size = image.size
        self.sector_size = image.sector_size
        self.cow_limit = cow_limit
        self._used = 0  # pages
        self._warned = False

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read from the image what is not written yet, from the mapping what is."""
        length = sum(map(len, buffers))
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        if self._dirty.find(b"\1", first, last) >= 0:
            self._mapped.fault_in(offset, length, write=False)
            self._mapped.copy_out(buffers, offset)
        elif len(buffers) > IOV_MAX or os.preadv(self._fd, buffers, offset) != length:
            return transfer_all(os.preadv, self._fd, buffers, offset)
        return length

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Copy into the mapping, if the bound allows."""
        end = offset + sum(map(len, buffers))
        first, last = offset // PAGE, -(-end // PAGE)
        fresh = self._dirty[first:last].count(0)
        if fresh:
            if (self._used + fresh) * PAGE > self.cow_limit:
                self._refuse()
            self._used += fresh
            self._dirty[first:last] = b"\1" * (last - first)
            self._mapped.fault_in(offset, end - offset, write=True)
        self._mapped.copy_in(buffers, offset)

    def _refuse(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%s: the guest's changes fill the %s of memory that they may take: writes fail "
                "from now on; connect with a larger --cow-limit",
                self.path,
                format_size(self.cow_limit),
            )
        raise OSError(errno.ENOSPC, f"copy-on-write memory is full ({format_size(self.cow_limit)})")

    def discard(self, offset: int, length: int) -> None:
        """Give memory back; the image's own content is read there afterwards."""
        end = offset + length
        last = self._pages if end == self.size else end // PAGE
        for first in range(-(-offset // PAGE), last, _DISCARD_PAGES):
            if not self._used:
                return
            stop = min(first + _DISCARD_PAGES, last)
            dirty = self._dirty[first:stop].count(1)
            if dirty:
                self._mapped.memory.madvise(mmap.MADV_DONTNEED, first * PAGE, (stop - first) * PAGE)
                self._dirty[first:stop] = bytes(stop - first)
                self._used -= dirty

    @property
    def memory(self) -> int:
        """Bytes of the pages that were written."""
        return self._used * PAGE

    def close(self) -> None:
        """Forget every change."""
        self._mapped.close()
        self._dirty.close()
        self._fd = -1
        self._image.close()


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(errno.ENOENT, "/proc/meminfo has no MemAvailable")
