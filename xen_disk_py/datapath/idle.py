"""What a queue does when there is nothing to do: busy-poll for a moment, then sleep.

A guest that only sends events, and asks for nothing, is put off (XSA-332).
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from math import inf
from time import perf_counter

from ..hypervisor import EventChannel
from ..ring import BackRing
from .polling import Pace
from .statistics import WAKEUPS, Counters

_CROWDED = 20  # times as long as a look takes: if one took so long, others want the processor
_FLOOD = 16  # wake-ups in a row that find nothing, before the next is put off
_CALM = 10  # milliseconds that it is put off


class Idle:
    """The pauses of one queue.

    Args:
        channel: the queue's event channel.
        others: what else wakes it: descriptors that poll readable.
        statistics: where wake-ups are counted.

    Attributes:
        spurious: wake-ups since there was something to do; whoever does something sets it to 0.
        is_timed: what is done until the next sleep is timed.
    """

    def __init__(self, channel: EventChannel, others: Sequence[int], statistics: Counters) -> None:
        self.spurious = 0
        self.is_timed = False
        self._pace = Pace()
        self._now = 0.0  # as we know it
        self._channel = channel
        self._statistics = statistics
        self._sleeper, self._calm = select.poll(), select.poll()
        self._sleeper.register(channel.fileno(), select.POLLIN)
        for descriptor in others:
            self._sleeper.register(descriptor, select.POLLIN)
            self._calm.register(descriptor, select.POLLIN)

    def busy_poll(self, ring: BackRing) -> bool:
        """Look for more to do, as long as the pace says; tell if there is."""
        pace = self._pace
        if not pace.is_quick:
            return ring.has_requests
        last, shortest, until = self._now, inf, self._now + pace.window
        while not ring.has_requests:
            os.sched_yield()  # whoever else wants the processor has it now
            now = perf_counter()
            took, last = now - last, now
            shortest = min(shortest, took)
            if now >= until or took > _CROWDED * shortest:
                if now < until:
                    pace.crowded()
                self._now = now
                return False
        self._now = last
        return True

    def sleep(self, milliseconds: float | None) -> None:
        """Sleep until something wakes us, or for so long; the event is acknowledged."""
        was_timed, self.is_timed = self.is_timed, self._pace.is_to_be_timed()
        if self.is_timed and not was_timed:
            self._now = perf_counter()
        woken = [descriptor for descriptor, _ in self._sleeper.poll(milliseconds)]
        if self.is_timed:
            began, self._now = self._now, perf_counter()
            self._pace.slept(self._now - began)
        self._statistics.words[WAKEUPS] += 1
        if self._channel.fileno() in woken:
            self.spurious += 1
            if self.spurious > _FLOOD:
                # Nothing but events: the port stays masked for a while.
                self._calm.poll(_CALM)
            self._channel.acknowledge()

    def worked(self) -> None:
        """Note that a batch is done, if it was timed."""
        if self.is_timed:
            began, self._now = self._now, perf_counter()
            self._pace.worked(self._now - began)
