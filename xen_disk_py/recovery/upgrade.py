"""Another program takes over the disk: the same command of a newer version, say.

It is what follows a crash, but on purpose: this process becomes the new program (execve), which
adopts what it was serving itself a moment before. Whatever it was doing is done again. That the
new program would work is seen first: if it does not come as far as to the disk, we continue.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Callable

from ..backends.finding import find_class
from ..errors import DeviceError
from ..exit_status import ExitStatus
from ..host.program import own_command
from ..host.systemd import notify
from ..xenbus.toolstack import Domain
from ..xenbus.vdev import VirtualDevice
from .facts import FORMATS, Facts
from .record import Record
from .role import Role
from .spec import DiskSpec
from .takeover import crash

if TYPE_CHECKING:
    from subprocess import Popen

log = logging.getLogger("xen_disk_py")

_DRY_RUN = 30.0  # seconds that the new program gets to come up
_REASON = 1000  # characters of why not
_SIGN = 1.0  # seconds between two signs of life meanwhile
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


class Upgrade:
    """How the process that serves a disk becomes another program.

    Args:
        role: what this process is.
        options: of ``connect``, that say how it talks.
        user: whom this process has become, or None.
        domain: the guest.
        vdev: the disk.
        record: says how it went.
        before: called when all is seen to be fine.
        handed_over: the process becomes the new program inside of this.
        is_asked: tells whether this process has been told to end.
        end_queues: ends the processes of the disk's queues, which cannot be undone; None: there
            are none.
    """

    def __init__(
        self,
        role: Role,
        options: Sequence[str],
        user: str | None,
        domain: Domain,
        vdev: VirtualDevice,
        record: Record,
        before: Callable[[], None],
        is_asked: Callable[[], bool],
        handed_over: Callable[[], AbstractContextManager[None]] = nullcontext,
        end_queues: Callable[[], object] | None = None,
    ) -> None:
        self._leaves = role.leaves
        self._user = user
        self._record = record
        self._before = before
        self._is_asked = is_asked
        self._handed_over = handed_over
        self._end_queues = end_queues
        self._words = [*options, "--adopt", str(domain.domid), str(vdev)]

    def take_over(self) -> None:
        """Become the new program; return if that would not work, or cannot be."""
        try:
            self._try()
        except DeviceError as error:
            self._refuse(error)
            return
        # A signal that comes from now on is for the new program, when it listens.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._become()
        except DeviceError as error:
            self._refuse(error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _become(self) -> None:
        if self._is_asked():
            raise DeviceError("it has been told to end")
        self._before()
        log.info("another program takes over")
        self._record.update(released_at=time.monotonic())
        if self._end_queues is not None:
            self._end_queues()  # they have the locks, too
        if self._user is not None:
            logging.shutdown()
            os._exit(ExitStatus.CRASHED)  # whoever started us has the privileges to take over
        role = Role(leaves=self._leaves, succeeds=True)
        try:
            with self._handed_over():
                os.execv(sys.executable, own_command("connect", *role.words(), *self._words))
        except OSError as error:
            if self._end_queues is not None:
                crash(error)  # nobody serves the disk any more
            raise DeviceError(f"the new program does not start: {error}") from error

    def _refuse(self, error: DeviceError) -> None:
        reason = str(error)[:_REASON]  # a line of the new program, whatever that says
        log.error("not upgraded: %s", reason)
        try:
            self._record.update(released_at=None, not_upgraded=(time.time(), reason))
        except DeviceError:  # there is no room for it
            self._record.update(released_at=None)

    def _try(self) -> None:
        if not self._record.facts.survives:
            raise DeviceError("what the guest wrote would end with this process")
        if self._user is not None and not self._leaves:
            raise DeviceError(
                "this process has given its privileges up, so that it cannot open the disk again: "
                "with --user, upgrading needs --supervise or --recover"
            )
        import subprocess  # hardly a disk is ever upgraded, and this is large

        try:
            process = subprocess.Popen(
                own_command("connect", *Role(tries=True).words(), *self._words),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise DeviceError(f"the new program does not start: {error}") from error
        with process:
            try:
                said = self._await(process)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            lines = said.strip().splitlines() or [f"it ended with {process.returncode}"]
            raise DeviceError(f"the new program would not take over: {lines[-1]}")

    def _await(self, process: Popen[str]) -> str:
        """Tell the new program what it has to know, and wait for its end; what it said."""
        from subprocess import TimeoutExpired

        facts: str | None = self._record.facts.encode().decode()
        deadline = time.monotonic() + _DRY_RUN
        while True:
            notify("WATCHDOG=1")  # requests are served by other threads
            try:
                return process.communicate(facts, timeout=_SIGN)[1]
            except TimeoutExpired as error:
                facts = None  # has been told
                if time.monotonic() >= deadline:
                    raise DeviceError(
                        f"the new program has not come up within {_DRY_RUN:g} s"
                    ) from error


def check_takeover(text: str) -> DiskSpec:
    """See whether we could take over a disk that another process still serves.

    Args:
        text: that one's facts; its record may not be ours to read.

    Returns:
        What the disk is.

    Raises:
        XenDiskError: why not.
    """
    facts = Facts.parse(text.encode())
    if facts is None or facts.format not in FORMATS:
        raise DeviceError("its record is another version's: the journal cannot be read")
    spec = facts.spec
    if spec.user is None:  # else neither that process nor we have the privileges just now
        os.chdir(spec.directory)
        find_class(spec.backend_name)
    return spec
