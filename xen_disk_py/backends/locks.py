"""Locking an image, so that a writer is alone with it: for ourselves, for QEMU, by every name.

``flock`` is for ourselves, and belongs to one node or file: a block device is locked at the node
that the kernel made, too, and a loop device at the file that it shows, so that whichever way
another comes he finds the lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Sequence

from ..errors import ImageError
from . import qemu_locks, sharing

log = logging.getLogger("xen_disk_py")

_UDEV_SECONDS = 1.0  # udev locks a device for some milliseconds while it probes it: try so long


def claim(fd: int, path: str, *, writable: bool) -> Sequence[int]:
    """Lock an open image by all its names, for writing alone or for reading with other readers.

    Inside :func:`~.sharing.forced` what is in the way is a warning.

    Returns:
        Descriptors that keep locks as long as they are open.

    Raises:
        ImageError: somebody else uses it; the message says who and what to do.
        OSError: it cannot be asked.
    """
    if sharing.is_looking():
        return ()
    status = os.fstat(fd)
    is_block_device = stat.S_ISBLK(status.st_mode)
    others: list[int] = []
    try:
        with _overridable():
            lock(fd, path, writable, is_block_device)
        with _overridable():
            _lock_for_qemu(fd, path, writable=writable, alone=True)
        if is_block_device:
            others += _lock_other_names(status, path, writable)
        with _overridable():
            _refuse_or_warn(path, sharing.uses(status, writable=writable), writable)
    except BaseException:
        for other in others:
            os.close(other)
        raise
    return others


class _overridable:  # noqa: N801 - a context manager, used like a function
    """Turn a refusal into a warning where the user has said ``--force``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ImageError) and sharing.is_forced():
            log.warning("%s (used all the same: --force)", error)
            return True
        return False


def _lock_other_names(status: os.stat_result, path: str, writable: bool) -> list[int]:
    """Lock a block device at the kernel's own node of it, and at the files that it shows."""
    number = sharing.number_of(status)
    found: list[int] = []
    try:
        node = sharing.node_of(number)
        if node is not None:
            found += _lock_other(node, path, status, writable=writable, alone=True)
        for below in sharing.below_all(number):
            # a partition has neighbours in the same file, which others may write
            alone = below.is_whole
            found += _lock_other(below.path, path, status, writable=writable, alone=alone)
    except BaseException:
        for fd in found:
            os.close(fd)
        raise
    return found


def _lock_other(
    name: str, path: str, status: os.stat_result, *, writable: bool, alone: bool
) -> list[int]:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []  # not here, or not for us: what is left are the other checks
    try:
        other = os.fstat(fd)
        if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
            os.close(fd)  # the node that is locked already
            return []
        with _overridable():
            lock(fd, f"{path} ({name})", writable and alone, stat.S_ISBLK(other.st_mode))
        with _overridable():
            _lock_for_qemu(fd, f"{path} ({name})", writable=writable, alone=alone)
    except BaseException:
        os.close(fd)
        raise
    return [fd]


def _lock_for_qemu(fd: int, path: str, *, writable: bool, alone: bool) -> None:
    try:
        qemu_locks.take(fd, writes=writable, alone=alone)
    except qemu_locks.Locked:
        pids = [pid for pid in qemu_locks.holders(os.fstat(fd)) if pid != os.getpid()]
        raise ImageError(_in_use(path, writable, pids)) from None


def _refuse_or_warn(path: str, uses: Sequence[sharing.Use], writable: bool) -> None:
    for use in uses:
        text = f"{path}: {use.reason}"
        if use.refused:
            what = "a disk that writes needs its image alone" if writable else "it may be written"
            remedy = f": {use.remedy}" if use.remedy else ": end that first"
            raise ImageError(f"{text}, and {what}{remedy}{sharing.or_force()}")
        log.warning("%s: what the guest reads may change", text)


def lock(fd: int, path: str, writable: bool, is_block_device: bool) -> None:
    """Lock an open file: for us alone if ``writable``, else shared with other readers.

    Raises:
        ImageError: somebody else has it; the message says who.
    """
    operation = (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB
    deadline = time.monotonic() + is_block_device * _UDEV_SECONDS
    while True:
        try:
            return fcntl.flock(fd, operation)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        except OSError as error:
            raise ImageError(f"{path}: cannot be locked: {_no_lock(error)}") from error
    raise ImageError(_in_use(path, writable, holders(os.fstat(fd))))


def _in_use(path: str, writable: bool, pids: Sequence[int]) -> str:
    holder = ", ".join(map(_process, pids)) or "another process"
    if writable:
        return (
            f"{path}: in use by {holder}: a disk that writes needs its image alone, "
            f"disconnect the other first{sharing.or_force()}"
        )
    return f"{path}: being written by {holder}: disconnect that disk first{sharing.or_force()}"


def _no_lock(error: OSError) -> str:
    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
        return error.strerror or str(error)
    return (
        f"{error.strerror}: on NFS, start the lock service (rpc.statd) of both sides or mount it "
        "as version 4, or with -o local_lock=flock where no other host uses the image"
    )


def holders(status: os.stat_result) -> list[int]:
    """Find the processes that hold a lock on a file, as far as /proc tells."""
    # 1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF      (the device in hex; -> waits only)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    where = f"{device}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            fields = [line.split() for line in locks]
    except OSError:
        return []
    pids = {int(f[4]) for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5] == where}
    return sorted(pid for pid in pids if pid > 0)


def _process(pid: int) -> str:
    command: str | None = None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            words = cmdline.read(200).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        command = "".join(letter if letter.isprintable() else "?" for letter in words)
    except OSError:
        pass  # gone, or not ours to look at
    return f"process {pid} ({command})" if command else f"process {pid}"
