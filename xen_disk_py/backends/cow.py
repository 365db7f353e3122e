"""``cow``: copy-on-write. What the guest writes lives in memory and ends with the connection.

The image is opened for reading only and mapped privately: the kernel copies a page when it is
first written. What is not written is read from the file. Many such disks can share one image.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Sequence

from ..errors import DeviceError, UsageError
from ..units import format_size
from . import Backend
from .image import PAGE, Image, MappedImage
from .sharing import Storage

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

    Whoever cuts the image short takes with it what the guest wrote beyond the new end: the system
    drops those pages of a mapping, changed or not. Requests there are I/O errors until the image
    is long enough again, and find its own content then.

    Args:
        path: the image; its lock is shared: other readers may come, a writer may not.
        cow_limit: the bound in bytes; by default half of the memory that is available
            (``MemAvailable``) when the disk is opened.
        sector_size: the logical sector in bytes; by default the device's own, 512 for a file.
    """

    threads = 16
    discard_granularity = PAGE

    def __init__(
        self, path: str, *, cow_limit: int | None = None, sector_size: int | None = None
    ) -> None:
        if cow_limit is None:
            cow_limit = available_memory() // 2
        elif cow_limit < 0:
            raise UsageError(f"--cow-limit: {cow_limit} bytes is less than nothing")
        self._image = image = Image.open(path, writable=False, sector_size=sector_size)
        self._pages = -(-image.size // PAGE)
        try:
            self._dirty = mmap.mmap(-1, self._pages, flags=_ANONYMOUS)  # one byte a page: 0 or 1
            self._mapped = MappedImage(image, private=True)
        except BaseException:
            image.close()
            raise
        self.path = image.path
        self.size = image.size
        self.sector_size = image.sector_size
        self.cow_limit = cow_limit
        self._used = 0  # pages
        self._lock = threading.Lock()
        self._warned = False

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read from the image what is not written yet, from the mapping what is."""
        if self._is_written(buffers, offset):
            return self._mapped.load(buffers, offset)
        return self._image.read(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is in memory: written by the guest, or in the page cache."""
        if self._is_written(buffers, offset):
            return self._mapped.load(buffers, offset)
        return self._image.read_nowait(buffers, offset)

    def _is_written(self, buffers: Sequence[memoryview], offset: int) -> bool:
        """Tell whether a page of this range was written."""
        end = offset + sum(map(len, buffers))
        return self._dirty.find(b"\1", offset // PAGE, -(-end // PAGE)) >= 0

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy into the mapping, if the bound allows."""
        end = offset + sum(map(len, buffers))
        first, last = offset // PAGE, -(-end // PAGE)
        with self._lock:
            fresh = self._dirty[first:last].count(0)
            if fresh:
                if (self._used + fresh) * PAGE > self.cow_limit:
                    self._refuse()
                self._used += fresh
                self._dirty[first:last] = b"\1" * (last - first)
            # Still locked: a discard in between would leave pages that nobody counts.
            return self._mapped.store(buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write: memory does not wait."""
        return self.write(buffers, offset)

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
            with self._lock:
                dirty = self._dirty[first:stop].count(1)
                if dirty:
                    start, length = first * PAGE, (stop - first) * PAGE
                    self._mapped.memory.madvise(mmap.MADV_DONTNEED, start, length)
                    self._dirty[first:stop] = bytes(stop - first)
                    self._used -= dirty

    def resize(self, size: int | None) -> int:
        """Refuse: what the guest wrote lies over the image as it was opened."""
        raise DeviceError(
            "a copy-on-write disk keeps its size: disconnect it, change its image (truncate -s "
            f"SIZE {self.path}), and connect it again; what the guest wrote is forgotten then"
        )

    @property
    def memory(self) -> int:
        """Bytes of the pages that were written."""
        return self._used * PAGE

    @property
    def storage(self) -> Sequence[Storage]:
        """The image."""
        return [self._image.storage]

    def close(self) -> None:
        """Forget every change."""
        self._mapped.close()
        self._dirty.close()
        self._image.close()


def available_memory() -> int:
    """Return how many bytes of memory the system could give (MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(errno.ENOENT, "/proc/meminfo has no MemAvailable")
