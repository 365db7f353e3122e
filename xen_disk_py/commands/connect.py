"""``connect``: give a guest a disk until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

from ..datapath.disk import Disk
from ..datapath.statistics import Statistics, histogram
from ..errors import DeviceTaken, UsageError
from ..exit_status import ExitStatus
from ..host import privileges
from ..host.logs import about
from ..host.privileges import User
from ..host.systemd import notify
from ..hypervisor import Hypervisor
from ..recovery import orphans, temporary
from ..recovery.record import Record
from ..session import Interrupts, Observer, Outcome, Session
from ..units import format_size
from ..xenbus import other_backends, toolstack
from ..xenbus.device import Device
from ..xenbus.states import Address
from ..xenbus.toolstack import Domain
from ..xenbus.vdev import VirtualDevice, parse
from ..xenbus.xenstore import Store
from . import succession, supervision
from .backend_arguments import backend_from, backend_name
from .environment import Environment
from .opening import TOLD, facts_about, facts_of_start, opened_hypervisor, queue_options
from .succession import Left
from .upgrading import Upgrade, dry_run

log = logging.getLogger("xen_disk_py")

_SPARE_CONNECTIONS = 4  # to xenstore: for a forced end, and a xenstored that stalls now and then


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Open the image, find the guest, attach, serve, clean up; or take over another's disk."""
    if args.adopt != (args.device is not None):
        raise UsageError("VM VDEV goes with --adopt; the name of a new disk goes with --vdev")
    for name in ("path", "format", "backend", "overlay", "vdev", "user"):
        if args.adopt and getattr(args, name) is not None:
            raise UsageError(f"--adopt takes the arguments that there were: no --{name}")
    if args.rehearse:
        return dry_run(env)
    name = args.device if args.device is not None else args.vdev
    wanted = parse(name) if name is not None else None
    if args.supervise:
        return supervision.supervise(args, env)
    args.leave |= args.recover
    if args.recover and not args.adopt:
        args.adopt = _is_to_recover(args, env, wanted)
    if args.adopt and wanted is not None:
        return _take_over(args, env, wanted)
    with ExitStack() as stack:
        stack.callback(_remove_temporary, args)
        connection = _open(args, env, stack)
        if args.leave and not connection.disk.backend.survives:
            raise UsageError(
                f"a {backend_name(args)} disk ends with its process, so that no other can take "
                "it over: leave out --supervise and --recover, or use another backend (one of your "
                "own whose data is kept elsewhere says so: survives = True)"
            )
        return connection.serve(wanted)


def _is_to_recover(
    args: argparse.Namespace, env: Environment, wanted: VirtualDevice | None
) -> bool:
    if wanted is None:
        env.tell("without --vdev there is nothing to --recover by: this connects a new disk")
        return False
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        return succession.is_left(env, store, domain, wanted.number)


def _take_over(args: argparse.Namespace, env: Environment, vdev: VirtualDevice) -> ExitStatus:
    """Serve on what a process that was killed has left."""
    with ExitStack() as stack:
        try:
            with env.open_store() as store:
                left = succession.take(env, store, args.vm, vdev)
            if left is None:
                return ExitStatus.OK
            stack.callback(left.record.leave)  # unless it comes to its end here
            for name in ("vm", "leave", "again", "json", "quiet", "adopt"):
                setattr(left.arguments, name, getattr(args, name))
            connection = _open(left.arguments, env, stack, left.domain)
            succession.check_size(left.record.facts, str(vdev), connection.disk.backend)
            connection.take_over(left)
        except succession.PASSING as error:
            if not args.leave:
                raise
            log.error("%s", error)  # whoever started us tries again
            return ExitStatus.CRASHED
        try:
            return connection.serve_on(left)
        finally:
            if left.record.is_closed:
                _remove_temporary(left.arguments)


def _remove_temporary(args: argparse.Namespace) -> None:
    if args.scratch:
        temporary.remove(args.overlay)  # unless we have become somebody else: then our parent does


def _open(
    args: argparse.Namespace, env: Environment, stack: ExitStack, domain: Domain | None = None
) -> _Connection:
    """Open all that a disk needs; what is wrong with the command line comes to light first."""
    user = privileges.find_user(args.user) if args.user is not None else None
    if user is not None:
        privileges.forbid_gains()  # before a backend starts a thread
    if args.cdrom:
        args.read_only = True
    disk = Disk(backend_from(args), holds=args.on_error == "hold")
    stack.callback(disk.close)
    if args.no_discard:
        disk.can_discard = disk.can_discard_securely = False
    store = stack.enter_context(env.open_store())
    other_backends.check(store, disk.backend.storage, force=args.force)
    if not args.adopt:
        orphans.check(env.record_directory, disk.backend.storage, force=args.force)
    hypervisor = stack.enter_context(opened_hypervisor(env))
    domain = domain or toolstack.find_domain(store, args.vm)
    interrupts = stack.enter_context(Interrupts(hangup_resizes=not env.in_terminal).installed())
    return _Connection(args, env, store, hypervisor, domain, disk, user, interrupts)


