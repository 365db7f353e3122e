"""A moment of a recorded disk: what it is called, and what the disk had then."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from datetime import datetime, timedelta, timezone
from zlib import crc32

from ..errors import ImageError, UsageError
from ..named import NamedTuple
from ..text import printable
from ..units import format_size, parse_duration
from .extents import BYTES_PER_EXTENT, Extents
from .format import (
    BLOCK_HEADER_SIZE,
    DISCARD,
    DISCARD_SECURELY,
    FLUSH,
    GAP,
    RESIZED,
    WRITE,
    Header,
    Record,
)
from .powercut import ZEROS, Change, Extent
from .reader import TraceReader

_COUNTED = re.compile(r"(flush|request):(\d{1,18})", re.ASCII)
_DISCARDS = (DISCARD, DISCARD_SECURELY)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


class Moment(NamedTuple):
    """When.

    Attributes:
        kind: ``flush`` or ``request``: when that one was over, the first flush is 1, the first
            request 0; ``after``: so many nanoseconds after recording began; ``at``: nanoseconds
            since 1970; ``end``.
        value: the number.
    """

    kind: str
    value: int = 0

    @classmethod
    def parse(cls, text: str) -> Moment:
        """Read ``flush:17``, ``request:400``, ``12.5s``, ``2026-11-28T07:30:00`` or ``end``.

        Raises:
            UsageError: it is none of these.
        """
        if text == "end":
            return cls("end")
        match = _COUNTED.fullmatch(text)
        if match is not None:
            return cls(match[1], int(match[2]))
        try:
            return cls("after", round(parse_duration(text) * 1e9))
        except (UsageError, OverflowError):
            pass
        try:
            when = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
            return cls("at", (when.astimezone(timezone.utc) - _EPOCH) // _MICROSECOND * 1000)
        except (ValueError, OverflowError):
            raise UsageError(
                f"{text!r} is no moment of a trace: give flush:N, request:N, end, a time since the "
                "recording began, such as 12.5s, or one of the clock, such as 2026-11-28T07:30:00"
            ) from None

    def nanoseconds(self, header: Header) -> int | None:
        """Return the time that it means, since the recording began; None: it is no time."""
        if self.kind == "at":
            return self.value - header.started
        return self.value if self.kind == "after" else None


class Reach(NamedTuple):
    """Which moments of a trace there are: up to its end, or to what was not recorded.

    Attributes:
        request: the number of the last one; -1: there is none.
        flushes: how many have succeeded.
        time: of the last record, in nanoseconds since the recording began.
    """

    request: int
    flushes: int
    time: int

    @classmethod
    def of(cls, reader: TraceReader, ends: Container[int] = (GAP,)) -> Reach:
        """Read a trace for that, without its data, up to one of these operations."""
        request, flushes, time = -1, 0, 0
        for record in reader.records():
            if record.operation in ends:
                break
            time = max(time, record.end)
            request += record.is_request
            flushes += record.operation == FLUSH and not record.status
        return cls(request, flushes, time)

    def has(self, moment: Moment, header: Header) -> bool:
        """Whether that moment is one of them."""
        time = moment.nanoseconds(header)
        if time is not None:
            return 0 <= time <= self.time
        last = {"request": self.request, "flush": self.flushes, "end": 0}
        return moment.value <= last[moment.kind]

    def lacking(self, moment: Moment, reader: TraceReader) -> str:
        """Say that a moment is none of them, and which they are."""
        is_before = (moment.nanoseconds(reader.header) or 0) < 0
        what = "was begun after" if is_before else "ends before"
        # Each of these can be given: no fraction beyond the last record, none before the first.
        began = _EPOCH - -reader.header.started // 1000 * _MICROSECOND
        ended = _EPOCH + (reader.header.started + self.time) // 1000 * _MICROSECOND
        times = (each.isoformat().replace("+00:00", "Z") for each in (began, ended))
        ranges = [
            f"flush:0 to flush:{self.flushes}",
            f"0s to {self.time // 1000 / 1e6:.6f}s",
            " to ".join(times),
        ]
        if self.request >= 0:
            ranges.insert(0, f"request:0 to request:{self.request}")
        ending = reader.ending
        why = f" ({ending.text})" if ending is not None and not ending.is_complete else ""
        return f"{printable(reader.path)}: {what} that moment{why}: it has {', '.join(ranges)}"


class Rewound(NamedTuple):
    """What a disk had at a moment.

    Attributes:
        size: bytes.
        extents: what was written; the sources are bytes of the trace's file.
        requests, flushes: how many were over.
        time: when the last of them was over, in nanoseconds since the recording began.
        failed: how many writes had failed: what they left is not known, and not in the extents.
        notes: lines for a person: what is to be known of it.
    """

    size: int
    extents: Extents
    requests: int
    flushes: int
    time: int
    failed: int
    notes: tuple[str, ...]


def check_usable(reader: TraceReader) -> None:
    """See that a disk can be made again of a trace.

    Raises:
        ImageError: it cannot; the message says why.
    """
    name = printable(reader.path)
    if not reader.header.data:
        raise ImageError(
            f"{name}: has no data of the writes, so the disk cannot be made again: record with "
            "--filter record:file=FILE,data=yes"
        )
    if reader.lacks_beginning:
        raise ImageError(
            f"{name}: a ring that has overwritten its beginning, so the disk cannot be made again: "
            "record with a larger ring=, or without"
        )


def unchecked(reader: TraceReader) -> list[str]:
    """Say it, if nobody can tell whether an image is what the disk was when recording began."""
    if reader.header.samples:
        return []
    return [
        f"{printable(reader.path)}: has no samples of what the disk was when recording began, so "
        "that the base is the right image is not checked"
    ]


def sources(reader: TraceReader) -> Iterator[tuple[Record, int]]:
    """All records without their data, each with the byte of the file where its data begins.

    The checksums are looked at.
    """
    for block in reader.blocks(data=True):
        at = block.at + BLOCK_HEADER_SIZE + block.header.body_length
        for record in block.records:
            here, data = at, record.data
            at += len(data) if data is not None else 0
            yield record._replace(data=None), here
            if record.operation == WRITE and len(data or b"") != record.length:
                raise ImageError(
                    f"{printable(reader.path)}: a damaged trace: request {record.number} has no "
                    "data"
                )


def change_of(record: Record, source: int) -> Change | None:
    """Return what a record changes on the disk; None: nothing."""
    if not record.length or record.operation not in (WRITE, *_DISCARDS):
        return None
    return Change(
        record.number,
        record.start,
        record.end,
        record.offset,
        record.length,
        source if record.operation == WRITE else ZEROS,
        not record.status,
    )


def rewind(reader: TraceReader, moment: Moment, *, room: int) -> Rewound:
    """Find what the disk had at a moment: all that the storage had done by then.

    Args:
        reader: the trace.
        moment: when.
        room: bytes of memory that may be taken.

    Raises:
        ImageError: the trace does not reach to that moment, or misses something before it.
    """
    check_usable(reader)
    name = printable(reader.path)
    extents, size = Extents(), reader.header.size
    requests = flushes = time = failed = 0
    until = moment.nanoseconds(reader.header)
    if until is not None and until < 0:
        raise ImageError(Reach.of(reader).lacking(moment, reader))
    is_found = moment in (("flush", 0), ("end", 0))
    if moment != ("flush", 0):
        for record, source in sources(reader):
            if until is not None and record.end > until:
                is_found = True
                break
            if record.operation == GAP:
                raise ImageError(
                    f"{name}: requests were not recorded after request {requests - 1}: only what "
                    f"was before can be made again, such as --at request:{max(requests - 1, 0)}"
                )
            time = max(time, record.end)
            requests += record.is_request
            if record.operation == RESIZED:
                size = record.offset
            elif record.operation == FLUSH and not record.status:
                flushes += 1
            change = change_of(record, source)
            if change is not None and not change.is_certain:
                failed += record.operation == WRITE
            elif change is not None:
                extents.put(Extent(change.offset, change.length, change.source))
                if extents.memory > room:
                    raise ImageError(
                        f"{name}: more than {room // BYTES_PER_EXTENT} extents were written by "
                        f"then: that takes more than {format_size(room)} of memory, which this "
                        "host does not have: choose an earlier moment"
                    )
            if moment == ("flush", flushes) or (
                record.is_request and moment == ("request", record.number)
            ):
                is_found = True
                break
    if not is_found and until != time:
        raise ImageError(Reach(requests - 1, flushes, time).lacking(moment, reader))
    notes = unchecked(reader)
    if moment.kind == "end":
        notes += reader.notes
    if failed:
        notes.append(
            f"{name}: {failed} writes had failed by then: what they left on the disk is not known"
        )
    return Rewound(size, extents, requests, flushes, time, failed, tuple(notes))


def check_base(header: Header, fd: int, size: int, path: str, trace: str) -> None:
    """See that an image is what the disk was when recording began, as far as one can see.

    Args:
        header: of the trace.
        fd: the image.
        size: its bytes.
        path: its name.
        trace: the name of the trace.

    Raises:
        ImageError: it is not.
    """
    name = printable(path)
    what = (
        f"give the image as it was when {printable(trace)} was begun; of one that was written "
        "since, a copy that was made before"
    )
    if size != header.size:
        raise ImageError(f"{name}: has {size} bytes, the disk of the trace {header.size}: {what}")
    for at, crc in header.samples:
        length = min(header.sample, size - at)
        data = bytearray()
        while len(data) < length:
            try:
                part = os.pread(fd, length - len(data), at + len(data))
            except OSError as error:
                raise ImageError(f"{name}: {error.strerror}") from error
            if not part:
                break
            data += part
        if crc32(data) != crc:
            raise ImageError(
                f"{name}: is not what the disk was when recording began: byte {at} and those after "
                f"it differ: {what}"
            )
