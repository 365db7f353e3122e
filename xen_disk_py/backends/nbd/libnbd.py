"""libnbd, as far as a disk needs it: one connection, many requests in flight, no thread.

Every C function that is called stands in :data:`NBD`. Behaviour is that of ``libnbd(3)``: a handle
is a state machine that moves when its socket is ready and never reconnects; a request is issued
with ``nbd_aio_*``, which returns a *cookie*, and is over when ``nbd_aio_command_completed`` says
so. Data goes from and to the caller's memory, without a copy.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint32, c_uint64
from functools import cache
from types import SimpleNamespace
from typing import Any

from ...errors import BackendError
from ...host.clibrary import Library, Signature
from ...host.output import relayed_stderr
from ...host.program import find_program
from ...hypervisor import Closing
from ...named import NamedTuple
from .. import StorageError
from ..asynchronous import DISCARD, FLUSH, READ
from ..copies import Data

log = logging.getLogger("xen_disk_py")

_handle = ctypes.c_void_p


class _Callback(ctypes.Structure):
    """``nbd_completion_callback``; all NULL: none, the caller asks instead."""

    _fields_ = (
        ("callback", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    )


_NO_CALLBACK = _Callback()

_TO_READ, _TO_WRITE = 1, 2  # LIBNBD_AIO_DIRECTION_*

# Calls that do not wait hold the interpreter's lock: to give it up would cost more than they do.
# Those that wait are a CDLL's; the two tables are of one library, which is loaded once.
_PACKAGES = "libnbd0 (Debian, Ubuntu) or libnbd (Fedora)"

NBD = Library(
    "libnbd.so.0",
    _PACKAGES,
    {
        "nbd_create": Signature(_handle, ()),
        "nbd_close": Signature(None, (_handle,)),
        "nbd_aio_connect_uri": Signature(c_int, (_handle, c_char_p)),
        "nbd_aio_connect_systemd_socket_activation": Signature(c_int, (_handle, POINTER(c_char_p))),
        "nbd_aio_is_connecting": Signature(c_int, (_handle,)),
        "nbd_poll": Signature(c_int, (_handle, c_int)),
        "nbd_set_uri_allow_local_file": Signature(c_int, (_handle, c_bool)),
        "nbd_set_request_structured_replies": Signature(c_int, (_handle, c_bool)),
        "nbd_set_request_extended_headers": Signature(c_int, (_handle, c_bool), optional=True),
        "nbd_kill_subprocess": Signature(c_int, (_handle, c_int)),
        "nbd_get_error": Signature(c_char_p, ()),
        "nbd_get_errno": Signature(c_int, ()),
    },
    required=False,
)

_AIO = Library(
    "libnbd.so.0",
    _PACKAGES,
    {
        "nbd_get_error": Signature(c_char_p, ()),
        "nbd_get_errno": Signature(c_int, ()),
        "nbd_get_size": Signature(c_int64, (_handle,)),
        "nbd_get_block_size": Signature(c_int64, (_handle, c_int)),
        "nbd_is_read_only": Signature(c_int, (_handle,)),
        "nbd_can_flush": Signature(c_int, (_handle,)),
        "nbd_can_trim": Signature(c_int, (_handle,)),
        "nbd_can_multi_conn": Signature(c_int, (_handle,)),
        "nbd_aio_pread": Signature(
            c_int64, (_handle, ctypes.c_void_p, c_size_t, c_uint64, _Callback, c_uint32)
        ),
        "nbd_aio_pwrite": Signature(
            c_int64, (_handle, ctypes.c_void_p, c_size_t, c_uint64, _Callback, c_uint32)
        ),
        "nbd_aio_flush": Signature(c_int64, (_handle, _Callback, c_uint32)),
        "nbd_aio_trim": Signature(c_int64, (_handle, c_uint64, c_uint64, _Callback, c_uint32)),
        "nbd_aio_get_fd": Signature(c_int, (_handle,)),
        "nbd_aio_get_direction": Signature(c_uint, (_handle,)),
        "nbd_aio_notify_read": Signature(c_int, (_handle,)),
        "nbd_aio_notify_write": Signature(c_int, (_handle,)),
        "nbd_aio_is_ready": Signature(c_int, (_handle,)),
        "nbd_aio_is_processing": Signature(c_int, (_handle,)),
        "nbd_aio_peek_command_completed": Signature(c_int64, (_handle,)),
        "nbd_aio_command_completed": Signature(c_int, (_handle, c_uint64)),
    },
    loader=ctypes.PyDLL,
    required=False,
)


@cache
def _calls() -> SimpleNamespace:
    """Load libnbd: the calls that wait, and those that do not, under one roof.

    Raises:
        XenUnavailable: there is no libnbd; the message names the package.
    """
    waiting, others = NBD.load(), _AIO.load()
    return SimpleNamespace(
        **{**vars(waiting), **vars(others), "last": (waiting.nbd_get_error, waiting.nbd_get_errno)}
    )


class Export(NamedTuple):
    """What a server says of a disk."""

    size: int
    """Bytes."""
    read_only: bool
    can_flush: bool
    can_trim: bool
    can_multi_conn: bool
    """Several connections see each other's writes, and a flush covers all."""
    minimum: int
    """Bytes: the smallest request and its alignment; 1 if the server does not say."""
    preferred: int
    """Bytes; 0 if the server does not say."""
    maximum: int
    """Bytes: the largest request; 32 MiB if the server does not say."""


