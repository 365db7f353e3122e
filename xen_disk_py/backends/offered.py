"""What a guest would have of a disk: found without a lock, and without changing anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..blkif import MAX_QUEUES
from . import Backend, sharing
from .filter import Filter
from .finding import QEMU_FORMATS, choose, is_file
from .loader import open_backend, wrap
from .overlay.file import image_path
from .parameters import parameters_of
from .stack import describe, filters_of


class _AsForWriting(Filter):
    """A disk that was opened for reading, as it is when it is opened for writing."""

    def __init__(self, source: Backend, *, read_only: bool, can_discard: bool) -> None:
        super().__init__(source)
        self.read_only = read_only
        self._can_discard = can_discard

    @property
    def can_discard(self) -> bool:
        """As it was found."""
        return self._can_discard


def offered(
    path: str,
    form: str | None,
    *,
    backend: str | None = None,
    pairs: Sequence[str] = (),
    filters: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Say what ``connect`` would give a guest, and what the disk's own notes are.

    Args:
        path: as ``--path``, or the overlay.
        form: ``raw``, ``vhd``, ``overlay`` or one of QEMU's; None: it is no file.
        backend: what ``--backend`` says of a raw image.
        pairs: ``key=value`` of the backend.
        filters: what each ``--filter`` says.

    Returns:
        ``backend``; ``size``, ``sector_size``, ``physical_sector_size`` and
        ``discard_granularity`` in bytes; ``read_only`` (None: only its own code knows),
        ``discard``, ``secure_discard``, ``flush``; ``requests``: how many it does at a time, None
        for as many as there are; ``queues``: how many the guest can have; ``survives``: whether
        another process can take it over; ``filters``: of each its ``place``, ``name`` and
        ``settings``.

    Raises:
        XenDiskError: ``connect`` would refuse it.
    """
    with sharing.looking():
        disk = wrap(_open(path, form, backend, pairs), filters)
        try:
            found = {
                "backend": _name(path, form, backend),
                "size": disk.size,
                "sector_size": disk.sector_size,
                "physical_sector_size": disk.physical_sector_size,
                "read_only": None if _is_asked(disk) else disk.read_only,
                "flush": True,  # every disk has it
                "discard": disk.can_discard and not disk.read_only,
                "secure_discard": disk.can_discard_securely and not disk.read_only,
                "discard_granularity": max(disk.discard_granularity, disk.sector_size),
                "requests": disk.threads if disk.asynchronous is None else None,
                "queues": min(disk.threads, MAX_QUEUES),
                "survives": disk.survives,
                "filters": [
                    {key: each[key] for key in ("place", "name", "settings")}
                    for each in describe(filters_of(disk, len(filters)))
                ],
            }
            return found, list(disk.notes)
        finally:
            disk.close()


def _open(path: str, form: str | None, backend: str | None, pairs: Sequence[str]) -> Backend:
    options: dict[str, object] = {"path": path, "read_only": True}
    if form in QEMU_FORMATS:
        backend, options["format"] = "qemu", form
    elif form == "vhd":
        backend = "vhd"
    elif form == "overlay":
        backend, options["overlay"], options["path"] = "overlay", path, image_path(path)
    elif form is None and choose(None, path) == "nbd":
        del options["read_only"]  # to connect changes nothing, and the server says what it has
    disk = open_backend(backend, options, pairs=pairs)
    if form is None:
        return disk
    # These do not take what cannot be written for writing.
    may_write = backend is None or os.access(path, os.W_OK)
    can_discard = disk.can_discard or form in QEMU_FORMATS  # of a read-only export nobody discards
    return _AsForWriting(disk, read_only=not may_write, can_discard=can_discard)


def _name(path: str, form: str | None, backend: str | None) -> str:
    if form in QEMU_FORMATS:
        return "qemu"
    if form in ("vhd", "overlay"):
        return form
    return "python" if form is None and is_file(path) else choose(backend, path)


def _is_asked(disk: Backend) -> bool:
    """Tell whether a disk is only read-only because it was opened like that."""
    while isinstance(disk, Filter):
        disk = disk.source
    is_own = type(disk).__module__.startswith(f"{Backend.__module__}.")
    takes, _ = parameters_of(type(disk))
    if not is_own:
        return disk.read_only and "read_only" in takes
    return disk.read_only and "settings" in takes  # a plugin for nbdkit is told how it is opened
