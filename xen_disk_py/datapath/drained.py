"""A drained section: no request is under way while what is below the queues changes.

A thread that serves queues looks here between two batches if it is asked to. It finishes what they
have begun, waits until the disk has been changed, and takes the next requests. What waits on the
ring, or for a retry, has not been begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

from ..errors import DeviceError


class DrainedSection:
    """The drained section of one disk (QEMU has the term, too).

    Attributes:
        is_wanted: a thread waits to enter it, or is in it.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self._changed = threading.Condition()
        self._threads: dict[object, Callable[[], None]] = {}
        self._drained: set[object] = set()

    def enter(self, thread: object, ask: Callable[[], None]) -> None:
        """Begin to serve; waits while the disk is being changed.

        Args:
            thread: serves queues of the disk.
            ask: has it call :meth:`wait` when nothing of theirs is under way.
        """
        with self._changed:
            while self.is_wanted:
                self._changed.wait()
            self._threads[thread] = ask

    def leave(self, thread: object) -> None:
        """Serve no longer."""
        with self._changed:
            self._threads.pop(thread, None)
            self._changed.notify_all()

    def wait(self, thread: object) -> None:
        """Take nothing until the disk has been changed, or nobody wants to change it any longer."""
        with self._changed:
            self._drained.add(thread)
            self._changed.notify_all()
            while self.is_wanted:
                self._changed.wait()
            self._drained.discard(thread)

    @contextmanager
    def entered(self, timeout: float) -> Iterator[None]:
        """Keep the disk drained in the ``with`` block; for one thread at a time.

        Raises:
            DeviceError: a request has not returned within ``timeout`` seconds.
        """
        with self._changed:
            self.is_wanted = True
            for ask in self._threads.values():
                ask()
        try:
            self._await(timeout)
            yield
        finally:
            with self._changed:
                self.is_wanted = False
                self._changed.notify_all()
                for ask in self._threads.values():
                    ask()  # it may wait for a request of its own yet

    def _await(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._threads.keys() <= self._drained:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeviceError(
                        f"a request has not returned within {timeout:g} s: nothing was changed; "
                        "try again"
                    )
                self._changed.wait(left)
