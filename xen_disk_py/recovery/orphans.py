"""Disks whose process has died, and whose storage is still theirs: a successor will write there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..backends.sharing import Storage, storage_of
from ..errors import ImageError
from ..host.identity import difference, identity_of
from ..xenbus.states import Address
from ..xenbus.vdev import from_number
from ..xenbus.xenstore import Store
from . import record


def check(
    directory: str,
    storage: Sequence[Storage],
    *,
    force: bool | None = None,
    store: Store | None = None,
) -> None:
    """See that no disk whose process has died is made of this.

    Args:
        directory: where records are.
        storage: what is about to be used.
        force: it is used all the same. False: there is an option to say so; None: there is none.
        store: tells which guests there are: what the others have left keeps nobody out.

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
        found = record.find(directory, Address(0, int(domid), int(devid), ""))
        if found is None or found.facts is None or not found.is_orphan:
            continue
        for theirs in found.facts.storage:
            for ours in storage:
                if _is_shared(ours, theirs, found.facts.files):
                    if store is not None and not _has_guest(store, int(domid)):
                        continue
                    device = from_number(int(devid))
                    raise ImageError(
                        f"{ours.path}: it is the disk {device} of domain {domid}, whose process "
                        "has died and may have a successor: take it over (xen-disk connect "
                        f"--adopt {domid} {device}) or take it away (xen-disk disconnect {domid} "
                        f"{device}) first{hint}"
                    )


def check_files(directory: str, *paths: str, writable: bool) -> None:
    """See that no disk whose process has died is made of these files; see :func:`check`."""
    storage = []
    for path in paths:
        with suppress(OSError):  # whoever opens it says what is wrong
            storage.append(storage_of(os.stat(path), os.path.abspath(path), writable=writable))
    check(directory, storage)


def _has_guest(store: Store, domid: int) -> bool:
    return domid == 0 or store.is_introduced(domid)


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
