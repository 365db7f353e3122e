"""What a VHD holds, and a raw image of what a guest reads of it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from contextlib import closing

from ..exporting import Check, Convert, Keep, Progress, at_one_instant, exported
from ..image import Image, transfer_all
from .blocks import BlockLayer
from .chain import Top, open_chain
from .opening import examine, open_vhd

_CHUNK = 1 << 20


def allocated(path: str) -> tuple[int, list[tuple[int, int]]]:
    """Return the size of the disk, and the extents that this VHD has itself.

    Raises:
        ImageError: it cannot be used, or a disk is writing to it.
    """
    vhd = open_vhd(path, writable=False)
    try:
        if vhd.blocks is None:
            return vhd.size, [(0, vhd.size)]
        layer = BlockLayer(vhd, vhd.blocks, None, writable=False)  # the parents do not matter
        return vhd.size, [(start, stop - start) for start, stop in layer.allocated(0, vhd.size)]
    finally:
        os.close(vhd.fd)


def export(
    path: str,
    new: str,
    *,
    force: bool,
    directories: Sequence[str] = (),
    progress: Progress,
    convert: Convert | None = None,
    check: Check = lambda path, writes: None,
    keep: Keep | None = None,
) -> int:
    """Make a new image of what a VHD and its parents are together.

    A disk may even be writing the VHD: then the new image is what a guest would find if its host
    had failed at one instant of the copying.

    Args:
        path: the VHD.
        new: the new image, sparse, for its owner alone.
        force: replace the file that is there.
        directories: where parents may lie, besides its own directory.
        progress: told how far it is.
        convert: given the raw image and an empty file, both open: makes the latter the new image.
        check: called with each file of the chain before anything is done; may raise.
        keep: see :func:`~..exporting.at_one_instant`.

    Returns:
        The size of the disk, in bytes.

    Raises:
        UsageError: there is a file, or something that is never replaced.
        ImageError: it cannot be done, and nothing has changed.
    """
    fd = _open_if_written(path)
    if fd is None:
        with closing(open_chain(path, writable=False, directories=directories)) as top:
            sources = [top.fd] if isinstance(top, Image) else top.descriptors
            _check(sources, check)
            with exported(new, top.size, sources, force=force, convert=convert) as raw:
                return _fill(raw.fd, top, progress)
    try:
        size = examine(fd, os.path.abspath(path)).size
        is_checked = False
        with exported(new, size, [fd], force=force, convert=convert) as raw:

            def copy(now: int, progress: Progress) -> None:
                nonlocal size, is_checked
                top = _open_chain_of(now, path, directories)
                with closing(top):
                    sources = [] if isinstance(top, Image) else top.descriptors[1:]
                    if not is_checked:  # not when the process that serves it was killed meanwhile
                        _check([fd, *sources], check)
                    is_checked = True
                    os.ftruncate(raw.fd, 0)
                    size = _fill(raw.fd, top, progress)

            at_one_instant(fd, path, copy, size=size, raw=raw, keep=keep, progress=progress)
        return size
    finally:
        os.close(fd)


def _open_if_written(path: str) -> int | None:
    """Open a file that one of our disks is writing to; None if it is none, or cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None  # whoever opens it says why
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):  # a device has no time of modification
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return fd
    except OSError:
        pass  # no locks here: as above
    os.close(fd)
    return None


def _open_chain_of(fd: int, path: str, directories: Sequence[str]) -> Top:
    try:
        vhd = examine(fd, os.path.abspath(path))
    except BaseException:
        os.close(fd)
        raise
    return open_chain(path, writable=False, directories=directories, vhd=vhd)


def _check(sources: Sequence[int], check: Check) -> None:
    for source in sources:
        check(os.readlink(f"/proc/self/fd/{source}"), False)


def _fill(fd: int, top: Top, progress: Progress) -> int:
    """Make a raw image, sparse, in an empty file; return its size."""
    os.ftruncate(fd, top.size)
    extents = [(0, top.size)] if isinstance(top, Image) else top.allocated(0, top.size)
    for start, stop in extents:
        for at in range(start, stop, _CHUNK):
            _copy(top, fd, at, min(_CHUNK, stop - at))
            progress(at, top.size)
    progress(top.size, top.size)
    return top.size


def _copy(top: Top, fd: int, offset: int, length: int) -> None:
    piece = memoryview(bytearray(length))
    done = 0
    while done < length:
        moved = top.read([piece[done:]], offset + done)
        if not moved:
            raise OSError(errno.EIO, f"{top.path} ends too early: somebody made it shorter")
        done += moved
    if any(piece):
        transfer_all(os.pwritev, fd, [piece], offset)
