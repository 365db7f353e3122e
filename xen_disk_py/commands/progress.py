"""How far a long copy is: one line on a terminal, taken away at the end."""

from __future__ import annotations

import time

from ..hypervisor import Closing
from .environment import Environment

_INTERVAL = 0.2  # seconds between two looks of the line


class ProgressLine(Closing):
    """Draws a percentage whenever it is told how far things are, and erases it at the end.

    Args:
        env: whose stderr it is; if that is no terminal, nothing is drawn.
        what: what is being done.
        quiet: draw nothing.
    """

    def __init__(self, env: Environment, what: str, *, quiet: bool) -> None:
        self._stderr = env.stderr
        self._what = what
        self._live = not quiet and env.stderr.isatty()
        self._next = 0.0
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Draw the line anew, unless the last one is too fresh."""
        now = time.monotonic()
        if not self._live or now < self._next:
            return
        self._next = now + _INTERVAL
        self._stderr.write(f"\r\x1b[K{self._what}: {done * 100 // total}%")
        self._stderr.flush()
        self._shown = True

    def close(self) -> None:
        """Erase the line."""
        if self._shown:
            self._shown = False
            self._stderr.write("\r\x1b[K")
            self._stderr.flush()
