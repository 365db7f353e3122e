"""``commit``: put an overlay's changes into its image, or a VHD's into its parent."""

from __future__ import annotations

import argparse
import json

from ..backends.overlay import maintenance
from ..backends.vhd.backend import directories_from
from ..backends.vhd.commit import commit as commit_vhd
from ..errors import UsageError
from ..exit_status import ExitStatus
from ..text import printable
from ..units import format_size
from .backend_arguments import is_vhd
from .environment import Environment
from .orphaned import not_of_orphans
from .progress import ProgressLine
from .signals import interruptible


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Commit, and say what was changed."""
    if is_vhd(args.overlay):
        if args.path is not None:
            raise UsageError("--path is not for a VHD, which finds its parent itself: leave it out")
        with ProgressLine(env, "writing the changes", quiet=args.quiet) as progress:
            directories = directories_from(args.option)
            with interruptible():
                image, count = commit_vhd(
                    args.overlay,
                    keep=args.keep,
                    directories=directories,
                    progress=progress,
                    check=not_of_orphans(env),
                )
    elif args.option:
        raise UsageError("--option is for a VHD: leave it out")
    else:
        with ProgressLine(env, "copying the image", quiet=args.quiet) as progress, interruptible():
            image, count = maintenance.commit(
                args.overlay,
                keep=args.keep,
                progress=progress,
                path=args.path,
                check=not_of_orphans(env),
            )
    if args.json:
        env.say(json.dumps({"image": image, "held": count, "kept": args.keep}))
    else:
        env.say(f"{printable(image)} {format_size(count)}")
    return ExitStatus.OK
