"""Block drivers of ours in dom0, which do what Linux's does not: they are frontends in software."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Callable

from xen_disk_py.libxen import Xen
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.xenbus.states import State
from xen_disk_py.xenbus.xenstore import Store

from .disk import Disk, DiskError, block_nodes
from .guest import PATIENCE, Dom0

Driver = Callable[..., Frontend]


def frontend_path(disk: Disk) -> str:
    """Return dom0's half of a disk, of which there is one, as soon as it is there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and disk.process.poll() is None:
        for path in block_nodes(0):
            front, _, name = path.rpartition("/")
            if name == "state" and front.startswith("/local/domain/0/device/vbd/"):
                return front
        time.sleep(0.1)
    raise DiskError(f"not in xenstore: {disk.describe()}")


@contextmanager
def drivers(dom0: Dom0) -> Iterator[Driver]:
    """Take blkfront out of dom0; give a function that connects a driver of ours to a disk.

    It takes the disk, the class of the driver, and the driver's options.
    """
    dom0.unload_blkfront()
    with ExitStack() as stack:
        stack.callback(dom0.load_blkfront)  # after a test that has failed, too
        store, xen = stack.enter_context(Store.open(timeout=PATIENCE)), stack.enter_context(Xen())

        def start(disk: Disk, kind: type[Frontend] = Frontend, **options: Any) -> Frontend:
            front = frontend_path(disk)
            store.write(f"{front}/state", str(int(State.INITIALISING)))
            # few buffers: the kernel grants 1024 pages on behalf of programs, no more
            driver = kind(store, xen, front, depth=8, timeout=PATIENCE, **options)
            stack.enter_context(driver)
            driver.connect()
            disk.wait_connected()
            return driver

        yield start
