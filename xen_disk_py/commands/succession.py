"""Taking over the disk of a process that died: what it has left, and whether that will do."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..backends import Backend
from ..errors import (
    BackendError,
    DeviceError,
    DeviceTaken,
    GuestNotFound,
    HypervisorError,
    ImageError,
    StoreError,
    UsageError,
    XenUnavailable,
)
from ..exit_status import ExitStatus
from ..host.identity import difference, identity_of
from ..libxl import attachment
from ..recovery import record, temporary
from ..recovery.record import Record
from ..units import format_size
from ..xenbus import toolstack
from ..xenbus.states import Address
from ..xenbus.toolstack import Attached, Domain
from ..xenbus.vdev import VirtualDevice
from ..xenbus.xenstore import Store
from .arguments import parse
from .environment import Environment

log = logging.getLogger("xen_disk_py")

PASSING = (BackendError, HypervisorError, ImageError, StoreError, XenUnavailable)
"""What may be otherwise the next time that somebody tries to take over."""


class Left(NamedTuple):
    """A disk that nobody serves, and that is ours now."""

    domain: Domain
    disk: Attached
    record: Record
    arguments: argparse.Namespace
    """What the process was called with."""


def is_left(env: Environment, store: Store, domain: Domain, devid: int) -> bool:
    """Tell whether a process that served this device has died, and left what it was."""
    disk = _find(store, domain, devid)
    found = record.find(env.record_directory, disk.address) if disk is not None else None
    return found is not None and not found.alive and "arguments" in found.facts


def take(env: Environment, store: Store, vm: str, vdev: VirtualDevice) -> Left | None:
    """Claim what a process has left.

    Returns:
        None if the guest, or its disk, has gone meanwhile: then all the rest is removed.

    Raises:
        GuestNotFound: there is no such guest, nor anything of it.
        DeviceTaken: the process lives, or somebody else has adopted the disk.
        DeviceError: there is nothing, or nothing that one could take over.
    """
    absent = None
    try:
        domain = toolstack.find_domain(store, vm)
    except GuestNotFound as error:
        if not (vm.isascii() and vm.isdecimal()):
            raise
        absent, domain = error, Domain(int(vm), "", "")
    disk = _find(store, domain, vdev.number)
    address = disk.address if disk is not None else _address(store, domain, vdev)
    found = record.find(env.record_directory, address)
    if disk is None and (found is None or not found.facts):
        raise absent or DeviceError(f"no {vdev} of ours in {domain}: nothing to adopt")
    if found is not None and found.alive:
        pid = disk.pid if disk is not None else found.facts.get("pid")
        raise DeviceTaken(f"process {pid} lives and serves {vdev} of {domain}: nothing to adopt")
    if attachment.is_ours(store, address):
        raise DeviceError(
            f"xl has attached {vdev}: xen-disk serve takes it over; to take it away: "
            f"xl block-detach {domain.domid} {vdev}"
        )
    is_guest_gone = absent is not None or not (
        domain.domid == 0 or store.is_introduced(domain.domid)
    )
    if disk is None or is_guest_gone:
        _remove(env, store, address)
        env.tell(f"{vdev}: " + ("the guest has gone" if is_guest_gone else "detached meanwhile"))
        return None
    left = Record.adopt(env.record_directory, address)
    try:
        return Left(domain, disk, left, _arguments(left.facts, disk, domain))
    except BaseException:
        left.leave()
        raise


def _find(store: Store, domain: Domain, devid: int) -> Attached | None:
    disks = toolstack.attached(store, domain.domid)
    return next((disk for disk in disks if disk.address.devid == devid), None)


def _address(store: Store, domain: Domain, vdev: VirtualDevice) -> Address:
    return Address(toolstack.own_domid(store), domain.domid, vdev.number, toolstack.KINDS[0])


def _remove(env: Environment, store: Store, address: Address) -> None:
    """Remove all that a process has left of a disk that nobody has any longer.

    Raises:
        DeviceTaken: somebody else is at it.
    """
    try:
        left = Record.adopt(env.record_directory, address)
    except DeviceTaken:
        raise
    except DeviceError:  # none, or one of another version
        toolstack.detach(store, address)
        record.forget(env.record_directory, address)
        return
    with left:
        toolstack.detach(store, address)
        overlay = temporary_overlay(left.facts)
        if overlay is not None:
            temporary.remove(overlay)


def temporary_overlay(facts: Mapping[str, Any]) -> str | None:
    """Name the overlay that is to vanish with the disk; None if there is none."""
    try:
        arguments = parse(facts["arguments"])
    except (KeyError, TypeError, UsageError):
        return None
    return arguments.overlay if arguments.scratch else None


def _arguments(facts: dict[str, Any], disk: Attached, domain: Domain) -> argparse.Namespace:
    forced = f"xen-disk disconnect {domain.domid} {disk.device} --force"
    check_files(facts, str(disk.device), forced)
    try:
        os.chdir(facts["folder"])  # paths may be relative
        return parse(facts["arguments"])
    except (KeyError, TypeError, OSError, UsageError) as error:
        raise DeviceError(
            f"{disk.device} cannot be opened as process {disk.pid} did ({error!r}): take it away "
            f"with: {forced}"
        ) from error


def check_files(facts: Mapping[str, Any], device: str, forced: str) -> None:
    """See that what a disk was made of is there.

    Args:
        facts: about the process that died.
        device: what to call the disk.
        forced: the command that takes it away.

    Raises:
        ImageError: a file is missing; it may come back.
        DeviceError: a file is another one, or the disk never was in a file.
    """
    if not facts.get("survives"):
        raise DeviceError(
            f"what the guest wrote to {device} has died with process {facts.get('pid')}, as is "
            f"the way of a {facts.get('backend')} disk: take it away with: {forced}"
        )
    for path, identity in facts.get("files", {}).items():
        try:
            now = identity_of(path)
        except OSError as error:
            raise ImageError(f"{path}, of which {device} was made: {error.strerror}") from error
        if now is None:
            raise ImageError(
                f"{path}, of which {device} was made, is not there: put it back, or take the disk "
                f"away with: {forced}"
            )
        other = difference(identity, now)
        if other is not None:
            raise DeviceError(
                f"{path} is not what {device} was made of ({other}): put that back, or take the "
                f"disk away with: {forced}"
            )


def check_size(facts: Mapping[str, Any], device: str, backend: Backend) -> None:
    """See that a backend has room for what the guest knows.

    Raises:
        ImageError: it has become smaller.
    """
    size = facts.get("size", 0)
    if facts.get("resizing"):  # it may have come so far, and the guest is told by us
        size = min(size, facts["resizing"])
    if backend.size < size:
        raise ImageError(
            f"{facts.get('path') or backend} is {format_size(backend.size)} long now, {device} "
            f"{format_size(size)}: make it as long again ({size} bytes), or take the disk away "
            "by force"
        )


def crash(error: Exception) -> None:
    """End this process at once, for an error of its own; the disk waits for a successor.

    From any thread: nothing that the guest asked for is answered any more by this process.
    """
    log.error("serving failed, and the disk is left to another process", exc_info=error)
    logging.shutdown()
    os._exit(ExitStatus.CRASHED)
