"""What a disk had at one instant, kept while its guest writes: copy-before-write.

Whoever exports a disk in use copies it meanwhile, as it happens to be. Before the first write or
discard in each 64 KiB since that instant, the process that serves the disk sends what they had to
the exporter: the *before-images*. Put over the copy, they make of it what the disk had at the
instant. A write that had begun then and was not answered may be in it, or not, or in part: as after
a crash at that instant.

The guest comes first. A request waits for its before-images, which its own storage has, and at most
:data:`WAIT` for room in memory: then the export has failed, and the guest notices nothing. Another
thread sends them. The process that serves touches nothing of the exporter's but a socket, so that
storage that hangs there concerns the exporter alone. If either of the two ends, whatever ends
it, the other one sees the socket closed.

Each before-image is sent as its place on the disk and its length, in bytes, and its content; a
length of 0 says that all have been sent.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Callable

from ..errors import DeviceError
from .holes import put_zeros
from .image import transfer_all

CHUNK = 64 << 10
WAIT = 2.0
"""Seconds that a request waits at most for room, or for other requests' before-images."""

_ROOM = 8 << 20  # bytes in memory
_CHECK = 1.0  # seconds between two looks at whether the exporter lives
_HEAD = struct.Struct(">QI")  # place, length


class BeforeImages:
    """Sends them, from now on, until it is finished, or one cannot be saved.

    Args:
        size: of the disk, in bytes.
        read: reads what the disk has: buffers, offset; returns how many bytes.
        exporter: where they are sent; a stream, closed in the end.
        on_end: called with this when nothing is saved any more, for whatever reason.
        room: bytes that may be in memory.
    """

    def __init__(
        self,
        size: int,
        read: Callable[[Sequence[memoryview], int], int],
        exporter: socket.socket,
        *,
        on_end: Callable[[BeforeImages], None] = lambda images: None,
        room: int = _ROOM,
    ) -> None:
        self._size = size
        self._read = read
        self._exporter = exporter
        self._room = room
        self._on_end = on_end
        self._saving = threading.Lock()
        self._saved = bytearray(-(-size // CHUNK))
        self._condition = threading.Condition()
        self._queue: deque[tuple[int, memoryview]] = deque()
        self._queued = 0
        self._is_finishing = self._is_done = False
        self._failure = ""
        exporter.setblocking(True)
        threading.Thread(target=self._run, name="before-images", daemon=True).start()

    @property
    def is_active(self) -> bool:
        """Whether there is somebody to save them for, and none is missing."""
        return not self._failure and not self._is_done and not self._has_ended()

    @property
    def failure(self) -> str:
        """Why they are not complete; nothing if they are."""
        return self._failure and f"the state at the start of the export is lost: {self._failure}"

    def save(self, start: int, stop: int, deadline: float | None = None) -> None:
        """Save what the bytes from ``start`` to ``stop`` have, which are about to change.

        Never raises; waits for the disk's own storage, and else no longer than :data:`WAIT`, or
        until ``deadline``, by the monotonic clock. From :meth:`finish` on nothing is saved: the
        copy is there, so a guest that never stops does not keep the export from its end.
        """
        first, last = start // CHUNK, -(-stop // CHUNK)
        if self._failure or self._is_finishing or self._saved.find(b"\0", first, last) < 0:
            return
        if deadline is None:
            deadline = time.monotonic() + WAIT
        if not self._saving.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._miss("the storage is too slow")
            return
        try:
            while not (self._failure or self._is_finishing):
                first = self._saved.find(b"\0", first, last)
                if first < 0:
                    return
                at = first * CHUNK
                self._put(at, self._before(at, min(CHUNK, self._size - at)), deadline)
                self._saved[first] = 1
        except Exception as error:  # noqa: BLE001 - the guest's request has nothing to do with it
            self._miss(f"the disk cannot be read: {error}")
        finally:
            self._saving.release()

    def fail(self, reason: str) -> None:
        """Give up: nobody waits any more."""
        with self._condition:
            self._fail(reason)

    def _miss(self, reason: str) -> None:
        """Give up for want of a before-image, if it is needed still."""
        with self._condition:
            if not self._is_finishing:
                self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._queue.clear()
        self._condition.notify_all()
        with suppress(OSError):  # it has ended already, say
            self._exporter.shutdown(socket.SHUT_RDWR)  # nobody is left sending, or receiving

    def finish(self, timeout: float) -> None:
        """Return when all that was saved has been sent; nothing is saved any more.

        Raises:
            DeviceError: something is missing.
        """
        with self._condition:
            self._is_finishing = True
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self._is_done or self._failure, timeout):
                self._fail("the exporter does not take it")
            if self._failure:
                raise DeviceError(self.failure)

    def _before(self, at: int, length: int) -> memoryview:
        buffer = memoryview(bytearray(length))
        done = 0
        while done < length:
            moved = self._read([buffer[done:]], at + done)
            if not moved:
                raise EOFError(f"it ends at {at + done}")
            done += moved
        return buffer

    def _put(self, at: int, data: memoryview, deadline: float) -> None:
        with self._condition:
            has_room = self._condition.wait_for(
                lambda: (
                    self._failure or self._is_finishing or self._queued + len(data) <= self._room
                ),
                max(0.0, deadline - time.monotonic()),
            )
            if self._failure or self._is_finishing:
                return
            if not has_room or time.monotonic() > deadline:
                self._fail("the guest overwrites more than the exporter takes")
            else:
                self._queue.append((at, data))
                self._queued += len(data)
                self._condition.notify_all()

    def _has_ended(self) -> bool:
        try:
            return not self._exporter.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _run(self) -> None:
        try:
            while self._send_next():
                pass
        except OSError:
            self.fail("the exporter has ended")
        finally:
            with self._condition:
                self._is_done = not self._failure
                self._condition.notify_all()
            self._exporter.close()
            self._on_end(self)

    def _send_next(self) -> bool:
        """Send one of them, or wait for it; False at the end."""
        with self._condition:
            while not self._queue and not self._is_finishing and not self._failure:
                self._condition.wait(_CHECK)
                if not self._queue and self._has_ended():
                    self._fail("the exporter has ended")
            if self._failure:
                return False
            is_last = not self._queue
            at, data = (0, memoryview(b"")) if is_last else self._queue.popleft()
        self._exporter.sendall(_HEAD.pack(at, len(data)))
        if is_last:
            return False  # and whoever got that may be gone
        self._exporter.sendall(data)
        with self._condition:
            self._queued -= len(data)
            self._condition.notify_all()
        return True


def receive(disk: socket.socket, size: int, images: int) -> bytearray:
    """Put before-images into a file, each as far in as it is on the disk, until all have come.

    Args:
        disk: they come from there; the process at its other end need not be root's.
        size: of the disk, in bytes.
        images: the file.

    Returns:
        A byte for each 64 KiB: 1 where there is one.

    Raises:
        OSError: they cannot be written, or are not complete.
    """
    here = bytearray(-(-size // CHUNK))
    buffer = memoryview(bytearray(CHUNK))
    while True:
        head = memoryview(bytearray(_HEAD.size))
        _receive(disk, head)
        at, length = _HEAD.unpack(head)
        if not length:
            return here
        chunk = at // CHUNK
        if at >= size or at % CHUNK or length != min(CHUNK, size - at) or here[chunk]:
            raise OSError(errno.EPROTO, "the process that serves the disk sends what is none")
        _receive(disk, buffer[:length])
        transfer_all(os.pwritev, images, [buffer[:length]], at)
        here[chunk] = 1


def _receive(disk: socket.socket, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = disk.recv_into(buffer[done:])
        if not count:
            raise OSError(errno.EPIPE, "the process that serves the disk sends no more")
        done += count


def put_over(images: int, here: bytearray, size: int, raw: int) -> int:
    """Put before-images over a copy of their disk; return how many bytes.

    Args:
        images: the file.
        here: what it has: see :func:`receive`.
        size: of the disk, in bytes.
        raw: the copy.

    Raises:
        OSError: one of the two cannot be read or written.
    """
    count = 0
    chunk = here.find(1)
    while chunk >= 0:
        at = chunk * CHUNK
        buffer = memoryview(bytearray(min(CHUNK, size - at)))
        transfer_all(os.preadv, images, [buffer], at)
        if any(buffer):
            transfer_all(os.pwritev, raw, [buffer], at)
        else:
            put_zeros(raw, at, len(buffer))
        count += len(buffer)
        chunk = here.find(1, chunk + 1)
    return count
