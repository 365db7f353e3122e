"""``rewind``: make an image of a recorded disk as it was at a moment."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing

from ..backends.at import AtBackend
from ..backends.rewinding import rewind_to_image, rewind_to_overlay
from ..errors import UsageError
from ..exit_status import ExitStatus
from ..units import format_size
from .environment import Environment
from .orphaned import not_of_orphans
from .progress import ProgressLine
from .signals import interruptible


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Make it, and say what was made."""
    if (args.new is None) == (args.overlay is None):
        raise UsageError("-o NEW or --overlay OVERLAY: say what to make, one of them")
    with closing(AtBackend(f"at:{args.trace}@{args.at}", base=args.base)) as disk:
        not_of_orphans(env)(disk.base.path, False)
        found = disk.found
        env.tell_all(disk.notes)
        with ProgressLine(env, "rewinding", quiet=args.quiet) as progress, interruptible():
            if args.new is not None:
                rewind_to_image(disk, args.new, progress)
            else:
                rewind_to_overlay(disk, args.overlay, progress)
        path = os.path.abspath(args.new or args.overlay)
        written = sum(each.length for each in found.extents)
        if args.json:
            facts = {
                "path": path,
                "size": disk.size,
                "format": "raw" if args.new is not None else "overlay",
                "base": disk.base.path,
                "requests": found.requests,
                "flushes": found.flushes,
                "seconds": found.time / 1e9,
                "written": written,
                "failed_writes": found.failed,
                "notes": list(disk.notes),
            }
            env.say(json.dumps(facts))
        else:
            env.say(
                f"{path} {format_size(disk.size)}: after {found.requests} requests, "
                f"{found.flushes} flushes and {found.time / 1e9:.3f} s"
            )
    return ExitStatus.OK
