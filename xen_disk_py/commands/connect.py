"""``connect``: give a guest a disk until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import privileges, toolstack
from ..device import Device
from ..disk import Disk
from ..environment import Environment
from ..errors import BackendError, DeviceTaken
from ..exit_status import ExitStatus
from ..grants import Grants
from ..hypervisor import Hypervisor
from ..privileges import User
from ..queue import Options
from ..record import Record
from ..session import Interrupts, Outcome, Session
from ..statistics import Statistics, histogram
from ..systemd import notify
from ..toolstack import Domain
from ..units import format_size
from ..vdev import VirtualDevice, parse
from ..xenbus import Address
from ..xenstore import Store
from .backend_arguments import backend_from, backend_name

log = logging.getLogger("xen_disk_py")

_SPARE_CONNECTIONS = 4  # to xenstore: for a forced end, and a xenstored that stalls now and then


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Open the image, find the guest, attach, serve, clean up."""
    wanted = parse(args.vdev) if args.vdev is not None else None
    user = privileges.find_user(args.user) if args.user is not None else None
    if user is not None:
        privileges.forbid_gains()  # before a backend starts a thread
    if args.cdrom:
        args.read_only = True
    disk = Disk(backend_from(args))
    try:
        with env.open_store() as store, opened_hypervisor(env) as hypervisor:
            domain = toolstack.find_domain(store, args.vm)
            with Interrupts(hangup_resizes=not env.in_terminal).installed() as interrupts:
                connection = _Connection(args, env, store, hypervisor, domain, disk, user)
                return connection.serve(wanted, interrupts)
    finally:
        disk.close()


@contextmanager
def opened_hypervisor(env: Environment) -> Iterator[Hypervisor]:
    """Open the hypervisor; a page that a backend keeps does not change how the command ends."""
    hypervisor = env.open_hypervisor()
    try:
        yield hypervisor
    finally:
        try:
            hypervisor.close()
        except BackendError as error:
            log.warning("%s", error)


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
    ) -> None:
        self._args = args
        self._env = env
        self._store = store
        self._hypervisor = hypervisor
        self._domain = domain
        self._disk = disk
        self._user = user
        self._backend = backend_name(args)

    def serve(self, wanted: VirtualDevice | None, interrupts: Interrupts) -> ExitStatus:
        """Serve as ``wanted``, or as the first free device."""
        kind = toolstack.choose_kind(self._store, self._domain.domid, self._env.xen_version())
        own = toolstack.own_domid(self._store)
        if self._args.cdrom:
            self._warn_of_cdrom()
        if self._user is not None:
            self._store.reserve(_SPARE_CONNECTIONS)
            self._hypervisor.reserve(self._domain.domid, self._args.queues)
        for attempt in range(20):
            vdev = wanted or toolstack.free_device(self._store, self._domain.domid)
            address = Address(own, self._domain.domid, vdev.number, kind)
            try:
                return self._serve_as(vdev, address, interrupts)
            except DeviceTaken:
                if wanted:
                    raise
                # somebody was quicker between our look and our transaction: look again
                time.sleep(0.01 * attempt)
        raise DeviceTaken("every free device was taken by somebody else at once; try again")

    def _serve_as(
        self, vdev: VirtualDevice, address: Address, interrupts: Interrupts
    ) -> ExitStatus:
        args, env, disk = self._args, self._env, self._disk
        with Record(env.record_directory, address) as record:
            disk.statistics = record.statistics
            facts = self._facts(vdev)
            record.describe(facts)

            def note_size(size: int) -> None:
                facts["size"] = size
                record.describe(facts)

            device = Device(
                self._store,
                self._hypervisor,
                address,
                disk,
                options=Options(
                    args.indirect_segments, Grants(args.grants), args.persistent_grants
                ),
                max_queues=args.queues,
                cdrom=args.cdrom,
                on_failure=interrupts.fail,
                on_resize=note_size,
            )
            session = Session(self._store, device, vdev, interrupts, patience=args.timeout)
            status_line = _StatusLine(env, vdev, disk.statistics)
            live = not args.quiet and env.stderr.isatty()

            def attach() -> None:
                toolstack.attach(
                    self._store,
                    address,
                    vdev,
                    backend_keys=device.keys(),
                    params=f"{self._backend}:{facts['path'] or ''}",
                    read_only=disk.read_only,
                    cdrom=args.cdrom,
                    pid=os.getpid(),
                )

            try:
                outcome = session.run(
                    attach,
                    on_attached=self._give_up_privileges,
                    on_connected=lambda: self._announce(facts),
                    on_tick=status_line.show if live else None,
                    on_unplug=lambda: self._say_unplugging(vdev, status_line),
                )
            finally:
                status_line.clear()
            env.tell(f"{vdev}: {outcome.value}")
            if not args.quiet:
                for line in summary(disk.statistics):
                    env.tell(line)
        return ExitStatus.INTERRUPTED if outcome is Outcome.FORCED else ExitStatus.OK

    def _give_up_privileges(self) -> None:
        if self._user is not None:
            privileges.become(self._user)

    def _warn_of_cdrom(self) -> None:
        kind = self._store.read(f"/libxl/{self._domain.domid}/type")
        if kind in ("pvh", "hvm"):
            self._env.tell(
                f"{self._domain} is a {kind.upper()} guest: Linux does not take a CD-ROM there; "
                "if it does not connect, use --read-only in place of --cdrom"
            )

    def _facts(self, vdev: VirtualDevice) -> dict[str, Any]:
        path = self._args.path
        return {
            "domid": self._domain.domid,
            "domain": self._domain.name,
            "vdev": vdev.name,
            "number": vdev.number,
            "device": vdev.guest_device,
            "size": self._disk.backend.size,
            "backend": self._backend,
            "path": os.path.abspath(path) if path else None,
            "mode": "ro" if self._disk.read_only else "rw",
            "pid": os.getpid(),
        }

    def _announce(self, facts: dict[str, Any]) -> None:
        notify("READY=1", "STATUS={vdev} of {domain}".format(**facts))
        if self._args.json:
            self._env.say(json.dumps(facts))
        else:
            self._env.say(
                "{vdev} {number} {device} {length} {backend} {mode}".format(
                    length=format_size(facts["size"]), **facts
                )
            )
        if self._backend == "cow":
            self._env.tell(
                "changes are kept in memory and vanish when the disk is disconnected; "
                "to keep them in the image: --backend raw"
            )

    def _say_unplugging(self, vdev: VirtualDevice, status_line: _StatusLine) -> None:
        notify("STOPPING=1")
        status_line.clear()
        self._env.tell(
            f"{vdev}: asked the guest to let go (an older Linux waits until nothing there uses "
            "the disk); Ctrl-C again to force"
        )


class _StatusLine:
    """One line on a terminal that says what is going on."""

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
        if counters["memory"]:
            text += f", {format_size(counters['memory'])} changed"
        self._env.stderr.write(f"\r\x1b[K{text}")
        self._env.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._env.stderr.write("\r\x1b[K")
            self._env.stderr.flush()
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
    lines += histogram("requests per look at the ring", statistics.requests_per_batch)
    return lines
