"""The layout of a trace, bytes ⇄ values (pure); docs/trace.md describes it.

A header of 4096 bytes, then blocks of records, each with its number and two checksums. Both are
seeded with 16 random bytes of the header: what a guest writes is in the file, too, and nothing
that it can write is taken for a block. Requests that a queue did one after another are one record
with columns behind it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import chain
from typing import Any
from zlib import crc32

from ..errors import ImageError
from ..named import NamedTuple

MAGIC = b"xen-disk trace\0\0"
VERSION = 2
"""1 had no batches; it is read, too."""
HEADER_SIZE = 4096
SLOTS = 8
"""Equal parts of a ring, each written from its beginning when its turn comes."""
MIN_RING = 64 << 20
"""Bytes; a slot must be longer than the longest block."""
MAX_BODY = 44 << 16
"""Bytes of the records of one block."""
MAX_DATA = 4 << 20
"""Bytes that were written, in one block. A longer write is several records."""

READ, WRITE, FLUSH, DISCARD, DISCARD_SECURELY = range(5)
OPERATIONS = ("read", "write", "flush", "discard", "secure discard")
EVENTS = 128
"""Operations from here on are no requests."""
RESIZED, GAP, STOPPED, RESUMED = range(EVENTS, EVENTS + 4)
BATCH = 255
"""A record's operation, in the file: so many requests as it has bytes, in columns behind it."""
_EVENT_NAMES = {RESIZED: "resized", GAP: "gap", STOPPED: "stopped", RESUMED: "resumed"}

UNKNOWN_ERROR = 0xFFFF
"""A status: it failed, and no errno was given."""
NO_QUEUE = -1

# magic, version, length of the JSON that follows, 16 random bytes, CRC-32 of these and the JSON
_PREFIX = struct.Struct("<16sII16sI")
# magic, bytes of the records, number of the block, requests before it, flushes before it, bytes of
# data; CRC-32 of the data; CRC-32 of all this and the records
_BLOCK = struct.Struct("<4sIQQQQII")
_BLOCK_MAGIC = b"XDTC"
_EARLIER_MAGIC = b"XDTB"  # has the number of records for their bytes
# start, latency (nanoseconds), offset, length (bytes), bytes of data, status, queue, operation
_RECORD = struct.Struct("<QQQQIHhB3x")
BLOCK_HEADER_SIZE = _BLOCK.size
RECORD_SIZE = _RECORD.size
BATCHED_SIZE = 8 + 8 + 4 + 1
"""Bytes of a request of a batch: its end, sector, length (if they differ) and operation."""
_SECTOR = 512
_SECTORS = 1 << 54
pack_record_into = _RECORD.pack_into
"""Put a record into a buffer: the buffer, where, and its :data:`Fields` one by one."""
Fields = tuple[int, int, int, int, int, int, int, int]
"""Of a record: start, latency, offset, length, bytes of data, status, queue, operation."""


class Damaged(Exception):
    """What is here is no block of this trace."""


@dataclass(frozen=True)
class Header:
    """What a trace is of.

    Attributes:
        size: of the disk when recording began, in bytes.
        sector_size: of the disk, in bytes.
        started: when recording began, nanoseconds since 1970. Records count from then.
        clock: what ``CLOCK_MONOTONIC`` showed then, in nanoseconds.
        boot: the boot id of the host whose clock that was.
        data: whether what was written is there.
        ring: bytes of all slots together; 0: the file grows.
        guest, vdev, backend: text for people; None: not known.
        path: of the disk's image, absolute; None: it has none.
        samples: what the disk held when recording began: where, in bytes, and the CRC-32 of the
            bytes from there on, :attr:`sample` of them or up to the end.
        sample: length of a sample, in bytes.
        id: 16 random bytes.
    """

    size: int
    sector_size: int
    started: int
    clock: int
    id: bytes = field(repr=False)
    boot: str = ""
    data: bool = False
    ring: int = 0
    guest: str | None = None
    vdev: str | None = None
    backend: str | None = None
    path: str | None = None
    samples: Sequence[tuple[int, int]] = ()
    sample: int = 4096

    @property
    def slot(self) -> int:
        """Bytes of a slot of the ring; 0: there is none."""
        return self.ring // SLOTS // HEADER_SIZE * HEADER_SIZE

    def pack(self) -> bytes:
        """Return the first 4096 bytes of the file."""
        facts = {name: value for name, value in asdict(self).items() if name != "id"}
        text = json.dumps(facts).encode()
        for spare in ("path", "guest", "backend"):
            if len(text) > HEADER_SIZE - _PREFIX.size:
                facts[spare] = None
                text = json.dumps(facts).encode()
        crc = crc32(text, crc32(self.id))
        page = _PREFIX.pack(MAGIC, VERSION, len(text), self.id, crc) + text
        return page.ljust(HEADER_SIZE, b"\0")

    @classmethod
    def parse(cls, page: bytes, name: str) -> Header:
        """Read the first 4096 bytes of the file ``name``, which anybody may have written.

        Raises:
            ImageError: it is no trace, or not one that can be understood.
        """
        if not page.startswith(MAGIC):
            raise ImageError(
                f"{name}: not a trace: give a file that --filter record or xen-disk record has made"
            )
        if len(page) < HEADER_SIZE:
            raise ImageError(f"{name}: a trace that was cut in its header: nothing of it is left")
        _, version, length, seed, crc = _PREFIX.unpack_from(page)
        if version not in (1, VERSION):
            raise ImageError(
                f"{name}: a trace of version {version}, this program knows {VERSION}: use the "
                "xen-disk that made it"
            )
        text = page[_PREFIX.size :][:length]
        if crc32(text, crc32(seed)) != crc:
            raise ImageError(f"{name}: a damaged trace: the checksum of its header is wrong")
        header = _header(text, seed)
        if header is None:
            raise ImageError(f"{name}: a damaged trace: its header makes no sense")
        return header


