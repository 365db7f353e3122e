"""Xenstore as text, and no wait without a deadline: the one module that knows pyxs.

pyxs speaks the protocol; this module decides how to wait. Its ``Client`` takes an injected
router, and ours has no thread: who asks, reads until the answer is there, keeps the watch
events that pass by, and gives up at a deadline. When an exchange is cut short the position
in the stream is unknown, so the connection is closed for good (:attr:`Store.is_lost`) and
:meth:`Store.reconnect` makes a new one.

Values are text of NUL and the bytes 0x20 to 0x7f, the only ones pyxs passes on; free text,
such as a file name, goes through :func:`quote` and :func:`unquote`. A request, path and
value together, has at most 4096 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import select
import socket
import stat
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, TypeVar

from xen_disk_py.errors import StoreError, StoreLost, XenUnavailable
from xen_disk_py.hypervisor import Closing

with warnings.catch_warnings():
    # In a dom0, pyxs leaves /proc/xen/capabilities open while it is imported (Client.SU).
    warnings.simplefilter("ignore", ResourceWarning)
    import pyxs
    from pyxs.client import Op, Packet
    from pyxs.connection import UnixSocketConnection, XenBusConnection
    from pyxs.helpers import error as pyxs_error

A = TypeVar("A")
T = TypeVar("T")
Names = list[str]
"""A list of names; inside :class:`Store` the word ``list`` is a method."""

_DEVICE = "/dev/xen/xenbus"
_HYPERVISOR_TYPE = "/sys/hypervisor/type"
_PAYLOAD_MAX = 4096  # XENSTORE_PAYLOAD_MAX, xen/include/public/io/xs_wire.h
_TRANSACTION_TRIES = 25
_AHEAD = 32  # requests before the first answer
_EVENTS_PER_CALL = 1000  # a guest that never stops writing must not keep us in one call

_PATH = re.compile(r"[A-Za-z0-9/_@-]+")
_VALUE = re.compile(r"[\x00\x20-\x7f]*")
_PERMISSION = re.compile(r"[nrwb][0-9]+")
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")


def quote(text: str) -> str:
    """Percent-encode what a xenstore value cannot carry; see :func:`unquote`."""
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != ord("%") else f"%{byte:02X}"
        for byte in text.encode("utf-8", "surrogateescape")
    )


def unquote(value: str) -> str:
    """Undo :func:`quote`, byte for byte (file names that are not UTF-8 included)."""
    data = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), value.encode())
    return data.decode("utf-8", "surrogateescape")


class Store(Closing):
    """A connection to xenstore, for one thread.

    A call that gets no answer within ``timeout`` seconds, or whose connection breaks, raises
    :class:`~xen_disk_py.errors.StoreLost`, and so does every later one until
    :meth:`reconnect`. What xenstore refuses raises
    :class:`~xen_disk_py.errors.StoreError` with its ``errno``.

    Watch events can arrive while any other call waits for its answer; they are kept, and
    :meth:`fileno` is then no longer readable. So, before it sleeps on the descriptor, a loop
    looks at :attr:`has_pending` (or calls :meth:`pending`).
    """

    def __init__(self, path: str | None, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._tokens: dict[str, str] = {}  # watched path -> token
        self._watched: dict[str, str] = {}  # token -> watched path
        self._spares: list[_Router] = []
        self._connect()

    @classmethod
    def open(cls, path: str | None = None, timeout: float = 5.0) -> Store:
        """Connect through the socket or device at ``path``.

        By default the first that works of ``$XENSTORED_PATH`` or the socket of xenstored, and
        ``/dev/xen/xenbus`` (where xenstored runs in another domain).

        Raises:
            XenUnavailable: none can be used; the message tells what to do.
        """
        return cls(path, timeout)

    # -- values ------------------------------------------------------------------------

    def read(self, path: str) -> str | None:
        r"""Return the value; None when there is no such node.

        Whoever may write to the node decides what is in it; what is not UTF-8 comes out as
        ``\xNN``. NULs at the end of a value do not arrive (pyxs drops them).
        """
        try:
            return _text(self._ask(f"cannot read {path}", self._client.read, _path(path)))
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def read_all(self, paths: Sequence[str]) -> Sequence[str | None]:
        """Return what :meth:`read` does of each path; through a socket, many at once."""
        return [
            None if payload is None else _text(payload.rstrip(b"\0"))
            for payload in self._gather("cannot read nodes", Op.READ, paths)
        ]

    def list_all(self, paths: Sequence[str]) -> Sequence[Names]:
        """Return what :meth:`list` does of each path; through a socket, many at once."""
        return [
            [_text(name) for name in (payload or b"").split(b"\0") if name]
            for payload in self._gather("cannot list nodes", Op.DIRECTORY, paths)
        ]

    def write(self, path: str, value: str) -> None:
        """Set the value, also to nothing; what is missing of the path is created."""
        self._ask(f"cannot write {path}", self._client.ack, Op.WRITE, _written(path, value))

    def create(self, path: str, permissions: Sequence[str], values: Mapping[str, str]) -> None:
        """Create a node with these permissions, and nodes with these values right under it.

        Through a socket all of it is sent before the first answer is awaited. So, when
        something is refused, what comes after it is done all the same: call this in a
        transaction.

        Args:
            path: of the node; what is missing of it is created.
            permissions: what :meth:`get_permissions` returns: letters n, r, w, b (both), and a
                domid; the nodes under it inherit them.
            values: by name.
        """
        requests = [
            (Op.MKDIR, _path(path) + b"\0"),
            (Op.SET_PERMS, _permissions(path, permissions)),
            *((Op.WRITE, _written(f"{path}/{name}", value)) for name, value in values.items()),
        ]
        what = f"cannot create {path}"
        for answer in self._answers(what, requests):
            self._ask(what, _check, answer)

    def remove(self, path: str) -> None:
        """Remove the node and everything under it; absent already is fine."""
        try:
            self._ask(f"cannot remove {path}", self._client.delete, _path(path))
        except StoreError as error:
            if error.errno != errno.ENOENT:  # then not even the parent exists
                raise

    def list(self, path: str) -> Names:
        """Return the names right under ``path``; none when there is no such node.

        Names that do not fit in one answer (4096 bytes) raise ``E2BIG``.
        """
        try:
            names = self._ask(f"cannot list {path}", self._client.list, _path(path))
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return []
            raise
        return [_text(name) for name in names if name]

    def exists(self, path: str) -> bool:
        """Tell whether there is such a node."""
        return self.read(path) is not None

    def tree(self, path: str) -> dict[str, str]:
        """Return the values of the node and of all under it, by their whole paths."""
        value = self.read(path)
        if value is None:
            return {}
        values = {path: value}
        for name in self.list(path):
            values.update(self.tree(f"{path.rstrip('/')}/{name}"))
        return values

    def get_permissions(self, path: str) -> Names:
        """Return the owner with everybody else's right, then other domains: ``n0``, ``r5``."""
        call = self._client.get_perms
        return [_text(entry) for entry in self._ask(f"cannot see into {path}", call, _path(path))]

    def transact(self, change: Callable[[Store], T], *, tries: int = _TRANSACTION_TRIES) -> T:
        """Run ``change(self)`` in a transaction, and again if somebody else interfered.

        ``change`` may run ``tries`` times, so it should do nothing but read and write here.

        Returns:
            What ``change`` returned in the run that was committed.

        Raises:
            StoreError: ``EAGAIN`` when somebody interfered every time.
            Exception: what ``change`` raises; nothing is changed then.
        """
        client = self._client
        for attempt in range(tries):
            if attempt:
                share = int.from_bytes(os.urandom(2), "little") / (1 << 16)
                time.sleep(share * min(0.1, 0.001 * 2**attempt))
            self._ask("cannot start a transaction", client.transaction)
            try:
                result = change(self)
            except StoreError as error:
                _roll_back(client)
                if error.errno != errno.EAGAIN:
                    raise
                continue
            except BaseException:
                _roll_back(client)
                raise
            if self._ask("cannot commit a transaction", client.commit):
                return result
        raise StoreError(errno.EAGAIN, f"{tries} tries of a transaction collided")

    # -- watches -----------------------------------------------------------------------

    def watch(self, path: str) -> None:
        """Watch the node and all under it, or ``@introduceDomain``, ``@releaseDomain``.

        A new watch fires once straight away; watching what is watched already does nothing.
        When this raises, the path is not watched.
        """
        name = _path(path)
        if path in self._tokens:
            return
        token = str(next(self._numbers))  # never used twice: a late event cannot be mistaken
        self._tokens[path] = token
        self._watched[token] = path
        try:
            self._register(name, token)
        except BaseException:
            self._forget(path)
            raise

    def unwatch(self, path: str) -> None:
        """End a watch; what it had fired is dropped. Not watched is fine.

        The path counts as unwatched even when this raises.
        """
        if path not in self._tokens:
            return
        strings = [_path(path) + b"\0", self._forget(path).encode("ascii") + b"\0"]
        self._ask(f"cannot unwatch {path}", self._client.ack, Op.UNWATCH, *strings)

    def fileno(self) -> int:
        """Return the descriptor to sleep on; it changes at every :meth:`reconnect`.

        Readable means: call :meth:`pending`. See the class for when not to sleep.
        """
        return self._router.fileno()

    @property
    def has_pending(self) -> bool:
        """Whether events are kept already; does not look at the connection."""
        return any(token in self._watched for token in self._router.fired)

    def pending(self) -> Names:
        """Return the watched paths that fired since the last call; never waits.

        They are the paths given to :meth:`watch`, each once however often it fired, in the
        order of their first event.

        Raises:
            StoreLost: the connection broke; events are lost with it, but every watch fires
                again after :meth:`reconnect`.
        """
        self._router.drain()
        fired, self._router.fired = self._router.fired, {}
        return [self._watched[token] for token in fired if token in self._watched]

    # -- domains -----------------------------------------------------------------------

    def is_introduced(self, domid: int) -> bool:
        """Tell whether xenstore knows the domain: it was started and is not gone."""
        what = f"cannot look for domain {domid}"
        return bool(self._ask(what, self._client.is_domain_introduced, domid))

    # -- the connection ----------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether only :meth:`reconnect` helps."""
        return not self._router.is_connected

    def reconnect(self) -> None:
        """Connect anew, as :meth:`open` did, and register every watch again.

        Each watch fires once more, as the nodes may have changed meanwhile (or be gone, if
        xenstored started afresh). When this raises, the store is lost and can be tried again.

        Raises:
            XenUnavailable: it cannot connect.
            StoreLost: the new connection broke at once.
        """
        self._router.close()
        self._connect()
        try:
            for path, token in self._tokens.items():
                self._register(_path(path), token)
        except BaseException:
            self._router.close()
            raise

    def reserve(self, count: int) -> None:
        """Make so many connections more, for :meth:`reconnect` when it may make none any longer.

        Each is used once, and xenstored's end is the end of all of them.
        """
        while len(self._spares) < count:
            self._spares.append(_Router(_connect(self._path, self._timeout)))

    def close(self) -> None:
        """Disconnect; xenstored then forgets our watches and an open transaction."""
        self._router.close()
        while self._spares:
            self._spares.pop().close()

    def _connect(self) -> None:
        try:
            self._router = _Router(_connect(self._path, self._timeout))
        except XenUnavailable:
            if not self._spares:
                raise
            self._router = self._spares.pop()
        self._client: Any = pyxs.Client(router=self._router)

    def _register(self, name: bytes, token: str) -> None:
        # Not pyxs's Monitor: it has its own idea of which events to pass on, and refuses the
        # device.
        strings = [name + b"\0", token.encode("ascii") + b"\0"]
        self._ask(f"cannot watch {_text(name)}", self._client.ack, Op.WATCH, *strings)

    def _forget(self, path: str) -> str:
        token = self._tokens.pop(path)
        del self._watched[token]
        return token

    def _gather(self, what: str, operation: int, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Ask the same of many nodes; None of one that does not exist."""
        for answer in self._answers(what, [(operation, _path(path) + b"\0") for path in paths]):
            try:
                yield self._ask(what, _payload, answer)
            except StoreError as error:
                if error.errno != errno.ENOENT:
                    raise
                yield None

    def _answers(self, what: str, requests: Sequence[tuple[int, bytes]]) -> Sequence[Any]:
        """Send requests, then return the packets that answer them."""
        transaction = self._client.tx_id
        try:
            packets = [Packet(operation, data, 0, transaction) for operation, data in requests]
        except pyxs.InvalidPayload as error:
            raise StoreError(errno.E2BIG, what) from error
        return self._router.exchange(packets)

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call pyxs and turn its exceptions into ours, with ``what`` as the message."""
        try:
            return call(*arguments)
        except pyxs.InvalidPayload as error:
            raise StoreError(errno.E2BIG, what) from error
        except (pyxs.PyXSError, LookupError, ValueError) as error:
            if type(error) is pyxs.PyXSError and isinstance(error.args[0], int):
                # 0: an error name that this system does not know
                raise StoreError(error.args[0] or errno.EIO, what) from error
            self._router.close()
            raise StoreLost(errno.EPROTO, what) from error


def _path(path: str) -> bytes:
    """Check and encode a path (docs/misc/xenstore.txt: 3072 bytes, relative ones 2048)."""
    limit = 3072 if path.startswith("/") else 2048
    well_formed = _PATH.fullmatch(path) and "//" not in path and len(path) <= limit
    if not well_formed or (path != "/" and path.endswith("/")):
        raise StoreError(errno.EINVAL, f"this is no xenstore path: {path[:100]!r}")
    return path.encode("ascii")


def _written(path: str, value: str) -> bytes:
    """Return what a WRITE sends: in one piece, because pyxs 0.4.1 refuses one that is empty."""
    if not _VALUE.fullmatch(value):
        raise StoreError(errno.EINVAL, f"{path} takes printable ASCII only, not {value!r}")
    return _path(path) + b"\0" + value.encode("ascii")


def _permissions(path: str, permissions: Sequence[str]) -> bytes:
    """Return what a SET_PERMS sends."""
    if not permissions or not all(map(_PERMISSION.fullmatch, permissions)):
        raise StoreError(errno.EINVAL, f"these are no permissions: {list(permissions)}")
    return b"".join([_path(path) + b"\0", *(f"{entry}\0".encode("ascii") for entry in permissions)])


def _payload(answer: Any) -> bytes:
    """Return what an answer says, as ``Client.execute_command`` of pyxs does."""
    if answer.op == Op.ERROR:
        raise pyxs_error(answer.payload[:-1])
    return bytes(answer.payload)


def _check(answer: Any) -> None:
    """See that it was done, as ``Client.ack`` of pyxs does."""
    payload = _payload(answer)
    if payload != b"OK\0":
        raise pyxs.PyXSError(payload)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _roll_back(client: Any) -> None:
    """End a transaction for the sake of an exception, which must not be hidden by ours."""
    with contextlib.suppress(StoreError, pyxs.PyXSError):
        client.rollback()
    client.tx_id = 0


# -- under pyxs: the exchange of packets ---------------------------------------------------


class _Reply:
    """What pyxs calls a reference to the answer; here the answer is there already."""

    def __init__(self, packet: Any) -> None:
        self._packet = packet

    def get(self) -> Any:
        return self._packet


class _Router:
    """What pyxs's ``Client`` expects of a router, without a thread."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.fired: dict[str, None] = {}  # tokens, in the order of their first event
        self._request = 0

    @property
    def is_connected(self) -> bool:
        return bool(self.connection.is_connected)

    def fileno(self) -> int:
        if not self.is_connected:
            raise StoreLost(errno.ENOTCONN, "the connection to xenstore is closed")
        return int(self.connection.fileno())

    def send(self, packet: Any) -> _Reply:
        """Exchange a request for its answer."""
        return _Reply(self.exchange([packet])[0])

    def exchange(self, packets: Sequence[Any]) -> list[Any]:
        """Exchange requests for their answers, in the same order.

        Through a socket many are sent before the first answer is awaited, but no more than
        the socket takes while xenstored does not read. The device has one buffer, from which
        Linux sends after ``write`` has returned (``xenbus_dev_request_and_reply``): there each
        waits for its answer.
        """
        answers: list[Any] = []
        ahead = _AHEAD if isinstance(self.connection, UnixSocketConnection) else 1
        with self._exchange() as transport:
            for first in range(0, len(packets), ahead):
                transport.start_clock()
                numbers = [self._post(packet) for packet in packets[first : first + ahead]]
                answers += [self._answer(number) for number in numbers]
        return answers

    def _post(self, packet: Any) -> int:
        # An identifier of our own: the one of pyxs outgrows its 32 bits one day.
        self._request = (self._request + 1) & 0xFFFFFFFF
        self.connection.send(packet._replace(rq_id=self._request))
        return self._request

    def _answer(self, number: int) -> Any:
        while True:
            answer = self.connection.recv()
            if answer.op == Op.WATCH_EVENT:
                self._keep(answer)
            elif answer.rq_id == number:
                return answer
            else:
                raise StoreLost(errno.EPROTO, "xenstore answered what nobody asked")

    def drain(self) -> None:
        """Keep the events that are here already."""
        with self._exchange() as transport:
            for _ in range(_EVENTS_PER_CALL):
                if not transport.is_readable():
                    break
                transport.start_clock()
                packet = self.connection.recv()
                if packet.op != Op.WATCH_EVENT:
                    raise StoreLost(errno.EPROTO, "xenstore answered what nobody asked")
                self._keep(packet)

    def close(self) -> None:
        self.connection.close()

    def _keep(self, packet: Any) -> None:
        strings = packet.payload.split(b"\0")
        if len(strings) < 3:
            raise StoreLost(errno.EPROTO, "xenstore sent a malformed watch event")
        self.fired.setdefault(_text(strings[1]))

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[_Transport]:
        """Give the transport, and close it when anything at all goes wrong meanwhile."""
        self.fileno()
        try:
            yield self.connection.transport
        except pyxs.PyXSError as error:  # a packet of unknown type or too long
            self.close()
            raise StoreLost(errno.EPROTO, "xenstore sent a malformed packet") from error
        except BaseException:  # an interrupt, too, leaves us in the middle of a packet
            self.close()
            raise


class _Transport:
    """A socket or device under a connection of pyxs, with a deadline for all waiting.

    It raises :class:`~xen_disk_py.errors.StoreLost` past pyxs, which catches only
    ``OSError``. pyxs's own transports wait without bound, and leave the socket open when it
    cannot be connected or shut down.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._timeout = timeout
        self._deadline = 0.0
        self._socket: socket.socket | None = None
        self.start_clock()
        if stat.S_ISCHR(os.stat(path).st_mode):
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        else:
            self._socket = self._connected(path)
            self._fd = self._socket.fileno()

    def _connected(self, path: str) -> socket.socket:
        result = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            result.setblocking(False)
            while True:
                try:
                    result.connect(path)
                except BlockingIOError:  # its queue, of one in xenstored, is full just now
                    if time.monotonic() >= self._deadline:
                        raise
                    time.sleep(0.01)
                else:
                    return result
        except BaseException:
            result.close()
            raise

    def start_clock(self) -> None:
        """What is waited for from now on must come within the timeout, all together."""
        self._deadline = time.monotonic() + self._timeout

    def fileno(self) -> int:
        return self._fd

    def is_readable(self) -> bool:
        return self._wait(select.POLLIN, 0)

    def recv(self, size: int) -> bytes:
        if size > _PAYLOAD_MAX:
            raise StoreLost(errno.EPROTO, f"xenstore announced a packet of {size} bytes")
        data = b""
        while len(data) < size:
            piece = self._when_ready(select.POLLIN, self._read, size - len(data))
            if not piece:
                raise StoreLost(errno.ECONNRESET, "xenstored closed the connection")
            data += piece
        return data

    def send(self, data: bytes) -> None:
        while data:
            data = data[self._when_ready(select.POLLOUT, self._write, data) :]

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self._fd)

    def _read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def _write(self, data: bytes) -> int:
        if self._socket is not None:  # no SIGPIPE, whatever a program makes of that
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        return os.write(self._fd, data)

    def _when_ready(self, event: int, action: Callable[[A], T], argument: A) -> T:
        # Action first: the device never polls writable (xenbus_file_poll in Linux).
        while True:
            try:
                return action(argument)
            except BlockingIOError:
                if not self._wait(event, self._deadline - time.monotonic()):
                    text = (
                        f"xenstore does not answer within {self._timeout:g} s; see whether "
                        "xenstored is stopped or busy, and try again"
                    )
                    raise StoreLost(errno.ETIMEDOUT, text) from None
            except OSError as error:
                text = "the connection to xenstore broke"
                raise StoreLost(error.errno or errno.EIO, text) from error

    def _wait(self, event: int, seconds: float) -> bool:
        poll = select.poll()  # select.select() would end at descriptor 1023
        poll.register(self._fd, event)
        return bool(poll.poll(max(0.0, seconds) * 1000))


