"""``discard``: a disk that is always empty. What is written is dropped; reads give zeros."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from . import Backend


class DiscardBackend(Backend):
    """An empty disk.

    Args:
        size: bytes, a positive multiple of ``sector_size``.
        sector_size: the logical sector in bytes.
    """

    keeps_data = False
    survives = True

    def __init__(self, *, size: int = 1 << 30, sector_size: int = 512) -> None:
        if size <= 0 or size % sector_size:
            raise UsageError(f"--size: {size} bytes is not a positive multiple of {sector_size}")
        self.size = size
        self.sector_size = sector_size

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Give zeros: an unfilled buffer would show the guest stale memory of its own."""
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Drop it."""

    def resize(self, size: int | None) -> int:
        """Claim another size."""
        self.size = size or self.size
        return self.size

    def discard(self, offset: int, length: int) -> None:
        """Do nothing. Zeros are read afterwards, as before."""
