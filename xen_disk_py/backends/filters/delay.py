"""``delay``: a slower disk.

``--filter delay:read=10ms,write=5ms-20ms`` waits before each request: a fixed time, or one between
two, drawn anew for each. Requests wait side by side, up to 64 of them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from ...errors import UsageError
from ...units import parse_duration
from .. import Backend
from ..filter import Filter, do_all


class Delay(Filter):
    """Waits before each request.

    Args:
        source: the disk below.
        read: how long before each read: ``10ms``, or ``5ms-20ms``; units are us, ms and s.
        write: before each write.
        flush: before each flush.
        discard: before each discard.
        seed: draws the same times again.
    """

    threads = 64

    def __init__(
        self,
        source: Backend,
        *,
        read: str = "0",
        write: str = "0",
        flush: str = "0",
        discard: str = "0",
        seed: int = 0,
    ) -> None:
        super().__init__(source)
        # Many wait here at once; below, as many are at work as the source lets in.
        self._inside = threading.Semaphore(max(1, source.threads))
        self._is_shared = source.threads > 1
        self._waits = 0
        self.configure(read=read, write=write, flush=flush, discard=discard, seed=seed)

    def configure(self, *, read: str, write: str, flush: str, discard: str, seed: int) -> None:
        """Wait so long from now on; what is drawn begins anew."""
        given = {"read": read, "write": write, "flush": flush, "discard": discard}
        bounds = {name: _bounds(name, text) for name, text in given.items()}
        self._dice = random.Random(seed)
        self._bounds = bounds

    def counters(self) -> dict[str, int]:
        """How many requests have waited."""
        return {"delayed": self._waits}

    def _wait(self, operation: str) -> None:
        least, most = self._bounds[operation]
        if most:
            self._waits += 1
            time.sleep(least if least == most else self._dice.uniform(least, most))

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, where that waits for nothing, in the queue's own thread."""
        if self._bounds["read"][1]:
            return 0
        if self._is_shared:
            return self.source.read_nowait(buffers, offset)
        return self._if_free(self.source.read, buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write, where that waits for nothing, in the queue's own thread."""
        if self._bounds["write"][1]:
            return 0
        if self._is_shared:
            return self.source.write_nowait(buffers, offset)
        return self._if_free(self.source.write, buffers, offset)

    def _if_free(self, call: Any, buffers: Sequence[memoryview], offset: int) -> int:
        """Do what the queue's thread would do without the filter, unless another is inside."""
        if not self._inside.acquire(blocking=False):
            return 0
        try:
            return do_all(call, buffers, offset)
        finally:
            self._inside.release()

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Wait, then read."""
        self._wait("read")
        with self._inside:
            return do_all(self.source.read, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Wait, then write."""
        self._wait("write")
        with self._inside:
            return do_all(self.source.write, buffers, offset)

    def flush(self) -> None:
        """Wait, then flush."""
        self._wait("flush")
        with self._inside:
            self.source.flush()

    def discard(self, offset: int, length: int) -> None:
        """Wait, then discard."""
        self._wait("discard")
        with self._inside:
            self.source.discard(offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """Wait, then discard."""
        self._wait("discard")
        with self._inside:
            self.source.discard_securely(offset, length)


def _bounds(name: str, text: str) -> tuple[float, float]:
    least, dash, most = text.partition("-")
    try:
        bounds = parse_duration(least), parse_duration(most if dash else least)
    except UsageError as error:
        raise UsageError(f"--filter delay: {name}={text}: {error}") from None
    if bounds[0] > bounds[1]:
        raise UsageError(f"--filter delay: {name}={text}: the shorter time goes first")
    return bounds