class _Connection:
    """One run of the command, once everything it needs is open."""

    def __init__(
        self,
        args: argparse.Namespace,
        env: Environment,
        store: Store,
        hypervisor: Hypervisor,
        domain: Domain,
        disk: Disk,
        user: User | None,
        interrupts: Interrupts,
    ) -> None:
        self.disk = disk
        self._args = args
        self._env = env
        self._store = store
        self._hypervisor = hypervisor
        self._domain = domain
        self._user = user
        self._interrupts = interrupts
        self._backend = backend_name(args)

    def serve(self, wanted: VirtualDevice | None) -> ExitStatus:
        """Serve as ``wanted``, or as the first free device."""
        kind = toolstack.choose_kind(self._store, self._domain.domid, self._env.xen_version())
        own = toolstack.own_domid(self._store)
        if self._args.cdrom:
            self._warn_of_cdrom()
        for attempt in range(20):
            vdev = wanted or toolstack.free_device(self._store, self._domain.domid)
            address = Address(own, self._domain.domid, vdev.number, kind)
            try:
                with Record(
                    self._env.record_directory,
                    address,
                    self._args.queues,
                    is_attached=partial(toolstack.is_attached, self._store, address),
                ) as record:
                    return self._serve(vdev, address, record)
            except DeviceTaken:
                if wanted:
                    raise
                # somebody was quicker between our look and our transaction: look again
                time.sleep(0.01 * attempt)
        raise DeviceTaken("every free device was taken by somebody else at once; try again")

    def take_over(self, left: Left) -> None:
        """Say in xenstore, and to whoever started us, who serves what another process has left."""
        name = toolstack.disk_name(self._store, left.disk.address)
        notify(f"X_DEVICE={self._domain.domid} {left.disk.device}", f"X_NAME={name}")
        toolstack.pass_on(self._store, left.disk.address, os.getpid())

    def serve_on(self, left: Left) -> ExitStatus:
        """Serve what another process has left."""
        return self._serve(left.disk.device, left.disk.address, left.record, left.record.facts)

    def _serve(
        self,
        vdev: VirtualDevice,
        address: Address,
        record: Record,
        before: Mapping[str, Any] = MappingProxyType({}),
    ) -> ExitStatus:
        """Serve until the end.

        Args:
            vdev: the device.
            address: where its nodes are.
            record: its record; closed at the end.
            before: the facts about the process that we follow.
        """
        args, env, disk = self._args, self._env, self.disk
        if self._user is not None:
            self._store.reserve(_SPARE_CONNECTIONS)
            self._hypervisor.reserve(self._domain.domid, args.queues)
        disk.statistics = record.statistics
        is_known = bool(before.get("connected"))
        record.describe({**facts_about(args, self._domain, vdev, disk), "connected": is_known})
        device = Device(
            self._store,
            self._hypervisor,
            address,
            disk,
            options=queue_options(args),
            max_queues=args.queues,
            cdrom=args.cdrom,
            on_failure=succession.crash if args.leave else self._interrupts.fail,
            # Noted before the storage is changed: if we are killed in between, a successor must
            # not take a disk that is shorter for one that was damaged.
            on_resizing=lambda size: record.describe({**record.facts, "resizing": size}),
            on_resize=lambda size: record.describe(
                {**record.facts, "size": size, "resizing": None}
            ),
            journals=record.journals,
            adopts=args.adopt,
        )
        status_line = _StatusLine(env, vdev, disk.statistics)
        live = not args.quiet and env.err.isatty()
        successor = Upgrade(args, self._domain, vdev, record, status_line.clear)
        session = Session(
            self._store,
            device,
            vdev,
            self._interrupts,
            patience=args.timeout,
            is_known=is_known,
        )

        connection, name = self, toolstack.disk_name(self._store, address)

        class Life(Observer):
            wants_ticks = live

            def attach(self) -> None:
                if args.adopt:
                    return
                # whoever starts another process if this one dies must know which disk it is
                notify(f"X_DEVICE={connection._domain.domid} {vdev}", f"X_NAME={name}")
                toolstack.attach(
                    connection._store,
                    address,
                    vdev,
                    backend_keys=device.keys(),
                    params=f"{connection._backend}:{record.facts['path'] or ''}",
                    read_only=disk.read_only,
                    cdrom=args.cdrom,
                    pid=os.getpid(),
                )

            def attached(self) -> None:
                if connection._user is not None:
                    privileges.become(connection._user)

            def serving(self) -> None:
                record.describe({**record.facts, **facts_of_start(before.get("let_go"))})

            def connected(self) -> None:
                connection._announce(record)

            def tick(self) -> None:
                status_line.show()

            def unplugging(self) -> None:
                connection._say_unplugging(vdev, status_line)

            def upgrade_requested(self) -> None:
                successor.take_over()

            def crashing(self, error: Exception) -> None:
                if args.leave:
                    succession.crash(error)

        try:
            with about(name):
                outcome = session.run(Life())
        finally:
            status_line.clear()
            record.close()
        env.tell(f"{vdev}: {outcome.value}")
        if not args.quiet:
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

    def _announce(self, record: Record) -> None:
        record.describe({**record.facts, "connected": True})
        facts = record.facts
        notify("READY=1", "STATUS={vdev} of {domain}".format(**facts))
        if self._args.again:
            self._env.tell("{vdev}: process {pid} takes over".format(**facts))
            return
        if self._args.json:
            self._env.announce(json.dumps({name: facts[name] for name in TOLD}))
        else:
            self._env.announce(
                "{vdev} {number} {device} {length} {backend} {mode}".format(
                    length=format_size(facts["size"]), **facts
                )
            )
        if self._backend == "cow" or self._args.scratch:
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
