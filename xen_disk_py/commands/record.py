"""``record``: begin or end to record what a guest asks of its disk."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from ..errors import DeviceError, UsageError
from ..exit_status import ExitStatus
from ..recovery import control
from ..text import printable
from ..xenbus import toolstack
from ..xenbus.vdev import parse
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Ask the process that serves the disk; say what it records then."""
    settings = _settings(args)
    vdev = parse(args.vdev)
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        disk = toolstack.find_attached(store, domain.domid, vdev)
    try:
        found = _recorder(control.ask(env.record_directory, disk.address, "filter.list"))
        if found is None:
            raise DeviceError(
                f"{vdev} of {domain} cannot be recorded: connect it with --filter record:on=no"
            )
        if settings:
            answer = control.ask(
                env.record_directory,
                disk.address,
                "filter.set",
                filter=str(found["place"]),
                settings=settings,
            )
            found = _recorder(answer) or {}
        facts = _facts(found)
    except (KeyError, TypeError, AttributeError):  # it may be somebody else's now
        raise DeviceError(f"process {disk.pid} answers what makes no sense") from None
    env.say(json.dumps(facts) if args.json else _line(facts))
    return ExitStatus.OK


def _settings(args: argparse.Namespace) -> list[str]:
    if args.action == "start":
        if args.file is None:
            raise UsageError("write it as: xen-disk record VM VDEV start FILE")
        data = "yes" if args.data else "no"
        return [
            f"file={os.path.abspath(args.file)}",
            f"data={data}",
            f"ring={args.ring or 0}",
            "on=yes",
        ]
    if args.file is not None or args.data or args.ring is not None:
        raise UsageError(f"{args.action} takes no FILE, --data or --ring")
    return ["on=no"] if args.action == "stop" else []


def _recorder(answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The filter of that name that is next to the guest."""
    found = [each for each in answer["filters"] if each["name"] == "record"]
    return found[-1] if found else None


def _facts(found: Mapping[str, Any]) -> dict[str, Any]:
    settings, counters = found["settings"], found["counters"]
    return {
        "recording": bool(counters["recording"]),
        "path": settings.get("file") or None,
        "data": settings["data"] == "yes",
        "requests": counters["recorded"],
        "lost": counters["lost"],
        "ended": settings["on"] == "yes" and not counters["recording"],
    }


def _line(facts: Mapping[str, Any]) -> str:
    if not (facts["recording"] or facts["ended"]):
        return "not recorded"
    path = printable(facts["path"] or "")
    counts = f"{facts['requests']} requests, {facts['lost']} lost"
    if facts["ended"]:
        return f"the recording in {path} ended by itself ({counts}): the log says why"
    return f"recorded in {path}{' with data' if facts['data'] else ''}: {counts}"
