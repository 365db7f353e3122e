"""How much else is used until the same is used again (pure; memory is bounded).

Of all blocks a part is followed, chosen by a hash of their numbers, fewer as there come to be more:
the method of SHARDS (Waldspurger and others, "Efficient MRC Construction with SHARDS", FAST 2015).
"""

from __future__ import annotations

from bisect import bisect_right

from .histogram import Histogram

_MODULUS = 1 << 24
_MOST = 4096  # blocks that are followed


class ReuseDistance:
    """Counts distances: how many other blocks were used between two uses of one.

    Attributes:
        distances: in blocks.
        first_uses: of the same weight: uses of blocks that were not used before.
    """

    def __init__(self) -> None:
        self.distances = Histogram()
        self.first_uses = 0
        self._threshold = _MODULUS
        self._last: dict[int, int] = {}  # when a block was used last, by its number
        self._times: list[int] = []  # all of these, in order
        self._now = 0

    def use(self, block: int) -> None:
        """Note that a block is used."""
        if _hash(block) >= self._threshold:
            return
        weight = _MODULUS // self._threshold
        before = self._last.get(block)
        self._now += 1
        if before is None:
            self.first_uses += weight
        else:
            place = bisect_right(self._times, before)
            self.distances.add((len(self._times) - place) * weight, weight)
            del self._times[place - 1]
        self._last[block] = self._now
        self._times.append(self._now)
        if len(self._last) > _MOST:
            self._follow_fewer()

    def _follow_fewer(self) -> None:
        self._threshold //= 2
        self._last = {
            block: time for block, time in self._last.items() if _hash(block) < self._threshold
        }
        self._times = sorted(self._last.values())


def _hash(block: int) -> int:
    return (block * 0x9E3779B97F4A7C15 >> 24) % _MODULUS
