"""Says what is wrong with a VHD: what blktap's ``vhd-util check`` says, and more than the first.

An *error* means that the VHD cannot be used, or that programs read different things in it. A
*warning* means that some program complains, though all that open it read the same.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ...errors import ImageError
from .chain import locators, open_chain
from .layout import (
    CODES,
    EPOCH,
    FIXED,
    FOOTER,
    FREE,
    HEADER,
    NO_UUID,
    NOWHERE,
    SECTOR,
    Batmap,
    Footer,
    checksum,
    geometry,
)
from .opening import Blocks, Vhd, examine, open_file

_MOST = 20  # things that are wrong with a batmap: there may be one for each block
_SLACK = 1800  # seconds that a time stamp may be ahead: clocks differ
_BATMAP_SINCE = 0x00010002  # of the creator "tap"
_LOCATORS = 576  # where they start in the header
_RESERVED = ((60, 64), (768, HEADER))  # parts of the header that are zeros


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        text: one line, without the file's name.
        is_error: see the module.
    """

    text: str
    is_error: bool


def check(path: str, *, directories: Sequence[str] = ()) -> list[Finding]:
    """Look for all that is wrong; change nothing.

    Args:
        path: the VHD, which no disk may be writing to.
        directories: where its parents may lie, besides its own directory.

    Raises:
        ImageError: it cannot be opened at all.
    """
    fd = open_file(path, writable=False)
    try:
        length = os.lseek(fd, 0, os.SEEK_END)
        found = list(_check_footers(fd, length))
        try:
            vhd = examine(fd, os.path.abspath(path))
        except ImageError as error:
            text = str(error)
            prefix = f"{os.path.abspath(path)}: "
            return [*found, Finding(text[len(prefix) :] if text.startswith(prefix) else text, True)]
        if vhd.blocks is not None:
            found += _check_header(vhd, vhd.blocks)
            found += islice(_check_batmap(vhd, vhd.blocks), _MOST)
            if vhd.is_differencing:
                found += _check_locators(vhd, vhd.blocks, directories)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    return found


def _check_footers(fd: int, length: int) -> Iterator[Finding]:
    last = os.pread(fd, FOOTER, max(0, length - FOOTER))
    tail = Footer.parse(last)
    short = Footer.parse(os.pread(fd, FOOTER - 1, max(0, length - FOOTER + 1)))
    copy = Footer.parse(os.pread(fd, FOOTER, 0))
    if tail is None and short is not None:
        tail = short
        yield Finding("the footer at the end has 511 bytes: some programs refuse that", False)
    if tail is None:
        what = "has a wrong checksum" if last.startswith(b"conectix") else "is missing"
        yield Finding(f"the footer at the end {what}", True)
    else:
        yield from _check_footer("the footer at the end", tail)
    if tail is not None and tail.kind == FIXED:
        return
    if copy is None:
        yield Finding("the copy of the footer at the start is missing or damaged", True)
        return
    if tail is None or tail.raw != copy.raw:
        yield from _check_footer("the copy of the footer at the start", copy)
    if tail is not None and tail.raw != copy.raw:
        ours, theirs = tail.fields, copy.fields
        names = [name for name, value in ours.items() if theirs[name] != value]
        names = [name for name in names if name != "checksum"] or ["reserved"]
        yield Finding(f"the two footers do not match: {', '.join(names)}", True)


def _check_footer(which: str, footer: Footer) -> Iterator[Finding]:
    fields = footer.fields
    features, version = fields["features"], fields["version"]
    assert isinstance(features, int)
    assert isinstance(version, int)
    if not features & 2:
        yield Finding(f"{which}: the bit of the features that is always set is not", False)
    if features & ~3:
        yield Finding(f"{which}: features {features:#x} that nobody knows", False)
    if version != 0x00010000:
        yield Finding(f"{which}: format version {version:#x}, not 0x10000", False)
    if footer.kind == FIXED and footer.data_offset != NOWHERE:
        yield Finding(f"{which}: a fixed VHD has no header, but an offset of one", False)
    stamp = fields["timestamp"]
    assert isinstance(stamp, int)
    if stamp > time.time() - EPOCH + _SLACK:
        yield Finding(f"{which}: was made in the future", False)
    shape = (fields["cylinders"], fields["heads"], fields["sectors"])
    if shape > geometry(footer.size):
        text = "/".join(map(str, shape))
        yield Finding(f"{which}: geometry {text} is larger than {footer.size} bytes", False)
    for name in ("saved", "hidden"):
        if fields[name] not in (0, 1):
            yield Finding(f"{which}: '{name}' is {fields[name]}, neither 0 nor 1", False)
    if any(footer.raw[86:]):
        yield Finding(f"{which}: reserved bytes are not zero", False)
    if footer.uuid == NO_UUID:
        yield Finding(f"{which}: no UUID, by which a child would know it", False)


