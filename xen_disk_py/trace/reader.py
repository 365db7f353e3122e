"""Reads a trace, up to where it is cut or damaged; also one that is being written."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..errors import ImageError
from ..hypervisor import Closing
from ..named import NamedTuple
from ..text import printable
from .format import (
    BLOCK_HEADER_SIZE,
    HEADER_SIZE,
    SLOTS,
    STOPPED,
    BlockHeader,
    Damaged,
    Header,
    Record,
    unpack_data,
    unpack_records,
)

_COMPLETE = "complete"


class Ending(NamedTuple):
    """How far a trace could be read.

    Attributes:
        is_complete: recording was stopped, and all of it is there.
        is_damaged: something follows that cannot be read.
        at: byte of the file up to which it was read.
        text: one line for a person.
    """

    is_complete: bool
    is_damaged: bool
    at: int
    text: str

    @property
    def note(self) -> str | None:
        """A line for a person; None if it ends as somebody wanted it."""
        if not self.is_complete:
            return self.text
        return None if self.text == _COMPLETE else f"the recording ended by itself: {self.text}"


class Block(NamedTuple):
    """A block of a trace, and where it is.

    Attributes:
        at: its first byte in the file.
        header: see there.
        records: with their data, if that was asked for.
    """

    at: int
    header: BlockHeader
    records: list[Record]


class TraceReader(Closing):
    """An open trace.

    Args:
        path: of the file.

    Attributes:
        header: what it is of.
        first: the first block that is left; a ring has lost those before it.
        ending: how it ends; None until :meth:`blocks` or :meth:`records` have come to their end.

    Raises:
        ImageError: it cannot be read, or is no trace.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.ending: Ending | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error
        try:
            self.header = Header.parse(self._read(0, HEADER_SIZE), printable(path))
            self._starts = self._find_starts()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor of the file."""
        return self._fd

    @property
    def first(self) -> BlockHeader | None:
        """The header of the oldest block that is there; None: there is none."""
        if not self._starts:
            return None
        sequence, at, _ = self._starts[0]
        try:
            block = self._block(at, sequence, data=False)
        except Damaged:
            return None
        return block.header

    @property
    def lacks_beginning(self) -> bool:
        """Whether a ring has overwritten what was recorded first."""
        return bool(self._starts) and self._starts[0][0] > 0

    @property
    def notes(self) -> list[str]:
        """Lines for a person: what is missing at its end; nothing before that has been read."""
        note = None if self.ending is None else self.ending.note
        return [] if note is None else [f"{printable(self.path)}: {note}"]

    def records(self, *, data: bool = False) -> Iterator[Record]:
        """All records, in the order in which the storage had done them.

        Args:
            data: with what was written, if that was recorded; else that is not even read.
        """
        for block in self.blocks(data=data):
            yield from block.records

    def blocks(self, *, data: bool = False) -> Iterator[Block]:
        """All blocks, up to what cannot be read; then :attr:`ending` says why it ends there."""
        last: Block | None = None
        sequence = self._starts[0][0] if self._starts else 0
        at = HEADER_SIZE
        damage: str | None = None
        for first, start, end in self._starts:
            if first != sequence:
                damage = damage or f"block {sequence} is missing"
                break
            at, damage = start, None
            while at < end:
                try:
                    block = self._block(at, sequence, data=data)
                except Damaged as error:
                    damage = str(error)
                    break
                yield block
                last = block
                at += block.header.length
                sequence += 1
        self.ending = self._ending(last, at, damage)

    def _ending(self, last: Block | None, at: int, damage: str | None) -> Ending:
        if last is not None and last.records[-1].operation == STOPPED:
            return Ending(True, False, at, self._reason(last))
        size = os.fstat(self._fd).st_size
        if self.header.ring and damage and "missing" not in damage:
            damage = None  # behind the newest block of a ring there is an old one, or nothing
        if damage is None or at >= size:
            text = "it has no end: the disk is still recorded, or its process was killed"
            return Ending(False, False, at, text)
        what = "cut" if damage == "cut" else f"damaged ({damage})"
        return Ending(
            False, True, at, f"{what} at byte {at} of {size}: what was recorded later is not read"
        )

    def _reason(self, last: Block) -> str:
        """Why recording was stopped."""
        try:
            text = self._block(last.at, None, data=True).records[-1].data
        except Damaged as error:
            return str(error)
        return printable(text.decode(errors="replace")) if text else _COMPLETE

    def _find_starts(self) -> list[tuple[int, int, int]]:
        """Where blocks begin: the number of the first, its place, and the end of the area."""
        size = os.fstat(self._fd).st_size
        slot = self.header.slot
        if not slot:
            return [(0, HEADER_SIZE, size)] if size > HEADER_SIZE else []
        found = []
        for number in range(SLOTS):
            at = HEADER_SIZE + number * slot
            try:
                sequence = self._block(at, None, data=False).header.sequence
            except Damaged:
                continue
            found.append((sequence, at, min(size, at + slot)))
        return sorted(found)

    def _block(self, at: int, sequence: int | None, *, data: bool) -> Block:
        """Read the block at a place of the file.

        Args:
            at: in bytes.
            sequence: the number that it must have; None: any.
            data: with what was written.

        Raises:
            Damaged: it is not there.
        """
        seed = self.header.id
        head = self._read(at, BLOCK_HEADER_SIZE)
        header = BlockHeader.parse(head)
        if sequence is not None and header.sequence != sequence:
            raise Damaged(f"block {sequence} is not here")
        behind = at + BLOCK_HEADER_SIZE
        body = self._read(behind, header.body_length)
        records = list(unpack_records(seed, header, head, body))
        behind += len(body)
        if data and header.data_length:
            written = unpack_data(seed, header, body, self._read(behind, header.data_length))
            records = [each._replace(data=it) for each, it in zip(records, written)]
        elif behind + header.data_length > os.fstat(self._fd).st_size:
            raise Damaged("cut")
        return Block(at, header, records)

    def _read(self, at: int, length: int) -> bytes:
        parts = []
        while length:
            part = self._pread(at, length)
            if not part:
                break
            parts.append(part)
            at += len(part)
            length -= len(part)
        return b"".join(parts)

    def _pread(self, at: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, at)
        except OSError as error:
            raise ImageError(f"{printable(self.path)}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
