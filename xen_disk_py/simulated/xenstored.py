"""A xenstored in memory: the real wire protocol on Unix sockets, one socket per domain.

What is said here about the protocol comes from docs/misc/xenstore.txt and
xen/include/public/io/xs_wire.h of Xen; where that leaves a choice (order of messages, who
owns a new node, what a transaction collides with), this does what the C xenstored does.
There are no quotas, and requests that only a toolstack sends (INTRODUCE, RELEASE, ...) are
refused with ENOSYS: tests say what happens to domains with methods.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
import selectors
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Callable

from xen_disk_py.hypervisor import Closing
from xen_disk_py.named import NamedTuple

_HEADER = struct.Struct("=IIII")  # type, req_id, tx_id, len
_PAYLOAD_MAX = 4096
_PATIENCE = 5.0  # seconds for the thread to do what it is told
_PATH = re.compile(r"[A-Za-z0-9/_@-]+")
_PERMISSION = re.compile(r"[nrwb][0-9]+")
_SPECIAL = ("@introduceDomain", "@releaseDomain")


_WATCH, _WATCH_EVENT, _ERROR = 4, 15, 16
_OPERATIONS = {
    1: "directory",
    2: "read",
    3: "get_perms",
    _WATCH: "watch",
    5: "unwatch",
    6: "transaction_start",
    7: "transaction_end",
    10: "get_domain_path",
    11: "write",
    12: "mkdir",
    13: "rm",
    14: "set_perms",
    17: "is_domain_introduced",
    21: "reset_watches",
}
"""Type of a request -> the method of :class:`_Request` that does it."""


class _RefusedError(Exception):
    """The name of an errno, for an ERROR reply."""


class _Node(NamedTuple):
    """A node never changes; a changed one is a new one. That is how conflicts are seen."""

    value: bytes
    permissions: tuple[str, ...]  # the owner with everybody's letter, then others
    children: tuple[str, ...] = ()

    def allows(self, domid: int, letter: str) -> bool:
        owner, *others = self.permissions
        if domid in (0, int(owner[1:])):
            return True
        granted = next((entry[0] for entry in others if int(entry[1:]) == domid), owner[0])
        return granted in ("b", letter)


_Nodes = dict[str, _Node]


class _Transaction:
    """The tree as one transaction sees it. Every request has one, if only its own.

    Only what it touched, reading included, can collide, and only with changes since the
    first touch.
    """

    def __init__(self, nodes: _Nodes) -> None:
        self._nodes = nodes
        self._seen: dict[str, _Node | None] = {}
        self._changed: dict[str, _Node | None] = {}
        self.events: list[tuple[str, bool, tuple[_Node | None, ...]]] = []

    def get(self, path: str) -> _Node | None:
        if path in self._changed:
            return self._changed[path]
        return self._seen.setdefault(path, self._nodes.get(path))

    def put(self, path: str, node: _Node | None) -> None:
        self.get(path)
        self._changed[path] = node

    def find(self, domid: int, path: str, letter: str) -> _Node:
        """Return a node that must exist and be allowed.

        Who may not look at the nearest node above is not told that there is none.
        """
        node = self.get(path)
        above = path
        while node is None:
            above = _parent(above)
            node = self.get(above)
        if not node.allows(domid, letter):
            raise _RefusedError("EACCES")
        if above != path:
            raise _RefusedError("ENOENT")
        return node

    def create(self, domid: int, path: str) -> _Node:
        """Make sure there is a node, with the permissions of the one above if it is new.

        A guest owns what it makes; what dom0 makes belongs to the owner of the node above.
        """
        node = self.get(path)
        if node is None:
            above = _parent(path)
            parent = self.create(domid, above)
            owner, *others = parent.permissions
            if domid:
                owner = f"{owner[0]}{domid}"
            node = _Node(b"", (owner, *others))
            self.put(path, node)
            children = (*parent.children, path.rpartition("/")[2])
            self.put(above, parent._replace(children=children))
        return node

    def delete(self, path: str) -> None:
        """Remove a node and all under it, where only the very watch on each node fires."""
        node = self.get(path)
        assert node is not None
        for name in node.children:
            child = f"{path}/{name}"
            self.events.append((child, True, (self.get(child),)))
            self.delete(child)
        self.put(path, None)

    def remove(self, path: str) -> None:
        """Delete a node and take it from the children of the one above."""
        self.events.append((path, False, (self.get(path),)))
        self.delete(path)
        parent = self.get(_parent(path))
        assert parent is not None
        name = path.rpartition("/")[2]
        children = tuple(child for child in parent.children if child != name)
        self.put(_parent(path), parent._replace(children=children))

    def commit(self) -> None:
        if any(self._nodes.get(path) is not node for path, node in self._seen.items()):
            raise _RefusedError("EAGAIN")
        for path, node in self._changed.items():
            if node is None:
                self._nodes.pop(path, None)
            else:
                self._nodes[path] = node


class _Connection:
    """What one client has: rights, watches and transactions."""

    def __init__(self, sock: socket.socket, domid: int) -> None:
        self.sock = sock
        self.domid = domid
        self.received = b""
        self.unsent = b""
        self.is_stuck = False  # the socket takes no more: we are told when it does
        self.watches: dict[tuple[str, str], str] = {}  # (path as given, token) -> whole path
        self.transactions: dict[int, _Transaction] = {}

    def put(self, operation: int, request: int, transaction: int, payload: bytes) -> None:
        self.unsent += _HEADER.pack(operation, request, transaction, len(payload)) + payload


class _Request:
    """One request, with a method for each operation; it returns the payload of the answer."""

    def __init__(self, server: SimulatedXenstored, connection: _Connection, payload: bytes) -> None:
        self.server = server
        self.connection = connection
        self.domid = connection.domid
        self.payload = payload
        self.transaction = _Transaction(server.nodes)

    def strings(self, count: int = 0) -> list[str]:
        """Split the payload at the NULs that end each string, ``count`` of them if given."""
        *strings, end = self.payload.split(b"\0")
        if end or not strings or (count and count != len(strings)):
            raise _RefusedError("EINVAL")
        return [string.decode("ascii", "surrogateescape") for string in strings]

    def path(self, given: str | None = None) -> str:
        """Check the path in the payload, or the ``given`` one, and make it whole."""
        path = self.strings(1)[0] if given is None else given
        limit = 3072 if path.startswith("/") else 2048
        if not _PATH.fullmatch(path) or "//" in path or len(path) > limit:
            raise _RefusedError("EINVAL")
        if path != "/" and path.endswith("/"):
            raise _RefusedError("EINVAL")
        return path if path.startswith("/") else f"{_domain_path(self.domid)}/{path}"

    def find(self, letter: str, path: str | None = None) -> _Node:
        return self.transaction.find(self.domid, path or self.path(), letter)

    def find_or_create(self, path: str) -> bool:
        """Return whether the node had to be created; either way writing must be allowed."""
        try:
            self.find("w", path)
        except _RefusedError as refusal:
            if str(refusal) != "ENOENT":
                raise
            self.transaction.create(self.domid, path)
            return True
        return False

    def fire(self, path: str, *nodes: _Node | None) -> None:
        self.transaction.events.append((path, False, nodes))

    def directory(self) -> bytes:
        return _joined(self.find("r").children)

    def read(self) -> bytes:
        return self.find("r").value

    def write(self) -> bytes:
        name, nul, value = self.payload.partition(b"\0")
        if not nul:
            raise _RefusedError("EINVAL")
        path = self.path(name.decode("ascii", "surrogateescape"))
        self.find_or_create(path)
        node = self.find("w", path)._replace(value=value)
        self.transaction.put(path, node)
        self.fire(path, node)
        return b"OK\0"

    def mkdir(self) -> bytes:
        path = self.path()
        if self.find_or_create(path):
            self.fire(path, self.transaction.get(path))
        return b"OK\0"

    def rm(self) -> bytes:
        path = self.path()
        if path == "/":
            raise _RefusedError("EINVAL")
        try:
            self.find("w", path)
        except _RefusedError as refusal:
            if str(refusal) != "ENOENT" or self.transaction.get(_parent(path)) is None:
                raise
        else:
            self.transaction.remove(path)
        return b"OK\0"

    def get_perms(self) -> bytes:
        return _joined(self.find("r").permissions)

    def set_perms(self) -> bytes:
        name, *permissions = self.strings()
        if not permissions or not all(map(_PERMISSION.fullmatch, permissions)):
            raise _RefusedError("EINVAL")
        path = self.path(name)
        node = self.find("w", path)
        owner = int(node.permissions[0][1:])
        if self.domid not in (0, owner):
            raise _RefusedError("EACCES")
        if self.domid and int(permissions[0][1:]) != owner:
            raise _RefusedError("EPERM")  # only dom0 may give a node away
        changed = node._replace(permissions=tuple(permissions))
        self.transaction.put(path, changed)
        self.fire(path, node, changed)
        return b"OK\0"

    def watch(self) -> bytes:
        name, token = self.strings(2)
        path = name if name.startswith("@") else self.path(name)
        if path.startswith("@") and path not in _SPECIAL:
            raise _RefusedError("EINVAL")
        if (name, token) in self.connection.watches:
            raise _RefusedError("EEXIST")
        self.connection.watches[name, token] = path
        return b"OK\0"

    def unwatch(self) -> bytes:
        name, token = self.strings(2)
        if self.connection.watches.pop((name, token), None) is None:
            raise _RefusedError("ENOENT")
        return b"OK\0"

    def reset_watches(self) -> bytes:
        self.connection.watches.clear()
        self.connection.transactions.clear()
        return b"OK\0"

    def transaction_start(self) -> bytes:
        if self.transaction in self.connection.transactions.values():
            raise _RefusedError("EBUSY")
        number = next(self.server.transaction_numbers)
        self.connection.transactions[number] = _Transaction(self.server.nodes)
        return b"%d\0" % number

    def transaction_end(self) -> bytes:
        numbers = [n for n, t in self.connection.transactions.items() if t is self.transaction]
        if self.payload not in (b"T\0", b"F\0"):
            raise _RefusedError("EINVAL")
        if not numbers:
            raise _RefusedError("ENOENT")
        del self.connection.transactions[numbers[0]]
        if self.payload == b"T\0":
            self.server.commit(self.transaction)
        return b"OK\0"

    def get_domain_path(self) -> bytes:
        return _joined([_domain_path(self.named_domid())])

    def is_domain_introduced(self) -> bytes:
        return b"T\0" if self.named_domid() in self.server.domains else b"F\0"

    def named_domid(self) -> int:
        (text,) = self.strings(1)
        if not text.isdecimal():
            raise _RefusedError("EINVAL")
        return int(text)


class SimulatedXenstored(Closing):
    """A running server; ``with`` ends it, and what it has is gone then.

    One thread owns all state; the methods, which any thread may call, hand it their work.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="xenstored-"))
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._work: collections.deque[tuple[Callable[[], None], Future[None]]]
        self._work = collections.deque()
        self._listeners: dict[int, socket.socket] = {}
        self._connections: dict[socket.socket, _Connection] = {}
        self._paused = False
        self._stopping = False
        self.transaction_numbers = itertools.count(1)
        self.nodes: _Nodes = {}
        self.domains: dict[int, str] = {}  # domid -> uuid
        self._start_afresh()
        self._thread = threading.Thread(target=self._run, name="xenstored", daemon=True)
        self._thread.start()

    # -- for tests and demos -----------------------------------------------------------

    def socket_path(self, domid: int = 0) -> str:
        """Return where to connect with the rights of a domain, there being one or not."""
        self._do(lambda: self._listen(domid))
        return str(self._directory / f"domain-{domid}")

    def add_domain(self, domid: int, name: str, uuid: str) -> None:
        """Write what a toolstack writes for a new domain; fires ``@introduceDomain``."""
        self._do(lambda: self._introduce(domid, name, uuid))

    def remove_domain(self, domid: int) -> None:
        """Take a domain away, connections and nodes; fires ``@releaseDomain``."""
        self._do(lambda: self._release(domid))

    def pause(self) -> None:
        """Answer nobody until :meth:`resume`; what is asked meanwhile waits."""
        self._do(lambda: setattr(self, "_paused", True))

    def resume(self) -> None:
        """Answer again."""
        self._do(lambda: setattr(self, "_paused", False))

    def restart(self, *, keep: bool) -> None:
        """Drop all connections, and with ``keep=False`` all nodes and domains, too."""
        self._do(lambda: self._restart(keep))

    def close(self) -> None:
        """End the thread, the connections and the sockets."""
        if self._stopping:
            return
        self._stopping = True
        with contextlib.suppress(BrokenPipeError):  # the thread died of an error
            self._rope.send(b"!")
        self._thread.join(_PATIENCE)
        self._rope.close()
        if self._thread.is_alive():
            raise TimeoutError("the simulated xenstored does not end")

    def _do(self, work: Callable[[], None]) -> None:
        if self._stopping:
            raise ValueError("the simulated xenstored is closed")
        done: Future[None] = Future()
        self._work.append((work, done))
        self._rope.send(b"!")
        done.result(_PATIENCE)

    # -- the tree and the domains, on the thread ---------------------------------------

    def _start_afresh(self) -> None:
        self.nodes.clear()
        self.domains.clear()
        self.nodes["/"] = _Node(b"", ("n0",))
        self._introduce(0, "Domain-0", "00000000-0000-0000-0000-000000000000")

    def _introduce(self, domid: int, name: str, uuid: str) -> None:
        """Make the nodes of a domain: readable for it, and ``data`` its own (as libxl)."""
        home, vm = _domain_path(domid), f"/vm/{uuid}"
        values = {f"{vm}/uuid": uuid, f"{vm}/name": name}
        values.update({f"{home}/name": name, f"{home}/domid": str(domid), f"{home}/vm": vm})
        transaction = _Transaction(self.nodes)
        for path in (vm, home, f"{home}/device", f"{home}/data"):
            own = (f"n{domid}",) if path.endswith("/data") else ("n0", f"r{domid}")
            transaction.put(path, transaction.create(0, path)._replace(permissions=own))
        for path, value in values.items():
            node = transaction.create(0, path)._replace(value=value.encode("ascii"))
            transaction.put(path, node)
            transaction.events.append((path, False, (node,)))
        self.commit(transaction)
        self.domains[domid] = uuid
        self._fire("@introduceDomain", exactly=True)

    def _release(self, domid: int) -> None:
        uuid = self.domains.pop(domid)
        self._deafen(domid)
        for connection in list(self._connections.values()):
            if connection.domid == domid:
                self._drop(connection)
        self._fire("@releaseDomain", exactly=True)
        transaction = _Transaction(self.nodes)
        for path in (_domain_path(domid), f"/vm/{uuid}"):
            if transaction.get(path):
                transaction.remove(path)
        self.commit(transaction)

    def _restart(self, keep: bool) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        if not keep:
            self._start_afresh()

    def commit(self, transaction: _Transaction) -> None:
        """Make a transaction's changes everybody's, and tell who watches."""
        transaction.commit()
        for path, exactly, nodes in transaction.events:
            self._fire(path, exactly, nodes)

    def _fire(self, path: str, exactly: bool, nodes: tuple[_Node | None, ...] = ()) -> None:
        """Send an event to the watches on ``path`` or, unless ``exactly``, above it.

        ``nodes`` is what was or is there: who may read none of them, nor the one above,
        hears nothing.
        """
        nodes = (*nodes, None if path.startswith("@") else self.nodes.get(_parent(path)))
        for connection in self._connections.values():
            domid = connection.domid
            if domid and not any(node and node.allows(domid, "r") for node in nodes):
                continue
            for (given, token), watched in connection.watches.items():
                under = not exactly and path.startswith(watched.rstrip("/") + "/")
                if path == watched or under:
                    relative = not given.startswith(("/", "@"))
                    shown = path[len(_domain_path(domid)) + 1 :] if relative else path
                    connection.put(_WATCH_EVENT, 0, 0, _joined([shown, token]))

    # -- the connections, on the thread ------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                if self._paused:
                    self._bell.recv(4096)
                else:
                    self._serve()
                while self._work:
                    work, done = self._work.popleft()
                    try:
                        done.set_result(work())
                    except Exception as error:  # noqa: BLE001 - it is the caller's
                        done.set_exception(error)
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            for listener in self._listeners.values():
                listener.close()
            self._selector.close()
            self._bell.close()
            shutil.rmtree(self._directory)

    def _serve(self) -> None:
        for connection in list(self._connections.values()):
            self._flush(connection)
        for key, _ in self._selector.select():
            if key.fileobj is self._bell:
                self._bell.recv(4096)
            elif key.data in self._listeners:
                self._accept(key.data)
            elif key.fileobj in self._connections:  # or it was dropped meanwhile
                self._receive(self._connections[key.fileobj])

    def _listen(self, domid: int) -> None:
        if domid not in self._listeners:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listeners[domid] = listener
            listener.setblocking(False)
            listener.bind(str(self._directory / f"domain-{domid}"))
            listener.listen()
            self._selector.register(listener, selectors.EVENT_READ, domid)

    def _deafen(self, domid: int) -> None:
        """Take a domain's socket away, and with it whoever was not yet accepted."""
        listener = self._listeners.pop(domid, None)
        if listener is not None:
            self._selector.unregister(listener)
            listener.close()
            (self._directory / f"domain-{domid}").unlink()

    def _accept(self, domid: int) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listeners[domid].accept()
            sock.setblocking(False)
            self._connections[sock] = _Connection(sock, domid)
            self._selector.register(sock, selectors.EVENT_READ)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.sock]
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _flush(self, connection: _Connection) -> None:
        if not connection.unsent:
            return
        try:
            sent = connection.sock.send(connection.unsent) if connection.unsent else 0
            connection.unsent = connection.unsent[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
            return
        if bool(connection.unsent) != connection.is_stuck:
            connection.is_stuck = not connection.is_stuck
            writing = selectors.EVENT_WRITE if connection.is_stuck else 0
            self._selector.modify(connection.sock, selectors.EVENT_READ | writing)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return  # only writable
        except OSError:
            data = b""
        connection.received += data
        while len(connection.received) >= _HEADER.size:
            operation, request, number, size = _HEADER.unpack_from(connection.received)
            end = _HEADER.size + size
            if size > _PAYLOAD_MAX:
                data = b""  # drop the connection, as the specification wants it
            if size > _PAYLOAD_MAX or len(connection.received) < end:
                break
            payload = connection.received[_HEADER.size : end]
            connection.received = connection.received[end:]
            self._answer(connection, operation, request, number, payload)
        if not data:
            self._drop(connection)

    def _answer(
        self, connection: _Connection, operation: int, request: int, number: int, payload: bytes
    ) -> None:
        try:
            reply = self._perform(_Request(self, connection, payload), operation, number)
        except _RefusedError as refusal:
            connection.put(_ERROR, request, number, _joined([str(refusal)]))
            return
        connection.put(operation, request, number, reply)
        if operation == _WATCH:  # fires once, after the answer
            connection.put(_WATCH_EVENT, 0, 0, payload)

    def _perform(self, request: _Request, operation: int, number: int) -> bytes:
        if operation not in _OPERATIONS:
            raise _RefusedError("ENOSYS")
        transactions = request.connection.transactions
        if number and number not in transactions:
            raise _RefusedError("ENOENT")
        request.transaction = transactions.get(number, request.transaction)
        reply: bytes = getattr(request, _OPERATIONS[operation])()
        if len(reply) > _PAYLOAD_MAX:
            raise _RefusedError("E2BIG")
        if not number:
            self.commit(request.transaction)
        return reply


def _joined(strings: Iterable[str]) -> bytes:
    return "".join(f"{text}\0" for text in strings).encode("ascii", "surrogateescape")


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _domain_path(domid: int) -> str:
    return f"/local/domain/{domid}"
