"""The messages of the block protocol: bytes in, values out, and back.

No I/O and no judgement about a particular disk: this module knows layouts and what no
request may ever say. A request that breaks those rules is a value too
(:class:`Malformed`), since it must be answered like any other.

One table of layouts serves all ABIs: on x86_32 a ``u64`` aligns to 4 bytes, elsewhere to 8,
which moves everything behind the four leading bytes. All quantities named *sector* count
512 bytes whatever the disk's own sector size is.

Source: ``xen/include/public/io/blkif.h``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from struct import Struct
from typing import Callable, Union

from .errors import GuestMisbehaved
from .named import NamedTuple

SECTOR = 512
SECTORS_PER_PAGE = 8
MAX_SEGMENTS = 11
"""Segments in a request's own slot (``BLKIF_MAX_SEGMENTS_PER_REQUEST``)."""
MAX_INDIRECT_SEGMENTS = 4096
"""Eight indirect pages of 512 segments."""
SEGMENTS_PER_PAGE = 512

READ = 0
WRITE = 1
WRITE_BARRIER = 2
FLUSH = 3
DISCARD = 5
INDIRECT = 6

OKAY = 0
ERROR = -1
EOPNOTSUPP = -2
FLUSH_FAILED = -5
"""The answer to a flush or barrier that failed: an I/O error to every frontend, as all that is not
OKAY. Linux's blkfront takes ERROR, if there are no segments, for EOPNOTSUPP: it tells whoever
flushed that all went well (xen-blkfront.c, "empty flush op failed"; seen with Linux 6.1)."""

DISCARD_SECURE = 1
VDISK_CDROM = 1
VDISK_REMOVABLE = 2
VDISK_READONLY = 4

MAX_QUEUES = 8
"""Queues that a frontend may ever use; each has a ring, an event channel and a thread."""


class Transfer(NamedTuple):
    """A read, write, barrier or flush: ``sectors`` sectors of the disk from ``sector`` on.

    Segment ``i`` is sectors ``firsts[i]`` to ``lasts[i]``, both included, of the page granted
    as ``grefs[i]``; 0 <= first <= last <= 7 holds. Only a flush or barrier may have no segment.
    """

    id: int
    operation: int
    sector: int
    sectors: int
    grefs: tuple[int, ...]
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]


class Indirect(NamedTuple):
    """A read or write whose ``segments`` descriptors stand in the pages granted as ``grefs``."""

    id: int
    operation: int
    sector: int
    segments: int
    grefs: tuple[int, ...]


class Discard(NamedTuple):
    """Forget ``sectors`` sectors from ``sector`` on."""

    id: int
    operation: int
    sector: int
    sectors: int
    secure: bool


class Malformed(NamedTuple):
    """A request that is refused unseen; answer it with ``status``."""

    id: int
    operation: int
    status: int
    reason: str


Request = Union[Transfer, Indirect, Discard, Malformed]

_SEGMENT = "IBBxx"
_GREFS = Struct("<8I")
_RESPONSE = Struct("<QBxh")
RESPONSE_SIZE = _RESPONSE.size
"""12 bytes. The slot's rest is the guest's own and stays as it was: nothing leaks (XSA-216)."""

# Whole pages are what guests mostly ask for: a request of n such segments is recognised by
# two tuple comparisons instead of a loop. For all n they would take 2 MB of each process.
_segments: dict[int, tuple[Struct, tuple[int, ...], tuple[int, ...]]] = {}


def _segments_of(count: int) -> tuple[Struct, tuple[int, ...], tuple[int, ...]]:
    """Return how so many descriptors are laid out, and their firsts and lasts if all is whole."""
    found = _segments.get(count)
    if found is None:
        pages = count if count <= SEGMENTS_PER_PAGE else 0
        found = Struct("<" + _SEGMENT * count), (0,) * pages, (7,) * pages
        _segments[count] = found
    return found


