"""Which mount, and which mounted file system, an open file is in: both end with the page cache."""

from __future__ import annotations

import ctypes
import os
import struct

_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
_MNT_ID_UNIQUE = 0x4000  # linux/stat.h; from Linux 6.8 on
_STATX = struct.Struct("=I140xQ104x")  # struct statx: its mask, and stx_mnt_id

_libc = ctypes.CDLL(None, use_errno=True)
_statx = getattr(_libc, "statx", None)  # not in C libraries before 2018


def mount_of(fd: int) -> int | None:
    """Return the number of the mount by which a file was opened; None: the kernel does not tell.

    It is never used again until the next boot. Each mount of one file system has its own, the
    copies that a mount namespace begins with included.
    """
    if _statx is None:
        return None
    answer = ctypes.create_string_buffer(_STATX.size)
    mask = ctypes.c_uint(_MNT_ID_UNIQUE)
    if _statx(ctypes.c_int(fd), b"", ctypes.c_int(_AT_EMPTY_PATH), mask, answer):
        return None
    known, mount = _STATX.unpack(answer.raw)
    return int(mount) if known & _MNT_ID_UNIQUE else None


def superblock_of(fd: int, file_system: str | None) -> str | None:
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
