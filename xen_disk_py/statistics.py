"""What a disk has done so far: plain counters and two histograms.

The counters are one run of unsigned 64-bit words, so that they can live in a file that
another process maps and reads while the disk works (``list`` shows them), at the cost of a
memory store each. One thread adds; readers may see a batch half counted, never a torn word.
"""

from __future__ import annotations

from collections.abc import Sequence

_BUCKETS = 13
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
    "memory",
)
WORDS = len(_COUNTERS) + 2 * _BUCKETS
"""How many 64-bit words the counters take."""


def _bucket(number: int) -> int:
    """Powers of two: 1, 2, 3–4, 5–8, … the last for 2049 and more."""
    return min((number - 1).bit_length(), _BUCKETS - 1) if number > 0 else 0


class Statistics:
    """The counters of one disk.

    Args:
        words: ``WORDS`` unsigned 64-bit words (``memoryview`` of format "Q") to count in;
            private ones by default.
    """

    def __init__(self, words: memoryview | None = None) -> None:
        self.words = words if words is not None else memoryview(bytearray(8 * WORDS)).cast("Q")

    def add(self, counter: int, amount: int = 1) -> None:
        """Add to a counter, named by one of the constants below; it wraps at 2**64.

        A guest gets there: it may discard a large disk as often as it likes.
        """
        self.words[counter] = (self.words[counter] + amount) & 0xFFFF_FFFF_FFFF_FFFF

    def count_segments(self, segments: int) -> None:
        """Note a request of that many segments."""
        self.words[_SEGMENTS + _bucket(segments)] += 1

    def count_batch(self, requests: int) -> None:
        """Note that a look at the ring found that many requests."""
        self.words[_OCCUPANCY + _bucket(requests)] += 1

    def as_dict(self) -> dict[str, int]:
        """All counters by name; bytes where the name says so, numbers of things elsewhere."""
        return dict(zip(_COUNTERS, self.words))

    @property
    def segments_per_request(self) -> list[int]:
        """Requests by number of segments, in buckets of powers of two."""
        return list(self.words[_SEGMENTS : _SEGMENTS + _BUCKETS])

    @property
    def requests_per_batch(self) -> list[int]:
        """Looks at the ring by number of requests found, in buckets of powers of two."""
        return list(self.words[_OCCUPANCY : _OCCUPANCY + _BUCKETS])


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
    MEMORY,
) = range(len(_COUNTERS))
_SEGMENTS = len(_COUNTERS)
_OCCUPANCY = _SEGMENTS + _BUCKETS


def bucket_name(bucket: int) -> str:
    """Name a histogram's bucket by the numbers it counts, such as "3-4"."""
    low, high = (1 << bucket - 1) + 1 if bucket else 1, 1 << bucket
    if bucket == _BUCKETS - 1:
        return f"{low}+"
    return str(low) if low == high else f"{low}-{high}"


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