PASSING = {
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.ESHUTDOWN,
    errno.ETIMEDOUT,
    errno.EIO,
    errno.ENOSPC,
    errno.ENOMEM,
}
"""Errors that say nothing against the request: it may be done later, or by another server."""

_LAST_WORDS = 1.0  # seconds to read what a server has printed that has ended
_TERM = 30.0  # seconds that a server of our own may take to end: it may have to store much
_TERM_UNUSED = 2.0  # if it has served nobody
_PATIENCE = 30.0  # seconds to connect, and to agree on an export
_STEP = 0.1  # seconds until Python may handle a signal
_MAXIMUM = 32 << 20  # the NBD protocol: what a client may assume where nothing is said


class ServerFailed(BackendError):
    """A server that was started ends, or is none.

    Args:
        message: libnbd's.
        said: the lines that it has printed.
    """

    def __init__(self, message: str, said: Sequence[str]) -> None:
        super().__init__("; ".join(said) or message)
        self.said = said


def _children() -> set[int]:
    """The processes that this thread has started, as far as the kernel tells (proc(5))."""
    try:
        with open("/proc/thread-self/children", encoding="ascii") as file:
            return {int(each) for each in file.read().split()}
    except OSError:  # it was built without
        return set()


class Connection(Closing):
    """A connection to an NBD server, and the requests in flight on it; for one thread.

    Args:
        where: a URI (``nbd://``, ``nbds://``, ``nbd+unix://``), or the command line of a server
            that is started with its socket (systemd's socket activation) and ends with the
            connection.
        is_simple: have the server send simple replies only.

    Attributes:
        lost: why no more requests can be issued; empty if they can, as far as is known.
        watched: what the socket is polled for, if it is: for whoever polls it.
        takes_buffers: :meth:`issue` takes a list of buffers for a read, too.

    Raises:
        BackendError: the server cannot be had; the message says why.
    """

    takes_buffers = False

    def __init__(self, where: str | Sequence[str], *, is_simple: bool = False) -> None:
        self._nbd = _calls()
        self.lost = ""
        self.watched = 0
        self._is_ours = not isinstance(where, str)
        self._server = 0  # its process, if it is ours and known
        self._handle = self._nbd.nbd_create()
        if not self._handle:
            raise BackendError(f"libnbd: {self._why()[1]}")
        self._in_flight: dict[int, tuple[Any, ...]] = {}  # by cookie: token, memory
        try:
            if is_simple:
                self._nbd.nbd_set_request_structured_replies(self._handle, False)
                if self._nbd.nbd_set_request_extended_headers is not None:  # libnbd 1.18
                    self._nbd.nbd_set_request_extended_headers(self._handle, False)
            self._connect(where)
            self.export = self._negotiated()
        except BaseException:
            self.close()
            raise
        self._fd = self._nbd.nbd_aio_get_fd(self._handle)

    def _connect(self, where: str | Sequence[str]) -> None:
        nbd = self._nbd
        if isinstance(where, str):
            # A certificate directory or key file that the URI names is the administrator's.
            nbd.nbd_set_uri_allow_local_file(self._handle, True)
            self._await(nbd.nbd_aio_connect_uri(self._handle, where.encode()))
        else:
            command = [find_program(where[0], "install it, or give its path"), *where[1:]]
            words = (c_char_p * (len(command) + 1))(*map(os.fsencode, command), None)
            relay = None
            try:
                with relayed_stderr() as relay:
                    before = _children()
                    begun = nbd.nbd_aio_connect_systemd_socket_activation(self._handle, words)
                    started = _children() - before
                    self._server = started.pop() if len(started) == 1 else 0
                    self._await(begun)
            except BackendError as error:
                said = relay.said(_LAST_WORDS) if relay is not None else []
                raise ServerFailed(str(error), said) from error
            relay.pass_on()

    def _await(self, begun: int) -> None:
        """Wait until the server has said what it has, or for _PATIENCE."""
        nbd, handle = self._nbd, self._handle
        deadline = time.monotonic() + _PATIENCE
        while begun >= 0 and nbd.nbd_aio_is_connecting(handle) > 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendError(
                    f"the server has not answered for {_PATIENCE:g} s: is it stuck, or has it as "
                    "many clients as it takes (qemu-nbd: --shared)?"
                )
            begun = nbd.nbd_poll(handle, int(min(left, _STEP) * 1000) + 1)
        if begun < 0:
            raise BackendError(self._why()[1])

    def _negotiated(self) -> Export:
        nbd, handle = self._nbd, self._handle
        size = nbd.nbd_get_size(handle)
        if size < 0:
            raise BackendError(self._why()[1])
        minimum, preferred, maximum = (max(0, nbd.nbd_get_block_size(handle, n)) for n in range(3))
        return Export(
            size=size,
            read_only=nbd.nbd_is_read_only(handle) > 0,
            can_flush=nbd.nbd_can_flush(handle) > 0,
            can_trim=nbd.nbd_can_trim(handle) > 0,
            can_multi_conn=nbd.nbd_can_multi_conn(handle) > 0,
            minimum=minimum or 1,
            preferred=preferred,
            maximum=min(maximum or _MAXIMUM, _MAXIMUM),
        )

    def _why(self) -> tuple[int, str]:
        """The last error of this thread: its number (EIO if there is none), and a line."""
        get_error, get_errno = self._nbd.last
        text = (get_error() or b"no reason given").decode(errors="replace")
        number = get_errno() or errno.EIO
        # "nbd_connect_uri: connect: Connection refused": the function helps nobody.
        return number, text.partition(": ")[2] or text

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return len(self._in_flight)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be issued; a connection that is lost never comes back."""
        nbd, handle = self._nbd, self._handle
        return bool(nbd.nbd_aio_is_ready(handle) > 0 or nbd.nbd_aio_is_processing(handle) > 0)

    def fileno(self) -> int:
        """Return the socket."""
        return int(self._fd)

    @property
    def events(self) -> int:
        """What to poll the socket for; nothing once this is closed, as it is amid a lost flush."""
        if self._handle is None:
            return 0
        direction = self._nbd.nbd_aio_get_direction(self._handle)
        return (select.POLLIN if direction & _TO_READ else 0) | (
            select.POLLOUT if direction & _TO_WRITE else 0
        )

    def issue(
        self, operation: int, memory: Any, offset: int, length: int, token: Any
    ) -> OSError | None:
        """Issue a request; :meth:`completed` says when it is over.

        Args:
            operation: as in :mod:`~xen_disk_py.backends.asynchronous`.
            memory: where the data goes or comes from: a writable buffer, or bytes. It must stay
                as it is until the request is over.
            offset: bytes from the disk's beginning.
            length: bytes.
            token: what :meth:`completed` gives back.

        Returns:
            None, or why nothing was issued.
        """
        nbd, handle = self._nbd, self._handle
        held: Any = None
        address: Any
        if operation == FLUSH:
            cookie = nbd.nbd_aio_flush(handle, _NO_CALLBACK, 0)
        elif operation == DISCARD:
            cookie = nbd.nbd_aio_trim(handle, length, offset, _NO_CALLBACK, 0)
        else:
            if isinstance(memory, bytes):
                held = address = memory
            else:
                held = ctypes.c_char.from_buffer(memory)
                address = ctypes.addressof(held)
            do = nbd.nbd_aio_pread if operation == READ else nbd.nbd_aio_pwrite
            cookie = do(handle, address, length, offset, _NO_CALLBACK, 0)
        if cookie < 0:
            return self._error()
        self._in_flight[cookie] = token, held
        return None

    def progress(self, revents: int) -> None:
        """Let the connection move: its socket is ready as ``revents`` (of poll) says."""
        nbd, handle = self._nbd, self._handle
        direction = nbd.nbd_aio_get_direction(handle)
        if direction & _TO_READ and revents & (select.POLLIN | select.POLLHUP | select.POLLERR):
            nbd.nbd_aio_notify_read(handle)
        elif direction & _TO_WRITE and revents & select.POLLOUT:
            nbd.nbd_aio_notify_write(handle)

    def completed(self) -> list[tuple[Any, OSError | None]]:
        """Retire the requests that are over; of a connection that is lost, that is all of them."""
        nbd, handle, in_flight = self._nbd, self._handle, self._in_flight
        peek, retire = nbd.nbd_aio_peek_command_completed, nbd.nbd_aio_command_completed
        done: list[tuple[Any, OSError | None]] = []
        while in_flight:
            cookie = peek(handle)
            if cookie <= 0:
                break
            error = self._error() if retire(handle, cookie) < 0 else None
            done.append((in_flight.pop(cookie)[0], error))
        return done

    def do(self, operation: int, memory: Data, offset: int, timeout: float = 0) -> None:
        """Do one request and wait for it, where no other is in flight.

        Args:
            operation: as of :meth:`issue`.
            memory: what to write; empty for a flush.
            offset: bytes from the disk's beginning.
            timeout: seconds that it may take; 0: any time.

        Raises:
            OSError: it failed.
        """
        error = self.issue(operation, memory, offset, len(memory), None)
        poller = select.poll()
        while error is None and self._in_flight:
            poller.register(self._fd, self.events)
            ready = poller.poll(timeout * 1000 or None)
            if not ready:
                self.end_server()
                error = StorageError(errno.ETIMEDOUT, f"no answer for {timeout:g} s")
            for _, revents in ready:
                self.progress(revents)
            for _, failure in self.completed():
                error = failure
            if self.lost:
                error = StorageError(errno.ENOTCONN, self.lost)
        if error is not None:
            raise error

    @property
    def oldest(self) -> int:
        """The number of the request that has been in flight for longest: they grow."""
        return int(next(iter(self._in_flight)))

    @property
    def newest(self) -> int:
        """The number of the request that was issued last, of those in flight."""
        return int(next(reversed(self._in_flight)))

    def end_server(self) -> None:
        """Kill a server of our own, which would else do what it has taken, at any time."""
        if self._is_ours:
            self._nbd.nbd_kill_subprocess(self._handle, signal.SIGKILL)

    def abandon(self) -> list[Any]:
        """Disconnect, and return the tokens of the requests that were in flight."""
        tokens = [token for token, *_ in self._in_flight.values()]
        self.close()
        return tokens

    def _error(self) -> OSError:
        number, text = self._why()
        return StorageError(number, text) if number in PASSING else OSError(number, text)

    def close(self) -> None:
        """Disconnect; what is in flight is forgotten, and no memory is touched any longer."""
        handle, self._handle = self._handle, None
        if handle:
            if self._is_ours:
                self._end_own(handle)
            self._nbd.nbd_close(handle)
            self._in_flight.clear()

    def _end_own(self, handle: Any) -> None:
        """End a server of our own: libnbd sends it SIGTERM, and waits for its end for any time."""
        kill = self._nbd.nbd_kill_subprocess
        kill(handle, signal.SIGCONT)  # one that is stopped takes no other
        fd = self._nbd.nbd_aio_get_fd(handle)
        if fd >= 0:  # nbdkit ends when its client has gone
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as end:
                end.shutdown(socket.SHUT_RDWR)
        kill(handle, signal.SIGTERM)
        patience = _TERM if hasattr(self, "export") else _TERM_UNUSED
        deadline, pause = time.monotonic() + patience, 0.001
        while self._server and not self._has_ended():
            if time.monotonic() >= deadline:
                log.warning("the NBD server has not ended %g s after SIGTERM: killed", patience)
                kill(handle, signal.SIGKILL)
                return
            time.sleep(pause)
            pause = min(2 * pause, _STEP)
            if pause == _STEP:  # qemu-nbd loses one that comes early
                kill(handle, signal.SIGTERM)

    def _has_ended(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT  # its end is libnbd's to take
        try:
            return os.waitid(os.P_PID, self._server, options) is not None
        except ChildProcessError:
            return True
