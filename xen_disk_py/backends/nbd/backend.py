"""A disk on an NBD server: ``nbd://host/export``, ``nbd+unix:///?socket=…``, or a server's command.

Everything is one thread's work: requests go out as they come and are answered as they end. What
is written goes to the server at once; how long it stays in a cache there is the server's affair,
until a flush.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from ...errors import BackendError, UsageError, XenDiskError
from .. import Backend
from ..asynchronous import DISCARD, FLUSH, READ, WRITE
from . import tls
from .client import Client
from .libnbd import Connection, ServerFailed
from .wire import WireConnection, is_plain

_SECTORS = (512, 1024, 2048, 4096)


class NbdBackend(Backend):
    """A disk that an NBD server has.

    Args:
        path: a URI, as libnbd takes it, or ``[ COMMAND … ]``: a server that is started with its
            socket, as systemd would, and ends with the disk. A list is such a command, too.
        read_only: refuse writes; the server need not be read-only.
        sector_size: the logical sector in bytes; by default 512, or the server's smallest request.
        connections: how many to have at most. A server must say that several are one disk; to
            one that is started by a command there is one.
        survives: what was written does not end with a server that a command starts; None: unless
            the command is known for keeping it in memory (nbdkit's memory, data, tmpdisk and cow;
            qemu-nbd --snapshot).
        timeout: seconds that a request may take; then the server is given up, and connected
            again. 0 for any time.

    Raises:
        UsageError: what is asked for contradicts itself.
        BackendError: the server cannot be had, or has no disk that a guest could use.
    """

    survives = True
    repeats_flush = True

    def __init__(
        self,
        path: str | list[str],
        *,
        read_only: bool = False,
        sector_size: int | None = None,
        connections: int = 4,
        timeout: int = 0,
        survives: bool | None = None,
    ) -> None:
        self._name = path if isinstance(path, str) else shlex.join(path)
        if timeout < 0:
            raise UsageError(f"timeout={timeout}: seconds, or 0 for any time")
        if connections < 1:
            raise UsageError(f"connections={connections}: at least 1")
        where = _where(path) if isinstance(path, str) else path
        if not isinstance(where, str):
            connections = 1  # each would start a server of its own, with a disk of its own
        else:
            tls.check(where, os.environ.get("HOME"), is_root=os.geteuid() == 0)
        try:
            connect = WireConnection if is_plain(where) else Connection
            self._client = Client(lambda: connect(where), connections, timeout)
        except ServerFailed as error:
            raise BackendError(f"{self._name}: {_ended(error)}") from error
        except XenDiskError as error:
            raise type(error)(f"{self._name}: {_explained(where, str(error))}") from error
        self.asynchronous = self._client
        self.survives = _survives(where) if survives is None else survives
        export = self._client.export
        try:
            self.size = export.size
            self.sector_size = self._sector(sector_size, export.minimum)
        except BaseException:
            self._client.close()
            raise
        self.read_only = read_only or export.read_only
        preferred = min(export.preferred, 1 << 20)
        self.physical_sector_size = preferred if preferred in _SECTORS else 4096
        self.discard_granularity = max(self.sector_size, 4096)

    def _sector(self, wanted: int | None, minimum: int) -> int:
        sector = wanted or max(minimum, 512)
        if sector not in _SECTORS or sector % minimum:
            raise BackendError(
                f"{self._name}: the server's smallest request is {minimum} bytes, and a disk's "
                "sector is 512 to 4096 and a multiple of that"
            )
        if not self.size or self.size % sector:
            raise BackendError(
                f"{self._name}: {self.size} bytes, not a positive multiple of the sector, "
                f"{sector}: make the export longer (nbdkit: --filter=truncate round-up={sector}), "
                "or choose --sector-size"
            )
        return sector

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers`` from the server's disk, from ``offset`` bytes on."""
        self._client.call(READ, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Send ``buffers`` to ``offset`` bytes into the server's disk."""
        self._client.call(WRITE, buffers, offset)

    def flush(self) -> None:
        """Have the server put what it was sent on stable storage, if it can."""
        self._client.call(FLUSH)

    def discard(self, offset: int, length: int) -> None:
        """Trim: what is read there afterwards is up to the server."""
        self._client.call(DISCARD, (), offset, length)

    @property
    def can_discard(self) -> bool:
        """Whether the server can trim."""
        return self._client.export.can_trim

    def close(self) -> None:
        """Disconnect; a server of our own ends."""
        self._client.close()

    def __str__(self) -> str:
        return f"nbd {self._name}"


_HINTS = (
    ("Connection refused", "is the server running, at that port (10809 if none is named)?"),
    ("connect: No such file or directory", "is the server running, with that socket?"),
    ("no export named", "'nbdinfo --list URI' shows what it has"),
)
"""What libnbd says, and what to look at."""


def _ended(error: ServerFailed) -> str:
    """Say why a server of our own does not serve: in its own words, if it has any."""
    if error.said:
        return str(error)
    if "has not answered" in str(error):
        return str(error)
    return (
        f"it serves nothing ({error}): it has to be an NBD server that takes its socket from "
        "systemd, as nbdkit does"
    )


def _explained(where: str | list[str], error: str) -> str:
    """Add to libnbd's words what to do."""
    if not isinstance(where, str):
        return error
    for words, hint in _HINTS:
        if words in error:
            return f"{error}: {hint}"
    return tls.explained(where, error)


_FORGETTING = {
    "nbdkit": {"memory", "data", "tmpdisk", "--filter=cow"},
    "qemu-nbd": {"-s", "--snapshot"},
}
"""Words of a command whose server takes along what was written."""


def _survives(where: str | list[str]) -> bool:
    if isinstance(where, str):
        return True
    return not _FORGETTING.get(os.path.basename(where[0]), set()).intersection(where[1:])


def _where(path: str) -> str | list[str]:
    if not path.startswith("["):
        return path
    try:
        words = shlex.split(path)
    except ValueError as error:  # quotation marks
        raise UsageError(f"{path}: {error}: quote it as in a shell") from error
    if len(words) < 3 or words[0] != "[" or words[-1] != "]":
        raise UsageError(f"{path}: a server's command stands between '[ ' and ' ]'")
    return words[1:-1]
