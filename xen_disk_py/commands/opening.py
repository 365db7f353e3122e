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
from ..disk import Disk
from ..environment import Environment
from ..errors import BackendError
from ..grants import Grants
from ..hypervisor import Hypervisor
from ..queue import Options
from ..toolstack import Domain
from ..vdev import VirtualDevice
from .backend_arguments import backend_name

log = logging.getLogger("xen_disk_py")

TOLD = "domid domain vdev number device size backend path mode pid".split()
"""Those of the facts about a disk that are for scripts; the others are for a successor."""

LET_GO = "XEN_DISK_LET_GO"
"""When another program stopped serving the disk that we go on with, in the environment:
monotonic seconds."""


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
    """Say who serves what: for ``list``, for scripts, and for whoever goes on if we are killed."""
    path = os.path.abspath(args.path) if args.path else None
    return {
        "domid": domain.domid,
        "domain": domain.name,
        "vdev": vdev.name,
        "number": vdev.number,
        "device": vdev.guest_device,
        "size": disk.backend.size,
        "backend": backend_name(args),
        "path": path,
        "mode": "ro" if disk.read_only else "rw",
        "pid": os.getpid(),
        "file": file_identity(path),
        "survives": disk.backend.survives,
        "folder": os.getcwd(),
        "arguments": args.words,
        **facts_of_start(),
    }


def facts_of_start() -> dict[str, object]:
    """Say which program this is, and for how long nobody served if it follows another."""
    let_go = os.environ.pop(LET_GO, None)
    pause = round(time.monotonic() - float(let_go), 3) if let_go is not None else None
    return {"version": __version__, "started": time.time(), "pause": pause}


def file_identity(path: str | None) -> list[int] | None:
    """Tell a file from another one that has taken its name."""
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_dev, status.st_ino]
