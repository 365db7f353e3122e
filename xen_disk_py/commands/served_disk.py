"""What the commands share that do something to a disk which another process serves."""

from __future__ import annotations

import select
import time
from typing import Callable

from ..errors import DeviceError
from ..xenbus import toolstack
from ..xenbus.toolstack import Attached
from ..xenbus.vdev import VirtualDevice
from ..xenbus.xenstore import Store


def find(store: Store, domid: int, vdev: VirtualDevice) -> Attached:
    """Find a disk of ours.

    Raises:
        DeviceError: there is none; the message lists those that the domain has.
    """
    disks = list(toolstack.attached(store, domid))
    for disk in disks:
        if disk.address.devid == vdev.number:
            return disk
    names = ", ".join(disk.device.name for disk in disks) or "none"
    raise DeviceError(f"no {vdev} of ours in domain {domid}; connected there: {names}")


def until(store: Store, path: str, done: Callable[[], bool], timeout: float) -> bool:
    """Wait ``timeout`` seconds at most until ``done()``, looking whenever ``path`` changes."""
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
