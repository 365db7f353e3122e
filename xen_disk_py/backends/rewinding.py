"""Makes an image, or an overlay, of a recorded disk as it was at a moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

from ..errors import ImageError, UsageError
from ..text import printable
from .at import AtBackend
from .exporting import Progress, exported
from .filter import do_all
from .holes import put_zeros
from .image import transfer_all
from .newfile import hidden_name, sync_directory
from .overlay.backend import OverlayBackend
from .overlay.maintenance import copy_extent

_CHUNK = 1 << 20  # bytes copied in one go


def rewind_to_image(disk: AtBackend, new: str, progress: Progress) -> None:
    """Make a raw image, sparse, for its owner alone, and on stable storage.

    Args:
        disk: the moment.
        new: the image; there must be no file of that name.
        progress: told how far it is.

    Raises:
        UsageError: there is a file.
        ImageError: it cannot be made, and nothing has changed.
    """
    if os.path.lexists(new):
        raise UsageError(f"{os.path.abspath(new)}: there is such a file: give another name")
    base = disk.base
    total = base.size + sum(each.length for each in disk.found.extents)
    with exported(new, disk.size, (base.fd, disk.trace.fileno()), force=False, convert=None) as raw:
        os.ftruncate(raw.fd, base.size)
        copy_extent(base.fd, 0, raw.fd, 0, base.size, total, progress)
        os.ftruncate(raw.fd, disk.size)
        for piece, offset in _pieces(disk):
            if any(piece):
                transfer_all(os.pwritev, raw.fd, [piece], offset)
            else:
                put_zeros(raw.fd, offset, len(piece))
            progress(base.size + offset * (total - base.size) // disk.size, total)


def _pieces(disk: AtBackend) -> Iterator[tuple[memoryview, int]]:
    """What was written by then, and where it belongs."""
    for offset, length, _ in disk.found.extents:
        end = min(offset + length, disk.size)  # what was cut off later is not there
        for at in range(offset, end, _CHUNK):
            piece = memoryview(bytearray(min(_CHUNK, end - at)))
            disk.read([piece], at)
            yield piece, at


def rewind_to_overlay(disk: AtBackend, overlay: str, progress: Progress) -> None:
    """Make an overlay over the image that the disk was when recording began.

    Args:
        disk: the moment.
        overlay: the file; there must be none of that name.
        progress: told how far it is.

    Raises:
        ImageError: it cannot be made, and nothing has changed.
    """
    base = disk.base
    overlay = os.path.abspath(overlay)
    if os.path.lexists(overlay):
        raise ImageError(f"{overlay}: there is such a file: give another name")
    if disk.size != base.size:
        raise ImageError(
            f"{printable(disk.trace.path)}: the disk had been resized by then, and an overlay has "
            "the size of its image: make an image (-o NEW)"
        )
    name = hidden_name(os.path.dirname(overlay))
    try:
        made = OverlayBackend(base.path, overlay=name, sector_size=base.sector_size)
        try:
            for piece, offset in _pieces(disk):
                if do_all(made.write, [piece], offset) < len(piece):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                progress(offset, disk.size)
            made.flush()
            os.link(name, overlay)
        finally:
            made.close()
    except FileExistsError:
        raise ImageError(f"{overlay}: there is such a file: give another name") from None
    except OSError as error:
        raise ImageError(
            f"{overlay}: cannot be made: {error.strerror}; nothing was changed"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
    sync_directory(overlay)
