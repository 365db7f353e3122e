"""``error``: a disk that fails now and then.

``--filter error:rate=0.01,operations=write+flush,errno=ENOSPC`` fails one write or flush in a
hundred; ``every=100`` each hundredth. With ``armed=FILE`` only while that file exists. A request
that fails does not reach the disk below.
"""

from __future__ import annotations

import errno as errors
import os
import random
import threading
from collections.abc import Sequence
from typing import ClassVar

from ...errors import UsageError
from .. import Backend
from ..filter import Filter
from .ranges import parse_ranges, touches

_OPERATIONS = ("read", "write", "flush", "discard")
_BOOLEANS = ("", "yes", "no")  # of armed; everything else is a file


class Error(Filter):
    """Fails some requests.

    Args:
        source: the disk below.
        rate: the part of the requests that fails, 0 to 1.
        every: that each so many-th fails, in place of ``rate``.
        operations: which may fail: some of read, write, flush and discard, with + between them.
        errno: the error's name, such as ``EIO``.
        range: only requests that touch these bytes: ``1M-2M``, several with + between them; a flush
            touches none.
        armed: only while there is a file of this name; ``no``: not before it is armed by a command,
            ``yes`` (or nothing): always.
        sticky: once one has failed, all of these fail.
        seed: draws the same failures again.
    """

    actions: ClassVar = {"arm": {"armed": "yes"}, "disarm": {"armed": "no"}}

    def __init__(
        self,
        source: Backend,
        *,
        rate: float = 1.0,
        every: int = 0,
        operations: str = "+".join(_OPERATIONS),
        errno: str = "EIO",
        range: str = "",  # noqa: A002 - as the user writes it
        armed: str = "",
        sticky: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(source)
        self._lock = threading.Lock()
        self._failed = 0
        self.configure(
            rate=rate,
            every=every,
            operations=operations,
            errno=errno,
            range=range,
            armed=armed,
            sticky=sticky,
            seed=seed,
        )

    def configure(
        self,
        *,
        rate: float,
        every: int,
        operations: str,
        errno: str,
        range: str,  # noqa: A002 - as the user writes it
        armed: str,
        sticky: bool,
        seed: int,
    ) -> None:
        """Fail these from now on; what is counted and drawn begins anew, nothing is sticky yet."""
        chosen = set(operations.split("+"))
        unknown = chosen - set(_OPERATIONS)
        if unknown:
            known = "+".join(_OPERATIONS)
            raise UsageError(f"--filter error: operations={operations}: use some of {known}")
        if not 0 <= rate <= 1:
            raise UsageError(f"--filter error: rate={rate:g} is not from 0 to 1")
        if every < 0:
            raise UsageError(f"--filter error: every={every} is less than 0")
        number = getattr(errors, errno, None)
        if not isinstance(number, int) or not errno.startswith("E"):
            raise UsageError(f"--filter error: errno={errno}: there is no such error; EIO is one")
        ranges = parse_ranges("error", range) if range else None
        with self._lock:
            self._operations, self._ranges, self._number = chosen, ranges, number
            self._rate, self._every, self._sticky = rate, every, sticky
            self._file = armed if armed not in _BOOLEANS else ""
            self._is_disarmed = armed == "no"
            self._count = 0
            self._has_failed = False
            self._dice = random.Random(seed)

    def passes_on(self, method: str) -> bool:
        """Everything while it is disarmed."""
        return self._is_disarmed

    def counters(self) -> dict[str, int]:
        """How many requests could have failed since the last change, and how many ever have."""
        return {"matched": self._count, "failed": self._failed}

    def _try(self, operation: str, offset: int = 0, length: int = 0) -> None:
        """Raise if this request is to fail."""
        if operation not in self._operations:
            return
        if self._ranges is not None and not touches(self._ranges, offset, length):
            return
        if self._is_disarmed or (self._file and not os.path.exists(self._file)):
            return
        with self._lock:
            self._count += 1
            if self._every:
                fails = self._count % self._every == 0
            else:
                fails = self._dice.random() < self._rate
            fails |= self._sticky and self._has_failed
            self._has_failed |= fails
            self._failed += fails
            number = self._number
        if fails:
            raise OSError(number, f"{os.strerror(number)} (the error filter)")

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read, or fail."""
        self._try("read", offset, sum(map(len, buffers)))
        return self.source.read(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write, or fail."""
        self._try("write", offset, sum(map(len, buffers)))
        return self.source.write(buffers, offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, while it is disarmed."""
        return self.source.read_nowait(buffers, offset) if self._is_disarmed else 0

    def write_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write, while it is disarmed."""
        return self.source.write_nowait(buffers, offset) if self._is_disarmed else 0

    def flush(self) -> None:
        """Flush, or fail."""
        self._try("flush")
        self.source.flush()

    def discard(self, offset: int, length: int) -> None:
        """Discard, or fail."""
        self._try("discard", offset, length)
        self.source.discard(offset, length)

    def discard_securely(self, offset: int, length: int) -> None:
        """Discard, or fail."""
        self._try("discard", offset, length)
        self.source.discard_securely(offset, length)
