"""Many requests under way at once without a thread for each: begun now, over later.

A backend whose library works like that (libnbd, librbd) has an :class:`Asynchronous` in its
attribute ``asynchronous``. A queue then submits requests from its own thread and collects them
as they end; ``read``, ``write`` and the others of the backend's contract are
:meth:`Asynchronous.call`.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..hypervisor import Closing
from ..named import NamedTuple
from ..synchronizing import HAS_GIL, apart
from .copies import Data, SpareMemory

READ, WRITE, FLUSH, DISCARD = range(4)

_SPARE = 16 << 20  # bytes of memory to keep, to be used again
_PAUSE = 0.001  # seconds for others to collect what is theirs
_GLANCE = 100  # milliseconds until a caller looks whether another thread has ended its request


class Done(NamedTuple):
    """A request that is over."""

    token: Any
    error: OSError | None


class _Call:
    """The token of :meth:`Asynchronous.call`: whoever ends its request, the result stays here."""

    __slots__ = ("error", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self.error: OSError | None = None


class Request:
    """A request that was submitted.

    Attributes:
        operation: :data:`READ`, :data:`WRITE`, :data:`FLUSH` or :data:`DISCARD`.
        buffers: where a read's data goes.
        memory: where the library reads to: ``buffers`` themselves, or one piece; or a copy of what
            to write, in one piece. Nothing the guest changes meanwhile reaches the storage, nor a
            checksum of its library.
        offset, length: bytes.
        parts: how many pieces of it are under way.
    """

    __slots__ = (
        "buffers",
        "covers",
        "error",
        "length",
        "memory",
        "offset",
        "operation",
        "parts",
        "token",
    )

    def __init__(
        self,
        operation: int,
        buffers: Sequence[memoryview],
        offset: int,
        length: int,
        token: Any,
    ) -> None:
        self.operation = operation
        self.buffers = buffers
        self.offset = offset
        self.length = length
        self.token = token
        self.parts = 0
        self.error: OSError | None = None
        self.covers = 0  # of a flush: how many writes, in words of whoever counts them
        self.memory: Any = None


class Asynchronous(Closing):
    """What subclasses drive: :meth:`_begin` starts a request, :meth:`_progress` ends some.

    Attributes:
        unfinished: requests that were submitted and not collected yet.
    """

    def __init__(self) -> None:
        self.unfinished = 0
        self._finished: deque[Done] = deque()
        self._spare = SpareMemory(_SPARE)
        self._lock = threading.RLock()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return a descriptor that polls readable when :meth:`collect` has something to do."""
        return self._wake_read

    def submit(
        self, operation: int, buffers: Sequence[memoryview], offset: int, length: int, token: Any
    ) -> None:
        """Begin a request; :meth:`collect` gives its result with ``token``.

        Args:
            operation: :data:`READ`, :data:`WRITE`, :data:`FLUSH` or :data:`DISCARD`.
            buffers: where the data goes or comes from; a read's must stay until it is collected.
            offset: bytes from the disk's beginning.
            length: bytes.
            token: anything.
        """
        if operation == READ and not HAS_GIL:  # another thread may take what the server sends
            buffers = [apart(buffer) for buffer in buffers]
        with self._lock:
            request = Request(operation, buffers, offset, length, token)
            if operation == WRITE:
                request.memory = self._copied(buffers, length)
            elif operation == READ:
                request.memory = self._place(buffers, length)
            self._begin(request)
            self.unfinished += 1
            if self._finished:  # nothing else makes fileno() readable for that
                self._tell()

    def collect(self) -> list[Done]:
        """Return what is over; does not wait."""
        with self._lock:
            self._progress()
            done = list(self._finished)
            self._finished.clear()
            self.unfinished -= len(done)
            return done

    def call(
        self,
        operation: int,
        buffers: Sequence[memoryview] = (),
        offset: int = 0,
        length: int | None = None,
    ) -> None:
        """Do a request and wait for it, whoever else has some under way; from any thread.

        Raises:
            OSError: it failed.
        """
        call = _Call()
        if length is None:
            length = sum(map(len, buffers))
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        self.submit(operation, buffers, offset, length, call)
        while True:
            with self._lock:
                self._progress()
                is_any = bool(self._finished)  # of others, whose event may have been taken here
                if is_any:
                    self._tell()
                if call.is_over:
                    if call.error is not None:
                        raise call.error
                    return
            if is_any:
                time.sleep(_PAUSE)
            else:
                poller.poll(_GLANCE)  # another thread may have taken the event that was ours

    def close(self) -> None:
        """Give up what is under way, and everything that was opened."""
        if self._wake_read >= 0:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = -1

    # -- for subclasses; the lock is held --------------------------------------------------

    def _copied(self, buffers: Sequence[memoryview], length: int) -> Data:
        """Copy what is to be written, ``length`` bytes, to one piece of memory."""
        return bytes(buffers[0]) if len(buffers) == 1 else b"".join(buffers)

    def _place(self, buffers: Sequence[memoryview], length: int) -> Any:
        """Return where a read's data is to go, ``length`` bytes: to one piece of memory."""
        return buffers[0] if len(buffers) == 1 else self._spare.take(length)

    def _begin(self, request: Request) -> None:
        """Start a request, or :meth:`_end` it at once."""
        raise NotImplementedError

    def _progress(self) -> None:
        """See what is over, and :meth:`_end` that."""
        raise NotImplementedError

    def _end(self, request: Request, error: OSError | None) -> None:
        """Note that a request is over."""
        buffers = request.buffers
        if (
            error is None
            and request.operation == READ
            and len(buffers) > 1
            and isinstance(request.memory, bytearray)
        ):
            at, memory = 0, memoryview(request.memory)
            for buffer in buffers:
                buffer[:] = memory[at : at + len(buffer)]
                at += len(buffer)
            self._spare.give([request.memory])
        token = request.token
        if type(token) is _Call:
            token.error, token.is_over = error, True
            self.unfinished -= 1
        else:
            self._finished.append(Done(token, error))

    def _tell(self) -> None:
        """Make :meth:`fileno` readable, where nothing else does."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def _told(self) -> None:
        """Make it quiet again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
