"""How far a long copy is: one line on a terminal, taken away at the end."""

from __future__ import annotations

import time

from ..hypervisor import Closing
from .environment import Environment

_INTERVAL = 0.2  # seconds between two updates


class ProgressLine(Closing):
    """Draws a percentage whenever it is told how far things are, and erases it at the end.

    Args:
        env: whose stderr it is; if that is no terminal, nothing is drawn.
        what: what is being done.
        quiet: draw nothing.
    """

    def __init__(self, env: Environment, what: str, *, quiet: bool) -> None:
        self._env = env
        self._what = what
        self._live = not quiet and env.err.isatty()
        self._next = 0.0
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Draw the line anew, unless the last one is too fresh."""
        now = time.monotonic()
        if not self._live or now < self._next:
            return
        self._next = now + _INTERVAL
        self._env.draw(f"{self._what}: {done * 100 // total}%")
        self._shown = True

    def close(self) -> None:
        """Erase the line."""
        if self._shown:
            self._shown = False
            self._env.draw("")
