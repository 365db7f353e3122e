"""``adopt``: serve one disk whose nodes libxl has made; what ``serve`` starts for each."""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..backends import sharing
from ..backends.filter import succeeding
from ..datapath.claim import Claim
from ..datapath.disk import Disk
from ..datapath.queue import Queue
from ..errors import DeviceError, DeviceTaken, XenDiskError
from ..exit_status import ExitStatus
from ..host.logs import about
from ..hypervisor import Hypervisor
from ..libxl import attachment
from ..libxl.attachment import AdoptedDevice, DiskConfig
from ..recovery import orphans, record, takeover, verbs
from ..recovery.control import Control
from ..recovery.events import Events
from ..recovery.facts import Facts
from ..recovery.orphan import stand_in
from ..recovery.record import Record
from ..recovery.spec import DiskSpec
from ..session import Interrupts, Observer, Session
from ..units import format_size
from ..xenbus import other_backends, toolstack
from ..xenbus.states import Address, State
from ..xenbus.toolstack import PID_KEY, Domain
from ..xenbus.vdev import VirtualDevice, from_number
from ..xenbus.waiting import until
from ..xenbus.xenstore import Store
from . import queue_processes
from .backend_arguments import spec_from
from .environment import Environment
from .parsing import parse
from .signals import ended_though_it_hangs

log = logging.getLogger("xen_disk_py")

_PATIENCE = 8.0  # seconds; libxl has 10
_INCOMING = "--incoming"
"""What ``xl migrate-receive`` puts behind a guest's name until it may run here (``xl_migrate.c``).
The host that it comes from has its disks yet, and gives them back when it runs."""


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Serve the disk until libxl takes it away, in the place of one that died if need be.

    Where nobody can take it over, answer with errors until the guest has released it.
    """
    with ExitStack() as stack:
        store = stack.enter_context(env.open_store())
        address = Address(toolstack.own_domid(store), args.domid, args.devid, attachment.KIND)
        stack.enter_context(about(toolstack.disk_name(store, address)))
        record.await_end(env.record_directory, address)
        found = record.find(env.record_directory, address)
        if not store.exists(f"{address.backend}/{PID_KEY}"):
            _serve(env, store, address)
        elif found is not None and found.is_orphan:
            status = _take_over(env, store, address)
            if status is ExitStatus.OK or not _is_closing(store, address):
                return status
            _answer_orphan(env, store, address)
        elif _is_closing(store, address):
            _answer_orphan(env, store, address)
    return ExitStatus.OK


def _serve(env: Environment, store: Store, address: Address) -> None:
    with ExitStack() as stack:
        try:
            # all that can go wrong, before the guest and libxl hear of the disk
            domain = toolstack.find_domain(store, str(address.frontend_domid))
            config = attachment.read_config(store, address)
            spec = _spec(config)
            own_record = stack.enter_context(_claimed(env, store, address, spec.queues))
            arrives = domain.name.endswith(_INCOMING)
            with sharing.arriving(arrives), _told_if_late(env, address, spec):
                disk = _open(spec, store, stack)
            env.tell_all(disk.backend.notes)
            orphans.check(env.record_directory, disk.backend.host_storage, store=store)
            hypervisor = stack.enter_context(env.hypervisor())
        except XenDiskError as error:
            reason = str(error)
            log.error("%s", reason)
            attachment.refuse(store, address, reason)
            return
        try:
            _run(
                env,
                store,
                hypervisor,
                address,
                disk,
                spec,
                domain,
                own_record,
                stack,
                config=config,
                arrives=arrives,
            )
        except attachment.Replaced as error:  # whoever has started us looks again
            log.warning("%s", str(error))


def _take_over(env: Environment, store: Store, address: Address) -> ExitStatus:
    """Take over the disk of a process that was killed; it stays an orphan if we cannot."""
    domid, vdev = address.frontend_domid, from_number(address.devid)
    with ExitStack() as stack:
        try:
            own_record = Record.adopt(env.record_directory, address)
            stack.callback(own_record.leave)  # unless the disk comes to its end here
            facts = own_record.facts
            takeover.check_files(facts, str(vdev), f"xl block-detach {domid} {vdev}")
            died = store.read(f"{address.backend}/{PID_KEY}") or ""
            config = attachment.read_config(store, address)
            spec = _spec(config)._replace(filters=facts.spec.filters)  # as they were set last
            arrives = _state(store, address) is State.INIT_WAIT  # the dead process may have waited
            what = spec.shown_path or spec.backend_name
            with (
                succeeding(),
                sharing.arriving(arrives),
                ended_though_it_hangs(env, what),
                _told_if_late(env, address, spec),
            ):
                disk = _open(spec, store, stack)
            takeover.check_size(facts, str(vdev), disk.backend)
            hypervisor = stack.enter_context(env.hypervisor())
            attachment.pass_on(store, address, config, died, os.getpid())
        except attachment.Replaced as error:  # as above
            log.warning("%s", str(error))
            own_record.close()
            return ExitStatus.OK
        except XenDiskError as error:
            log.error("%s", error)
            may_pass = isinstance(error, takeover.PASSING)
            return ExitStatus.CRASHED if may_pass else ExitStatus.ERROR
        domain = Domain(domid, facts.domain, "")
        _run(
            env,
            store,
            hypervisor,
            address,
            disk,
            spec,
            domain,
            own_record,
            stack,
            config=None,
            arrives=arrives,
        )
    return ExitStatus.OK


def _spec(config: DiskConfig) -> DiskSpec:
    """Say what libxl's keys ask for."""
    spec = spec_from(parse(["connect", "VM", *config.arguments]))
    return spec if config.discard else spec._replace(discard=False)