def _transfer(
    id_: int, operation: int, sector: int, count: int, data: bytes, offset: int
) -> Transfer | Malformed:
    """Make a transfer of the ``count`` segment descriptors at ``offset`` of ``data``."""
    struct, whole_firsts, whole_lasts = _segments_of(count)
    flat = struct.unpack_from(data, offset)
    firsts, lasts = flat[1::3], flat[2::3]
    if firsts == whole_firsts and lasts == whole_lasts:
        sectors = count * SECTORS_PER_PAGE
    else:
        sectors = count
        for first, last in zip(firsts, lasts):
            if not first <= last < SECTORS_PER_PAGE:
                return Malformed(id_, operation, ERROR, f"segment of sectors {first} to {last}")
            sectors += last - first
    return Transfer(id_, operation, sector, sectors, flat[0::3], firsts, lasts)


class Abi:
    """One layout of requests; responses are the same in all.

    Args:
        name: as the frontend writes it to its ``protocol`` key.
        padding: bytes between the four leading bytes and the ``id``.
    """

    def __init__(self, name: str, padding: int) -> None:
        self.name = name
        self._head = Struct(f"<BBH{padding}xQQ")
        self._discard = Struct(f"<BBH{padding}xQQQ")
        self._indirect = Struct(f"<BBH{padding}xQQHxx8I")
        self.segments_at = self._head.size
        """Bytes into a slot at which its segment descriptors begin, 8 bytes each."""
        self.slot_size = self._head.size + MAX_SEGMENTS * 8
        """Bytes from one slot of the ring to the next: 112, or 108 on x86_32."""
        self.heads: Callable[[bytes], Iterator[tuple[int, int, int, int, int, int]]] = Struct(
            f"<BBH{padding}xQQQ80x"
        ).iter_unpack
        """``heads(slots)``: of each slot in a run of them the first byte (the operation), the
        second (segments; an indirect request's real operation), the u16 behind them (an indirect
        request's segments), the id, the sector and the first segment descriptor as a number (its
        upper half is an indirect request's first page)."""

    def __repr__(self) -> str:
        return f"<Abi {self.name}>"

    def decode(self, slot: bytes, max_indirect_segments: int = MAX_INDIRECT_SEGMENTS) -> Request:
        """Say what the request in ``slot`` asks for; ``slot`` is a private copy."""
        operation, count, wide, id_, sector = self._head.unpack_from(slot)
        if operation in (READ, WRITE, WRITE_BARRIER, FLUSH):
            if count > MAX_SEGMENTS:
                return Malformed(id_, operation, ERROR, f"{count} segments")
            if count == 0 and operation in (READ, WRITE):
                return Malformed(id_, operation, ERROR, "no segment")
            return _transfer(id_, operation, sector, count, slot, self._head.size)
        if operation == INDIRECT and max_indirect_segments:
            # Here the second byte is the operation meant and the following u16 the count; the
            # response names the operation meant (Linux blkfront compares it).
            if count not in (READ, WRITE):
                return Malformed(id_, count, ERROR, f"indirect operation {count}")
            if not 1 <= wide <= max_indirect_segments:
                return Malformed(id_, count, ERROR, f"{wide} indirect segments")
            pages = -(-wide // SEGMENTS_PER_PAGE)
            grefs = _GREFS.unpack_from(slot, self._indirect.size - _GREFS.size)
            return Indirect(id_, count, sector, wide, grefs[:pages])
        if operation == DISCARD:
            sectors = self._discard.unpack_from(slot)[5]
            return Discard(id_, operation, sector, sectors, bool(count & DISCARD_SECURE))
        return Malformed(id_, operation, EOPNOTSUPP, f"operation {operation}")

    def encode(self, request: Transfer | Indirect | Discard, handle: int = 0) -> bytes:
        """Lay ``request`` out as a frontend does; the result fills a slot."""
        if isinstance(request, Transfer):
            segments = zip(request.grefs, request.firsts, request.lasts)
            data = self._head.pack(
                request.operation, len(request.grefs), handle, request.id, request.sector
            ) + encode_segments(list(segments))
        elif isinstance(request, Indirect):
            grefs = request.grefs + (0,) * (8 - len(request.grefs))
            data = self._indirect.pack(
                INDIRECT,
                request.operation,
                request.segments,
                request.id,
                request.sector,
                handle,
                *grefs,
            )
        else:
            data = self._discard.pack(
                DISCARD, request.secure, handle, request.id, request.sector, request.sectors
            )
        return data.ljust(self.slot_size, b"\0")


X86_64 = Abi("x86_64-abi", padding=4)
X86_32 = Abi("x86_32-abi", padding=0)
ARM = Abi("arm-abi", padding=4)

_ABIS = {abi.name: abi for abi in (X86_64, X86_32, ARM)}


def abi_named(protocol: str | None, machine: str) -> Abi:
    """Choose the layout for a frontend's ``protocol`` key.

    Without the key the frontend is taken for x86_32 on an x86 ``machine`` (as
    ``platform.machine()`` names it), as Linux blkback, QEMU and tapdisk do although blkif.h
    says "native"; for ARM on an ARM one.

    Raises:
        GuestMisbehaved: the name is none of ours.
    """
    if protocol is None:
        return ARM if machine.startswith(("arm", "aarch64")) else X86_32
    try:
        return _ABIS[protocol]
    except KeyError:
        raise GuestMisbehaved(f"unknown protocol {protocol[:64]!r}") from None


def resolve(request: Indirect, pages: bytes) -> Transfer | Malformed:
    """Read an indirect request's segments from a private copy of its pages, in order."""
    return _transfer(request.id, request.operation, request.sector, request.segments, pages, 0)


def encode_segments(segments: Sequence[tuple[int, int, int]]) -> bytes:
    """Lay out (grant reference, first sector, last sector) triples, 8 bytes each."""
    flat = [number for segment in segments for number in segment]
    return _segments_of(len(segments))[0].pack(*flat)


class Response(NamedTuple):
    """The answer to the request of the same ``id``."""

    id: int
    operation: int
    status: int


encode_response: Callable[[int, int, int], bytes] = _RESPONSE.pack
"""``encode_response(id, operation, status)``: the first 12 bytes of a slot, no guest's or host's
stale byte among them."""


def failure(operation: int) -> int:
    """Return the status that says of a request that it failed."""
    return FLUSH_FAILED if operation in (FLUSH, WRITE_BARRIER) else ERROR


def decode_response(slot: bytes) -> Response:
    """Read an answer from a private copy of its slot."""
    return Response(*_RESPONSE.unpack_from(slot))


class Features(NamedTuple):
    """What a backend offers, as the keys of its directory say it.

    ``sectors`` counts 512 bytes; the two sector sizes and the discard granularity are bytes.
    """

    sectors: int
    sector_size: int = SECTOR
    physical_sector_size: int = 4096
    read_only: bool = False
    cdrom: bool = False
    flush: bool = True
    barrier: bool = True
    discard: bool = False
    secure_discard: bool = False
    discard_granularity: int = 4096
    persistent: bool = True
    max_indirect_segments: int = 256
    max_ring_page_order: int = 0
    max_queues: int = 1

    @property
    def info(self) -> int:
        """The ``VDISK_`` bits."""
        return (VDISK_CDROM | VDISK_REMOVABLE) * self.cdrom | VDISK_READONLY * self.read_only

    def to_keys(self) -> dict[str, str]:
        """All keys, with their values."""
        # sectors * 512 must be a multiple of physical-sector-size (blkif.h)
        physical = self.physical_sector_size
        while physical > self.sector_size and self.sectors * SECTOR % physical:
            physical //= 2
        keys = {
            "sectors": str(self.sectors),
            "sector-size": str(self.sector_size),
            "physical-sector-size": str(physical),
            "info": str(self.info),
            "feature-flush-cache": str(int(self.flush)),
            "feature-barrier": str(int(self.barrier)),
            "feature-persistent": str(int(self.persistent)),
            "feature-discard": str(int(self.discard)),
            "max-ring-page-order": str(self.max_ring_page_order),
            "max-ring-pages": str(1 << self.max_ring_page_order),  # the older spelling
            "multi-queue-max-queues": str(self.max_queues),
        }
        if self.max_indirect_segments:
            keys["feature-max-indirect-segments"] = str(self.max_indirect_segments)
        if self.discard:
            keys["discard-granularity"] = str(self.discard_granularity)
            keys["discard-alignment"] = "0"
            keys["discard-secure"] = str(int(self.secure_discard))
        return keys

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Features:
        """Read what a backend offers; absent keys mean what blkif.h says they mean."""

        def number(name: str, default: int) -> int:
            return int(keys.get(name, default))

        sector_size = number("sector-size", SECTOR)
        return cls(
            sectors=number("sectors", 0),
            sector_size=sector_size,
            physical_sector_size=number("physical-sector-size", sector_size),
            read_only=bool(number("info", 0) & VDISK_READONLY),
            cdrom=bool(number("info", 0) & VDISK_CDROM),
            flush=bool(number("feature-flush-cache", 0)),
            barrier=bool(number("feature-barrier", 0)),
            discard=bool(number("feature-discard", 0)),
            secure_discard=bool(number("discard-secure", 0)),
            discard_granularity=number("discard-granularity", sector_size),
            persistent=bool(number("feature-persistent", 0)),
            max_indirect_segments=number("feature-max-indirect-segments", 0),
            max_ring_page_order=number("max-ring-page-order", 0),
            max_queues=number("multi-queue-max-queues", 1),
        )


class Ring(NamedTuple):
    """One ring of a frontend: the references of its pages, and the port to be told through."""

    refs: tuple[int, ...]
    event_channel: int


class Connection(NamedTuple):
    """How a frontend can be reached, as the keys of its directory say it."""

    rings: tuple[Ring, ...]
    protocol: str | None = None
    persistent: bool = False

    def to_keys(self) -> dict[str, str]:
        """All keys, with their values, as Linux blkfront writes them."""
        keys = {"feature-persistent": str(int(self.persistent))}
        if self.protocol is not None:
            keys["protocol"] = self.protocol
        pages = len(self.rings[0].refs)
        if pages > 1:
            keys["ring-page-order"] = str(pages.bit_length() - 1)
        if len(self.rings) > 1:
            keys["multi-queue-num-queues"] = str(len(self.rings))
        for number, ring in enumerate(self.rings):
            where = f"queue-{number}/" if len(self.rings) > 1 else ""
            keys[f"{where}event-channel"] = str(ring.event_channel)
            for index, ref in enumerate(ring.refs):
                keys[f"{where}ring-ref{index if pages > 1 else ''}"] = str(ref)
        return keys

    @classmethod
    def from_keys(
        cls, read: Callable[[str], str | None], max_ring_page_order: int, max_queues: int = 1
    ) -> Connection:
        """Read a frontend's keys through ``read(name)``; every value is hostile input.

        Raises:
            GuestMisbehaved: a key is missing, no decimal number, or out of range.
        """

        def number(name: str, low: int, high: int, default: int | None = None) -> int:
            text = read(name)
            if text is None and default is not None:
                return default
            if text is None:
                raise GuestMisbehaved(f"frontend key {name} is missing")
            if text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high:
                return int(text)
            raise GuestMisbehaved(f"frontend key {name} is {text[:64]!r}")

        u32 = 0xFFFF_FFFF
        order = number("ring-page-order", 0, max_ring_page_order, default=0)
        queues = number("multi-queue-num-queues", 1, max_queues, default=1)

        def ring(where: str) -> Ring:
            names = [f"{where}ring-ref{index}" for index in range(1 << order)]
            if order == 0 and read(names[0]) is None:
                names = [f"{where}ring-ref"]  # both spellings of a one-page ring are in use
            return Ring(
                tuple(number(name, 0, u32) for name in names),
                number(f"{where}event-channel", 0, u32),
            )

        # A single queue stands in the directory itself, more in one of their own each.
        rings = [ring(f"queue-{index}/") for index in range(queues)] if queues > 1 else [ring("")]
        return cls(
            tuple(rings), read("protocol"), number("feature-persistent", 0, 1, default=0) == 1
        )
