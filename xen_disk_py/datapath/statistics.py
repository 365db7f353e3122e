"""What a disk has done so far: plain counters, and histograms (:mod:`.latency` has others).

The counters are one run of unsigned 64-bit words, so that they can live in a file that
another process maps and reads while the disk works (``list`` shows them), at the cost of a
memory store each. Each queue adds to a block of its own, the disk to another: readers sum them
up. They may see a batch half counted, never a torn word.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Callable

from ..blkif import MAX_QUEUES, READ, SECTOR, WRITE, Discard, Transfer
from .latency import SIZE as LATENCIES

BUCKETS = 13
"""Of a histogram of numbers."""
_COUNTERS = (
    "requests",
    "reads",
    "writes",
    "flushes",
    "discards",
    "refused",
    "errors",
    "bytes_read",
    "bytes_written",
    "bytes_discarded",
    "wakeups",
    "in_flight",
    "held",
    "memory",
)
_BLOCK = len(_COUNTERS) + 2 * BUCKETS
WORDS = _BLOCK * (1 + MAX_QUEUES) + 1
"""How many 64-bit words the counters take, and what a successor must know of flushes."""

_U64 = 0xFFFF_FFFF_FFFF_FFFF


@lru_cache(maxsize=4096)  # asked for each batch
def bucket(number: int) -> int:
    """Number the bucket of a number: 1, 2, 3–4, 5–8, … the last for 2049 and more."""
    return min((number - 1).bit_length(), BUCKETS - 1) if number > 0 else 0


class Counters:
    """One block of them; one thread adds.

    Attributes:
        words: unsigned 64-bit words, indexed by the constants below.
        latencies: the histograms of :mod:`.latency`, likewise.
    """

    def __init__(self, words: memoryview, latencies: memoryview) -> None:
        self.words = words
        self.latencies = latencies

    def add(self, counter: int, amount: int = 1) -> None:
        """Add to a counter, named by one of the constants below; it wraps at 2**64.

        A guest gets there: it may discard a large disk as often as it likes.
        """
        self.words[counter] = (self.words[counter] + amount) & _U64

    def count_request(self, request: Transfer | Discard) -> None:
        """Note a request that was done, whatever its status."""
        length = request.sectors * SECTOR
        if isinstance(request, Discard):
            self.add(DISCARDS)
            self.add(BYTES_DISCARDED, length)
            return
        if request.operation == READ:
            self.add(READS)
            self.add(BYTES_READ, length)
        else:
            if request.operation != WRITE:
                self.add(FLUSHES)
            if length:
                self.add(WRITES)
                self.add(BYTES_WRITTEN, length)
        if request.grefs:
            self.words[segments_word(len(request.grefs))] += 1

    def count_batch(self, requests: int) -> None:
        """Note that a look at the ring found that many requests."""
        self.words[_OCCUPANCY + bucket(requests)] += 1


class Statistics:
    """The counters of one disk.

    Args:
        words: ``WORDS`` unsigned 64-bit words (``memoryview`` of format "Q") to count in;
            private ones by default.
        latencies: words for the histograms of each queue, likewise; private ones for those
            that have none here.
    """

    def __init__(
        self, words: memoryview | None = None, latencies: Sequence[memoryview] = ()
    ) -> None:
        words = words if words is not None else memoryview(bytearray(8 * WORDS)).cast("Q")
        self._blocks = [
            Counters(words[at : at + _BLOCK], memoryview(b"")) for at in range(0, WORDS - 1, _BLOCK)
        ]
        for block, histograms in zip(self._blocks[1:], latencies):
            block.latencies = histograms
        self._own = self._blocks[0]
        self._flush_failed = words[WORDS - 1 : WORDS]
        self._lock = threading.Lock()

    def of_queue(self, number: int) -> Counters:
        """Return the block in which queue ``number`` counts, from 0 on."""
        block = self._blocks[1 + number]
        if not block.latencies:
            block.latencies = memoryview(bytearray(LATENCIES)).cast("Q")
        return block

    def add(self, counter: int, amount: int = 1) -> None:
        """Add to one of the disk's own counters; from any thread."""
        with self._lock:
            self._own.add(counter, amount)

    def count_in_queue(self, number: int) -> None:
        """Count what is the disk's own in the block of a queue: in the process of that queue.

        Another process adds to the disk's block, and two must not add to one word.
        """
        self._own = self._blocks[1 + number]

    @property
    def flush_failed(self) -> bool:
        """Whether a flush has failed: what was written before it may be lost.

        It is one word of the record, so that no successor takes its own flush for a good one.
        """
        return bool(self._flush_failed[0])

    @flush_failed.setter
    def flush_failed(self, failed: bool) -> None:
        self._flush_failed[0] = failed

    @property
    def flush_failed_word(self) -> memoryview:
        """That word, for who asks before each write: not 0 if a flush has failed."""
        return self._flush_failed

    def set_memory(self, amount: int) -> None:
        """Note how many bytes of memory the guest's writes hold."""
        self._own.words[MEMORY] = amount

    def _sums(self) -> list[int]:
        return [sum(words) & _U64 for words in zip(*(block.words for block in self._blocks))]

    def as_dict(self) -> dict[str, int]:
        """All counters by name; bytes where the name says so, numbers of things elsewhere."""
        return dict(zip(_COUNTERS, self._sums()))

    @property
    def segments_per_request(self) -> list[int]:
        """Requests by number of segments, in buckets of powers of two."""
        return self._sums()[SEGMENTS : SEGMENTS + BUCKETS]

    @property
    def requests_per_batch(self) -> list[int]:
        """Looks at the ring by number of requests found, in buckets of powers of two."""
        return self._sums()[_OCCUPANCY : _OCCUPANCY + BUCKETS]

    def settled(self, *, in_order: bool) -> Callable[[], bool]:
        """Return a function that tells whether what is in flight now was answered meanwhile.

        Args:
            in_order: requests do not overtake each other, but for those that are held. Where
                they may, only a queue that was seen with nothing in flight counts as settled.
        """
        pending = [
            (words, words[REQUESTS] + words[IN_FLIGHT] if in_order else _U64)
            for words in (block.words for block in self._blocks)
        ]

        def is_settled() -> bool:
            # Each queue by itself: several that are busy are never idle at once.
            pending[:] = [
                (words, due)
                for words, due in pending
                if words[IN_FLIGHT] and (words[REQUESTS] < due or words[HELD])
            ]
            return not pending

        return is_settled


