"""What a thread does when no queue has anything to do: busy-poll for a moment, then sleep.

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


class Wakeups:
    """What wakes a thread for one queue.

    Args:
        channel: the queue's event channel.
        ends: what polls readable when a request ends that is done elsewhere.
        statistics: where wake-ups are counted.

    Attributes:
        spurious: wake-ups since there was something to do; whoever does something sets it to 0.
    """

    def __init__(self, channel: EventChannel, ends: Sequence[int], statistics: Counters) -> None:
        self.spurious = 0
        self.channel = channel
        self.statistics = statistics
        self.descriptors = [channel.fileno(), *ends]


class Idle:
    """The pauses of one thread.

    Attributes:
        is_timed: what is done until the next sleep is timed.
    """

    def __init__(self) -> None:
        self.is_timed = False
        self._pace = Pace()
        self._now = 0.0  # as we know it
        self._sleeper = select.poll()
        self._queues: dict[int, Wakeups] = {}  # by what polls readable
        self._others: list[int] = []

    def watch(self, wakeups: Wakeups) -> None:
        """Have a queue wake the thread."""
        for descriptor in wakeups.descriptors:
            self._queues[descriptor] = wakeups
            self._sleeper.register(descriptor, select.POLLIN)

    def watch_descriptor(self, descriptor: int) -> None:
        """Have something else wake it that polls readable."""
        self._others.append(descriptor)
        self._sleeper.register(descriptor, select.POLLIN)

    def forget(self, wakeups: Wakeups) -> None:
        """Have a queue wake it no longer; what it had may be closed already."""
        for descriptor in wakeups.descriptors:
            if self._queues.pop(descriptor, None):
                self._sleeper.unregister(descriptor)

    def forget_descriptor(self, descriptor: int) -> None:
        """Have that wake it no longer."""
        self._others.remove(descriptor)
        self._sleeper.unregister(descriptor)

    def busy_poll(self, rings: Sequence[BackRing]) -> bool:
        """Look for more to do, as long as the pace says; tell if there is."""
        pace = self._pace
        is_quick = pace.is_quick
        last, shortest, until = self._now, inf, self._now + pace.window
        while True:
            for ring in rings:
                if ring.has_requests:
                    self._now = last
                    return True
            if not is_quick:
                return False
            os.sched_yield()  # whoever else wants the processor has it now
            now = perf_counter()
            took, last = now - last, now
            shortest = min(shortest, took)
            if now >= until or took > _CROWDED * shortest:
                if now < until:
                    pace.crowded()
                self._now = now
                return False

    def sleep(self, milliseconds: float | None, *, is_idle: bool = True) -> bool:
        """Sleep until something wakes us, or for so long; events are acknowledged.

        Args:
            milliseconds: at most; None for any time.
            is_idle: nothing that was begun is waited for: that is no measure of a guest's pace.

        Returns:
            Whether something has woken us that is no queue's.
        """
        if is_idle:
            was_timed, self.is_timed = self.is_timed, self._pace.is_to_be_timed()
            if self.is_timed and not was_timed:
                self._now = perf_counter()
        woken = [descriptor for descriptor, _ in self._sleeper.poll(milliseconds)]
        if is_idle and self.is_timed:
            began, self._now = self._now, perf_counter()
            self._pace.slept(self._now - began)
        queues, put_off, is_counted, is_other = self._queues, 0, False, False
        for descriptor in woken:
            queue = queues.get(descriptor)
            if queue is None:
                is_other = True
                continue
            if not is_counted:
                is_counted = True
                queue.statistics.words[WAKEUPS] += 1
            if descriptor == queue.descriptors[0]:
                queue.spurious += 1
                if queue.spurious > _FLOOD:
                    put_off += 1
                else:
                    queue.channel.acknowledge()
        if put_off:
            self._put_off(is_alone=put_off == len(woken))
        return is_other

    def _put_off(self, *, is_alone: bool) -> None:
        """Keep the ports of queues that have nothing but events masked for a while.

        Args:
            is_alone: nothing else has woken us. Else there is something to do first, which is
                pause enough.
        """
        flooded = {queue for queue in self._queues.values() if queue.spurious > _FLOOD}
        if is_alone:
            calm = select.poll()
            for descriptor in self._others:
                calm.register(descriptor, select.POLLIN)
            for descriptor, queue in self._queues.items():
                if queue not in flooded or descriptor != queue.descriptors[0]:
                    calm.register(descriptor, select.POLLIN)
            calm.poll(_CALM)
        for queue in flooded:
            queue.channel.acknowledge()

    def worked(self) -> None:
        """Note that a batch is done, if it was timed."""
        if self.is_timed:
            began, self._now = self._now, perf_counter()
            self._pace.worked(self._now - began)
