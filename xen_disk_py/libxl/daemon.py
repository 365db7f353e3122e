"""Which of libxl's disks are ours to serve, and one process for each of them.

A process outlives whoever started it: a supervisor that is restarted finds the disks that are
served by the process id in their nodes and the lock on their records, and leaves them alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Callable

from ..exit_status import ExitStatus
from ..host.forkserver import Process
from ..recovery import record
from ..recovery.supervisor import CALM, DELAYS
from ..xenbus import toolstack
from ..xenbus.states import Address, State
from ..xenbus.vdev import from_number
from ..xenbus.xenstore import Store
from . import attachment

log = logging.getLogger("xen_disk_py")


class Supervisor:
    """Starts a process for every disk that waits for one; tells of those that have lost theirs.

    Args:
        store: xenstore.
        directory: where the records of served disks are.
        start: starts the process that serves a device. It serves a device that nobody has
            served yet, or takes over one whose process has died; where that is impossible, it
            answers the requests, with errors, until the guest has released the disk.
        delays: seconds before the first, second, … restart for one disk; how many there are is
            how many restarts there may be.
        calm: seconds of a process's life after which ``delays`` begins anew.
    """

    def __init__(
        self,
        store: Store,
        directory: str,
        start: Callable[[Address], Process],
        *,
        delays: Sequence[float] = DELAYS,
        calm: float = CALM,
    ) -> None:
        self._store = store
        self._directory = directory
        self._spawn = start
        self._own = toolstack.own_domid(store)
        self._root = f"/local/domain/{self._own}/backend/{attachment.KIND}"
        self._delays = delays
        self._calm = calm
        self._processes: dict[Address, Process] = {}
        self._restarts: dict[Address, _Restarts] = {}
        self._reported: set[Address] = set()
        self._orphans: set[Address] = set()
        self.served = 0

    def watch(self) -> None:
        """Have xenstore tell of all changes; guests cannot write there (XSA-349)."""
        self._store.watch(self._root)

    def look(self) -> None:
        """See which devices there are and do for each what it needs; count the served ones."""
        found = set(self._devices())
        self._reported &= found
        self._orphans &= found
        for address in self._restarts.keys() - found:
            del self._restarts[address]
        now = time.monotonic()
        self.served = sum([self._attend(address, now) for address in found])
        for restarts in self._restarts.values():
            if restarts.due <= now:  # done, or overtaken by something else
                restarts.due = math.inf

    @property
    def pause(self) -> float | None:
        """Seconds until :meth:`look` has something to do of itself; None: never."""
        due = min((each.due for each in self._restarts.values()), default=math.inf)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def reap(self) -> bool:
        """Take note of processes that have ended; tell whether there were any.

        libxl is told at once of one that came to nothing.
        """
        ended = [item for item in self._processes.items() if item[1].poll() is not None]
        for address, process in ended:
            del self._processes[address]
            status = process.returncode or 0
            if status:
                why = f"process {process.pid} ended with status {status}"
                log.error("%s: %s", self._name(address), why)
                attachment.refuse(self._store, address, f"{why}; see the log of xen-disk serve")
            restarts = self._restarts.setdefault(address, _Restarts())
            if status > 0 and status != ExitStatus.CRASHED:
                restarts.count = len(self._delays)  # another would come to no other end
            elif time.monotonic() - restarts.started >= self._calm:
                restarts.count = 0
        return bool(ended)

    def _devices(self) -> Iterator[Address]:
        for guest in filter(str.isdigit, self._store.list(self._root)):
            for devid in filter(str.isdigit, self._store.list(f"{self._root}/{guest}")):
                address = Address(self._own, int(guest), int(devid), attachment.KIND)
                if toolstack.is_from_libxl(self._store, address):
                    yield address

    def _attend(self, address: Address, now: float) -> bool:
        """Do what a device needs; tell whether it is served."""
        if address in self._processes:
            return True
        pid = self._store.read(f"{address.backend}/{toolstack.PID_KEY}")
        found = record.find(self._directory, address)
        if pid is not None and found is not None and found.alive:
            return True
        # read last: a process that ends well has published Closed before it is not alive
        state = State.parse(self._store.read(f"{address.backend}/state"))
        if pid is None:
            if state is State.INITIALISING:
                return self._start(address)
            if state is State.CLOSING:  # it was refused, or we came too late
                attachment.close(self._store, address, None)
            return False
        if state is State.CLOSING and address not in self._orphans:
            self._orphans.add(address)  # once: after that libxl takes the disk away by force
            self._start(address)
        elif state in (State.INIT_WAIT, State.CONNECTED) and address not in self._reported:
            if found is not None and found.is_orphan:
                restarts = self._restarts.setdefault(address, _Restarts())
                if restarts.plan(self._delays, now) <= now:
                    log.info("%s: another process takes over from %s", self._name(address), pid)
                    return self._start(address)
                if restarts.due < math.inf:
                    return False
            self._reported.add(address)
            log.error(
                "%s: its process %s has died; the guest waits for its requests until you take "
                "the disk away: xl block-detach %d %s",
                self._name(address),
                pid,
                address.frontend_domid,
                from_number(address.devid),
            )
        return False

    def _start(self, address: Address) -> bool:
        try:
            self._processes[address] = self._spawn(address)
        except OSError as error:
            log.error("%s: cannot start a process: %s", self._name(address), error)
            attachment.refuse(self._store, address, f"cannot start a process: {error}")
            return False
        self._restarts.setdefault(address, _Restarts()).started = time.monotonic()
        return True

    def _name(self, address: Address) -> str:
        return toolstack.disk_name(self._store, address)


class _Restarts:
    """How often the process of a disk was started again, and when it is to be again."""

    def __init__(self) -> None:
        self.count = 0
        self.started = math.inf
        self.due = math.inf

    def plan(self, delays: Sequence[float], now: float) -> float:
        """Plan one, unless that is done or there were too many; return when it is due."""
        if self.due == math.inf and self.count < len(delays):
            self.due = now + delays[self.count]
            self.count += 1
        return self.due
