"""Reads and writes extents of a disk, as a guest would."""

import ctypes
import mmap
import os
import time

import pytest


def buffers(content, size=4096):
    """Cut ``content`` into writable buffers."""
    data = bytearray(content)
    return [memoryview(data)[start : start + size] for start in range(0, len(data), size)]


def move(call, content, offset, size):
    """Call until everything is moved, as is done for a guest; return the buffers' content."""
    data = bytearray(content)
    done = 0
    while done < len(data):
        first = (done // size + 1) * size  # where the next whole buffer starts
        rest = [memoryview(data)[done:first]]
        rest += [memoryview(data)[at : at + size] for at in range(first, len(data), size)]
        moved = call(rest, offset + done)
        if moved is None:
            break
        if not 0 < moved <= len(data) - done:
            raise EOFError(f"{done + moved} of {len(data)} bytes")
        done += moved
    return bytes(data)


def read(disk, offset, length, size=4096):
    """Read an extent of the disk into buffers that are full of garbage before."""
    return move(disk.read, b"\xa5" * length, offset, size)


def write(disk, offset, content, size=4096):
    """Write an extent of the disk."""
    move(disk.write, content, offset, size)


def drop_from_cache(path):
    """Have the system forget what it has of a file in memory; it may keep what is in use."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_cold(path):
    """Do that until nothing of it is left in memory; skip the test if something always is."""
    for _ in range(50):
        drop_from_cache(path)
        if not pages_in_memory(path):
            return
        time.sleep(0.02)
    pytest.skip("the system keeps the file in memory")


def is_cut_short(path, read, length):
    """Whether a read of a cold file that may not wait ends early.

    It begins to read ahead, and whoever is slow finds all of it in memory after all: try again.
    """
    for _ in range(50):
        make_cold(path)
        if read() < length:
            return True
    return False


def pages_in_memory(path):
    """Count them, without reading them in (mincore(2))."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        first = ctypes.c_char.from_buffer(memory)
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        address = ctypes.c_void_p(ctypes.addressof(first))
        assert 0 == ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(memory)), pages)
        del first
        return sum(page & 1 for page in pages)
