"""Which bytes of a disk were written, and where the data is that was written last (pure)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from .powercut import ZEROS, Extent

_REGION = 16 << 20  # bytes of the disk in one list: inserting there moves few others
BYTES_PER_EXTENT = 250
"""Memory that one takes, about."""


class Extents:
    """A map from bytes of a disk to a source of data.

    Attributes:
        count: how many extents there are.
    """

    def __init__(self) -> None:
        self._regions: dict[int, list[tuple[int, int, int]]] = {}  # start, stop, source
        self.count = 0

    @property
    def memory(self) -> int:
        """Bytes of memory, about."""
        return self.count * BYTES_PER_EXTENT

    def put(self, extent: Extent) -> None:
        """Have it replace what was there."""
        at, end = extent.offset, extent.offset + extent.length
        source = extent.source
        while at < end:
            number = at // _REGION
            stop = min(end, (number + 1) * _REGION)
            self._put(self._regions.setdefault(number, []), at, stop, source)
            if source != ZEROS:
                source += stop - at
            at = stop

    def _put(self, region: list[tuple[int, int, int]], at: int, stop: int, source: int) -> None:
        first = bisect_left(region, (at,))
        if first and region[first - 1][1] > at:
            first -= 1
        last = bisect_left(region, (stop,), first)
        new = [(at, stop, source)]
        if first < last:
            start, _, old = region[first]
            if start < at:
                new.insert(0, (start, at, old))
            start, end, old = region[last - 1]
            if end > stop:
                new.append((stop, end, old if old == ZEROS else old + stop - start))
        self.count += len(new) - (last - first)
        region[first:last] = new

    def find(self, offset: int, count: int) -> Iterator[tuple[int, int, int | None]]:
        """Cut bytes of the disk into pieces: offset, length, source; None: nobody wrote there."""
        at, end = offset, offset + count
        while at < end:
            number = at // _REGION
            stop = min(end, (number + 1) * _REGION)
            region = self._regions.get(number, [])
            first = bisect_left(region, (at,))
            if first and region[first - 1][1] > at:
                first -= 1
            for start, until, source in region[first : bisect_left(region, (stop,), first)]:
                if at < start:
                    yield at, start - at, None
                    at = start
                length = min(until, stop) - at
                yield at, length, source if source == ZEROS else source + at - start
                at += length
            if at < stop:
                yield at, stop - at, None
                at = stop

    def __iter__(self) -> Iterator[Extent]:
        for number in sorted(self._regions):
            for start, stop, source in self._regions[number]:
                yield Extent(start, stop - start, source)
