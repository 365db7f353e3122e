"""A disk far away: every request takes a millisecond in which the processor has nothing to do."""

from __future__ import annotations

import time
from collections.abc import Sequence

from xen_disk_py.backends import Backend


class Disk(Backend):
    """Waits, and neither reads nor writes anything."""

    keeps_data = False
    threads = 32
    size = 64 << 20

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Wait."""
        time.sleep(0.001)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Wait."""
        time.sleep(0.001)
