"""The requests of one disk over several connections, and what to do when a server goes away.

A server that ends takes along what it has not flushed. So the client keeps a copy of what was
written since the last flush, and writes it again to the next server before anything else goes
there: a server that was restarted then has all that was answered, and the next flush is true. A
flush that fails is the end of a server as well: whoever asks again must not be told of data that
it has dropped.
"""

from __future__ import annotations

import errno
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Callable

from ...errors import BackendError
from ...host.timer import Timer
from .. import StorageError
from ..asynchronous import DISCARD, FLUSH, WRITE, Asynchronous, Request
from ..copies import Copies, Data
from .libnbd import Connection

log = logging.getLogger("xen_disk_py")

UNFLUSHED = 64 << 20
"""Bytes of writes that are kept. At a quarter of it the client flushes by itself; beyond it, a
write waits until that is done."""

_PAUSES = 0.1, 5.0  # seconds between two tries to connect: at first, and at most
_DISCARD = 1 << 30  # bytes in one request, whose length has 32 bits
_REPLIES = 16  # to take from a connection before they are told of
_PATIENCE = 1.0  # seconds that closing waits for a try to connect
_LARGE = 256 << 10  # bytes that are copied faster by one call than piece by piece
_LOOKS = 8  # at the time, while a request has all that it is given
_in_flight = attrgetter("in_flight")


