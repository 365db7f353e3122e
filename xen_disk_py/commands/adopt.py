"""``adopt``: serve one disk whose nodes libxl has made; what ``serve`` starts for each."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .. import adoption, toolstack
from ..adoption import AdoptedDevice
from ..arguments import parse
from ..disk import Disk
from ..environment import Environment
from ..errors import DeviceTaken, XenDiskError
from ..exit_status import ExitStatus
from ..record import Record
from ..session import Interrupts, Session
from ..standin import stand_in
from ..toolstack import PID_KEY
from ..units import format_size
from ..vdev import VirtualDevice, from_number
from ..xenbus import Address, State
from ..xenstore import Store
from .backend_arguments import backend_from
from .opening import facts_about, opened_hypervisor, queue_options
from .served_disk import until

log = logging.getLogger("xen_disk_py")

_PATIENCE = 8.0  # seconds; libxl has 10


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Serve the disk until libxl takes it away; or stand in for the process that did."""
    with env.open_store() as store, _named(args.devid, args.domid):
        address = Address(toolstack.own_domid(store), args.domid, args.devid, adoption.KIND)
        if not store.exists(f"{address.backend}/{PID_KEY}"):
            _serve(env, store, address)
        elif State.parse(store.read(f"{address.backend}/state")) is State.CLOSING:
            _stand_in(env, store, address)
    return ExitStatus.OK


@contextmanager
def _named(devid: int, domid: int) -> Iterator[None]:
    """Have each line of the log, which many disks share, begin with whose it is."""

    def name(line: logging.LogRecord) -> bool:
        line.msg = f"{from_number(devid)} of domain {domid}: {line.msg}"
        return True

    log.addFilter(name)
    try:
        yield
    finally:
        log.removeFilter(name)


def _serve(env: Environment, store: Store, address: Address) -> None:
    with ExitStack() as stack:
        try:
            # all that can go wrong, before the guest and libxl hear of the disk
            own_record = stack.enter_context(_claimed(env, store, address))
            domain = toolstack.find_domain(store, str(address.frontend_domid))
            wish = adoption.read_wish(store, address)
            options = parse(["connect", str(domain.domid), *wish.arguments])
            disk = Disk(backend_from(options), own_record.statistics)
            stack.callback(disk.close)
            hypervisor = stack.enter_context(opened_hypervisor(env))
        except XenDiskError as error:
            reason = str(error)
            log.error("%s", reason)
            adoption.refuse(store, address, reason)
            return
        if not wish.discard:
            disk.can_discard = disk.can_discard_securely = False
        name = store.read(f"{address.backend}/dev") or from_number(address.devid).name
        vdev = VirtualDevice(address.devid, name)
        own_record.describe(facts_about(options, domain, vdev, disk))
        interrupts = stack.enter_context(Interrupts(hangup_resizes=True).installed())
        device = AdoptedDevice(
            store,
            hypervisor,
            address,
            disk,
            options=queue_options(options),
            max_queues=options.queues,
            on_failure=interrupts.fail,
            on_resize=lambda size: own_record.describe({**own_record.facts, "size": size}),
            journals=own_record.journals,
        )
        session = Session(
            store,
            device,
            vdev,
            interrupts,
            patience=None,
            release=lambda: adoption.close(store, address, os.getpid()),
        )
        outcome = session.run(
            lambda: adoption.publish(store, address, device.keys(), os.getpid()),
            on_connected=lambda: log.info(
                "connected: {length} {backend} {mode} {path}".format(
                    length=format_size(disk.backend.size), **own_record.facts
                )
            ),
        )
        log.info("%s", outcome.value)


def _claimed(env: Environment, store: Store, address: Address) -> Record:
    """Claim the record; a process that served the device until now may take a moment to end.

    Raises:
        DeviceTaken: another process serves it.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return Record(env.record_directory, address)
        except DeviceTaken:
            if store.exists(f"{address.backend}/{PID_KEY}") or time.monotonic() >= deadline:
                raise


def _stand_in(env: Environment, store: Store, address: Address) -> None:
    """Answer, with errors, what the guest waits for; when it has let go, libxl may go on."""
    path = f"{address.frontend}/state"

    def closed() -> bool:
        return State.parse(store.read(path)) in (None, State.CLOSED, State.INITIALISING)

    with Record(env.record_directory, address):  # which nobody has who lives
        died = int(store.read(f"{address.backend}/{PID_KEY}") or 0)
        log.info("answering the requests that process %d has left, with errors", died)
        with stand_in(store, env.open_hypervisor, address):
            if not until(store, path, closed, _PATIENCE):
                log.warning("the guest does not let go")
                return
        adoption.close(store, address, died)
