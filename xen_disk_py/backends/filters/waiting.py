"""What filters have in common that make requests wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Callable, TypeVar

from .. import Backend
from ..filter import Filter, do_all

T = TypeVar("T")


class Waiting(Filter):
    """Many requests wait at once; below, as many are at work as the source lets in.

    What waits for nothing is done in the queue's own thread, as it is without the filter.
    """

    threads = 64

    def __init__(self, source: Backend) -> None:
        super().__init__(source)
        at_once = source.threads if source.asynchronous is None else self.threads
        self._inside = threading.Semaphore(max(1, at_once))
        self._is_shared = at_once > 1
        self._has_waited = threading.local()
        self._lock = threading.Lock()  # of what is counted: several threads wait

    def _waits_for(self, operation: str) -> bool:
        """Tell whether requests of this kind may wait."""
        return True

    def passes_on(self, method: str) -> bool:
        """What waits for nothing, where the source lets several in."""
        operation, _, nowait = method.partition("_")
        return bool(nowait) and self._is_shared and not self._waits_for(operation)

    def after_pause(self, call: Callable[[], T]) -> T:
        """Do a request that does not wait here, in this thread."""
        self._has_waited.now = True
        try:
            return call()
        finally:
            self._has_waited.now = False

    def _do(self, operation: str, length: int, call: Callable[[], int | None]) -> int | None:
        if not getattr(self._has_waited, "now", False):
            pause = self.pause(operation, length)
            if pause > 0:
                time.sleep(pause)
        with self._inside:
            return call()

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Wait, then read."""
        length = sum(map(len, buffers))
        return self._do("read", length, lambda: do_all(self.source.read, buffers, offset))

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Wait, then write."""
        length = sum(map(len, buffers))
        return self._do("write", length, lambda: do_all(self.source.write, buffers, offset))

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, where that waits for nothing."""
        if self._waits_for("read"):
            return 0
        if self._is_shared:
            return self.source.read_nowait(buffers, offset)
        return self._if_free(self.source.read, buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write, where that waits for nothing."""
        if self._waits_for("write"):
            return 0
        if self._is_shared:
            return self.source.write_nowait(buffers, offset)
        return self._if_free(self.source.write, buffers, offset)

    def flush(self) -> None:
        """Wait, then flush."""
        self._do("flush", 0, self.source.flush)

    def discard(self, offset: int, length: int) -> None:
        """Wait, then discard."""
        self._do("discard", length, lambda: self.source.discard(offset, length))

    def discard_securely(self, offset: int, length: int) -> None:
        """Wait, then discard."""
        self._do("discard", length, lambda: self.source.discard_securely(offset, length))

    def _if_free(
        self,
        call: Callable[[Sequence[memoryview], int], int | None],
        buffers: Sequence[memoryview],
        offset: int,
    ) -> int:
        """Do what the queue's thread would do without the filter, unless another is inside."""
        if not self._inside.acquire(blocking=False):
            return 0
        try:
            return do_all(call, buffers, offset)
        finally:
            self._inside.release()
