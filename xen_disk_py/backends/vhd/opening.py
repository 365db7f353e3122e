"""From a path to an open VHD whose structures were checked; nothing in the file is changed."""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from dataclasses import dataclass

from ...errors import ImageError
from .. import sharing
from ..image import check_writable, open_file_or_disk, reason_of
from ..locks import claim
from .layout import (
    DIFFERENCING,
    FIXED,
    FOOTER,
    FREE,
    HEADER,
    LARGEST_BATMAP,
    MOST_BLOCKS,
    SECTOR,
    Batmap,
    Footer,
    Header,
    blocks_of,
    damaged,
)


@dataclass(frozen=True)
class Blocks:
    """What a VHD that is not fixed has besides its footer.

    Attributes:
        header: describes the blocks.
        bat: for each block of the disk its first sector in the file, or FREE.
        batmap: blktap's; None if there is none.
        end: where what is not a block ends, in bytes.
        used: where the last block ends, in bytes; ``end`` without any.
    """

    header: Header
    bat: array[int]
    batmap: Batmap | None
    end: int
    used: int

    @property
    def span(self) -> int:
        """Bytes that a block takes in the file, with its bitmap."""
        return self.header.bitmap_size + self.header.block_size


@dataclass(frozen=True)
class Vhd:
    """An open VHD.

    Attributes:
        fd: to be closed by whoever has this; locked until then.
        path: absolute.
        length: of the file or device, in bytes.
        footer: what counts.
        tail: where it stands at the end of the file, in bytes; None if only its copy is left.
        blocks: None in a fixed one.
        is_device: it is on a block device: the footer is at its end, as blktap has it (LVHD).
        has_old_copy: the copy of the footer at its start says something else: whoever changed the
            footer did not come to that.
    """

    fd: int
    path: str
    length: int
    footer: Footer
    tail: int | None
    blocks: Blocks | None
    is_device: bool = False
    has_old_copy: bool = False

    @property
    def size(self) -> int:
        """Of the disk, in bytes."""
        return self.footer.size

    @property
    def is_differencing(self) -> bool:
        """Whether it needs its parent."""
        return self.footer.kind == DIFFERENCING


def open_vhd(path: str, *, writable: bool) -> Vhd:
    """Open, lock and check.

    Raises:
        ImageError: it cannot be used; the message says why and what to do.
    """
    fd = open_file(path, writable=writable)
    try:
        return examine(fd, os.path.abspath(path))
    except BaseException:
        os.close(fd)
        raise


