"""Giving back the space of what a guest discards: holes in files, BLKDISCARD on devices."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from . import sharing
from .holes import punch_hole
from .image import Image, file_system

_BLKDISCARD = 0x1277  # linux/fs.h
_PUNCHING = {"btrfs", "ext4", "gfs2", "tmpfs", "xfs"}  # fallocate(2)
_CHUNK = 1 << 30  # a device may take long; nothing can interrupt one request to it


class Trim:
    """Discards in an open image.

    Attributes:
        supported: whether the file system or the device can; asked once.
        granularity: the smallest extent, in bytes, whose discard frees something.
        physical_sector_size: what the storage likes best, in bytes; None if unknown.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.supported = False
        self.granularity = 4096
        self.physical_sector_size: int | None = None
        step = image.sector_size
        is_writable = not image.read_only or sharing.is_looking()
        if image.is_block_device:
            physical = queue_attribute(image.fd, "physical_block_size")
            self.physical_sector_size = max(physical, image.sector_size)
            self.granularity = _rounded_up(queue_attribute(image.fd, "discard_granularity"), step)
            limit = queue_attribute(image.fd, "discard_max_bytes")
            self.supported = limit > 0 and is_writable
        elif is_writable:
            self.granularity = _rounded_up(os.fstat(image.fd).st_blksize, step)
            self.supported = can_punch(image.fd)

    def discard(self, offset: int, length: int) -> None:
        """Free ``length`` bytes at ``offset``; on a device, the whole sectors of it in there.

        Raises:
            OSError: ``EOPNOTSUPP``, this storage cannot; or its own.
        """
        if not self.supported:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if not self._image.is_block_device:
            punch_hole(self._image.fd, offset, length)
            return
        step = self._image.device_sector_size  # the device takes nothing less (EINVAL)
        first, end = -(-offset // step) * step, (offset + length) // step * step
        for start in range(first, end, _CHUNK):
            extent = struct.pack("QQ", start, min(_CHUNK, end - start))
            fcntl.ioctl(self._image.fd, _BLKDISCARD, extent)


def can_punch(fd: int) -> bool:
    """Ask the file system of an open file whether it makes holes; the file stays as it is.

    The question goes to a file without a name in the same directory: even where nothing is, a hole
    gives a file another time of modification (Linux 6.18), by which overlays know their image.
    """
    directory = os.path.dirname(os.readlink(f"/proc/self/fd/{fd}"))
    try:
        other = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # not every file system knows such files
        return _punches_itself(fd)
    try:
        if os.fstat(other).st_dev != os.fstat(fd).st_dev:  # the file is mounted there
            return _punches_itself(fd)
        return _punches(other, 0)
    finally:
        os.close(other)


def _punches_itself(fd: int) -> bool:
    if sharing.is_looking():
        return file_system(fd) in _PUNCHING
    return _punches(fd, os.fstat(fd).st_size)


def _punches(fd: int, end: int) -> bool:
    try:
        punch_hole(fd, end, 4096)
    except OSError:
        return False
    return True


def queue_attribute(fd: int, name: str) -> int:
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
