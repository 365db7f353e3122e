"""What an image, an overlay or a VHD is: told without a lock, and without changing anything."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ImageError, UsageError, XenDiskError
from . import qemu_img, qemu_locks
from .finding import QEMU_FORMATS, choose, is_file
from .image import Image, open_file_or_disk, reason_of
from .locks import holders
from .offered import offered
from .overlay.file import OverlayFile
from .overlay.maintenance import allocated_bytes
from .signatures import OVERLAY, recognise
from .vhd.chain import candidates, roots_of
from .vhd.layout import DIFFERENCING, DYNAMIC, FIXED, FREE
from .vhd.opening import examine

_DEEPEST = 64  # files below each other
_KINDS = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}
_UNIT = 512  # bytes; of st_blocks (stat(2))


def describe(
    path: str,
    format: str | None = None,  # noqa: A002 - as the option
    pairs: Sequence[str] = (),
    *,
    backend: str | None = None,
    filters: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe a file or device, what lies below it, and what a guest would have of it.

    Args:
        path: what; also what ``--path`` takes besides.
        format: ``raw``, ``vhd``, ``overlay``, or one of QEMU's; None: a name that ends in .vhd is
            a VHD, a file that begins like an overlay one. That is good enough to be told, not to
            be served.
        pairs: ``key=value`` of its backend.
        backend: how a raw image would be served; None for ``connect``'s default.
        filters: what each ``--filter`` says.

    Returns:
        ``path``, ``format``, ``size`` (of the disk, in bytes), ``sector_size``, ``allocated``
        (bytes of the disk that are in this file), ``disk_usage`` (bytes on storage), ``in_use``
        (somebody has a lock on it) and ``parent``: the same of what lies below, or None. Of a
        parent that cannot be read: ``path`` and ``error``. See the functions for more. Of the
        whole, ``guest``: see :func:`.offered.offered`, or None; ``refused``: why it is that;
        ``notes``: what else is to be known of it.

    Raises:
        ImageError: it cannot be read.
        XenDiskError: from its backend, where that has to be opened.
    """
    if format is None and (not is_file(path) or choose(None, path) != "cow"):
        return _served(path, pairs, filters)
    kind = format
    try:
        kind = format or _guess(path)
        found = _describe(path, kind, 1)
    except OSError as error:
        raise ImageError(f"{path}: {_reason(error, path)}") from error
    if backend is not None and kind != "raw":
        raise UsageError(f"--backend {backend} is for a raw image: leave it out")
    found |= {"guest": None, "refused": None, "notes": []}
    try:
        found["guest"], found["notes"] = offered(
            path, kind, backend=backend, pairs=pairs, filters=filters
        )
    except UsageError:
        raise
    except XenDiskError as error:
        if filters:
            raise
        found["refused"] = str(error).removeprefix(f"{found['path']}: ")
    return found


def _reason(error: OSError, path: str) -> str:
    if error.errno == errno.ENOENT and "://" not in path:
        return "no such file: check the name"
    return reason_of(error, path, writable=False)


def _describe(path: str, kind: str | None, depth: int) -> dict[str, Any]:
    if depth > _DEEPEST:
        raise ImageError(f"{path}: more than {_DEEPEST} files below each other")
    kind = kind or _guess(path)
    if kind in QEMU_FORMATS:
        return _of_qemu(path, kind)
    return {"overlay": _overlay, "vhd": _vhd, "raw": _raw}[kind](path, depth)


def _guess(path: str) -> str:
    if path.lower().endswith((".vhd", ".avhd")):
        return "vhd"
    with Image.look_at(path) as image:
        return "overlay" if os.pread(image.fd, len(OVERLAY), 0) == OVERLAY else "raw"


def _common(fd: int, path: str, kind: str, size: int, sector_size: int) -> dict[str, Any]:
    status = os.fstat(fd)
    return {
        "path": os.path.abspath(path),
        "format": kind,
        "size": size,
        "sector_size": sector_size,
        "allocated": status.st_blocks * _UNIT,
        "disk_usage": status.st_blocks * _UNIT,
        "in_use": bool(holders(status)),
        "parent": None,
    }


