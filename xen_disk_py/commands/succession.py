"""Going on with the disk of a process that died: what it has left, and whether that will do."""

from __future__ import annotations

import argparse
import logging
import os
from typing import NamedTuple

from .. import record, toolstack
from ..arguments import parse
from ..backends import Backend
from ..environment import Environment
from ..errors import DeviceError, ImageError, UsageError
from ..exit_status import ExitStatus
from ..record import Record
from ..toolstack import Attached, Domain
from ..units import format_size
from ..vdev import VirtualDevice
from ..xenstore import Store
from .opening import file_identity

log = logging.getLogger("xen_disk_py")


class Left(NamedTuple):
    """A disk that nobody serves, ours by now."""

    disk: Attached
    record: Record
    arguments: argparse.Namespace
    """What the process was called with."""


def is_left(env: Environment, store: Store, domain: Domain, devid: int) -> bool:
    """Tell whether a process that served this device has died, and can be followed."""
    disk = _find(store, domain, devid)
    found = record.find(env.record_directory, disk.address) if disk is not None else None
    return found is not None and not found.alive and "arguments" in found.facts


def take(env: Environment, store: Store, domain: Domain, vdev: VirtualDevice) -> Left:
    """Claim what a process has left.

    Raises:
        DeviceTaken: it lives, or somebody else has.
        DeviceError: there is nothing, or nothing that one could go on with.
    """
    disk = _find(store, domain, vdev.number)
    if disk is None:
        raise DeviceError(f"no {vdev} of ours in {domain}: nothing to adopt")
    left = Record.adopt(env.record_directory, disk.address)
    try:
        return Left(disk, left, _arguments(left, disk, domain))
    except BaseException:
        left.leave()
        raise


def _find(store: Store, domain: Domain, devid: int) -> Attached | None:
    disks = toolstack.attached(store, domain.domid)
    return next((disk for disk in disks if disk.address.devid == devid), None)


def _arguments(left: Record, disk: Attached, domain: Domain) -> argparse.Namespace:
    facts = left.facts
    forced = f"xen-disk disconnect {domain.domid} {disk.device} --force"
    if not facts.get("survives"):
        raise DeviceError(
            f"what the guest wrote to {disk.device} has died with process {disk.pid}, as is the "
            f"way of a {facts.get('backend')} disk: take it away with: {forced}"
        )
    if file_identity(facts.get("path")) != facts.get("file"):
        raise DeviceError(
            f"{facts.get('path')} is not the file any more that {disk.device} was made of: put "
            f"that back, or take the disk away with: {forced}"
        )
    try:
        os.chdir(facts["folder"])  # paths may be relative
        arguments = parse(facts["arguments"])
    except (KeyError, TypeError, OSError, UsageError) as error:
        raise DeviceError(
            f"{disk.device} cannot be opened as process {disk.pid} did ({error!r}): take it away "
            f"with: {forced}"
        ) from error
    return arguments


def check_size(left: Left, backend: Backend) -> None:
    """See that a backend has room for what the guest knows.

    Raises:
        ImageError: it has become smaller.
    """
    size = left.record.facts.get("size", 0)
    if backend.size < size:
        raise ImageError(
            f"{left.record.facts.get('path')} is {format_size(backend.size)} long now, "
            f"{left.disk.device} {format_size(size)}: make it as long again "
            f"(truncate -s {size}), or take the disk away by force"
        )


def crash(error: Exception) -> None:
    """End this process at once, for an error of its own; the disk waits for a successor."""
    log.error("serving failed, and the disk is left to another process", exc_info=error)
    logging.shutdown()
    os._exit(ExitStatus.CRASHED)