def _header(text: bytes, seed: bytes) -> Header | None:
    """Make a header of JSON that anybody may have written; None if it makes no sense."""
    try:
        facts = json.loads(text)
        known = {each.name for each in fields(Header)} - {"id"}
        facts = {key: value for key, value in facts.items() if key in known}
        samples = tuple((int(at), int(crc)) for at, crc in facts.pop("samples", ()))
        header = Header(id=seed, samples=samples, **facts)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    numbers = (header.size, header.sector_size, header.started, header.clock, header.ring)
    texts = (header.guest, header.vdev, header.backend, header.path)
    sane = (
        all(type(each) is int and 0 <= each < 1 << 63 for each in numbers)
        and all(each is None or isinstance(each, str) for each in texts)
        and isinstance(header.boot, str)
        and isinstance(header.data, bool)
        and header.sector_size in (512, 1024, 2048, 4096)
        and not header.size % header.sector_size
        and (not header.ring or header.ring >= MIN_RING)
        and type(header.sample) is int
        and 0 < header.sample <= 1 << 20
        and all(0 <= at < header.size for at, _ in samples)
    )
    return header if sane else None


class Record(NamedTuple):
    """A request, or an event between requests.

    Attributes:
        number: of the request, counted from 0 over the whole trace; of an event, that of the
            request that follows.
        operation: :data:`READ` … :data:`DISCARD_SECURELY`; or :data:`RESIZED` (``offset`` is the
            new size), :data:`GAP` (``length`` requests were not recorded, 0: nobody knows how
            many), :data:`STOPPED` (``data`` says why), :data:`RESUMED` (by another process).
        start: when the storage was asked, in nanoseconds since ``Header.started``.
        latency: nanoseconds until it had done it.
        offset, length: bytes of the disk; of a request that was done in part, the part.
        status: 0, or the errno; :data:`UNKNOWN_ERROR`.
        queue: its number; :data:`NO_QUEUE`: not known.
        data: what was written; None: not recorded, or not read. A write that failed has it, too:
            any part of it may be on the disk.
    """

    number: int
    operation: int
    start: int
    latency: int
    offset: int
    length: int
    status: int = 0
    queue: int = NO_QUEUE
    data: bytes | None = None

    @property
    def end(self) -> int:
        """When the storage had done it, in nanoseconds since ``Header.started``."""
        return self.start + self.latency

    @property
    def is_request(self) -> bool:
        """Whether it is one, rather than an event."""
        return self.operation < EVENTS

    @property
    def name(self) -> str:
        """The operation, for people."""
        if self.operation < len(OPERATIONS):
            return OPERATIONS[self.operation]
        return _EVENT_NAMES.get(self.operation, f"operation {self.operation}")


