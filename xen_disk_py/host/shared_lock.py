"""A lock that is held by one thread of all processes that are forked from one."""

from __future__ import annotations

import fcntl
import os
import threading
import weakref


class SharedLock:
    """A lock of this process's threads and of all processes that are forked from it.

    The kernel knows which process has it (fcntl(2), F_SETLKW), and releases it when that ends.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("xen_disk_py-lock")
        self._threads = threading.Lock()
        weakref.finalize(self, os.close, self._fd)

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
        self._threads.release()
