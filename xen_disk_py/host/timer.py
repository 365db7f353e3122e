"""A timer that polls readable: Linux's timerfd, which Python has from 3.13 on only."""

from __future__ import annotations

import contextlib
import ctypes
import os

from xen_disk_py.hypervisor import Closing

from .clibrary import Library, Signature, not_negative

_CLOCK_MONOTONIC = 1
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK  # TFD_CLOEXEC, TFD_NONBLOCK: linux/timerfd.h


class _Itimerspec(ctypes.Structure):
    """``struct itimerspec``: an interval, and the first time."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


_LIBC = Library(
    None,
    "a C library that is not as old",
    {
        "timerfd_create": Signature(
            ctypes.c_int, (ctypes.c_int, ctypes.c_int), not_negative("make a timer")
        ),
        "timerfd_settime": Signature(
            ctypes.c_int,
            (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Itimerspec), ctypes.c_void_p),
            not_negative("set a timer"),
        ),
    },
)


class Timer(Closing):
    """One timer, which is not running.

    Raises:
        HypervisorError: the system has none to give.
    """

    def __init__(self) -> None:
        self._libc = _LIBC.load()
        self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)

    def fileno(self) -> int:
        """Return a descriptor that polls readable when the time is over."""
        return int(self._fd)

    def start(self, seconds: float) -> None:
        """Let it run for so long, once; what is left of an earlier start counts no more."""
        whole = int(seconds)
        nanoseconds = max(1, int((seconds - whole) * 1e9))  # both 0 would stop it
        self._libc.timerfd_settime(self._fd, 0, _Itimerspec(0, 0, whole, nanoseconds), None)

    def acknowledge(self) -> bool:
        """Make it quiet again; tell if its time was over."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._fd, 8))
        return False

    def close(self) -> None:
        """Give it back."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
