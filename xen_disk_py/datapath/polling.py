"""How long a queue busy-polls before it sleeps.

A guest that answers quickly finds us awake: no event is sent, received and unmasked, which costs
more than most requests do. What is lost in vain is bounded by the work: half of it, or, if that
was hardly more than the least there ever was, some times as much. For then the guest waits for
each little answer before it asks again, and how long that takes depends, as our own work does,
on how fast the machine is. Nothing is taken from anybody else who wants the processor.

Pure, and sparing with the clock, of which reading is a system call on a paravirtualised dom0, as
dear as any (23 µs in an emulated one, where a read of a page takes 42): times, in seconds, are
wanted only now and then, as long as they do not matter.
"""

from __future__ import annotations

from math import inf

_LITTLE = 3  # times the least work: less than this is little
_TIMES = 16  # as long as the least work, to busy-poll after little
_MOST = 0.002
_TIMED = 8  # one in so many sleeps is timed, if the last that was timed was long


class Pace:
    """The pace of one queue.

    Attributes:
        window: seconds to busy-poll before sleeping.
        is_quick: it is worth while: the last sleep that was timed was shorter than that.
    """

    def __init__(self) -> None:
        self.window = 0.0
        self.is_quick = False
        self._sleeps = 0
        self._least = inf  # work of one batch

    def is_to_be_timed(self) -> bool:
        """Tell, before a sleep, whether it and the work after it are to be timed."""
        self._sleeps += 1
        return self.is_quick or self._sleeps % _TIMED == 1

    def slept(self, seconds: float) -> None:
        """Note how long a sleep was."""
        self.is_quick = seconds < self.window

    def worked(self, seconds: float) -> None:
        """Note how long a batch took."""
        self._least = least = min(self._least, seconds)
        more = _TIMES * least if seconds < _LITTLE * least else 0.0
        self.window = min(seconds / 2 + more, _MOST)

    def crowded(self) -> None:
        """Note that somebody else wants the processor."""
        self.is_quick = False
