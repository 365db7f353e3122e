"""What exports of all kinds have in common: the new file, and a source that is being written."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Callable, Protocol

from ..errors import BackendError, DeviceError, ImageError, UsageError
from ..units import format_size
from . import Backend
from .before_images import put_over
from .image import transfer_all
from .locks import lock
from .newfile import NewFile, why

log = logging.getLogger("xen_disk_py")

_CHUNK = 1 << 20  # read in one go
_PIECE = 64 << 10  # if it is nothing but zeros, a hole is left
_SETTLING = 0.05  # seconds; file systems note times of modification in steps of up to 0.01
_ATTEMPTS = 3
_FICLONE = 0x40049409  # linux/fs.h

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, and of how many."""

Check = Callable[[str, bool], None]
"""Is given the path of a file once it is open, and locked, and whether it will be written."""


class Kept(Protocol):
    """Before-images that another process keeps of a disk, from now on."""

    def check(self) -> None:
        """Raise ``DeviceError`` if they are lost already: nobody need copy the rest."""

    def finish(self) -> bytearray:
        """Return when all are in the file: what it has, see :func:`~.before_images.put_over`.

        Raises:
            DeviceError: something is missing.
        """


Keep = Callable[[int, int, int], AbstractContextManager[Kept]]
"""Is given a file that a disk writes, the size of the disk, and an empty file: has before-images
kept in that while in the context. Raises ``DeviceError`` if nobody can."""

Convert = Callable[[int, int], None]
"""Is given a raw image and an empty file, both open, and makes the latter of the former."""


@contextmanager
def exported(
    new: str, size: int, sources: Sequence[int], *, force: bool, convert: Convert | None
) -> Iterator[NewFile]:
    """Make a file to be filled with a raw image; what comes of that gets its name at the end.

    Args:
        new: the new image, for its owner alone.
        size: of the disk, in bytes.
        sources: open files that it must not replace.
        force: replace the file that is there.
        convert: makes the new image of the raw one.

    Raises:
        UsageError: there is a file, or something that is never replaced.
        ImageError: it cannot be made, and nothing has changed.
    """
    new = os.path.realpath(new) if force else os.path.abspath(new)
    with ExitStack() as stack:
        stack.enter_context(_replaceable(new, force, *sources))
        raw = made = stack.enter_context(new_image(new, size))
        yield raw
        if convert is not None:
            made = stack.enter_context(new_image(new, size))
            convert(raw.fd, made.fd)
        os.fsync(made.fd)
        made.put(new, replacing=force)


def export_disk(
    disk: Backend, new: str, *, force: bool, progress: Progress, convert: Convert | None = None
) -> int:
    """Make a new image of what a guest would read of any disk; return its size, in bytes.

    Args:
        disk: open; nothing is written to it.
        new: the new image, sparse, for its owner alone.
        force: replace the file that is there.
        progress: told how far it is.
        convert: makes the new image of the raw one.

    Raises:
        UsageError: there is a file, or something that is never replaced.
        ImageError: the new image cannot be made, and nothing has changed.
        BackendError: the disk cannot be read.
    """
    with exported(new, disk.size, (), force=force, convert=convert) as raw:
        os.ftruncate(raw.fd, disk.size)
        buffer = memoryview(bytearray(_CHUNK))
        for at in range(0, disk.size, _CHUNK):
            chunk = buffer[: min(_CHUNK, disk.size - at)]
            _read(disk, chunk, at)
            for start in range(0, len(chunk), _PIECE):
                piece = chunk[start : start + _PIECE]
                if any(piece):
                    transfer_all(os.pwritev, raw.fd, [piece], at + start)
            progress(at, disk.size)
        progress(disk.size, disk.size)
    return disk.size


def _read(disk: Backend, chunk: memoryview, offset: int) -> None:
    done = 0
    while done < len(chunk):
        try:
            moved = disk.read([chunk[done:]], offset + done)
        except Exception as error:
            raise BackendError(f"{disk} cannot be read at {offset}: {error}") from error
        if moved is None:
            return
        if moved <= 0:
            raise BackendError(f"{disk} cannot be read at {offset}: it ends too early")
        done += moved


