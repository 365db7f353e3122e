"""The structures of a VHD, as values: packed, parsed and checked. Nothing here does any I/O.

::

    fixed           the disk, then the footer
    dynamic         0      a copy of the footer
                    512    the header (where the footer says)
                    1536   the block allocation table, BAT (where the header says): for each block
                           of the disk the sector of the file where it lies, or 0xffffffff
                           perhaps a batmap, and what names the parent
                           blocks: a bitmap of whole sectors, then the data
                           the footer
    differencing    a dynamic one; what it does not have, its parent has

In a block's bitmap each sector has a bit, the first one in the highest bit of the first byte. A
sector whose bit is clear is the parent's, or zeros without one, whatever the file has there. All
numbers are big-endian. Field by field: Microsoft's "Virtual Hard Disk Image Format
Specification", 2006; the batmap is blktap's (``vhd.h``).
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

from ...errors import ImageError, UsageError
from ...units import format_size

SECTOR = 512
FOOTER = 512
HEADER = 1024
BLOCK = 2 << 20
"""The block of what we make, in bytes: blktap reads no other."""
FREE = 0xFFFFFFFF
"""A BAT entry: the block is not in the file."""
NOWHERE = 0xFFFFFFFFFFFFFFFF
"""The offset of something that does not exist."""
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
MOST = 2040 << 30
"""The largest disk that every program takes, in bytes; QEMU refuses more."""
MOST_BLOCKS = 1 << 22
"""So many blocks are handled, which bounds memory: 8 TiB of the usual ones."""
LARGEST_BATMAP = 1 << 20
"""Bytes; twice what so many blocks need."""
SMALLEST_BLOCK = 4096
LARGEST_BLOCK = 1 << 28
EPOCH = 946684800
"""2000-01-01 in seconds since 1970: where time stamps count from."""
NO_UUID = bytes(16)
CODES = (b"MacX", b"Mac ", b"W2ru", b"W2ku", b"Wi2r", b"Wi2k")
"""What a parent locator's platform code may be."""
BATMAP_VERSION = 0x00010002

_COOKIE = b"conectix"
_HEADER_COOKIE = b"cxsparse"
_BATMAP_COOKIE = b"tdbatmap"
# cookie, features, version, data offset, time stamp, creator (its name, version and OS), original
# and current size, cylinders, heads, sectors, type, checksum, UUID, saved state, hidden
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB426x")
_FOOTER_SUM = 64
# cookie, data offset, table offset, version, entries, block size, checksum, UUID, time stamp,
# name of the parent; then the locators
_HEADER = struct.Struct(">8sQQIIII16sI4x512s")
_HEADER_SUM = 36
_LOCATOR = struct.Struct(">4sIIIQ")
_LOCATORS = 8
_BATMAP = struct.Struct(">8sQIII")


@dataclass(frozen=True)
class Footer:
    """What a VHD's last 512 bytes say; ``raw`` is all of them, the rest is what we go by.

    Attributes:
        kind: FIXED, DYNAMIC or DIFFERENCING.
        size: of the disk, in bytes: the field "current size", which every program but QEMU goes
            by alone. Geometry and original size are not looked at.
        data_offset: of the header, in bytes; means nothing in a fixed one.
        uuid: its 16 bytes as they are, which some programs take for a GUID.
        raw: as they stand in the file.
    """

    kind: int
    size: int
    data_offset: int
    uuid: bytes
    raw: bytes

    @classmethod
    def parse(cls, sector: bytes) -> Footer | None:
        """Return what a footer says; None if these bytes are none (cookie, checksum, version).

        Args:
            sector: 512 bytes, or 511: what was written before 2003 has no more.
        """
        whole = sector.ljust(FOOTER, b"\0")
        if not sector.startswith(_COOKIE) or len(whole) != FOOTER:
            return None
        fields = _FOOTER.unpack(whole)
        if fields[2] >> 16 != 1 or fields[14] != _sum(whole, _FOOTER_SUM):
            return None
        return cls(fields[13], fields[9], fields[3], fields[15], whole)

    def check(self, name: str) -> None:
        """See that it makes sense.

        Raises:
            ImageError: it does not.
        """
        if self.kind not in (FIXED, DYNAMIC, DIFFERENCING):
            raise damaged(name, f"its footer says type {self.kind}, which is none that exists")
        if not self.size or self.size % SECTOR:
            raise damaged(
                name, f"its footer says {self.size} bytes, no positive multiple of {SECTOR}"
            )

    @property
    def fields(self) -> dict[str, object]:
        """All fields by name, for whoever looks into the details."""
        names = (
            "cookie", "features", "version", "data_offset", "timestamp", "creator",
            "creator_version", "creator_os", "original_size", "size", "cylinders", "heads",
            "sectors", "kind", "checksum", "uuid", "saved", "hidden",
        )  # fmt: skip
        return dict(zip(names, _FOOTER.unpack(self.raw)))

    def with_uuid(self, uuid: bytes) -> Footer:
        """Return the same with another UUID."""
        raw = self.raw[:68] + uuid + self.raw[84:]
        return replace(self, uuid=uuid, raw=_summed(raw, _FOOTER_SUM))

    def with_size(self, size: int) -> Footer:
        """Return the same for a disk of ``size`` bytes; the original size stays."""
        raw = self.raw[:48] + struct.pack(">QHBB", size, *geometry(size)) + self.raw[60:]
        return replace(self, size=size, raw=_summed(raw, _FOOTER_SUM))

    @classmethod
    def new(cls, kind: int, size: int, uuid: bytes, timestamp: int) -> Footer:
        """Make one.

        The creator is ``win ``: QEMU 7 goes by the geometry unless it is one of a few, and that
        geometry, rounded down as blktap's check wants it, leaves out the end of the disk.

        Args:
            kind: FIXED, DYNAMIC or DIFFERENCING.
            size: of the disk, in bytes.
            uuid: 16 bytes.
            timestamp: seconds since :data:`EPOCH`.
        """
        offset = NOWHERE if kind == FIXED else FOOTER
        fields = (2, 0x00010000, offset, timestamp, b"win ", 0x000A0000, b"Wi2k", size, size)
        raw = _FOOTER.pack(_COOKIE, *fields, *geometry(size), kind, 0, uuid, 0, 0)
        return cls(kind, size, offset, uuid, _summed(raw, _FOOTER_SUM))


