"""Keeps one disk served: starts a worker, and another if it crashes or hangs.

The worker is a process of ours that serves the disk. It is told and watched as systemd does it
(sd_notify(3), sd_watchdog_enabled(3)), so that one program serves under either. Besides
``READY=1`` and ``WATCHDOG=1`` it says which device it serves, ``X_DEVICE=5 xvdb``, *before*
there is anything in xenstore that it could leave behind.

* A worker that ends by itself has cleaned up: we end as it did. One that a signal ended, or
  that ended as :attr:`ExitStatus.CRASHED`, has left its disk to a successor.
* A worker that is silent is killed, and has a successor too. One that was stopped is silent. One
  that starts is not while it does one step after another, however slow the machine is.
* Signals go through us. The worker is in a session of its own: a Ctrl-C on our terminal comes
  to it once, from us, since a second one means force; Ctrl-Z and ``stty tostop`` do not stop it.
* If we are killed the worker stays. A disk that is served is better than one that is not.
"""

from __future__ import annotations

import logging
import math
import os
import re
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Callable

from ..errors import DeviceError
from ..exit_status import ExitStatus
from ..host.logs import about
from ..host.systemd import (
    EXTEND_TIMEOUT,
    NOTIFY_SOCKET,
    WATCHDOG_PID,
    WATCHDOG_USEC,
    notify,
    watchdog_interval,
)
from ..xenbus.states import Address
from ..xenbus.vdev import parse
from . import record
from .temporary import remove

log = logging.getLogger("xen_disk_py")

DEVICE = "X_DEVICE="
"""How a worker says which device it serves: ``X_DEVICE=5 xvdb``, domain id and name."""
_A_DEVICE = re.compile("[0-9]{1,10} [A-Za-z0-9]{1,20}")
NAME = "X_NAME="
"""How it says what people call it: ``X_NAME=myvm/xvdb``; for the log."""
DELAYS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0)
"""Seconds before each restart; after as many without a calm time we give up."""
CALM = 60.0
"""Seconds that a worker must live for what was before it to be forgiven."""

_ASKING = (signal.SIGINT, signal.SIGTERM)  # to end
_PASSED_ON = (*_ASKING, signal.SIGHUP, signal.SIGUSR2)
_FORWARDED = ("READY=", "STATUS=", "STOPPING=", EXTEND_TIMEOUT)
_STEPS = (EXTEND_TIMEOUT, DEVICE)  # of a start
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7))


def supervise(
    first: Sequence[str],
    again: Callable[[str], Sequence[str]],
    *,
    watchdog: float,
    records: str,
    temporary: str | None,
) -> ExitStatus:
    """Have one disk served, and leave nothing behind but what a successor needs.

    Args:
        first: as for :class:`Supervisor`.
        again: likewise.
        watchdog: likewise.
        records: the directory of records.
        temporary: the file that is to be removed with the disk, or None.

    Raises:
        DeviceError: a worker crashed, and another cannot help or did not.
    """
    supervisor = Supervisor(first, again, watchdog=watchdog)
    try:
        return supervisor.run()
    finally:
        # A worker that became another user, or was killed early, could not remove these.
        with suppress(OSError):
            record.sweep(records)
        if temporary is not None and not _is_left(supervisor.device, records):
            remove(temporary)


def _is_left(device: str, records: str) -> bool:
    """Tell whether a disk is still there, for somebody to take over."""
    if not device:
        return False
    domid, name = device.split()
    found = record.find(records, Address(0, int(domid), parse(name).number, ""))
    return found is not None and found.facts is not None


