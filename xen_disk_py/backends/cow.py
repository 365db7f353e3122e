"""``cow``: copy-on-write. What the guest writes lives in memory and ends with the connection.

The image is opened for reading only. A page that is written is copied into memory of our own; what
is not written is read from the file, and never through a mapping of it: on tmpfs that would fill
the holes of the image. Many such disks can share one image.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Callable, Sequence

from ..errors import DeviceError, ImageError, UsageError
from ..host import memory
from ..synchronizing import HAS_GIL
from ..units import format_size
from . import Backend
from .image import PAGE, Image
from .sharing import Storage

log = logging.getLogger("xen_disk_py")

_ANONYMOUS = (
    mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
)  # no memory is set aside for it
_NOT = (b"\1", b"\0")  # by the byte of the dirty map, the other one
_DISCARD_PAGES = 4096  # looked at in one go: their bytes in the dirty map are a page or two

_Read = Callable[[Sequence[memoryview], int], int]


class CowBackend(Backend):
    """A throw-away copy of an image that is never changed.

    Memory is counted by pages really written (4096 bytes each on x86) and bounded, for each disk by
    ``cow_limit`` and for all together by what the host and our control group have left, which is
    looked at again as memory is taken. A write that would go beyond a bound fails whole, as a full
    disk (``ENOSPC``); pages that were written before can always be written again.

    A discard gives the pages that lie wholly inside it back to the system: the *image's own*
    content is read there afterwards, not zeros. What it covers of other pages stays as it is.

    Where somebody cuts the image short, requests for what is not written are I/O errors; what the
    guest has written stays.

    Args:
        path: the image; its lock is shared: other readers may come, a writer may not.
        cow_limit: the bound in bytes; by default half of what may be taken when the disk is opened.
        sector_size: the logical sector in bytes; by default the device's own, 512 for a file.
    """

    threads = 16
    discard_granularity = PAGE

    def __init__(
        self, path: str, *, cow_limit: int | None = None, sector_size: int | None = None
    ) -> None:
        if cow_limit is None:
            cow_limit = memory.room() // 2
        elif cow_limit < 0:
            raise UsageError(f"--cow-limit: {cow_limit} bytes is less than nothing")
        self._image = image = Image.open(path, writable=False, sector_size=sector_size)
        self._pages = -(-image.size // PAGE)
        try:
            self._dirty = _reserve(self._pages, image)  # one byte a page: 0 or 1
            self._copies = _reserve(self._pages * PAGE, image)
        except BaseException:
            image.close()
            raise
        # A huge page would be 512 pages of which one is counted.
        self._copies.madvise(mmap.MADV_NOHUGEPAGE)
        # Without a GIL threads may not slice one memoryview at once: its parts are miscounted.
        self._content = memoryview(self._copies) if HAS_GIL else self._copies
        self.path = image.path
        self.size = image.size
        self.sector_size = image.sector_size
        self.cow_limit = cow_limit
        self._budget = memory.Budget(memory.room)
        self._used = 0  # pages
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read from the image what is not written yet, from memory what is."""
        return self._read(buffers, offset, self._image.read)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is in memory: written by the guest, or in the page cache."""
        page = offset // PAGE
        if len(buffers) == 1 and offset + len(buffers[0]) <= (page + 1) * PAGE:  # most requests
            if self._dirty[page]:
                return self._load(buffers, offset)
            return self._image.read_nowait(buffers, offset)
        return self._read(buffers, offset, self._image.read_nowait)

    def _read(self, buffers: Sequence[memoryview], offset: int, read_image: _Read) -> int:
        end = offset + sum(map(len, buffers))
        first, last = offset // PAGE, -(-end // PAGE)
        is_written = self._dirty[first]
        if self._dirty.find(_NOT[is_written], first + 1, last) < 0:
            return self._load(buffers, offset) if is_written else read_image(buffers, offset)
        at, rest = offset, [*reversed(buffers)]
        while at < end:  # one extent after the other, of what is written or is not
            is_written = self._dirty[at // PAGE]
            stop = self._dirty.find(_NOT[is_written], at // PAGE, last)
            length = (end if stop < 0 else min(stop * PAGE, end)) - at
            part = _take(rest, length)
            done = self._load(part, at) if is_written else read_image(part, at)
            at += done
            if done < length:
                break
        return at - offset

    def _load(self, buffers: Sequence[memoryview], offset: int) -> int:
        at = offset
        for buffer in buffers:
            stop = at + len(buffer)
            buffer[:] = self._content[at:stop]
            at = stop
        return at - offset

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy into memory, if the bounds allow."""
        with self._lock:
            self._write(buffers, offset, self._image.read)
        return sum(map(len, buffers))

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy into memory, unless the rest of a page has to be read from storage first."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            done = self._write(buffers, offset, self._image.read_nowait)
        finally:
            self._lock.release()
        return done

    def _write(self, buffers: Sequence[memoryview], offset: int, read_image: _Read) -> int:
        """Write; return 0 if ``read_image`` cannot read what it has to (yet)."""
        end = offset + (len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers)))
        first, last = offset // PAGE, -(-end // PAGE)
        dirty = self._dirty
        fresh = dirty[first:last].count(0) if last - first > 1 else 1 - dirty[first]
        if fresh:
            if (self._used + fresh) * PAGE > self.cow_limit:
                self._refuse(
                    f"the {format_size(self.cow_limit)} of memory that they may take: writes fail "
                    "from now on; connect with a larger --cow-limit"
                )
            if not self._budget.take(fresh * PAGE):
                self._refuse("the memory that this host can spare: writes fail until there is more")
            cut = [first] if offset % PAGE else []
            if end % PAGE and end != self.size and last - 1 not in cut:
                cut.append(last - 1)
            for page in cut:
                if not dirty[page] and not self._fill(page, read_image):
                    return 0
        at = offset
        for buffer in buffers:
            stop = at + len(buffer)
            self._copies[at:stop] = buffer
            at = stop
        if fresh:  # only now: whoever reads meanwhile reads the image's
            dirty[first:last] = b"\1" * (last - first)
            self._used += fresh
        return at - offset

    def _fill(self, page: int, read_image: _Read) -> bool:
        """Copy a page of the image that is written in part; False if it cannot be read (yet)."""
        at, end = page * PAGE, min((page + 1) * PAGE, self.size)
        while at < end:
            with memoryview(self._copies) as copies, copies[at:end] as target:
                done = read_image([target], at)
            if not done:
                if read_image == self._image.read_nowait:
                    return False
                raise OSError(errno.EIO, f"the image ends at {at}: somebody made it shorter")
            at += done
        return True

    def _refuse(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s: the guest's changes fill %s", self.path, what)
        raise OSError(errno.ENOSPC, f"copy-on-write memory is full ({format_size(self.memory)})")

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
                    self._dirty[first:stop] = bytes(stop - first)
                    self._copies.madvise(mmap.MADV_DONTNEED, first * PAGE, (stop - first) * PAGE)
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
    def host_storage(self) -> Sequence[Storage]:
        """The image."""
        return [self._image.storage]

    def close(self) -> None:
        """Forget every change."""
        if isinstance(self._content, memoryview):
            self._content.release()
        self._copies.close()
        self._dirty.close()
        self._image.close()


def _reserve(length: int, image: Image) -> mmap.mmap:
    """Reserve addresses, not memory."""
    try:
        return mmap.mmap(-1, length, flags=_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"{image.path}: no address space for changes of {format_size(image.size)}: {reason} "
            "(vm.overcommit_memory=2 forbids it)"
        ) from error


def _take(reversed_buffers: list[memoryview], length: int) -> list[memoryview]:
    """Take ``length`` bytes from the front of what is left, whose last comes first."""
    parts = []
    while length:
        buffer = reversed_buffers.pop()
        if len(buffer) > length:
            reversed_buffers.append(buffer[length:])
            buffer = buffer[:length]
        parts.append(buffer)
        length -= len(buffer)
    return parts
