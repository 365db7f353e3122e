"""Memory barriers: the one thing that a shared ring needs and Python does not have."""

from __future__ import annotations

import ctypes
import platform
import threading
from functools import partial
from typing import Callable

from xen_disk_py.errors import XenUnavailable
from xen_disk_py.host.clibrary import Library, Signature
from xen_disk_py.named import NamedTuple

_SEQ_CST = 5
"""``memory_order_seq_cst``: a full barrier."""

_ON_X86 = platform.machine() in {"x86_64", "AMD64", "i386", "i486", "i586", "i686"}

ATOMIC = Library(
    "libatomic.so.1",
    "libatomic1 (Debian, Ubuntu) or libatomic (Fedora)",
    # No argtypes, and a loader that keeps the interpreter's lock: half the cost of a call.
    {"atomic_thread_fence": Signature(None, None)},
    loader=ctypes.PyDLL,
    required=not _ON_X86,
)


class Fence(NamedTuple):
    """A full memory barrier, and where it comes from."""

    barrier: Callable[[], None]
    source: str


def load_fence() -> Fence:
    """Return the cheapest barrier that this machine offers.

    Raises:
        XenUnavailable: libatomic is missing and nothing else will do on this processor.
    """
    try:
        functions = ATOMIC.load()
    except XenUnavailable:
        if not _ON_X86:
            raise
        return Fence(_lock_fence(), "a lock's locked instruction (libatomic.so.1 is absent)")
    return Fence(partial(functions.atomic_thread_fence, _SEQ_CST), "libatomic.so.1")


def _lock_fence() -> Callable[[], None]:
    # Taking a lock is an atomic read-modify-write in every CPython, and on x86 any locked
    # instruction is a full barrier. On other processors it orders in one direction only.
    lock = threading.Lock()

    def barrier() -> None:
        with lock:
            pass

    return barrier
