"""``fork-server``: what ``serve`` starts to start everything else; see :mod:`..host.forkserver`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

from ..errors import XenDiskError
from ..exit_status import ExitStatus
from ..host import forkserver
from .arguments import PROGRAM
from .backend_arguments import spec_from
from .environment import Environment
from .parsing import parse

log = logging.getLogger("xen_disk_py")

_USED = (
    "commands.adopt",
    "commands.connect",
    "libxen",
    "backends.raw",
    "backends.cow",
    "backends.overlay.backend",
)


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Import what a disk needs, and fork for each."""
    steps = [partial(importlib.import_module, f"xen_disk_py.{name}") for name in _USED]
    forkserver.serve(_title, [*steps, _warm_up])
    return ExitStatus.OK


def _warm_up() -> None:
    """Open a disk: the parser, compiled patterns and the like are then in memory for all."""
    with ExitStack() as stack:
        # A host that has no memory for one now may have it when a disk comes.
        stack.enter_context(suppress(XenDiskError, OSError))
        fd = os.memfd_create("xen-disk", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.truncate(fd, 1 << 20)
        args = parse(["connect", "VM", "--path", f"/proc/self/fd/{fd}"])
        spec_from(args).open_disk().close()


def _title(words: Sequence[str]) -> str:
    return " ".join([PROGRAM, *words])
