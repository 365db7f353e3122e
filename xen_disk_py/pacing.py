"""When a queue publishes what it has answered, and how long it looks on before it sleeps.

Both are about not disturbing the guest and not being woken: an event costs the sender a
hypercall, the receiver an interrupt, and a sleeper more than most requests do.

*Publishing.* A guest that keeps many requests in flight, and puts them one by one, would get an
interrupt for each, in the midst of putting the next. So responses wait for company as long as
the guest goes on sending, but for half of what it keeps in flight at most; then it has as many
left to wait for, and neither side is ever idle. How many it keeps is learnt: more is tried from
time to time, and when it sends nothing more, it has exactly those whose responses wait. They
are published then. A guest with one request at a time waits only when more is tried.

*Looking on.* A guest that answers quickly finds us awake: no event is sent, received and
unmasked. The time is some times the work that was done if that was little, half of it if it was
much, and none if somebody else wants the processor.

Pure: times, in seconds, come as arguments.
"""

from __future__ import annotations

_PATIENCE = 6  # usual times between two requests until the guest is held to send no more
_PATIENCE_MOST = 0.003
_GROW = 16  # batches after which more are tried, while the guest keeps up
_GROW_AGAIN = 256  # the same after it did not
_DEPTH_MOST = 512
_LITTLE = 0.0001
_TIMES = 8  # as long as the work was, if that was little
_MOST = 0.002


class Pace:
    """The pace of one queue.

    Attributes:
        publish_at: when responses are to be published, though there is no company.
        look_until: when to give up looking on; 0 if that is at once.
    """

    def __init__(self) -> None:
        self.publish_at = 0.0
        self.look_until = 0.0
        self._depth = 1  # requests that the guest keeps in flight
        self._gap = 0.0005  # between two requests
        self._ended = 0.0
        self._batches = 0
        self._grow_at = _GROW
        self._window = 0.0
        self._is_quick = False  # the last sleep was shorter than we would have looked on

    def end(self, began: float, now: float, requests: int, waiting: int) -> bool:
        """Note that requests are done; tell whether to publish.

        Args:
            began: when they were found.
            now: the time.
            requests: how many they were.
            waiting: responses that are not published yet, theirs included.
        """
        work = now - began
        gap = (now - self._ended) / requests
        if gap < _PATIENCE_MOST:  # else it was no pause between two, but the end of a burst
            self._gap += (gap - self._gap) / 4
        self._ended = now
        self._depth = max(self._depth, requests, waiting)
        self._window = min(_TIMES * work, _LITTLE + work / 2, _MOST)
        self.look_until = now + self._window if self._is_quick else 0.0
        self._batches += 1
        if self._batches >= self._grow_at:
            self._grow_at = self._batches + _GROW
            self._depth = min(2 * self._depth + 2, _DEPTH_MOST)
        if 2 * waiting >= self._depth:
            return True
        self.publish_at = now + min(_PATIENCE * self._gap, _PATIENCE_MOST)
        return False

    def stall(self, waiting: int) -> None:
        """Note that the guest sends nothing more while ``waiting`` responses wait."""
        self._depth = waiting
        self._grow_at = self._batches + _GROW_AGAIN

    def wake(self, slept: float) -> None:
        """Note that a sleep has ended, and how long it was."""
        self._is_quick = slept < self._window

    def crowded(self) -> None:
        """Note that somebody else wants the processor."""
        self._is_quick = False
        self.look_until = 0.0
