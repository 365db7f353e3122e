"""QEMU's locks on an image, so that QEMU sees us and we see QEMU.

QEMU locks single bytes of an image (since 2.10; the file may be shorter): byte 100 + *n* says "I
use permission *n*", byte 200 + *n* says "nobody else may use permission *n*". All of them are
shared locks that belong to the open file (``F_OFD_SETLK``), which is why ``flock`` sees nothing of
them. Whoever opens an image first takes its own bytes, then looks whether the opposite ones are
locked by another; so of two that come at once, never both succeed.

The numbers are those of ``BlockPermission`` in QEMU's QAPI schema. Xen's own disks in QEMU
(``qdisk``) do without these locks; they are found in xenstore.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

_READ, _WRITE, _RESIZE = 0, 1, 3  # consistent-read, write, resize; 2 is write-unchanged
_USED = 100
_UNSHARED = 200
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of fcntl(2): l_type, l_whence, l_start, l_len, pid


class Locked(Exception):
    """Another program uses the image in a way that excludes ours.

    Attributes:
        byte: one that it has locked.
    """

    def __init__(self, byte: int) -> None:
        super().__init__(f"byte {byte} is locked")
        self.byte = byte


def take(fd: int, *, writes: bool, alone: bool) -> None:
    """Lock an open image as QEMU does, until it is closed.

    Args:
        fd: of the image; a duplicate of it has the same locks.
        writes: use it for writing, else for reading.
        alone: no other writer may come.

    Raises:
        Locked: somebody else excludes that; nothing of ours is locked then.
    """
    used = [_READ, _WRITE, _RESIZE] if writes else [_READ]
    unshared = [_WRITE, _RESIZE] if alone else []
    ours = [_USED + n for n in used] + [_UNSHARED + n for n in unshared]
    theirs = [_UNSHARED + n for n in used] + [_USED + n for n in unshared]
    locked = None
    try:
        for byte in ours:
            _call(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        for byte in theirs:
            if _call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK:
                locked = byte
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            locked = ours[0]
        # else a file system without such locks, where QEMU does without them, too
    if locked is not None:
        release(fd)
        raise Locked(locked)


def release(fd: int) -> None:
    """Unlock all."""
    with suppress(OSError):
        _call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _USED, _UNSHARED - _USED + 64)


def holders(status: os.stat_result) -> list[int]:
    """Find the processes that have locked bytes of an image like this, as far as /proc tells.

    Such a lock belongs to an open file, so /proc/locks knows no process (it says -1).
    """
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found: list[int] = []
    with suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        if not any(f" {device} " in line for line in locks):
            return found  # without a look into each open file of this host
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone, or not ours to look at
            if any(_has_lock(f"/proc/{pid}/fdinfo/{fd}", device) for fd in _descriptors(pid)):
                found.append(int(pid))
    return sorted(found)


def _descriptors(pid: str) -> list[str]:
    return os.listdir(f"/proc/{pid}/fdinfo")


def _has_lock(name: str, device: str) -> bool:
    # lock:	1: OFDLCK ADVISORY  READ -1 fd:01:5678 100 101
    try:
        with open(name, encoding="ascii", errors="replace") as facts:
            lines = [line.split() for line in facts if line.startswith("lock:")]
    except OSError:
        return False
    return any(len(f) > 6 and f[2] == "OFDLCK" and f[6] == device for f in lines)


def _call(fd: int, command: int, kind: int, start: int, length: int = 1) -> int:
    """Return the kind of lock that fcntl(2) answers with."""
    request = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    answer = fcntl.fcntl(fd, command, request)
    return int(_FLOCK.unpack(answer)[0])
