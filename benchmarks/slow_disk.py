"""A slow disk: one request at a time, ten milliseconds each, or what it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence

from xen_disk_py.backends import Backend


class Disk(Backend):
    """Waits, and neither reads nor writes anything."""

    keeps_data = False
    size = 64 << 20

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Wait."""
        time.sleep(self.seconds)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Wait."""
        time.sleep(self.seconds)
