"""What a qcow2 says of itself: was it cut short, does it name another file?

QEMU reads what is beyond the end of its file as zeros.

Layout as in QEMU's ``docs/interop/qcow2.txt``. Nothing is believed that would read more than the
tables take in the largest image.
"""

from __future__ import annotations

import os
import struct

from ..image import transfer_all

_HEADER = struct.Struct(">4sIQIIQIIQQII")  # up to nb_snapshots
_MAGIC = b"QFI\xfb"
_OFFSET = 0x00FFFFFFFFFFFE00  # of an L1 or standard L2 entry
_COMPRESSED = 1 << 62
_EXTERNAL, _EXTENDED = 1 << 2, 1 << 4  # incompatible features: data elsewhere, larger entries
_LARGEST_TABLE = 32 << 20  # bytes; QEMU takes no larger L1 or refcount table


def is_cut_short(fd: int) -> bool:
    """Tell whether a table or a cluster that the image needs lies beyond the end of its file.

    The reference counts are asked first, which is quick; where they count something there, it may
    be a cluster that a crash has left unused, so that the tables decide.

    Raises:
        OSError: it cannot be read.
    """
    length = os.lseek(fd, 0, os.SEEK_END)
    if length < 112:  # so long is a header of version 3
        return False
    head = os.pread(fd, 112, 0)
    magic, version, _, _, bits, _, _, entries, l1, counts, clusters, _ = _HEADER.unpack_from(head)
    features = _features(head, version)
    order = int.from_bytes(head[96:100], "big") if version >= 3 else 4
    if magic != _MAGIC or not 9 <= bits <= 21 or order > 6 or features & _EXTERNAL:
        return False  # QEMU says what is wrong
    cluster = 1 << bits
    table = _numbers(fd, counts, clusters * cluster, length)
    roots = _numbers(fd, l1, entries * 8, length)
    if table is None or roots is None:
        return True
    last = max((index for index, entry in enumerate(table) if entry), default=None)
    if last is None:
        return False
    if any(entry & ~511 >= length for entry in table):
        return True
    per_block = cluster * 8 >> order
    block = _read(fd, table[last] & ~511, cluster, length)
    if block is None:
        return True
    used = len(block.rstrip(b"\0")) * 8 >> order  # to one or more beyond the last that is used
    if (last * per_block + max(0, used - 1)) * cluster < length:
        return False
    return _points_beyond(fd, roots, cluster, length, 16 if features & _EXTENDED else 8)


def names_another_file(fd: int) -> bool:
    """Tell whether it has a backing file, or its data in a file of their own.

    Raises:
        OSError: it cannot be read.
    """
    head = os.pread(fd, 112, 0)
    if len(head) < _HEADER.size:
        return False  # none that QEMU opens
    _, version, backing, *_ = _HEADER.unpack_from(head)
    return backing != 0 or bool(_features(head, version) & _EXTERNAL)


def _features(head: bytes, version: int) -> int:
    """Return the incompatible features."""
    return int.from_bytes(head[72:80], "big") if version >= 3 else 0


def _points_beyond(fd: int, roots: tuple[int, ...], cluster: int, length: int, width: int) -> bool:
    bits = 62 - (cluster.bit_length() - 1 - 8)
    for at in sorted({root & _OFFSET for root in roots}):  # each once, whoever wrote the table
        if not at:
            continue
        content = _read(fd, at, cluster, length)
        if content is None:
            return True
        for entry in struct.unpack(f">{cluster // 8}Q", content)[:: width // 8]:
            place = entry & ((1 << bits) - 1) if entry & _COMPRESSED else entry & _OFFSET
            if place >= length:
                return True
    return False


def _numbers(fd: int, at: int, size: int, length: int) -> tuple[int, ...] | None:
    """Read a table of 64-bit numbers; None if it is beyond the end."""
    if size > _LARGEST_TABLE:
        return ()
    content = _read(fd, at, size, length)
    return None if content is None else struct.unpack(f">{size // 8}Q", content)


def _read(fd: int, at: int, size: int, length: int) -> bytes | None:
    if at + size > length:
        return None
    content = bytearray(size)
    transfer_all(os.preadv, fd, [memoryview(content)], at)
    return bytes(content)
