"""What a VHD holds, and a raw image of what a guest reads of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Callable

from ..image import Image, transfer_all
from ..overlay.maintenance import Check, Progress, new_image, replaceable
from .blocks import BlockLayer
from .chain import open_chain
from .opening import open_vhd

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
    convert: Callable[[int, int], None] | None = None,
    check: Check = lambda path, writes: None,
) -> int:
    """Make a new image of what a VHD and its parents are together.

    Args:
        path: the VHD, which no disk may be writing to.
        new: the new image, sparse, for its owner alone.
        force: replace the file that is there.
        directories: where parents may lie, besides its own directory.
        progress: told how far it is.
        convert: given the raw image and an empty file, both open: makes the latter the new image.
        check: called with each file of the chain before anything is done; may raise.

    Returns:
        The size of the disk, in bytes.

    Raises:
        UsageError: there is a file, or something that is never replaced.
        ImageError: it cannot be done, and nothing has changed.
    """
    new = os.path.realpath(new) if force else os.path.abspath(new)
    with closing(open_chain(path, writable=False, directories=directories)) as top:
        sources = [top.fd] if isinstance(top, Image) else top.descriptors
        for source in sources:
            check(os.readlink(f"/proc/self/fd/{source}"), False)
        with ExitStack() as stack:
            stack.enter_context(replaceable(new, force, *sources))
            raw = made = stack.enter_context(new_image(new, top.size))
            os.ftruncate(raw.fd, top.size)
            extents = [(0, top.size)] if isinstance(top, Image) else top.allocated(0, top.size)
            for start, stop in extents:
                for at in range(start, stop, _CHUNK):
                    _copy(top, raw.fd, at, min(_CHUNK, stop - at))
                    progress(at, top.size)
            progress(top.size, top.size)
            if convert is not None:
                made = stack.enter_context(new_image(new, top.size))
                convert(raw.fd, made.fd)
            os.fsync(made.fd)
            made.put(new, replacing=force)
        return top.size


def _copy(top: BlockLayer | Image, fd: int, offset: int, length: int) -> None:
    piece = memoryview(bytearray(length))
    done = 0
    while done < length:
        moved = top.read([piece[done:]], offset + done)
        if not moved:
            raise OSError(errno.EIO, f"{top.path} ends too early: somebody made it shorter")
        done += moved
    if any(piece):
        transfer_all(os.pwritev, fd, [piece], offset)
