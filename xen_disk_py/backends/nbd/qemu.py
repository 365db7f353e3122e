"""Image formats that QEMU reads and writes: a ``qemu-nbd`` of our own, one for each disk.

The child has nothing but the image and its end of a socket. If it dies, another is started, and
what it had not flushed is written again (see :mod:`.client`).
"""

from __future__ import annotations

import os
import shutil

from ...errors import BackendError, ImageError, UsageError
from ..loader import QEMU_FORMATS
from .backend import NbdBackend

_PACKAGES = "qemu-utils (Debian, Ubuntu) or qemu-img (Fedora)"


class QemuBackend(NbdBackend):
    """A disk in an image of QEMU's.

    Args:
        path: the image.
        format: which of QEMU_FORMATS it is. It is never guessed.
        read_only: refuse writes; the image is opened for reading only.
        sector_size: the logical sector in bytes.

    Raises:
        UsageError: there is no such format.
        ImageError: the image cannot be used.
        BackendError: there is no qemu-nbd, or it does not serve the image.
    """

    def __init__(
        self,
        path: str,
        format: str,  # noqa: A002 - the word that QEMU and --format use
        *,
        read_only: bool = False,
        sector_size: int | None = None,
    ) -> None:
        if format not in QEMU_FORMATS:
            raise UsageError(f"format={format}: one of {', '.join(QEMU_FORMATS)}")
        program = shutil.which("qemu-nbd")
        if program is None:
            raise BackendError(f"{path}: {format} needs qemu-nbd: install {_PACKAGES}")
        path = os.path.abspath(path)
        if not os.access(path, os.R_OK if read_only else os.R_OK | os.W_OK):
            reason = "no permission" if os.path.exists(path) else "no such file"
            raise ImageError(f"{path}: {reason}")
        # The order counts: what detects zeroes must know already that they may be unmapped.
        command = [program, "--format", format, "--discard=unmap", "--detect-zeroes=unmap"]
        if read_only:
            command = [program, "--format", format, "--read-only"]
        self._image_path = path
        self._format = format
        try:
            super().__init__([*command, "--", path], read_only=read_only, sector_size=sector_size)
        except BackendError as error:
            raise BackendError(
                f"{path}: qemu-nbd does not serve it as {format}: qemu-img info --force-share "
                f"-f {format} says why; qemu-img check -r all replays a log ({error})"
            ) from error

    def __str__(self) -> str:
        return f"{self._format} {self._image_path}"
