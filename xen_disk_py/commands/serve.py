"""``serve``: the disks that guests' configurations ask for, each in a process of its own."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import subprocess

from ..errors import XenDiskError, XenUnavailable
from ..exit_status import ExitStatus
from ..host.program import own_command
from ..host.systemd import NOTIFY_SOCKET, notify
from ..libxl.attachment import FIRST_XEN
from ..libxl.daemon import Supervisor
from ..session import Interrupts
from ..xenbus.states import Address
from ..xenbus.toolstack import SCRIPT
from ..xenbus.xenstore import Store
from .environment import Environment

log = logging.getLogger("xen_disk_py")

_SCRIPT_PATH = f"/etc/xen/scripts/{SCRIPT}"
_RETRY = 1.0  # seconds between two tries to reach a xenstore that is away


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Start a process for each disk until a signal comes; the disks stay."""
    version = env.xen_version()
    if version is not None and version < FIRST_XEN:
        raise XenUnavailable(
            "Xen {}.{}: its libxl refuses disks with backendtype=tap, Xen 4.19 is the first that "
            "takes them; use: xen-disk connect".format(*version)
        )
    if not os.path.exists(_SCRIPT_PATH):
        log.warning("there is no %s, which disk lines name: run xen-disk install", _SCRIPT_PATH)
    debug = ["--debug"] if getattr(args, "debug", False) else []

    def start(address: Address) -> subprocess.Popen[bytes]:
        """Start what serves a disk; no signal to us or our terminal reaches it."""
        return subprocess.Popen(
            own_command(*debug, "adopt", str(address.frontend_domid), str(address.devid)),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != NOTIFY_SOCKET},
        )

    with env.open_store() as store, Interrupts().installed() as interrupts:
        # A child's end wakes us as any signal does.
        before = signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        try:
            supervisor = Supervisor(store, env.record_directory, start)
            supervisor.watch()
            _supervise(store, supervisor, interrupts)
        finally:
            signal.signal(signal.SIGCHLD, before)
    return ExitStatus.OK


def _supervise(store: Store, supervisor: Supervisor, interrupts: Interrupts) -> None:
    supervisor.look()
    log.info("ready: %s", _disks(supervisor.served))
    notify("READY=1", f"STATUS={_disks(supervisor.served)}")
    changed = False
    while True:
        interrupts.drain()
        if interrupts.asked:
            break
        told, failed = supervisor.served, False
        try:
            if store.is_lost:
                store.reconnect()
                log.info("connected to xenstore again")
            changed |= bool(store.pending())
            changed |= supervisor.reap() or supervisor.pause == 0
            if changed:
                supervisor.look()
                changed = False
            pause = supervisor.pause
        except XenDiskError as error:
            log.debug("%s", error)
            pause, failed = _RETRY, True
        if supervisor.served != told:
            notify(f"STATUS={_disks(supervisor.served)}")
        _sleep(store, interrupts, pause, failed=failed)
    notify("STOPPING=1")
    log.info("stopped; %s by a process of its own, as before", _disks(supervisor.served))


def _sleep(store: Store, interrupts: Interrupts, pause: float | None, *, failed: bool) -> None:
    """Wait for a signal, for xenstore unless that has failed, and so many seconds at most."""
    poller = select.poll()
    poller.register(interrupts.fileno(), select.POLLIN)
    if not failed:
        if store.has_pending:
            return
        poller.register(store.fileno(), select.POLLIN)
    poller.poll(None if pause is None else pause * 1000)


def _disks(count: int) -> str:
    return f"{count} {'disk is' if count == 1 else 'disks are'} served"
