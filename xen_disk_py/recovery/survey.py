"""What all disks of this host have done: their records, read without a lock.

Whoever looks every second must not be in the way of a process that takes a disk over, which has
to lock the record. So whether the process that serves a disk lives is seen by its number and the
time when it was started.
"""

from __future__ import annotations

import contextlib
import os

from ..datapath import latency
from ..datapath.journal import SIZE as JOURNAL_SIZE
from ..datapath.latency import Latency
from ..errors import XenUnavailable
from ..host.process import is_process
from ..named import NamedTuple
from . import record
from .facts import Facts

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW  # a pipe waits for nobody


class Seen(NamedTuple):
    """One disk, as its record says."""

    facts: Facts
    counters: dict[str, int]
    latencies: list[Latency]
    """By :data:`~xen_disk_py.datapath.latency.SERIES`, of all queues; nothing in a record that has
    none."""
    alive: bool


def look(directory: str) -> list[Seen]:
    """Read all records, in the order of guests and devices.

    Raises:
        XenUnavailable: they cannot be read; the message says what to do.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise XenUnavailable(f"cannot read {directory}: {error.strerror}: run as root") from error
    found = []
    for name in names:
        with contextlib.suppress(OSError):  # gone meanwhile
            fd = os.open(os.path.join(directory, name), _FLAGS)
            try:
                seen = _read(fd)
            finally:
                os.close(fd)
            if seen is not None:
                found.append(seen)
    return sorted(found, key=lambda seen: (seen.facts.domid, seen.facts.number))


def _read(fd: int) -> Seen | None:
    """Read a record; None for one that says nothing."""
    size = os.fstat(fd).st_size
    queues = record.queues_in(size)
    head = record.read_head(os.pread(fd, record.HEAD, 0)) if queues else None
    if head is None:
        return None
    facts, counters = head
    start = record.HEAD + queues * JOURNAL_SIZE
    data = memoryview(os.pread(fd, size - start, start))
    parts = [
        latency.read(data[at : at + latency.SIZE].cast("Q"))
        for at in range(0, len(data), latency.SIZE)
    ]
    alive = is_process(facts.pid, facts.process_started)
    return Seen(facts, counters, [Latency.sum(each) for each in zip(*parts)], alive)
