"""``connect``: give a guest a disk until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from ..backends.filter import succeeding
from ..backends.sharing import Storage, storage_of_files
from ..datapath.disk import Disk
from ..datapath.queue import Queue
from ..datapath.statistics import Statistics, histogram
from ..errors import DeviceTaken, UsageError, XenDiskError
from ..exit_status import ExitStatus
from ..host import memory, privileges
from ..host.logs import about
from ..host.privileges import User
from ..host.program import own_command
from ..host.systemd import notify, notify_starting
from ..hypervisor import Hypervisor
from ..recovery import orphans, record, takeover, temporary, verbs
from ..recovery.control import Control
from ..recovery.events import Events
from ..recovery.facts import Facts, pause_since
from ..recovery.record import Record
from ..recovery.role import Role
from ..recovery.spec import DiskSpec
from ..recovery.takeover import Gone, Orphan
from ..recovery.upgrade import Upgrade, check_takeover
from ..session import Interrupts, Observer, Outcome, Session
from ..units import format_size
from ..xenbus import other_backends, toolstack
from ..xenbus.device import Device
from ..xenbus.states import Address
from ..xenbus.toolstack import Domain
from ..xenbus.vdev import VirtualDevice, parse
from ..xenbus.xenstore import Store
from . import queue_processes
from .backend_arguments import is_cow, spec_from
from .environment import Environment
from .signals import ended_though_it_hangs

if TYPE_CHECKING:
    from ..datapath.processes import QueueProcesses

log = logging.getLogger("xen_disk_py")

_SPARE_CONNECTIONS = 4  # to xenstore: for a forced end, and a xenstored that stalls now and then
_TALK = ("--debug", "--quiet", "-q")  # options that a process passes on to those that follow it


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Open the image, find the guest, attach, serve, clean up; or take over from another."""
    if args.adopt != (args.device is not None):
        raise UsageError("VM VDEV goes with --adopt; the name of a new disk goes with --vdev")
    for name in ("path", "format", "backend", "overlay", "vdev", "user"):
        if args.adopt and getattr(args, name) is not None:
            raise UsageError(f"--adopt takes a disk over with the options that it had: no --{name}")
    role: Role = args.role
    if role.tries:
        return _try(env)
    name = args.device if args.device is not None else args.vdev
    wanted = parse(name) if name is not None else None
    if args.supervise:
        return _supervise(args, env)
    notify_starting()  # all is imported
    role = role._replace(leaves=role.leaves or args.recover)
    adopts = args.adopt or (args.recover and _is_to_recover(args, env, wanted))
    if adopts and wanted is not None:
        return _take_over(args, env, role, wanted)
    with ExitStack() as stack:
        if role.temporary is not None:
            stack.callback(temporary.remove, role.temporary)  # else, if we may not, our parent does
        with ended_though_it_hangs(env, args.path):
            spec = spec_from(args, role.temporary)
        if role.temporary is not None and spec.cow_limit is None:
            spec = spec._replace(cow_limit=memory.room() // 2)
        connection = _open(args, env, role, spec, stack, wanted=wanted)
        if role.leaves and not connection.disk.backend.survives:
            raise UsageError(
                f"a {spec.backend_name} disk ends with its process, so that no other can take it "
                "over: leave out --supervise and --recover, or use another backend (one of your "
                "own whose data is kept elsewhere says so: survives = True)"
            )
        return connection.serve(wanted)


def _try(env: Environment) -> ExitStatus:
    """See whether we could take over the disk that is described on stdin."""
    spec = check_takeover(env.stdin.read() if env.stdin is not None else "")
    if spec.user is None:
        env.open_store().close()
        env.open_hypervisor().close()
    return ExitStatus.OK


def _supervise(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Have a process serve the disk, and another if that one dies."""
    from ..recovery import supervisor

    words = [word for word in args.words if word != "--supervise"]
    at = words.index("connect") + 1
    talk = [word for word in _TALK if word in words]
    # Private memory would die with a process, a file in memory does not.
    file = temporary.new_path() if not args.adopt and is_cow(args) else None
    first = Role(leaves=True, temporary=file)
    again = Role(leaves=True, succeeds=True)

    def command(device: str) -> Sequence[str]:
        return own_command("connect", *talk, *again.words(), "--adopt", *device.split())

    return supervisor.supervise(
        own_command(*words[:at], *first.words(), *words[at:]),
        command,
        watchdog=args.watchdog,
        records=env.record_directory,
        temporary=file if not args.adopt else _temporary_of(args, env),
    )


def _temporary_of(args: argparse.Namespace, env: Environment) -> str | None:
    """Name the temporary overlay of a disk to be adopted; a worker says what is wrong."""
    try:
        with env.open_store() as store:
            domain = toolstack.find_domain(store, args.vm)
    except XenDiskError:
        return None
    address = Address(0, domain.domid, parse(args.device).number, "")
    found = record.find(env.record_directory, address)
    return found.facts.temporary if found is not None and found.facts is not None else None


def _is_to_recover(
    args: argparse.Namespace, env: Environment, wanted: VirtualDevice | None
) -> bool:
    if wanted is None:
        env.tell("without --vdev there is nothing to --recover by: this connects a new disk")
        return False
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        return takeover.is_orphan(env.record_directory, store, domain, wanted.number)


def _take_over(
    args: argparse.Namespace, env: Environment, role: Role, vdev: VirtualDevice
) -> ExitStatus:
    """Serve the disk of a process that was killed."""
    with ExitStack() as stack:
        try:
            with env.open_store() as store:
                orphan = takeover.take(env.record_directory, store, args.vm, vdev, force=args.force)
            stack.callback(orphan.record.leave)  # unless it comes to its end here
            facts, spec = orphan.record.facts, orphan.spec
            if spec.temporary is not None and spec.user is not None and not role.leaves:
                raise UsageError(
                    f"{vdev} keeps its changes in memory, and {spec.user} cannot remove them at "
                    "the end: have a parent do that: xen-disk connect --adopt "
                    f"{orphan.domain.domid} {vdev} --supervise"
                )
            connection = _open(args, env, role, spec, stack, orphan.domain)
            takeover.check_size(facts, str(vdev), connection.disk.backend)
            connection.take_over(orphan)
        except Gone as gone:
            env.tell(f"{vdev}: {gone}")
            return ExitStatus.OK
        except takeover.PASSING as error:
            if not role.leaves:
                raise
            log.error("%s", error)  # whoever started us tries again
            return ExitStatus.CRASHED
        try:
            return connection.serve_orphan(orphan)
        finally:
            if orphan.record.is_closed and spec.temporary is not None:
                temporary.remove(spec.temporary)


def _open(
    args: argparse.Namespace,
    env: Environment,
    role: Role,
    spec: DiskSpec,
    stack: ExitStack,
    domain: Domain | None = None,
    wanted: VirtualDevice | None = None,
) -> _Connection:
    """Open all that a disk needs, the disk last: to open one for writing may change it.

    What is wrong with the command line comes to light first. With ``domain`` the disk is one to be
    taken over from another process.
    """
    is_new = domain is None
    user = privileges.find_user(spec.user) if spec.user is not None else None
    spec.check_backend()
    store = stack.enter_context(env.open_store())
    hypervisor = stack.enter_context(env.hypervisor())
    if domain is None:
        domain = toolstack.find_domain(store, args.vm)
        if wanted is not None:
            record.refuse_orphan(env.record_directory, Address(0, domain.domid, wanted.number, ""))
            toolstack.check_free(store, domain.domid, wanted)
    if user is not None:
        privileges.forbid_gains()  # before a thread is started
    with ended_though_it_hangs(env, spec.shown_path or spec.backend_name):
        changing = _changed_by_opening(spec) if is_new else []
        if changing:
            other_backends.check(store, changing, force=spec.force)
            orphans.check(env.record_directory, changing, force=spec.force, store=store)
        with nullcontext() if is_new else succeeding():
            disk = spec.open_disk()
        stack.callback(disk.close)
        if is_new:
            env.tell_all(disk.backend.notes)
        notify_starting()  # the longest step of some disks
        other_backends.check(store, disk.backend.host_storage, force=spec.force)
        if is_new:
            orphans.check(
                env.record_directory, disk.backend.host_storage, force=spec.force, store=store
            )
    notify_starting()
    interrupts = stack.enter_context(Interrupts(hangup_resizes=not env.in_terminal).installed())
    return _Connection(args, env, role, spec, store, hypervisor, domain, disk, user, interrupts)


def _changed_by_opening(spec: DiskSpec) -> list[Storage]:
    """Say what a disk is in whose files change, or are made, as soon as it is opened."""
    if spec.overlay is not None:
        images = [spec.path] if spec.path is not None else []
        return [
            *storage_of_files([spec.overlay], writable=True),
            *storage_of_files(images, writable=False),
        ]
    if spec.backend_name == "qemu" and spec.path is not None and not spec.read_only:
        return storage_of_files([spec.path], writable=True)
    return []


class _Connection:
    """One run of the command, once everything it needs is open; of ``args``, only how it talks."""

    def __init__(
        self,
        args: argparse.Namespace,
        env: Environment,
        role: Role,
        spec: DiskSpec,
        store: Store,
        hypervisor: Hypervisor,
        domain: Domain,
        disk: Disk,
        user: User | None,
        interrupts: Interrupts,
    ) -> None:
        self.disk = disk
        self._json: bool = args.json
        self._quiet: bool = args.quiet
        self._talk = [word for word in _TALK if word in args.words]
        self._env = env
        self._role = role
        self._spec = spec
        self._store = store
        self._hypervisor = hypervisor
        self._domain = domain
        self._user = user
        self._interrupts = interrupts

    def serve(self, wanted: VirtualDevice | None) -> ExitStatus:
        """Serve as ``wanted``, or as the first free device."""
        kind = toolstack.choose_kind(self._store, self._domain.domid, self._env.xen_version())
        own = toolstack.own_domid(self._store)
        if self._spec.cdrom:
            self._warn_of_cdrom()
        for attempt in range(20):
            vdev = wanted or toolstack.free_device(self._store, self._domain.domid)
            address = Address(own, self._domain.domid, vdev.number, kind)
            try:
                with Record(
                    self._env.record_directory,
                    address,
                    self._spec.queues,
                    is_attached=partial(toolstack.is_attached, self._store, address),
                ) as record:
                    return self._serve(vdev, address, record)
            except DeviceTaken:
                if wanted:
                    raise
                # somebody was quicker between our look and our transaction: look again
                time.sleep(0.01 * attempt)
        raise DeviceTaken("every free device was taken by somebody else at once; try again")

    def take_over(self, orphan: Orphan) -> None:
        """Say in xenstore, and to whoever started us, that we serve an orphan now."""
        name = toolstack.disk_name(self._store, orphan.disk.address)
        notify(f"X_DEVICE={self._domain.domid} {orphan.disk.device}", f"X_NAME={name}")
        toolstack.pass_on(self._store, orphan.disk.address, os.getpid())

    def serve_orphan(self, orphan: Orphan) -> ExitStatus:
        """Serve the disk of another process."""
        disk, record = orphan.disk, orphan.record
        return self._serve(disk.device, disk.address, record, record.facts)

    def _serve(
        self, vdev: VirtualDevice, address: Address, record: Record, before: Facts | None = None
    ) -> ExitStatus:
        """Serve until the end.

        Args:
            vdev: the device.
            address: where its nodes are.
            record: its record; closed at the end.
            before: about the process that we follow; None: we follow none.
        """
        with ExitStack() as stack:
            self.disk.statistics = record.statistics
            name = toolstack.disk_name(self._store, address)
            stack.enter_context(about(name))  # what the queues' processes log, too
            processes = queue_processes.start(
                self._env,
                self._spec,
                self.disk,
                record,
                self._hypervisor,
                self._domain.domid,
                name,
                stack,
                adopts=before is not None,
                user=self._user,
                crash=takeover.crash if self._role.leaves else None,
                interrupts=self._interrupts,
            )
            return self._serve_queues(vdev, address, record, before, processes)

    def _serve_queues(
        self,
        vdev: VirtualDevice,
        address: Address,
        record: Record,
        before: Facts | None,
        processes: QueueProcesses | None,
    ) -> ExitStatus:
        env, disk, role, spec = self._env, self.disk, self._role, self._spec
        if self._user is not None:
            self._store.reserve(_SPARE_CONNECTIONS)
            if processes is None:
                self._hypervisor.reserve(self._domain.domid, spec.queues)
        is_known = before is not None and before.connected
        released_at = before.released_at if before is not None else None
        queues = processes.identities if processes is not None else ()
        facts = Facts.about(
            spec,
            self._domain,
            vdev,
            disk,
            connected=is_known,
            queues=queues,
            released_at=released_at,
        )
        if self._user is not None:
            record.seal(facts)
        record.describe(facts)
        device = Device(
            self._store,
            self._hypervisor,
            address,
            disk,
            options=spec.queue_options,
            max_queues=spec.queues,
            cdrom=spec.cdrom,
            on_failure=takeover.crash if role.leaves else self._interrupts.fail,
            # Noted before the storage is changed: if we are killed in between, a successor must
            # not take a disk that is shorter for one that was damaged.
            on_resizing=lambda size: record.update(resizing=size),
            on_resize=lambda size: record.update(size=size, resizing=None),
            journals=record.journals,
            adopts=before is not None,
            open_queue=processes.open_queue if processes is not None else Queue,
        )
        status_line = _StatusLine(env, vdev, disk.statistics)
        live = not self._quiet and env.err.isatty()
        successor = Upgrade(
            role,
            self._talk,
            spec.user,
            self._domain,
            vdev,
            record,
            status_line.clear,
            lambda: self._interrupts.asked,
            env.err.handed_over,
            processes.end if processes is not None else None,
        )
        session = Session(
            self._store,
            device,
            vdev,
            self._interrupts,
            patience=spec.timeout,
            is_known=is_known,
        )

        connection, name = self, toolstack.disk_name(self._store, address)
        control = Control(record)
        verbs.register(control, disk, record)
        events = Events(record, disk, env.journal)

        class Life(Observer):
            wants_ticks = live

            def attach(self) -> None:
                if before is not None:
                    return
                # whoever starts another process if this one dies must know which disk it is
                notify(f"X_DEVICE={connection._domain.domid} {vdev}", f"X_NAME={name}")
                toolstack.attach(
                    connection._store,
                    address,
                    vdev,
                    backend_keys=device.keys(),
                    params=f"{spec.backend_name}:{spec.shown_path or ''}",
                    read_only=disk.read_only,
                    cdrom=spec.cdrom,
                    pid=os.getpid(),
                )

            def attached(self) -> None:
                if connection._user is not None:
                    privileges.become(connection._user)
                if before is None:
                    events.attached()

            def serving(self) -> None:
                control.start()
                pause = pause_since(released_at)
                record.update(started=time.time(), pause=pause, released_at=None)
                if before is not None:
                    events.taken_over(pause)

            def connected(self) -> None:
                connection._announce(record, address.kind)
                if not is_known:
                    events.connected()

            def tick(self) -> None:
                status_line.show()

            def unplugging(self) -> None:
                connection._say_unplugging(vdev, status_line)

            def upgrade_requested(self) -> None:
                events.flush()
                successor.take_over()

            def crashing(self, error: Exception) -> None:
                if role.leaves:
                    events.flush()
                    takeover.crash(error)

        try:
            with control:
                outcome = session.run(Life())
        except Exception as error:
            events.detached(str(error), is_failure=True)
            raise
        finally:
            status_line.clear()
            record.close()
        events.detached(outcome.value, is_failure=outcome is Outcome.FORCED)
        env.tell(f"{vdev}: {outcome.value}")
        if not self._quiet:
            for line in summary(disk.statistics):
                env.tell(line)
        return ExitStatus.INTERRUPTED if outcome is Outcome.FORCED else ExitStatus.OK

    def _warn_of_cdrom(self) -> None:
        kind = self._store.read(f"/libxl/{self._domain.domid}/type")
        if kind in ("pvh", "hvm"):
            self._env.tell(
                f"{self._domain} is a {kind.upper()} guest: Linux does not take a CD-ROM there; "
                "if it does not connect, use --read-only in place of --cdrom"
            )

    def _announce(self, record: Record, kind: str) -> None:
        record.update(connected=True)
        facts = record.facts
        notify("READY=1", f"STATUS={facts.vdev} of {facts.domain}")
        if self._role.succeeds:
            self._env.tell(f"{facts.vdev}: process {facts.pid} takes over")
            return
        if self._json:
            self._env.announce(json.dumps(facts.told()))
        else:
            self._env.announce(
                f"{facts.vdev} {facts.number} {facts.device} {format_size(facts.size)} "
                f"{facts.backend} {facts.mode}"
            )
        version = self._env.xen_version()
        if version is not None and not toolstack.can_xl_detach(kind, version):
            self._env.tell(
                f"xl block-detach of Xen {version[0]}.{version[1]} cannot take a disk away from a "
                "guest with a QEMU of its own; use: xen-disk disconnect "
                f"{self._domain.domid} {facts.vdev}"
            )
        if facts.backend == "cow" or self._spec.is_temporary:
            self._env.tell(
                "changes are kept in memory and vanish when the disk is disconnected; to keep "
                "them beside the image: --overlay FILE; in the image: --backend raw"
            )

    def _say_unplugging(self, vdev: VirtualDevice, status_line: _StatusLine) -> None:
        notify("STOPPING=1")
        status_line.clear()
        held = self.disk.statistics.as_dict()["held"]
        self._env.tell(
            f"{vdev}: asked the guest to release the disk, but the storage fails and {held} "
            "requests are queued for retry; Ctrl-C again answers them with errors"
            if held
            else f"{vdev}: asked the guest to release the disk (an older Linux waits until "
            "nothing there uses it); Ctrl-C again to force"
        )


class _StatusLine:
    """One line on a terminal that says what happens."""

    def __init__(self, env: Environment, vdev: VirtualDevice, statistics: Statistics) -> None:
        self._env = env
        self._vdev = vdev
        self._statistics = statistics
        self._shown = False
        self._before = (time.monotonic(), 0, 0)

    def show(self) -> None:
        """Draw the line anew, unless the last one is too fresh to compute a rate."""
        now = time.monotonic()
        then, requests_then, bytes_then = self._before
        if now - then < 0.4:
            return
        counters = self._statistics.as_dict()
        requests = counters["requests"]
        moved = counters["bytes_read"] + counters["bytes_written"]
        self._before = (now, requests, moved)
        elapsed = now - then
        text = (
            f"{self._vdev}: {requests} requests, {(moved - bytes_then) / elapsed / 1e6:.1f} MB/s, "
            f"{(requests - requests_then) / elapsed:.0f} IOPS, {counters['in_flight']} in flight"
        )
        if counters["held"]:
            text += f", {counters['held']} held"
        if counters["memory"]:
            text += f", {format_size(counters['memory'])} changed"
        self._env.draw(text)
        self._shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._env.draw("")
            self._shown = False


def summary(statistics: Statistics) -> list[str]:
    """Say in a few lines what a disk has done."""
    c = statistics.as_dict()
    lines = [
        f"reads     {c['reads']:>10}  {format_size(c['bytes_read'])}",
        f"writes    {c['writes']:>10}  {format_size(c['bytes_written'])}",
        f"flushes   {c['flushes']:>10}",
        f"discards  {c['discards']:>10}  {format_size(c['bytes_discarded'])}",
        f"refused   {c['refused']:>10}",
        f"errors    {c['errors']:>10}",
    ]
    lines += histogram("segments per request", statistics.segments_per_request)
    lines += histogram("requests per batch", statistics.requests_per_batch)
    return lines
