"""``rebase``: have an overlay lie over another image of the same content."""

from __future__ import annotations

import argparse
import json
import os

from ..backends.overlay import maintenance
from ..exit_status import ExitStatus
from .environment import Environment
from .orphaned import not_of_orphans
from .progress import ProgressLine
from .signals import interruptible


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Rebase, and say upon what."""
    with ProgressLine(env, "comparing", quiet=args.quiet) as progress, interruptible():
        maintenance.rebase(
            args.overlay,
            args.image,
            force=args.force,
            progress=progress,
            check=not_of_orphans(env),
        )
    overlay, image = os.path.abspath(args.overlay), os.path.abspath(args.image)
    if args.json:
        env.say(json.dumps({"overlay": overlay, "image": image}))
    else:
        env.say(f"{overlay} {image}")
    return ExitStatus.OK
