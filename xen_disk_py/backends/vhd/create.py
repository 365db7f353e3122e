"""Makes new VHDs: whole or not at all, and on stable storage when they have their name."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ...errors import ImageError, UsageError
from ..exporting import Check, Progress
from ..image import Image, transfer_all
from ..newfile import NewFile, why
from .chain import open_chain
from .layout import (
    BLOCK,
    DIFFERENCING,
    DYNAMIC,
    EPOCH,
    FIXED,
    FOOTER,
    FREE,
    HEADER,
    NO_UUID,
    SECTOR,
    Footer,
    Header,
    Locator,
    blocks_of,
    check_size,
    encode_name,
    new_uuid,
    whole_sectors,
)
from .opening import open_vhd

_ALIGNED = 4096  # bytes, of a block's data
_WRITTEN = (b"MacX", b"W2ku", b"W2ru")  # what blktap writes, in its order


def create(path: str, size: int, *, fixed: bool = False, most: int = 0) -> None:
    """Make an empty VHD.

    Args:
        path: no such file may exist.
        size: of the disk, in bytes.
        fixed: as long as the disk from the beginning, though sparse; else it grows with it.
        most: bytes that its table has room for, to make the disk larger while it is used.

    Raises:
        UsageError: that size cannot be.
        ImageError: it cannot be made.
    """
    check_size(size)
    footer = Footer.new(FIXED if fixed else DYNAMIC, size, new_uuid(), _now())
    if fixed:
        _make(path, [(size, footer.raw)])
    else:
        header = Header.new(_entries(size, most))
        _make(path, _pieces(footer, header, []))


def convert(raw: int, made: int, progress: Progress) -> None:
    """Make a dynamic VHD of a raw image; blocks of nothing but zeros are left out.

    Args:
        raw: the image's descriptor, of whole sectors.
        made: the descriptor of an empty file.
        progress: told how many bytes are done, and of how many.

    Raises:
        UsageError: no VHD can be as large.
    """
    size = os.fstat(raw).st_size
    check_size(size)
    footer = Footer.new(DYNAMIC, size, new_uuid(), _now())
    header = Header.new(_entries(size, 0))
    (_, first), *pieces = _pieces(footer, header, [])
    entries = [FREE] * header.entries
    end = pieces.pop()[0]  # where the footer would be
    bitmap = b"\xff" * header.bitmap_size
    content = memoryview(bytearray(BLOCK))
    for number in range(header.entries):
        at = number * BLOCK
        progress(at, size)
        length = min(BLOCK, size - at)
        if not _has_data(raw, at, length):
            continue
        content[length:] = bytes(BLOCK - length)
        transfer_all(os.preadv, raw, [content[:length]], at)
        if not any(content):
            continue
        data = -(-(end + len(bitmap)) // _ALIGNED) * _ALIGNED  # as blktap has it
        entries[number] = (data - len(bitmap)) // SECTOR
        transfer_all(os.pwritev, made, [memoryview(bitmap), content], data - len(bitmap))
        end = data + BLOCK
    table = struct.pack(f">{len(entries)}I", *entries)
    pieces = [piece for piece in pieces if piece[0] != header.table]
    pieces += [(0, first), (end, footer.raw)]
    pieces.append((header.table, table.ljust(whole_sectors(len(table)), b"\xff")))
    for offset, piece in pieces:
        transfer_all(os.pwritev, made, [memoryview(piece)], offset)
    progress(size, size)


def _has_data(fd: int, start: int, length: int) -> bool:
    """Tell whether an extent is more than a hole, as far as the file system says."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) < start + length
    except OSError as error:
        return error.errno != errno.ENXIO  # nothing behind it; others: it cannot tell


