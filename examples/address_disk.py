"""A disk whose sectors tell their own address, as text: try ``head -c 512`` on it.

Nothing is stored, so it can be of any size; it shows at once what an offset went wrong by.
"""

from xen_disk_py.backends import Backend


class Disk(Backend):
    """Sector 3 reads ``1536``, then spaces and a newline up to 512 bytes."""

    read_only = True

    def __init__(self, size: int = 1 << 30):
        self.size = size

    def read(self, buffers, offset):
        for buffer in buffers:
            for start in range(0, len(buffer), 512):
                buffer[start : start + 512] = b"%-511d\n" % (offset + start)
            offset += len(buffer)
