"""``disconnect``: take a disk away, from another terminal, and wait until it is gone."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Callable

from ..datapath.journal import Journal
from ..errors import DeviceError, DeviceTaken, XenDiskError
from ..exit_status import ExitStatus
from ..host.process import send_signal
from ..recovery import record, temporary
from ..recovery.orphan import stand_in
from ..recovery.record import Found, Record
from ..xenbus import toolstack
from ..xenbus.states import State
from ..xenbus.toolstack import Attached
from ..xenbus.vdev import parse
from ..xenbus.waiting import until
from ..xenbus.xenstore import Store
from .environment import Environment

_FORCE_PATIENCE = 10.0
_FORCE_GRACE = 2.0  # seconds that a guest gets to release the disk by itself


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Detach as xl does: tell the backend, wait for it, remove the nodes."""
    vdev = parse(args.vdev)
    with env.open_store() as store, ExitStack() as stack:
        domain = toolstack.find_domain(store, args.vm)
        disk = toolstack.find_attached(store, domain.domid, vdev)
        found = record.find_served(env.record_directory, disk.address)
        alive = found is not None and found.alive
        if not alive:
            journals = stack.enter_context(_orphaned_journals(env, disk))
            with stand_in(store, env.open_hypervisor, disk.address, journals):
                _ask(store, disk)
                if args.force:
                    until(store, *_closed(store, disk, alive=False), _FORCE_PATIENCE)
                else:
                    _wait(store, disk, args.timeout, alive=False)
        elif args.force:
            _force(store, disk, found, args.timeout)
        else:
            _ask(store, disk)
            _wait(store, disk, args.timeout, alive=True)
        toolstack.detach(store, disk.address)
    if not alive:
        record.forget(env.record_directory, disk.address)
    if found is not None and found.facts is not None and found.facts.temporary is not None:
        # Its process may not be able to, as another user; there, it is open at most.
        temporary.remove(found.facts.temporary)
    env.tell(f"{vdev}: {'forced off' if args.force else 'gone from'} {domain}")
    return ExitStatus.OK


@contextlib.contextmanager
def _orphaned_journals(env: Environment, disk: Attached) -> Iterator[Sequence[Journal]]:
    """Give the journals of a dead process, if they can be read; nobody else adopts it meanwhile.

    Raises:
        DeviceTaken: somebody has, just now.
    """
    try:
        orphaned = Record.adopt(env.record_directory, disk.address)
    except DeviceTaken:
        raise
    except XenDiskError:
        yield ()
        return
    try:
        yield orphaned.journals
    finally:
        orphaned.leave()


def _ask(store: Store, disk: Attached) -> None:
    """Tell frontend and backend that the device goes."""

    def ask(transaction: Store) -> None:
        path = disk.address.backend
        if transaction.exists(path):
            transaction.write(f"{path}/online", "0")
            if State.parse(transaction.read(f"{path}/state")) is not State.CLOSED:
                transaction.write(f"{path}/state", str(int(State.CLOSING)))

    store.transact(ask)


def _wait(store: Store, disk: Attached, timeout: float, *, alive: bool) -> None:
    """Wait until the backend has closed; for a dead one, until the frontend has."""
    if not until(store, *_closed(store, disk, alive=alive), timeout):
        raise DeviceError(
            f"the guest has not released {disk.device} within {timeout:g} s: it does not "
            "answer (paused?), or waits until nothing there uses the disk; --force does not wait"
        )


def _closed(store: Store, disk: Attached, *, alive: bool) -> tuple[str, Callable[[], bool]]:
    """Return the node whose state tells the end of a disk, and how to ask whether it has come."""
    path = (disk.address.backend if alive else disk.address.frontend) + "/state"

    def closed() -> bool:
        state = State.parse(store.read(path))
        return state in (None, State.CLOSED) or (not alive and state is State.INITIALISING)

    return path, closed


def _force(store: Store, disk: Attached, found: Found | None, timeout: float) -> None:
    """Have the serving process cut the guest off: its first signal asks, the second forces.

    The record says which process that is. A lock alone does not: an id is given away again. It may
    have to try its transactions in xenstore for long, where a guest undoes them.
    """
    path = disk.address.backend
    facts = found.facts if found is not None else None
    for patience in (_FORCE_GRACE, timeout):
        send_signal(
            facts.pid if facts is not None else None,
            facts.process_started if facts is not None else None,
            signal.SIGTERM,
        )
        if until(store, path, lambda: not store.exists(path), patience):
            return
    raise DeviceError(f"process {disk.pid} does not end; kill it, then try again")
