"""What is done with an overlay that no disk uses: put it into its image, or make one of both.

Both write a complete new image under a temporary name, and give it its own when it is on stable
storage. Until then nothing has changed; what fails or is interrupted removes what it has written.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Callable

from ...errors import ImageError, UsageError
from ...units import format_size
from ..image import Image, lock
from .file import Header, OverlayFile, extents, put_in_place, temporary_beside

_CHUNK = 16 << 20  # copied in one go, between two reports of progress
_PIECE = 64 << 10  # if it is nothing but zeros, a hole is left

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, and of how many."""


def held(file: OverlayFile) -> list[tuple[int, int]]:
    """List the runs of bytes that an overlay holds: where each starts on the disk, its length."""
    return [(start, stop - start) for start, stop, here in file.runs(0, file.header.size) if here]


def held_bytes(file: OverlayFile) -> int:
    """Count them."""
    return sum(length for _, length in held(file))


def commit(overlay: str, *, keep: bool, progress: Progress) -> tuple[str, int]:
    """Put what an overlay holds into its image.

    The new image has the owner, mode and extended attributes of the old one, and its place. It is
    another file, which other overlays of the old one do not fit.

    Args:
        overlay: the file; removed afterwards.
        keep: leave an empty overlay in its place.
        progress: told how far it is.

    Returns:
        The path of the image, symbolic links resolved, and how many bytes were put into it.

    Raises:
        ImageError: it cannot be done, and nothing has changed.
    """
    overlay = os.path.realpath(overlay)  # it is the file that is removed, not a link to it
    with OverlayFile.open(overlay, writable=True) as file:
        path = os.path.realpath(_image_of(file))
        _refuse_what_cannot_be_replaced(path, overlay)
        with Image.open(path, writable=True, sector_size=file.header.sector_size) as image:
            file.header.check(image, overlay)
            with _new_image(file, image, path, progress) as (fd, temporary):
                _take_after(fd, image.fd, path)
                os.fsync(fd)
                header = Header.of(fd, file.header.path, image.size, file.header.sector_size)
                put_in_place(temporary, path, replacing=True)
            count = held_bytes(file)
            if keep:
                OverlayFile.create(overlay, header, replacing=True).close()
            else:
                os.unlink(overlay)
    return path, count


def export(overlay: str, new: str, *, force: bool, progress: Progress) -> int:
    """Make a new image of an overlay and its image, which other disks may be using.

    Args:
        overlay: the file.
        new: the new image, for its owner alone.
        force: replace the file that is there.
        progress: told how far it is.

    Returns:
        The size of the new image, in bytes.

    Raises:
        UsageError: there is a file, or something that is never replaced.
        ImageError: it cannot be done, and nothing has changed.
    """
    new = os.path.realpath(new) if force else os.path.abspath(new)
    with (
        OverlayFile.open(overlay, writable=False, alone=False) as file,
        Image.open(_image_of(file), writable=False, sector_size=file.header.sector_size) as image,
    ):
        file.header.check(image, overlay)
        with (
            _replaceable(new, force, file.fd, image.fd),
            _new_image(file, image, new, progress) as (fd, temporary),
        ):
            os.fsync(fd)
            put_in_place(temporary, new, replacing=force)
        return image.size


def _image_of(file: OverlayFile) -> str:
    """Return the path of the image, which is there."""
    path = file.header.path
    if not os.path.exists(path):
        raise ImageError(f"{file.path}: its image, {path}, is not there: put it back first")
    return path


def _refuse_what_cannot_be_replaced(path: str, overlay: str) -> None:
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        raise ImageError(
            f"{path}: a block device cannot be replaced as a whole, and nothing is committed by "
            f"halves: export {overlay} to a new image, then copy that to the device"
        )
    if status.st_nlink > 1:
        raise ImageError(
            f"{path}: has {status.st_nlink} names (hard links), and the others would keep the old "
            f"content: remove them, or export {overlay} to a new image"
        )


@contextmanager
def _replaceable(new: str, force: bool, *sources: int) -> Iterator[None]:
    """See that ``new`` may be made; what is replaced is locked meanwhile."""
    if not os.path.lexists(new):
        yield
        return
    if not force:
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
def _new_image(
    file: OverlayFile, image: Image, path: str, progress: Progress
) -> Iterator[tuple[int, str]]:
    """Make a complete image under a temporary name beside ``path``, to be put in place."""
    try:
        fd, temporary = temporary_beside(path)
        try:
            _merge(file, image, fd, progress)
            file.header.check(image, file.path)  # locks do not keep everybody out:
            file.check_length()  # what is cut short meanwhile ends in a hole
            yield fd, temporary
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):  # it is in its place
                os.unlink(temporary)
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f" (up to {format_size(image.size)} are needed there)"
        raise ImageError(
            f"{path}: the new image cannot be made: {error.strerror}{hint}; nothing was changed"
        ) from error


def _merge(file: OverlayFile, image: Image, fd: int, progress: Progress) -> None:
    """Write what the disk has into an empty file; holes stay holes."""
    os.ftruncate(fd, image.size)
    for start, stop, here in file.runs(0, image.size):
        source, shift = (file.fd, file.data) if here else (image.fd, 0)
        for first, last in extents(source, start + shift, stop + shift):
            for at in range(first, last, _CHUNK):
                _copy(source, at, fd, at - shift, min(_CHUNK, last - at))
                progress(at - shift, image.size)
        progress(stop, image.size)


def _copy(source: int, at: int, target: int, to: int, length: int) -> None:
    """Copy bytes from file to file, by the file system itself where it can."""
    copy_file_range = getattr(os, "copy_file_range", None)  # not with every C library
    while length and copy_file_range is not None:
        try:
            done = copy_file_range(source, target, length, at, to)
        except OSError as error:
            # between these two files not, or not here at all (copy_file_range(2))
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if not done:
            break  # some file systems say that they have copied nothing
        at, to, length = at + done, to + done, length - done
    while length:
        piece = os.pread(source, min(_PIECE, length), at)
        if not piece:
            raise OSError(errno.EIO, f"a file ends at {at}: somebody made it shorter")
        zeros = piece.count(0) == len(piece)
        done = len(piece) if zeros else os.pwrite(target, piece, to)
        at, to, length = at + done, to + done, length - done


def _take_after(fd: int, old: int, path: str) -> None:
    """Give a new file the owner, the mode and the extended attributes of an old one."""
    status = os.fstat(old)
    try:
        os.fchown(fd, status.st_uid, status.st_gid)
    except PermissionError as error:
        raise ImageError(f"{path}: its owner cannot be kept: do this as root") from error
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    try:
        names = os.listxattr(old)
    except OSError:
        return  # the file system knows none
    for name in names:
        with suppress(OSError):  # the security module's own, for one, may not be ours to set
            os.setxattr(fd, name, os.getxattr(old, name))
