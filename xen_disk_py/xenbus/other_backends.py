"""Disks that other backends serve from the same storage: blkback, QEMU (qdisk), blktap.

None of them locks what it serves, but each device's directory in xenstore says what that is:
``physical-device`` (blkback: major and minor number, hexadecimal) and ``params``
(``aio:/images/disk.raw``). Only the toolstack writes there, no guest.

Sources: ``tools/hotplug/Linux/block`` of Xen, whose rule this is (``check_sharing``): a writer
alone, or readers only; xenstore-paths(7); QEMU's ``hw/block/xen-block.c``, which opens its files
with ``locking=off``.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence

from ..backends.sharing import Number, Storage, number_of
from ..errors import ImageError
from ..named import NamedTuple
from .states import Address, State
from .toolstack import PID_KEY, is_from_libxl, own_domid
from .vdev import from_number
from .xenstore import Store

log = logging.getLogger("xen_disk_py")

_FORMAT = r"[a-z0-9_+-]+:(?=/)"


class Other(NamedTuple):
    """A disk that another backend serves."""

    address: Address
    writes: bool
    number: Number | None
    params: str

    def __str__(self) -> str:
        vdev = from_number(self.address.devid)
        return f"{vdev} of domain {self.address.frontend_domid} ({self.address.kind})"


def check(store: Store, storage: Sequence[Storage], *, force: bool) -> None:
    """See that no other backend serves the storage of a disk that is about to be served.

    Args:
        store: xenstore.
        storage: what the disk's backend uses.
        force: a warning is enough.

    Raises:
        ImageError: one does, and it or we would write.
    """
    if not storage:
        return
    for other in others(store):
        for ours in storage:
            if _is_shared(ours, other):
                text = f"{ours.path}: in use as {other}"
                if not force:
                    domid, vdev = other.address.frontend_domid, from_number(other.address.devid)
                    raise ImageError(
                        f"{text}: detach it there first (xl block-detach {domid} {vdev}), or "
                        "--force to use it all the same"
                    )
                log.warning("%s (used all the same: --force)", text)


def others(store: Store) -> Iterator[Other]:
    """Find the disks that other backends of this domain serve.

    Ours, the one that is to be served included, are left out: they lock what they use.
    """
    domid = own_domid(store)
    root = f"/local/domain/{domid}/backend"
    guests = [
        (kind, guest)
        for kind in store.list(root)
        for guest in _numbers(store.list(f"{root}/{kind}"))
    ]
    devices = store.list_all([f"{root}/{kind}/{guest}" for kind, guest in guests])
    addresses = [
        Address(domid, guest, devid, kind)
        for (kind, guest), names in zip(guests, devices)
        for devid in _numbers(names)
    ]
    pids = store.read_all([f"{address.backend}/{PID_KEY}" for address in addresses])
    for address, pid in zip(addresses, pids):
        other = None if pid else _other(store, address)
        if other is not None:
            yield other


def _numbers(names: Sequence[str]) -> Iterator[int]:
    return map(int, filter(str.isdigit, names))


def _other(store: Store, address: Address) -> Other | None:
    keys = ("params", "physical-device", "state", "online", "mode")
    values = store.read_all([f"{address.backend}/{name}" for name in keys])
    params, number_text, state, online, mode = (value or "" for value in values)
    number = _parse_number(number_text)
    if number is None and "/" not in params:
        return None  # no disk
    if is_from_libxl(store, address):
        return None
    if State.parse(state) is State.CLOSED and online == "0":
        return None  # it is over
    return Other(address, not mode.startswith("r"), number, params)


def _is_shared(ours: Storage, other: Other) -> bool:
    if not (ours.writable or other.writes):
        return False
    if other.number in ours.devices:
        return True
    path = re.sub(_FORMAT, "", other.params, count=1)
    for candidate in {path, path.partition(",")[0]}:
        try:
            status = os.stat(candidate)
        except (OSError, ValueError):
            continue
        if stat.S_ISBLK(status.st_mode):
            if number_of(status) in ours.devices:
                return True
        elif (status.st_dev, status.st_ino) in ours.files:
            return True
    return False


def _parse_number(text: str) -> Number | None:
    match = re.fullmatch(r"([0-9a-fA-F]{1,8}):([0-9a-fA-F]{1,8})", text)
    return None if match is None else (int(match[1], 16), int(match[2], 16))
