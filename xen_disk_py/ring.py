"""The shared ring: who may write which slot, and who must be woken.

Requests and responses share the slots of one run of pages. Four free-running 32-bit
indices in front of them say how far each side has come; all arithmetic is modulo 2**32.
Each side keeps private copies of what it has decided itself and reads from the shared page
only what the other side decides::

    byte 0   req_prod    the frontend has put requests up to here
    byte 4   req_event   wake the backend when req_prod passes this
    byte 8   rsp_prod    the backend has put responses up to here
    byte 12  rsp_event   wake the frontend when rsp_prod passes this
    byte 64  slot 0, slot 1, ...

A processor may do loads and stores in another order than that of the program; ARM's does, x86's
only delays stores beyond later loads. Each fence here is for one such order; all of them are full.
The guest's data, which requests only refer to, needs no others: what the frontend wrote before it
published a request is read after :meth:`BackRing.take`, and what is written into its pages before
:meth:`BackRing.push` is there when it sees the response. A thread that did the request for the
ring's own has handed it over with a lock, which orders as much. ``tests/test_memory_order.py``
takes each fence away, and shows the harm.

No I/O here: notifying is left to the caller, fences are handed in. Indices are read and
written through a ``memoryview`` of format "I", one aligned 4-byte access each; ``pack_into``
must not touch them, nor a slot the other side may look at: it clears before it writes.

Source: ``xen/include/public/io/ring.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

from .errors import GuestMisbehaved

HEADER = 64
"""Bytes before the first slot."""

_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = range(4)
_MASK = 0xFFFF_FFFF
_SEVERAL = 8  # responses: so many are copied into their slots word by word, fewer one by one
_WORDS = 3  # of four bytes each, in a response

Fence = Callable[[], object]


def slots_in(ring_bytes: int, slot_size: int) -> int:
    """Count the slots of a ring: the greatest power of two that fits behind the header."""
    return 1 << ((ring_bytes - HEADER) // slot_size).bit_length() - 1


class _Ring:
    """What both ends share: the pages, cut up."""

    def __init__(self, shared: memoryview, slot_size: int, fence: Fence) -> None:
        self.slots = slots_in(len(shared), slot_size)
        self._slot_size = slot_size
        self._bytes = shared
        self._indices = shared[:16].cast("I")
        self._fence = fence

    def close(self) -> None:
        """Release the pages, so that they can be unmapped."""
        self._indices.release()

    def _copy(self, start: int, count: int) -> bytes:
        """Copy ``count`` slots, each once, into memory the other side cannot reach."""
        size, shared = self._slot_size, self._bytes
        first = start & self.slots - 1
        at, stop = HEADER + first * size, HEADER + (first + count) * size
        end = HEADER + self.slots * size
        if stop <= end:
            return bytes(shared[at:stop])
        return bytes(shared[at:end]) + bytes(shared[HEADER : stop - end + HEADER])

    def _store(self, index: int, data: bytes) -> None:
        at = HEADER + (index & self.slots - 1) * self._slot_size
        self._bytes[at : at + len(data)] = data


class BackRing(_Ring):
    """The backend's end: takes requests, puts responses.

    It never initialises the pages, those are the frontend's. It starts where the shared
    ``rsp_prod`` stands, which is 0 on a fresh ring.

    Args:
        shared: all pages of the ring, writable bytes.
        slot_size: bytes per slot, from the ABI.
        fence: a full memory barrier.
    """

    def __init__(self, shared: memoryview, slot_size: int, fence: Fence) -> None:
        super().__init__(shared, slot_size, fence)
        self._published = self._consumed = self._indices[_RSP_PROD]
        self.unpublished: list[bytes] = []
        """The responses put since the last :meth:`push`, to be looked at."""
        self.respond: Callable[[bytes], None] = self.unpublished.append
        """Put a response, of 12 bytes, for the next slot. The frontend sees it after :meth:`push`.

        Until then the slot keeps its request, for whoever answers it if we are killed.
        """

    def __repr__(self) -> str:
        return f"<BackRing of {self.slots}: took {self._consumed}, answered {self._published}>"

    def resume(self, start: int, responses: Sequence[bytes], waiting: int) -> bool:
        """Resume where a process was killed.

        Args:
            start: the index of the first response that it was about to publish.
            responses: those; published now unless it came so far.
            waiting: how many requests it has taken beyond those that are answered with these.

        Returns:
            False if ``rsp_prod`` is neither what it was before nor what it was to be: then
            this is another ring, and nothing has changed.
        """
        end = (start + len(responses)) & _MASK
        if self._published not in (start, end):
            return False
        if self._published != end:
            self.unpublished.extend(responses)
            self.push()
        self._consumed = (end + waiting) & _MASK
        return True

    @property
    def published(self) -> int:
        """The index of the next response to :meth:`push`."""
        return self._published

    @property
    def has_requests(self) -> bool:
        """Whether a request waits, as far as the frontend says."""
        return self._indices[_REQ_PROD] != self._consumed

    def take(self, most: int = _MASK) -> bytes:
        """Take the waiting requests: a private copy of their slots, each read once (XSA-155).

        Args:
            most: how many to take at most; the others wait on.

        Returns:
            The slots one after the other; nothing if no request waits.

        Raises:
            GuestMisbehaved: the frontend claims more requests than the ring has room for
                (RING_REQUEST_PROD_OVERFLOW); the ring must not be served any longer.
        """
        produced, consumed = self._indices[_REQ_PROD], self._consumed
        waiting = (produced - consumed) & _MASK
        if not waiting:
            return b""
        answered = self._published + len(self.unpublished)
        if waiting + ((consumed - answered) & _MASK) > self.slots:
            raise GuestMisbehaved(
                f"request index {produced} is over {self.slots} ahead of {answered} answered"
            )
        # Load, load: the slots are read after the index that covers them, or they may be older. The
        # check above must not stand for it: a load does not wait for what a condition needs.
        self._fence()
        waiting = min(waiting, most)
        self._consumed = (consumed + waiting) & _MASK
        return self._copy(consumed, waiting)

    def give_back(self) -> None:
        """Have requests taken once more: those behind as many as there are responses.

        They are the last that were taken, and all before them are answered: then none of their
        slots has been given back to the frontend.
        """
        self._consumed = (self._published + len(self.unpublished)) & _MASK

    def push(self) -> bool:
        """Publish the responses put so far; True if the frontend wants to be notified."""
        old, responses = self._published, self.unpublished
        new = (old + len(responses)) & _MASK
        first = old & self.slots - 1
        fit = self.slots - first
        if len(responses) <= fit:
            self._answer(first, responses)
        else:
            self._answer(first, responses[:fit])
            self._answer(0, responses[fit:])
        responses.clear()
        # Store, store: whoever sees the index sees the responses, and the data that they tell of.
        # Load, store: the requests have been read from the slots that this gives back.
        self._fence()
        self._indices[_RSP_PROD] = self._published = new
        # Store, load: either we see that the frontend waits, or it sees the index when it looks for
        # the last time (the fence in its ``arm``); also, the index is there before any event is.
        self._fence()
        return (new - self._indices[_RSP_EVENT]) & _MASK < (new - old) & _MASK

    def _answer(self, first: int, responses: Sequence[bytes]) -> None:
        """Put responses into the slots from number ``first`` on; the rest of these stays."""
        size = self._slot_size
        at = HEADER + first * size
        if len(responses) < _SEVERAL:
            shared = self._bytes
            for response in responses:
                shared[at : at + len(response)] = response
                at += size
            return
        # The first word of each, then the second, then the third: three calls, however many.
        at, step = at // 4, size // 4
        end, data = at + len(responses) * step, memoryview(b"".join(responses)).cast("I")
        with self._bytes.cast("I") as words:
            for word in range(_WORDS):
                words[at + word : end : step] = data[word::_WORDS]

    def arm(self) -> bool:
        """Ask to be notified of the next request; True if one is there already.

        False means that it is safe to sleep: a later request comes with a notification
        (RING_FINAL_CHECK_FOR_REQUESTS).
        """
        self._indices[_REQ_EVENT] = (self._consumed + 1) & _MASK
        # Store, load: either the frontend sees that we wait, or we see its index.
        self._fence()
        return self._indices[_REQ_PROD] != self._consumed


class FrontRing(_Ring):
    """The frontend's end: puts requests, takes responses. It initialises the pages.

    Args:
        shared: all pages of the ring, writable bytes.
        slot_size: bytes per slot, from the ABI.
        fence: a full memory barrier.
        start: the index to start from, 0 for a frontend that behaves.
    """

    def __init__(self, shared: memoryview, slot_size: int, fence: Fence, start: int = 0) -> None:
        super().__init__(shared, slot_size, fence)
        self._published = self._produced = self._consumed = start
        self._indices[_REQ_PROD] = self._indices[_RSP_PROD] = start
        self._indices[_REQ_EVENT] = self._indices[_RSP_EVENT] = (start + 1) & _MASK

    def __repr__(self) -> str:
        return f"<FrontRing of {self.slots}: put {self._produced}, answered {self._consumed}>"

    @property
    def free(self) -> int:
        """How many requests can be put now."""
        return self.slots - ((self._produced - self._consumed) & _MASK)

    def put(self, request: bytes) -> None:
        """Put a request into the next slot. The backend sees it after :meth:`push`.

        Raises:
            IndexError: the ring is full.
        """
        if not self.free:
            raise IndexError("the ring is full")
        self._store(self._produced, request)
        self._produced = (self._produced + 1) & _MASK

    def push(self) -> bool:
        """Publish the requests put so far; True if the backend wants to be notified."""
        old, new = self._published, self._produced
        self._fence()  # as in BackRing.push, with requests and responses exchanged
        self._indices[_REQ_PROD] = self._published = new
        self._fence()  # likewise
        return (new - self._indices[_REQ_EVENT]) & _MASK < (new - old) & _MASK

    def take(self) -> list[bytes]:
        """Take all waiting responses: a private copy of each slot.

        Raises:
            RuntimeError: the backend answered more than was asked.
        """
        waiting = (self._indices[_RSP_PROD] - self._consumed) & _MASK
        if waiting > (self._published - self._consumed) & _MASK:
            raise RuntimeError("more responses than requests")
        self._fence()  # as in BackRing.take
        slots = self._copy(self._consumed, waiting)
        self._consumed = (self._consumed + waiting) & _MASK
        size = self._slot_size
        return [slots[at : at + size] for at in range(0, len(slots), size)]

    def arm(self) -> bool:
        """Ask to be notified of the next response; True if one is there already."""
        self._indices[_RSP_EVENT] = (self._consumed + 1) & _MASK
        self._fence()  # as in BackRing.arm
        return self._indices[_RSP_PROD] != self._consumed
