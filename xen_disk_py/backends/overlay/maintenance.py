"""What is done with overlays: put them into their image, make a new image, change the image.

A new image is complete, and on stable storage, before it gets its name: until then nothing has
changed, and what fails or is interrupted leaves nothing behind (see :mod:`.newfile`). A commit
notes in the overlay, before it replaces the image, that it is about to. Whoever opens the overlay
next sees by that, and by which image is there, whether to finish the commit or to forget it.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ...errors import ImageError
from ..exporting import Check, Convert, Keep, Progress, at_one_instant, exported, new_image
from ..holes import data_extents
from ..image import Image
from ..newfile import NewFile, sync_directory
from .file import OverlayFile
from .header import Commit
from .trust import require_trusted

_CHUNK = 16 << 20  # copied in one go, between two reports of progress
_COMPARED = 1 << 20  # compared in one go
_PIECE = 64 << 10  # if it is nothing but zeros, a hole is left
_PRIVILEGES = ("security.capability", "security.ima", "security.evm")


def allocated_extents(file: OverlayFile) -> list[tuple[int, int]]:
    """List the extents that an overlay has: where each starts on the disk, its length, in bytes."""
    return [
        (start, stop - start) for start, stop, here in file.extents(0, file.header.size) if here
    ]


def allocated_bytes(file: OverlayFile) -> int:
    """Count them."""
    return sum(length for _, length in allocated_extents(file))


def commit(
    overlay: str,
    *,
    keep: bool,
    progress: Progress,
    path: str | None = None,
    check: Check = lambda path, writes: None,
) -> tuple[str, int]:
    """Put what an overlay holds into its image.

    The new image has the owner, the permissions and the extended attributes of the old one, and
    its place; not its set-user-ID and set-group-ID bits. It is another file, which other overlays
    of the old one do not fit. A commit that was killed is finished.

    Args:
        overlay: the file; removed afterwards.
        keep: leave an empty overlay in its place.
        progress: told how far it is.
        path: the image; by default the one that the overlay names, if that can be trusted.
        check: called with the overlay, then with the image, before anything is done; may raise.

    Returns:
        The path of the image, symbolic links resolved, and how many bytes were put into it.

    Raises:
        ImageError: it cannot be done, and nothing has changed; or the image is replaced, and the
            message says so.
    """
    given, overlay = overlay, os.path.realpath(overlay)  # not a link to it is removed
    with OverlayFile.open(overlay, writable=True) as file:
        check(overlay, True)
        named = _image_of(file, given, path)
        path = os.path.realpath(named)
        _refuse_what_cannot_be_replaced(path, overlay)
        with file.open_image(path, writable=True) as image:
            check(path, True)
            count = allocated_bytes(file)
            if not file.header.was_committed(image):
                file.header.check(image, overlay)
                _replace_image(file, image, path, keep, progress)
        _finish(file, named, path)
    return path, count


def _replace_image(
    file: OverlayFile, image: Image, path: str, keep: bool, progress: Progress
) -> None:
    with new_image(path, image.size) as new:
        _merge(file, image, new.fd, progress)
        _check_still_fits(file, image)
        _take_after(new.fd, image.fd, path)
        os.fsync(new.fd)
        with _uninterrupted():
            file.note(Commit.of(new.fd, keep=keep))
            try:
                new.put(path, replacing=True)
            except BaseException:
                if os.path.samestat(os.stat(path), os.fstat(image.fd)):
                    with suppress(OSError):  # the image is the old one: without the note, too
                        file.note(None)
                raise


def _finish(file: OverlayFile, named: str, path: str) -> None:
    """Finish a commit whose image is in its place: empty the overlay, or remove it."""
    assert file.header.commit is not None
    with _uninterrupted():
        try:
            sync_directory(path)  # whoever put it there may have been killed before
            if file.header.commit.keep:
                with file.open_image(named, writable=False) as image:
                    file.empty(image)
            else:
                os.unlink(file.path)
        except (OSError, ImageError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ImageError(
                f"{path}: the changes are in it, but {file.path} is not finished with: {reason}; "
                f"to finish: xen-disk commit {file.path}"
            ) from error


def export(
    overlay: str,
    new: str,
    *,
    force: bool,
    progress: Progress,
    path: str | None = None,
    convert: Convert | None = None,
    check: Check = lambda path, writes: None,
    keep: Keep | None = None,
) -> int:
    """Make a new image of an overlay and its image, which other disks may be using.

    A disk may even be using the overlay: then the new image is what a guest would find if its
    host had failed at one instant of the copying.

    Args:
        overlay: the file.
        new: the new image, for its owner alone.
        force: replace the file that is there.
        progress: told how far it is.
        path: the image; by default the one that the overlay names, if that can be trusted.
        convert: given the raw image and an empty file, both open: makes the latter the new image.
        check: called with the overlay, then with the image, before anything is done; may raise.
        keep: see :func:`~..exporting.at_one_instant`.

    Returns:
        The size of the disk, in bytes.

    Raises:
        UsageError: there is a file, or something that is never replaced.
        ImageError: it cannot be done, and nothing has changed.
    """
    with ExitStack() as stack:
        file = stack.enter_context(OverlayFile.open(overlay, writable=False, alone=None))
        check(overlay, False)
        named = _image_of(file, overlay, path)
        image = stack.enter_context(file.open_image(named, writable=False))
        check(image.path, False)
        file.header.check(image, overlay)
        sources = (file.fd, image.fd)
        with exported(new, image.size, sources, force=force, convert=convert) as raw:
            _merge_consistently(file, image, raw, keep, progress)
        return image.size


def export_image(
    image: str,
    new: str,
    *,
    force: bool,
    progress: Progress,
    convert: Convert | None = None,
    check: Check = lambda path, writes: None,
) -> int:
    """Make a new image of an image or block device, which no disk may be writing to.

    Args and errors are those of :func:`export`.
    """
    with Image.open(image, writable=False) as source:
        check(image, False)
        with exported(new, source.size, (source.fd,), force=force, convert=convert) as raw:
            os.ftruncate(raw.fd, source.size)
            copy_extent(source.fd, 0, raw.fd, 0, source.size, source.size, progress)
        return source.size


def rebase(
    overlay: str,
    image: str,
    *,
    force: bool,
    progress: Progress,
    check: Check = lambda path, writes: None,
) -> None:
    """Have an overlay lie over another image, with the content that its own image had.

    Args:
        overlay: the file.
        image: the other image, or the old one, where it has moved, or was touched.
        force: take the caller's word that the content is the same; else it is compared, which
            takes the old image as it was.
        progress: told how far it is.
        check: called with the overlay, then with the image, before anything is done; may raise.

    Raises:
        ImageError: it cannot be done, and nothing has changed.
    """
    with (
        OverlayFile.open(overlay, writable=True) as file,
        Image.open(image, writable=False, sector_size=file.header.sector_size) as new,
    ):
        check(overlay, True)
        check(image, False)
        if new.size != file.header.size:
            raise ImageError(
                f"{new.path}: has {new.size} bytes, the image of {overlay} {file.header.size}: an "
                "overlay fits images of one size only"
            )
        if file.header.was_committed(new):
            raise ImageError(
                f"{new.path}: has the changes already, by a commit that was not finished: run "
                f"xen-disk commit {overlay}"
            )
        if not force and file.header.differences(new):
            _compare(file, overlay, new, progress)
        try:
            file.rebase(new)
            file.sync()
        except OSError as error:
            raise ImageError(f"{overlay}: cannot be written: {error.strerror}") from error


def _compare(file: OverlayFile, given: str, new: Image, progress: Progress) -> None:
    """See that an image has what the overlay's own has, but for what the overlay has itself."""
    path = file.header.path
    how = f"if you know that its content is what it was: xen-disk rebase {given} {new.path} --force"
    if os.path.realpath(path) == os.path.realpath(new.path) or not os.path.exists(path):
        reasons = ", and ".join(file.header.differences(new))
        raise ImageError(
            f"{new.path}: cannot be compared with what it was when {given} was made: {reasons}; "
            f"{how}"
        )
    require_trusted(file.fd, given, "give --force")
    with Image.open(path, writable=False, sector_size=file.header.sector_size) as old:
        file.header.check(old, given)
        for start, stop, here in file.extents(0, new.size):
            for at in range(start, stop, _COMPARED) if not here else ():
                length = min(_COMPARED, stop - at)
                then, now = os.pread(old.fd, length, at), os.pread(new.fd, length, at)
                if then != now:
                    first = at + next(
                        i for i, pair in enumerate(zip(then, now)) if len({*pair}) > 1
                    )
                    raise ImageError(
                        f"{new.path}: its content differs from {file.header.shown_path} at byte "
                        f"{first}: the overlay does not fit it"
                    )
                progress(at, new.size)


