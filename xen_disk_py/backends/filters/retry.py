"""``retry``: retries failed requests a few times before the guest gets an I/O error.

``--filter retry:times=5,pause=100ms`` waits 100 ms, 200 ms, 400 ms, … between attempts, at most
``longest``. Only errors that may be temporary are retried: those that ``--on-error hold`` retries
indefinitely. A failed flush is retried only where a second one can be trusted (NBD, RBD): Linux
drops what it could not write, and the next flush succeeds without it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Callable

from ...errors import UsageError
from ...units import parse_duration
from .. import Backend
from ..passing import passes
from .waiting import Waiting


class Retry(Waiting):
    """Tries requests again.

    Args:
        source: the disk below.
        times: how often a request is tried again.
        pause: how long after the first try; twice as long after each further one.
        longest: the longest pause.
    """

    def __init__(
        self, source: Backend, *, times: int = 5, pause: str = "100ms", longest: str = "5s"
    ) -> None:
        super().__init__(source)
        self._retries = self._helped = 0
        self._closed = threading.Event()
        self.configure(times=times, pause=pause, longest=longest)

    def configure(self, *, times: int, pause: str, longest: str) -> None:
        """Try so often from now on; what waits already goes by what held when it began."""
        found = []
        for name, text in (("pause", pause), ("longest", longest)):
            try:
                found.append(parse_duration(text))
            except UsageError as error:
                raise UsageError(f"--filter retry: {name}={text}: {error}") from None
        if times < 0:
            raise UsageError(f"--filter retry: times={times} is less than 0")
        if found[1] < found[0]:
            raise UsageError(f"--filter retry: longest={longest} is less than pause={pause}")
        self._plan = times, found[0], found[1]

    def counters(self) -> dict[str, int]:
        """How many tries there were but the first ones, and how many requests they saved."""
        return {"retries": self._retries, "saved": self._helped}

    def _waits_for(self, operation: str) -> bool:
        return False

    def passes_on(self, method: str) -> bool:
        """Nothing: any request may fail."""
        return False

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read at once; what fails is tried again in a thread."""
        try:
            return super().read_nowait(buffers, offset)
        except Exception as error:
            if passes(error):
                return 0
            raise

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write at once; what fails is tried again in a thread."""
        try:
            return super().write_nowait(buffers, offset)
        except Exception as error:
            if passes(error):
                return 0
            raise

    def _do(self, operation: str, length: int, call: Callable[[], int | None]) -> int | None:
        times, pause, longest = self._plan
        if operation == "flush" and not self.source.repeats_flush:
            times = 0
        for left in range(times, -1, -1):
            try:
                with self._inside:
                    result = call()
            except Exception as error:
                if not left or not passes(error) or self._closed.wait(min(pause, longest)):
                    raise
                with self._lock:
                    self._retries += 1
                pause *= 2
            else:
                if left < times:
                    with self._lock:
                        self._helped += 1
                return result
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Wait no longer, and close the source."""
        self._closed.set()
        super().close()