class BlockHeader(NamedTuple):
    """The first bytes of a block.

    Attributes:
        body_length: bytes of the records.
        sequence: its number, counted from 0 over the whole trace.
        requests, flushes: how many were before it, over the whole trace. Only flushes that
            succeeded count.
        data_length: bytes of data behind the records.
        data_crc: the checksum of the data.
        crc: that of this header and the records.
        has_batches: the records may be some.
    """

    body_length: int
    sequence: int
    requests: int
    flushes: int
    data_length: int
    data_crc: int
    crc: int
    has_batches: bool = True

    @property
    def length(self) -> int:
        """Bytes of the whole block."""
        return BLOCK_HEADER_SIZE + self.body_length + self.data_length

    @classmethod
    def parse(cls, head: bytes) -> BlockHeader:
        """Read the first bytes of a block; they are not to be trusted before :func:`unpack`.

        Raises:
            Damaged: there is no block here.
        """
        if len(head) < BLOCK_HEADER_SIZE:
            raise Damaged("cut")
        magic, length, *known = _BLOCK.unpack_from(head)
        is_earlier = magic == _EARLIER_MAGIC
        body_length = length * RECORD_SIZE if is_earlier else length
        header = cls(body_length, *known)._replace(has_batches=not is_earlier)
        if (
            magic not in (_BLOCK_MAGIC, _EARLIER_MAGIC)
            or not 0 < header.body_length <= MAX_BODY
            or header.data_length > MAX_DATA
        ):
            raise Damaged("no block begins here")
        return header


def pack_block(
    seed: bytes,
    sequence: int,
    requests: int,
    flushes: int,
    records: Sequence[Fields],
    data: Sequence[bytes],
) -> tuple[bytes, bytes]:
    """Return a block, in two parts.

    Args:
        seed: ``Header.id``.
        sequence: the number of the block.
        requests: how many were before it, over the whole trace.
        flushes: the same, of those that succeeded.
        records: at most :data:`MAX_BODY` bytes when packed.
        data: of those records that have some, in their order; at most :data:`MAX_DATA` bytes.
    """
    written = b"".join(data)
    body = struct.pack(f"<{_RECORD.format[1:] * len(records)}", *chain.from_iterable(records))
    return pack_head(seed, sequence, requests, flushes, body, [written]) + body, written


def pack_head(
    seed: bytes,
    sequence: int,
    requests: int,
    flushes: int,
    body: bytes | memoryview,
    data: Sequence[bytes | memoryview],
) -> bytes:
    """Return what stands before the records of a block.

    Args:
        seed: as for :func:`pack_block`.
        sequence: the same.
        requests: the same.
        flushes: the same.
        body: the records, as :data:`pack_record_into` and :func:`pack_batch_into` have them.
        data: what was written, in pieces.
    """
    start = data_crc = crc32(seed)
    length = 0
    for piece in data:
        data_crc = crc32(piece, data_crc)
        length += len(piece)
    fields_ = (_BLOCK_MAGIC, len(body), sequence, requests, flushes, length)
    head = _BLOCK.pack(*fields_, data_crc, 0)[:-4]
    return head + struct.pack("<I", crc32(body, crc32(head, start)))


def unpack_records(seed: bytes, header: BlockHeader, head: bytes, body: bytes) -> Iterator[Record]:
    """Check a block's records against their checksum, and return them without their data.

    Args:
        seed: ``Header.id``.
        header: from :meth:`BlockHeader.parse`.
        head: the bytes that it was made of.
        body: ``body_length`` bytes.

    Raises:
        Damaged: the checksum is wrong, or the records make no sense.
    """
    if len(body) < header.body_length:
        raise Damaged("cut")
    if crc32(body, crc32(head[: BLOCK_HEADER_SIZE - 4], crc32(seed))) != header.crc:
        raise Damaged("the checksum of the records is wrong")
    return _records(header, body)


def _records(header: BlockHeader, body: bytes) -> Iterator[Record]:
    number = header.requests
    for start, latency, offset, length, _, status, queue, operation in _unpacked(header, body):
        yield Record(number, operation, start, latency, offset, length, status, queue)
        if operation < EVENTS:
            number += 1


def _unpacked(header: BlockHeader, body: bytes) -> Iterator[Fields]:
    """The records, and each request of a batch by itself.

    Raises:
        Damaged: they make no sense.
    """
    at, end = 0, len(body)
    while at < end:
        if end - at < RECORD_SIZE:
            raise Damaged("the records make no sense")
        record: Fields = _RECORD.unpack_from(body, at)
        at += RECORD_SIZE
        if record[-1] != BATCH or not header.has_batches:
            yield record
        else:
            count, has_lengths = record[3], not record[1]
            if not 0 < count <= (end - at) // (BATCHED_SIZE if has_lengths else BATCHED_SIZE - 4):
                raise Damaged("the records make no sense")
            columns = _columns(count, has_lengths=has_lengths)
            yield from _batched(record, columns.unpack_from(body, at))
            at += columns.size


