"""What a process says to a person: it never fails, and never waits for who reads it.

A guest's disk does not depend on somebody who reads a log. The terminal may be closed or stopped
(Ctrl-S), the reader of a pipe gone or asleep, the disk behind a file full, the descriptor closed
from the beginning. What cannot be written at once waits in a bounded buffer for the next line or
for the process's end; what does not fit is dropped and counted.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Callable, TextIO

from ..text import printable

LIMIT = 64 << 10
"""Bytes that wait for a reader at most."""

_HEIR = "XEN_DISK_WAITING"
"""Environment variable: a descriptor with what waits for the reader, for the next program."""

_KEPT = 100  # lines
_LINE = 4096  # bytes of a line of others that are passed on at once

_Send = Callable[[bytes], int]


def open_standard_descriptors() -> None:
    """Have descriptors 0, 1 and 2 lead somewhere; before anything else is opened.

    Where one is closed (``2>&-``), the next file that is opened has its number, and what a
    library prints goes into that file: a guest's disk, say.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)  # as they are


class Relay:
    """What programs print that are started inside :func:`relayed_stderr`.

    Until :meth:`pass_on` it is kept, for who explains why they have ended; then it goes to
    ``sys.stderr``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[str] | None = []
        self._thread: threading.Thread | None = None

    def start(self, reader: int) -> None:
        """Read in a thread until all who write have ended.

        Raises:
            RuntimeError: no thread is to be had.
        """
        thread = threading.Thread(target=self._read, args=(reader,), name="stderr", daemon=True)
        thread.start()
        self._thread = thread

    def pass_on(self) -> None:
        """Print what was kept, and what comes from now on."""
        with self._lock:
            kept, self._kept = self._kept, None
        for line in kept or ():
            _print(line)

    def said(self, patience: float) -> list[str]:
        """Return what was kept once all who write have ended, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(patience)
        with self._lock:
            return list(self._kept or ())

    def _read(self, reader: int) -> None:
        with os.fdopen(reader, "rb") as lines:
            for line in iter(lambda: lines.readline(_LINE), b""):
                text = printable(line.decode(errors="surrogateescape").rstrip("\n"))
                with self._lock:
                    if self._kept is not None:
                        if len(self._kept) < _KEPT:
                            self._kept.append(text)
                        continue
                _print(text)


