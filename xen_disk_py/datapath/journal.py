"""What of one ring must outlive the process: the requests that it has taken and not answered.

A ring shows less than one would think. A response lies in the slot of *some* request, so once
it is put that request can be read no more; and a frontend learns of it only when ``rsp_prod``
follows. A process killed anywhere in between leaves a ring that does not tell what was
answered. So before responses go into the ring they are noted here, together with the slots of
the requests that were overtaken and still wait; all behind these are in the ring untouched.

That costs some hundred nanoseconds each time that responses are published, however many.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..blkif import RESPONSE_SIZE, Ring
from ..named import NamedTuple
from .double_buffer import DoubleBuffer

_WHICH = struct.Struct("<18I")  # slot size, event channel, grant references of a ring
_HEAD = struct.Struct(f"<{_WHICH.size}s3I")  # which; index of the first response, how many, bytes
_PAGES = 16  # the largest ring has 512 slots, which are noted at most
SIZE = 33 * 4096
"""Bytes of one journal."""


class Unanswered(NamedTuple):
    """The requests that a process took from a ring and did not answer."""

    start: int
    """The index of the first response that it was about to publish."""
    responses: Sequence[bytes]
    requests: Sequence[bytes]
    """Slots, in the order in which they were taken; those of all requests behind them, from
    index ``start + len(responses) + len(requests)`` on, are in the ring."""


class Journal:
    """The journal of one ring.

    Args:
        memory: ``SIZE`` bytes; private ones, which outlive nothing, by default.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        self._buffer = DoubleBuffer(memory if memory is not None else memoryview(bytearray(SIZE)))
        self._ring = bytes(_WHICH.size)

    def begin(self, ring: Ring, slot_size: int) -> None:
        """Forget everything: from now on, this is about ``ring``."""
        self._buffer.clear()
        self._ring = _identity(ring, slot_size)

    def note(self, start: int, responses: Sequence[bytes], requests: Sequence[bytes]) -> None:
        """Replace what is noted.

        Args:
            start: the index of the first of ``responses``.
            responses: those that are about to be published, as they are put into slots.
            requests: the slots of all that were taken and are not answered with these.
        """
        slots = b"".join(requests) if requests else b""
        head = _HEAD.pack(self._ring, start, len(responses), len(slots))
        self._buffer.write(b"".join((head, *responses, slots)))

    def clear(self) -> None:
        """Forget everything: nobody is to resume from here."""
        self._buffer.clear()

    def recall(self, ring: Ring, slot_size: int) -> Unanswered | None:
        """Return what the process before noted; the journal continues from there.

        None if it did not serve this ring, or if what is noted is damaged.
        """
        data = self._buffer.read()
        if data is None or len(data) < _HEAD.size:
            return None
        which, start, responses, length = _HEAD.unpack_from(data)
        middle = _HEAD.size + responses * RESPONSE_SIZE
        if (
            which != _identity(ring, slot_size)
            or middle + length != len(data)
            or length % slot_size
        ):
            return None
        self._ring = which
        return Unanswered(
            start,
            _cut(data[_HEAD.size : middle], RESPONSE_SIZE),
            _cut(data[middle:], slot_size),
        )


def _identity(ring: Ring, slot_size: int) -> bytes:
    unused = (0,) * (_PAGES - len(ring.refs))
    return _WHICH.pack(slot_size, ring.event_channel, *ring.refs, *unused)


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]