def entries(body: bytes | memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Of each record or batch that was packed here: bytes, of its data, requests, good flushes."""
    at = 0
    while at < len(body):
        _, length, _, count, data, status, _, operation = _RECORD.unpack_from(body, at)
        size, requests = RECORD_SIZE, int(operation < EVENTS)
        if operation == BATCH:
            size += count * (BATCHED_SIZE - 4 if length else BATCHED_SIZE)
            requests = count
        yield size, data, requests, int(operation == FLUSH and not status)
        at += size


def _batched(record: Fields, columns: Sequence[int]) -> Iterator[Fields]:
    start, length_of_all, origin, count, data, _, queue, _ = record
    ends, sectors, operations = columns[:count], columns[count : 2 * count], columns[-count:]
    lengths = [length_of_all] * count if length_of_all else columns[2 * count : 3 * count]
    for at, sector, length, operation in zip(ends, sectors, lengths, operations):
        latency = at - origin
        if latency < 0 or operation not in (READ, WRITE) or sector >= _SECTORS:
            raise Damaged("the records make no sense")
        written = length if data and operation == WRITE else 0
        yield (start, latency, sector * _SECTOR, length, written, 0, queue, operation)
        start += latency
        origin = at


@lru_cache(maxsize=64)
def _columns(count: int, *, has_lengths: bool) -> struct.Struct:
    return struct.Struct(f"<{count}Q{count}Q{count if has_lengths else 0}I{count}B")


@lru_cache(maxsize=512)
def _batch(count: int) -> struct.Struct:
    return struct.Struct(f"{_RECORD.format}{2 * count}Q{count}I{count}s")


@lru_cache(maxsize=512)
def _alike(count: int) -> struct.Struct:
    return struct.Struct(f"{_RECORD.format}{2 * count}Q{count}s")


def pack_batch_into(
    buffer: bytearray | memoryview,
    at: int,
    began: int,
    clock: int,
    ends: Sequence[int],
    lengths: Sequence[int],
    offsets: Sequence[int],
    operations: bytes,
    data_length: int,
    queue: int,
) -> int:
    """Put reads and writes that succeeded, each begun when the one before was over, into a buffer.

    Args:
        buffer: there must be room for a record and :data:`BATCHED_SIZE` for each of them.
        at: where.
        began: when the first was, by ``CLOCK_MONOTONIC``, in nanoseconds.
        clock: what that showed when the trace began.
        ends: when each was over, by the same clock.
        lengths: of each, in bytes.
        offsets: where each began on the disk, in bytes; multiples of 512.
        operations: a byte for each.
        data_length: of all writes together; 0: their data is not recorded.
        queue: its number.

    Returns:
        How many bytes it takes.
    """
    count, length = len(ends), lengths[0]
    start, sectors = began - clock, [offset >> 9 for offset in offsets]
    if lengths.count(length) == count:  # nearly always
        layout, head = _alike(count), (start, length, began, count, data_length, 0, queue, BATCH)
        layout.pack_into(buffer, at, *head, *ends, *sectors, operations)
    else:
        layout, head = _batch(count), (start, 0, began, count, data_length, 0, queue, BATCH)
        layout.pack_into(buffer, at, *head, *ends, *sectors, *lengths, operations)
    return layout.size


def unpack_data(seed: bytes, header: BlockHeader, body: bytes, data: bytes) -> list[bytes | None]:
    """Check a block's data against its checksum, and return what belongs to each record.

    Raises:
        Damaged: the checksum is wrong, or the lengths make no sense.
    """
    if len(data) < header.data_length:
        raise Damaged("cut")
    if crc32(data, crc32(seed)) != header.data_crc:
        raise Damaged("the checksum of the data is wrong")
    lengths = [fields_[4] for fields_ in _unpacked(header, body)]
    if sum(lengths) != len(data):
        raise Damaged("the lengths of the data make no sense")
    found: list[bytes | None] = []
    at = 0
    for length in lengths:
        found.append(data[at : at + length] if length else None)
        at += length
    return found


def status_of(error: BaseException) -> int:
    """Return what a record says of an error."""
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) and 0 < number < UNKNOWN_ERROR else UNKNOWN_ERROR


def as_json(record: Record) -> Mapping[str, Any]:
    """Return a record as ``--json`` shows it, without its data."""
    facts: dict[str, Any] = {
        "number": record.number,
        "operation": record.name,
        "start_ns": record.start,
        "latency_ns": record.latency,
        "offset": record.offset,
        "length": record.length,
        "status": record.status,
    }
    if record.queue != NO_QUEUE:
        facts["queue"] = record.queue
    return facts
