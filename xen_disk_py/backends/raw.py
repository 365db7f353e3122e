"""``raw``: an image file or block device, read and written in place.

Data goes straight between the image and the guest's pages, through the page cache: one
``preadv`` or ``pwritev`` a request, unless the kernel does only a part at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence

from . import Backend
from .image import Image

_FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 0x02
_BLKDISCARD = 0x1277  # linux/fs.h
_DISCARD_CHUNK = 1 << 30  # a device may take long; nothing can interrupt one request to it

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate  # musl has one name only
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


class RawBackend(Backend):
    """An image, persistent.

    A discard makes a hole in a file, whose disk space is free again: zeros are read there.
    On a block device it is passed on; what is read afterwards is up to the device.

    Args:
        path: the image; locked for us alone, or shared with other readers if ``read_only``.
        read_only: open it for reading only.
        sector_size: the logical sector in bytes; by default the device's own, 512 for a file.
    """

    threads = 16
    survives = True

    def __init__(
        self, path: str, *, read_only: bool = False, sector_size: int | None = None
    ) -> None:
        self._image = image = Image.open(path, writable=not read_only, sector_size=sector_size)
        self._fd = image.fd
        self.path = image.path
        self.size = image.size
        self.sector_size = image.sector_size
        self.read_only = read_only
        self._discard: Callable[[int, int], None] | None = None
        if image.is_block_device:
            limit = _queue_attribute(image.fd, "discard_max_bytes")
            physical = _queue_attribute(image.fd, "physical_block_size")
            self.physical_sector_size = max(physical, image.sector_size)
            granularity = _queue_attribute(image.fd, "discard_granularity")
            self.discard_granularity = _rounded_up(granularity, image.sector_size)
            if limit and not read_only:
                self._discard = self._discard_device
        elif not read_only:
            self.discard_granularity = _rounded_up(os.fstat(image.fd).st_blksize, image.sector_size)
            try:
                punch_hole(image.fd, image.size, 4096)  # nothing is there: a harmless question
            except OSError:
                pass
            else:
                self._discard = self._discard_file

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read with ``preadv``."""
        return self._image.read(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is in the page cache."""
        return self._image.read_nowait(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write with ``pwritev``: into the page cache, where ``flush`` takes it from."""
        return self._image.write(buffers, offset)

    write_nowait = write

    def flush(self) -> None:
        """``fdatasync``."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Free the space; see the class for what is read there afterwards."""
        if self._discard is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._discard(offset, length)

    @property
    def can_discard(self) -> bool:
        """Whether the file system or the device can; asked when the image was opened."""
        return self._discard is not None

    def _discard_file(self, offset: int, length: int) -> None:
        punch_hole(self._fd, offset, length)

    def _discard_device(self, offset: int, length: int) -> None:
        for start in range(offset, offset + length, _DISCARD_CHUNK):
            chunk = min(_DISCARD_CHUNK, offset + length - start)
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", start, chunk))

    def resize(self, size: int | None) -> int:
        """Make a file longer or shorter; see :meth:`Image.resize`."""
        if size is None:
            return self._image.measure()
        self._image.resize(size)
        self.size = size
        return size

    def close(self) -> None:
        """Close and unlock the image."""
        self._fd = -1
        self._image.close()


def _queue_attribute(fd: int, name: str) -> int:
    """Read a number from the device's request queue in sysfs; 0 if it has none."""
    device = os.fstat(fd).st_rdev
    directory = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{directory}/queue", f"{directory}/../queue"):  # a partition's is its disk's
        try:
            with open(f"{queue}/{name}", encoding="ascii") as attribute:
                return int(attribute.read())
        except OSError:
            continue
    return 0


def _rounded_up(number: int, step: int) -> int:
    """Return the positive multiple of ``step`` that is nearest above, or ``number`` itself."""
    return max(1, -(-number // step)) * step


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the disk space of a part of a file back: zeros are read there (fallocate(2)).

    Raises:
        OSError: the file system cannot do that, or fails.
    """
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
