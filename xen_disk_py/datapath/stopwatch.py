"""How long the requests of a queue take, at the price of two looks at the clock a batch.

A request's time is from when it was taken off the ring until its answer was published, which is
when the guest can see it: all requests of a batch are taken at once, and all answers that are
published together come at once. So two looks give the exact time of each of them; and what
requests wait for each other counts, as it does for the guest. How long a request was on the ring
before anybody looked is known to the guest alone.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from time import perf_counter
from typing import Callable

from .latency import HISTOGRAM, HISTOGRAMS, NANOSECONDS, SUM, bucket_of, size_class
from .latency import WRITES as WRITE_HISTOGRAMS
from .statistics import BUCKETS, SEGMENTS, Counters, bucket

_U64 = 0xFFFF_FFFF_FFFF_FFFF
_DEAR = 1e-6  # seconds: a clock that takes longer to read is a system call
_SAMPLE = 8  # batches of which one is timed then

WRITES = WRITE_HISTOGRAMS * BUCKETS
"""What to add to the kind of a read for that of the write of the same segments."""

_HISTOGRAM_AT = [kind // BUCKETS * HISTOGRAM for kind in range(HISTOGRAMS * BUCKETS)]
_SEGMENTS_AT = [SEGMENTS + kind % BUCKETS for kind in range(HISTOGRAMS * BUCKETS)]


def kind(segments: int, length: int) -> int:
    """Number a read of so many segments and bytes, by what is counted of it."""
    return size_class(length) * BUCKETS + bucket(segments)


@lru_cache(maxsize=1)
def batches_per_sample() -> int:
    """Of how many batches one is timed: all, but where the clock itself takes long.

    In a paravirtualised domain 0 a look at the clock may be a system call, and those are dear.
    """
    shortest = 1.0
    for _ in range(5):
        began = perf_counter()
        for _ in range(9):
            perf_counter()
        shortest = min(shortest, (perf_counter() - began) / 10)
    return 1 if shortest < _DEAR else _SAMPLE


class Stopwatch:
    """Counts the requests of one queue when they are published.

    Args:
        statistics: where; one thread at a time.
        every: of how many batches one is timed; 0: of none.
        clock: seconds.

    Attributes:
        counts: add the requests that are answered here, by their :func:`kind`; empty when all
            are published.
        taken: when the batch under way was taken; None: it is not timed.
    """

    def __init__(
        self, statistics: Counters, *, every: int, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)
        self.taken: float | None = None
        self._words, self._latencies = statistics.words, statistics.latencies
        self._every = every
        self._left = 1  # batches until one is timed
        self._clock = clock
        self._earlier: list[tuple[float | None, defaultdict[int, int]]] = []
        self._ended: list[tuple[float, int]] = []

    def start(self) -> None:
        """Note that a batch was taken."""
        if self.counts:  # of the batch before, and not published
            self._earlier.append((self.taken, self.counts))
            self.counts = defaultdict(int)
        self._left -= 1
        if self._left:
            self.taken = None
        else:
            self._left = self._every
            self.taken = self._clock() if self._every else None

    def end(self, histogram: int, taken: float | None) -> None:
        """Note that a request was answered which is not in :attr:`counts`."""
        if taken is not None:
            self._ended.append((taken, histogram))

    def end_known(self, number: int, taken: float | None) -> None:
        """Note the same of one whose :func:`kind` is known."""
        self._words[_SEGMENTS_AT[number]] += 1
        if taken is not None:
            self._ended.append((taken, number // BUCKETS))

    def published(self) -> None:
        """Count all requests that were answered: the guest sees that now."""
        if self.counts:
            self._count(self.counts, self.taken)
            self.counts.clear()
        if self._earlier:
            for taken, counts in self._earlier:
                self._count(counts, taken)
            self._earlier.clear()
        if self._ended:
            now, words = self._clock(), self._latencies
            for taken, histogram in self._ended:
                nanoseconds, at = int((now - taken) * 1e9), histogram * HISTOGRAM
                words[at + bucket_of(nanoseconds // NANOSECONDS)] += 1
                words[at + SUM] = (words[at + SUM] + nanoseconds) & _U64
            self._ended.clear()

    def _count(self, counts: defaultdict[int, int], taken: float | None) -> None:
        words = self._words
        if taken is None:
            for number, count in counts.items():
                words[_SEGMENTS_AT[number]] += count
            return
        latencies = self._latencies
        nanoseconds = int((self._clock() - taken) * 1e9)
        units = nanoseconds // NANOSECONDS
        power = units.bit_length() - 5  # as bucket_of, whose call would cost more than all this
        bucket = (power << 4) + (units >> power) if 0 < power < 28 else bucket_of(units)
        for number, count in counts.items():
            words[_SEGMENTS_AT[number]] += count
            at = _HISTOGRAM_AT[number]
            latencies[at + bucket] += count
            at += SUM
            latencies[at] = (latencies[at] + nanoseconds * count) & _U64
