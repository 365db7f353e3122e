"""A disk in a Ceph cluster: ``rbd:POOL/IMAGE`` or ``rbd:POOL/IMAGE@SNAPSHOT``.

Nothing is cached on this host: a write that was answered is on the cluster's stable storage, so
that whoever takes the disk over, here or elsewhere, finds it there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import BackendError, UsageError, XenDiskError
from .. import Backend, sharing
from ..asynchronous import DISCARD, FLUSH, READ, WRITE
from .image import RbdImage

_PATH = re.compile(r"rbd:(?P<pool>[^/@]+(?:/[^/@]+)?)/(?P<image>[^/@]+)(?:@(?P<snapshot>[^/@]+))?")
_OPEN_TIMEOUT = 30  # seconds to find a cluster; Ceph's own are 300


class RbdBackend(Backend):
    """A disk that a Ceph cluster has.

    Args:
        path: ``rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT]``.
        read_only: refuse writes; a snapshot always does.
        sector_size: the logical sector in bytes.
        id: who we are to the cluster: ``client.ID``.
        conf: ceph.conf, if it is not where Ceph looks.
        timeout: seconds that a request may take before it fails; 0 for any time.
        wait: seconds to wait for another client that has the exclusive lock.

    Raises:
        UsageError: the path is not of that form.
        BackendError: the cluster or the image cannot be had, or another client writes to it.
        XenUnavailable: librbd is not installed.
    """

    survives = True
    repeats_flush = True
    physical_sector_size = 4096
    discard_granularity = 64 << 10
    """What librbd discards (``rbd_discard_granularity_bytes``); smaller ones leave the data."""

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        sector_size: int = 512,
        id: str = "admin",  # noqa: A002 - Ceph's own word for it
        conf: str | None = None,
        timeout: int = 30,
        wait: int = 0,
    ) -> None:
        parts = _PATH.fullmatch(path)
        if parts is None:
            raise UsageError(f"{path}: not of the form rbd:POOL/IMAGE[@SNAPSHOT]")
        self._name = path
        self.read_only = read_only or parts["snapshot"] is not None
        self.sector_size = sector_size
        try:
            self._image = RbdImage(
                parts["pool"],
                parts["image"],
                parts["snapshot"],
                user=id,
                conf=conf,
                settings={
                    "rbd_cache": "false",
                    "client_mount_timeout": str(_OPEN_TIMEOUT),
                    "rados_mon_op_timeout": str(_OPEN_TIMEOUT),
                    "rados_osd_op_timeout": str(timeout),
                },
                writable=not (self.read_only or sharing.is_looking()),
                lock_at_once=not sharing.is_arriving(),
                wait=wait,
            )
        except XenDiskError as error:
            raise type(error)(f"{path}: {error}") from error
        self.asynchronous = self._image
        self.resize_notice = self._image.changes
        self.size = self._image.size
        if not self.size or self.size % sector_size:
            self.close()
            raise BackendError(
                f"{path}: {self.size} bytes, not a positive multiple of the sector, {sector_size}: "
                "rbd resize makes it longer"
            )

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers`` from the image, from ``offset`` bytes on."""
        self._image.call(READ, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Store ``buffers`` at ``offset`` bytes into the image; on stable storage at once."""
        self._image.call(WRITE, buffers, offset)

    def flush(self) -> None:
        """Wait for the writes under way."""
        self._image.call(FLUSH)

    def discard(self, offset: int, length: int) -> None:
        """Free whole 64 KiB of the image, which then read as zeros; what is less keeps its data."""
        self._image.call(DISCARD, (), offset, length)

    def resize(self, size: int | None) -> int:
        """Resize the image; with None, say how long somebody else has made it."""
        if size is None:
            self._image.acknowledge_changes()  # before the look: none is missed
            return self._image.size
        if size != self._image.size:
            self._image.resize(size)
        self.size = size
        return size

    def claim(self) -> None:
        """Take the lock, if another host had it when the disk was opened."""
        try:
            self._image.claim()
        except BackendError as error:
            raise BackendError(f"{self}: {error}") from error

    def close(self) -> None:
        """Give the lock back and leave the cluster."""
        self._image.close()

    def __str__(self) -> str:
        return self._name
