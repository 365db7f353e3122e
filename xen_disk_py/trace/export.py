"""A trace as other programs read it: fio's iolog, and what blkparse prints (pure)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from .format import DISCARD, DISCARD_SECURELY, FLUSH, READ, WRITE, Record

_WINDOW = 1 << 16
_SECTOR = 512
_IOLOG = {
    READ: "read",
    WRITE: "write",
    FLUSH: "datasync",
    DISCARD: "trim",
    DISCARD_SECURELY: "trim",
}
_RWBS = {READ: "R", WRITE: "W", FLUSH: "FN", DISCARD: "D", DISCARD_SECURELY: "DE"}


def by_start(records: Iterable[Record], *, window: int = _WINDOW) -> Iterator[Record]:
    """Put the requests of a trace in the order in which they began.

    Args:
        records: in the order in which they ended.
        window: one that took longer than so many others is out of order.
    """
    heap: list[tuple[int, int, Record]] = []
    for record in records:
        if record.is_request:
            heapq.heappush(heap, (record.start, record.number, record))
            if len(heap) > window:
                yield heapq.heappop(heap)[2]
    while heap:
        yield heapq.heappop(heap)[2]


def iolog(records: Iterable[Record], path: str) -> Iterator[str]:
    """Yield the lines of a log of version 3 for ``fio --read_iolog``, from fio 3.31 on.

    Version 2 has no time stamps, but waits, and fio 3.33 waits a thousand times as long as its
    manual says.

    Args:
        records: of a trace.
        path: of the file that fio is to use, absolute, without white space.
    """
    yield "fio version 3 iolog"
    yield f"0 {path} add"
    yield f"0 {path} open"
    first: int | None = None
    stamp = 0  # microseconds
    for record in by_start(records):
        if not record.length and record.operation != FLUSH:
            continue
        first = record.start if first is None else first
        stamp = max(stamp, (record.start - first) // 1000)
        yield f"{stamp} {path} {_IOLOG[record.operation]} {record.offset} {record.length}"
    yield f"{stamp} {path} close"


def blkparse(records: Iterable[Record]) -> Iterator[str]:
    """Yield lines as ``blkparse`` prints them: each request issued (D) and completed (C)."""
    ends: list[tuple[int, int, Record]] = []
    sequence = 0
    for record in by_start(records):
        while ends and ends[0][0] <= record.start:
            end, _, over = heapq.heappop(ends)
            sequence += 1
            yield _line(over, end, sequence, "C")
        sequence += 1
        yield _line(record, record.start, sequence, "D")
        heapq.heappush(ends, (record.end, record.number, record))
    while ends:
        end, _, over = heapq.heappop(ends)
        sequence += 1
        yield _line(over, end, sequence, "C")


def _line(record: Record, time: int, sequence: int, action: str) -> str:
    """A line in blkparse's default format: device, CPU, number, seconds, process, action, what."""
    cpu = max(0, record.queue)
    seconds, nanoseconds = divmod(time, 1_000_000_000)
    stamp = f"{seconds:5d}.{nanoseconds:09d}"
    head = (
        f"202,0   {cpu:2d} {sequence:8d} {stamp} {0:5d} {action:>2s} {_RWBS[record.operation]:>3s}"
    )
    sector, sectors = record.offset // _SECTOR, record.length // _SECTOR
    where = f" {sector} + {sectors}"
    if record.operation == FLUSH:
        where = "" if action == "D" else " 0"
    return f"{head}{where} [{'guest' if action == 'D' else record.status}]"
