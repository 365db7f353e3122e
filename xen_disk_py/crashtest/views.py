"""A file that has one state after another, at the cost of what differs between them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from hashlib import blake2b

from ..backends.image import Image, transfer_all
from ..backends.overlay.maintenance import copy_extent
from ..hypervisor import Closing
from ..trace.powercut import ZEROS, Extent

_FICLONE = 0x40049409  # linux/fs.h
_CHUNK = 1 << 20


class View(Closing):
    """An image that a command may read and write, and what it is restored from.

    Both are files for their owner alone. Where the file system can, they are clones.

    Args:
        directory: where they are made, ours alone.
        name: of the image in it.
        base: what the disk was when recording began.
        trace: the open trace, where the data is.
        unit: bytes of a sector.

    Attributes:
        path: of the image.
        digest: of its content: the same for the same bytes, if ``base`` is the same.

    Raises:
        OSError: they cannot be made.
    """

    def __init__(self, directory: str, name: str, base: Image, trace: int, unit: int) -> None:
        self.path = os.path.join(directory, name)
        self.digest = 0
        self._trace = trace
        self._unit = unit
        self._size = base.size
        self._behind = 0  # the digest of what it is restored to
        self._changed: list[Extent] | None = None
        self._original = os.open(f"{self.path}.original", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._fd = -1
        try:
            _copy(base.fd, self._original, base.size)
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _copy(self._original, self._fd, self._size)

    def advance(self, extents: Iterable[Extent]) -> None:
        """Have it restored to something newer from now on."""
        found = list(extents)
        self._behind ^= self._put(self._original, found)
        self._put(self._fd, found)
        self.digest = self._behind

    def show(self, extents: Iterable[Extent]) -> None:
        """Write a state over what it is restored to."""
        self._changed = list(extents)
        self.digest = self._behind ^ self._put(self._fd, self._changed)
        os.utime(self._fd, ns=(0, 0))  # whoever writes it changes that, whatever the clock's steps

    def restore(self) -> None:
        """Undo the state, and what a command wrote."""
        if self._changed is None:
            return
        if self._is_untouched():
            for extent in self._changed:
                for at in range(0, extent.length, _CHUNK):
                    data = os.pread(
                        self._original, min(_CHUNK, extent.length - at), extent.offset + at
                    )
                    transfer_all(os.pwritev, self._fd, [memoryview(data)], extent.offset + at)
        else:
            os.close(self._fd)
            self._fd = -1
            if os.path.lexists(self.path):
                os.unlink(self.path)
            self._make()
        self._changed = None
        self.digest = self._behind

    def _is_untouched(self) -> bool:
        status = os.fstat(self._fd)
        try:
            is_there = os.path.samestat(os.lstat(self.path), status)
        except FileNotFoundError:
            return False
        return is_there and status.st_mtime_ns == 0 and status.st_size == self._size

    def _put(self, fd: int, extents: Iterable[Extent]) -> int:
        """Write; return how that changes the digest."""
        change = 0
        for offset, length, source in extents:
            for at in range(0, length, _CHUNK):
                count = min(_CHUNK, length - at)
                data = (
                    bytes(count) if source == ZEROS else os.pread(self._trace, count, source + at)
                )
                if len(data) < count:
                    raise OSError(5, "the trace was cut short")
                old = os.pread(fd, count, offset + at)
                if old != data:
                    change ^= self._difference(offset + at, old, data)
                    transfer_all(os.pwritev, fd, [memoryview(data)], offset + at)
        return change

    def _difference(self, offset: int, old: bytes, new: bytes) -> int:
        found = 0
        for at in range(0, len(new), self._unit):
            before, after = old[at : at + self._unit], new[at : at + self._unit]
            if before != after:
                found ^= _digest(offset + at, before) ^ _digest(offset + at, after)
        return found

    def close(self) -> None:
        """Close both; who made the directory removes them."""
        for fd in (self._fd, self._original):
            if fd >= 0:
                os.close(fd)
        self._fd = self._original = -1


def _digest(offset: int, data: bytes) -> int:
    found = blake2b(data, digest_size=16, salt=offset.to_bytes(16, "little"))
    return int.from_bytes(found.digest(), "little")


def _copy(source: int, target: int, size: int) -> None:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        os.ftruncate(target, size)
        copy_extent(source, 0, target, 0, size, size, lambda done, total: None)


def can_clone(directory: str, base: int) -> bool:
    """Tell whether a file system can make clones of an image in a directory."""
    path = os.path.join(directory, "clone")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.ioctl(fd, _FICLONE, base)
    except OSError:
        return False
    finally:
        os.close(fd)
        os.unlink(path)
    return True
