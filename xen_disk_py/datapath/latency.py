"""How long requests take, by operation and size: log-linear histograms of a fixed size (pure).

A time is counted in units of a quarter of a microsecond. The first 16 buckets are a unit wide;
each power of two after those has 16 buckets of the same width, so that a bucket is never wider
than a sixteenth of the times in it. What is read back is a bucket's middle: it is off by
:data:`ERROR` of the time at most, or by half a unit. (The layout is that of HdrHistogram.)

The words of a histogram are unsigned and of 64 bits; one thread adds, others read meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..blkif import READ, SECTOR, WRITE, Discard, Transfer
from ..named import NamedTuple

PER_SECOND = 4_000_000
"""Units in a second."""
NANOSECONDS = 1_000_000_000 // PER_SECOND
"""Nanoseconds in a unit."""
ERROR = 1 / 32
"""By how much of a time of 4 µs and more its bucket's middle is off, at most."""

_FINE = 16  # buckets of one unit, and of each power of two after that
_SHIFT = 4
BUCKETS = 29 * _FINE
"""Buckets of a histogram; the last one has 2**32 units, 18 minutes, and whatever is longer."""
SUM = BUCKETS
"""The word after the buckets: nanoseconds of all requests together, which wrap at 2**64."""
HISTOGRAM = 512
"""Words of a histogram; they fill a page."""

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
"""Bytes of reads and writes up to which a histogram counts; one more counts the larger ones."""
_CLASSES = len(SIZES) + 1
WRITES = _CLASSES
"""What to add to the number of a histogram of reads for that of the writes of the same size."""
_FLUSHES, _DISCARDS = 2 * _CLASSES, 2 * _CLASSES + 1
HISTOGRAMS = 2 * _CLASSES + 2
"""How many there are."""
SIZE = HISTOGRAMS * HISTOGRAM * 8
"""Bytes of all of one queue."""


def size_class(length: int) -> int:
    """Number the size of a read or write of ``length`` bytes, from 0 on."""
    return next((number for number, most in enumerate(SIZES) if length <= most), len(SIZES))


def histogram_of(request: Transfer | Discard) -> int:
    """Number the histogram that a request belongs to; a flush with data is a flush."""
    if isinstance(request, Discard):
        return _DISCARDS
    if request.operation == READ:
        return size_class(request.sectors * SECTOR)
    if request.operation == WRITE:
        return WRITES + size_class(request.sectors * SECTOR)
    return _FLUSHES


class Series(NamedTuple):
    """What a histogram counts."""

    operation: str
    """``read``, ``write``, ``flush`` or ``discard``."""
    most: int | None
    """Bytes of the largest request; None for any, or for those above the last size."""
    size: str
    """The same for people: ``4K``, ``larger``; ``any`` where size makes no difference."""


SERIES = (
    *(
        Series(operation, *size)
        for operation in ("read", "write")
        for size in (*((most, f"{most >> 10}K") for most in SIZES), (None, "larger"))
    ),
    Series("flush", None, "any"),
    Series("discard", None, "any"),
)
"""What each histogram counts, by its number."""


def bucket_of(units: int) -> int:
    """Number the bucket of a time, in units, from 0 on."""
    if units < _FINE:
        return max(units, 0)
    power = units.bit_length() - _SHIFT - 1
    return min((power << _SHIFT) + (units >> power), BUCKETS - 1)


def start_of(bucket: int) -> int:
    """Return the shortest time in a bucket, in units; that of ``BUCKETS`` ends the last one."""
    if bucket < _FINE:
        return bucket
    return ((bucket & (_FINE - 1)) | _FINE) << ((bucket >> _SHIFT) - 1)


def _middle(bucket: int) -> float:
    return (start_of(bucket) + start_of(bucket + 1)) / 2 / PER_SECOND


class Latency:
    """Times of some requests, as other processes count and compare them.

    Args:
        counts: requests by bucket.
        total: nanoseconds of all together.
    """

    def __init__(self, counts: Sequence[int] = (), total: int = 0) -> None:
        self.counts = {bucket: count for bucket, count in enumerate(counts) if count}
        self.total = total

    @classmethod
    def sum(cls, parts: Iterable[Latency]) -> Latency:
        """Put several together."""
        whole = cls()
        for part in parts:
            for bucket, count in part.counts.items():
                whole.counts[bucket] = whole.counts.get(bucket, 0) + count
            whole.total = (whole.total + part.total) % (1 << 64)
        return whole

    def since(self, before: Latency) -> Latency:
        """Return what came after ``before``."""
        later = Latency()
        for bucket, count in self.counts.items():
            more = count - before.counts.get(bucket, 0)
            if more > 0:
                later.counts[bucket] = more
        later.total = (self.total - before.total) % (1 << 64)
        return later

    @property
    def count(self) -> int:
        """How many requests."""
        return sum(self.counts.values())

    @property
    def seconds(self) -> float:
        """Seconds of all together."""
        return self.total / 1e9

    @property
    def maximum(self) -> float | None:
        """Seconds of the longest one, as its bucket tells; None if there is none."""
        return self.percentile(100)

    def percentile(self, percent: float) -> float | None:
        """Return the time in seconds that ``percent`` of the requests do not exceed.

        It is the middle of the bucket with the one that ends so many of them; None if there is
        no request.
        """
        # Rounded first: 0.07 * 100 is more than 7.
        wanted = max(1, -int(-round(percent / 100 * self.count, 6) // 1))
        for bucket in sorted(self.counts):
            wanted -= self.counts[bucket]
            if wanted <= 0:
                return _middle(bucket)
        return None

    def up_to(self, edges: Sequence[int]) -> Iterator[int]:
        """Count the requests shorter than each edge, in units, which a bucket starts with.

        Args:
            edges: in ascending order.
        """
        count, buckets = 0, sorted(self.counts)
        for edge in edges:
            while buckets and start_of(buckets[0]) < edge:
                count += self.counts[buckets.pop(0)]
            yield count


def read(words: memoryview) -> list[Latency]:
    """Read the histograms of one queue, whether they change meanwhile or not."""
    found = []
    for at in range(0, HISTOGRAMS * HISTOGRAM, HISTOGRAM):
        histogram = words[at : at + HISTOGRAM].tolist()
        found.append(Latency(histogram[:BUCKETS], histogram[SUM]))
    return found
