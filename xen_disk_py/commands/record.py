"""``record``: begin or end to record what a guest asks of its disk."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any, Callable

from ..errors import DeviceError, UsageError
from ..exit_status import ExitStatus
from ..recovery import control
from ..text import printable
from ..xenbus import toolstack
from ..xenbus.vdev import parse
from .environment import Environment


def _path(value: object) -> str | None:
    return None if value is None else str(value)


_FACTS: Mapping[str, Callable[[Any], Any]] = {
    "recording": bool,
    "path": _path,
    "data": bool,
    "requests": int,
    "lost": int,
    "ended": bool,
}


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Ask the process that serves the disk; say what it records then."""
    arguments = _arguments(args)
    vdev = parse(args.vdev)
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        disk = toolstack.find_attached(store, domain.domid, vdev)
    answer = control.ask(env.record_directory, disk.address, f"record.{args.action}", **arguments)
    try:
        facts = {name: kind(answer[name]) for name, kind in _FACTS.items()}
    except (KeyError, TypeError, ValueError):  # it may be somebody else's now
        raise DeviceError(f"process {disk.pid} answers what makes no sense") from None
    env.say(json.dumps(facts) if args.json else _line(facts))
    return ExitStatus.OK


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    if args.action == "start":
        if args.file is None:
            raise UsageError("write it as: xen-disk record VM VDEV start FILE")
        data = "yes" if args.data else "no"
        settings = [f"file={os.path.abspath(args.file)}", f"data={data}"]
        return {"settings": [*settings, *([f"ring={args.ring}"] if args.ring else []), "on=yes"]}
    if args.file is not None or args.data or args.ring is not None:
        raise UsageError(f"{args.action} takes no FILE, --data or --ring")
    return {}


def _line(facts: Mapping[str, Any]) -> str:
    path = facts["path"]
    if path is None:
        return "not recorded"
    counts = f"{facts['requests']} requests, {facts['lost']} lost"
    path = printable(path)
    if facts["ended"]:
        return f"the recording in {path} ended by itself ({counts}): the log says why"
    if not facts["recording"]:
        return f"no longer recorded in {path}: {counts}"
    return f"recorded in {path}{' with data' if facts['data'] else ''}: {counts}"