def _raw(path: str, depth: int) -> dict[str, Any]:
    """Describe an image; ``looks_like``: another format that its content begins like, or None."""
    with Image.look_at(path) as image:
        found = _common(image.fd, path, "raw", image.size, image.sector_size)
        if image.is_block_device:
            found["allocated"] = found["disk_usage"] = image.size
        container = recognise(image.fd, path, image.size)
        return {**found, "looks_like": container.name if container is not None else None}


def _overlay(path: str, depth: int) -> dict[str, Any]:
    """Describe an overlay.

    ``fits``: whether its image is as it was; None: it is not there. ``differences``: what is not.
    ``committed``: a commit was killed after it had replaced the image.
    """
    with OverlayFile.look_at(path) as file:
        header = file.header
        found = _common(file.fd, path, "overlay", header.size, header.sector_size)
        found["allocated"] = allocated_bytes(file)
        found |= {"fits": None, "differences": [], "committed": False}
        found["parent"] = _parent(header.path, "raw", depth)
        if "error" not in found["parent"]:
            with Image.look_at(header.path, sector_size=header.sector_size) as image:
                found["committed"] = header.was_committed(image)
                found["differences"] = [] if found["committed"] else header.differences(image)
                found["fits"] = not found["differences"]
        return found


def _vhd(path: str, depth: int) -> dict[str, Any]:
    """Describe a VHD; ``kind``: fixed, dynamic or differencing."""
    fd = open_file_or_disk(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        vhd = examine(fd, os.path.abspath(path))
        found = _common(fd, path, "vhd", vhd.size, 512)
        found["kind"] = _KINDS[vhd.footer.kind]
        if vhd.is_device:
            found["allocated"] = found["disk_usage"] = vhd.length
        if vhd.blocks is not None:
            used = sum(entry != FREE for entry in vhd.blocks.bat)
            found["allocated"] = min(used * vhd.blocks.header.block_size, vhd.size)
        if vhd.is_differencing:
            names = [*candidates(vhd, roots_of(vhd.path, ()))]
            there = [name for name in names if os.path.exists(name)]
            name = (there or names or ["?"])[0]
            found["parent"] = _parent(name, None if _is_vhd(name) else "raw", depth)
        return found
    finally:
        os.close(fd)


def _of_qemu(path: str, kind: str) -> dict[str, Any]:
    """Describe an image and its backing files as QEMU does."""
    described = None
    for each in reversed(qemu_img.describe(path, kind)):
        described = {
            "path": os.path.abspath(each["filename"]),
            "format": each["format"],
            "size": each["virtual-size"],
            "sector_size": _UNIT,
            "allocated": each["actual-size"],
            "disk_usage": each["actual-size"],
            "in_use": _is_in_use(each["filename"]),
            "parent": described,
        }
    assert described is not None
    return described


def _is_in_use(path: str) -> bool | None:
    try:
        status = os.stat(path)
    except OSError:  # no file: QEMU may know other things by that name
        return None
    return bool(holders(status) or qemu_locks.holders(status))


def _served(path: str, pairs: Sequence[str], filters: Sequence[str]) -> dict[str, Any]:
    """Describe what has to be opened for that: a server's disk, or one that a program makes."""
    plain, notes = offered(path, None, pairs=pairs)
    guest = plain
    if filters:
        guest, notes = offered(path, None, pairs=pairs, filters=filters)
    return {
        "path": path,
        "format": guest["backend"],
        "size": plain["size"],
        "sector_size": plain["sector_size"],
        "allocated": None,
        "disk_usage": None,
        "in_use": None,
        "parent": None,
        "guest": guest,
        "refused": None,
        "notes": notes,
    }


def _is_vhd(path: str) -> bool:
    return path.lower().endswith((".vhd", ".avhd"))


def _parent(path: str, kind: str | None, depth: int) -> Mapping[str, Any]:
    try:
        return _describe(path, kind, depth + 1)
    except OSError as error:
        return {"path": path, "error": error.strerror or str(error)}
    except ImageError as error:
        return {"path": path, "error": str(error)}
