"""Traces for tests, and what their disks had."""

from __future__ import annotations

from zlib import crc32

from xen_disk_py.trace.format import (
    DISCARD,
    FLUSH,
    READ,
    RESIZED,
    STOPPED,
    WRITE,
    Header,
    Record,
)
from xen_disk_py.trace.writer import TraceWriter

SIZE = 64 << 10


def header(base=None, **changes):
    samples = ()
    if base is not None:
        content = base.read_bytes()
        samples = ((0, crc32(content[:4096])), (4096, crc32(content[4096:8192])))
        changes = {"path": str(base), **changes}
    facts = {"size": SIZE, "sector_size": 512, "started": 10**18, "clock": 0, "id": b"i" * 16}
    return Header(**{**facts, "data": True, "samples": samples, **changes})


def write(start, end, offset, data, status=0):
    return Record(0, WRITE, start, end - start, offset, len(data), status, data=data)


def flush(start, end, status=0):
    return Record(0, FLUSH, start, end - start, 0, 0, status)


def discard(start, end, offset, length):
    return Record(0, DISCARD, start, end - start, offset, length)


def read(start, end):
    return Record(0, READ, start, end - start, 0, 512)


def resized(at, size):
    return Record(0, RESIZED, at, 0, size, 0)


def stopped(at):
    return Record(0, STOPPED, at, 0, 0, 0)


def make(path, header, records):
    """Write a trace; return its path."""
    with TraceWriter.create(str(path), header) as writer:
        writer.append(records)
    return str(path)
