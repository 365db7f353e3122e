"""A VHD with its parents: found by what the child says of them, confined, checked, opened.

What names a parent stands in a file that anybody may have written, so a parent must lie in the
directory of the VHD that the user has named, or in one that the user has named too; in either,
however deep. Which file that is, is judged when links have been followed. In the first, what a
stranger may have written names only what is his own: in a shared directory may be what he cannot
read.

A parent that is a VHD must have the UUID that its child says. A child that says none has a raw
parent, as blktap has them. Time stamps are not looked at: no program does.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Union

from ...errors import ImageError
from ...text import printable
from ..image import Image
from ..overlay.trust import distrust
from .blocks import BlockLayer
from .layout import (
    EPOCH,
    FOOTER,
    NO_UUID,
    SECTOR,
    Footer,
    Header,
    clean_name,
    committed_uuid,
    decode_name,
    is_foreign,
)
from .opening import Vhd, examine, open_file, open_vhd

log = logging.getLogger("xen_disk_py")

DEEPEST = 64
"""So many files make a chain at most; each takes a descriptor."""
MOST_BLOCKS_OF_ALL = 1 << 25
"""So many blocks the files of a chain have at most together: 13 bytes of memory each."""
_ORDER = (b"W2ru", b"MacX", b"W2ku", b"Wi2r", b"Wi2k")
_LONGEST = 8192  # bytes of a locator

Top = Union[BlockLayer, Image]
"""The layer that a guest writes to."""


class Committed(ImageError):
    """All that a child has is in its parent, and nothing else is left to do than to remove it.

    Args:
        child: path.
        parent: path.
        is_complete: whether the copy of the parent's footer says so, too.
    """

    def __init__(self, child: str, parent: str, *, is_complete: bool) -> None:
        super().__init__(
            f"{child}: its changes were committed to {printable(parent)}, and are there: remove it "
            f"with: xen-disk commit {child}"
        )
        self.parent = parent
        self.is_complete = is_complete


def open_chain(
    path: str, *, writable: bool, directories: Sequence[str] = (), vhd: Vhd | None = None
) -> Top:
    """Open a VHD and all its parents, these for reading only. Nothing is changed.

    Args:
        path: the VHD.
        writable: open it for writing.
        directories: where parents may lie, besides its own directory.
        vhd: the VHD, where it is open already; closed with what is returned, and on errors.

    Raises:
        ImageError: one of them cannot be used; the message says why and what to do.
    """
    vhds = [vhd or open_vhd(path, writable=writable)]
    base: Image | None = None
    try:
        roots = roots_of(vhds[0].path, directories)
        while base is None and vhds[-1].is_differencing:
            if len(vhds) >= DEEPEST:
                raise ImageError(  # noqa: TRY301 - what is open is closed below, whatever it is
                    f"{path}: more than {DEEPEST} files deep: commit some of them first"
                )
            parent = open_parent(vhds, roots)
            if isinstance(parent, Vhd):
                vhds.append(parent)
            else:
                base = parent
        if sum(len(each.blocks.bat) for each in vhds if each.blocks) > MOST_BLOCKS_OF_ALL:
            raise ImageError(  # noqa: TRY301 - as above
                f"{path}: its chain has more than {MOST_BLOCKS_OF_ALL} blocks: commit some of its "
                "files first"
            )
        return _stack(vhds, base, writable=writable)
    except BaseException:
        for each in vhds:
            os.close(each.fd)
        if base is not None:
            base.close()
        raise


def _stack(vhds: list[Vhd], base: Image | None, *, writable: bool) -> Top:
    """Put the layers upon each other, the last one first."""
    layer: Top | None = base
    for vhd in reversed(vhds):
        top = writable and vhd is vhds[0]
        if vhd.blocks is None:
            layer = Image(
                vhd.fd,
                vhd.path,
                vhd.size,
                sector_size=SECTOR,
                read_only=not top,
                is_block_device=False,
            )
        else:
            layer = BlockLayer(vhd, vhd.blocks, layer, writable=top)
    assert layer is not None
    return layer


def roots_of(path: str, directories: Sequence[str]) -> list[str]:
    """Return where the parents of the VHD that the user has named may lie, links followed."""
    return [os.path.realpath(each) for each in (os.path.dirname(path), *directories)]


def open_parent(vhds: Sequence[Vhd], roots: Sequence[str]) -> Vhd | Image:
    """Open the parent of a VHD for reading, where it may lie and is the right one.

    Args:
        vhds: the chain so far; the last one's parent is wanted.
        roots: see :func:`roots_of`.

    Raises:
        ImageError: there is none; the message says why and what to do.
    """
    child = vhds[-1]
    assert child.blocks is not None
    header = child.blocks.header
    seen = [os.fstat(vhd.fd) for vhd in vhds]
    tried: list[str] = []
    refused: ImageError | None = None
    for candidate in candidates(child, roots):
        try:
            real, status = _look_up(candidate)
        except (OSError, ValueError):
            if candidate not in tried:
                tried.append(candidate)
            continue
        if any(os.path.samestat(status, each) for each in seen):
            refused = refused or ImageError(
                f"{child.path}: its parent would be {printable(real)}, which is itself a child of "
                "it: restore the right parent"
            )
        elif not any(_is_within(real, root) for root in roots):
            refused = refused or ImageError(
                f"{child.path}: its parent would be {printable(real)}, outside of "
                f"{' and '.join(roots)}: if that is the right one, add --option "
                f"parents={os.path.dirname(real)}"
            )
        elif not any(_is_within(real, root) for root in roots[1:]) and (
            why := _not_his(child, status)
        ):
            refused = refused or ImageError(
                f"{child.path}: its parent would be {printable(real)}, which whoever wrote it may "
                f"not be able to read, and {why}: if that is the right one, add --option "
                f"parents={os.path.dirname(real)}"
            )
        else:
            try:
                return _open_checked(child, header, real, status)
            except ImageError as error:
                refused = refused or error
    if refused is not None:
        raise refused
    names = ", ".join(map(printable, tried)) or "it does not say where"
    raise ImageError(
        f"{child.path}: its parent is not there ({names}): put it back, or name its directory "
        "with --option parents=DIR"
    )


def _not_his(child: Vhd, parent: os.stat_result) -> str | None:
    """Say who may have written a VHD, other than root and we, and does not have the parent.

    None: nobody, or whoever has both.
    """
    status = os.fstat(child.fd)
    owners = [(each.st_uid, each.st_gid) for each in (status, parent)]
    if child.is_device or (owners[0] == owners[1] and not status.st_mode & stat.S_IWOTH):
        return None
    return distrust(status, "it")


def _open_checked(child: Vhd, header: Header, real: str, status: os.stat_result) -> Vhd | Image:
    """Open a parent that has been found, and see that it is that and the right one."""
    if header.parent_uuid == NO_UUID:
        image = Image.open(real, writable=False)
        try:
            _check_same(image.fd, status, real)
            _check_raw(child, header, image)
        except BaseException:
            image.close()
            raise
        return image
    fd = open_file(real, writable=False)
    try:
        _check_same(fd, status, real)
        vhd = examine(fd, real)
        _check_uuid(child, header, vhd)
    except BaseException:
        os.close(fd)
        raise
    return vhd


def _check_raw(child: Vhd, header: Header, image: Image) -> None:
    if Footer.parse(os.pread(image.fd, FOOTER, max(0, image.size - FOOTER))) is not None:
        raise ImageError(
            f"{child.path}: says that its parent, {printable(image.path)}, is a raw image, but "
            "that is a VHD: restore the right parent"
        )
    modified = int(os.fstat(image.fd).st_mtime) - EPOCH
    if not image.is_block_device and header.parent_time not in (0, modified):
        log.warning(
            "%s: its parent, %s, was written or copied since it was made: if it has changed, what "
            "the guest reads is neither the one nor the other",
            child.path,
            printable(image.path),
        )


def _check_uuid(child: Vhd, header: Header, parent: Vhd) -> None:
    if parent.footer.uuid == committed_uuid(child.footer.uuid, header.parent_uuid):
        raise Committed(child.path, parent.path, is_complete=not parent.has_old_copy)
    if parent.footer.uuid != header.parent_uuid:
        raise ImageError(
            f"{child.path}: its parent has the UUID {header.parent_uuid.hex()}, but "
            f"{printable(parent.path)} has {parent.footer.uuid.hex()}: it was replaced, or is "
            "another one; restore the right parent"
        )


def _look_up(path: str) -> tuple[str, os.stat_result]:
    """Return what a path leads to, links followed, without opening that for use."""
    fd = os.open(path, os.O_PATH)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise ValueError
        return os.readlink(f"/proc/self/fd/{fd}"), status
    finally:
        os.close(fd)


def _check_same(fd: int, status: os.stat_result, path: str) -> None:
    if not os.path.samestat(os.fstat(fd), status):
        raise ImageError(f"{path}: was replaced while it was opened: try again")


def candidates(child: Vhd, roots: Sequence[str] = ()) -> Iterator[str]:
    """Name the paths where a parent may be, the likeliest first.

    Args:
        child: whose.
        roots: directories in which its name is looked for, too.
    """
    assert child.blocks is not None
    here = os.path.dirname(os.path.realpath(child.path))
    names = [name for _, name in locators(child)]
    title = clean_name(child.blocks.header.parent_name)
    if title is not None:
        names.append(title)
    local = [name for name in names if not is_foreign(name)]
    for name in local:
        if not name.startswith("/"):
            yield os.path.join(here, name)
            if child.is_device:  # the names of LVs are links
                yield os.path.join(os.path.dirname(child.path), name)
    bases = dict.fromkeys(os.path.basename(name) for name in reversed(names))
    bases.pop("", None)
    for base in bases:
        yield os.path.join(here, base)
    for name in local:
        if name.startswith("/"):
            yield name
    for root in roots:
        for base in bases:
            yield os.path.join(root, base)


def locators(child: Vhd) -> list[tuple[bytes, str]]:
    """Return the code and the path of each locator that can be read, the best first."""
    assert child.blocks is not None
    found = []
    for each in child.blocks.header.locators:
        is_inside = each.offset + each.length <= child.length
        if each.code in _ORDER and 0 < each.length <= _LONGEST and is_inside:
            name = decode_name(each.code, os.pread(child.fd, each.length, each.offset))
            if name is not None:
                found.append((each.code, name))
    return sorted(found, key=lambda pair: _ORDER.index(pair[0]))


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
