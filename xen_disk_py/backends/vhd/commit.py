"""Puts what a differencing VHD has into its parent, as ``vhd-util coalesce`` does, in place.

While it runs, and if it is interrupted, the child still has all that it has, so the chain
reads as before, whatever the parent has by then; done again, it begins anew. When everything is in
the parent, on stable storage, the parent gets another UUID: its other children would read what is
not theirs, and are refused by it. Only then the child is removed.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ...errors import ImageError
from ..exporting import Check, Progress
from ..image import Image, open_file_or_disk
from .blocks import BlockLayer
from .chain import Committed, candidates, open_chain, open_parent, roots_of
from .create import create_child
from .growing import grow
from .layout import NO_UUID, committed_uuid
from .opening import Vhd, examine, open_vhd

log = logging.getLogger("xen_disk_py")

_CHUNK = 1 << 20
_SUFFIXES = (".vhd", ".avhd")
_MOST_FILES = 10_000  # looked into, for other children


def commit(
    path: str,
    *,
    keep: bool,
    directories: Sequence[str] = (),
    progress: Progress,
    check: Check = lambda path, writes: None,
) -> tuple[str, int]:
    """Put what a VHD has into its parent, and remove it.

    Args:
        path: the VHD.
        keep: leave an empty child of the parent in its place.
        directories: where parents may lie, besides its own directory.
        progress: told how far it is.
        check: called with the VHD, then with its parent, before anything is done; may raise.

    Returns:
        The parent, and how many bytes were written there.

    Raises:
        ImageError: it cannot be done; the disk reads as before.
    """
    path = os.path.realpath(path)  # it is the file that is removed, not a link to it
    child = open_vhd(path, writable=True)
    try:
        check(path, True)
        if child.is_device:
            raise ImageError(
                f"{path}: on a block device, which could not be removed then: commit it with "
                "vhd-util coalesce"
            )
        roots = roots_of(path, directories)
        parent, count = _commit(child, roots, directories, progress, check)
        is_raw = child.blocks is not None and child.blocks.header.parent_uuid == NO_UUID
        if keep:
            create_child(path, parent, is_raw=is_raw, directories=directories, replacing=True)
        else:
            _remove(path)
    finally:
        os.close(child.fd)
    return parent, count


def _commit(
    child: Vhd,
    roots: Sequence[str],
    directories: Sequence[str],
    progress: Progress,
    check: Check,
) -> tuple[str, int]:
    if child.blocks is None or not child.is_differencing:
        raise ImageError(
            f"{child.path}: has no parent that it could be committed to: only a child has one "
            "(xen-disk create NEW --parent FILE); export copies this one"
        )
    try:
        parent = open_parent([child], roots)
    except Committed as done:  # and the parent may have been written since
        if not done.is_complete:
            _complete(done.parent, [*roots, *directories], check)
        return done.parent, 0
    is_raw = isinstance(parent, Image)
    name, status = parent.path, os.fstat(parent.fd)
    uuid = b"" if isinstance(parent, Image) else parent.footer.uuid
    try:
        check(name, True)
        for other in _other_children(child, parent):
            raise ImageError(
                f"{other}: is a child of {name}, too, and would read what {child.path} has: commit "
                "that one first, or remove it"
            )
    finally:
        _close(parent)
    # Now for writing, alone: whoever serves it, or another child of it, has it locked.
    where = [*roots, *directories]
    top = (
        Image.open(name, writable=True)
        if is_raw
        else open_chain(name, writable=True, directories=where)
    )
    try:
        if not os.path.samestat(status, os.fstat(top.fd)):
            raise ImageError(f"{name}: was replaced meanwhile: try again")
        check(name, True)
        if child.size > top.size:
            _grow(child, top, name, is_raw=is_raw)
        count = _copy(child, top, progress)
        if not is_raw:
            _set_uuid(top, name, committed_uuid(child.footer.uuid, uuid))
    except OSError as error:
        hint = ": make room, and do it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ImageError(
            f"{name}: cannot be written: {error.strerror}{hint}; {child.path} still reads as before"
        ) from error
    except KeyboardInterrupt:
        log.warning(
            "%s was changed in part: use %s until the commit was done again", name, child.path
        )
        raise
    finally:
        top.close()
    return name, count


def _grow(child: Vhd, top: BlockLayer | Image, name: str, *, is_raw: bool) -> None:
    """Make the parent as large as the child."""
    try:
        if isinstance(top, Image) and is_raw:
            top.resize(child.size)
        else:
            if isinstance(top, BlockLayer):
                top.prepare()
            grow(top, child.size)
    except ImageError as error:
        raise ImageError(
            f"{child.path}: has {child.size} bytes of disk, more than its parent, {name}, with "
            f"{top.size}, which cannot be made larger: {error}: export the child instead"
        ) from error


def _copy(child: Vhd, top: BlockLayer | Image, progress: Progress) -> int:
    assert child.blocks is not None
    # Only to look at: it is closed with the child.
    layer = BlockLayer(child, child.blocks, None, writable=False)
    if isinstance(top, BlockLayer):
        top.prepare()
        top.is_ordered = False  # until the end it is the child that counts
    count = 0
    for start, stop, place in layer.extents(0, child.size):
        for at in range(start, stop if place >= 0 else start, _CHUNK):
            wanted = min(_CHUNK, stop - at)
            piece = memoryview(os.pread(child.fd, wanted, place + at - start))
            if len(piece) != wanted:
                raise OSError(errno.EIO, f"{child.path} ends too early")
            done = 0
            while done < wanted:
                done += top.write([piece[done:]], at + done)
            count += wanted
            progress(at, child.size)
    if isinstance(top, BlockLayer):
        top.stable.sync()
    else:
        os.fdatasync(top.fd)
    progress(child.size, child.size)
    return count


def _set_uuid(top: BlockLayer | Image, path: str, uuid: bytes) -> None:
    if isinstance(top, BlockLayer):
        top.set_uuid(uuid)
        return
    vhd = examine(top.fd, path)  # a fixed one: what lies behind the disk
    assert vhd.tail is not None
    os.pwrite(top.fd, vhd.footer.with_uuid(uuid).raw[: vhd.length - vhd.tail], vhd.tail)
    os.fdatasync(top.fd)


def _complete(parent: str, directories: Sequence[str], check: Check) -> None:
    """Have both footers of a parent say what one of them says."""
    top = open_chain(parent, writable=True, directories=directories)
    try:
        check(parent, True)
        if isinstance(top, BlockLayer):
            top.prepare()
    except OSError as error:
        raise ImageError(f"{parent}: cannot be written: {error.strerror}") from error
    finally:
        top.close()


def _close(parent: Vhd | Image) -> None:
    if isinstance(parent, Image):
        parent.close()
    else:
        os.close(parent.fd)


def _other_children(child: Vhd, parent: Vhd | Image) -> Iterator[str]:
    """Name the other children of a parent that lie beside it or beside the child."""
    status = os.fstat(parent.fd)
    ours = [status, os.fstat(child.fd)]
    uuid = NO_UUID if isinstance(parent, Image) else parent.footer.uuid
    for directory in {os.path.dirname(child.path), os.path.dirname(parent.path)}:
        names = [name for name in os.listdir(directory) if name.lower().endswith(_SUFFIXES)]
        for name in sorted(names)[:_MOST_FILES]:
            path = os.path.join(directory, name)
            try:
                fd = open_file_or_disk(path, os.O_RDONLY | os.O_NONBLOCK)
            except (OSError, ImageError):
                continue
            try:
                if any(os.path.samestat(os.fstat(fd), each) for each in ours):
                    continue
                other = examine(fd, path)
                if other.blocks is None or not other.is_differencing:
                    continue
                if other.blocks.header.parent_uuid != uuid:
                    continue
                if uuid != NO_UUID or _leads_to(other, status):
                    yield path
            except ImageError:
                continue  # no VHD, or a damaged one
            finally:
                os.close(fd)


def _leads_to(child: Vhd, status: os.stat_result) -> bool:
    for candidate in candidates(child):
        with suppress(OSError, ValueError):
            return os.path.samestat(os.stat(candidate), status)
    return False


def _remove(path: str) -> None:
    try:
        os.unlink(path)
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ImageError(
            f"{path}: cannot be removed, though all that it has is in its parent: {error.strerror}"
        ) from error
    try:
        with suppress(OSError):  # what knows no such thing needs none
            os.fsync(directory)
    finally:
        os.close(directory)
