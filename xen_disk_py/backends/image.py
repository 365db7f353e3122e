"""Image files and block devices: opened, checked, locked and, for some backends, mapped.

The format of an image is never guessed from its content, which a guest may have written: an
image is the bytes of the disk, no more.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Sequence

from ..errors import ImageError
from ..hypervisor import Closing
from ..units import format_size

PAGE = mmap.PAGESIZE
SECTOR = 512
IOV_MAX = 1024  # linux/uio.h: buffers in one system call

_BLKSSZGET = 0x1268  # linux/fs.h: the logical block size of a device
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python's mmap from 3.11 on
_MADV_POPULATE_READ = 22  # asm-generic/mman-common.h, from Linux 5.14 on
_MADV_POPULATE_WRITE = 23


class Image(Closing):
    """An open image, locked until it is closed.

    Writers hold it alone, readers share it. The lock is ``flock``'s: it ends with the process,
    however that ends.

    Attributes:
        fd: the descriptor, not inherited by programs we start.
        path: absolute.
        size: bytes, a positive multiple of 512.
        sector_size: the logical sector: the device's own, 512 for a file.
        read_only: opened for reading only.
        is_block_device: a block device, not a file.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        size: int,
        *,
        sector_size: int,
        read_only: bool,
        is_block_device: bool,
    ) -> None:
        self.fd = fd
        self.path = path
        self.size = size
        self.sector_size = sector_size
        self.read_only = read_only
        self.is_block_device = is_block_device

    @classmethod
    def open(cls, path: str, *, writable: bool) -> Image:
        """Open, check and lock.

        Raises:
            ImageError: it cannot be used; the message says why and what to do.
        """
        try:
            mode = os.stat(path).st_mode  # first, since opening a pipe waits for its other end
            is_block_device = stat.S_ISBLK(mode)
            _check_kind(path, mode)
            flags = os.O_RDWR if writable else os.O_RDONLY
            if writable and is_block_device:
                flags |= os.O_EXCL  # the kernel then refuses a device that is mounted
            fd = os.open(path, flags)
        except OSError as error:
            raise ImageError(f"{path}: {_reason(error, path, writable)}") from error
        try:
            _check_kind(path, os.fstat(fd).st_mode)
            _lock(fd, path, writable, is_block_device)
            size = os.lseek(fd, 0, os.SEEK_END)
            _check_size(path, size)
            sector_size = _logical_block_size(fd) if is_block_device else SECTOR
        except OSError as error:
            os.close(fd)
            raise ImageError(f"{path}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return cls(
            fd,
            os.path.abspath(path),
            size,
            sector_size=sector_size,
            read_only=not writable,
            is_block_device=is_block_device,
        )

    def close(self) -> None:
        """Unlock and close."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _map(image: Image, private: bool) -> mmap.mmap:
    if not private:
        access = mmap.ACCESS_READ if image.read_only else mmap.ACCESS_WRITE
        return mmap.mmap(image.fd, image.size, access=access)
    try:
        return mmap.mmap(image.fd, image.size, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    # what ACCESS_COPY is, with a flag added, which it does not allow
    return mmap.mmap(
        image.fd,
        image.size,
        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )


class MappedImage(Closing):
    """An image as memory.

    All of it at once, however large. (The kernel refuses a private writable mapping larger than
    RAM and swap, though hardly a page of it may ever be written; then it is mapped with
    ``MAP_NORESERVE``, which sets no memory aside.)

    What would be a fatal signal in the middle of a copy (an image cut short by somebody, a bad
    sector, no room left for a hole that is filled) is an ``OSError`` here, on Linux 5.14 or
    newer: :meth:`fault_in` has the kernel fetch the pages first, and that can fail politely.

    Args:
        image: stays the caller's to close, after this.
        private: what is written stays in memory, page by page; the image never changes.
    """

    def __init__(self, image: Image, *, private: bool) -> None:
        try:
            self.memory = _map(image, private)
        except (OSError, OverflowError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            hint = (
                "vm.overcommit_memory=2 forbids it" if private else "--backend raw needs no mapping"
            )
            raise ImageError(
                f"{image.path}: {format_size(image.size)} cannot be mapped into memory: "
                f"{reason} ({hint})"
            ) from error
        self._view = memoryview(self.memory)
        self._can_populate = self._populates()

    def _populates(self) -> bool:
        try:
            self.memory.madvise(_MADV_POPULATE_READ, 0, PAGE)
        except OSError as error:
            return error.errno != errno.EINVAL  # Linux before 5.14 knows no such advice
        return True

    def fault_in(self, offset: int, length: int, *, write: bool) -> None:
        """Have the pages of a range in memory, for reading or for writing."""
        if not self._can_populate:
            return
        start = offset - offset % PAGE
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        try:
            self.memory.madvise(advice, start, offset + length - start)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            doing = "written (no space left?)" if write else "read"
            raise OSError(
                errno.EIO, f"{length} bytes at {offset} of the image cannot be {doing}"
            ) from error

    def copy_out(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers`` from the image."""
        view = self._view
        for buffer in buffers:
            end = offset + len(buffer)
            buffer[:] = view[offset:end]
            offset = end

    def copy_in(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Store ``buffers`` into the mapping."""
        view = self._view
        for buffer in buffers:
            end = offset + len(buffer)
            view[offset:end] = buffer
            offset = end

    def close(self) -> None:
        """Unmap."""
        self._view.release()
        self.memory.close()


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
    rest = list(buffers)
    start = offset
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


def _check_kind(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise ImageError(f"{path}: a folder: give the image file in it, or a block device")
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ImageError(f"{path}: neither a file nor a block device: it cannot be a disk")


def _check_size(path: str, size: int) -> None:
    if not size:
        raise ImageError(f"{path}: empty: give it a size first, such as: truncate -s 1G {path}")
    if size % SECTOR:
        raise ImageError(
            f"{path}: its size, {size} bytes, is not a multiple of {SECTOR}: "
            f"pad it with: truncate -s %{SECTOR} {path}"
        )


def _reason(error: OSError, path: str, writable: bool) -> str:
    """Say why a file cannot be opened, and what to do."""
    if error.errno == errno.ENOENT:
        return f"no such file: check the name, or make it with: truncate -s 1G {path}"
    if error.errno in (errno.EACCES, errno.EPERM):
        if writable:
            return "no permission to write it: run as its owner or root, or add --read-only"
        return "no permission to read it: run as its owner or root"
    if error.errno == errno.EROFS:
        return "read-only here: add --read-only, or use --backend cow"
    if error.errno == errno.EBUSY:
        return f"in use by this system (lsblk {path} tells how): unmount or release it first"
    return error.strerror or str(error)


def _logical_block_size(fd: int) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return int(size)


def _lock(fd: int, path: str, writable: bool, is_block_device: bool) -> None:
    operation = (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB
    # udev locks a device for the blink of an eye when it looks into it: try for a second.
    deadline = time.monotonic() + is_block_device
    while True:
        try:
            return fcntl.flock(fd, operation)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        except OSError as error:
            raise ImageError(f"{path}: cannot be locked: {error.strerror}") from error
    holder = ", ".join(_holders(os.fstat(fd))) or "another process"
    if writable:
        raise ImageError(
            f"{path}: in use by {holder}: a disk that writes needs its image alone, "
            "disconnect the other first"
        )
    raise ImageError(f"{path}: being written by {holder}: disconnect that disk first")


def _holders(status: os.stat_result) -> list[str]:
    """Name the processes that hold a lock on a file, as far as /proc tells."""
    # 1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF      (the device in hex; -> waits only)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    where = f"{device}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            fields = [line.split() for line in locks]
    except OSError:
        return []
    pids = {int(f[4]) for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5] == where}
    return [_process(pid) for pid in sorted(pids) if pid > 0]


def _process(pid: int) -> str:
    command: str | None = None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            words = cmdline.read(200).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        command = "".join(letter if letter.isprintable() else "?" for letter in words)
    except OSError:
        pass  # gone, or not ours to look at
    return f"process {pid} ({command})" if command else f"process {pid}"
