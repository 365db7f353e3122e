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
    found = describe(
        args.source, args.format, args.option, backend=args.backend, filters=args.filter
    )
    env.tell_all(found["notes"])
    if args.json:
        env.say(json.dumps(found, indent=2))
    else:
        env.say("\n".join([*_lines(found), *_offer(found)]))
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


def _offer(found: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    guest = found["guest"]
    if guest is None:
        yield f"connect refuses it: {printable(found['refused'])}"
        return
    yield f"a guest would have, by the backend {guest['backend']}"
    yield f"  size        {format_size(guest['size'])} ({guest['size']} bytes)"
    sector, physical = guest["sector_size"], guest["physical_sector_size"]
    yield f"  sectors     {sector} bytes{f' (physical: {physical})' if physical != sector else ''}"
    yield f"  read-only   {_ANSWERS[guest['read_only']]}"
    yield f"  flush       {_ANSWERS[guest['flush']]}"
    granularity = format_size(guest["discard_granularity"])
    secure = ", also securely" if guest["secure_discard"] else ""
    yield f"  discard     {f'yes, of {granularity}' if guest['discard'] else 'no'}{secure}"
    many, queues = guest["requests"], guest["queues"]
    at_once = "many" if many is None else many
    yield f"  requests    {at_once} at a time, in up to {queues} queue{'s' * (queues != 1)}"
    yield f"  survives    {_ANSWERS[guest['survives']]}"
    for each in guest["filters"]:
        settings = ",".join(f"{key}={value}" for key, value in each["settings"].items())
        yield f"  filter {each['place']:<4} {printable(each['name'] + ' ' + settings)}"


_ANSWERS = {True: "yes", False: "no", None: "unknown"}
