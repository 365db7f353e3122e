"""Image formats that QEMU reads and writes: a ``qemu-nbd`` of our own, one for each disk.

The child has nothing but the image and its end of a socket. If it dies, another is started, and
what it had not flushed is written again (see :mod:`.client`).
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from ...errors import BackendError, ImageError, ProgramMissing, UsageError
from ...host.program import find_program
from ...text import printable
from .. import qemu_img, qemu_locks, sharing
from ..finding import QEMU_FORMATS
from ..image import open_file_or_disk
from ..overlay.trust import distrust
from .backend import NbdBackend
from .qcow2 import is_cut_short, names_another_file

_PATIENCE = 5.0  # seconds
_OURS = re.compile("xen.disk")  # in our command lines


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
        program = find_program("qemu-nbd", qemu_img.INSTALL)
        path = os.path.abspath(path)
        if not os.access(path, os.R_OK if read_only else os.R_OK | os.W_OK):
            reason = "no such file: check the name, or make it with: qemu-img create"
            if os.path.exists(path):
                reason = "no permission: run as its owner or root"
                reason += "" if read_only else ", or add --read-only"
            raise ImageError(f"{path}: {reason}")
        _check(path, format, writable=not read_only)
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
            raise _not_served(path, format, _reason(path, format, error)) from error

    def __str__(self) -> str:
        return f"{self._format} {self._image_path}"


def _not_served(path: str, image_format: str, reason: str) -> BackendError:
    return BackendError(f"{path}: qemu-nbd does not serve it as {image_format}: {reason}")


def _reason(path: str, image_format: str, error: BackendError) -> str:
    """Why the image cannot be served, by what qemu-img says of it, in one line."""
    try:
        qemu_img.describe(path, image_format)
    except ImageError as reason:
        return str(reason).partition(f"{path}: ")[2] or str(reason)
    except ProgramMissing:
        pass
    return str(error).partition(" ]: ")[2] or str(error)


def _check(path: str, image_format: str, *, writable: bool) -> None:
    """See what QEMU would take, and a guest had better not.

    Raises:
        ImageError: somebody else chose which other files QEMU opens, as root; of a qcow2 that was
            cut short QEMU reads zeros; into some kinds of VMDK it writes only what is not there
            yet.
    """
    try:
        fd = open_file_or_disk(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    try:
        is_chain, is_short = image_format == "vmdk", False
        if image_format == "qcow2":
            is_chain, is_short = names_another_file(fd), is_cut_short(fd)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    if is_chain:
        _check_chain(path, image_format)
    if is_short:
        raise ImageError(
            f"{path}: cut short: some of its data lies beyond its end, and QEMU would read "
            "zeros there: restore a copy (qemu-img check -f qcow2 lists what is lost)"
        )
    if image_format == "vmdk" and writable and qemu_img.is_stream_optimized(path):
        raise ImageError(
            f"{path}: a streamOptimized VMDK, whose data QEMU does not overwrite: add --read-only, "
            f"or convert it: qemu-img convert -f vmdk -O qcow2 {path} NEW"
        )


def _check_chain(path: str, image_format: str) -> None:
    """See that no stranger has written an image that names another, be it a backing file.

    Raises:
        ImageError: one may have.
        BackendError: QEMU does not open them all.
    """
    try:
        names = qemu_img.naming_others(path, image_format)
    except ImageError as error:
        raise _not_served(path, image_format, str(error).partition(f"{path}: ")[2]) from error
    for name in names:
        try:
            stranger = distrust(os.stat(name), "it")
        except OSError:
            stranger = "it is no file of this host"
        if stranger is None:
            continue
        whose = "" if name == os.path.abspath(path) else f"its backing file {printable(name)} "
        raise ImageError(
            f"{path}: {whose}names another file that QEMU would read for the guest, and "
            f"{stranger}: see which (qemu-img info --backing-chain {path}), and if that is right: "
            f"chown root {printable(name)} && chmod go-w {printable(name)}; or, where its owner "
            f"must stay, by a command of your own: --path '[ qemu-nbd -f {image_format} {path} ]'"
        )


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