def _connect(path: str | None, timeout: float) -> Any:
    """Make a connection of pyxs on a transport of ours."""
    problems: dict[str, OSError] = {}
    for place in [path] if path else _default_places():
        try:
            transport = _Transport(place, timeout)
        except OSError as error:
            problems[place] = error
        else:
            kind = UnixSocketConnection if transport._socket else XenBusConnection
            connection: Any = kind(place)
            connection.transport = transport
            return connection
    raise XenUnavailable(_remedy(path, problems)) from next(iter(problems.values()))


def _default_places() -> Names:
    # pyxs would fall back to /proc for who may not read the device, and so hide the reason.
    device = _DEVICE if os.path.exists(_DEVICE) else XenBusConnection().path
    return [UnixSocketConnection().path, device]


def _remedy(path: str | None, problems: dict[str, OSError]) -> str:
    for place, error in problems.items():
        if isinstance(error, PermissionError):
            return f"may not open {place}: run this as root"
    reasons = "; ".join(f"{place}: {e.strerror or e}" for place, e in problems.items())
    if path:
        return f"cannot connect to xenstore ({reasons}): is xenstored running there?"
    if _runs_on_xen():
        return f"cannot connect to xenstore ({reasons}): start xenstored"
    return f"this machine does not run on Xen ({reasons}): use a Xen dom0"


def _runs_on_xen() -> bool:
    try:
        with open(_HYPERVISOR_TYPE, encoding="ascii") as file:
            return file.read().strip() == "xen"
    except OSError:
        return False
