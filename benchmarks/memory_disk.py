"""A disk in memory as somebody would write it for ``connect --path``; 64 MiB."""

from __future__ import annotations

from collections.abc import Sequence

from xen_disk_py.backends import Backend


class Disk(Backend):
    """Nothing but a ``bytearray``."""

    def __init__(self) -> None:
        self.data = bytearray(64 << 20)
        self.size = len(self.data)

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Copy out."""
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Copy in."""
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
