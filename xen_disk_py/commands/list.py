"""``list``: show the disks that this host's processes serve."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..exit_status import ExitStatus
from ..recovery import record
from ..text import printable
from ..units import format_size
from ..xenbus import toolstack
from ..xenbus.toolstack import Attached
from .environment import Environment


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print a line, or a JSON object, for each disk."""
    with env.open_store() as store:
        domid = toolstack.find_domain(store, args.vm).domid if args.vm is not None else None
        rows = [_row(disk, env.record_directory) for disk in toolstack.attached(store, domid)]
    if args.json:
        env.say(json.dumps(rows, indent=2))
    else:
        for line in _table(rows):
            env.say(line)
    return ExitStatus.OK


def _row(disk: Attached, directory: str) -> dict[str, Any]:
    found = record.find(directory, disk.address)
    backend, _, path = disk.params.partition(":")  # if there is no better record
    facts = found.facts if found is not None else None
    if facts is not None and facts.backend is not None:
        backend, path = facts.backend, facts.path or ""
    alive = found is not None and (found.alive or found.is_becoming)
    return {
        "domid": disk.address.frontend_domid,
        "vdev": disk.device.name,
        "number": disk.address.devid,
        "backend": backend,
        "path": path or None,
        "mode": "ro" if disk.read_only else "rw",
        "state": disk.backend_state.name.lower() if disk.backend_state is not None else None,
        "frontend_state": (
            disk.frontend_state.name.lower() if disk.frontend_state is not None else None
        ),
        "pid": disk.pid,
        "queue_pids": facts.queue_pids if facts is not None else [],
        "alive": alive,
        "adoptable": found is not None and not alive and found.is_orphan,
        "held": found.counters["held"] if found is not None else 0,
        "counters": found.counters if found is not None else {},
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [("DOMAIN", "VDEV", "BACKEND", "MODE", "STATE", "PID", "READ", "WRITTEN", "PATH")]
    for row in rows:
        counters = row["counters"]
        lines.append(
            (
                str(row["domid"]),
                row["vdev"],
                row["backend"],
                row["mode"],
                _state(row),
                str(row["pid"]),
                format_size(counters.get("bytes_read", 0)),
                format_size(counters.get("bytes_written", 0)),
                printable(row["path"] or "-"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _state(row: dict[str, Any]) -> str:
    """Say in a word how a disk is."""
    if not row["alive"]:
        return "orphan" if row["adoptable"] else "dead"
    return "holding" if row["held"] else row["state"] or "gone"
