"""``offset``: a part of a disk as a disk.

``--filter offset:start=1M,size=100M`` begins one MiB into the disk below. ``--filter partition``
finds the place in a partition table.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DeviceError, UsageError
from .. import Backend
from ..filter import Filter


class Offset(Filter):
    """Shows a part of the source.

    Args:
        source: the disk below.
        start: where the part begins, in bytes.
        size: its bytes; by default all to the end.
    """

    resize_notice = None  # a part keeps its size

    def __init__(self, source: Backend, *, start: int = 0, size: int | None = None) -> None:
        super().__init__(source)
        if start >= source.size:
            raise UsageError(
                f"--filter offset: start={start} is not inside of a disk of {source.size} bytes: "
                "give a smaller one"
            )
        self._start = start
        if size == 0:
            raise UsageError("--filter offset: size=0 leaves nothing: give more, or leave it out")
        self.size = source.size - start if size is None else size
        for name, value in (("start", start), ("size", self.size)):
            if value % source.sector_size:
                raise UsageError(
                    f"--filter offset: {name}={value} is not a multiple of the disk's sectors, "
                    f"{source.sector_size} bytes"
                )
        if start + self.size > source.size:
            raise UsageError(
                f"--filter offset: {self.size} bytes at {start} are not in a disk of "
                f"{source.size}: give size={source.size - start} at most, or leave it out"
            )

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read from that part."""
        return self.source.read(buffers, self._start + offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write to that part."""
        return self.source.write(buffers, self._start + offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read from that part."""
        return self.source.read_nowait(buffers, self._start + offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write to that part."""
        return self.source.write_nowait(buffers, self._start + offset)

    def discard(self, offset: int, length: int) -> None:
        """Discard in that part."""
        self.source.discard(self._start + offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard in that part."""
        self.source.discard_securely(self._start + offset, length)

    def resize(self, size: int | None) -> int:
        """Refuse: what lies behind the part is not the guest's."""
        if size in (None, self.size):
            return self.size
        raise DeviceError("a part of a disk keeps its size")
