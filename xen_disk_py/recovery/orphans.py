"""Disks whose process has died, and whose storage is still theirs: a successor will write there.

Whoever opens storage locks it first and looks here afterwards. The kernel releases the locks of a
process that dies one by one, in no order that is promised, so that its record may be locked when
its image is not any more. A process that has none of its storage open although its record is locked
is about to end: it is waited for. (In the other order the image's own lock refuses.)
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Callable

from ..backends.sharing import Storage, number_of, storage_of_files
from ..errors import ImageError, XenDiskError
from ..host.identity import difference, identity_of
from ..xenbus.states import Address
from ..xenbus.vdev import from_number
from . import record
from .record import Found

if TYPE_CHECKING:  # nbdkit's Python, which our plugin runs in, may have no pyxs
    from ..xenbus.xenstore import Store

_PATIENCE = 10.0  # seconds: unmapping a large image, and closing what writes back, takes a moment
_PAUSE = 0.01


def check(
    directory: str,
    storage: Sequence[Storage],
    *,
    force: bool | None = None,
    store: Store | None = None,
    open_store: Callable[[], Store] | None = None,
) -> None:
    """See that no disk whose process has died is made of this, which is locked already.

    Args:
        directory: where records are.
        storage: what is about to be used.
        force: it is used all the same. False: there is an option to say so; None: there is none.
        store: tells which guests there are: what the others have left keeps nobody out.
        open_store: makes one where that is to be known; what it raises means that nobody knows.

    Raises:
        ImageError: one is, and one of the two writes.
    """
    try:
        names = [] if force else os.listdir(directory)
    except OSError:
        return  # no records
    hint = "" if force is None else ", or --force to use it all the same"
    for name in names:
        domid, _, devid = name.partition("-")
        if not (domid.isdigit() and devid.isdigit()):
            continue
        address = Address(0, int(domid), int(devid), "")
        found = record.find(directory, address)
        ours = _shared(storage, found)
        if found is not None and found.alive and ours is not None:
            found = _ended(directory, address, found)
            ours = _shared(storage, found)
        if found is None or ours is None or not (found.alive or found.is_orphan):
            continue
        device = from_number(int(devid))
        if found.alive:
            raise ImageError(
                f"{ours.path}: it is the disk {device} of domain {domid}, whose process is ending: "
                f"try again when xen-disk list shows it no longer{hint}"
            )
        if _has_guest(int(domid), store, open_store):
            raise ImageError(
                f"{ours.path}: it is the disk {device} of domain {domid}, whose process "
                "has died and may have a successor: take it over (xen-disk connect "
                f"--adopt {domid} {device}) or take it away (xen-disk disconnect {domid} "
                f"{device}) first{hint}"
            )


def check_files(
    directory: str,
    *paths: str,
    writable: bool,
    open_store: Callable[[], Store] | None = None,
) -> None:
    """See that no disk whose process has died is made of these files; see :func:`check`."""
    check(directory, storage_of_files(paths, writable=writable), open_store=open_store)


def _shared(storage: Sequence[Storage], found: Found | None) -> Storage | None:
    """Return what of ours the disk of a record is made of, if one of the two writes."""
    if found is None or found.facts is None:
        return None
    for theirs in found.facts.storage:
        for ours in storage:
            if _is_shared(ours, theirs, found.facts.files):
                return ours
    return None


def _ended(directory: str, address: Address, found: Found) -> Found | None:
    """Wait for the end of a process that has closed its storage; what is left of its record.

    None if it keeps using its storage: the locks have said that this may be shared.
    """
    deadline = time.monotonic() + _PATIENCE
    now: Found | None = found
    while now is not None and now.alive and now.facts is not None:
        if _has_open(now.facts.pid, now.facts.storage):
            return None
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)
        now = record.find(directory, address)
    return now


def _has_open(pid: int, storage: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a process has any of this open; if that is not to be known, it has."""
    files = {tuple(each) for theirs in storage for each in theirs["files"]}
    devices = {tuple(each) for theirs in storage for each in theirs["devices"]}
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except PermissionError:
        return True
    except OSError:
        return False
    for name in names:
        with suppress(OSError):
            status = os.stat(f"{directory}/{name}")
            if (status.st_dev, status.st_ino) in files:
                return True
            if stat.S_ISBLK(status.st_mode) and number_of(status) in devices:
                return True
    return False


def _has_guest(domid: int, store: Store | None, open_store: Callable[[], Store] | None) -> bool:
    """Tell whether a guest is there; one of which nobody knows is."""
    if domid == 0:
        return True
    try:
        if store is not None:
            return store.is_introduced(domid)
        if open_store is not None:
            with open_store() as opened:
                return opened.is_introduced(domid)
    except XenDiskError:
        pass  # no Xen here, or not just now
    return True


def _is_shared(ours: Storage, theirs: dict[str, Any], identities: Mapping[str, Any]) -> bool:
    if not (ours.writable or theirs["writable"]):
        return False
    before = identities.get(theirs["path"])
    if before is not None and ours.path == theirs["path"]:
        with suppress(OSError):
            now = identity_of(ours.path)
            if now is not None and difference(before, now) is not None:
                return False  # another file, which was given the same number
    files = {tuple(each) for each in theirs["files"]}
    devices = {tuple(each) for each in theirs["devices"]}
    return bool(files & ours.files or devices & ours.devices)
