"""The transmission phase of NBD without libnbd: many requests and replies in one call.

libnbd sends each request with one system call, receives each reply with two or three, and has to
be called from Python for each: 17 µs of processor time for 4 KiB, where this module takes 7. So
unless the connection is encrypted, libnbd connects and negotiates the export, and this module then
uses its socket. The server sends what the NBD protocol (doc/proto.md of the NBD project) calls
simple replies: a header each, followed by the data if it is a read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

from .. import StorageError
from ..asynchronous import DISCARD, FLUSH, READ, WRITE
from .libnbd import PASSING, Connection

_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_TYPES = {READ: 0, WRITE: 1, FLUSH: 3, DISCARD: 4}
# Bytes to receive at once. A read's data that arrives in this buffer is copied to its memory; what
# is missing of it is received straight into that memory.
_BUFFER = 128 << 10
_ROUNDS = 8  # calls to receive before other connections get their turn
_BOTH = select.POLLIN | select.POLLOUT
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_SEND_BUFFER = 2 << 20  # bytes, of a Unix socket: fewer switches between us and the server
_PIECES = 512  # buffers in one call; Linux allows 1024

_ERRORS = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}
"""The protocol's error numbers; any other is EINVAL."""


def is_plain(where: str | Sequence[str]) -> bool:
    """Tell whether the connection to a server is not encrypted."""
    return not isinstance(where, str) or not where.startswith("nbds")


class WireConnection(Connection):
    """A connection that sends requests and receives replies itself.

    :meth:`issue` only queues a request; the next :meth:`progress` sends it.
    """

    takes_buffers = True

    def __init__(self, where: str | Sequence[str]) -> None:
        super().__init__(where, is_simple=True)
        self._socket = socket.socket(fileno=self._fd)
        self._socket.setblocking(False)
        if self._socket.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):  # not root: Linux's default stays, 208 KiB
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        self._cookie = 0
        self._out: list[Any] = []  # pieces to send
        self._done: list[tuple[Any, OSError | None]] = []
        self._buffer = memoryview(bytearray(_BUFFER))
        self._kept = 0  # bytes at the buffer's start: of an incomplete header
        self._window = _BUFFER  # bytes of the buffer to receive into, behind a read's data
        self._rest: list[memoryview] = []  # of a read's memory: what is not received yet
        self._filling = 0  # that read's cookie

    @property
    def is_alive(self) -> bool:
        """Whether requests can be issued."""
        return not self.lost

    @property
    def events(self) -> int:
        """What to poll the socket for."""
        if self.lost:
            return 0
        return _BOTH if self._out else select.POLLIN

    def issue(
        self, operation: int, memory: Any, offset: int, length: int, token: Any
    ) -> OSError | None:
        """Queue a request to be sent; as in :class:`Connection`."""
        if self.lost:
            return StorageError(errno.ENOTCONN, self.lost)
        self._cookie = cookie = self._cookie + 1
        self._out.append(
            _REQUEST.pack(_REQUEST_MAGIC, 0, _TYPES[operation], cookie, offset, length)
        )
        if operation == WRITE:
            self._out.append(memory)
        if operation != READ:
            memory = None
        elif not isinstance(memory, list):
            memory = [memory]
        self._in_flight[cookie] = token, memory, length
        return None

    def progress(self, revents: int) -> None:
        """Send what is queued, and receive what has arrived."""
        if self._out:
            self._send()
        if revents & ~select.POLLOUT and not self.lost:
            self._receive()

    def completed(self) -> list[tuple[Any, OSError | None]]:
        """Return the complete requests, without those of a lost connection."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Disconnect."""
        if self._handle and hasattr(self, "_socket"):  # else it could not connect
            self.lost = self.lost or "it was closed"
            self._socket.detach()  # libnbd closes it
            self._rest = []
        super().close()

    def _send(self) -> None:
        out = self._out
        while out:
            pieces = out if len(out) <= _PIECES else out[:_PIECES]
            try:
                sent = self._socket.sendmsg(pieces)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"nothing can be sent: {error.strerror}")
                return
            if sent == sum(map(len, pieces)):
                del out[: len(pieces)]
                continue
            number = 0
            while sent >= len(out[number]):
                sent -= len(out[number])
                number += 1
            out[number] = memoryview(out[number])[sent:]
            del out[:number]

    def _receive(self) -> None:
        buffer = self._buffer
        for _ in range(_ROUNDS):
            kept, rest, window = self._kept, self._rest, self._window
            try:
                if not rest:
                    received = self._socket.recv_into(buffer[kept:window])
                elif len(rest) < _PIECES:
                    received = self._socket.recvmsg_into([*rest, buffer[:window]])[0]
                else:
                    received = self._socket.recvmsg_into(rest[:_PIECES])[0]
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"nothing can be received: {error.strerror}")
                return
            if not received:
                self._lose("it closed the connection")
                return
            if rest:
                received = self._filled(received)
                if self._rest:
                    continue
                self._done.append((self._in_flight.pop(self._filling)[0], None))
            end = kept + received
            self._parse(end)
            if self.lost or (end < window and not self._rest):
                return  # no more has come so far

    def _filled(self, received: int) -> int:
        """Advance a read by so many bytes; return how many of them are behind its end."""
        rest, number = self._rest, 0
        while number < len(rest) and received >= len(rest[number]):
            received -= len(rest[number])
            number += 1
        del rest[:number]
        if rest:
            rest[0] = rest[0][received:]
            return 0
        return received

    def _parse(self, end: int) -> None:
        """Handle the replies in the buffer's first ``end`` bytes."""
        buffer, in_flight, done = self._buffer, self._in_flight, self._done
        at = 0
        self._window = _BUFFER
        while end - at >= _REPLY.size:
            magic, error, cookie = _REPLY.unpack_from(buffer, at)
            if magic != _REPLY_MAGIC or cookie not in in_flight:
                self._lose("what it sent is no reply to a request of ours")
                return
            token, memory, length = in_flight.pop(cookie)
            at += _REPLY.size
            if error:
                done.append((token, _failure(error)))
                continue
            if memory is not None and len(memory) == 1 and length <= end - at:
                memory[0][:] = buffer[at : at + length]
                at += length
            elif memory is not None:
                there = min(end - at, length)
                rest = _scatter(buffer[at : at + there], memory)
                at += there
                if rest:
                    self._rest, self._filling = rest, cookie
                    in_flight[cookie] = token, memory, length
                    if length >= _BUFFER:  # the next may be as long: receive its header alone
                        self._window = _REPLY.size
                    break
            done.append((token, None))
        self._kept = end - at
        if self._kept and at:
            buffer[: self._kept] = bytes(buffer[at:end])

    def _lose(self, why: str) -> None:
        self.lost = why
        self._out.clear()


def _scatter(data: memoryview, memory: Sequence[Any]) -> list[memoryview]:
    """Copy data to the start of the memory, and return the rest of the memory."""
    at, length = 0, len(data)
    for number, piece in enumerate(memory):
        view = memoryview(piece)
        size = min(length - at, len(view))
        view[:size] = data[at : at + size]
        at += size
        if size < len(view):
            return [view[size:], *(memoryview(each) for each in memory[number + 1 :])]
    return []


def _failure(error: int) -> OSError:
    number = _ERRORS.get(error, errno.EINVAL)
    text = f"the server answered: {os.strerror(number)}"
    return StorageError(number, text) if number in PASSING else OSError(number, text)
