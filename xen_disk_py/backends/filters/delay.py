"""``delay``: a slower disk.

``--filter delay:read=10ms,write=5ms-20ms`` waits before each request: a fixed time, or one between
two, drawn anew for each. ``file=FILE`` has times that were measured elsewhere: one a line, for
reads and writes that have none of their own, in turn, and from the beginning again at the end.
Any number of requests wait side by side.
"""

from __future__ import annotations

import itertools
import os
import random

from ...errors import UsageError
from ...units import parse_duration
from .. import Backend
from .waiting import Waiting

_MOST = 16 << 20  # bytes of a file of times


class Delay(Waiting):
    """Waits before each request.

    Args:
        source: the disk below.
        read: how long before each read: ``10ms``, or ``5ms-20ms``; units are us, ms and s.
        write: before each write.
        flush: before each flush.
        discard: before each discard.
        file: how long before a read or write without a time of its own: a line each, in turn.
        seed: draws the same times again.
    """

    def __init__(
        self,
        source: Backend,
        *,
        read: str = "0",
        write: str = "0",
        flush: str = "0",
        discard: str = "0",
        file: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(source)
        self._waits = 0
        self.configure(read=read, write=write, flush=flush, discard=discard, file=file, seed=seed)

    def configure(
        self, *, read: str, write: str, flush: str, discard: str, file: str, seed: int
    ) -> None:
        """Wait so long from now on; what is drawn, and the file, begin anew."""
        given = {"read": read, "write": write, "flush": flush, "discard": discard}
        bounds = {name: _bounds(name, text) for name, text in given.items()}
        times = itertools.cycle(_times(file)) if file else None
        self._dice = random.Random(seed)
        self._times = times
        self._bounds = bounds

    def counters(self) -> dict[str, int]:
        """How many requests have waited."""
        return {"delayed": self._waits}

    def _waits_for(self, operation: str) -> bool:
        return self._bounds[operation][1] > 0 or self._times is not None

    def pause(self, operation: str, length: int) -> float:
        """Draw a time, or take the next of the file."""
        with self._lock:
            least, most = self._bounds[operation]
            if most:
                seconds = least if least == most else self._dice.uniform(least, most)
            elif self._times is not None and operation in ("read", "write"):
                seconds = next(self._times)
            else:
                return 0.0
            self._waits += 1
            return seconds


def _bounds(name: str, text: str) -> tuple[float, float]:
    least, dash, most = text.partition("-")
    try:
        bounds = parse_duration(least), parse_duration(most if dash else least)
    except UsageError as error:
        raise UsageError(f"--filter delay: {name}={text}: {error}") from None
    if bounds[0] > bounds[1]:
        raise UsageError(f"--filter delay: {name}={text}: the shorter time goes first")
    return bounds


def _times(file: str) -> list[float]:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a FIFO, nobody waits
        with open(fd, encoding="utf-8", errors="replace") as opened:
            text = opened.read(_MOST)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--filter delay: file={file}: {reason}") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(parse_duration(line.strip()))
            except UsageError as error:
                raise UsageError(f"--filter delay: {file}, line {number}: {error}") from None
    if not found or len(text) == _MOST:
        raise UsageError(f"--filter delay: file={file}: it has no times, or 16 MiB of them")
    return found
