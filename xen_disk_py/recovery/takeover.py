"""Taking over the disk of a process that died: its record, and whether its storage is the same."""

from __future__ import annotations

import logging
import os

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
from ..host.identity import difference, identity_of, is_known
from ..named import NamedTuple
from ..units import format_size
from ..xenbus import toolstack
from ..xenbus.states import Address
from ..xenbus.toolstack import Attached, Domain
from ..xenbus.vdev import VirtualDevice
from ..xenbus.xenstore import Store
from . import record, temporary
from .facts import Facts
from .record import Record
from .spec import DiskSpec

log = logging.getLogger("xen_disk_py")

PASSING = (BackendError, HypervisorError, ImageError, StoreError, XenUnavailable)
"""What may be otherwise the next time that somebody tries to take a disk over."""


class Gone(Exception):
    """The guest or its disk has gone, and its nodes and files are removed; the text says so."""


class Orphan(NamedTuple):
    """A disk whose process has died, and that is ours now."""

    domain: Domain
    disk: Attached
    record: Record
    spec: DiskSpec


def is_orphan(directory: str, store: Store, domain: Domain, devid: int) -> bool:
    """Tell whether a process that served this device has died, and its record says what it was."""
    disk = _find(store, domain, devid)
    if disk is not None:
        record.await_end(directory, disk.address)
    found = record.find(directory, disk.address) if disk is not None else None
    return (
        found is not None
        and not found.alive
        and found.facts is not None
        and found.facts.disk is not None
    )


def take(
    directory: str, store: Store, vm: str, vdev: VirtualDevice, *, force: bool = False
) -> Orphan:
    """Claim the record of a dead process, and go to the directory that its paths start from.

    Args:
        directory: where records are.
        store: xenstore.
        vm: the guest, as a user names it; its number, if it may have gone.
        vdev: the disk.
        force: take a block device for the same one, though nothing but its path says so.

    Raises:
        Gone: there is nothing to serve any longer.
        GuestNotFound: there is no such guest, nor anything of it.
        DeviceTaken: the process lives, or somebody else has taken the disk over.
        DeviceError: there is nothing, or nothing that one could serve.
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
    record.await_end(directory, address)
    found = record.find(directory, address)
    facts = found.facts if found is not None else None
    if disk is None and facts is None:
        raise absent or DeviceError(f"no {vdev} of ours in {domain}: nothing to adopt")
    if found is not None and found.alive:
        pid = disk.pid if disk is not None else facts.pid if facts is not None else "of ours"
        raise DeviceTaken(f"process {pid} lives and serves {vdev} of {domain}: nothing to adopt")
    if toolstack.is_from_libxl(store, address):
        raise DeviceError(
            f"xl has attached {vdev}: xen-disk serve takes it over; to take it away: "
            f"xl block-detach {domain.domid} {vdev}"
        )
    is_guest_gone = absent is not None or not (
        domain.domid == 0 or store.is_introduced(domain.domid)
    )
    if disk is None or is_guest_gone:
        _remove(directory, store, address)
        raise Gone("the guest has gone" if is_guest_gone else "detached meanwhile")
    mine = Record.adopt(directory, address)
    try:
        return Orphan(domain, disk, mine, _spec(mine, disk, domain, force=force))
    except BaseException:
        mine.leave()
        raise


def _find(store: Store, domain: Domain, devid: int) -> Attached | None:
    disks = toolstack.attached(store, domain.domid)
    return next((disk for disk in disks if disk.address.devid == devid), None)


def _address(store: Store, domain: Domain, vdev: VirtualDevice) -> Address:
    return Address(toolstack.own_domid(store), domain.domid, vdev.number, toolstack.KINDS[0])


def _remove(directory: str, store: Store, address: Address) -> None:
    """Remove nodes, record and temporary file of a disk that nobody has any longer.

    Raises:
        DeviceTaken: somebody else is at it.
    """
    try:
        orphaned = Record.adopt(directory, address)
    except DeviceTaken:
        raise
    except DeviceError:  # none, or one of another version
        toolstack.detach(store, address)
        record.forget(directory, address)
        return
    with orphaned:
        toolstack.detach(store, address)
        file = orphaned.facts.temporary
        if file is not None:
            temporary.remove(file)


def _spec(mine: Record, disk: Attached, domain: Domain, *, force: bool) -> DiskSpec:
    forced = f"xen-disk disconnect {domain.domid} {disk.device} --force"
    check_files(mine.facts, str(disk.device), forced, force=force)
    try:
        spec = mine.facts.spec
        os.chdir(spec.directory)  # paths may be relative
    except (OSError, DeviceError, UsageError) as error:
        raise DeviceError(
            f"{disk.device} cannot be opened as process {disk.pid} did ({error}): take it away "
            f"with: {forced}"
        ) from error
    return spec


def check_files(facts: Facts, device: str, forced: str, *, force: bool = False) -> None:
    """See that what a disk was made of is there.

    Args:
        facts: about the process that died.
        device: what to call the disk.
        forced: the command that takes it away.
        force: a block device that nothing but its path identifies is taken for the same one.

    Raises:
        ImageError: a file is missing; it may come back.
        DeviceError: a file is another one, or the disk never was in a file.
    """
    if not facts.survives:
        raise DeviceError(
            f"what the guest wrote to {device} has died with process {facts.pid}, as is "
            f"the way of a {facts.backend} disk: take it away with: {forced}"
        )
    for path, identity in facts.files.items():
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
        if not (force or is_known(identity, now)):
            raise DeviceError(
                f"{path}: nothing but its path says that it is the device that {device} was made "
                "of: look yourself, and take it over with --force, or take the disk away with: "
                f"{forced}"
            )


def check_size(facts: Facts, device: str, backend: Backend) -> None:
    """See that a backend has room for what the guest knows.

    Raises:
        ImageError: it has become smaller.
    """
    size = facts.size
    if facts.resizing:  # it may have come so far, and the guest is told by us
        size = min(size, facts.resizing)
    if backend.size < size:
        raise ImageError(
            f"{facts.path or backend} is {format_size(backend.size)} long now, {device} "
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