def _print(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")


@contextlib.contextmanager
def relayed_stderr() -> Iterator[Relay]:
    """Have programs that are started inside write to us, who pass it on to ``sys.stderr``.

    A server that works for a disk would wait for the reader of our stderr, and the disk for it.
    """
    relay = Relay()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        relay.start(reader)
    except RuntimeError:  # no thread is to be had
        os.close(reader)
        os.close(writer)
        writer = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with _changing_stderr:
            before = os.dup(2)
            os.dup2(writer, 2)
            try:
                yield relay
            finally:
                os.dup2(before, 2)
                os.close(before)
    finally:
        os.close(writer)


_changing_stderr = threading.Lock()


class Output(io.TextIOBase):
    """A stream that never raises and never waits; also in place of ``sys.stdout`` or ``stderr``.

    Args:
        stream: what it writes to, whose buffer is empty; None to write nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._lock = threading.RLock()
        self._waiting = bytearray()
        self._lost = 0  # lines that found no room
        self._sink: _Sink | None = None
        self.failure: int | None = None
        """The ``errno`` by which nothing can be written; None as far as is known."""
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it has no descriptor
            self._sink = _Sink(stream.fileno())  # type: ignore[union-attr] # None has no fileno

    @property
    def encoding(self) -> str:  # type: ignore[override] # typeshed has an attribute
        """That of the stream."""
        return self._encoding

    def fileno(self) -> int:
        """Return the stream's descriptor.

        Raises:
            io.UnsupportedOperation: it has none.
        """
        if self._sink is None:
            raise io.UnsupportedOperation("fileno")
        return self._sink.descriptor

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # closed
            return False

    def writable(self) -> bool:
        """Tell that it is for writing."""
        return True

    @property
    def is_behind(self) -> bool:
        """Whether something waits for a reader."""
        return bool(self._waiting)

    def write(self, text: str) -> int:
        """Write, now or later, wholly or not at all."""
        with self._lock:
            if self._sink is None:
                try:
                    if self._stream is not None:
                        self._stream.write(text)
                        self._stream.flush()
                except OSError as error:
                    self.failure = error.errno
                except ValueError:  # closed
                    pass
                return len(text)
            data = text.encode(self._encoding, "backslashreplace")
            self._push()
            if len(self._waiting) + len(data) > LIMIT:
                self._lost += max(1, text.count("\n"))
            else:
                self._waiting += data
                self._push()
        return len(text)

    def flush(self) -> None:
        """Try once more what waits."""
        with self._lock:
            self._push()

    def drain(self, seconds: float) -> None:
        """Wait for a reader to take all, so many seconds at most."""
        deadline = time.monotonic() + seconds
        self.flush()
        while self._sink is not None and self._waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._sink.wait(left)
            self.flush()

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Leave what waits to the program that this process becomes inside."""
        with self._lock:
            self._push()
            lost = b"(%d lines were lost: nobody read them)\n" % self._lost if self._lost else b""
            waiting = bytes(self._waiting) + lost
        fd = -1
        try:
            with contextlib.suppress(OSError):  # no descriptor to be had: they are lost
                if waiting:
                    fd = os.memfd_create("xen_disk_py", 0)  # the program inherits it
                    os.write(fd, waiting)
                    os.environ[_HEIR] = str(fd)
            yield
        finally:
            os.environ.pop(_HEIR, None)
            if fd >= 0:
                os.close(fd)

    def forget(self) -> None:
        """Drop what waits: in a fork, whose parent writes it."""
        self._waiting.clear()
        self._lost = 0

    def inherit(self) -> None:
        """Take the lines that the program before us in this process did not get rid of."""
        number = os.environ.pop(_HEIR, "")
        if not number.isdecimal():
            return
        with contextlib.suppress(OSError, OverflowError):
            fd = int(number)
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith("/memfd:xen_disk_py"):
                with self._lock:
                    self._waiting[:0] = os.pread(fd, 2 * LIMIT, 0)
                    self._push()
                os.close(fd)

    def close(self) -> None:
        """Give back what was opened to write; the stream stays open."""
        if self._sink is not None:
            self._sink.close()
            self._sink = self._stream = None

    def _push(self) -> None:
        """Write what waits, as far as nobody has to be waited for."""
        sink = self._sink
        while sink is not None and (self._waiting or self._lost):
            if not self._waiting:
                self._waiting += b"(%d lines were lost: nobody read them)\n" % self._lost
                self._lost = 0
            try:
                del self._waiting[: sink.send(bytes(self._waiting[: sink.most]))]
                self.failure = None
            except BlockingIOError:
                return
            except OSError as error:
                self.failure = error.errno
                self._waiting.clear()
                self._lost = 0


class _Sink:
    """Sends bytes to a descriptor without waiting; ``BlockingIOError`` says that one must."""

    most = LIMIT
    """Bytes to send at once at most."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._own = -1
        self._socket: socket.socket | None = None
        self.send: _Send = lambda data: os.write(descriptor, data)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):  # systemd's journal listens on one
            self._socket = socket.socket(fileno=os.dup(descriptor))
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self.send = lambda data: self._socket.send(data, flags) if self._socket else 0
        elif stat.S_ISFIFO(mode) or os.isatty(descriptor):
            self._open_own()

    def _open_own(self) -> None:
        """Open the pipe or terminal once more: O_NONBLOCK there is for nobody but us."""
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self._own = own = os.open(f"/proc/self/fd/{self.descriptor}", flags)
        except OSError:  # another user's, or gone
            # There is room for so much where poll() sees any, but for others who write there.
            self.most = 256
            self.send = self._send_if_writable
        else:
            self.send = lambda data: os.write(own, data)

    def _send_if_writable(self, data: bytes) -> int:
        if not self._poll(0):
            raise BlockingIOError
        return os.write(self.descriptor, data)

    def wait(self, seconds: float) -> None:
        """Wait for a reader."""
        self._poll(seconds)

    def _poll(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.descriptor, select.POLLOUT)
        return bool(poller.poll(seconds * 1000))

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close what was opened here; also where Python, at its end, has taken ``os`` away.

        From 3.13 on it would tell of an error then, on stderr, and wait for the reader.
        """
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._own >= 0:
            close(self._own)
            self._own = -1
            self.send = len  # it goes nowhere