def open_file(path: str, *, writable: bool, name: str | None = None) -> int:
    """Open and lock: for us alone if ``writable``, else shared with other readers.

    Args:
        path: a regular file or a block device.
        writable: for reading and writing.
        name: what to call it in messages.

    Raises:
        ImageError: it cannot be used; the message says why and what to do.
    """
    name = name or path
    # O_NONBLOCK: opening a pipe would wait for its other end
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK
    try:
        if writable and not sharing.is_forced() and stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL  # the kernel then refuses a device that is mounted
        fd = open_file_or_disk(path, flags, name)
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = f": check the name, or make it with: xen-disk create {name} --size 10G"
        elif isinstance(error, PermissionError):
            hint = ": run as its owner or root" + (", or add --read-only" if writable else "")
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.EBUSY:
            reason = reason_of(error, path, writable)
        raise ImageError(f"{name}: {reason}{hint}") from error
    try:
        if writable and stat.S_ISBLK(os.fstat(fd).st_mode):
            check_writable(fd, name)
        for other in claim(fd, name, writable=writable):
            os.close(other)  # of a device's other names; who comes by them looks for users of it
    except OSError as error:
        os.close(fd)
        raise ImageError(f"{name}: cannot be locked: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def examine(fd: int, path: str) -> Vhd:
    """Read and check the structures of an open file, which anybody may have written.

    Raises:
        ImageError: it is no VHD that can be used.
    """
    try:
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        length = os.lseek(fd, 0, os.SEEK_END)
        tail, at = _find_tail(fd, length)
        if tail is not None and tail.kind == FIXED:
            tail.check(path)
            if at < tail.size:
                raise damaged(path, f"it says {tail.size} bytes of disk, but the file has {length}")
            return Vhd(fd, path, length, tail, at, None, is_device)
        copy = Footer.parse(os.pread(fd, FOOTER, 0)) if length >= FOOTER else None
        if copy is not None and copy.kind == FIXED:
            copy = None
        footer = tail or copy
        if footer is None:
            raise ImageError(
                f"{path}: not a VHD: it has no footer at its end, nor a copy at its start; if "
                "it is a raw image, say --format raw (of a parent: --parent-format raw); if it was "
                "cut short, restore a copy"
            )
        # Where the real one is missing, the file may end in what the guest has written.
        if copy is not None and (copy.kind, copy.data_offset) != (footer.kind, footer.data_offset):
            raise damaged(path, "the footer at its end and the copy at its start contradict")
        footer.check(path)
        blocks = _read_blocks(fd, length, footer, path)
        if tail is not None and blocks.used > at:  # it is a part of the last block
            tail, footer = None, copy or footer
            footer.check(path)
            blocks = _read_blocks(fd, length, footer, path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    is_old = copy is not None and copy.raw != footer.raw
    return Vhd(fd, path, length, footer, None if tail is None else at, blocks, is_device, is_old)


def _find_tail(fd: int, length: int) -> tuple[Footer | None, int]:
    """Take the last sector, or else the last 511 bytes; and where that is."""
    for size in (FOOTER, FOOTER - 1):
        if length >= size:
            footer = Footer.parse(os.pread(fd, size, length - size))
            if footer is not None:
                return footer, length - size
    return None, 0


def _read_blocks(fd: int, length: int, footer: Footer, path: str) -> Blocks:
    at = footer.data_offset
    if at % SECTOR or not FOOTER <= at <= length - HEADER:
        raise damaged(path, f"its header would be at byte {at} of {length}")
    header = Header.parse(os.pread(fd, HEADER, at), path)
    count = blocks_of(footer.size, header.block_size)
    if header.entries < count:
        raise damaged(path, f"its BAT has {header.entries} entries, the disk has {count} blocks")
    if count > MOST_BLOCKS:
        raise ImageError(
            f"{path}: {count} blocks, more than the {MOST_BLOCKS} that are handled: convert it to "
            "larger ones (qemu-img convert)"
        )
    if header.table + 4 * header.entries > length:
        raise damaged(path, "its BAT ends beyond the end of the file")
    if header.table < at + HEADER and at < header.end_of_table:
        raise damaged(path, "its BAT lies over its header")
    table = os.pread(fd, 4 * count, header.table)
    if len(table) != 4 * count:
        raise damaged(path, "its BAT cannot be read whole: somebody made it shorter")
    bat = array("I", table)
    if sys.byteorder == "little":
        bat.byteswap()
    batmap = read_batmap(fd, length, header)
    end = _metadata_end(length, footer, header, batmap)
    used = _check_bat(bat, footer, header, length, path)
    return Blocks(header, bat, batmap, end, max(end, used))


def read_batmap(fd: int, length: int, header: Header) -> Batmap | None:
    """Return what blktap has put behind the BAT, if it lies in the file and fits into memory."""
    batmap = Batmap.parse(os.pread(fd, SECTOR, header.end_of_table))
    if batmap is None or batmap.offset % SECTOR or batmap.offset + batmap.length > length:
        return None
    if batmap.offset < header.end_of_table + SECTOR or batmap.length > LARGEST_BATMAP:
        return None
    return batmap


def _metadata_end(length: int, footer: Footer, header: Header, batmap: Batmap | None) -> int:
    """Find where the first block may lie: some put it over the batmap and the locators."""
    ends = [footer.data_offset + HEADER, header.end_of_table]
    if batmap is not None:
        ends += [header.end_of_table + SECTOR, batmap.offset + batmap.length]
    ends += [each.offset + max(each.space, each.length) for each in header.locators]
    return -(-max(end for end in ends if end <= max(length, ends[1])) // SECTOR) * SECTOR


def _check_bat(bat: array[int], footer: Footer, header: Header, length: int, path: str) -> int:
    """See that blocks lie in the file, and nowhere else; return where the last one ends."""
    here = sorted(entry for entry in bat if entry != FREE)
    if not here:
        return 0
    span = (header.bitmap_size + header.block_size) // SECTOR
    lowest = max(footer.data_offset + HEADER, header.table + 4 * len(bat))
    if here[0] * SECTOR < lowest:
        block = bat.index(here[0])
        raise damaged(path, f"block {block} would lie over its header, at sector {here[0]}")
    for before, entry in zip(here, here[1:]):
        if entry - before < span:
            block = bat.index(entry)
            raise damaged(path, f"block {block} lies over another one, at sector {entry}")
    end = (here[-1] + span) * SECTOR
    if end > length:
        block = bat.index(here[-1])
        raise damaged(
            path, f"block {block} ends at byte {end}, the file has {length}: perhaps cut short"
        )
    return end