class Supervisor:
    """Has one disk served by one worker at a time.

    Args:
        first: the command line of the first worker.
        again: makes the command line of a successor, from the device that was named.
        watchdog: seconds of silence after which a worker is killed; 0 for never. They count
            from its start, from each step of that (``EXTEND_TIMEOUT_USEC=``, ``X_DEVICE=``), then
            from each ``READY=1`` or ``WATCHDOG=1``.
        delays: seconds before the first, second, … restart; how many there are is how many
            restarts there may be.
        calm: seconds of a worker's life, to its last sign of life if it hung, after which
            ``delays`` begins anew.
    """

    def __init__(
        self,
        first: Sequence[str],
        again: Callable[[str], Sequence[str]],
        *,
        watchdog: float,
        delays: Sequence[float] = DELAYS,
        calm: float = CALM,
    ) -> None:
        self._first = first
        self._again = again
        self._watchdog = watchdog
        self._delays = delays
        self._calm = calm
        self._device = ""
        self._asked: int | None = None  # to end: the signal that did
        self._abandoned = False  # asked a second time, with nobody to pass it on to
        self._held: list[int] = []  # signals for a worker that does not handle them yet
        self._process: subprocess.Popen[bytes] | None = None
        self._has_spoken = False
        self._has_started = False
        self._last_sign = 0.0
        interval = watchdog_interval()
        self._ping_every = interval / 2 if interval is not None else math.inf
        self._next_ping = 0.0 if interval is not None else math.inf

    @property
    def device(self) -> str:
        """The device that a worker named; empty if none has."""
        return self._device

    def run(self) -> ExitStatus:
        """Supervise until a worker ends by itself; in the main thread only.

        Returns:
            The exit status of that worker.

        Raises:
            DeviceError: a worker crashed, and another cannot help or did not.
        """
        with _mailbox() as self._mailbox, _signals() as self._signals, ExitStack() as self._naming:
            self._poller = select.poll()
            self._poller.register(self._mailbox, select.POLLIN)
            self._poller.register(self._signals, select.POLLIN)
            return self._run()

    def _run(self) -> ExitStatus:
        command, restarts = self._first, 0
        while True:
            was_asked = self._asked is not None
            started = time.monotonic()
            ending = self._serve(command)
            if isinstance(ending, ExitStatus):
                return ending
            if not self._device:
                if self._asked is not None:
                    return ExitStatus.INTERRUPTED  # before there was anything to clean up
                raise DeviceError(f"{ending} before it attached the disk")
            if self._last_sign - started >= self._calm:
                restarts = 0
            if restarts == len(self._delays):
                raise self._left_behind(f"{ending}, after {restarts} restarts")
            if not (was_asked or self._abandoned):
                self._wait_after(ending, self._delays[restarts])
            if was_asked or self._abandoned:
                raise self._left_behind(f"{ending}, and we have been told to end")
            command = self._again(self._device)
            restarts += 1

    def _left_behind(self, why: str) -> DeviceError:
        return DeviceError(
            f"disk {self._device} is left behind: {why}; to take it over: "
            f"xen-disk connect --adopt {self._device}; to take it away: "
            f"xen-disk disconnect {self._device} --force"
        )

    def _serve(self, command: Sequence[str]) -> ExitStatus | str:
        """Have one worker serve; return how it ended by itself, or tell how it did not."""
        self._has_spoken = self._has_started = False
        self._last_sign = time.monotonic()
        try:
            process = subprocess.Popen(command, env=self._environment(), start_new_session=True)
        except OSError as error:
            return f"a process cannot be started ({error})"
        self._process = process
        killed = False
        while True:
            # Before its messages: what was sent until now is heard, and by an end that is all.
            now, status = time.monotonic(), process.poll()
            self._listen()
            if status is not None:
                break
            silent_at = self._last_sign + self._watchdog if self._watchdog else math.inf
            if not killed and (self._abandoned or now >= silent_at):
                if not self._abandoned:
                    log.error(
                        "process %d gave no sign of life for %g s; killing it",
                        process.pid,
                        self._watchdog,
                    )
                process.kill()
                killed = True
            self._sleep(math.inf if killed else silent_at)
        self._process = None
        if not killed:
            self._last_sign = time.monotonic()
        if status < 0:
            return f"process {process.pid} died of signal {-status} ({signal.strsignal(-status)})"
        if status == ExitStatus.CRASHED:
            return f"process {process.pid} crashed"
        try:
            return ExitStatus(status)
        except ValueError:
            return ExitStatus.ERROR

    def _environment(self) -> dict[str, str]:
        ours = (NOTIFY_SOCKET, WATCHDOG_PID, WATCHDOG_USEC)
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment[NOTIFY_SOCKET] = "@" + self._mailbox.getsockname()[1:].decode()
        if self._watchdog:
            environment[WATCHDOG_USEC] = str(round(self._watchdog * 1e6))
        return environment

    def _wait_after(self, ending: str, delay: float) -> None:
        """Say what comes next, and wait, unless we are asked to end."""
        log.error("disk %s: %s; another takes over in %g s", self._device, ending, delay)
        notify(f"STATUS=disk {self._device}: {ending}")
        if self._asked is not None and self._asked not in self._held:
            self._held.append(self._asked)  # what it had been asked, its successor does
        until = time.monotonic() + delay
        while self._asked is None and time.monotonic() < until:
            self._sleep(until)
            self._listen()

    def _sleep(self, until: float) -> None:
        """Wait for a message, a signal or the end of a worker; live as far as systemd knows."""
        now = time.monotonic()
        if now >= self._next_ping:
            notify("WATCHDOG=1")
            self._next_ping = now + self._ping_every
        until = min(until, self._next_ping)
        self._poller.poll(None if until == math.inf else max(0.0, until - now) * 1000)
        for signum in _taken(self._signals):
            if signum in _PASSED_ON:
                self._pass_on(signum)

    def _pass_on(self, signum: int) -> None:
        """Pass a signal on, at once or when the worker handles it.

        Without a device there is nothing at stake, and a signal may end the worker. A successor
        handles signals when it has spoken.
        """
        if self._process is not None and (self._has_spoken or not self._device):
            self._process.send_signal(signum)
        elif signum in _ASKING and self._asked is not None:
            self._abandoned = True
        elif signum not in self._held:
            self._held.append(signum)
        if signum in _ASKING:
            self._asked = signum

    def _listen(self) -> None:
        """Take the worker's messages, not those of others: anybody can send us some."""
        for pid, assignments in _messages(self._mailbox):
            if self._process is None or pid != self._process.pid:
                continue
            for assignment in assignments:
                if assignment.startswith(DEVICE):
                    device = assignment[len(DEVICE) :]
                    # It becomes words of our next command, and whoever got into the worker says it.
                    if _A_DEVICE.fullmatch(device):
                        self._device = device
                elif assignment.startswith(NAME):
                    self._naming.close()
                    self._naming.enter_context(about(assignment[len(NAME) :]))
                elif assignment in ("READY=1", "WATCHDOG=1"):
                    self._has_started = True
                    self._last_sign = time.monotonic()
                if assignment.startswith(_STEPS) and not self._has_started:
                    self._last_sign = time.monotonic()
            forwarded = [text for text in assignments if text.startswith(_FORWARDED)]
            if forwarded:
                notify(*forwarded)
            if all(text.startswith(EXTEND_TIMEOUT) for text in assignments):
                continue  # so early it handles no signals yet
            self._has_spoken = True
            while self._held:
                self._process.send_signal(self._held.pop(0))


@contextmanager
def _mailbox() -> Iterator[socket.socket]:
    """Open what a worker's messages come to: an abstract address, open to any user's worker."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as mailbox:
        mailbox.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        mailbox.bind("")  # the kernel finds a name (unix(7), "autobind")
        yield mailbox


def _messages(mailbox: socket.socket) -> Iterator[tuple[int, list[str]]]:
    """Yield what has come, and the process id that the kernel says each is from."""
    for _ in range(1000):  # who sends without end does not keep us here
        try:
            # No room for descriptors: the kernel closes those that somebody sends along.
            text, ancillary, _, _ = mailbox.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                yield _CREDENTIALS.unpack(data)[0], text.decode(errors="replace").split("\n")


@contextmanager
def _signals() -> Iterator[int]:
    """Have the signals that we pass on, and SIGCHLD, do nothing but come as bytes: yield where."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {
        signum: signal.signal(signum, lambda signum, frame: None)
        for signum in (*_PASSED_ON, signal.SIGCHLD)
    }
    try:
        yield read
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(read)
        os.close(write)


def _taken(signals: int) -> bytes:
    """Return the numbers of the signals that have come, in their order."""
    try:
        return os.read(signals, 4096)
    except BlockingIOError:
        return b""