def _merge_consistently(
    file: OverlayFile, image: Image, raw: NewFile, keep: Keep | None, progress: Progress
) -> None:
    """Copy what the disk has at one instant, even if its guest is writing."""
    if not file.in_use:
        _merge(file, image, raw.fd, progress)
        _check_still_fits(file, image)
        return

    def copy(fd: int, progress: Progress) -> None:
        with OverlayFile.of(fd, file.path) as now:
            if file.is_live and not now.is_live:  # its disk goes by the other map
                raise ImageError(f"{file.path}: a flush of its guest failed meanwhile: try again")
            os.ftruncate(raw.fd, 0)
            _merge(now, image, raw.fd, progress)
            _check_still_fits(now, image)

    if not file.is_live:  # a flush has failed: its disk goes by the other map
        keep = None
    at_one_instant(file.fd, file.path, copy, size=image.size, raw=raw, keep=keep, progress=progress)


def _image_of(file: OverlayFile, given: str, path: str | None) -> str:
    """Return the path of the image, which is there."""
    if path is not None:
        return path
    require_trusted(file.fd, given)
    path = file.header.path
    if not os.path.exists(path):
        raise ImageError(
            f"{file.path}: its image, {file.header.shown_path}, is not there: put it back first, "
            f"or, if it has moved: xen-disk rebase {file.path} IMAGE"
        )
    return path


