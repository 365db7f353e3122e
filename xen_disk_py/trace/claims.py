"""Which parts of a disk are being written, and by whom: a trace has overlapping writes in order.

A trace that has what was written must give the very bytes that the disk has. Where two writes
overlap and neither waits for the other's answer, a guest may find either of them afterwards, but
the disk has one; and what two threads note a moment after they wrote may come in the other order.
So whoever writes claims the place first, and gives it back when that is noted. Who cannot have it
does not write yet. Overlapping writes are then done one after another, each is noted before the
next begins, and the order in the file is the order in which the storage did them. A guest that
waits for the answer before it writes there again (all file systems do) never meets a claim.

No lock is held while something is written, and only a write to the same 16 KiB ever waits.
Nobody waits in a circle: a queue's thread never waits for a claim (a worker does the request), and
a worker claims the parts of its one write in ascending order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

GRAIN = 14
"""What is claimed: 16 KiB, bytes by their number shifted right by this."""


class Claims:
    """The places of one disk that are claimed.

    Attributes:
        owners: by the number of the place. ``setdefault`` claims: it is one step, whatever thread.
        waiting: how many threads wait; whoever has removed an owner calls :meth:`tell` then.
    """

    def __init__(self) -> None:
        self.owners: dict[int, object] = {}
        self.waiting = 0
        self._changed = threading.Condition()

    def are_free(self, offset: int, length: int) -> bool:
        """Tell whether an extent of so many bytes could be claimed now."""
        places = range(offset >> GRAIN, (offset + length - 1 >> GRAIN) + 1)
        return not any(place in self.owners for place in places)

    @contextmanager
    def held(self, offset: int, length: int) -> Iterator[None]:
        """Keep an extent of so many bytes claimed in the ``with`` block; waits until it is free."""
        owner, owners = object(), self.owners
        places = range(offset >> GRAIN, (offset + length - 1 >> GRAIN) + 1)
        mine = []
        try:
            for place in places:
                if owners.setdefault(place, owner) is not owner:
                    self._await(place, owner)
                mine.append(place)
            yield
        finally:
            for place in mine:
                del owners[place]
            if self.waiting:
                self.tell()

    def _await(self, place: int, owner: object) -> None:
        with self._changed:
            self.waiting += 1  # before the next look: who removes an owner then looks at this
            try:
                while self.owners.setdefault(place, owner) is not owner:
                    self._changed.wait()
            finally:
                self.waiting -= 1

    def tell(self) -> None:
        """Have those who wait look again."""
        with self._changed:
            self._changed.notify_all()