def _check_header(vhd: Vhd, blocks: Blocks) -> Iterator[Finding]:
    header = blocks.header
    if any(any(header.raw[start:stop]) for start, stop in _RESERVED):
        yield Finding("the header: reserved bytes are not zero", False)
    if header.raw[8:16] != b"\xff" * 8:
        yield Finding("the header: an offset of more data, of which nobody knows", False)
    if not vhd.is_differencing and any(header.raw[40:56] + header.raw[56:60] + header.raw[64:768]):
        yield Finding("the header names a parent, but the footer says that there is none", True)
    for block, entry in enumerate(blocks.bat):
        if entry * SECTOR < blocks.end:
            yield Finding(
                f"block {block} (sector {entry}) lies over what names the parent, or the batmap: "
                "it was written by a program that knows neither",
                True,
            )
    if blocks.header.block_size != 2 << 20:
        size = blocks.header.block_size
        yield Finding(f"blocks of {size} bytes: XenServer and XCP-ng read 2 MiB only", False)


def _check_batmap(vhd: Vhd, blocks: Blocks) -> Iterator[Finding]:
    header = blocks.header
    batmap = Batmap.parse(os.pread(vhd.fd, SECTOR, header.end_of_table))
    if batmap is None:
        fields = vhd.footer.fields
        creator, version = fields["creator"], fields["creator_version"]
        assert isinstance(creator, bytes)
        assert isinstance(version, int)
        if creator.startswith(b"tap") and version >= _BATMAP_SINCE:
            yield Finding("no batmap, which blktap demands of what it has made", True)
        return
    if blocks.batmap is None or not batmap.length:
        yield Finding("the batmap lies outside of the file or over the BAT, or is too large", True)
        return
    content = os.pread(vhd.fd, batmap.length, batmap.offset)
    if checksum(content) != batmap.checksum:
        yield Finding("the batmap has a wrong checksum", True)
        return
    if 8 * batmap.length < header.entries:
        yield Finding("the batmap is smaller than the BAT", True)
    for block, entry in enumerate(blocks.bat[: 8 * len(content)]):
        if content[block // 8] & 0x80 >> block % 8:
            if entry == FREE:
                yield Finding(f"the batmap says that block {block} is full: it is not there", True)
            elif not _is_full(vhd, blocks, block, entry):
                yield Finding(f"the batmap says that block {block} is full: its bitmap not", True)


def _is_full(vhd: Vhd, blocks: Blocks, block: int, entry: int) -> bool:
    size = blocks.header.block_size
    sectors = min(size, vhd.size - block * size) // SECTOR
    bitmap = os.pread(vhd.fd, blocks.header.bitmap_size, entry * SECTOR)
    return f"{int.from_bytes(bitmap, 'big'):0{8 * len(bitmap)}b}".find("0", 0, sectors) < 0


def _check_locators(vhd: Vhd, blocks: Blocks, directories: Sequence[str]) -> Iterator[Finding]:
    header = blocks.header
    seen = []
    for number in range(8):
        raw = header.raw[_LOCATORS + 24 * number :][:24]
        code, space, length, reserved, offset = struct.unpack(">4sIIIQ", raw)
        if code == bytes(4):
            if any(raw):
                yield Finding(f"parent locator {number}: of no kind, but not empty", False)
            continue
        if code not in CODES:
            yield Finding(f"parent locator {number}: of a kind that nobody knows", False)
        elif code in seen:
            yield Finding(f"parent locator {number}: a second one of its kind", False)
        seen.append(code)
        if not (offset and space and length):
            yield Finding(f"parent locator {number}: without a place, room or length", False)
        elif offset + length > vhd.length - FOOTER:
            yield Finding(f"parent locator {number}: outside of the file", True)
        if reserved:
            yield Finding(f"parent locator {number}: reserved bytes are not zero", False)
    names = locators(vhd)
    if not names:
        yield Finding("no parent locator can be read: blktap does not find the parent", False)
    for code, name in names:
        if os.path.basename(name) != os.path.basename(header.parent_name.replace("\\", "/")):
            kind = code.decode("ascii")
            yield Finding(f"parent locator {kind} names another file than the header", False)
    try:
        open_chain(vhd.path, writable=False, directories=directories).close()
    except ImageError as error:
        text = str(error)
        prefix = f"{vhd.path}: "
        yield Finding(text[len(prefix) :] if text.startswith(prefix) else text, True)
