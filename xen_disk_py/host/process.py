"""Which process it is, and signals for that one only: process ids are given away again."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NAME = 15

_libc = ctypes.CDLL(None, use_errno=True)


def start_time(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot; None if there is none.

    With its id that names a process as long as the host runs (proc_pid_stat(5), field 22).
    """
    try:
        return int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return None


def is_stopped(pid: int) -> bool:
    """Tell whether a process waits for SIGCONT, as far as this one may know."""
    try:
        return _stat(pid)[0] == b"T"
    except (OSError, IndexError):
        return False


def _stat(pid: int) -> list[bytes]:
    """Return what proc_pid_stat(5) has from field 3 on, the state."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def is_process(pid: object, started: object) -> bool:
    """Tell whether the process that had that id, and was started then, is there."""
    return isinstance(pid, int) and started is not None and start_time(pid) == started


def send_signal(pid: object, started: object, signum: signal.Signals) -> bool:
    """Send a signal to a process; False if it has gone, though another may have its id now.

    Raises:
        PermissionError: it is somebody else's.
    """
    if not isinstance(pid, int) or pid <= 0:
        return False
    with suppress(ProcessLookupError):
        if not hasattr(os, "pidfd_open"):  # a Python that was built for an old kernel
            if not is_process(pid, started):
                return False
            os.kill(pid, signum)
            return True
        pidfd = os.pidfd_open(pid)
        try:
            # The descriptor is of one process. If that is the one, its id was not given away.
            if is_process(pid, started):
                signal.pidfd_send_signal(pidfd, signum)
                return True
        finally:
            os.close(pidfd)
    return False


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that has forked it ends (prctl(2)).

    A change of the user undoes that: it comes after.

    Args:
        parent: its process; if that has gone already, this one ends here.

    Raises:
        OSError: the kernel refuses.
    """
    zero = ctypes.c_ulong(0)
    if _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent:
        os._exit(1)


def set_name(name: str) -> None:
    """Set what ``ps -e`` calls this process, or this thread of it: 15 bytes at most."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


class CommandLine:
    """What ``ps`` shows of this process, and of those that are forked from it.

    That is the memory in which the kernel has put the arguments (proc_pid_stat(5), fields 48, 49).
    """

    def __init__(self) -> None:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        self._start, end = int(fields[45]), int(fields[46])
        self._room = end - self._start if self._start else 0

    def show(self, text: str) -> None:
        """Have it be ``text``, as far as there is room."""
        room = self._room
        if room > 0:
            line = os.fsencode(text)[: room - 1].ljust(room, b"\0")
            ctypes.memmove(self._start, line, room)
