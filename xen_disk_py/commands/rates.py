"""What disks do in an interval: the difference of two looks at their records (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..datapath.latency import Latency
from ..recovery.survey import Seen

SORTS = ("guest", "iops", "mbs", "p99", "depth", "inflight", "errors", "memory")
"""By what disks can be sorted."""
_KEYS = {
    "iops": "iops",
    "mbs": "bytes_per_second",
    "p99": "latency_p99",
    "depth": "queue_depth",
    "inflight": "in_flight",
    "errors": "errors",
    "memory": "memory",
}


def is_of(seen: Seen, guest: str | None) -> bool:
    """Tell whether a disk is that guest's, by its number or name; None is every guest."""
    return guest is None or guest in (str(seen.facts.domid), seen.facts.domain)


def rates(before: Iterable[Seen], now: Iterable[Seen], seconds: float) -> list[dict[str, Any]]:
    """Say for each disk of ``now`` what it has done since ``before``.

    A disk that was not there before, or is another one since, has done nothing yet.
    """
    known = {_identity(seen): seen for seen in before}
    return [_row(known.get(_identity(seen), seen), seen, seconds) for seen in now]


def _identity(seen: Seen) -> tuple[int, int]:
    return seen.facts.domid, seen.facts.number


def _row(before: Seen, now: Seen, seconds: float) -> dict[str, Any]:
    facts, counters = now.facts, now.counters
    if counters["requests"] < before.counters["requests"]:  # it begins anew
        before = now

    def rate(*names: str) -> float:
        more = sum(counters[name] - before.counters[name] for name in names)
        return round(max(0, more) / seconds, 3)

    latency = Latency.sum(now.latencies).since(Latency.sum(before.latencies))
    return {
        "domid": facts.domid,
        "domain": facts.domain,
        "vdev": facts.vdev,
        "backend": facts.backend,
        "pid": facts.pid,
        "queue_pids": facts.queue_pids,
        "alive": now.alive,
        "seconds": round(seconds, 3),
        "iops": rate("requests"),
        "reads_per_second": rate("reads"),
        "writes_per_second": rate("writes"),
        "bytes_per_second": rate("bytes_read", "bytes_written"),
        "latency_p50": latency.percentile(50),
        "latency_p99": latency.percentile(99),
        "latency_max": latency.maximum,
        # Little's law, which holds for a sample of the requests, too
        "queue_depth": round(rate("requests") * latency.seconds / max(1, latency.count), 3),
        "in_flight": counters["in_flight"] if now.alive else 0,
        "held": counters["held"],
        "errors": counters["errors"],
        "refused": counters["refused"],
        "memory": counters["memory"],
    }


def in_order(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Sort disks: by guest upward, by all else downward."""
    ordered = sorted(rows, key=lambda row: (row["domain"], row["domid"], row["vdev"]))
    if by in _KEYS:
        ordered.sort(key=lambda row: row[_KEYS[by]] or 0, reverse=True)
    return ordered
