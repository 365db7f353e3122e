"""What Linux tells of a file that ``os.stat`` does not: statx(2)."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
_BTIME = 0x800  # linux/stat.h
_MNT_ID_UNIQUE = 0x4000  # from Linux 6.8 on
_SIZE = 256  # of struct statx, with room to grow
_BTIME_AT, _MNT_ID_AT = 0x50, 0x90

_libc = ctypes.CDLL(None, use_errno=True)
_statx = getattr(_libc, "statx", None)  # not in C libraries before 2018


class Statx(NamedTuple):
    """What is known of a file; None: the kernel, the C library or the file system does not tell.

    Attributes:
        born: when the file was made, in nanoseconds since 1970.
        mount: the mount by which it was opened, a number that is never used again until the next
            boot; another one for each mount of a file system, namespaces' copies included.
    """

    born: int | None
    mount: int | None


def statx(fd: int) -> Statx:
    """Ask about an open file."""
    if _statx is None:
        return Statx(None, None)
    answer = ctypes.create_string_buffer(_SIZE)
    mask = ctypes.c_uint(_BTIME | _MNT_ID_UNIQUE)
    if _statx(ctypes.c_int(fd), b"", ctypes.c_int(_AT_EMPTY_PATH), mask, answer):
        return Statx(None, None)
    (known,) = struct.unpack_from("=I", answer)
    seconds, nanoseconds = struct.unpack_from("=qI", answer, _BTIME_AT)
    (mount,) = struct.unpack_from("=Q", answer, _MNT_ID_AT)
    return Statx(
        seconds * 10**9 + nanoseconds if known & _BTIME else None,
        mount if known & _MNT_ID_UNIQUE else None,
    )


def superblock(fd: int, file_system: str | None) -> str | None:
    """Name the mounted file system that an open file is in; None: it has no such name.

    A file system that is unmounted and mounted again has another name then, whatever storage it
    is on; all mounts of it (binds, namespaces) share one. It is the directory that the kernel
    makes for it in sysfs: inode numbers there are never used again until the next boot.

    Args:
        fd: the file.
        file_system: what it is in, as mountinfo calls it, such as ``ext4``.
    """
    if file_system in ("ext2", "ext3"):
        file_system = "ext4"  # whose driver serves them
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if file_system in ("tmpfs", "ramfs"):
        return f"{file_system} {number}"  # its files do not outlive the mount
    try:
        if not os.major(device):  # NFS, FUSE
            return f"bdi {os.stat(f'/sys/class/bdi/{number}').st_ino}"
        name = os.path.basename(os.readlink(f"/sys/dev/block/{number}"))
        return f"{file_system} {os.stat(f'/sys/fs/{file_system}/{name}').st_ino}"
    except OSError:
        return None
