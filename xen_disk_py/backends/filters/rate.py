"""``rate``: so many bytes and requests a second, as ``virsh blkdeviotune`` has it.

``--filter rate:bytes=10M,requests=200`` for reads and writes together. What was not used is saved
up for a burst of one second, or as long as ``burst`` says.
"""

from __future__ import annotations

import time

from ...errors import UsageError
from ...units import parse_duration
from .. import Backend
from .waiting import Waiting


class Bucket:
    """Tells how long to wait for a share of so much a second.

    Args:
        speed: units a second.
        burst: seconds for which what is not used is saved up.
    """

    def __init__(self, speed: float, burst: float) -> None:
        self._speed = speed
        self._burst = burst
        self._paid_until = float("-inf")  # by the clock, what was given out lasts until then

    def delay(self, amount: float, now: float) -> float:
        """Give out ``amount``; return how many seconds to wait for it."""
        start = max(self._paid_until, now - self._burst)
        self._paid_until = start + amount / self._speed
        return max(0.0, self._paid_until - now)


class Rate(Waiting):
    """Slows reads and writes down.

    Args:
        source: the disk below.
        bytes: a second; 0: any.
        requests: a second; 0: any.
        burst: for how long what was not used is saved up: ``1s``.
    """

    def __init__(
        self,
        source: Backend,
        *,
        bytes: int = 0,  # noqa: A002 - as the user writes it
        requests: int = 0,
        burst: str = "1s",
    ) -> None:
        super().__init__(source)
        self._waits = 0
        self.configure(bytes=bytes, requests=requests, burst=burst)

    def configure(self, *, bytes: int, requests: int, burst: str) -> None:  # noqa: A002
        """Let so much pass from now on; what waits already waits as long as it was told."""
        try:
            seconds = parse_duration(burst)
        except UsageError as error:
            raise UsageError(f"--filter rate: burst={burst}: {error}") from None
        if bytes < 0 or requests < 0 or not (bytes or requests):
            raise UsageError("--filter rate needs bytes=… or requests=…")
        with self._lock:
            self._bytes = Bucket(bytes, seconds) if bytes else None
            self._requests = Bucket(requests, seconds) if requests else None

    def counters(self) -> dict[str, int]:
        """How many requests have waited."""
        return {"delayed": self._waits}

    def _waits_for(self, operation: str) -> bool:
        return operation in ("read", "write")

    def pause(self, operation: str, length: int) -> float:
        """Take a share, and tell when it begins."""
        if not self._waits_for(operation):
            return 0.0
        now = time.monotonic()
        with self._lock:
            waits = [
                bucket.delay(amount, now)
                for bucket, amount in ((self._bytes, length), (self._requests, 1))
                if bucket is not None
            ]
            self._waits += max(waits) > 0
        return max(waits)
