"""Image formats that QEMU reads and writes: a ``qemu-nbd`` of our own, one for each disk.

The child has nothing but the image and its end of a socket. If it dies, another is started, and
what it had not flushed is written again (see :mod:`.client`).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress

from ...errors import BackendError, ImageError, UsageError
from .. import qemu_img, qemu_locks, sharing
from ..loader import QEMU_FORMATS
from .backend import NbdBackend

_PATIENCE = 5.0  # seconds
_OURS = re.compile("xen.disk")  # in our command lines
_PACKAGES = "qemu-utils (Debian, Ubuntu) or qemu-img (Fedora)"


class QemuBackend(NbdBackend):
    """A disk in an image of QEMU's.

    Args:
        path: the image.
        format: which of QEMU_FORMATS it is. It is never guessed.
        read_only: refuse writes; the image is opened for reading only.
        sector_size: the logical sector in bytes.
        timeout: as of an NBD server.

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
        timeout: int = 0,
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
        words = ["--", path]
        if sharing.is_looking():  # without QEMU's locks; a comma is written twice
            name = path.replace(",", ",,")
            image = f"driver={format},force-share=on,file.driver=file,file.filename={name}"
            command, words = [program, "--read-only"], ["--image-opts", image]
        else:
            _wait_for_another(path)
        self._image_path = path
        self._format = format
        try:
            super().__init__(
                [*command, *words],
                read_only=read_only,
                sector_size=sector_size,
                timeout=timeout,
            )
        except BackendError as error:
            raise BackendError(
                f"{path}: qemu-nbd does not serve it as {format}: {_reason(path, format, error)}"
            ) from error

    def __str__(self) -> str:
        return f"{self._format} {self._image_path}"


_HINTS = (
    ("infinite loop", "qemu-img rebase -u gives it another backing file"),
    ("No such file", "put the backing file there, or name another: qemu-img rebase -u -b FILE"),
    ("is not in", "--format says what it is"),
    ("lock", "another process uses it"),
    ("log", "qemu-img check -r all replays it"),
)
"""What QEMU says, and what to do."""


def _reason(path: str, image_format: str, error: BackendError) -> str:
    """Why the image cannot be served, by what qemu-img says of it, in one line."""
    try:
        qemu_img.describe(path, image_format)
    except ImageError as reason:
        said = str(reason).removeprefix(f"{path}: ").rstrip(".")
        hint = next((hint for words, hint in _HINTS if words in said), None)
        return f"{said}: {hint}" if hint else said
    except UsageError:
        pass  # no qemu-img
    return f"its own words are above; qemu-img check -f {image_format} may say more ({error})"


def _wait_for_another(path: str) -> None:
    """Wait a while for a ``qemu-nbd`` that still has the image locked.

    That of a process which was killed ends when it sees that; it stores what it has first.
    """
    deadline = time.monotonic() + _PATIENCE
    pause = 0.01
    while time.monotonic() < deadline and any(map(_is_left_over, _holders(path))):
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def _holders(path: str) -> list[int]:
    try:
        return qemu_locks.holders(os.stat(path))
    except OSError:
        return []  # whoever opens it says why


def _is_left_over(pid: int) -> bool:
    """Tell whether a process is a ``qemu-nbd``, and not that of a disk that is served."""
    with suppress(OSError, ValueError, IndexError):
        # 1234 (qemu-nbd) S 1200 ...: its parent comes last (proc(5))
        name, _, rest = _content(f"/proc/{pid}/stat").partition(" (")[2].rpartition(") ")
        parent = int(rest.split()[1])
        return (
            name == "qemu-nbd"
            and parent != os.getpid()
            and not _OURS.search(_content(f"/proc/{parent}/cmdline"))
        )
    return False


def _content(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
