"""What a trace says about its guest, in numbers (pure; memory is bounded)."""

from __future__ import annotations

from typing import Any

from .format import (
    DISCARD,
    DISCARD_SECURELY,
    FLUSH,
    GAP,
    OPERATIONS,
    READ,
    WRITE,
    Header,
    Record,
)
from .histogram import Histogram
from .reuse import ReuseDistance

BLOCK_SIZES = (512, 4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20)
PERCENTILES = (50, 90, 99, 99.9)
_BLOCKS = 1 << 22  # of the working set, at most; of a larger disk they are larger
_RANGES = 256  # parts of the disk
_TOP = 8
_STREAMS = 16  # ends of requests where the next in order may begin


class _Kind:
    """What is known of one operation."""

    def __init__(self) -> None:
        self.errors = self.bytes = self.in_order = 0
        self.sizes = Histogram()
        self.latency = Histogram()
        self._ends: list[int] = []

    def add(self, record: Record) -> None:
        self.latency.add(record.latency)
        self.errors += bool(record.status)
        if record.operation != FLUSH:
            self.bytes += record.length
            self.sizes.add(record.length)
            if record.offset in self._ends:
                self.in_order += 1
                self._ends.remove(record.offset)
            elif len(self._ends) >= _STREAMS:
                del self._ends[0]
            self._ends.append(record.offset + record.length)

    def facts(self) -> dict[str, Any]:
        count = self.latency.count
        return {
            "requests": count,
            "bytes": self.bytes,
            "errors": self.errors,
            "sequential": round(self.in_order / count, 4),
            "sizes": [{"below": power, "requests": many} for power, many in self.sizes.powers()],
            "latency_ns": {
                "mean": round(self.latency.mean),
                **{f"p{part:g}": self.latency.percentile(part) for part in PERCENTILES},
                "max": self.latency.most,
            },
        }


class Summary:
    """Takes records one after another; :meth:`facts` at any time.

    Args:
        header: of the trace.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._kinds: dict[int, _Kind] = {}
        self._first: int | None = None
        self._last = self._busy = self._gaps = 0
        self._block = 4096
        while header.size // self._block > _BLOCKS:
            self._block *= 2
        blocks = -(-max(header.size, 1) // self._block)
        self._touched = {operation: bytearray(blocks) for operation in (READ, WRITE)}
        self._range = max(1 << 20, 1 << max(0, (max(header.size, 1) // _RANGES - 1).bit_length()))
        self._ranges: dict[int, list[int]] = {}
        self._reuse = ReuseDistance()
        self._covered = dict.fromkeys(BLOCK_SIZES, 0)
        self._flushed_at: int | None = None
        self._since_flush = 0
        self._between = Histogram()
        self._written = Histogram()

    def add(self, record: Record) -> None:
        """Count a record."""
        if not record.is_request:
            self._gaps += record.operation == GAP
            return
        if self._first is None or record.start < self._first:
            self._first = record.start
        self._last = max(self._last, record.end)
        self._busy += record.latency
        kind = self._kinds.get(record.operation)
        if kind is None:
            kind = self._kinds[record.operation] = _Kind()
        kind.add(record)
        if record.operation == FLUSH:
            if self._flushed_at is not None:
                self._between.add(max(0, record.start - self._flushed_at))
            self._flushed_at = record.start
            self._written.add(self._since_flush)
            self._since_flush = 0
        elif record.operation in (READ, WRITE) and record.length:
            self._use(record)

    def _use(self, record: Record) -> None:
        offset, length = record.offset, record.length
        touched = self._touched[record.operation]
        first, last = offset // self._block, (offset + length - 1) // self._block
        if last >= len(touched):  # the disk has become longer
            for each in self._touched.values():
                each.extend(bytes(min(last, 1 << 24) + 1 - len(each)))
        end = min(last + 1, len(touched))
        touched[first:end] = b"\1" * max(0, end - first)
        for block in range(first, min(last, first + 1024) + 1):
            self._reuse.use(block)
        number = min(offset // self._range, 4 * _RANGES)
        counts = self._ranges.setdefault(number, [0, 0, 0])
        counts[record.operation] += 1
        counts[2] += length
        if record.operation == WRITE:
            self._since_flush += length
            for size in BLOCK_SIZES:
                start = offset // size * size
                self._covered[size] += -(-(offset + length - start) // size) * size

    def facts(self) -> dict[str, Any]:
        """Return all of it, for JSON: bytes, nanoseconds, parts of 1."""
        took = max(0, self._last - (self._first or 0))
        written = self._kinds[WRITE].bytes if WRITE in self._kinds else 0
        reads, writes = (self._touched[each] for each in (READ, WRITE))
        # As two large numbers: a byte for each block would take a second.
        union = int.from_bytes(reads, "little") | int.from_bytes(writes, "little")
        both = union.to_bytes(len(reads), "little").count(1)
        top = sorted(self._ranges.items(), key=lambda item: -item[1][2])[:_TOP]
        reuse = self._reuse
        uses = reuse.distances.count + reuse.first_uses
        return {
            "seconds": round(took / 1e9, 6),
            "gaps": self._gaps,
            "depth": round(self._busy / took, 3) if took else 0.0,
            "operations": {
                OPERATIONS[each]: self._kinds[each].facts()
                for each in (READ, WRITE, FLUSH, DISCARD, DISCARD_SECURELY)
                if each in self._kinds
            },
            "working_set": {
                "block": self._block,
                "bytes": both * self._block,
                "read": reads.count(1) * self._block,
                "written": writes.count(1) * self._block,
            },
            "reuse": {
                "again": round(reuse.distances.count / uses, 4) if uses else 0.0,
                **{
                    f"p{part}": reuse.distances.percentile(part) * self._block
                    for part in (50, 90, 99)
                },
            },
            "flushes": {
                "apart_ns": {f"p{part}": self._between.percentile(part) for part in (50, 90, 99)},
                "written_before": {
                    f"p{part}": self._written.percentile(part) for part in (50, 90, 99)
                },
            },
            "write_amplification": [
                {"block": size, "times": round(covered / written, 2) if written else 1.0}
                for size, covered in self._covered.items()
            ],
            "top": [
                {
                    "offset": number * self._range,
                    "length": self._range,
                    "reads": counts[READ],
                    "writes": counts[WRITE],
                    "bytes": counts[2],
                }
                for number, counts in top
            ],
        }