def create_child(
    path: str,
    parent: str,
    *,
    is_raw: bool = False,
    size: int | None = None,
    most: int = 0,
    directories: Sequence[str] = (),
    replacing: bool = False,
    check: Check = lambda path, writes: None,
) -> int:
    """Make a differencing VHD that has nothing yet: it reads as its parent.

    Args:
        path: no such file may exist, unless ``replacing``.
        parent: a VHD or a raw image, of which nothing is changed.
        is_raw: the parent is the bytes of a disk, no more.
        size: of the disk, in bytes: the parent's, or more, which reads as zeros.
        most: see :func:`create`.
        directories: where the parent's own parents may lie, besides its directory.
        replacing: put it in the place of what is there.
        check: called with the parent once it is open and locked; may raise.

    Returns:
        The size of the disk, in bytes.

    Raises:
        UsageError: the size cannot be.
        ImageError: the parent cannot be used, or the child not made.
    """
    base = os.path.realpath(parent)
    uuid = NO_UUID
    if is_raw:
        with Image.open(base, writable=False) as image:
            check(base, False)
            own = image.size
            if Footer.parse(os.pread(image.fd, FOOTER, own - FOOTER)) is not None:
                raise ImageError(
                    f"{parent}: is a VHD, no raw image: say so with --format vhd (create: leave "
                    "out --parent-format)"
                )
    else:
        with closing(open_chain(base, writable=False, directories=directories)):
            check(base, False)  # and all of it is there
        vhd = open_vhd(base, writable=False)
        os.close(vhd.fd)
        own, uuid = vhd.size, vhd.footer.uuid
        if uuid == NO_UUID:
            raise ImageError(
                f"{parent}: has no UUID, by which a child knows its parent: convert it "
                "(qemu-img convert -O vpc)"
            )
    size = own if size is None else size
    check_size(size)
    if size < own:
        raise UsageError(f"{parent} has {own} bytes: a child is never smaller than its parent")
    modified = min(max(0, int(os.stat(base).st_mtime) - EPOCH), 0xFFFFFFFF)
    footer = Footer.new(DIFFERENCING, size, new_uuid(), _now())
    here = os.path.dirname(os.path.realpath(path))
    name = os.path.join(".", os.path.relpath(base, here))
    entries = _entries(size, most)
    at = FOOTER + HEADER + whole_sectors(4 * entries)
    locators, texts = [], []
    for code in _WRITTEN:
        text = encode_name(code, name)
        space = whole_sectors(len(text))
        locators.append(Locator(code, space, len(text), at))
        texts.append((at, text.ljust(space, b"\0")))
        at += space
    header = Header.new(
        entries,
        parent_uuid=uuid,
        parent_time=modified,
        parent_name=os.path.basename(base),
        locators=tuple(locators),
    )
    _make(path, _pieces(footer, header, texts), replacing=replacing)
    return size


def _entries(size: int, most: int) -> int:
    if most:
        check_size(most)
        if most < size:
            raise UsageError(f"room for {most} bytes: the disk has {size} already")
    return blocks_of(max(size, most), BLOCK)


def _pieces(
    footer: Footer, header: Header, texts: Sequence[tuple[int, bytes]]
) -> list[tuple[int, bytes]]:
    """Return what a VHD without blocks has, by where it stands."""
    table = b"\xff" * whole_sectors(4 * header.entries)
    pieces = [(0, footer.raw), (FOOTER, header.raw), (header.table, table), *texts]
    last, content = pieces[-1]
    return [*pieces, (last + len(content), footer.raw)]


def _make(path: str, pieces: Sequence[tuple[int, bytes]], *, replacing: bool = False) -> None:
    if os.path.lexists(path) and not replacing:
        if os.path.isdir(path):
            raise UsageError(f"{path}: a directory: name the file to make in it")
        if Path(path).is_block_device():
            raise UsageError(
                f"{path}: a block device: create makes a file; make a file system there for "
                "that, or let a guest have it as it is (connect --path)"
            )
        raise UsageError(f"{path}: there is such a file: give another name, or remove it")
    try:
        with NewFile(path) as new:
            for offset, content in pieces:
                transfer_all(os.pwritev, new.fd, [memoryview(content)], offset)
            os.fsync(new.fd)
            new.put(path, replacing=replacing)
    except FileExistsError as error:
        raise UsageError(
            f"{path}: there is such a file: give another name, or remove it"
        ) from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be made: {why(error, path)}") from error


def _now() -> int:
    return max(0, int(time.time()) - EPOCH) & 0xFFFFFFFF
