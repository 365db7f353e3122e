"""Counts of numbers of any size in little memory (pure)."""

from __future__ import annotations

from collections.abc import Iterator

_STEPS = 16  # buckets for each power of two: a value is known to about 6 %


class Histogram:
    """Counts numbers in buckets whose width grows with them.

    Attributes:
        count: how many there are.
        total: their sum.
        least, most: exactly; 0 if there is none.
    """

    def __init__(self) -> None:
        self.count = self.total = self.least = self.most = 0
        self._buckets: dict[int, int] = {}

    def add(self, number: int, times: int = 1) -> None:
        """Count a number, which is not negative."""
        bucket = _bucket(number)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + times
        self.least = min(self.least, number) if self.count else number
        self.most = max(self.most, number)
        self.count += times
        self.total += number * times

    @property
    def mean(self) -> float:
        """The mean, 0 if there is none."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, part: float) -> int:
        """Return what so many percent are not above, to about 6 %; 0 if there is none."""
        wanted = self.count * part / 100
        seen = 0
        for bucket, count in sorted(self._buckets.items()):
            seen += count
            if seen >= wanted:
                return max(self.least, min(self.most, _last(bucket)))
        return self.most

    def powers(self) -> Iterator[tuple[int, int]]:
        """Yield powers of two, and how many numbers are below each but not below its half."""
        found: dict[int, int] = {}
        for bucket, count in self._buckets.items():
            power = 1 << _last(bucket).bit_length()
            found[power] = found.get(power, 0) + count
        yield from sorted(found.items())


def _bucket(number: int) -> int:
    shift = max(0, number.bit_length() - _STEPS.bit_length())
    return shift * _STEPS + (number >> shift)


def _last(bucket: int) -> int:
    """The greatest number in a bucket."""
    if bucket < 2 * _STEPS:
        return bucket
    shift = bucket // _STEPS - 1
    return ((bucket - shift * _STEPS + 1) << shift) - 1
