"""``check``: say what is wrong with an image."""

from __future__ import annotations

import argparse
import json
import os

from ..backends.vhd.backend import directories_from
from ..backends.vhd.check import check
from ..exit_status import ExitStatus
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Check, and print a line for each thing that is wrong."""
    found = check(args.file, directories=directories_from(args.option))
    errors = [each.text for each in found if each.is_error]
    warnings = [each.text for each in found if not each.is_error]
    if args.json:
        path = os.path.abspath(args.file)
        env.say(json.dumps({"path": path, "errors": errors, "warnings": warnings}))
    else:
        for text in errors:
            env.say(f"error: {text}")
        for text in warnings:
            env.say(f"warning: {text}")
        if not errors:
            env.say(f"{args.file} has no errors")
    return ExitStatus.ERROR if errors else ExitStatus.OK