@dataclass(frozen=True)
class Locator:
    """Where one kind of program finds the parent's name.

    Attributes:
        code: the kind, one of :data:`CODES`.
        space: bytes of the file that are set aside for it.
        length: of the name, in bytes.
        offset: of the name in the file, in bytes.
    """

    code: bytes
    space: int
    length: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What describes the blocks of a VHD that is not fixed.

    Attributes:
        table: where the BAT starts, in bytes.
        entries: how many it has, perhaps more than the disk needs.
        block_size: bytes.
        parent_uuid: 16 bytes, zeros where the parent is a raw image.
        parent_name: as its creator has put it, mostly without a directory.
        parent_time: when the parent was last written, in seconds since :data:`EPOCH`.
        locators: those that are in use.
    """

    table: int
    entries: int
    block_size: int
    parent_uuid: bytes
    parent_time: int
    parent_name: str
    locators: tuple[Locator, ...]
    raw: bytes

    @classmethod
    def parse(cls, page: bytes, name: str) -> Header:
        """Read the 1024 bytes of the file ``name``, which anybody may have written.

        Raises:
            ImageError: they are no header, or one that makes no sense.
        """
        if len(page) < HEADER or not page.startswith(_HEADER_COOKIE):
            raise damaged(name, "there is no header where its footer says")
        _, _, table, version, entries, block, checksum, uuid, time, title = _HEADER.unpack_from(
            page
        )
        if checksum != _sum(page, _HEADER_SUM):
            raise damaged(name, "its header has a wrong checksum")
        if version >> 16 != 1:
            raise ImageError(f"{name}: a VHD of version {version >> 16}, this program knows 1")
        if block & (block - 1) or not SMALLEST_BLOCK <= block <= LARGEST_BLOCK:
            raise ImageError(
                f"{name}: blocks of {block} bytes: only powers of two from {SMALLEST_BLOCK} to "
                f"{LARGEST_BLOCK} are handled: convert it (qemu-img convert)"
            )
        if table % SECTOR or table < FOOTER:
            raise damaged(name, f"its BAT would start at byte {table}")
        found = []
        for number in range(_LOCATORS):
            start = _HEADER.size + number * _LOCATOR.size
            code, space, length, _, offset = _LOCATOR.unpack_from(page, start)
            if code in CODES:
                # Sectors by the specification, which most programs take for bytes: blktap's rule.
                space = space * SECTOR if space < SECTOR else space
                found.append(Locator(code, space, length, offset))
        text = title.decode("utf-16-be", errors="replace").partition("\0")[0]
        return cls(table, entries, block, uuid, time, text, tuple(found), page[:HEADER])

    @classmethod
    def new(
        cls,
        entries: int,
        *,
        table: int = FOOTER + HEADER,
        parent_uuid: bytes = NO_UUID,
        parent_time: int = 0,
        parent_name: str = "",
        locators: tuple[Locator, ...] = (),
    ) -> Header:
        """Make one with the usual blocks; see the class."""
        title = parent_name.encode("utf-16-be", errors="surrogatepass")[:510].ljust(512, b"\0")
        fields = (NOWHERE, table, 0x00010000, entries, BLOCK, 0, parent_uuid, parent_time)
        raw = _HEADER.pack(_HEADER_COOKIE, *fields, title)
        for each in locators:
            raw += _LOCATOR.pack(each.code, each.space, each.length, 0, each.offset)
        raw = _summed(raw.ljust(HEADER, b"\0"), _HEADER_SUM)
        return cls(table, entries, BLOCK, parent_uuid, parent_time, parent_name, locators, raw)

    def with_entries(self, entries: int) -> Header:
        """Return the same with a table of so many entries.

        The part that differs is in its first sector, checksum and all.
        """
        raw = self.raw[:28] + struct.pack(">I", entries) + self.raw[32:]
        return replace(self, entries=entries, raw=_summed(raw, _HEADER_SUM))

    @property
    def bitmap_size(self) -> int:
        """Bytes of a block's bitmap: a bit for each of its sectors, rounded up to a sector."""
        return whole_sectors(self.block_size // SECTOR // 8)

    @property
    def end_of_table(self) -> int:
        """Where the padded BAT ends, in bytes; there a batmap would start."""
        return self.table + whole_sectors(4 * self.entries)


@dataclass(frozen=True)
class Batmap:
    """Where blktap notes which blocks are full, so that it need not read their bitmaps.

    Attributes:
        offset: of the map, in bytes: a bit for each block, the first in the highest bit.
        length: of the map, in bytes.
        checksum: of the map alone, as it stands in the file.
    """

    offset: int
    length: int
    version: int
    checksum: int

    @classmethod
    def parse(cls, sector: bytes) -> Batmap | None:
        """Return what is described by the sector behind the BAT; None if it is no batmap."""
        if len(sector) < _BATMAP.size or not sector.startswith(_BATMAP_COOKIE):
            return None
        _, offset, sectors, version, checksum = _BATMAP.unpack_from(sector)
        return cls(offset, sectors * SECTOR, version, checksum)

    def pack(self) -> bytes:
        """Return the part of the sector that is known."""
        sectors = self.length // SECTOR
        return _BATMAP.pack(_BATMAP_COOKIE, self.offset, sectors, self.version, self.checksum)


def blocks_of(size: int, block_size: int) -> int:
    """Return how many blocks a disk of ``size`` bytes has."""
    return -(-size // block_size)


def check_size(size: int) -> None:
    """See that a disk of ``size`` bytes can be made.

    Raises:
        UsageError: it cannot.
    """
    if size <= 0 or size % SECTOR:
        raise UsageError(f"{size} bytes: a VHD's size is a positive multiple of {SECTOR}")
    if size > MOST:
        raise UsageError(f"{format_size(size)}: a VHD has {format_size(MOST)} at most")


def geometry(size: int) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors per track, by the specification; rounded down."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    sectors = 17
    tracks = total // sectors
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
        tracks = total // sectors
    if tracks >= heads * 1024:
        sectors, heads = 63, 16
        tracks = total // sectors
    return tracks // heads, heads, sectors


def encode_name(code: bytes, name: str) -> bytes:
    """Return a path as the locator of kind ``code`` has it."""
    if code == b"MacX":
        return b"file://" + name.encode("utf-8", errors="surrogateescape")
    return name.replace("/", "\\").encode("utf-16-le", errors="surrogatepass")


def decode_name(code: bytes, data: bytes) -> str | None:
    """Return the path that a locator's data names, with slashes; None if it is no path at all."""
    if code == b"MacX":
        text = data.decode("utf-8", errors="surrogateescape")
        if text.startswith("file://"):
            text = text[len("file://") :]
    elif code in (b"W2ru", b"W2ku"):
        try:
            text = data.decode("utf-16-le", errors="surrogatepass")
        except UnicodeDecodeError:  # cut short in the middle of a character
            return None
    elif code in (b"Wi2r", b"Wi2k"):
        text = data.decode("cp1252", errors="replace")
    else:  # an alias of the old Mac OS
        return None
    return clean_name(text)


def clean_name(text: str) -> str | None:
    """Return a path out of a file with slashes only; None if it cannot be one."""
    text = text.rstrip("\0").replace("\\", "/")
    if not text or "\0" in text or len(text) > 4096:
        return None
    return text


def is_foreign(path: str) -> bool:
    """Tell whether a path with slashes is an absolute one of Windows, which is nowhere here."""
    return re.match(r"[A-Za-z]:|//", path) is not None


def checksum(data: bytes | bytearray) -> int:
    """Return the ones' complement of the sum of all bytes, as every structure has it."""
    return ~sum(data) & 0xFFFFFFFF


def new_uuid() -> bytes:
    """Return a UUID as RFC 4122 has them: vhd-lib takes no other."""
    return uuid4().bytes


def committed_uuid(child: bytes, parent: bytes) -> bytes:
    """Return the UUID that a parent gets when all that a child has was written into it.

    By it the parent's other children do not take it for what they knew, and a commit that was
    interrupted knows that nothing is left but to remove the child.
    """
    digest = hashlib.sha256(b"xen-disk commit" + child + parent).digest()
    return UUID(bytes=digest[:16], version=4).bytes


def whole_sectors(length: int) -> int:
    """Round up to whole sectors, in bytes."""
    return -(-length // SECTOR) * SECTOR


def damaged(name: str, what: str) -> ImageError:
    """Say that a file is no VHD that can be used."""
    return ImageError(
        f"{name}: a damaged VHD, or none: {what}; restore a copy; if it is a raw image, say "
        "--format raw (of a parent: --parent-format raw)"
    )


def _sum(data: bytes, at: int) -> int:
    return checksum(data[:at] + data[at + 4 :])


def _summed(data: bytes, at: int) -> bytes:
    data = data[:at] + bytes(4) + data[at + 4 :]
    return data[:at] + struct.pack(">I", checksum(data)) + data[at + 4 :]
