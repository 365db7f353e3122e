"""``partition``: a partition of a disk as a disk, by its number in an MBR or a GPT.

``--filter partition:number=1``. The table is read when the disk is opened: a guest that writes the
partition cannot change it. Numbers from 5 on in an MBR are in its extended partition.

Sources: UEFI specification, chapter 5 (GPT); the MBR as Linux reads it (``block/partitions``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...errors import ImageError, UsageError
from .. import Backend
from ..filter import do_all
from .offset import Offset

_ENTRY = struct.Struct("<4xB3xII")  # type, first sector, sectors
_GPT_HEADER = struct.Struct("<8s64xQIII")  # signature, first sector of the entries, how many, bytes
_GPT_ENTRY = struct.Struct("<16s16sQQ")  # type, GUID, first sector, last sector
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_NO_TABLE = (
    "no partition table: leave out --filter partition if the file system fills the disk, or say "
    "with --format what the image is"
)
_MOST = 128  # of partitions, and of links in an extended one


class Partition(Offset):
    """Shows one partition.

    Args:
        source: the disk below.
        number: which; the first is 1.
    """

    def __init__(self, source: Backend, *, number: int) -> None:
        found = dict(partitions(source))
        if number not in found:
            known = ", ".join(map(str, found)) or "none"
            raise UsageError(f"--filter partition: number={number}: the disk has {known}")
        start, size = found[number]
        if size <= 0 or start + size > source.size:
            raise ImageError(f"{source}: partition {number} is not inside of the disk")
        super().__init__(source, start=start, size=size)


def partitions(disk: Backend) -> Iterator[tuple[int, tuple[int, int]]]:
    """Read a partition table: numbers, with where each begins and its size, in bytes.

    Whatever a guest has written there, no more than 128 partitions come of it.

    Raises:
        ImageError: there is no table, or one that makes no sense.
    """
    sector = disk.sector_size
    first = _read(disk, 0)
    if first[510:512] != b"\x55\xaa":
        raise ImageError(f"{disk}: {_NO_TABLE}")
    entries = [_ENTRY.unpack_from(first, 446 + 16 * index) for index in range(4)]
    if any(kind == _PROTECTIVE for kind, _, _ in entries):
        yield from _gpt(disk)
        return
    for number, (kind, start, count) in enumerate(entries, 1):
        if kind and count and kind not in _EXTENDED:
            yield number, (start * sector, count * sector)
    for kind, start, _ in entries:
        if kind in _EXTENDED:
            yield from _logical(disk, start)
            break


def _logical(disk: Backend, extended: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Follow the chain in an extended partition."""
    sector, at = disk.sector_size, extended
    for number in range(5, 5 + _MOST):
        if (at + 1) * sector > disk.size:
            return
        table = _read(disk, at * sector)
        if table[510:512] != b"\x55\xaa":
            return
        kind, start, count = _ENTRY.unpack_from(table, 446)
        if kind and count:
            yield number, ((at + start) * sector, count * sector)
        kind, link, _ = _ENTRY.unpack_from(table, 462)
        if kind not in _EXTENDED or not link:
            return
        at = extended + link


def _gpt(disk: Backend) -> Iterator[tuple[int, tuple[int, int]]]:
    sector = disk.sector_size
    header = _read(disk, sector)
    signature, first, count, length = _GPT_HEADER.unpack_from(header)[:4]
    if signature != b"EFI PART" or not 128 <= length <= 4096 or length % 128:
        raise ImageError(f"{disk}: its GPT makes no sense")
    for number in range(1, min(count, _MOST) + 1):
        at = first * sector + (number - 1) * length
        if at + length > disk.size:
            return
        whole = at // sector * sector
        entry = _read(disk, whole, -(-(at + length - whole) // sector) * sector)
        kind, _, start, last = _GPT_ENTRY.unpack_from(entry, at - whole)
        if any(kind):
            yield number, (start * sector, (last + 1 - start) * sector)


def _read(disk: Backend, offset: int, length: int = 0) -> bytes:
    content = bytearray(length or disk.sector_size)
    if offset + len(content) > disk.size:
        raise ImageError(f"{disk}: {_NO_TABLE}")
    try:
        do_all(disk.read, [memoryview(content)], offset)
    except OSError as error:
        raise ImageError(f"{disk}: its partition table cannot be read: {error}") from error
    return bytes(content)
