"""``mmap``: an image mapped into memory, shared: what the guest writes is in the image."""

from __future__ import annotations

from collections.abc import Sequence

from . import Backend
from .image import Image, MappedImage


class MmapBackend(Backend):
    """An image, persistent, through a mapping.

    Every read is a copy between memory and memory, without a system call that copies: good
    for an image that fits into the page cache.

    Args:
        path: the image; locked for us alone, or shared with other readers if ``read_only``.
        read_only: open it for reading only.
    """

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        self._image = image = Image.open(path, writable=not read_only)
        try:
            self._mapped = MappedImage(image, private=False)
        except BaseException:
            image.close()
            raise
        self.path = image.path
        self.size = image.size
        self.sector_size = image.sector_size
        self.read_only = read_only

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Copy out of the mapping."""
        self._mapped.fault_in(offset, sum(map(len, buffers)), write=False)
        self._mapped.copy_out(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Copy into the mapping."""
        self._mapped.fault_in(offset, sum(map(len, buffers)), write=True)
        self._mapped.copy_in(buffers, offset)

    def flush(self) -> None:
        """``msync`` the whole mapping; the kernel knows which pages are dirty."""
        if not self.read_only:
            self._mapped.memory.flush()

    def close(self) -> None:
        """Unmap, close and unlock; the kernel writes back what is left, in its own time."""
        self._mapped.close()
        self._image.close()
