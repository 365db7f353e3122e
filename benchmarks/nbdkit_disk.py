"""The same disk in memory, as somebody would write it for nbdkit's Python plugin; 64 MiB."""

from __future__ import annotations

API_VERSION = 2

data = bytearray(64 << 20)


def open(readonly: bool) -> int:  # noqa: A001 - nbdkit's name
    """Return a handle; every connection sees the same disk."""
    return 1


def get_size(handle: int) -> int:
    """Return bytes."""
    return len(data)


def pread(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    """Copy out."""
    buffer[:] = data[offset : offset + len(buffer)]


def pwrite(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    """Copy in."""
    data[offset : offset + len(buffer)] = buffer
