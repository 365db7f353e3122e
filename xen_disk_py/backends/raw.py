"""``raw``: an image file or block device, read and written in place.

Data goes straight between the image and the guest's pages, through the page cache: one
``preadv``, ``pwritev`` or ``pwrite`` a request, unless the kernel does only a part at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import Backend
from .image import IOV_MAX, Image
from .sharing import Storage
from .trim import Trim


class RawBackend(Backend):
    """An image, persistent.

    A discard makes a hole in a file, whose disk space is free again: zeros are read there, unless
    the file system has done nothing though it says so (ext4 of Linux 5.18 to 6.15, beyond 4 TiB).
    On a block device it is passed on, in whole sectors of the device; what is read afterwards is
    up to the device.

    Args:
        path: the image; locked for us alone, or shared with other readers if ``read_only``.
        read_only: open it for reading only.
        sector_size: the logical sector in bytes; by default the device's own, 512 for a file. One
            that is smaller than the device's own is served from the page cache, which reads the
            rest of the device's sector before it writes it.
    """

    threads = 16
    survives = True
    shared_by_forks = True

    def __init__(
        self, path: str, *, read_only: bool = False, sector_size: int | None = None
    ) -> None:
        self._image = image = Image.open(path, writable=not read_only, sector_size=sector_size)
        self._fd, self._nowait = image.fd, image.nowait
        self.path = image.path
        self.size = image.size
        self.sector_size = image.sector_size
        self.read_only = read_only
        self._trim = trim = Trim(image)
        self.discard_granularity = trim.granularity
        self.physical_sector_size = trim.physical_sector_size or self.physical_sector_size

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read with ``preadv``."""
        return self._image.read(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is in the page cache."""
        if self._nowait is None:
            return 0
        try:  # as the image does, whose call would cost a tenth of all
            return os.preadv(self._fd, buffers, offset, self._nowait)
        except BlockingIOError:
            return 0
        except OSError:  # more buffers than fit into one call
            return self._image.read_nowait(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write with ``pwritev``: into the page cache, where ``flush`` takes it from."""
        if len(buffers) == 1:  # most requests; it takes a tenth less
            return os.pwrite(self._fd, buffers[0], offset)
        if len(buffers) <= IOV_MAX:
            return os.pwritev(self._fd, buffers, offset)
        return self._image.write(buffers, offset)

    write_nowait = write

    def flush(self) -> None:
        """``fdatasync``."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Free the space; see the class for what is read there afterwards."""
        self._trim.discard(offset, length)

    @property
    def can_discard(self) -> bool:
        """Whether the file system or the device can; asked when the image was opened."""
        return self._trim.supported

    def resize(self, size: int | None) -> int:
        """Make a file longer or shorter; see :meth:`Image.resize`."""
        if size is None:
            return self._image.measure()
        self._image.resize(size)
        self.size = size
        return size

    def after_fork(self) -> None:
        """Open the image once more; see :meth:`Image.reopen`."""
        self._image.reopen()
        self._fd = self._image.fd

    @property
    def host_storage(self) -> Sequence[Storage]:
        """The image."""
        return [self._image.storage]

    def close(self) -> None:
        """Close and unlock the image."""
        self._fd = -1
        self._image.close()
