"""``export``: make a new image of an overlay and its image."""

from __future__ import annotations

import argparse
import json
import os

from ..backends.overlay import maintenance
from ..exit_status import ExitStatus
from ..units import format_size
from .environment import Environment
from .progress import ProgressLine
from .signals import interruptible


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Export, and say what was made."""
    with ProgressLine(env, "copying the image", quiet=args.quiet) as progress, interruptible():
        size = maintenance.export(
            args.overlay, args.new, force=args.force, progress=progress, path=args.path
        )
    path = os.path.abspath(args.new)
    if args.json:
        env.say(json.dumps({"path": path, "size": size}))
    else:
        env.say(f"{path} {format_size(size)}")
    return ExitStatus.OK
