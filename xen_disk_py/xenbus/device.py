"""One block device as its backend: from InitWait to Closed, as often as the guest likes.

The device reads both ends' states from xenstore, asks :func:`~xen_disk_py.xenbus.states.react`
what follows, and does it. It is driven from outside: whoever owns it waits for xenstore to
have something to say and calls :meth:`Device.update`. Requests are served by another
thread meanwhile and never wait for xenstore.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from typing import Callable, Protocol

from ..blkif import SECTOR, Abi, Connection, Ring, abi_named
from ..datapath import statistics as count
from ..datapath.claim import Claim
from ..datapath.disk import Disk
from ..datapath.journal import Journal
from ..datapath.queue import Options, Queue
from ..datapath.statistics import Counters
from ..errors import GuestMisbehaved, HypervisorError, StoreError, StoreLost, XenDiskError
from ..hypervisor import Hypervisor
from ..text import printable
from . import resize
from .states import Action, Address, State, react
from .xenstore import Store

log = logging.getLogger("xen_disk_py")

_FINISHING = 0.05
"""Seconds that one update waits for requests to return, before the session looks around."""
_STEPS = 8  # of the handshake, in one update; no handshake in order takes as many
_MIGRATED_AWAY = "--migratedaway"
MAX_RING_PAGE_ORDER = 4
"""Rings of up to 16 pages are offered."""


class ServedQueue(Protocol):
    """A queue, wherever it is served: see :class:`~xen_disk_py.datapath.queue.Queue`."""

    @property
    def stalled_for(self) -> float:
        """Seconds that a request has been under way and nothing moved; 0 if none is."""

    def start(self) -> bool:
        """Begin to serve; False: to be called again.

        Raises:
            HypervisorError: the ring cannot be had.
        """

    def ask_to_stop(self) -> None:
        """Have it come to its end."""

    def stop(self, timeout: float | None = None) -> bool:
        """Wait for its end; False if that takes longer."""

    def pause_retries(self, paused: bool) -> None:
        """Try none of what is queued for retry, or try it again."""


class OpenQueue(Protocol):
    """Makes a queue, as :class:`~xen_disk_py.datapath.queue.Queue` does."""

    def __call__(
        self,
        hypervisor: Hypervisor,
        domid: int,
        ring: Ring,
        abi: Abi,
        disk: Disk,
        *,
        options: Options,
        persistent: bool,
        sharers: int,
        number: int,
        journal: Journal | None,
        statistics: Counters,
        on_failure: Callable[[Exception], None],
    ) -> ServedQueue:
        """See there for what it takes, and raises."""


class Device:
    """The backend of one device.

    Args:
        store: xenstore.
        hypervisor: what maps grants and binds event channels.
        address: which device; its directories exist once :meth:`keys` have been written there.
        disk: what serves the requests; not closed here.
        options: how its queues work.
        max_queues: how many to offer, up to ``blkif.MAX_QUEUES``; fewer if the backend lets
            in fewer threads.
        cdrom: show the guest a CD-ROM.
        on_failure: called, from another thread, when serving stops for an error of our own.
        on_resizing: called with the new size, in bytes, before the storage is changed.
        on_resize: called with the size that the disk has after that, changed or not.
        journals: what outlives this process, one for each queue; private ones by default.
        adopts: the device is there already, and the process that served it has died: the first
            :meth:`update` takes it over.
        open_queue: makes what serves a ring.
        claim: what is to be done before the guest is connected for the first time, if anything.
    """

    def __init__(
        self,
        store: Store,
        hypervisor: Hypervisor,
        address: Address,
        disk: Disk,
        *,
        options: Options = Options(),  # noqa: B008 - it cannot change
        max_queues: int = 1,
        cdrom: bool = False,
        on_failure: Callable[[Exception], None] = lambda error: None,
        on_resizing: Callable[[int], None] = lambda size: None,
        on_resize: Callable[[int], None] = lambda size: None,
        journals: Sequence[Journal] = (),
        adopts: bool = False,
        open_queue: OpenQueue = Queue,
        claim: Claim | None = None,
    ) -> None:
        self.address = address
        self.state = State.INIT_WAIT
        self.frontend_state: State | None = State.INITIALISING
        self.finished = False
        self.guest_gone = False
        self.is_unsettled = False
        """Whether :meth:`update` is to be called again, though nothing more has changed."""
        self._store = store
        self._hypervisor = hypervisor
        self._disk = disk
        self._options = options
        self._max_queues = min(max_queues, disk.backend.threads)
        self._cdrom = cdrom
        self._on_failure = on_failure
        self._on_resizing = on_resizing
        self._on_resize = on_resize
        self._journals = journals
        self._adopts = adopts
        self._open_queue = open_queue
        self._claim = claim
        self._step = disk.backend.physical_sector_size  # of which any size is a multiple (blkif.h)
        self._queues: list[ServedQueue] = []
        self._unstarted: list[ServedQueue] = []  # of these, those that no thread is to be had for
        self._unfinished: Action | None = None  # begun; requests have to return first
        self._is_orphaned = False
        self._migrated = ""  # the guest's name, if that says that it may run on another host
        self._waits = False  # with unanswered requests, for another name

    def __repr__(self) -> str:
        return (
            f"<Device {self.address.devid} of domain {self.address.frontend_domid}: {self.state}>"
        )

    @property
    def connected(self) -> bool:
        """Both ends are connected, or the guest reads the disk all the same: it has it.

        GRUB's driver (``grub-core/disk/xen/xendisk.c``) never goes beyond Initialised.
        """
        return self.state is State.CONNECTED and (
            self.frontend_state is State.CONNECTED
            or self._disk.statistics.as_dict()["requests"] > 0
        )

    @property
    def stalled_for(self) -> float:
        """Seconds that a request has been under way and nothing moved; 0 if none is."""
        return max((queue.stalled_for for queue in self._queues), default=0.0)

    def keys(self) -> dict[str, str]:
        """What the backend itself publishes in its directory, its first state included."""
        features = self._disk.features(
            self._options.max_indirect_segments,
            MAX_RING_PAGE_ORDER,
            self._max_queues,
            cdrom=self._cdrom,
        )
        keys = features.to_keys()
        self._step = int(keys["physical-sector-size"])  # of which any size is a multiple (blkif.h)
        return {**keys, "state": str(int(State.INIT_WAIT))}

    def watch(self) -> None:
        """Have xenstore tell of all that :meth:`update` looks at, and nothing more (XSA-349)."""
        self._store.watch(f"{self.address.frontend}/state")
        self._store.watch(f"{self.address.backend}/state")
        self._store.watch(f"{self.address.backend}/{resize.DIRECTORY}")
        self._store.watch("@releaseDomain")
        self._store.watch(self._name_path)

    def update(self) -> None:
        """Look at xenstore and do what follows."""
        if self._adopts:
            self._take_over()
        if not (self.finished or self._is_orphaned):
            self._answer_resize_requests()
        self._follow_states()
        self._begin(self._start_queues)
        self._heed_migration()

    def _follow_states(self) -> None:
        """Do what the two ends' states ask for, until nothing follows or that takes too long."""
        self.is_unsettled = False
        if self._unfinished is not None:
            self._do(self._unfinished)  # whatever the guest has changed its mind to
        for _ in range(_STEPS):
            if self._unfinished is not None:
                break
            if self.finished or self._is_orphaned:
                return
            back, front = self.address.backend, self.address.frontend
            paths = f"{back}/state", f"{back}/online", f"{front}/state"
            shown, online, frontend = self._store.read_all(paths)
            asked, self.frontend_state = State.parse(shown), State.parse(frontend)
            if asked is State.CLOSING and self.state in (State.INIT_WAIT, State.CONNECTED):
                self.state = State.CLOSING  # the toolstack detaches
            if self.frontend_state is None or self._guest_is_gone():
                self.guest_gone = self._guest_is_gone()
                self._do(Action.FINISH)
            elif asked is None:
                self._do(Action.FINISH)
            else:
                action = react(self.state, self.frontend_state, online == "1")
                if action is Action.STAY or (action is Action.CONNECT and self._is_claiming()):
                    return
                self._do(action)
        self.is_unsettled = not self.finished  # a guest can change its state as often as it likes

    def unplug(self) -> None:
        """Ask the guest to release the disk; it flushes, then closes, in its own time."""
        if self._is_orphaned:
            self._do(Action.FINISH)
            return
        self.ask_to_close()
        self.update()

    def resize(self, size: int | None, *, force: bool = False) -> int:
        """Give the disk another size, and tell the guest.

        Args:
            size: bytes; None for what the disk's storage has become.
            force: a smaller size is fine.

        Returns:
            The new size, in bytes.

        Raises:
            XenDiskError: it is refused; the disk is as it was.
            StoreLost: it is done; the guest is told when xenstore is back.
        """
        disk, before = self._disk, self._disk.sectors
        try:
            size = disk.resize(size, force=force, step=self._step, on_change=self._on_resizing)
            log.info("%d bytes long now, %d before", size, before * SECTOR)
            return size
        finally:
            self._on_resize(disk.sectors * SECTOR)
            if disk.sectors != before:
                self._publish_size()

    @property
    def resize_notice(self) -> int | None:
        """What polls readable when the storage has changed its size by itself, if anything."""
        return self._disk.backend.resize_notice

    def follow_storage(self) -> None:
        """Take the size that the storage has now, if it has another; raises as :meth:`resize`."""
        if self._disk.storage_size() != self._disk.sectors * SECTOR:
            self.resize(None)

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
        deadline = time.monotonic() + timeout
        self._unstarted = []
        for queue in self._queues:
            queue.ask_to_stop()
        self._queues = [
            queue for queue in self._queues if not queue.stop(max(0.0, deadline - time.monotonic()))
        ]
        self.finished = True
        return not self._queues

    def store_reconnected(self) -> None:
        """Xenstore was away and is back; its watches are set again.

        If it has forgotten our nodes (a xenstored that kept nothing), the disk is still served:
        that is no reason to take a guest's disk away. Only :meth:`unplug` ends it then.
        """
        if self._adopts:
            self.update()  # the state that is shown is not ours yet
        elif self._store.exists(self.address.backend):
            shown = State.parse(self._store.read(f"{self.address.backend}/state"))
            asked = shown is State.CLOSING and self.state in (State.INIT_WAIT, State.CONNECTED)
            if shown is not self.state and not asked:
                self._publish(self.state)  # the connection broke before it was written
            self._publish_size()
            self.update()
        elif not self.finished:
            self._is_orphaned = True
            log.warning(
                "xenstore was restarted and has lost this device; it is served, but nobody can see "
                "it, and only ending this process detaches it"
            )

    def _take_over(self) -> None:
        """Take the place of the process that died, in whatever state the device is in."""
        back, disk = self.address.backend, self._disk
        shown = State.parse(self._store.read(f"{back}/state"))
        frontend = State.parse(self._store.read(f"{self.address.frontend}/state"))
        step = self._store.read(f"{back}/physical-sector-size") or ""
        is_gone = self._guest_is_gone()
        if step.isdecimal() and int(step):
            self._step = int(step)
            disk.admit(disk.sectors - disk.sectors % max(1, self._step // SECTOR))
        for number in range(self._max_queues):
            words = disk.statistics.of_queue(number).words
            words[count.IN_FLIGHT] = words[count.HELD] = 0  # as the dead process had it
        if shown in (State.CONNECTED, State.CLOSING, State.CLOSED):
            self.state = shown
        if (
            shown in (State.CONNECTED, State.CLOSING)
            and frontend not in (None, State.INITIALISING, State.CLOSED)
            and not is_gone
        ):
            self._note_name()
            self._waits = bool(self._migrated)
            self._open_queues(shown)
        self._adopts = False
        self._publish_size()

    def _is_claiming(self) -> bool:
        """Whether the storage is not ours yet; the frontend waits."""
        if self._claim is None or self._claim.is_done:
            return False
        if not self._claim.begin():
            self.is_unsettled = True
        return True

    def _guest_is_gone(self) -> bool:
        domid = self.address.frontend_domid
        return domid != 0 and not self._store.is_introduced(domid)

    @property
    def _name_path(self) -> str:
        return f"/local/domain/{self.address.frontend_domid}/name"

    def _heed_migration(self) -> None:
        """Retry nothing while the guest may run on another host already.

        ``xl migrate`` renames the domain here before it lets the other one run, which does all that
        is unanswered once more; if that fails, it gives the name back (``migrate_domain`` in
        ``xl_migrate.c``).
        """
        if not self._queues:
            return
        self._note_name()
        if self._waits and not self._migrated:
            self._waits = False
            self._begin(self._start_queues)
        for queue in self._queues:
            queue.pause_retries(bool(self._migrated))

    def _note_name(self) -> None:
        """See whether the guest's name says that it may run on another host."""
        try:
            name = self._store.read(self._name_path) or ""
        except StoreLost:
            raise
        except StoreError as error:
            log.debug("%s", error)  # a driver domain may not read it
            return
        before, self._migrated = self._migrated, name if name.endswith(_MIGRATED_AWAY) else ""
        if self._migrated and not before:
            log.log(
                logging.WARNING if self._adopts else logging.INFO,
                "the guest is called %s: it may run on another host, so nothing that was begun or "
                "has failed is tried again here; if it does run here, give it its name back: "
                "xl rename",
                printable(name),
            )

    def _publish(self, state: State) -> None:
        """Write our state, unless the directory has been removed meanwhile.

        Or unless the toolstack has written there that the device goes, just now, and this would
        hide it: what follows is done at the next look.
        """
        self.state = state
        back, value = self.address.backend, str(int(state))
        continues = state in (State.INIT_WAIT, State.CONNECTED)

        def write(store: Store) -> None:
            shown = store.read(f"{back}/state")
            goes = State.parse(shown) is State.CLOSING and store.read(f"{back}/online") == "0"
            if shown not in (None, value) and not (continues and goes):
                store.write(f"{back}/state", value)

        self._store.transact(write)

    def _replace(self, path: str, value: str) -> None:
        """Write a node, unless it has that value or has been removed meanwhile."""

        def write(store: Store) -> None:
            if store.read(path) not in (None, value):
                store.write(path, value)

        self._store.transact(write)

    def _publish_size(self) -> None:
        """Write the disk's size, unless it stands there; a frontend that is connected looks again.

        Linux's reads ``sectors`` when the state is written, though it is the same (blkback's
        ``xen_vbd_resize`` does so, in one transaction).
        """
        back = self.address.backend
        sectors = str(self._disk.sectors)

        def write(store: Store) -> None:
            if store.read(f"{back}/sectors") not in (None, sectors):
                store.write(f"{back}/sectors", sectors)
                if State.parse(store.read(f"{back}/state")) is State.CONNECTED:
                    store.write(f"{back}/state", str(int(State.CONNECTED)))

        self._store.transact(write)

    def _answer_resize_requests(self) -> None:
        """Do what ``resize`` commands ask for, and write the answers."""
        directory = f"{self.address.backend}/{resize.DIRECTORY}"
        for name in self._store.list(directory):
            path = f"{directory}/{name}"
            request = resize.ResizeRequest.parse(self._store.read(path))
            if request is None:
                continue
            try:
                answer = resize.granted(self.resize(request.size, force=request.force))
            except StoreLost:
                raise
            except XenDiskError as error:
                answer = resize.refused(error)
            self._replace(path, answer)

    def _do(self, action: Action) -> None:
        log.debug("%r, frontend %s: %s", self, self.frontend_state, action.value)
        if action is Action.CLOSE:
            self._publish(State.CLOSING)
            return
        self._unfinished = action
        if not self._disconnect():
            self.is_unsettled = True
            return
        self._unfinished = None
        if action is Action.CONNECT:
            self._open_queues(State.CONNECTED)
        elif action is Action.DISCONNECT:
            self._publish(State.CLOSED)
        elif action is Action.REOPEN:
            self._publish(State.INIT_WAIT)
        elif action is Action.FINISH:
            if not self._is_orphaned:
                self._publish(State.CLOSED)
            self.finished = True

    def _open_queues(self, state: State) -> None:
        """Begin to serve the rings that the frontend has published, and publish ``state``."""
        if self._begin(self._make_queues) and self._begin(self._start_queues):
            self._adopts = False  # if xenstore is lost from here on, it is not done again
            self._publish(state)

    def _begin(self, step: Callable[[], None]) -> bool:
        """Do a step towards serving the rings; where that cannot be done, close."""
        try:
            step()
        except (GuestMisbehaved, HypervisorError) as error:
            self._disk.say(logging.ERROR, f"cannot connect to the frontend: {error}")
            self._disconnect()
            self._publish(State.CLOSING)
            return False
        return True

    def _start_queues(self) -> None:
        """Have the rings served; those that the system gives no thread for, at another update."""
        if self._waits:
            return
        self._unstarted = [queue for queue in self._unstarted if not queue.start()]
        if self._unstarted:
            self.is_unsettled = True

    def _make_queues(self) -> None:
        front, domid = self.address.frontend, self.address.frontend_domid
        connection = Connection.from_keys(
            lambda name: self._store.read(f"{front}/{name}"),
            MAX_RING_PAGE_ORDER,
            self._max_queues,
        )
        abi = abi_named(connection.protocol, platform.machine())
        for number, ring in enumerate(connection.rings):
            queue = self._open_queue(
                self._hypervisor,
                domid,
                ring,
                abi,
                self._disk,
                options=self._options,
                persistent=connection.persistent,
                sharers=len(connection.rings),
                number=number,
                journal=self._journals[number] if self._journals else None,
                statistics=self._disk.statistics.of_queue(number),
                on_failure=self._on_failure,
            )
            self._queues.append(queue)
        self._unstarted = list(self._queues)

    def _disconnect(self) -> bool:
        """Finish the requests taken so far and unmap everything; before Closed is published.

        Returns:
            False if some have not returned yet; to be called again. A slow disk may take minutes,
            and the session has other duties.
        """
        self._unstarted, self._waits = [], False
        for queue in self._queues:
            queue.ask_to_stop()
        deadline = time.monotonic() + _FINISHING
        while self._queues and self._queues[-1].stop(max(0.0, deadline - time.monotonic())):
            self._queues.pop()
        return not self._queues
