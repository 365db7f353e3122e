"""Another program goes on with the disk: the same command of a newer version, say.

It is what follows a crash, but on purpose: this process becomes the new program (execve), which
adopts what it was serving itself a moment before. Whatever it was doing is done again. That the
new program would work is seen first: if it does not come as far as to the disk, we go on.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Callable

from .. import record
from ..arguments import parse
from ..backends.loader import find_class
from ..environment import Environment
from ..errors import DeviceError
from ..exit_status import ExitStatus
from ..record import FORMAT, Record
from ..toolstack import Domain, find_domain
from ..vdev import VirtualDevice
from ..vdev import parse as parse_vdev
from .backend_arguments import backend_name
from .opening import LET_GO
from .served_disk import find

log = logging.getLogger("xen_disk_py")

_REHEARSAL = 30.0  # seconds


class Upgrade:
    """How the process that serves a disk becomes another program.

    Args:
        args: what it was called with.
        domain: the guest.
        vdev: the disk.
        record: says how it went.
        before: called when all is seen to be fine.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        domain: Domain,
        vdev: VirtualDevice,
        record: Record,
        before: Callable[[], None],
    ) -> None:
        self._args = args
        self._record = record
        self._before = before
        debug = ["--debug"] if getattr(args, "debug", False) else []
        quiet = ["--quiet"] if args.quiet else []
        self._command = [
            *(sys.executable, "-m", "xen_disk_py", "connect", *debug, *quiet),
            *("--adopt", str(domain.domid), str(vdev)),
        ]

    def take_over(self) -> None:
        """Become the new program; return if that would not work, or cannot be."""
        try:
            self._rehearse()
        except DeviceError as error:
            log.error("not upgraded: %s", error)
            self._record.describe({**self._record.facts, "not_upgraded": str(error)})
            return
        self._before()
        log.info("another program goes on")
        logging.shutdown()
        if self._args.user is not None:
            os._exit(ExitStatus.CRASHED)  # whoever started us has the privileges to go on
        options = ["--again", *(["--leave"] if self._args.leave else [])]
        # A signal meant for the old program is not to kill the new one before it listens.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        os.environ[LET_GO] = repr(time.monotonic())
        os.execv(sys.executable, [*self._command[:4], *options, *self._command[4:]])

    def _rehearse(self) -> None:
        if not self._record.facts.get("survives"):
            raise DeviceError("what the guest wrote would end with this process")
        if self._args.user is not None and not self._args.leave:
            raise DeviceError(
                "this process has given its privileges up, so that it cannot open the disk again: "
                "with --user, upgrading needs --supervise or --recover"
            )
        try:
            done = subprocess.run(
                [*self._command, "--rehearse"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=_REHEARSAL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceError(f"the new program does not start: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise DeviceError(f"the new program would not go on: {lines[-1]}")


def rehearse(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """See whether we could go on with a disk that another process still serves.

    Raises:
        XenDiskError: why not.
    """
    with env.open_store() as store:
        domain = find_domain(store, args.vm)
        disk = find(store, domain.domid, parse_vdev(args.device))
        found = record.find(env.record_directory, disk.address)
        if found is None or found.facts.get("format") != FORMAT:
            raise DeviceError("its record is another version's: the journal cannot be read")
        os.chdir(found.facts["folder"])
        arguments = parse(found.facts["arguments"])
        find_class(backend_name(arguments))
        if arguments.user is None:
            env.open_hypervisor().close()
    return ExitStatus.OK
