"""What a service and systemd tell each other: sd_notify(3) and sd_watchdog_enabled(3)."""

from __future__ import annotations

import logging
import os
import socket
import time

from ..text import printable

log = logging.getLogger("xen_disk_py")

NOTIFY_SOCKET = "NOTIFY_SOCKET"
"""The variable that says where somebody listens; not for the programs that a service starts."""
WATCHDOG_USEC = "WATCHDOG_USEC"
"""The variable that says after how many microseconds of silence a service is killed."""
WATCHDOG_PID = "WATCHDOG_PID"
"""The variable that says which process that is for, unless it is for all who read it."""

EXTEND_TIMEOUT = "EXTEND_TIMEOUT_USEC="
"""How a service says for how many microseconds more its start may last (sd_notify(3))."""

_PATIENCE = 5.0  # seconds for a listener whose queue is full: one that has been stopped
_STEP = 60.0


def notify(*assignments: str) -> None:
    """Send ``READY=1``, ``STATUS=…`` and the like; nothing where nobody listens.

    Waits a few seconds at most: what is not taken in a few seconds is lost.
    """
    path = os.environ.get(NOTIFY_SOCKET)
    if not path:
        return
    if path.startswith("@"):  # an abstract socket
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(_PATIENCE)
            # Unless it is connected, poll() calls it writable while the listener's queue is full.
            channel.connect(path)
            channel.send("\n".join(map(printable, assignments)).encode())
    except OSError as error:
        log.debug("cannot notify systemd: %s", error)


def notify_starting() -> None:
    """Say that a start continues: a step is done, and the next may take :data:`_STEP` seconds.

    On a very slow machine a whole start takes longer than whoever waits for it would think.
    """
    notify(f"{EXTEND_TIMEOUT}{round(_STEP * 1e6)}")


def watchdog_interval() -> float | None:
    """Return after how many seconds without ``WATCHDOG=1`` we are killed, None if never.

    Half of it is how often to send one (sd_watchdog_enabled(3)).
    """
    if os.environ.get(WATCHDOG_PID, str(os.getpid())) != str(os.getpid()):
        return None  # meant for who started us
    try:
        microseconds = int(os.environ.get(WATCHDOG_USEC, "0"))
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 else None


class Watchdog:
    """Sends the signs of life that somebody waits for, if anybody does."""

    def __init__(self) -> None:
        self.interval = watchdog_interval()
        """Seconds of silence that it takes; None if nobody waits."""
        self._next = 0.0

    def pause(self) -> float | None:
        """Return the seconds until the next sign is due; None if none is."""
        return None if self.interval is None else max(0.0, self._next - time.monotonic())

    def ping(self) -> None:
        """Send a sign, if one is due."""
        if self.pause() == 0 and self.interval is not None:
            notify("WATCHDOG=1")
            self._next = time.monotonic() + self.interval / 2
