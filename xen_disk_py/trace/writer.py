"""Writes a trace: blocks behind one another, or round and round in a ring."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

from ..errors import ImageError
from ..hypervisor import Closing
from .format import (
    EVENTS,
    FLUSH,
    HEADER_SIZE,
    MAX_BODY,
    MAX_DATA,
    NO_QUEUE,
    RECORD_SIZE,
    SLOTS,
    Fields,
    Header,
    Record,
    entries,
    pack_block,
    pack_head,
)
from .reader import TraceReader

_PIECES = 1024  # for pwritev: IOV_MAX of Linux


class TraceWriter(Closing):
    """A trace that grows; one thread calls it.

    Args:
        fd: of the file, whose header is there; closed with this.
        header: that one.
        sequence, requests, flushes: of blocks, requests and good flushes that are there.
        at: where the next block begins, in bytes.
    """

    def __init__(
        self,
        fd: int,
        header: Header,
        *,
        sequence: int = 0,
        requests: int = 0,
        flushes: int = 0,
        at: int = HEADER_SIZE,
    ) -> None:
        self.fd = fd
        self.header = header
        self.sequence = sequence
        self.requests = requests
        self.flushes = flushes
        self.at = at

    @classmethod
    def create(cls, path: str, header: Header) -> TraceWriter:
        """Make a new file, for its owner alone.

        Raises:
            ImageError: there is one of that name, or it cannot be made.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ImageError(
                f"{path}: exists, and a trace is never overwritten: give another name, or remove it"
            ) from None
        except FileNotFoundError as error:
            directory = os.path.dirname(path)
            raise ImageError(
                f"{path}: there is no directory {directory}: make it first (mkdir -p {directory})"
            ) from error
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error
        try:
            _write(fd, header.pack(), 0)
        except OSError as error:
            os.close(fd)
            os.unlink(path)
            raise ImageError(f"{path}: {error.strerror}") from error
        return cls(fd, header)

    @classmethod
    def resume(cls, fd: int, reader: TraceReader) -> TraceWriter:
        """Append to a trace that another process has begun; what cannot be read is cut off.

        Args:
            fd: of the file, open for writing; closed with the writer.
            reader: of the same file.

        Raises:
            ImageError: it cannot be read.
            OSError: it cannot be cut.
        """
        sequence = requests = flushes = 0
        at = HEADER_SIZE
        for block in reader.blocks():
            sequence = block.header.sequence + 1
            requests = block.header.requests + sum(each.is_request for each in block.records)
            flushes = block.header.flushes + sum(map(is_good_flush, block.records))
            at = block.at + block.header.length
        if not reader.header.ring:
            os.ftruncate(fd, at)
        _write(fd, reader.header.pack(), 0)  # of this version, if an older program has begun it
        return cls(fd, reader.header, sequence=sequence, requests=requests, flushes=flushes, at=at)

    def append(self, records: Sequence[Record]) -> None:
        """Write records, in as many blocks as it takes; their numbers are not looked at.

        Raises:
            OSError: they cannot be written; nothing of the last block counts.
        """
        packed: list[Fields] = []
        data: list[bytes] = []
        size = requests = flushes = 0
        for record in records:
            written = record.data or b""
            is_full = len(packed) == MAX_BODY // RECORD_SIZE
            if packed and (is_full or size + len(written) > MAX_DATA):
                self.write(packed, data, requests=requests, flushes=flushes)
                packed, data = [], []
                size = requests = flushes = 0
            packed.append(fields_of(record))
            if written:
                data.append(written)
                size += len(written)
            requests += record.operation < EVENTS
            flushes += is_good_flush(record)
        if packed:
            self.write(packed, data, requests=requests, flushes=flushes)

    def write(
        self, records: Sequence[Fields], data: Sequence[bytes], *, requests: int, flushes: int
    ) -> None:
        """Write one block.

        Args:
            records: as :func:`~.format.pack_block` takes them.
            data: the same.
            requests: how many of the records are requests.
            flushes: how many of these are flushes that succeeded.

        Raises:
            OSError: it cannot be written; nothing of it counts.
        """
        parts = pack_block(
            self.header.id, self.sequence, self.requests, self.flushes, records, data
        )
        self._append(parts, requests, flushes)

    def write_packed(
        self,
        body: bytes | memoryview,
        data: Sequence[bytes | memoryview],
        *,
        requests: int,
        flushes: int,
    ) -> None:
        """Write one block; without a copy of what is in it.

        Args:
            body: the records, packed.
            data: what was written, in pieces.
            requests: as for :meth:`write`.
            flushes: the same.

        Raises:
            OSError: it cannot be written; nothing of it counts.
        """
        head = pack_head(self.header.id, self.sequence, self.requests, self.flushes, body, data)
        self._append([head, body, *data], requests, flushes)

    def write_what_fits(
        self, error: OSError, body: bytes | memoryview, data: Sequence[bytes | memoryview]
    ) -> None:
        """Write the records of a block that could not be written, up to where there is no room.

        Args:
            error: why it could not; nothing is written if that was not for want of room.
            body: as for :meth:`write_packed`.
            data: the same.
        """
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        first = start = 0
        written = memoryview(b"".join(data))
        with suppress(OSError):
            for size, length, requests, flushes in entries(body):
                part, its = body[first : first + size], written[start : start + length]
                self.write_packed(part, [its], requests=requests, flushes=flushes)
                first, start = first + size, start + length

    def describe(self, header: Header) -> None:
        """Write the header anew, which says more than it did; from any thread.

        Raises:
            OSError: it cannot be written.
        """
        _write(self.fd, header.pack(), 0)
        self.header = header

    def _append(self, parts: Sequence[bytes | memoryview], requests: int, flushes: int) -> None:
        at = self._place(sum(map(len, parts)))
        for first in range(0, len(parts), _PIECES):
            pieces = parts[first : first + _PIECES]
            length = sum(map(len, pieces))
            done = os.pwritev(self.fd, pieces, at)
            if done < length:
                _write(self.fd, b"".join(pieces)[done:], at + done)
            at += length
        self.at = at
        self.sequence += 1
        self.requests += requests
        self.flushes += flushes

    def _place(self, length: int) -> int:
        """Where a block of so many bytes goes."""
        slot = self.header.slot
        if not slot:
            return self.at
        number, used = divmod(self.at - HEADER_SIZE, slot)
        if self.at > HEADER_SIZE and not used:  # the last one filled its slot to the end
            return HEADER_SIZE + number % SLOTS * slot
        if used + length <= slot:
            return self.at
        return HEADER_SIZE + (number + 1) % SLOTS * slot

    def cut(self) -> None:
        """Remove what a block that could not be written has left, for its room.

        Raises:
            OSError: it cannot be removed.
        """
        if not self.header.ring:
            os.ftruncate(self.fd, self.at)

    def sync(self) -> None:
        """Return when all of it is on stable storage.

        Raises:
            OSError: it is not.
        """
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def is_good_flush(record: Record) -> bool:
    """Whether it is a flush that succeeded."""
    return record.operation == FLUSH and not record.status


def fields_of(record: Record) -> Fields:
    """Return what a record is packed from; its data is packed by itself."""
    return (
        record.start,
        record.latency,
        record.offset,
        record.length,
        len(record.data or b""),
        record.status,
        record.queue,
        record.operation,
    )


def event(operation: int, start: int, *, size: int = 0, lost: int = 0, text: str = "") -> Record:
    """Make the record of an event.

    Args:
        operation: see :class:`Record`.
        start: nanoseconds since the trace began.
        size: of the disk from now on, in bytes.
        lost: so many requests were not recorded.
        text: why, for people.
    """
    return Record(0, operation, start, 0, size, lost, 0, NO_QUEUE, text.encode() or None)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view = view[count:]
        at += count
