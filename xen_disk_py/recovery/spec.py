"""What a disk is to be: made once, from the arguments; kept in the record; read by a successor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..backends.finding import choose, is_file
from ..errors import DeviceError, UsageError
from ..named import NamedTuple
from .plain import from_plain

if TYPE_CHECKING:  # `list` reads a record, and serves nothing
    from ..backends import Backend
    from ..datapath.disk import Disk
    from ..datapath.queue import Options

VERSION = 1
"""Of the fields below: to be counted up when an older program would misunderstand one."""


class DiskSpec(NamedTuple):
    """What a disk is to be, whoever serves it.

    Attributes:
        version: see :data:`VERSION`.
        directory: what relative paths start from.
        backend: its name, its file, or ``module:Class``; None for what goes with the path.
        path: of the image, or of a disk of the user's own.
        overlay: the file that keeps the changes.
        is_temporary: the overlay is removed with the disk.
        size: bytes, of a disk without an image.
        cow_limit: bytes of changes in memory at most.
        sector_size: bytes.
        options: for the backend, each as ``name=value``.
        filters: what each ``--filter`` says, the first next to the backend.
        read_only: the guest may not write.
        cdrom: it is shown as a CD-ROM.
        discard: it is offered, if the backend has it.
        force: the image may be somebody else's, too.
        retries: what the storage cannot do now is queued for retry, not answered with an error.
        queues, queues_in, grants, persistent_grants, indirect_segments: as the options of
            ``connect``.
        latency: requests are timed.
        timeout: seconds that the guest may take to connect.
        user: whom the process becomes, or None.
    """

    version: int = VERSION
    directory: str = "/"
    backend: str | None = None
    path: str | None = None
    overlay: str | None = None
    is_temporary: bool = False
    size: int | None = None
    cow_limit: int | None = None
    sector_size: int | None = None
    options: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    read_only: bool = False
    cdrom: bool = False
    discard: bool = True
    force: bool = False
    retries: bool = False
    queues: int = 1
    queues_in: str = "threads"
    grants: str = "auto"
    persistent_grants: int = 8224
    indirect_segments: int = 256
    latency: bool = True
    timeout: float = 30.0
    user: str | None = None

    @classmethod
    def parse(cls, data: Mapping[str, Any], version: str = "") -> DiskSpec:
        """Read what :meth:`plain` returned, perhaps in another version of this program.

        Args:
            data: that.
            version: of the program that wrote it, as far as that is known.

        Raises:
            DeviceError: this version does not know what is meant.
        """
        spec, wrong = from_plain(cls, data)
        if spec.version != VERSION:
            wrong = ["version"]
        if wrong:
            raise DeviceError(
                f"xen-disk {version or 'of another version'} described it, in terms unknown here "
                f"({', '.join(wrong)}): use that version"
            )
        return spec

    def plain(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return self._asdict()

    @property
    def backend_name(self) -> str:
        """The backend as the user knows it."""
        return choose(self.backend, self.path)

    @property
    def shown_path(self) -> str | None:
        """The path for people and scripts, absolute if it is a file's."""
        return self._absolute(self.path) if self.path and is_file(self.path) else self.path

    @property
    def files(self) -> list[str]:
        """What must be the same for a successor, by absolute paths: data, not a backend's code."""
        path = None if self.backend_name == self.path else self.path
        names = [name for name in (path, self.overlay) if name is not None and is_file(name)]
        return [self._absolute(name) for name in names]

    @property
    def temporary(self) -> str | None:
        """The file that is to be removed with the disk; None: there is none."""
        return self.overlay if self.is_temporary else None

    @property
    def queue_options(self) -> Options:
        """How its queues work."""
        from ..datapath.grants import Grants
        from ..datapath.queue import Options

        return Options(
            self.indirect_segments, Grants(self.grants), self.persistent_grants, self.latency
        )

    def open_backend(self) -> Backend:
        """Open the backend; relative paths are those of this process's directory.

        Raises:
            UsageError: it does not take one of the options.
            ImageError: the image cannot be used.
            BackendError: the backend's own code is broken.
        """
        from ..backends.loader import open_backend

        return open_backend(self.backend, self._given(), self.filters, pairs=self.options)

    def check_backend(self) -> None:
        """See whether the backend takes these options; errors as of :meth:`open_backend`."""
        from ..backends.loader import check_wanted

        check_wanted(self.backend, self._given(), self.filters, pairs=self.options)

    def _given(self) -> dict[str, object]:
        given: dict[str, object] = {}
        for name in ("path", "size", "cow_limit", "sector_size", "overlay"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        for name in ("read_only", "force"):
            if getattr(self, name):
                given[name] = True
        return given

    def open_disk(self) -> Disk:
        """Open what serves the guest's requests; errors as for :meth:`open_backend`."""
        from ..datapath.disk import Disk

        disk = Disk(self.open_backend(), holds=self.retries)
        try:
            self._check_processes(disk.backend)
        except UsageError:
            disk.close()
            raise
        if not self.discard:
            disk.can_discard = disk.can_discard_securely = False
        return disk

    @property
    def has_queue_processes(self) -> bool:
        """Whether each queue is served by a process of its own."""
        return self.queues_in == "processes"

    def _check_processes(self, backend: Backend) -> None:
        """See that a process for each queue can do what is asked for.

        Raises:
            UsageError: it cannot.
        """
        if not self.has_queue_processes:
            return
        option = "--queues-in processes"
        if self.queues == 1:
            raise UsageError(f"{option} is for several queues: add --queues 2, or more")
        if self.filters:
            raise UsageError(
                f"{option}: what a filter knows of a disk is one process's: leave out --filter, or "
                f"{option}"
            )
        if self.retries:
            raise UsageError(
                f"{option}: what --on-error hold keeps is one process's: leave out one of them"
            )
        if not vars(type(backend)).get("shared_by_forks"):
            raise UsageError(
                f"{option}: several processes cannot serve {backend}: leave that out, or use "
                "--backend raw or mmap"
            )

    def _absolute(self, path: str) -> str:
        return os.path.abspath(os.path.join(self.directory, path))


def current_directory() -> str:
    """Return the directory that relative paths start from."""
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed, so nothing is meant to be in it
        return "/"
