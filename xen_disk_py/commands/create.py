"""``create``: make an image."""

from __future__ import annotations

import argparse
import json
import os

from ..backends.vhd.backend import directories_from
from ..backends.vhd.create import create, create_child
from ..errors import UsageError
from ..exit_status import ExitStatus
from ..units import format_size
from .environment import Environment
from .orphaned import not_of_orphans


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Make it, and say what was made."""
    most = args.max_size or 0
    if args.parent is None:
        if args.size is None:
            raise UsageError("--size or --parent: say how large the disk is, or what it reads as")
        if args.parent_format is not None or args.option:
            raise UsageError("--parent-format and --option say how to read --parent: give that")
        if args.fixed and most:
            raise UsageError("--max-size: a fixed VHD can be made larger always: leave it out")
        create(args.file, args.size, fixed=args.fixed, most=most)
        size = args.size
    else:
        if args.fixed:
            raise UsageError("--fixed: what has a parent cannot be fixed: leave out one of them")
        size = create_child(
            args.file,
            args.parent,
            is_raw=args.parent_format == "raw",
            size=args.size,
            most=most,
            directories=directories_from(args.option),
            check=not_of_orphans(env),
        )
    path = os.path.abspath(args.file)
    if args.json:
        parent = os.path.abspath(args.parent) if args.parent is not None else None
        env.say(json.dumps({"path": path, "size": size, "format": "vhd", "parent": parent}))
    else:
        env.say(f"{path} {format_size(size)}")
    return ExitStatus.OK
