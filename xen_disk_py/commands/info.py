"""``info``: say what a disk is, and what lies below it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..backends.information import describe
from ..exit_status import ExitStatus
from ..text import printable
from ..units import format_size
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print it; nothing is locked or changed."""
    found = describe(args.source, args.format, args.option)
    if args.json:
        env.say(json.dumps(found, indent=2))
    else:
        env.say("\n".join(_lines(found)))
    return ExitStatus.OK


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield printable(found["path"])
    if "error" in found:
        yield f"  error       {printable(found['error'])}"
        return
    kind = f" ({found['kind']})" if "kind" in found else ""
    yield f"  format      {found['format']}{kind}"
    yield f"  size        {format_size(found['size'])} ({found['size']} bytes)"
    yield f"  sectors     {found['sector_size']} bytes"
    if found["allocated"] is not None:
        yield f"  allocated   {format_size(found['allocated'])}"
    if found["in_use"] is not None:
        yield f"  in use      {'yes' if found['in_use'] else 'no'}"
    if found.get("looks_like") is not None:
        yield f"  looks like  {found['looks_like']}"
    if found.get("committed"):
        yield "  fits        yes: a commit was not finished; to finish it: xen-disk commit"
    elif "fits" in found:
        answer = {None: "unknown: its image cannot be read", True: "yes", False: "no"}
        reasons = ", and ".join(found["differences"])
        yield f"  fits        {answer[found['fits']]}{': ' if reasons else ''}{reasons}"
    if found["parent"] is not None:
        yield f"  parent      {printable(found['parent']['path'])}"
        yield ""
        yield from _lines(found["parent"])
