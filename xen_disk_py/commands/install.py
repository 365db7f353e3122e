"""``install``: the hotplug script and the units where libxl and systemd look for them."""

from __future__ import annotations

import argparse

from ..exit_status import ExitStatus
from ..host.install import install, ours, remove
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Put the files there, or take them away; say what was done and what comes next."""
    files = ours(args.prefix)
    for line in (remove if args.remove else install)(files, force=args.force):
        env.say(line)
    if not args.remove:
        env.tell("next: systemctl daemon-reload && systemctl enable --now xen-disk-serve")
    return ExitStatus.OK
