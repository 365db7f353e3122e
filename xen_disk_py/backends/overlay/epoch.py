"""For how long the page cache of a file lasts: what is in it counts no longer than that.

What a process wrote and did not flush is in the page cache. It outlives the process, but neither
the boot of this host nor the mount of the file system: that may have lost its storage (iSCSI, NBD,
USB), or been shut down, and be mounted again in the same boot.
"""

from __future__ import annotations

from ...host.identity import boot_id
from ...host.mounts import mount_of, superblock_of
from ...named import NamedTuple
from ..image import file_system


class Epoch(NamedTuple):
    """A boot, and a mounted file system in it.

    Attributes:
        boot: the boot id.
        mount: the mount by which the file was opened; each namespace has its own of one file
            system, so that another one proves nothing.
        superblock: the mounted file system itself, where it has a name.
    """

    boot: str
    mount: int | None = None
    superblock: str | None = None

    @classmethod
    def of(cls, fd: int) -> Epoch:
        """Tell the epoch in which an open file is."""
        return cls(boot_id(), mount_of(fd), superblock_of(fd, file_system(fd)))

    def lasts(self, now: Epoch) -> bool:
        """Whether the page cache of this epoch is surely still there ``now``."""
        return self.boot == now.boot and (
            (self.mount is not None and self.mount == now.mount)
            or (self.superblock is not None and self.superblock == now.superblock)
        )
