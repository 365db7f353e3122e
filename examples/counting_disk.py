"""A disk in memory that counts, for each MiB of it, what was read, and tells at the end."""

import sys
from collections import Counter

from xen_disk_py.backends import Backend


class Disk(Backend):
    """Zeros at first."""

    def __init__(self, size: int = 64 << 20):
        self.data, self.size = bytearray(size), size
        self.reads = Counter()

    def read(self, buffers, offset):
        self.reads[offset >> 20] += 1
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, buffers, offset):
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def close(self):
        for mib in sorted(self.reads):
            print(f"MiB {mib}: {self.reads[mib]} reads", file=sys.stderr)
