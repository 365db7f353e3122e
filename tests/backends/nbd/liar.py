"""An NBD server that says and does what a test wants."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
OPT_GO, REP_ACK, REP_INFO, REP_UNSUPPORTED = 7, 1, 3, 0x80000001
FLAGS = 1 | 4 | 32  # it has flags, flush and trim
READ, WRITE, DISCONNECT = 0, 1, 2


class Liar:
    """Serves connections, one after the other, until it is closed.

    Args:
        path: of the socket.
        size: what it says of the disk.
        answer: given a request's type, cookie and length: the bytes to send; None to hang up.
        greeting: what it says first.
        hangs_up: after each answer.
    """

    def __init__(self, path, *, size=1 << 20, answer=None, greeting=GREETING, hangs_up=False):
        self.hangs_up = hangs_up
        self.uri = f"nbd+unix:///?socket={path}"
        self.size, self.answer, self.greeting = size, answer, greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._connection = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, AttributeError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError, EOFError):
                    self._connection = connection
                    self._serve(connection)

    def _serve(self, connection):
        connection.sendall(self.greeting)
        _take(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", _take(connection, 16))
            _take(connection, length)
            if option != OPT_GO:
                connection.sendall(_reply(option, REP_UNSUPPORTED))
                continue
            info = struct.pack(">HQH", 0, self.size, FLAGS)
            connection.sendall(_reply(option, REP_INFO, info) + _reply(option, REP_ACK))
            break
        while True:
            head = _take(connection, 28)
            _, _, kind, cookie, _, length = struct.unpack(">IHHQQI", head)
            if kind == WRITE:
                _take(connection, length)
            answer = None if kind == DISCONNECT else self.answer(kind, cookie, length)
            if answer is None:
                return
            connection.sendall(answer)
            if self.hangs_up:
                return


def reply(cookie, error=0, data=b""):
    """A simple reply."""
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def _reply(option, kind, data=b""):
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def _take(connection, length):
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
