"""``install``: what libxl, systemd, shells and ``man`` look for, where they look for it."""

from __future__ import annotations

import argparse

from ..exit_status import ExitStatus
from ..host.install import install, ours, remove
from .arguments import build_parser
from .environment import Environment
from .manual import manual


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Put the files there, or take them away; say what was done and what comes next."""
    files = ours(args.prefix, manual(build_parser()))
    for line in (remove if args.remove else install)(files, force=args.force):
        env.say(line)
    if not args.remove:
        env.tell("next: systemctl daemon-reload && systemctl enable --now xen-disk-serve")
    return ExitStatus.OK