def _check_still_fits(file: OverlayFile, image: Image) -> None:
    file.header.check(image, file.path)  # locks do not keep everybody out:
    file.check_length()  # what is cut short meanwhile ends in a hole


def _refuse_what_cannot_be_replaced(path: str, overlay: str) -> None:
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        raise ImageError(
            f"{path}: a block device cannot be replaced as a whole, and a part of the changes is "
            f"never committed: export {overlay} to a new image, then copy that to the device"
        )
    if status.st_nlink > 1:
        raise ImageError(
            f"{path}: has {status.st_nlink} names (hard links), and the others would keep the old "
            f"content: remove them, or export {overlay} to a new image"
        )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let no signal end what is short and had better be finished."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _merge(file: OverlayFile, image: Image, fd: int, progress: Progress) -> None:
    """Write what the disk has into an empty file; holes stay holes."""
    os.ftruncate(fd, image.size)
    for start, stop, here in file.extents(0, image.size):
        source, shift = (file.fd, file.data) if here else (image.fd, 0)
        copy_extent(source, start + shift, fd, start, stop - start, image.size, progress)


def copy_extent(
    source: int, at: int, fd: int, to: int, length: int, total: int, progress: Progress
) -> None:
    """Copy what is no hole of an extent; ``total``: of the whole disk, in bytes."""
    shift = at - to
    for first, last in data_extents(source, at, at + length):
        for start in range(first, last, _CHUNK):
            _copy(source, start, fd, start - shift, min(_CHUNK, last - start))
            progress(start - shift, total)
    progress(to + length, total)


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
    """Give a new file the owner, permissions and extended attributes of an old one.

    Nothing that gives a program more rights: an overlay's author does not get to write those.
    """
    status = os.fstat(old)
    try:
        os.fchown(fd, status.st_uid, status.st_gid)
    except PermissionError as error:
        raise ImageError(f"{path}: its owner cannot be kept: do this as root") from error
    os.fchmod(fd, status.st_mode & 0o777)
    try:
        names = os.listxattr(old)
    except OSError:
        return  # the file system knows none
    for name in names:
        if name in _PRIVILEGES:
            continue
        with suppress(OSError):  # the security module's own, for one, may not be ours to set
            os.setxattr(fd, name, os.getxattr(old, name))
