"""One block device as its backend: from InitWait to Closed, as often as the guest likes.

The device reads both halves' states from xenstore, asks :func:`~xen_disk_py.xenbus.react`
what follows, and does it. It is driven from outside: whoever owns it waits for xenstore to
have something to say and calls :meth:`Device.update`. Requests are served by the queue's own
thread meanwhile and never wait for xenstore.
"""

from __future__ import annotations

import logging
import platform
from typing import Callable

from .blkif import Connection, abi_named
from .disk import Disk
from .errors import GuestMisbehaved, HypervisorError
from .grants import PERSISTENT_LIMIT
from .hypervisor import Hypervisor
from .queue import Queue
from .xenbus import Action, Address, State, react
from .xenstore import Store

log = logging.getLogger("xen_disk_py")

MAX_RING_PAGE_ORDER = 4
"""Rings of up to 16 pages are offered."""


class Device:
    """The backend half of one device.

    Args:
        store: xenstore.
        hypervisor: what maps grants and binds event channels.
        address: which device; its directories exist once :meth:`keys` have been written there.
        disk: what serves the requests; not closed here.
        max_indirect_segments: how many to offer; 0 for none.
        on_failure: called, from another thread, when serving stops for an error of our own.
    """

    def __init__(
        self,
        store: Store,
        hypervisor: Hypervisor,
        address: Address,
        disk: Disk,
        *,
        max_indirect_segments: int = 256,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.address = address
        self.state = State.INIT_WAIT
        self.frontend_state: State | None = State.INITIALISING
        self.finished = False
        self.guest_gone = False
        self._store = store
        self._hypervisor = hypervisor
        self._disk = disk
        self._max_indirect_segments = max_indirect_segments
        self._on_failure = on_failure
        self._queue: Queue | None = None
        self._adrift = False

    def __repr__(self) -> str:
        return (
            f"<Device {self.address.devid} of domain {self.address.frontend_domid}: {self.state}>"
        )

    @property
    def connected(self) -> bool:
        """Both halves are connected: the guest has its disk."""
        return self.state is State.CONNECTED and self.frontend_state is State.CONNECTED

    def keys(self) -> dict[str, str]:
        """What the backend itself publishes in its directory, its first state included."""
        features = self._disk.features(self._max_indirect_segments, MAX_RING_PAGE_ORDER)
        return {**features.to_keys(), "state": str(int(State.INIT_WAIT))}

    def watch(self) -> None:
        """Have xenstore tell of all that :meth:`update` looks at, and nothing more (XSA-349)."""
        self._store.watch(f"{self.address.frontend}/state")
        self._store.watch(f"{self.address.backend}/state")
        self._store.watch("@releaseDomain")

    def update(self) -> None:
        """Look at xenstore and do what follows, until nothing does."""
        while not (self.finished or self._adrift):
            asked = State.parse(self._store.read(f"{self.address.backend}/state"))
            if asked is State.CLOSING and self.state in (State.INIT_WAIT, State.CONNECTED):
                self.state = State.CLOSING  # the toolstack detaches
            online = self._store.read(f"{self.address.backend}/online") == "1"
            self.frontend_state = State.parse(self._store.read(f"{self.address.frontend}/state"))
            if self.frontend_state is None or self._guest_is_gone():
                self.guest_gone = self._guest_is_gone()
                self._do(Action.FINISH)
            elif asked is None:
                self._do(Action.FINISH)
            else:
                action = react(self.state, self.frontend_state, online)
                if action is Action.STAY:
                    return
                self._do(action)

    def unplug(self) -> None:
        """Ask the guest to let go of the disk; it flushes, then closes (may take for ever)."""
        if self._adrift:
            self._do(Action.FINISH)
            return
        self.ask_to_close()
        self.update()

    def ask_to_close(self) -> None:
        """Write what tells the guest that the device goes, and do no more."""

        def ask(store: Store) -> None:
            if store.exists(self.address.backend):
                store.write(f"{self.address.backend}/online", "0")
                store.write(f"{self.address.backend}/state", str(int(State.CLOSING)))

        self._store.transact(ask)

    def force(self, timeout: float = 5) -> bool:
        """Stop serving, whatever the guest thinks of it.

        Returns:
            False if a request did not return within ``timeout`` seconds; its pages stay
            mapped until the process ends.
        """
        stopped = self._queue is None or self._queue.stop(timeout)
        if stopped:
            self._queue = None
        self.finished = True
        return stopped

    def store_reconnected(self) -> None:
        """Xenstore was away and is back; its watches are set again.

        If it has forgotten our nodes (a xenstored that kept nothing), serving goes on: that
        is no reason to take a guest's disk away. Only :meth:`unplug` ends it then.
        """
        if self._store.exists(self.address.backend):
            shown = State.parse(self._store.read(f"{self.address.backend}/state"))
            asked = shown is State.CLOSING and self.state in (State.INIT_WAIT, State.CONNECTED)
            if shown is not self.state and not asked:
                self._publish(self.state)  # the connection broke before it was written
            self.update()
        elif not self.finished:
            self._adrift = True
            log.warning(
                "xenstore was restarted and has lost this device; serving it goes on, "
                "but nobody can see or detach it except by ending this process"
            )

    def _guest_is_gone(self) -> bool:
        domid = self.address.frontend_domid
        return domid != 0 and not self._store.is_introduced(domid)

    def _publish(self, state: State) -> None:
        """Write our state, unless the directory has been removed meanwhile."""
        self.state = state
        path = f"{self.address.backend}/state"

        def write(store: Store) -> None:
            if store.exists(path):
                store.write(path, str(int(state)))

        self._store.transact(write)

    def _do(self, action: Action) -> None:
        log.debug("%r, frontend %s: %s", self, self.frontend_state, action.value)
        if action is Action.CONNECT:
            self._connect()
        elif action is Action.CLOSE:
            self._publish(State.CLOSING)
        elif action is Action.DISCONNECT:
            self._disconnect()
            self._publish(State.CLOSED)
        elif action is Action.REOPEN:
            self._disconnect()
            self._publish(State.INIT_WAIT)
        elif action is Action.FINISH:
            self._disconnect()
            if not self._adrift:
                self._publish(State.CLOSED)
            self.finished = True

    def _connect(self) -> None:
        front = self.address.frontend
        try:
            connection = Connection.from_keys(
                lambda name: self._store.read(f"{front}/{name}"), MAX_RING_PAGE_ORDER
            )
            abi = abi_named(connection.protocol, platform.machine())
            self._queue = Queue(
                self._hypervisor,
                self.address.frontend_domid,
                connection,
                abi,
                self._disk,
                max_indirect_segments=self._max_indirect_segments,
                persistent_limit=PERSISTENT_LIMIT if connection.persistent else 0,
                on_failure=self._on_failure,
            )
        except (GuestMisbehaved, HypervisorError) as error:
            log.error("cannot connect to the frontend: %s", error)
            self._publish(State.CLOSING)
            return
        self._queue.start()
        self._publish(State.CONNECTED)

    def _disconnect(self) -> None:
        """Finish the requests taken so far and unmap everything; before Closed is published."""
        if self._queue is not None:
            while not self._queue.stop(1.0):
                pass  # a pause between two waits, for a signal that came just before one
            self._queue = None
