"""In place of a process that was killed: its unanswered requests are answered, with errors.

A guest waits for an answer indefinitely. Linux then hangs while it removes the device, in the one
thread that would also tell it of a new one, so that no disk can be connected to it any more.
"""

from __future__ import annotations

import errno
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Callable

from ..backends import Backend
from ..blkif import MAX_QUEUES, SECTOR, Connection, Features, abi_named
from ..datapath.disk import Disk
from ..datapath.journal import Journal
from ..datapath.queue import Options, Queue
from ..errors import XenDiskError
from ..hypervisor import Hypervisor
from ..xenbus.device import MAX_RING_PAGE_ORDER
from ..xenbus.states import Address
from ..xenbus.xenstore import Store

log = logging.getLogger("xen_disk_py")

_PATIENCE = 5.0
_PAUSE = 0.05


class _Gone(Backend):
    """A disk without storage."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __str__(self) -> str:
        return "a disk whose process has died"

    def read(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        raise OSError(errno.EIO, "nobody serves it")

    def write(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        raise OSError(errno.EIO, "nobody serves it")

    def flush(self) -> None:
        raise OSError(errno.EIO, "nobody serves it")

    def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "nobody serves it")


@contextmanager
def stand_in(
    store: Store,
    open_hypervisor: Callable[[], Hypervisor],
    address: Address,
    journals: Sequence[Journal] = (),
) -> Iterator[None]:
    """Answer the requests of a device that nobody serves, as long as the context lasts.

    Does nothing where the guest has no ring, or where it cannot be had.

    Args:
        store: xenstore.
        open_hypervisor: opens what maps grants and binds event channels.
        address: which device.
        journals: of the process, one for each queue: nothing else tells of the requests that
            it took and that were overtaken.
    """
    with ExitStack() as stack:
        try:
            queues = _queues(store, stack.enter_context(open_hypervisor()), address, journals)
        except XenDiskError as error:
            log.debug("no requests to answer: %s", error)
        else:
            until = time.monotonic() + _PATIENCE
            for queue in queues:
                stack.callback(queue.stop, _PATIENCE)
                while not queue.start() and time.monotonic() < until:
                    time.sleep(_PAUSE)  # there is no thread to be had, which it has said
        yield


def _queues(
    store: Store, hypervisor: Hypervisor, address: Address, journals: Sequence[Journal]
) -> list[Queue]:
    keys = {name: store.read(f"{address.backend}/{name}") for name in store.list(address.backend)}
    offered = Features.from_keys({k: v for k, v in keys.items() if v is not None})
    connection = Connection.from_keys(
        lambda name: store.read(f"{address.frontend}/{name}"), MAX_RING_PAGE_ORDER, MAX_QUEUES
    )
    disk = Disk(_Gone(offered.sectors * SECTOR))
    return [
        Queue(
            hypervisor,
            address.frontend_domid,
            ring,
            abi_named(connection.protocol, platform.machine()),
            disk,
            options=Options(offered.max_indirect_segments),
            persistent=False,
            journal=journals[number] if number < len(journals) else None,
            statistics=disk.statistics.of_queue(number),
            on_failure=lambda error: log.debug("%r", error),
        )
        for number, ring in enumerate(connection.rings)
    ]
