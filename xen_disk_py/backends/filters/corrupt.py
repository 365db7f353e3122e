"""``corrupt``: bits that flip.

``--filter corrupt:rate=0.001`` flips one bit in each thousandth read of what it returns; with
``operations=write`` in what is stored. For tests of file systems and databases that have checksums.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Literal

from ...errors import UsageError
from .. import Backend
from ..filter import Filter, do_all
from .ranges import parse_ranges, touches


class Corrupt(Filter):
    """Flips one bit of some requests.

    Args:
        source: the disk below.
        rate: the part of the requests that is changed, 0 to 1.
        operations: ``read`` changes what is returned, ``write`` what is stored; or
            ``read+write``.
        range: only requests that touch these bytes: ``1M-2M``, several with + between them.
        seed: draws the same bits again.
    """

    def __init__(
        self,
        source: Backend,
        *,
        rate: float,
        operations: Literal["read", "write", "read+write"] = "read",
        range: str = "",  # noqa: A002 - as the user writes it
        seed: int = 0,
    ) -> None:
        super().__init__(source)
        self.keeps_data = False
        self._lock = threading.Lock()
        self._flipped = 0
        self.configure(rate=rate, operations=operations, range=range, seed=seed)

    def configure(self, *, rate: float, operations: str, range: str, seed: int) -> None:  # noqa: A002
        """Flip these from now on; what is drawn begins anew."""
        if not 0 <= rate <= 1:
            raise UsageError(f"--filter corrupt: rate={rate:g} is not from 0 to 1")
        ranges = parse_ranges("corrupt", range) if range else None
        with self._lock:
            self._rate, self._operations = rate, operations.split("+")
            self._ranges, self._dice = ranges, random.Random(seed)

    def counters(self) -> dict[str, int]:
        """How many bits were flipped."""
        return {"flipped": self._flipped}

    def _bit(self, operation: str, offset: int, length: int) -> int | None:
        """Draw a bit of the request that flips; None: none does."""
        if operation not in self._operations:
            return None
        if self._ranges is not None and not touches(self._ranges, offset, length):
            return None
        with self._lock:
            if self._dice.random() >= self._rate:
                return None
            self._flipped += 1
            return self._dice.randrange(length * 8)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, and perhaps flip a bit."""
        done = do_all(self.source.read, buffers, offset)
        bit = self._bit("read", offset, sum(map(len, buffers)))
        if bit is not None:
            at = bit // 8
            for buffer in buffers:
                if at < len(buffer):
                    buffer[at] ^= 1 << bit % 8
                    break
                at -= len(buffer)
        return done

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write, perhaps with a bit flipped; the guest's pages stay as they are."""
        bit = self._bit("write", offset, sum(map(len, buffers)))
        if bit is None:
            return self.source.write(buffers, offset)
        content = bytearray(b"".join(buffers))
        content[bit // 8] ^= 1 << bit % 8
        return do_all(self.source.write, [memoryview(content)], offset)
