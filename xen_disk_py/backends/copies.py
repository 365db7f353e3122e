"""Copies of what was written since the last flush that is known to be good, to write it again.

Two keep such: the datapath, for a file whose flush has failed, and the NBD client, for a server
that has gone away. Which sectors of an overlay no flush covers is another matter (see
:mod:`.overlay.unflushed`): its data stays in the file, so there is no bound for it, and no copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Union

Data = Union[bytes, bytearray, memoryview]
Piece = tuple[int, Data]
"""Where it begins on the disk, in bytes, and what is there."""


class Copies:
    """Writes in the order of their answers, each with a number. Nothing here is locked.

    Attributes:
        size: bytes of all copies.
    """

    def __init__(self) -> None:
        self.size = 0
        self._first = 0  # the number of the oldest, counted from the first ever
        self._writes: deque[tuple[Piece, ...]] = deque()  # each in pieces

    @property
    def end(self) -> int:
        """The number that the next will have."""
        return self._first + len(self._writes)

    def add(self, offset: int, data: Data) -> None:
        """Keep what was written ``offset`` bytes into the disk."""
        self._writes.append(((offset, data),))
        self.size += len(data)

    def forget(self, offset: int, length: int) -> None:
        """Cut an extent out of all copies: it was discarded."""
        self._writes = deque(
            tuple(left for piece in write for left in cut(piece, offset, offset + length))
            for write in self._writes
        )
        self.size = sum(len(data) for write in self._writes for _, data in write)

    def flushed(self, end: int) -> list[Data]:
        """Drop those before number ``end``, and return their data."""
        dropped: list[Data] = []
        writes = self._writes
        for _ in range(end - self._first):
            dropped += [data for _, data in writes.popleft()]
        self._first = max(self._first, end)
        self.size -= sum(map(len, dropped))
        return dropped

    def newest(self) -> Iterator[Piece]:
        """Return what was written last of each byte, in no order; no two overlap."""
        return _newest(self._writes)


class SpareMemory:
    """Memory that was in use, by its size, for whoever needs as much.

    What is new to the process costs a page fault for each 4 KiB, which takes longer than all else
    that Python does for a write.

    Args:
        most: bytes to keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._by_size: defaultdict[int, list[bytearray]] = defaultdict(list)

    def take(self, length: int) -> bytearray:
        """Return so many bytes, whatever is in them."""
        spare = self._by_size[length]
        if spare:
            self._size -= length
            return spare.pop()
        return bytearray(length)

    def give(self, memories: Iterable[Data]) -> None:
        """Keep what nobody uses any longer; where that is too much, rather than of other sizes."""
        for memory in memories:
            length = len(memory)
            while self._size + length > self._most:
                other = next((size for size in self._by_size if size != length), None)
                if other is None:
                    break
                self._size -= other * len(self._by_size.pop(other))
            else:
                if isinstance(memory, bytearray):
                    self._by_size[length].append(memory)
                    self._size += length


def cut(piece: Piece, start: int, end: int) -> Iterator[Piece]:
    """Return what is left of a piece without what lies from ``start`` to ``end``."""
    offset, data = piece
    if start >= offset + len(data) or end <= offset:
        yield piece
        return
    if start > offset:
        yield offset, data[: start - offset]
    if end < offset + len(data):
        yield end, data[end - offset :]


def _newest(writes: Sequence[Iterable[Piece]]) -> Iterator[Piece]:
    """What was written last of each byte."""
    bounds: list[int] = []  # where what is known begins and ends, by turns
    for write in reversed(writes):
        for offset, data in write:
            at, end = offset, offset + len(data)
            first = bisect_right(bounds, offset)
            last = bisect_right(bounds, end)
            inner = bounds[first:last]
            edges = [*([] if first % 2 else [offset]), *inner, *([] if last % 2 else [end])]
            for at, stop in zip(edges[::2], edges[1::2]):
                if stop > at:
                    yield at, data[at - offset : stop - offset]
            bounds[first:last] = [
                *([] if first % 2 else [offset]),
                *([] if last % 2 else [end]),
            ]
