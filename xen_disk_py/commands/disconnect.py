"""``disconnect``: take a disk away, from another terminal, and wait until it is gone."""

from __future__ import annotations

import argparse
import os
import select
import signal
import time
from typing import Callable

from .. import record, toolstack
from ..environment import Environment
from ..errors import DeviceError
from ..exit_status import ExitStatus
from ..toolstack import Attached
from ..vdev import VirtualDevice, parse
from ..xenbus import State
from ..xenstore import Store

_FORCE_PATIENCE = 10.0


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Detach as xl does: tell the backend, wait for it, remove the nodes."""
    vdev = parse(args.vdev)
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        disk = _find(store, domain.domid, vdev)
        found = record.find(env.record_directory, disk.address)
        alive = found is not None and found.alive
        if args.force and alive:
            _force(store, disk)
        elif not args.force:
            _ask(store, disk)
            _wait(store, disk, args.timeout, alive=alive)
        toolstack.detach(store, disk.address)
        if not alive:
            record.forget(env.record_directory, disk.address)
    env.tell(f"{vdev}: {'forced off' if args.force else 'gone from'} {domain}")
    return ExitStatus.OK


def _find(store: Store, domid: int, vdev: VirtualDevice) -> Attached:
    disks = list(toolstack.attached(store, domid))
    for disk in disks:
        if disk.address.devid == vdev.number:
            return disk
    names = ", ".join(disk.device.name for disk in disks) or "none"
    raise DeviceError(f"no {vdev} of ours in domain {domid}; connected there: {names}")


def _ask(store: Store, disk: Attached) -> None:
    """Tell both halves that the device goes."""

    def ask(transaction: Store) -> None:
        path = disk.address.backend
        if transaction.exists(path):
            transaction.write(f"{path}/online", "0")
            if State.parse(transaction.read(f"{path}/state")) is not State.CLOSED:
                transaction.write(f"{path}/state", str(int(State.CLOSING)))

    store.transact(ask)


def _wait(store: Store, disk: Attached, timeout: float, *, alive: bool) -> None:
    """Wait until the backend has closed; for a dead one, until the frontend has."""
    path = (disk.address.backend if alive else disk.address.frontend) + "/state"

    def closed() -> bool:
        state = State.parse(store.read(path))
        return state in (None, State.CLOSED) or (not alive and state is State.INITIALISING)

    if not _until(store, path, closed, timeout):
        raise DeviceError(
            f"the guest has not let go of {disk.device} within {timeout:g} s: something there "
            "still uses it (mounted?); it goes when that ends, or now with --force"
        )


def _force(store: Store, disk: Attached) -> None:
    """Have the serving process cut the guest off: its first signal asks, the second forces."""
    path = disk.address.backend
    for _ in range(2):
        try:
            os.kill(disk.pid, signal.SIGTERM)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    if not _until(store, path, lambda: not store.exists(path), _FORCE_PATIENCE):
        raise DeviceError(f"process {disk.pid} does not end; kill it, then try again")


def _until(store: Store, path: str, done: Callable[[], bool], timeout: float) -> bool:
    """Wait until ``done()``, looking whenever ``path`` changes."""
    deadline = time.monotonic() + timeout
    store.watch(path)
    poller = select.poll()
    poller.register(store.fileno(), select.POLLIN)
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if not store.has_pending:
            poller.poll(left * 1000)
        store.pending()
    return True
