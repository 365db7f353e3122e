"""Image files and block devices: opened, checked, locked and, for some backends, mapped.

The format of an image is never guessed from its content, which a guest may have written: an
image is the bytes of the disk, no more.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Sequence

from ..errors import ImageError
from ..hypervisor import Closing
from ..units import format_size
from . import sharing
from .locks import claim
from .locks import lock as lock  # noqa: PLC0414 - of files that are no images, too
from .signatures import Signature, recognise

log = logging.getLogger("xen_disk_py")

PAGE = mmap.PAGESIZE
SECTOR = 512
IOV_MAX = 1024  # linux/uio.h: buffers in one system call

_READ_ONLY = "read-only here: add --read-only, or use --backend cow"
_BLKROGET = 0x125E  # linux/fs.h: whether a device is read-only
_BLKSSZGET = 0x1268  # its logical block size


class Image(Closing):
    """An open image, locked until it is closed.

    A writer locks it exclusively, readers share it (see :mod:`~.locks`). The locks end with the
    process, however that ends.

    Attributes:
        fd: the descriptor, not inherited by programs we start.
        path: absolute.
        size: bytes, a positive multiple of ``sector_size``.
        sector_size: the logical sector in bytes: what was asked for, else the device's own,
            512 for a file.
        device_sector_size: the device's own, in bytes; 512 for a file.
        read_only: opened for reading only.
        is_block_device: a block device, not a file.
        nowait: the flags of a read that does not wait for the storage; None if there are none.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        size: int,
        *,
        sector_size: int,
        device_sector_size: int = SECTOR,
        read_only: bool,
        is_block_device: bool,
        locks: Sequence[int] = (),
    ) -> None:
        self.fd = fd
        self.path = path
        self.size = size
        self.sector_size = sector_size
        self.device_sector_size = device_sector_size
        self.read_only = read_only
        self.is_block_device = is_block_device
        self._locks = locks
        self.nowait = nowait_flags(fd)

    @classmethod
    def open(cls, path: str, *, writable: bool, sector_size: int | None = None) -> Image:
        """Open, check and lock.

        Args:
            path: the file or device.
            writable: for reading and writing.
            sector_size: the logical sector in bytes that the disk is to have.

        Raises:
            ImageError: it cannot be used; the message says why and what to do.
        """
        try:
            mode = os.stat(path).st_mode  # first, since opening a pipe waits for its other end
            is_block_device = stat.S_ISBLK(mode)
            _check_kind(path, mode)
            flags = os.O_RDWR if writable else os.O_RDONLY
            if writable and is_block_device and not sharing.is_forced():
                flags |= os.O_EXCL  # the kernel then refuses a device that is mounted
            fd = os.open(path, flags)
        except OSError as error:
            raise ImageError(f"{path}: {reason_of(error, path, writable)}") from error
        locks: Sequence[int] = ()
        try:
            _check_kind(path, os.fstat(fd).st_mode)
            if writable and is_block_device:
                check_writable(fd, path)
            locks = claim(fd, path, writable=writable)
            size = os.lseek(fd, 0, os.SEEK_END)
            own = _logical_block_size(fd) if is_block_device else SECTOR
            sector_size = sector_size or own
            container = recognise(fd, path, size)
            _check_size(path, size, sector_size, container)
            if container is not None:
                _warn_of(container, path)
            return cls(
                fd,
                os.path.abspath(path),
                size,
                sector_size=sector_size,
                device_sector_size=own,
                read_only=not writable,
                is_block_device=is_block_device,
                locks=locks,
            )
        except BaseException as error:
            for each in (*locks, fd):
                os.close(each)
            if isinstance(error, OSError):
                raise ImageError(f"{path}: {error.strerror}") from error
            raise

    @classmethod
    def look_at(cls, path: str, *, sector_size: int | None = None) -> Image:
        """Open for reading without a lock: others may be writing it. Nothing is checked.

        Raises:
            OSError: it cannot be opened.
            ImageError: it is neither a file nor a block device.
        """
        fd = open_file_or_disk(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
            own = _logical_block_size(fd) if is_block_device else SECTOR
            return cls(
                fd,
                os.path.abspath(path),
                os.lseek(fd, 0, os.SEEK_END),
                sector_size=sector_size or own,
                device_sector_size=own,
                read_only=True,
                is_block_device=is_block_device,
            )
        except BaseException:
            os.close(fd)
            raise

    @property
    def storage(self) -> sharing.Storage:
        """Where the bytes are, to compare with what others use."""
        return sharing.storage_of(os.fstat(self.fd), self.path, writable=not self.read_only)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill ``buffers`` from ``offset`` bytes into the image on.

        Returns:
            How many bytes: perhaps fewer, and none at an end that came too early.
        """
        return os.preadv(self.fd, buffers[:IOV_MAX], offset)

    def read_nowait(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read as much as is in memory: what needs no waiting for the storage."""
        if self.nowait is None:
            return 0
        try:
            if len(buffers) <= IOV_MAX:  # nearly always: then no slice, and no call to make one
                return os.preadv(self.fd, buffers, offset, self.nowait)
            return os.preadv(self.fd, buffers[:IOV_MAX], offset, self.nowait)
        except BlockingIOError:
            return 0

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Store ``buffers`` at ``offset`` bytes into the image; return how many bytes were."""
        if len(buffers) <= IOV_MAX:
            return os.pwritev(self.fd, buffers, offset)
        return os.pwritev(self.fd, buffers[:IOV_MAX], offset)

    def reopen(self) -> None:
        """Open it once more, in a process that was forked from the one that has opened it.

        Linux tells of a write-back error once for each open file: all that come from now on are
        told to this one, whoever else hears of them. The locks stay with the first.
        """
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        fd = os.open(f"/proc/self/fd/{self.fd}", flags | os.O_CLOEXEC)
        self._locks = (*self._locks, self.fd)
        self.fd = fd

    def measure(self) -> int:
        """Return the image's current size in bytes; another program may have changed it."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def resize(self, size: int) -> None:
        """Make a file ``size`` bytes long; what has that size already stays as it is.

        Raises:
            ImageError: it cannot be made longer or shorter through this.
        """
        length = self.measure()
        if size != length:
            if self.is_block_device:
                raise ImageError(
                    f"{self.path}: a block device of {length} bytes, which only its owner can "
                    f"change: do that first (such as: lvresize -L {size}b {self.path}), "
                    "then resize without a size"
                )
            if self.read_only:
                raise ImageError(
                    f"{self.path}: opened for reading only: change the file first (truncate -s "
                    f"{size} {self.path}), then resize without a size"
                )
            try:
                os.ftruncate(self.fd, size)
            except OSError as error:
                raise ImageError(
                    f"{self.path}: cannot be made {size} bytes long: {error.strerror}"
                ) from error
        self.size = size

    def close(self) -> None:
        """Unlock and close."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
            for lock_fd in self._locks:
                os.close(lock_fd)


class MappedImage(Closing):
    """An image as memory, all of it at once, however large.

    A page of it may be impossible to have at any moment: somebody cuts the image short, a sector
    is bad, there is no room for a hole that is filled. Touching it ourselves would then be a
    signal that kills the process (SIGBUS), and no check beforehand helps, since the image can be
    cut short right after it. So :meth:`store` has the system copy, through a memory file (memfd):
    that fails with EFAULT instead. It is not for reading: on tmpfs a hole that is read through a
    mapping is allocated.

    Args:
        image: stays the caller's to close, after this.
    """

    def __init__(self, image: Image) -> None:
        try:
            self.memory = mmap.mmap(image.fd, image.size, access=mmap.ACCESS_WRITE)
        except (OSError, OverflowError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ImageError(
                f"{image.path}: {format_size(image.size)} cannot be mapped into memory: "
                f"{reason} (--backend raw needs no mapping)"
            ) from error
        self._view = memoryview(self.memory)
        self._bounce = os.memfd_create("xen_disk_py")
        self._lock = threading.Lock()

    def store(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy ``buffers`` to ``offset`` bytes into the image; return their length.

        Raises:
            OSError: ``EIO``, a page cannot be had. Some of the bytes may have been stored.
        """
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        with self._lock, self._view[offset : offset + length] as target:
            done = 0
            if len(buffers) == 1:  # most requests
                done = os.pwrite(self._bounce, buffers[0], 0)
            if done != length:
                transfer_all(os.pwritev, self._bounce, buffers, 0)
            self._copy_out(target, f"{length} bytes at {offset}")
        return length

    def _copy_out(self, target: memoryview, what: str) -> None:
        try:
            done = os.preadv(self._bounce, [target], 0)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            done = 0
        if done != len(target):
            raise OSError(
                errno.EIO,
                f"{what} of the image cannot be had (no space left, or somebody made it shorter)",
            )

    def close(self) -> None:
        """Unmap."""
        if not self.memory.closed:
            self._view.release()
            self.memory.close()
            os.close(self._bounce)


def transfer_all(
    transfer: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
) -> int:
    """Call ``os.preadv`` or ``os.pwritev`` again and again until every buffer is done.

    Returns:
        The number of bytes.

    Raises:
        OSError: theirs, or ``EIO`` at the end of the file.
    """
    start = offset
    if len(buffers) <= IOV_MAX:
        offset += transfer(fd, buffers, offset)
        if offset - start == sum(map(len, buffers)):
            return offset - start
        offset = start
    rest = list(buffers)
    while rest:
        done = transfer(fd, rest[:IOV_MAX], offset)
        if not done:
            raise OSError(errno.EIO, f"the image ends at {offset}: somebody made it shorter")
        offset += done
        finished = 0
        while finished < len(rest) and done >= len(rest[finished]):
            done -= len(rest[finished])
            finished += 1
        del rest[:finished]
        if done:
            rest[0] = rest[0][done:]
    return offset - start


def cut(buffers: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Return what lies from ``start`` to ``stop`` in the buffers, as parts of them."""
    parts = []
    for buffer in buffers:
        if start < len(buffer) and stop > 0:
            parts.append(buffer[max(start, 0) : stop])
        start -= len(buffer)
        stop -= len(buffer)
    return parts


def nowait_flags(fd: int) -> int | None:
    """Return the flags with which a read does not wait; None if there are none."""
    flags = getattr(os, "RWF_NOWAIT", 0)  # not where Python was built without preadv2
    try:
        os.preadv(fd, [bytearray(1)], 0, flags)
    except BlockingIOError:
        pass
    except (OSError, NotImplementedError):
        flags = 0
    if not flags:
        # A file system that knows of no such thing; in some, though, nothing ever waits.
        return 0 if file_system(fd) in {"tmpfs", "ramfs", "hugetlbfs"} else None
    return flags


def file_system(fd: int) -> str | None:
    """Name the kind of file system that a file is in; None if that cannot be found out."""
    # 36 35 98:0 /root /mnt rw,noatime master:1 - ext4 /dev/sda1 rw   (proc(5))
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass
    return None


def open_file_or_disk(path: str, flags: int, name: str | None = None) -> int:
    """Open a file or block device, and nothing else that may come to have that name.

    To open a device of another kind may be all that it takes: a watchdog begins to count, a tape is
    rewound. So what the name leads to is looked at before it is opened, not afterwards.

    Args:
        path: what.
        flags: as of open(2).
        name: what to call it in messages.

    Raises:
        OSError: it cannot be opened.
        ImageError: it is something else.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _check_kind(name or path, os.fstat(found).st_mode)
        return os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC)
    finally:
        os.close(found)


def _check_kind(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise ImageError(f"{path}: a directory: give the image file in it, or a block device")
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ImageError(f"{path}: neither a file nor a block device: it cannot be a disk")


def _warn_of(container: Signature, path: str) -> None:
    """Warn of an image that looks like one in another format; refuse an overlay of ours."""
    if container.is_overlay:
        raise ImageError(
            f"{path}: an overlay, whose own structure a guest would see: {container.remedy}"
        )
    if sharing.is_looking():
        return  # who looks says so himself
    log.warning(
        "%s: looks like %s, whose own structure the guest will see; if it is to see the disk "
        "inside, %s",
        path,
        container.name,
        f"use {container.option}" if container.option else f"convert it first: {container.remedy}",
    )


def _check_size(path: str, size: int, sector_size: int, container: Signature | None) -> None:
    """See that a disk of such sectors fits an image."""
    if not size:
        raise ImageError(f"{path}: empty: give it a size first, such as: truncate -s 1G {path}")
    if size % sector_size:
        if container is not None:
            remedy = f"it looks like {container.name}: {container.remedy}"
        elif sector_size != SECTOR and not size % SECTOR:
            remedy = f"use --sector-size 512, or pad it with: truncate -s %{sector_size} {path}"
        else:  # never round down: what a file system has at the end would be lost
            remedy = f"pad it with: truncate -s %{sector_size} {path}"
        raise ImageError(
            f"{path}: its size, {size} bytes, is not a multiple of {sector_size}: {remedy}"
        )


def reason_of(error: OSError, path: str, writable: bool) -> str:
    """Say why a file cannot be opened, and what to do."""
    if error.errno == errno.ENOENT and "://" in path:
        return (
            "no such file, and no address of a disk that is known here (nbd:// is); for others, "
            f"have nbdkit serve it: --path '[ nbdkit --exit-with-parent curl {path} ]'"
        )
    if error.errno == errno.ENOENT:
        return f"no such file: check the name, or make it with: truncate -s 1G {path}"
    if error.errno in (errno.EACCES, errno.EPERM):
        if writable and _is_read_only_device(path):  # a loop device's own answer is EPERM
            return _READ_ONLY
        if writable:
            return "no permission to write it: run as its owner or root, or add --read-only"
        return "no permission to read it: run as its owner or root"
    if error.errno == errno.EROFS:
        return _READ_ONLY
    if error.errno == errno.EBUSY:
        how = sharing.explain_busy(path) or f"lsblk {path} tells how"
        return f"in use by this system ({how}): unmount or release it first{sharing.or_force()}"
    return error.strerror or str(error)


def _is_read_only(fd: int) -> bool:
    """Ask a block device; a write-protected one may be open for writing all the same."""
    (answer,) = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    return bool(answer)


def check_writable(fd: int, path: str) -> None:
    """See that an open block device is not write-protected.

    Raises:
        ImageError: it is.
    """
    if _is_read_only(fd):
        raise ImageError(f"{path}: {_READ_ONLY}")


def _is_read_only_device(path: str) -> bool:
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            return False
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _is_read_only(fd)
    except OSError:
        return False
    finally:
        os.close(fd)


def _logical_block_size(fd: int) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return int(size)
