"""How often something is done whose occasions a guest decides about."""

from __future__ import annotations

import time


class Ration:
    """So many at once, and so many a second after that; for one thread at a time.

    Args:
        burst: how many at once.
        rate: how many a second.
    """

    def __init__(self, burst: int, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = float(burst)
        self._counted_at = time.monotonic()

    @property
    def pause(self) -> float:
        """Seconds until there is one to take."""
        self._count()
        return max(0.0, (1 - self._left) / self._rate)

    def take(self) -> bool:
        """Take one; False if there is none."""
        self._count()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def _count(self) -> None:
        now = time.monotonic()
        self._left = min(self._burst, self._left + max(0.0, now - self._counted_at) * self._rate)
        self._counted_at = now
