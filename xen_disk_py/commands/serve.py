"""``serve``: the disks that guests' configurations ask for, each in a process of its own."""

from __future__ import annotations

import argparse
import logging
import os
import select
from collections.abc import Sequence
from contextlib import ExitStack

from ..errors import XenDiskError, XenUnavailable
from ..exit_status import ExitStatus
from ..host.forkserver import ForkServer, Process
from ..host.program import own_command
from ..host.systemd import NOTIFY_SOCKET, notify, notify_starting
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

    with ExitStack() as stack:
        store = stack.enter_context(env.open_store())
        interrupts = stack.enter_context(Interrupts().installed())
        starter = _Starter(debug, interrupts)
        stack.callback(starter.close)
        starter.prepare()
        if interrupts.asked:
            return ExitStatus.OK
        supervisor = Supervisor(store, env.record_directory, starter.start)
        supervisor.watch()
        _supervise(store, supervisor, interrupts, starter)
    return ExitStatus.OK


class _Starter:
    """Starts what serves a disk; no signal to us or our terminal reaches it."""

    def __init__(self, options: Sequence[str], interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._command = own_command(*options, "fork-server")
        self._environment = {n: value for n, value in os.environ.items() if n != NOTIFY_SOCKET}
        self._server: ForkServer | None = None

    def start(self, address: Address) -> Process:
        """Start the process of a disk.

        Raises:
            OSError: that is not possible; or we are asked to end.
        """
        return self._ready().start(["adopt", str(address.frontend_domid), str(address.devid)])

    def prepare(self) -> None:
        """Import what disks need, so that the first one need not wait for that."""
        try:
            self._ready()
        except InterruptedError:
            pass
        except OSError as error:
            log.warning("cannot start a process: %s", error)  # the next disk tries again

    def _ready(self) -> ForkServer:
        if self._server is None or self._server.is_lost:
            self._server = ForkServer(self._command, self._environment)
            notify_starting()
        poller = select.poll()
        poller.register(self._interrupts.fileno(), select.POLLIN)
        poller.register(self._server.fileno(), select.POLLIN)
        # However slow the machine is: one that hangs is for the user to end, or for systemd.
        while not self._server.is_ready():
            poller.poll()
            self._interrupts.drain()
            if self._interrupts.asked:
                raise InterruptedError("xen-disk serve was told to end")
            notify_starting()
        return self._server

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a process has ended; -1: there is none."""
        return -1 if self._server is None else self._server.fileno()

    def close(self) -> None:
        """End what forks; the disks stay."""
        if self._server is not None:
            self._server.close()


def _supervise(
    store: Store, supervisor: Supervisor, interrupts: Interrupts, starter: _Starter
) -> None:
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
        _sleep(store, interrupts, starter, pause, failed=failed)
    notify("STOPPING=1")
    log.info("stopped; %s by a process of its own, as before", _disks(supervisor.served))


def _sleep(
    store: Store, interrupts: Interrupts, starter: _Starter, pause: float | None, *, failed: bool
) -> None:
    """Wait for a signal, a process's end, xenstore if it is there; so many seconds at most."""
    poller = select.poll()
    poller.register(interrupts.fileno(), select.POLLIN)
    if starter.fileno() >= 0:
        poller.register(starter.fileno(), select.POLLIN)
    if not failed:
        if store.has_pending:
            return
        poller.register(store.fileno(), select.POLLIN)
    poller.poll(None if pause is None else pause * 1000)


def _disks(count: int) -> str:
    return f"{count} {'disk is' if count == 1 else 'disks are'} served"
