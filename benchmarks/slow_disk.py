"""A slow disk: one request at a time, ten milliseconds each."""

from __future__ import annotations

import time
from collections.abc import Sequence

from xen_disk_py.backends import Backend


class Disk(Backend):
    """Waits, and neither reads nor writes anything."""

    keeps_data = False
    size = 64 << 20

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Wait."""
        time.sleep(0.01)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Wait."""
        time.sleep(0.01)
