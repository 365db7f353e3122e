"""``connect --supervise``: what the small parent starts, first and after each crash."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence

from ..backends.loader import choose
from ..exit_status import ExitStatus
from ..supervisor import Supervisor

_MEMORY = "/dev/shm"


def supervise(args: argparse.Namespace) -> ExitStatus:
    """Have a process serve the disk, and another if that one dies."""
    words = [word for word in args.words if word != "--supervise"]
    at = words.index("connect") + 1
    options = ["--leave"]
    if args.overlay is None and choose(args.backend, args.path) == "cow":
        # Private memory would die with a process, a file in memory does not.
        name = f"xen_disk_py-{os.getpid()}-{secrets.token_hex(4)}.overlay"
        options += ["--overlay", os.path.join(_MEMORY, name), "--scratch"]
        if args.cow_limit is None:
            from ..backends.cow import available_memory

            options += ["--cow-limit", str(available_memory() // 2)]
    first = [*words[:at], *options, *words[at:]]
    shown = [word for word in ("--debug", "--quiet", "-q") if word in words]

    def again(device: str) -> Sequence[str]:
        return _command("connect", *shown, "--leave", "--again", "--adopt", *device.split())

    return Supervisor(_command(*first), again, watchdog=args.watchdog).run()


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "xen_disk_py", *words]
