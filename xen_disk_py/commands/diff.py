"""``diff``: say what an overlay holds, or a VHD."""

from __future__ import annotations

import argparse
import json
import os

from ..backends.overlay import maintenance
from ..backends.overlay.file import OverlayFile
from ..backends.vhd.export import allocated
from ..exit_status import ExitStatus
from ..units import format_size
from .backend_arguments import is_vhd
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print its extents; a disk may be using it, which is said then."""
    if is_vhd(args.overlay):
        return _run_vhd(args, env)
    with OverlayFile.open(args.overlay, writable=False, alone=None) as file:
        header = file.header
        extents = maintenance.allocated_extents(file)
        count = sum(length for _, length in extents)
        if args.json:
            facts = {
                "overlay": file.path,
                "image": header.path,
                "size": header.size,
                "held": count,
                "in_use": file.in_use,
                "ranges": [{"offset": offset, "length": length} for offset, length in extents],
            }
            env.say(json.dumps(facts))
            return ExitStatus.OK
        if file.in_use:
            env.tell(f"{args.overlay}: a disk is using it: this may be out of date")
        env.tell(f"{header.shown_path}: {format_size(count)} of {format_size(header.size)} changed")
        if extents:
            env.say("\n".join(f"{offset} {length}" for offset, length in extents))
    return ExitStatus.OK


def _run_vhd(args: argparse.Namespace, env: Environment) -> ExitStatus:
    size, extents = allocated(args.overlay)
    count = sum(length for _, length in extents)
    if args.json:
        facts = {
            "overlay": os.path.abspath(args.overlay),
            "size": size,
            "held": count,
            "in_use": False,
            "ranges": [{"offset": offset, "length": length} for offset, length in extents],
        }
        env.say(json.dumps(facts))
        return ExitStatus.OK
    env.tell(f"{args.overlay}: has {format_size(count)} of {format_size(size)} itself")
    if extents:
        env.say("\n".join(f"{offset} {length}" for offset, length in extents))
    return ExitStatus.OK
