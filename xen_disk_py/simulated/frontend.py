"""A block frontend in software: what blkfront is to a guest, for demos and tests.

It connects through xenstore like Linux's blkfront (waits for InitWait, shares its ring,
publishes its keys, waits for Connected) and then does requests, several at a time, with
pages of its own that it grants once and uses again.
"""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Sequence
from typing import Callable

from ..blkif import (
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    FLUSH_FAILED,
    MAX_SEGMENTS,
    OKAY,
    READ,
    SECTOR,
    SECTORS_PER_PAGE,
    SEGMENTS_PER_PAGE,
    WRITE,
    X86_64,
    Abi,
    Connection,
    Discard,
    Features,
    Indirect,
    Ring,
    Transfer,
    decode_response,
    encode_segments,
)
from ..errors import DeviceError, StoreError
from ..hypervisor import PAGE_SIZE, Closing, EventChannel, GuestHypervisor, SharedPages
from ..ring import FrontRing
from ..xenbus.states import State
from ..xenbus.xenstore import Store

_STATUSES = {
    ERROR: "I/O error: BLKIF_RSP_ERROR",
    EOPNOTSUPP: "BLKIF_RSP_EOPNOTSUPP",
    FLUSH_FAILED: "I/O error: a flush failed",
}


class RequestFailed(OSError):
    """The backend answered a request with an error status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{_STATUSES.get(status, 'status')} ({status})")
        self.status = status


class Frontend(Closing):
    """The frontend of one device.

    Args:
        store: xenstore, as the guest sees it.
        guest: shares pages, opens ports.
        directory: the device's directory, ``/local/domain/N/device/vbd/D``.
        abi: the layout to write.
        persistent: promise to use the same grants again and again.
        ring_page_order: log2 of the pages of each ring.
        queues: rings at most, each with an event channel; no more than the backend offers.
        max_segments: pages per request; over 11 needs indirect requests.
        depth: requests in flight at most.
        timeout: seconds to wait for the backend, each time.
    """

    def __init__(
        self,
        store: Store,
        guest: GuestHypervisor,
        directory: str,
        *,
        abi: Abi = X86_64,
        persistent: bool = True,
        ring_page_order: int = 0,
        queues: int = 1,
        max_segments: int = 32,
        depth: int = 32,
        timeout: float = 10,
    ) -> None:
        self.features = Features(0)
        self._store = store
        self._guest = guest
        self._directory = directory
        self._abi = abi
        self._persistent = persistent
        self._order = ring_page_order
        self._wanted_queues = queues
        self._wanted_segments = max_segments
        self._wanted_depth = depth
        self._timeout = timeout
        self._backend = store.read(f"{directory}/backend") or ""
        self._backend_domid = int(store.read(f"{directory}/backend-id") or 0)
        self._shared: list[SharedPages] = []
        self._rings: list[FrontRing] = []
        self._channels: list[EventChannel] = []
        self._turn = 0  # which ring gets the next request
        self._ids = itertools.count()
        self._free: list[_Buffer] = []
        self._size = 0
        self._pending: dict[int, tuple[_Buffer, Callable[[memoryview], object]]] = {}

    def connect(self) -> Features:
        """Bring the device to Connected; the result is what the backend offers.

        Raises:
            DeviceError: the backend does not get that far in time.
        """
        store, front = self._store, self._directory
        store.watch(f"{self._backend}/state")
        self._await(State.INIT_WAIT)
        domid = self._backend_domid
        offered = int(store.read(f"{self._backend}/multi-queue-max-queues") or 1)
        rings = []
        for _ in range(min(self._wanted_queues, offered)):
            pages = self._guest.share_pages(domid, 1 << self._order, writable=True)
            self._shared.append(pages)
            self._rings.append(FrontRing(pages.view, self._abi.slot_size, self._guest.fence))
            self._channels.append(self._guest.bind_unbound(domid))
            rings.append(Ring(tuple(pages.refs), self._channels[-1].port))
        keys = self._keys(Connection(tuple(rings), self._abi.name, self._persistent))

        def publish(transaction: Store) -> None:
            for name, value in keys.items():
                transaction.write(f"{front}/{name}", value)

        store.transact(publish)
        self._switch(State.INITIALISED)
        self._await(State.CONNECTED)
        names = store.list(self._backend)
        values = {name: store.read(f"{self._backend}/{name}") for name in names}
        self.features = Features.from_keys({k: v for k, v in values.items() if v is not None})
        self._make_buffer()  # of the others each when it is needed: most guests are small
        self._switch(State.CONNECTED)
        return self.features

    def _keys(self, connection: Connection) -> dict[str, str]:
        """Return what to publish; another kind of driver may spell it in another way."""
        return connection.to_keys()

    def _make_buffer(self) -> bool:
        """Have one buffer more, unless there are as many as requests may be in flight."""
        depth = min(self._wanted_depth, sum(ring.slots for ring in self._rings))
        if len(self._free) + len(self._pending) >= depth:
            return False
        limit = max(MAX_SEGMENTS, self.features.max_indirect_segments)
        segments = min(self._wanted_segments, limit)
        indirect = -(-segments // SEGMENTS_PER_PAGE) if segments > MAX_SEGMENTS else 0
        pages = self._guest.share_pages(self._backend_domid, segments + indirect, writable=True)
        self._shared.append(pages)
        self._free.append(_Buffer(pages, segments))
        self._size = self._free[-1].size
        return True

    @property
    def in_flight(self) -> int:
        """How many requests wait for their answers."""
        return len(self._pending)

    @property
    def max_bytes(self) -> int:
        """The longest single read or write."""
        return self._size

    def submit(
        self,
        operation: int,
        offset: int,
        data: bytes | None = None,
        length: int = 0,
        done: Callable[[memoryview], object] = lambda data: None,
    ) -> None:
        """Put a READ or WRITE on a ring, waiting for room if need be; :meth:`drain` ends it.

        Args:
            operation: READ or WRITE.
            offset: bytes into the disk, a multiple of 512.
            data: what to write.
            length: bytes to read, a multiple of 512.
            done: called with the data when the response has come.
        """
        ring = self._next_ring()
        buffer = self._free.pop()
        if data is not None:
            length = len(data)
            buffer.view[:length] = data
        self._put(ring, operation, offset, length, buffer, done)

    def _next_ring(self) -> FrontRing:
        """Return the ring whose turn it is, as soon as there are a buffer and room in it."""
        rings = self._require_rings()
        ring = rings[self._turn % len(rings)]
        self._turn += 1
        while not ring.free or not (self._free or self._make_buffer()):
            self.kick()
            self.reap(wait=True)
        return ring

    def _put(
        self,
        ring: FrontRing,
        operation: int,
        offset: int,
        length: int,
        buffer: _Buffer,
        done: Callable[[memoryview], object],
    ) -> None:
        id_ = next(self._ids)
        sectors = length // SECTOR
        count = -(-sectors // SECTORS_PER_PAGE)
        refs = buffer.refs[:count]
        lasts = [7] * count
        if sectors % SECTORS_PER_PAGE:
            lasts[-1] = sectors % SECTORS_PER_PAGE - 1
        sector = offset // SECTOR
        if count <= MAX_SEGMENTS:
            slot = self._abi.encode(
                Transfer(id_, operation, sector, sectors, refs, (0,) * count, tuple(lasts))
            )
        else:
            segments = encode_segments([(ref, 0, last) for ref, last in zip(refs, lasts)])
            buffer.indirect_view[: len(segments)] = segments
            slot = self._abi.encode(Indirect(id_, operation, sector, count, buffer.indirect_refs))
        self._pending[id_] = (buffer, lambda view: done(view[:length]))
        ring.put(slot)

    def kick(self) -> None:
        """Publish what was put and notify the backend if it wants that."""
        for ring, channel in zip(self._require_rings(), self._channels):
            if ring.push():
                channel.notify()

    def reap(self, *, wait: bool = False) -> int:
        """Take the responses that are there; with ``wait``, sleep until there is one.

        Raises:
            RequestFailed: a status other than OKAY.
            DeviceError: no response in time.
        """
        rings, channels = self._require_rings(), self._channels
        deadline = time.monotonic() + self._timeout
        while True:
            slots = [slot for ring in rings for slot in ring.take()]
            failed = OKAY
            for slot in slots:
                response = decode_response(slot)
                buffer, done = self._pending.pop(response.id)
                if response.status == OKAY:
                    done(buffer.view)
                else:
                    failed = response.status
                self._free.append(buffer)
            if failed != OKAY:
                raise RequestFailed(failed)
            if slots or not wait:
                return len(slots)
            if any(ring.arm() for ring in rings):
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeviceError(f"no response within {self._timeout:g} s")
            _wait_for([channel.fileno() for channel in channels], left)
            for channel in channels:
                channel.acknowledge()

    def drain(self) -> None:
        """Wait until every request is answered."""
        self.kick()
        while self._pending:
            self.reap(wait=True)

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes, in as many requests as it takes."""
        result = bytearray(length)

        def keep(at: int) -> Callable[[memoryview], object]:
            def done(data: memoryview) -> None:
                result[at : at + len(data)] = data

            return done

        step = self.max_bytes
        for at in range(0, length, step):
            self.submit(READ, offset + at, length=min(step, length - at), done=keep(at))
        self.drain()
        return bytes(result)

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data``, in as many requests as it takes."""
        step = self.max_bytes
        for at in range(0, len(data), step):
            self.submit(WRITE, offset + at, data[at : at + step])
        self.drain()

    def flush(self) -> None:
        """Have all finished writes put on stable storage."""
        self._simple(lambda id_: self._abi.encode(Transfer(id_, FLUSH, 0, 0, (), (), ())))

    def discard(self, offset: int, length: int) -> None:
        """Tell the backend that these bytes are not needed any longer."""
        self._simple(
            lambda id_: self._abi.encode(
                Discard(id_, DISCARD, offset // SECTOR, length // SECTOR, secure=False)
            )
        )

    def _simple(self, encode: Callable[[int], bytes]) -> None:
        ring = self._next_ring()
        id_ = next(self._ids)
        self._pending[id_] = (self._free.pop(), lambda view: None)
        ring.put(encode(id_))
        self.drain()

    def disconnect(self) -> None:
        """Close in order: Closing, wait for the backend, Closed, give the pages back."""
        self._switch(State.CLOSING)
        self._await(State.CLOSING, State.CLOSED)
        self._switch(State.CLOSED)
        self._await(State.CLOSED)
        self.close()

    @property
    def backend_state(self) -> State | None:
        """The backend's state now; None once its directory is gone."""
        try:
            return State.parse(self._store.read(f"{self._backend}/state"))
        except StoreError:
            return None  # the guest may not look at what is no longer shared with it

    def look_again(self) -> Features:
        """Take notice of a new size, as Linux does when Connected is written once more."""
        if self._store.pending() and self.backend_state is State.CONNECTED:
            sectors = int(self._store.read(f"{self._backend}/sectors") or 0)
            self.features = self.features._replace(sectors=sectors)
        return self.features

    def close(self) -> None:
        """Give everything back, whatever the backend thinks of it."""
        while self._rings:
            self._rings.pop().close()
        for buffer in self._free:
            buffer.release()
        for buffer, _ in self._pending.values():
            buffer.release()
        self._free.clear()
        self._pending.clear()
        self._size = 0
        while self._channels:
            self._channels.pop().close()
        while self._shared:
            self._shared.pop().close()

    def _require_rings(self) -> list[FrontRing]:
        if not self._rings:
            raise DeviceError("the frontend is not connected")
        return self._rings

    def _switch(self, state: State) -> None:
        path = f"{self._directory}/state"

        def write(transaction: Store) -> None:
            if transaction.exists(path):
                transaction.write(path, str(int(state)))

        self._store.transact(write)

    def _await(self, *states: State) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            self._store.pending()
            state = self.backend_state
            if state in states or (state is None and State.CLOSED in states):
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeviceError(
                    f"the backend is {state or 'gone'} after {self._timeout:g} s, "
                    f"not {' or '.join(map(str, states))}"
                )
            if not self._store.has_pending:
                _wait_for([self._store.fileno()], left)


class _Buffer:
    """Pages for one request's data, and the indirect page that lists them."""

    def __init__(self, pages: SharedPages, segments: int) -> None:
        self.size = segments * PAGE_SIZE
        self.view = pages.view[: self.size]
        self.refs = tuple(pages.refs[:segments])
        self.indirect_view = pages.view[self.size :]
        self.indirect_refs = tuple(pages.refs[segments:])

    def release(self) -> None:
        self.view.release()
        self.indirect_view.release()


def _wait_for(descriptors: Sequence[int], timeout: float) -> None:
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    poller.poll(timeout * 1000)
