"""``mmap``: an image mapped into memory, shared: what the guest writes is in the image."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from . import Backend
from .image import Image, MappedImage
from .sharing import Storage
from .trim import Trim


class MmapBackend(Backend):
    """An image, persistent, through a mapping.

    Writes go into the mapping: less work for the file system, at each of them, than ``raw``
    makes. Reads use ``preadv``: the same page cache that the mapping
    shows, at less cost than reading the mapping, and without its dangers (see
    :class:`~.image.MappedImage`). A disk that is only read needs no mapping then.

    A discard frees the space of a file, or is passed on to a device, as with ``raw``; the kernel
    takes the pages out of the mapping.

    Args:
        path: the image; locked for us alone, or shared with other readers if ``read_only``.
        read_only: open it for reading only.
        sector_size: the logical sector in bytes; by default the device's own, 512 for a file.
    """

    threads = 16
    survives = True
    shared_by_forks = True

    def __init__(
        self, path: str, *, read_only: bool = False, sector_size: int | None = None
    ) -> None:
        self._image = image = Image.open(path, writable=not read_only, sector_size=sector_size)
        self._outgrown: list[MappedImage] = []
        try:
            self._mapped = None if read_only else MappedImage(image)
        except BaseException:
            image.close()
            raise
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
        return self._image.read_nowait(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy into the mapping."""
        if self._mapped is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._mapped.store(buffers, offset)

    write_nowait = write

    def flush(self) -> None:
        """``msync`` the whole mapping; the kernel knows which pages are dirty."""
        if self._mapped is not None:
            self._mapped.memory.flush()

    def discard(self, offset: int, length: int) -> None:
        """Free the space: zeros are read there in a file, on a device what it makes of it."""
        self._trim.discard(offset, length)

    @property
    def can_discard(self) -> bool:
        """Whether the file system or the device can; asked when the image was opened."""
        return self._trim.supported

    def resize(self, size: int | None) -> int:
        """Make a file longer or shorter, and map what was added; see :meth:`Image.resize`.

        If it cannot be mapped the file stays longer, and the disk as it was.
        """
        if size is None:
            return self._image.measure()
        self._image.resize(size)
        if self._mapped is not None and size > len(self._mapped.memory):  # too long: no harm
            larger = MappedImage(self._image)
            self._outgrown.append(self._mapped)  # a request may be using it
            self._mapped = larger
        self.size = size
        return size

    def after_fork(self) -> None:
        """Open and map the image once more; see :meth:`Image.reopen`.

        The mapping is of that open file, whose errors ``msync`` tells, and what data goes through
        on its way there is no other process's.
        """
        self._image.reopen()
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = MappedImage(self._image)

    @property
    def host_storage(self) -> Sequence[Storage]:
        """The image."""
        return [self._image.storage]

    def close(self) -> None:
        """Unmap, close and unlock; the kernel writes back the remaining dirty pages later."""
        while self._outgrown:
            self._outgrown.pop().close()
        if self._mapped is not None:
            self._mapped.close()
        self._image.close()
