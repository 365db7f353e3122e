"""What the commands that serve a disk share: from arguments to what works for them."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import __version__
from ..backends.loader import is_file
from ..datapath.disk import Disk
from ..datapath.grants import Grants
from ..datapath.queue import Options
from ..errors import BackendError
from ..host.identity import identity_of
from ..host.process import start_time
from ..hypervisor import Hypervisor
from ..recovery import orphans
from ..xenbus.toolstack import Domain
from ..xenbus.vdev import VirtualDevice
from .backend_arguments import backend_name
from .environment import Environment

log = logging.getLogger("xen_disk_py")

TOLD = ["domid", "domain", "vdev", "number", "device", "size", "backend", "path", "mode", "pid"]
"""Those of the facts about a disk that are for scripts; the others are for a successor."""


@contextmanager
def opened_hypervisor(env: Environment) -> Iterator[Hypervisor]:
    """Open the hypervisor; a page that a backend keeps does not change how the command ends."""
    hypervisor = env.open_hypervisor()
    try:
        yield hypervisor
    finally:
        try:
            hypervisor.close()
        except BackendError as error:
            log.warning("%s", error)


def queue_options(args: argparse.Namespace) -> Options:
    """Say how queues shall work."""
    return Options(args.indirect_segments, Grants(args.grants), args.persistent_grants)


def facts_about(
    args: argparse.Namespace, domain: Domain, vdev: VirtualDevice, disk: Disk
) -> dict[str, Any]:
    """Say who serves what: for ``list``, for scripts, and for a successor if we are killed."""
    path = args.path
    if path and is_file(path):
        path = os.path.abspath(path)
    return {
        "domid": domain.domid,
        "domain": domain.name,
        "vdev": vdev.name,
        "number": vdev.number,
        "device": vdev.guest_device,
        "size": disk.backend.size,
        "resizing": None,  # what size the disk is about to have
        "backend": backend_name(args),
        "path": path,
        "mode": "ro" if disk.read_only else "rw",
        "pid": os.getpid(),
        "process_started": start_time(os.getpid()),
        "files": {name: identity_of(name) for name in _files(args)},
        "storage": orphans.storage_facts(disk.backend.storage),
        "survives": disk.backend.survives,
        "folder": _directory(),
        "arguments": args.words,
        "version": __version__,
        "connected": False,  # has the guest had it?
        "started": None,
        "pause": None,
    }


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed, so nothing is meant to be in it
        return "/"


def facts_of_start(let_go: float | None) -> dict[str, object]:
    """Say since when we serve, and for how long nobody did if another program has made way for us.

    Args:
        let_go: when that was, in monotonic seconds, which all processes share.
    """
    pause = round(time.monotonic() - let_go, 3) if let_go is not None else None
    return {"started": time.time(), "pause": pause}


def _files(args: argparse.Namespace) -> list[str]:
    """Name what must be the same for whoever takes over: data, not the code of a backend."""
    path = None if backend_name(args) == args.path else args.path
    names = [name for name in (path, args.overlay) if name is not None and is_file(name)]
    return [os.path.abspath(name) for name in names]
