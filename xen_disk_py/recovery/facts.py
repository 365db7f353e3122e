"""What a record says: who serves what, for ``list``, for scripts, and for a successor."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..backends.finding import is_own_filter
from ..errors import DeviceError, UsageError
from ..host.identity import identity_of
from ..host.process import start_time
from ..named import NamedTuple
from ..xenbus.vdev import VirtualDevice
from .plain import from_plain
from .spec import DiskSpec

if TYPE_CHECKING:  # a toolstack needs pyxs, which nbdkit's Python may not have
    from ..backends.sharing import Storage
    from ..datapath.disk import Disk
    from ..xenbus.toolstack import Domain

FORMAT = 3
"""What the layout of a record is, and of all in it. 2 had no histograms of latency."""
FORMATS = (2, FORMAT)
"""What this version can read and take over."""

TOLD = ("domid", "domain", "vdev", "number", "device", "size", "backend", "path", "mode", "pid")
"""Those of the facts that are for scripts, as they are; the others are for a successor."""

_CHANGING = (
    "size",
    "resizing",
    "connected",
    "started",
    "pause",
    "released_at",
    "not_upgraded",
)


class Facts(NamedTuple):
    """Who serves what.

    Attributes:
        format: one of :data:`FORMATS`, if this version can take the disk over.
        domid, domain: the guest's number and name.
        vdev, number, device: the disk's name (``xvdb``), its number, its usual name in Linux.
        size: bytes, as the guest knows it.
        resizing: bytes that the disk was about to have when this was written, or None.
        backend, path: as :class:`DiskSpec` shows them.
        mode: ``rw`` or ``ro``.
        pid, process_started: who serves it, and when that process was started (in clock ticks).
        queues: the processes of its queues, likewise, where they have some: pairs.
        files: what must be the same for a successor: an identity for each path.
        storage: where its bytes are, so that nobody else writes there: see :mod:`.orphans`.
        survives: what the guest has written is there when the process has died.
        disk: what it is to be, as JSON knows it: see :attr:`spec`.
        version: of the program.
        connected: the guest has had it.
        started: since when this process serves it, in seconds since 1970; None: not yet.
        pause: for how many seconds nobody did, if it was upgraded.
        released_at: when the process before gave it up for that, in monotonic seconds; None once it
            is served again.
        not_upgraded: when, and why not.
    """

    format: int = FORMAT
    domid: int = 0
    domain: str = ""
    vdev: str = ""
    number: int = 0
    device: str = ""
    size: int = 0
    resizing: int | None = None
    backend: str | None = None
    path: str | None = None
    mode: str = "rw"
    pid: int = 0
    process_started: int | None = None
    queues: tuple[tuple[int, int | None], ...] = ()
    files: dict[str, Any] = {}  # noqa: RUF012 - nobody changes one
    storage: tuple[dict[str, Any], ...] = ()
    survives: bool = False
    disk: dict[str, Any] | None = None
    version: str = ""
    connected: bool = False
    started: float | None = None
    pause: float | None = None
    released_at: float | None = None
    not_upgraded: tuple[float, str] | None = None

    @classmethod
    def about(
        cls, spec: DiskSpec, domain: Domain, vdev: VirtualDevice, disk: Disk, **more: Any
    ) -> Facts:
        """Describe what this process is about to serve."""
        return cls(
            domid=domain.domid,
            domain=domain.name,
            vdev=vdev.name,
            number=vdev.number,
            device=vdev.guest_device,
            size=disk.backend.size,
            backend=spec.backend_name,
            path=spec.shown_path,
            mode="ro" if disk.read_only else "rw",
            pid=os.getpid(),
            process_started=start_time(os.getpid()),
            files=_identities(spec, disk),
            storage=tuple(map(_described, disk.backend.host_storage)),
            survives=disk.backend.survives,
            disk=spec.plain(),
            version=__version__,
            **more,
        )

    @classmethod
    def parse(cls, text: bytes) -> Facts | None:
        """Read what :meth:`encode` returned, or what another version or chance has written.

        Returns:
            None for nothing, or nothing that can be read. What makes no sense has its default;
            then, and in what another version wrote, ``format`` is another one.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict) or not data:
            return None
        facts, wrong = from_plain(cls, {"format": 0, **data})
        if wrong and facts.format in FORMATS:
            facts, _ = from_plain(cls, {**data, "format": 0})
        return facts

    def encode(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(self._asdict()).encode()

    @property
    def spec(self) -> DiskSpec:
        """What the disk is to be.

        Raises:
            DeviceError: this version does not know.
        """
        if self.format not in FORMATS or self.disk is None:
            which = self.version or "of another version"
            raise DeviceError(f"its record is of xen-disk {which}: use that version")
        return DiskSpec.parse(self.disk, self.version)

    @property
    def temporary(self) -> str | None:
        """The file that is to be removed with the disk; None: there is none, or nobody knows."""
        try:
            return self.spec.temporary
        except DeviceError:
            return None

    @property
    def queue_pids(self) -> list[int]:
        """The ids of the processes of its queues; none where they are threads."""
        return [pid for pid, _ in self.queues]

    def believed(self, shown: Facts) -> Facts:
        """Return these facts with what of ``shown`` whoever has no privileges may say.

        Args:
            shown: what a process says that gave its privileges up when these were written: how
                things are with the disk, and other settings of its filters. Not what would be
                opened for it, nor which processes there are.
        """
        changed = {name: getattr(shown, name) for name in _CHANGING}
        before = (self.disk or {}).get("filters")
        now = (shown.disk or {}).get("filters")
        if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
            now = now[: len(before)]  # a recorder that was put over them since is left out
            if list(map(_opened_by, before)) == list(map(_opened_by, now)):
                changed["disk"] = {**(self.disk or {}), "filters": now}
        return self._replace(**changed)

    def told(self) -> Mapping[str, Any]:
        """Return what is for scripts."""
        told = {name: getattr(self, name) for name in TOLD}
        return {**told, "queue_pids": self.queue_pids}


def _opened_by(text: object) -> object:
    """Return what of a ``--filter`` says which code and which file there are."""
    from ..backends.loader import filter_parts

    try:
        name, options = filter_parts(text) if isinstance(text, str) else ("", [])
    except UsageError:
        return text
    if not is_own_filter(name):
        return text  # an author's own: nobody knows what its options mean
    return name, [item for item in options if item.startswith("file=")]


def _identities(spec: DiskSpec, disk: Disk) -> dict[str, Any]:
    """Identify what a disk is made of, what its files name themselves included: a VHD's parents."""
    found: dict[str, Any] = {name: identity_of(name) for name in spec.files}
    for each in disk.backend.host_storage:
        if each.path not in found and (identity := identity_of(each.path)) is not None:
            found[each.path] = identity
    return found


def _described(storage: Storage) -> dict[str, Any]:
    return {
        "path": storage.path,
        "writable": storage.writable,
        "files": sorted(storage.files),
        "devices": sorted(storage.devices),
    }


def pause_since(released_at: float | None) -> float | None:
    """Return for how many seconds nobody served, if one program gave a disk up for the next."""
    return round(time.monotonic() - released_at, 3) if released_at is not None else None
