"""``protect``: a part of the disk that cannot be written.

``--filter protect:range=0-1M`` fails writes and discards that touch the first MiB (EPERM), and logs
each; ``mode=watch`` lets them pass and only logs.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from typing import Literal

from ...ration import Ration
from .. import Backend
from ..filter import Filter
from .ranges import parse_ranges, touches

log = logging.getLogger("xen_disk_py")

_LINES = 20  # of the log, at once; then one a second


class Protect(Filter):
    """Keeps writes from ranges of the disk.

    Args:
        source: the disk below.
        range: which bytes: ``0-1M``, several with + between them; by default the boot sector.
        mode: ``refuse`` writes and discards there, or only ``watch`` them.
    """

    def __init__(
        self,
        source: Backend,
        *,
        range: str = "0-512",  # noqa: A002 - as the user writes it
        mode: Literal["refuse", "watch"] = "refuse",
    ) -> None:
        super().__init__(source)
        self._touched = 0
        self._lock = threading.Lock()
        self._lines = Ration(_LINES, 1.0)
        self.configure(range=range, mode=mode)

    def configure(self, *, range: str, mode: str) -> None:  # noqa: A002 - as the user writes it
        """Keep these from now on."""
        self._ranges, self._refuses = parse_ranges("protect", range), mode == "refuse"

    def counters(self) -> dict[str, int]:
        """How many writes and discards touched what is protected."""
        return {"touched": self._touched}

    def _check(self, operation: str, offset: int, length: int) -> None:
        if touches(self._ranges, offset, length):
            with self._lock:
                self._touched += 1
                is_told = self._lines.take()  # a guest decides how often
            if is_told:
                log.warning("%s of %d bytes at %d, which are protected", operation, length, offset)
            if self._refuses:
                raise OSError(errno.EPERM, f"{operation} of what is protected")

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write outside of the ranges."""
        self._check("write", offset, sum(map(len, buffers)))
        return self.source.write(buffers, offset)

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write outside of the ranges; inside, ``write`` says no."""
        if touches(self._ranges, offset, sum(map(len, buffers))):
            return 0
        return self.source.write_nowait(buffers, offset)

    def discard(self, offset: int, length: int) -> None:
        """Discard outside of the ranges."""
        self._check("discard", offset, length)
        self.source.discard(offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard outside of the ranges."""
        self._check("discard", offset, length)
        self.source.discard_securely(offset, length)