def at_one_instant(
    fd: int,
    path: str,
    copy: Callable[[int, Progress], None],
    *,
    size: int,
    raw: NewFile,
    keep: Keep | None,
    progress: Progress,
) -> None:
    """Copy what a file is at one instant, though somebody is writing it.

    It is cloned, where the file system can; or whoever writes it keeps what that overwrites (see
    :mod:`.before_images`), if it is a disk of ours; else it is copied until nobody writes
    meanwhile.

    Args:
        fd: the file, which is left open.
        path: its name.
        copy: given a descriptor, which it closes, of a clone, or of the file itself: then it may
            be called again; and what it is to tell how far it is. Makes the new image.
        size: of the disk, in bytes.
        raw: the new image.
        keep: has the disk that writes the file keep before-images; None: nobody can.
        progress: told how far it is.

    Raises:
        ImageError: it is written all the time; or from ``copy``.
    """
    clone = _clone(fd, path)
    if clone is not None:
        copy(clone, progress)
        return
    why = ""
    for _ in range(_ATTEMPTS):
        # Nobody keeps them, say, since the process was just killed: the next one may.
        if keep is not None:
            try:
                if _copy_and_keep(fd, copy, size, raw, keep, progress):
                    return
            except DeviceError as error:
                why = f" ({error})"
                log.debug("%s: %s", path, error)
        if _copy_unchanged(fd, copy, progress):
            return
    raise ImageError(
        f"{path}: its guest writes while it is copied, and this file system cannot clone files"
        f"{why}: pause the guest meanwhile (xl pause VM, then xl unpause VM), or disconnect the "
        "disk"
    )


def _copy_and_keep(
    fd: int,
    copy: Callable[[int, Progress], None],
    size: int,
    raw: NewFile,
    keep: Keep,
    progress: Progress,
) -> bool:
    """Copy a file, and put before-images over that; False if it could not be read.

    Raises:
        DeviceError: before-images are missing.
        ImageError: from ``copy``.
    """
    with raw.another() as images, keep(fd, size, images.fd) as kept:

        def checked(done: int, of: int) -> None:
            kept.check()
            progress(done, of)

        modified = os.fstat(fd).st_mtime_ns
        try:
            copy(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), checked)
        except ImageError:  # it was just becoming larger, say
            if modified == os.fstat(fd).st_mtime_ns:
                raise
            return False
        put_over(images.fd, kept.finish(), size, raw.fd)
    return True


def _copy_unchanged(fd: int, copy: Callable[[int, Progress], None], progress: Progress) -> bool:
    """Copy a file when nobody seems to write; False if somebody did.

    Raises:
        ImageError: from ``copy``.
    """
    before = _settled(fd)
    if before is None:
        return False
    try:
        copy(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), progress)
    except ImageError:
        if before == os.fstat(fd).st_mtime_ns:
            raise
        return False
    return before == os.fstat(fd).st_mtime_ns


def _clone(fd: int, path: str) -> int | None:
    """Clone a file, all of it at one instant; None where that cannot be done."""
    try:
        with NewFile(path) as copy:
            fcntl.ioctl(copy.fd, _FICLONE, fd)
            return copy.detach()
    except OSError:
        return None


def _settled(fd: int) -> int | None:
    """Wait until a file was not written for a moment; None if that does not happen.

    Returns:
        The time of modification, in nanoseconds: whatever is written from now on changes it.
    """
    for _ in range(100):
        modified = os.fstat(fd).st_mtime_ns
        time.sleep(_SETTLING)
        if os.fstat(fd).st_mtime_ns == modified:
            return modified
    return None


@contextmanager
def _replaceable(new: str, force: bool, *sources: int) -> Iterator[None]:
    """See that ``new`` may be made; what is replaced is locked meanwhile."""
    if not os.path.lexists(new):
        yield
        return
    if not force:
        if os.path.isdir(new):
            raise UsageError(f"{new}: a directory: name the file to make in it")
        raise UsageError(f"{new}: there is such a file: give another name, or --force")
    status = os.stat(new)
    if any(os.path.samestat(status, os.fstat(source)) for source in sources):
        raise UsageError(f"{new}: the overlay or its image itself: give another name")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{new}: not a file, so it is not replaced: give another name")
    try:
        fd = os.open(new, os.O_RDWR)
    except OSError as error:
        raise ImageError(f"{new}: cannot be replaced: {error.strerror}") from error
    try:
        lock(fd, new, True, False)
        yield
    finally:
        os.close(fd)


@contextmanager
def new_image(path: str, size: int) -> Iterator[NewFile]:
    """Make a file that is to become the image ``path``, of a disk of ``size`` bytes."""
    try:
        with NewFile(path) as new:
            yield new
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f" (up to {format_size(size)} are needed there)"
        raise ImageError(
            f"{path}: the new image cannot be made: {why(error, path)}{hint}; nothing was changed"
        ) from error