def segments_word(segments: int) -> int:
    """Name the counter of requests of so many segments."""
    return SEGMENTS + bucket(segments)


def bucket_name(number: int) -> str:
    """Name a histogram's bucket by the numbers it counts, such as "3-4"."""
    low, high = (1 << number - 1) + 1 if number else 1, 1 << number
    if number == BUCKETS - 1:
        return f"{low}+"
    return str(low) if low == high else f"{low}-{high}"


(
    REQUESTS,
    READS,
    WRITES,
    FLUSHES,
    DISCARDS,
    REFUSED,
    ERRORS,
    BYTES_READ,
    BYTES_WRITTEN,
    BYTES_DISCARDED,
    WAKEUPS,
    IN_FLIGHT,
    HELD,
    MEMORY,
) = range(len(_COUNTERS))
SEGMENTS = len(_COUNTERS)
_OCCUPANCY = SEGMENTS + BUCKETS


def histogram(title: str, counts: Sequence[int], width: int = 40) -> list[str]:
    """Draw a histogram as lines of text; nothing for one without a count."""
    used: list[tuple[int, int]] = [(i, count) for i, count in enumerate(counts) if count]
    if not used:
        return []
    most = max(counts)
    lines = [title]
    for i in range(used[0][0], used[-1][0] + 1):
        bar = "#" * -(-counts[i] * width // most)
        lines.append(f"  {bucket_name(i):>9} {counts[i]:>10} {bar}".rstrip())
    return lines
