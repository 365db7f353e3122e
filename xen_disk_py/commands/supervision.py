"""``connect --supervise``: what the small parent starts, first and after each crash."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress

from ..errors import XenDiskError
from ..exit_status import ExitStatus
from ..host.program import own_command
from ..recovery import record, temporary
from ..recovery.record import Found
from ..recovery.supervisor import Supervisor
from ..xenbus import toolstack
from ..xenbus.states import Address
from ..xenbus.vdev import parse
from .backend_arguments import is_cow
from .environment import Environment
from .succession import temporary_overlay


def supervise(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Have a process serve the disk, and another if that one dies."""
    words = [word for word in args.words if word != "--supervise"]
    at = words.index("connect") + 1
    options, overlay = ["--leave"], None
    if args.adopt:
        overlay = _adopted_overlay(args, env)
    elif is_cow(args):
        # Private memory would die with a process, a file in memory does not.
        overlay = temporary.new_path()
        options += ["--overlay", overlay, "--scratch"]
        if args.cow_limit is None:
            from ..host import memory

            options += ["--cow-limit", str(memory.room() // 2)]
    first = [*words[:at], *options, *words[at:]]
    shown = [word for word in ("--debug", "--quiet", "-q") if word in words]

    def again(device: str) -> Sequence[str]:
        return own_command("connect", *shown, "--leave", "--again", "--adopt", *device.split())

    supervisor = Supervisor(own_command(*first), again, watchdog=args.watchdog)
    try:
        return supervisor.run()
    finally:
        # A worker that became another user, or was killed early, could not remove these.
        with suppress(OSError):
            record.sweep(env.record_directory)
        if overlay is not None and not _is_left(supervisor.device, env):
            temporary.remove(overlay)


def _adopted_overlay(args: argparse.Namespace, env: Environment) -> str | None:
    """Name the temporary overlay of a disk that is to be adopted; what is wrong a worker tells."""
    with suppress(XenDiskError), env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        found = _find(domain.domid, args.device, env)
        return temporary_overlay(found.facts) if found is not None else None
    return None


def _is_left(device: str, env: Environment) -> bool:
    """Tell whether a disk is still there, for somebody to take over."""
    if not device:
        return False
    domid, name = device.split()
    found = _find(int(domid), name, env)
    return found is not None and bool(found.facts)


def _find(domid: int, name: str, env: Environment) -> Found | None:
    return record.find(env.record_directory, Address(0, domid, parse(name).number, ""))
