"""``commit``: put an overlay's changes into its image."""

from __future__ import annotations

import argparse
import json

from ..backends.overlay import maintenance
from ..exit_status import ExitStatus
from ..units import format_size
from .environment import Environment
from .progress import ProgressLine


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Commit, and say what was changed."""
    with ProgressLine(env, "copying the image", quiet=args.quiet) as progress:
        image, count = maintenance.commit(args.overlay, keep=args.keep, progress=progress)
    if args.json:
        env.say(json.dumps({"image": image, "held": count, "kept": args.keep}))
    else:
        env.say(f"{image} {format_size(count)}")
    return ExitStatus.OK
