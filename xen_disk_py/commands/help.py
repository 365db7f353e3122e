"""``help``: what the program can do, or one of its commands."""

from __future__ import annotations

import argparse

from ..exit_status import ExitStatus
from .arguments import build_parser, commands_of
from .environment import Environment
from .parsing import find_command


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print the help on stdout, as ``--help`` does."""
    parser = build_parser()
    if args.about is not None:
        parser = find_command(parser, commands_of(parser), args.about)
    env.say(parser.format_help().rstrip("\n"))
    return ExitStatus.OK
