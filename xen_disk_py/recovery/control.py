"""Commands to a process that serves a disk: a Unix socket beside its record in /run.

The process registers verbs, another command of ours asks::

    with Control(record) as control:
        control.register("filter.list", lambda request: {"filters": []})
        control.start()
        ...

    ask(directory, address, "filter.list")  # {"filters": []}

Each connection carries one request and one answer, a line of JSON each: ``{"verb": …, …}``, then
``{"answer": {…}}``, or ``{"error": "…", "usage": bool}``. A handler takes the request and returns
the answer, both as what JSON knows; what it raises of :mod:`~xen_disk_py.errors` is raised again by
:func:`ask`. Handlers are called in one thread of their own, one at a time, never in one that serves
requests: they may wait, but no longer than a command does (:data:`PATIENCE`).

Only root gets here: the directory is root's alone, and the peer's user is looked at as well. A
client has two seconds, and 64 KiB; whatever it does, the disk is served as before. The socket is
bound before privileges are given up. Whoever takes the disk over binds it anew; it goes with the
record.

Verbs of this package are registered in :mod:`.verbs`.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Callable

from ..errors import DeviceError, UsageError, XenDiskError, XenUnavailable
from ..hypervisor import Closing
from ..text import printable
from ..xenbus.states import Address
from ..xenbus.vdev import from_number
from . import record as records
from .record import SOCKET, Record

log = logging.getLogger("xen_disk_py")

Handler = Callable[[dict[str, Any]], dict[str, Any]]

PATIENCE = 10.0
"""Seconds that a command waits for its answer."""

_CLIENT = 2.0  # seconds that a client has for its request, and again to take the answer
_REQUEST = 64 << 10  # bytes
_ANSWER = 1 << 20
_TEXT = 2000  # letters of an error
_GRACE = 1.0  # seconds: a process that has just taken over binds its socket in a moment
_PAUSE = 0.02
_DESCRIPTORS = 4  # that may come with a request
_INT = array("i").itemsize
_PEER = struct.Struct("iii")  # struct ucred: pid, uid, gid


class Control(Closing):
    """The end of the process that serves.

    Args:
        record: of the disk; the socket has its name, and goes with it.
    """

    def __init__(self, record: Record) -> None:
        self._handlers: dict[str, Handler] = {}
        self._thread: threading.Thread | None = None
        self._owner = os.geteuid()
        self._listener: socket.socket | None = None
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._listener = _listen(record.path)
        except OSError as error:  # the disk matters more
            log.warning(
                "this disk takes no commands (xen-disk filter): cannot make %s%s: %s",
                record.path,
                SOCKET,
                error.strerror or error,
            )

    def register(self, verb: str, handler: Handler) -> None:
        """Have ``handler`` answer requests of this verb; before :meth:`start`, or later."""
        self._handlers[verb] = handler

    def start(self) -> None:
        """Answer from now on, in a thread."""
        if self._listener is None or self._thread is not None:
            return
        thread = threading.Thread(target=self._serve, name="control", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("this disk takes no commands (xen-disk filter): %s", error)
        else:
            self._thread = thread

    def close(self) -> None:
        """Answer no longer; a handler that hangs ends with the process."""
        if self._stop_read < 0:
            return
        os.write(self._stop_write, b"x")
        if self._thread is not None:
            self._thread.join(_CLIENT)
            if self._thread.is_alive():
                return  # its descriptors are in use
        if self._listener is not None:
            self._listener.close()
        os.close(self._stop_read)
        os.close(self._stop_write)
        self._stop_read = -1

    def _serve(self) -> None:
        assert self._listener is not None
        poller = select.poll()
        poller.register(self._stop_read, select.POLLIN)
        while True:
            poller.register(self._listener, select.POLLIN)
            if any(fd == self._stop_read for fd, _ in poller.poll()):
                return
            try:
                peer, _ = self._listener.accept()
            except OSError as error:  # no descriptors, say: it is as readable as before
                log.debug("accept: %s", error)
                poller.unregister(self._listener)
                if poller.poll(1000):
                    return
                continue
            with peer, suppress(OSError):  # whoever does not wait for the answer misses it
                self._converse(peer)

    def _converse(self, peer: socket.socket) -> None:
        uid = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1]
        if uid not in (0, self._owner):
            return
        descriptors: list[int] = []
        try:
            until = time.monotonic() + _CLIENT
            line = _receive(peer, _REQUEST, until, self._stop_read, descriptors)
            text = None if line is None else self._answer_to(line, descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)
        if text is not None:
            _send(peer, f"{text}\n".encode(), time.monotonic() + _CLIENT, self._stop_read)

    def _answer_to(self, line: bytes, descriptors: list[int]) -> str:
        try:
            return json.dumps({"answer": self._answer(line, descriptors)})
        except XenDiskError as error:
            is_usage = isinstance(error, UsageError)
            return json.dumps({"error": str(error), "usage": is_usage})
        except Exception as error:
            log.error("a command failed", exc_info=error)
            told = f"{type(error).__name__}: {error}"[:1000]
            return json.dumps({"error": told, "usage": False})

    def _answer(self, line: bytes, descriptors: list[int]) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise DeviceError("this is no JSON object") from None
        if not isinstance(request, dict):
            raise DeviceError("this is no JSON object")
        verb = request.pop("verb", None)
        handler = self._handlers.get(verb) if isinstance(verb, str) else None
        if handler is None:
            raise DeviceError(
                "the process that serves the disk does not know that command: have the installed "
                "version take over with: xen-disk upgrade"
            )
        request.pop("descriptors", None)
        if descriptors:
            request["descriptors"] = descriptors
        return handler(request)


def ask(
    directory: str,
    address: Address,
    verb: str,
    *,
    timeout: float = PATIENCE,
    descriptors: Sequence[int | socket.socket] = (),
    **arguments: Any,
) -> dict[str, Any]:
    """Have the process that serves a device do something.

    Args:
        directory: where records are.
        address: the device.
        verb: what to do.
        timeout: seconds that it may take.
        descriptors: are sent along; the handler finds its own of them, open only as long as it is
            called, as ``descriptors``.
        arguments: of that, as JSON knows them.

    Raises:
        UsageError, DeviceError: what the handler raised, or that there is no answer, and why.
        XenUnavailable: that is not ours to do.
    """
    vdev = from_number(address.devid)
    found = records.find_served(directory, address)
    if found is None or not found.alive:
        if os.path.isdir(directory) and not os.access(directory, os.R_OK | os.X_OK):
            raise XenUnavailable(f"cannot read {directory}: run as root")
        raise DeviceError(f"no process that lives serves {vdev}: see xen-disk list")
    request = json.dumps({"verb": verb, **arguments}).encode()
    if len(request) >= _REQUEST:
        raise UsageError("that is too long for a command")
    deadline = time.monotonic() + timeout
    silent = DeviceError(
        f"the process that serves {vdev} does not answer within {timeout:g} s: it is stopped, or "
        "busy with another command"
    )
    with _connected(records.path_of(directory, address), str(vdev), deadline, silent) as peer:
        try:
            request += b"\n"
            if descriptors:
                numbers = array(
                    "i", [fd if isinstance(fd, int) else fd.fileno() for fd in descriptors]
                )
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)
                request = request[peer.sendmsg([request], [rights]) :]
            _send(peer, request, deadline)
            line = _receive(peer, _ANSWER, deadline)
        except OSError as error:
            raise DeviceError(f"the process that serves {vdev} has ended: {error}") from error
    if line is None:
        if time.monotonic() >= deadline:
            raise silent
        raise DeviceError(f"the process that serves {vdev} has ended, or does not listen to us")
    # That process may be somebody else now, whom a guest has taken over: believe nothing.
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        kind = UsageError if answer.get("usage") else DeviceError
        raise kind(printable(str(answer["error"])[:_TEXT]))
    if not isinstance(answer, dict) or not isinstance(answer.get("answer"), dict):
        raise DeviceError(f"the process that serves {vdev} answers what makes no sense")
    result: dict[str, Any] = answer["answer"]
    return result


@contextmanager
def _near(path: str) -> Iterator[str]:
    """Name a socket by a path short enough for any directory (108 bytes)."""
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(f"{path}{SOCKET}")  # of a process that was killed: the record is ours
        with _near(f"{path}{SOCKET}") as near:
            listener.bind(near)
            os.chmod(near, 0o600)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def _connected(
    path: str, vdev: str, deadline: float, silent: DeviceError
) -> Iterator[socket.socket]:
    grace = time.monotonic() + _GRACE
    with ExitStack() as stack:
        try:
            near = stack.enter_context(_near(f"{path}{SOCKET}"))
        except OSError as error:
            raise XenUnavailable(f"cannot open {path}: {error.strerror}: run as root") from error
        while True:
            peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            peer.setblocking(False)
            try:
                peer.connect(near)
            except BlockingIOError:  # others are before us
                if time.monotonic() >= deadline:
                    raise silent from None
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() >= min(grace, deadline):
                    raise DeviceError(
                        f"the process that serves {vdev} takes no commands: it is of another "
                        "version, say; have the installed one take over with: xen-disk upgrade"
                    ) from None
            except PermissionError as error:
                raise XenUnavailable(f"{path}{SOCKET}: {error.strerror}: run as root") from error
            else:
                break
            peer.close()
            time.sleep(_PAUSE)
        yield peer


def _ready(peer: socket.socket, event: int, deadline: float, stop: int) -> bool:
    poller = select.poll()
    poller.register(peer, event)
    if stop >= 0:
        poller.register(stop, select.POLLIN)
    left = deadline - time.monotonic()
    ready = poller.poll(max(0.0, left) * 1000) if left > 0 else []
    return bool(ready) and all(fd != stop for fd, _ in ready)


def _receive(
    peer: socket.socket,
    limit: int,
    deadline: float,
    stop: int = -1,
    descriptors: list[int] | None = None,
) -> bytes | None:
    """Return a line; None if it does not come, is too long, or ``stop`` is readable.

    What descriptors come with it are added to ``descriptors``; without that they are dropped.
    """
    peer.setblocking(False)
    line = bytearray()
    while len(line) < limit:
        if not _ready(peer, select.POLLIN, deadline, stop):
            return None
        length = min(65536, limit - len(line))
        left = 0 if descriptors is None else _DESCRIPTORS - len(descriptors)
        room = socket.CMSG_SPACE(left * _INT) if left > 0 else 0
        part, rights, _, _ = peer.recvmsg(length, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and descriptors is not None:
                descriptors.extend(array("i", data[: len(data) // _INT * _INT]))
        if not part:
            return None
        line += part
        if part.endswith(b"\n"):
            return bytes(line)
    return None


def _send(peer: socket.socket, line: bytes, deadline: float, stop: int = -1) -> None:
    rest = memoryview(line)
    while rest and _ready(peer, select.POLLOUT, deadline, stop):
        rest = rest[peer.send(rest) :]
