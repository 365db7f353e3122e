"""``fork-server``: what ``serve`` starts to start everything else; see :mod:`..host.forkserver`."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence

from ..exit_status import ExitStatus
from ..host import forkserver
from .arguments import PROGRAM, parse
from .environment import Environment

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
    for name in _USED:
        importlib.import_module(f"xen_disk_py.{name}")
    parse(["adopt", "0", "0"])  # the parser is made once
    forkserver.serve(_title)
    return ExitStatus.OK


def _title(words: Sequence[str]) -> str:
    return " ".join([PROGRAM, *words])
