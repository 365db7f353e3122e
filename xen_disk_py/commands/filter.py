"""``filter``: show or change the filters of a disk while the guest uses it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import DeviceError, UsageError
from ..exit_status import ExitStatus
from ..recovery import control
from ..text import printable
from ..xenbus import toolstack
from ..xenbus.vdev import parse
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Ask the process that serves the disk; print the filters that it has then."""
    verb, more = _request(args)
    vdev = parse(args.vdev)
    with env.open_store() as store:
        domain = toolstack.find_domain(store, args.vm)
        disk = toolstack.find_attached(store, domain.domid, vdev)
    answer = control.ask(env.record_directory, disk.address, verb, **more)
    try:
        lines = _lines(answer["filters"])
    except (KeyError, TypeError, AttributeError):  # it may be somebody else's now
        raise DeviceError(f"process {disk.pid} answers what makes no sense") from None
    if args.json:
        lines = [json.dumps(answer["filters"])]
    for line in lines:
        env.say(line)
    return ExitStatus.OK


def _request(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    action = args.action
    if action == "set":
        if args.filter is None or not args.settings or "=" in args.filter:
            raise UsageError("write it as: xen-disk filter VM VDEV set FILTER key=value …")
        return "filter.set", {"filter": args.filter, "settings": args.settings}
    if args.settings or (action == "list" and args.filter is not None):
        raise UsageError(f"{action} takes no {(args.settings or [args.filter])[0]}")
    if action == "list":
        return "filter.list", {}
    return "filter.act", {"filter": args.filter, "action": action}


def _lines(filters: list[dict[str, Any]]) -> list[str]:
    if not filters:
        return ["the disk has no filters"]
    lines = []
    for each in filters:
        settings = " ".join(f"{key}={value}" for key, value in each["settings"].items() if value)
        counters = ", ".join(f"{value} {key}" for key, value in each["counters"].items())
        line = f"{each['place']} {each['name']} {settings}".rstrip()
        lines.append(printable(f"{line} ({counters})" if counters else line))
    return lines
