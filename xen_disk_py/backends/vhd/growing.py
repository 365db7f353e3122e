"""Makes a VHD larger, whatever kind it is."""

from __future__ import annotations

import os

from ...errors import ImageError
from ..image import Image, transfer_all
from .blocks import BlockLayer
from .layout import FOOTER
from .opening import examine


def grow(top: BlockLayer | Image, size: int) -> None:
    """Make the disk ``size`` bytes long, which is more than it has; what is new reads as zeros.

    What a differencing VHD gets is its parent's as far as that reaches.

    Raises:
        ImageError: there is no room for that.
        OSError: it cannot be written.
    """
    if isinstance(top, BlockLayer):
        top.grow(size)
        return
    vhd = examine(top.fd, top.path)
    if vhd.is_device or vhd.tail != vhd.size:
        raise ImageError("a fixed VHD grows in a file only, whose footer is right behind the disk")
    _write(top.fd, vhd.footer.with_size(size).raw, size)
    _write(top.fd, bytes(FOOTER), vhd.size)  # what was the footer is the disk's now
    top.size = size


def _write(fd: int, data: bytes, offset: int) -> None:
    transfer_all(os.pwritev, fd, [memoryview(data)], offset)
    os.fdatasync(fd)
