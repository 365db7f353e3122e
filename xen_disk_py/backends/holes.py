"""Holes in files: making one, finding them, and zeros wherever none can be made."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import suppress

from .image import transfer_all

_FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 0x02
_PIECE = 1 << 20  # bytes of zeros that are written at once

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate  # musl has one name only
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the disk space of a part of a file back: zeros are read there (fallocate(2)).

    Raises:
        OSError: the file system cannot do that, or fails.
    """
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def data_extents(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Name the parts from ``start`` to ``stop`` of a file that are no holes: from, to, in bytes."""
    while start < stop:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), stop)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno != errno.EINVAL:
                raise
            end = stop  # a block device has no holes
        if start < end:
            yield start, end
        start = end


def put_zeros(fd: int, offset: int, length: int) -> None:
    """Have zeros be read in a part of a file: a hole if one can be made, else they are written.

    A hole is looked for, not only asked for: beyond 4 TiB, or 16 GiB if its blocks have 1 KiB, ext4
    of some kernels (Linux 5.18 to 6.15) says that it has made one, and has changed nothing
    (findings/ext4-punch-does-nothing.sh).

    Raises:
        OSError: they cannot be written.
    """
    with suppress(OSError):  # not every file system can
        punch_hole(fd, offset, length)
    for start, stop in data_extents(fd, offset, offset + length):
        for at in range(start, stop, _PIECE):
            zeros = memoryview(bytes(min(_PIECE, stop - at)))
            transfer_all(os.pwritev, fd, [zeros], at)