class Client(Asynchronous):
    """Many requests at once, from one thread, without a thread for each.

    Args:
        connect: makes a connection; called again, from a thread, when a server has gone away.
        connections: how many to have, if the server says that several are one disk.
        timeout: seconds that a request may take before the server is given up; 0: any time.

    Raises:
        BackendError: the server cannot be had.
    """

    def __init__(
        self, connect: Callable[[], Connection], connections: int, timeout: float = 0
    ) -> None:
        first = connect()  # before anything is opened that this would have to close
        super().__init__()
        self._timeout = timeout
        self._timer: Timer | None = None
        self._is_timed = False  # it runs
        self._looks: dict[int, deque[tuple[float, int]]] = {}  # by socket: when, and the newest
        self._connect = connect
        self.export = first.export
        self._count = connections if self.export.can_multi_conn else 1
        self._is_logged = self.export.can_flush and not self.export.read_only
        self._unflushed = Copies()
        self._is_flushing = False  # by ourselves
        self._waiting: list[Request] = []  # writes, for the end of that
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}  # by socket
        self._first = first  # of them
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._returned: list[Connection] | None = None  # by the thread that connects again
        self._closing = threading.Event()
        self._wanted = threading.Event()  # connections, by us
        self._is_connecting = False
        self._thread: threading.Thread | None = None
        try:
            if timeout:
                self._timer = Timer()
                self._epoll.register(self._timer.fileno(), select.EPOLLIN)
            self._adopt([first, *(connect() for _ in range(self._count - 1))])
        except BaseException:
            first.close()
            self.close()
            raise

    def fileno(self) -> int:
        """Return a descriptor that polls readable when there is something to collect or do."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Disconnect. What is under way is given up."""
        self._closing.set()
        self._wanted.set()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_PATIENCE)  # it may wait for a server that does not answer
        with self._lock:
            for connection in [*self._connections.values(), *(self._returned or ())]:
                connection.close()
            self._connections.clear()
            self._returned = None
            if self._timer is not None:
                self._timer.close()
            self._epoll.close()
            super().close()

    # -- all below: with the lock --------------------------------------------------------

    def _adopt(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            fd = connection.fileno()
            self._connections[fd] = connection
            connection.watched = connection.events
            self._epoll.register(fd, connection.watched)
        self._first = connections[0]

    def _copied(self, buffers: Sequence[memoryview], length: int) -> Data:
        if length >= _LARGE:  # the C library gives such memory again, without page faults
            return super()._copied(buffers, length)
        memory = self._spare.take(length)
        view = memoryview(memory)  # a slice of the bytearray itself would be assigned a copy
        if len(buffers) == 1:
            view[:] = buffers[0]
        else:
            at = 0
            for buffer in buffers:
                view[at : at + len(buffer)] = buffer
                at += len(buffer)
        return memory

    def _place(self, buffers: Sequence[memoryview], length: int) -> Any:
        """Where the transfers are our own, a read's data goes straight to where it is to be."""
        if self._first.takes_buffers and length <= self.export.maximum:
            return list(buffers)
        return super()._place(buffers, length)

    def _begin(self, request: Request) -> None:
        if request.operation == FLUSH:
            if not self.export.can_flush:  # to such a server all that was answered is stable
                super()._end(request, None)
                return
            request.covers = self._unflushed.end
        elif request.operation == WRITE and self._is_flushing and self._is_full(request):
            self._waiting.append(request)
            return
        self._issue(request)
        if self._unflushed.size > UNFLUSHED // 4 and not self._is_flushing:
            self._is_flushing = True
            flush = Request(FLUSH, (), 0, 0, self)
            flush.covers = self._unflushed.end
            self._issue(flush)

    def _is_full(self, request: Request) -> bool:
        """Whether the copies of what is not flushed would become too many with this write's."""
        return self._unflushed.size + request.length > UNFLUSHED

    def _begin_waiting(self) -> None:
        """Begin the writes that waited for a flush of our own, which is over."""
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._begin(request)

    def _issue(self, request: Request) -> None:
        """Give a request, in parts that are not too large, to the connection with least to do."""
        connections = self._connections
        if not connections:
            self._connect_again()
            self._end(request, StorageError(errno.ENOTCONN, "the NBD server is away"))
            return
        connection = self._first
        if len(connections) > 1:
            connection = min(connections.values(), key=_in_flight)
        operation, memory, length = request.operation, request.memory, request.length
        most = _DISCARD if operation == DISCARD else self.export.maximum
        if length <= most:
            request.parts = 1
            error = connection.issue(operation, memory, request.offset, length, request)
            if error is not None:
                self._part_done(request, error)
        else:
            places = range(0, length, most)
            request.parts = len(places)
            for at in places:
                size = min(most, length - at)
                part = memory and memoryview(memory)[at : at + size]
                error = connection.issue(operation, part, request.offset + at, size, request)
                if error is not None:
                    self._part_done(request, error)
        if connection.events != connection.watched:
            self._watch(connection)
        if self._timer is not None and not self._is_timed:
            self._is_timed = True
            self._timer.start(self._timeout / _LOOKS)

    def _watch(self, connection: Connection) -> None:
        """Poll the connection for what it waits for; one that is lost waits for nothing."""
        fd, events = connection.fileno(), connection.events
        if fd not in self._connections:
            return  # lost since
        if not events and not connection.is_alive:
            for request, error in connection.completed():
                self._part_done(request, error)
            self._lose(connection.lost or "it closed the connection")
        elif events != connection.watched:
            connection.watched = events
            self._epoll.modify(fd, events)

    def _progress(self) -> None:
        is_timed = False
        for _ in range(_REPLIES):
            ready = self._epoll.poll(0)
            if not ready:
                break
            for fd, events in ready:
                connection = self._connections.get(fd)
                if connection is None:  # or it was lost since
                    if fd == self._wake_read:
                        self._woken()
                    elif self._timer is not None and fd == self._timer.fileno():
                        is_timed = self._timer.acknowledge()
                    continue
                # libnbd takes one reply; told to read where there is none, it would send no
                # request until there is.
                connection.progress(events)
                for request, error in connection.completed():
                    self._part_done(request, error)
                if connection.events != connection.watched:
                    self._watch(connection)
        if is_timed:  # when what has been answered is known
            self._look_at_time(time.monotonic())

    def _look_at_time(self, now: float) -> None:
        """Give the server up if a request has been under way for too long.

        To look now and then costs the requests nothing. What was issued before a look is known by
        its number, so a request has up to one look's interval more than the time it is given.
        """
        before, self._looks = self._looks, {}
        for fd, connection in self._connections.items():
            if not connection.in_flight:
                continue
            looks = before.get(fd) or deque()
            looks.append((now, connection.newest))
            while len(looks) > 1 and looks[1][0] <= now - self._timeout:
                looks.popleft()
            then, newest = looks[0]
            if then <= now - self._timeout and connection.oldest <= newest:
                connection.end_server()
                self._lose(f"it has not answered a request for {self._timeout:g} s")
                break
            self._looks[fd] = looks
        self._is_timed = bool(self._looks)
        if self._timer is not None and self._is_timed:
            self._timer.start(self._timeout / _LOOKS)

    def _part_done(self, request: Request, error: OSError | None) -> None:
        request.parts -= 1
        if error is not None and request.error is None:
            request.error = error
        if not request.parts:
            self._end(request, request.error)

    def _end(self, request: Request, error: OSError | None) -> None:
        if request.operation == FLUSH:
            if error is None:
                self._spare.give(self._unflushed.flushed(request.covers))
            elif self._connections:
                self._lose(f"it could not flush: {error.strerror}")
            if request.token is self:
                self._is_flushing = False
                self._begin_waiting()
                return
        elif error is None and request.operation == WRITE and self._is_logged:
            self._unflushed.add(request.offset, request.memory)
        super()._end(request, error)

    def _woken(self) -> None:
        self._told()
        returned, self._returned = self._returned, None
        if returned is not None:
            self._adopt(returned)
            self._is_connecting = False
            log.info("connected to the NBD server again")

    def _lose(self, why: str) -> None:
        """Give the server up, on all connections: they are one server with one cache."""
        connections, self._connections = self._connections, {}
        if not connections:
            return  # that is known
        self._looks.clear()
        log.warning("the NBD server is away: %s; trying to connect again", why)
        lost = StorageError(errno.ENOTCONN, "the NBD server went away")
        for connection in connections.values():
            for request in connection.abandon():
                self._part_done(request, lost)
        self._is_flushing = False
        self._begin_waiting()
        self._connect_again()

    def _connect_again(self) -> None:
        """Have a thread connect, if it does not; where none is to be had, the next request asks."""
        if self._is_connecting or self._closing.is_set():
            return
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="nbd", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("no thread to connect to the NBD server: %s", error)
                return
            self._thread = thread
        self._is_connecting = True
        self._wanted.set()

    # -- the thread that connects again --------------------------------------------------

    def _run(self) -> None:
        """Connect whenever that is wanted.

        It stays until the disk is closed: libnbd has the kernel end a server of our own with the
        thread that started it (PR_SET_PDEATHSIG).
        """
        while not self._closing.is_set():
            self._wanted.wait()
            self._wanted.clear()
            self._reconnect()

    def _reconnect(self) -> None:
        pause, said = _PAUSES[0], ""
        while not self._closing.wait(pause):
            pause = min(2 * pause, _PAUSES[1])
            connections: list[Connection] = []
            try:
                connections.append(self._connect())
                self._replay(connections[0])
                connections += [self._connect() for _ in range(self._count - 1)]
            except (BackendError, OSError) as error:
                for connection in connections:
                    connection.close()
                if str(error) != said:
                    said = str(error)
                    log.warning("no NBD server yet: %s", said)
                continue
            with self._lock:
                if not self._closing.is_set():
                    self._returned = connections
                    self._tell()
                    return
            for connection in connections:
                connection.close()

    def _replay(self, connection: Connection) -> None:
        """Write again what may have gone with the other server, and flush.

        Nothing else is under way meanwhile, and nothing is added to what is unflushed.
        """
        before, now = self.export, connection.export
        if (now.size, now.read_only) != (before.size, before.read_only):
            raise BackendError(
                f"the server that answers now has another disk: {now.size} bytes, "
                f"{'read-only' if now.read_only else 'writable'}"
            )
        writes = list(self._unflushed.newest())
        for offset, data in writes:
            for at in range(0, len(data), now.maximum):
                connection.do(WRITE, data[at : at + now.maximum], offset + at, self._timeout)
        if writes:
            connection.do(FLUSH, b"", 0, self._timeout)
            self._unflushed.flushed(self._unflushed.end)
