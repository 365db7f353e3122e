"""``readahead``: sequential reads are served from memory, which is filled ahead of them.

``--filter readahead:window=1M`` is for a source with a high latency, such as a server far away. A
read that starts where another just ended fetches the window after it in the same request to the
source. Random reads cost what they cost without it.
"""

from __future__ import annotations

from collections import OrderedDict

from ...errors import UsageError
from .. import Backend
from .cache import Cache

_STREAMS = 16  # readers that are known at once


class Readahead(Cache):
    """Reads more than was asked for, of what is read in order.

    Args:
        source: the disk below.
        window: bytes to read at once.
        size: bytes of memory, at most; no less than four windows.
    """

    _called = "readahead"

    def __init__(self, source: Backend, *, window: int = 1 << 20, size: int = 16 << 20) -> None:
        self._window = 0
        self._next: OrderedDict[int, None] = OrderedDict()  # blocks that continue a reader
        super().__init__(source, size=64 << 10, block=min(64 << 10, max(window, 4096)))
        self.configure(size=size, window=window)

    def configure(self, *, size: int, window: int = -1, block: int = -1) -> None:
        """Read so much ahead from now on."""
        if window < 0:  # from Cache's constructor
            super().configure(size=size, block=block)
            return
        if window < self._block or size < 4 * window:
            raise UsageError(
                f"--filter readahead: window={window} is less than {self._block}, or more than a "
                f"quarter of size={size}"
            )
        super().configure(size=size, block=self._block)
        self._window = window

    def _more(self, missing: list[int], token: object) -> list[int]:
        """Continue behind what is missing, if it continues what was read before."""
        if not missing:
            return missing
        is_sequential = missing[0] in self._next
        self._next.pop(missing[0], None)
        last = missing[-1]
        if is_sequential:
            end = min(last + self._window // self._block, (self.source.size - 1) // self._block)
            for number in range(last + 1, end + 1):
                if number in self._blocks or number in self._fetching:
                    break
                missing.append(number)
                self._fetching[number] = token
        self._next[missing[-1] + 1] = None
        while len(self._next) > _STREAMS:
            self._next.popitem(last=False)
        return missing