@contextmanager
def _told_if_late(env: Environment, address: Address, spec: DiskSpec) -> Iterator[None]:
    """Refuse the disk, with a reason, before libxl gives up without one.

    Again and again: libxl may make the device anew meanwhile, and no other process is started.
    """
    is_over = threading.Event()

    def refuse() -> None:
        reason = (
            f"{spec.shown_path or spec.backend_name} is not open after {_PATIENCE:g} s: its "
            "storage does not answer, or waits until one that has died loses its lock; try again"
        )
        while not is_over.wait(_PATIENCE):
            try:
                with env.open_store() as store:
                    if attachment.refuse(store, address, reason):
                        log.error("%s", reason)
            except XenDiskError as error:
                log.error("%s (and %s)", reason, error)

    thread = threading.Thread(target=refuse, name="late", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # the disk matters more
        log.warning("if its storage hangs, nobody will be told: %s", str(error))
    try:
        yield
    finally:
        is_over.set()
        if thread.ident is not None:
            thread.join()  # what forks after this has no other thread


def _open(spec: DiskSpec, store: Store, stack: ExitStack) -> Disk:
    disk = spec.open_disk()
    stack.callback(disk.close)
    other_backends.check(store, disk.backend.host_storage, force=spec.force)
    return disk


def _run(
    env: Environment,
    store: Store,
    hypervisor: Hypervisor,
    address: Address,
    disk: Disk,
    spec: DiskSpec,
    domain: Domain,
    own_record: Record,
    stack: ExitStack,
    *,
    config: DiskConfig | None,
    arrives: bool,
) -> None:
    """Serve until the end; if that comes by an error of ours, a successor may take over.

    Without ``config`` another process has served the disk before; else that is what it is to be.

    Raises:
        Replaced: the toolstack has made another device meanwhile.
    """
    adopts = config is None
    name = store.read(f"{address.backend}/dev") or from_number(address.devid).name
    vdev = VirtualDevice(address.devid, name)
    is_known = adopts and own_record.facts.connected
    disk.statistics = own_record.statistics
    survives = disk.backend.survives
    processes = queue_processes.start(
        env,
        spec,
        disk,
        own_record,
        hypervisor,
        domain.domid,
        toolstack.disk_name(store, address),
        stack,
        adopts=adopts,
        crash=takeover.crash if survives else None,
    )
    queues = processes.identities if processes is not None else ()
    own_record.describe(Facts.about(spec, domain, vdev, disk, connected=is_known, queues=queues))
    control = Control(own_record)
    verbs.register(control, disk, own_record)
    events = Events(own_record, disk, env.journal)

    class Life(Observer):
        def attach(self) -> None:
            if config is not None:
                attachment.publish(store, address, config, device.keys(), os.getpid())
                events.attached()

        def serving(self) -> None:
            control.start()
            if adopts:
                events.taken_over(None)

        def connected(self) -> None:
            own_record.update(connected=True)
            facts = own_record.facts
            length = format_size(disk.backend.size)
            log.info("connected: %s %s %s %s", length, facts.backend, facts.mode, facts.path)
            if not is_known:
                events.connected()

        def crashing(self, error: Exception) -> None:
            if survives:
                events.flush()
                takeover.crash(error)

        def release_nodes(self) -> bool:
            attachment.close(store, address, os.getpid())
            return True

    def claimed() -> None:
        device.is_unsettled = True
        interrupts.wake()

    claim = Claim(disk.backend, claimed)
    stack.callback(claim.stop)
    with Interrupts(hangup_resizes=True).installed() as interrupts:
        device = AdoptedDevice(
            store,
            hypervisor,
            address,
            disk,
            options=spec.queue_options,
            max_queues=spec.queues,
            on_failure=takeover.crash if survives else interrupts.fail,
            on_resizing=lambda size: own_record.update(resizing=size),
            on_resize=lambda size: own_record.update(size=size, resizing=None),
            journals=own_record.journals,
            adopts=adopts,
            open_queue=processes.open_queue if processes is not None else Queue,
            claim=claim if arrives else None,
        )
        session = Session(
            store,
            device,
            vdev,
            interrupts,
            patience=None,
            is_known=is_known,
        )
        try:
            with control:
                outcome = session.run(Life())
        except Exception as error:
            events.detached(str(error), is_failure=True)
            raise
        finally:
            own_record.close()
    events.detached(outcome.value)
    log.info("%s", outcome.value)


def _is_closing(store: Store, address: Address) -> bool:
    return _state(store, address) is State.CLOSING


def _state(store: Store, address: Address) -> State | None:
    return State.parse(store.read(f"{address.backend}/state"))


def _claimed(env: Environment, store: Store, address: Address, queues: int) -> Record:
    """Claim the record; a process that served the device until now may take a moment to end.

    Raises:
        DeviceTaken: another process serves it.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return Record(env.record_directory, address, queues)
        except DeviceTaken:
            if store.exists(f"{address.backend}/{PID_KEY}") or time.monotonic() >= deadline:
                raise


def _answer_orphan(env: Environment, store: Store, address: Address) -> None:
    """Answer, with errors, what the guest waits for; after that, libxl continues."""
    path = f"{address.frontend}/state"

    def closed() -> bool:
        return State.parse(store.read(path)) in (None, State.CLOSED, State.INITIALISING)

    with _claim(env, address) as record:
        died = int(store.read(f"{address.backend}/{PID_KEY}") or 0)
        log.info("answering with errors the requests that process %d did not answer", died)
        with stand_in(store, env.open_hypervisor, address, record.journals):
            if not until(store, path, closed, _PATIENCE):
                log.warning("the guest does not release the disk")
                return
        attachment.close(store, address, died)


def _claim(env: Environment, address: Address) -> Record:
    """Claim the record of the process, or make one if it cannot be read.

    Raises:
        DeviceTaken: it lives.
    """
    try:
        return Record.adopt(env.record_directory, address)
    except DeviceError:
        return Record(env.record_directory, address)
