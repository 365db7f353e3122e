"""Measures how long the requests of a queue take; costs one look at the clock a batch.

A request's time runs from when its batch is taken off the ring until its response is published,
for that is when the guest can see it. All requests of a batch are taken at once, and all responses
that are published together come at once, so they share their times. Waiting for each other is part
of it, as it is for the guest. How long a request was on the ring before it was taken, only the
guest knows.

The clock is read when responses are published. The next batch begins at the same time, unless the
queue was idle in between: then it is read once more. That much shows which batches were slow
(:data:`SLOW`), and every request of those is counted. To add a time to a histogram costs more than
to read the clock, so of the quick batches only one of :data:`SAMPLE` is timed, and counts for all
of them; where batches do not follow each other quickly, each is timed. How many batches the next
sample counts for is decided before it begins, so its own time has no influence on that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache, partial
from math import inf
from time import clock_getres, clock_gettime, perf_counter
from typing import Callable

from .latency import HISTOGRAM, HISTOGRAMS, NANOSECONDS, SUM, bucket_of, size_class
from .latency import WRITES as WRITE_HISTOGRAMS
from .statistics import BUCKETS, SEGMENTS, Counters, bucket

SLOW = 0.004
"""Seconds; of requests that take so long none is left out."""
SAMPLE = 31
"""Batches of which one is timed, where they are quick; a prime, for whatever comes in turns."""

_QUICK = 5e-4  # seconds from one batch to the next: less is quick,
_LOOKS = 200  # and so is less than so many looks at the clock take
_DEAR = 1e-6  # seconds: a clock that takes longer to read is a system call
_COARSE = 6  # CLOCK_MONOTONIC_COARSE
_U64 = 0xFFFF_FFFF_FFFF_FFFF

Start = tuple[float, int]
"""When a batch was taken; how many batches it stands for, 0 if it counts only if it is slow."""

coarse = partial(clock_gettime, _COARSE)
"""The clock of ``perf_counter``, some milliseconds coarse, and never a system call, which any other
clock is on a paravirtualised dom0."""

WRITES = WRITE_HISTOGRAMS * BUCKETS
"""What to add to the kind of a read for that of the write of the same segments."""

_HISTOGRAM_AT = [kind // BUCKETS * HISTOGRAM for kind in range(HISTOGRAMS * BUCKETS)]
_SEGMENTS_AT = [SEGMENTS + kind % BUCKETS for kind in range(HISTOGRAMS * BUCKETS)]


def kind(segments: int, length: int) -> int:
    """Number a read of so many segments and bytes, by what is counted of it."""
    return size_class(length) * BUCKETS + bucket(segments)


@lru_cache(maxsize=1)
def cost_of_a_look() -> float:
    """Return how many seconds it takes to look at the clock."""
    shortest = 1.0
    for _ in range(5):
        began = perf_counter()
        for _ in range(9):
            perf_counter()
        shortest = min(shortest, (perf_counter() - began) / 10)
    return shortest


class Stopwatch:
    """Counts the requests of one queue when they are published.

    Args:
        statistics: where; one thread at a time.
        is_on: requests are timed.
        clock: seconds.
        coarse: the same, behind by up to ``tick``; looked at where ``clock`` takes long.
        cost: seconds that a look at ``clock`` takes.
        tick: seconds.

    Attributes:
        counts: add the requests that are answered here, by their :func:`kind`; empty when all
            are published.
        stands_for: batches that the one under way stands for; 0: it counts only if it is slow.
        taken: when that was taken.
        now: when answers were published last, or :meth:`look` was called since.
        error: seconds that ``now - taken`` may be too much, or too little.
    """

    def __init__(
        self,
        statistics: Counters,
        *,
        is_on: bool = True,
        clock: Callable[[], float] = perf_counter,
        coarse: Callable[[], float] = coarse,
        cost: float | None = None,
        tick: float | None = None,
    ) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)
        self._words, self._latencies = statistics.words, statistics.latencies
        cost = cost_of_a_look() if cost is None else cost
        tick = clock_getres(_COARSE) if tick is None else tick
        self._clock, self._cheap, self.error = clock, clock, 0.0
        if cost >= _DEAR:
            self._cheap, self.error = coarse, tick
        self._quick = max(_QUICK, _LOOKS * cost)
        self._slow = SLOW + self.error if is_on else inf
        self.now = self.taken = self._cheap()
        self.stands_for = 0
        self._next = 1  # what the next one that is timed stands for
        self._left = 1 if is_on else 0  # batches until then; below 0: there is none
        self._timed_at = -inf  # when the last one was taken
        self._earlier: list[tuple[Start | None, defaultdict[int, int]]] = []
        self._ended: list[tuple[Start, int]] = []

    @property
    def start(self) -> Start | None:
        """What to tell :meth:`end` of a request of the batch under way."""
        return None if self._slow == inf else (self.taken, self.stands_for)

    def look(self) -> None:
        """Note that the queue has idled, or that it is long since anything was published."""
        self.now = self._cheap()

    def take(self) -> None:
        """Note that a batch was taken."""
        if self.counts:  # of the batch before, and not published
            self._earlier.append((self.start, self.counts))
            self.counts = defaultdict(int)
        self.taken = self.now
        self._left -= 1
        if not self._left:
            self.taken, self.stands_for = self._clock(), self._next
            is_quick = self.taken - self._timed_at < self._next * self._quick
            self._timed_at = self.taken
            self._left = self._next = SAMPLE if is_quick else 1
        elif self.stands_for:
            self.stands_for = 0

    def end(self, histogram: int, start: Start | None) -> None:
        """Note that a request was answered which is not in :attr:`counts`."""
        if start is not None:
            self._ended.append((start, histogram))

    def end_known(self, number: int, start: Start | None) -> None:
        """Note the same of one whose :func:`kind` is known."""
        self._words[_SEGMENTS_AT[number]] += 1
        if start is not None:
            self._ended.append((start, number // BUCKETS))

    def published(self) -> None:
        """Count all requests that were answered: the guest sees that now."""
        words, counts = self._words, self.counts
        self.now = now = self._cheap()
        if counts:
            for number, count in counts.items():
                words[_SEGMENTS_AT[number]] += count
            if self.stands_for or now - self.taken >= self._slow:
                self._time((self.taken, self.stands_for), counts)
            counts.clear()
        if self._earlier:
            for start, counts in self._earlier:
                for number, count in counts.items():
                    words[_SEGMENTS_AT[number]] += count
                if start is not None:
                    self._time(start, counts)
            self._earlier.clear()
        if self._ended:
            for start, histogram in self._ended:
                self._time(start, {histogram * BUCKETS: 1})
            self._ended.clear()

    def _time(self, start: Start, counts: Mapping[int, int]) -> None:
        """Put requests of one batch into their histograms, unless it counts for nothing.

        Args:
            start: of the batch.
            counts: requests by their :func:`kind`.
        """
        taken, stands_for = start
        if stands_for:
            took = self._clock() - taken
            if took >= SLOW + self.error:
                stands_for = 1
        else:
            took = self.now - taken
            if took < self._slow:
                return
            stands_for = 1
        latencies = self._latencies
        nanoseconds = int(took * 1e9)
        bucket = bucket_of(nanoseconds // NANOSECONDS)
        for number, count in counts.items():
            at, those = _HISTOGRAM_AT[number], count * stands_for
            latencies[at + bucket] += those
            at += SUM
            latencies[at] = (latencies[at] + nanoseconds * those) & _U64
