"""Counts what happens in bursts, and reports each burst once."""

from __future__ import annotations

import threading
from time import monotonic
from typing import Callable

CALM = 1.0
"""Seconds without another one after which a burst is over."""
LONGEST = 10.0
"""Seconds after which it is told, though more come."""


class Bursts:
    """Counts one kind of happening; a thread of its own tells of each burst.

    Args:
        report: called with how many there were, and what was said of the first; from that thread,
            or from whoever calls :meth:`flush`; never twice at once.
        calm, longest: seconds.
    """

    def __init__(
        self,
        report: Callable[[int, str], None],
        *,
        calm: float = CALM,
        longest: float = LONGEST,
    ) -> None:
        self._report = report
        self._calm, self._longest = calm, longest
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._count = 0
        self._first = ""
        self._latest = 0.0
        self._has_thread = False

    def add(self, text: str) -> None:
        """Count one; never waits for the report."""
        with self._changed:
            self._count += 1
            self._latest = monotonic()
            if self._count == 1:
                self._first = text
            if self._has_thread:
                return
            thread = threading.Thread(target=self._wait, name="burst", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread is to be had: the next one tries, or flush() tells
                return
            self._has_thread = True

    def flush(self) -> None:
        """Tell of what has been counted, now."""
        with self._telling:
            with self._changed:
                count, first, self._count = self._count, self._first, 0
                self._changed.notify()
            if count:
                self._report(count, first)

    def _wait(self) -> None:
        with self._changed:
            end = monotonic() + self._longest
            while self._count:
                due = min(self._latest + self._calm, end)
                left = due - monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._has_thread = False
        self.flush()
