"""Reads and writes runs of a disk, as a guest would."""


def buffers(content, size=4096):
    """Cut ``content`` into writable buffers."""
    data = bytearray(content)
    return [memoryview(data)[start : start + size] for start in range(0, len(data), size)]


def read(disk, offset, length, size=4096):
    """Read a run of the disk into buffers that are full of garbage before."""
    views = buffers(b"\xa5" * length, size)
    assert disk.read(views, offset) in (None, length)
    return b"".join(views)


def write(disk, offset, content, size=4096):
    """Write a run of the disk."""
    assert disk.write(buffers(content, size), offset) in (None, len(content))
