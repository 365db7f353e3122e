"""What a picture of a trace shows, in cells (pure; memory is bounded)."""

from __future__ import annotations

from collections.abc import Iterable

from ..named import NamedTuple
from .format import FLUSH, READ, WRITE, Record

PERCENTILES = (50, 99)
_STEPS = 8  # of latency, for each power of two
_LOWEST = 10  # bits: latencies below a microsecond are not told apart
_POWERS = 26


class Picture:
    """A trace in columns of time and rows of the disk.

    Args:
        size: of the disk, in bytes.
        start: nanoseconds, of the first request.
        end: nanoseconds, behind the last one.
        columns, rows: cells.

    Attributes:
        heat: by operation (read, write), by column, by row: bytes.
        requests, moved: by operation, by column: requests; bytes.
        flushes: by column.
        sizes: by operation, by power of two above: requests.
        total: by operation: requests, flushes too.
        errors: requests that failed.
    """

    def __init__(self, size: int, start: int, end: int, columns: int, rows: int) -> None:
        self.size = max(size, 1)
        self.start = start
        self.span = max(end - start, 1)
        self.columns = columns
        self.rows = rows
        both = (READ, WRITE)
        self.heat = {each: [[0] * rows for _ in range(columns)] for each in both}
        self.requests = {each: [0] * columns for each in both}
        self.moved = {each: [0] * columns for each in both}
        self.flushes = [0] * columns
        self.sizes: dict[int, dict[int, int]] = {each: {} for each in both}
        self.total = {READ: 0, WRITE: 0, FLUSH: 0}
        self.errors = 0
        self._latency: list[dict[int, int]] = [{} for _ in range(columns)]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.span / 1e9

    @property
    def column_seconds(self) -> float:
        """How much of that is a column."""
        return self.seconds / self.columns

    def add(self, record: Record) -> None:
        """Put a request into its cells."""
        if not record.is_request:
            return
        place = (record.start - self.start) * self.columns // self.span
        column = max(0, min(self.columns - 1, place))
        self.errors += bool(record.status)
        counts = self._latency[column]
        step = _step(record.latency)
        counts[step] = counts.get(step, 0) + 1
        operation = record.operation
        if operation in self.total:
            self.total[operation] += 1
        if operation == FLUSH:
            self.flushes[column] += 1
        if operation not in self.heat or not record.length:
            return
        self.requests[operation][column] += 1
        self.moved[operation][column] += record.length
        power = 1 << (record.length - 1).bit_length()
        sizes = self.sizes[operation]
        sizes[power] = sizes.get(power, 0) + 1
        first = min(self.rows - 1, record.offset * self.rows // self.size)
        last = (record.offset + record.length - 1) * self.rows // self.size
        last = max(first, min(self.rows - 1, last))
        heat = self.heat[operation][column]
        for row in range(first, last + 1):
            heat[row] += record.length // (last + 1 - first)

    def latency(self, part: float) -> list[float | None]:
        """By column: the latency that so many percent are not above; None where nothing was."""
        return [_percentile(counts, part) for counts in self._latency]

    def latency_cells(self) -> tuple[list[float], list[list[int]]]:
        """The bounds of the rows, in nanoseconds; and by column, by row: requests."""
        rows = _POWERS * _STEPS
        bounds = [_bound(step) for step in range(rows + 1)]
        return bounds, [[counts.get(step, 0) for step in range(rows)] for counts in self._latency]


class Span(NamedTuple):
    """What a picture has to have room for.

    Attributes:
        start: when the first request began, in nanoseconds.
        end: when the last one ended.
        furthest: the end of the disk that they show.
        requests: how many.
    """

    start: int
    end: int
    furthest: int
    requests: int


def span_of(records: Iterable[Record]) -> Span | None:
    """Return the span of the requests; None if there is none."""
    start = end = furthest = requests = 0
    for record in records:
        if record.is_request:
            start = min(start, record.start) if requests else record.start
            end = max(end, record.end)
            furthest = max(furthest, record.offset + record.length)
            requests += 1
    return Span(start, end, furthest, requests) if requests else None


def _step(latency: int) -> int:
    shifted = max(latency, 1 << _LOWEST)
    power = shifted.bit_length() - 1
    part = (shifted << 3 >> power) & (_STEPS - 1)
    return min((power - _LOWEST) * _STEPS + part, _POWERS * _STEPS - 1)


def _bound(step: int) -> float:
    """Where a step of latency begins, in nanoseconds."""
    power, part = divmod(step, _STEPS)
    return float((1 << (power + _LOWEST)) * (1 + part / _STEPS))


def _percentile(counts: dict[int, int], part: float) -> float | None:
    wanted = sum(counts.values()) * part / 100
    seen = 0
    for step, count in sorted(counts.items()):
        seen += count
        if seen >= wanted:
            return _bound(step + 1)
    return None
