"""For how long nothing has moved, for a watchdog.

The queue's thread notes what it does as it goes, which costs an increment; whoever asks, from one
other thread now and then, compares with what it saw the last time.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from time import perf_counter
from typing import Protocol


class UnderWay(Protocol):
    """A request that is not answered."""

    since: float
    """When somebody began to do it; infinite while it waits for a thread or a retry."""


class StallDetector:
    """Tells how long a request has been under way with nothing moving.

    Args:
        is_asynchronous: the backend may have one request wait for others: there the oldest
            counts, from the first time that it is seen to be that.

    Attributes:
        moves: grows with each batch, and each time that responses are published.
        is_amid: requests are being done in the queue's own thread.
    """

    def __init__(self, *, is_asynchronous: bool) -> None:
        self.moves = 0
        self.is_amid = False
        self._is_asynchronous = is_asynchronous
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0
        self._oldest: tuple[int, float] | None = None
        self._oldest_at = 0.0

    def stalled_for(self, unanswered: Iterable[UnderWay], unpublished: int) -> float:
        """For how many seconds a request has been under way and nothing moved; 0 if none is.

        A request counts from when somebody began to do it. What is done in the queue's own
        thread counts from the first time that it is seen there, and each answer is a new
        beginning.

        Args:
            unanswered: in the order in which they were begun.
            unpublished: how many answers are not published.
        """
        now = perf_counter()
        seen = (self.moves, unpublished) if self.is_amid else None
        if seen is None or seen != self._seen:
            self._seen, self._seen_at = seen, now
        begun = [each for each in unanswered if each.since < inf]
        if self._is_asynchronous:
            oldest = (id(begun[0]), begun[0].since) if begun else None
            if oldest is None or oldest != self._oldest:
                self._oldest, self._oldest_at = oldest, now
            since = self._oldest_at
        else:
            since = min([each.since for each in begun], default=now)
        return max(0.0, now - min(since, self._seen_at))
