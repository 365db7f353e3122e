"""``replay``: the requests of a trace once more, against any disk."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

from ..backends.replay import Replay
from ..errors import ImageError, UsageError
from ..exit_status import ExitStatus
from ..recovery import orphans
from ..recovery.spec import DiskSpec
from ..text import printable
from ..trace.format import DISCARD, DISCARD_SECURELY, OPERATIONS, READ, WRITE, Record
from ..trace.histogram import Histogram
from ..trace.reader import TraceReader
from ..units import format_size
from .backend_arguments import spec_from
from .environment import Environment
from .progress import ProgressLine
from .signals import interruptible
from .trace import duration

_PARTS = (50, 99)


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Replay, and print the verdict; status 1 if the disk did not do as well."""
    with TraceReader(args.trace) as reader:
        header = reader.header
        if args.compare and not header.data:
            raise UsageError(
                f"--compare: {printable(args.trace)} does not have what was written: record with "
                "data=yes"
            )
        spec = spec_from(args)
        is_new = spec.overlay is not None and not os.path.lexists(spec.overlay)
        keeps_out = spec.backend_name in ("cow", "discard") or is_new
        if args.overwrite and (keeps_out or spec.read_only) and not is_new:
            raise UsageError(
                f"--overwrite: with --{'read-only' if spec.read_only else 'backend cow'} no write "
                "reaches the image: leave out one of them"
                if spec.read_only or spec.backend is not None
                else "--overwrite: writes stay in memory unless a backend keeps them: give "
                "--backend raw, or leave it out"
            )
        if not (keeps_out or spec.read_only or args.overwrite) and _writes(reader):
            raise UsageError(
                f"the writes in {printable(args.trace)} would change "
                f"{printable(spec.overlay or spec.path or spec.backend_name)}: to allow that: "
                f"--overwrite; to keep them out: {_keeping_out(spec)}"
            )
        if spec.path is not None and _is_missing(spec.path):
            raise ImageError(
                f"{printable(spec.path)}: no such file: check the name, or make one of the "
                f"recorded disk's size with: truncate -s {header.size} {printable(spec.path)}"
            )
        quiet = args.quiet or args.json
        with (
            ProgressLine(env, "replaying", quiet=quiet) as progress,
            interruptible(),
            closing(spec.open_backend()) as disk,
        ):
            orphans.check(
                env.record_directory,
                disk.host_storage,
                force=spec.force,
                open_store=env.open_store,
            )
            if disk.size < header.size:
                raise UsageError(
                    f"{printable(spec.overlay or spec.path or spec.backend_name)}: has {disk.size} "
                    f"bytes, the recorded disk {header.size}: give one of that size"
                )
            replay = Replay(disk, speed=args.speed, compare=args.compare)
            size = os.path.getsize(args.trace)
            replay.run(_allowed(reader, progress, size, disk.size, read_only=disk.read_only))
        ending = reader.ending
        assert ending is not None
        notes = [*disk.notes, *reader.notes]
        env.tell_all(notes)
    facts = {**_facts(replay), "notes": notes}
    if args.json:
        env.say(json.dumps(facts))
    else:
        env.say("\n".join(_lines(facts)) + (", as far as it is" if ending.is_damaged else ""))
    return ExitStatus.OK if facts["passed"] and not ending.is_damaged else ExitStatus.ERROR


def _keeping_out(spec: DiskSpec) -> str:
    """Say how writes would be kept out of a disk."""
    if spec.overlay is not None:
        return "--overlay with a new name"
    if spec.backend_name in ("raw", "mmap"):
        return "--backend cow"
    if spec.backend_name == "vhd":
        return "--overlay NEW.vhd"
    return "replay to a copy of it"


def _is_missing(path: str) -> bool:
    """Whether that is a file, rather than a URL, and is not there."""
    return ":" not in path and not os.path.lexists(path)


def _writes(reader: TraceReader) -> bool:
    """Whether a trace changes anything."""
    changes = (WRITE, DISCARD, DISCARD_SECURELY)
    return any(each.operation in changes for each in reader.records())


def _allowed(
    reader: TraceReader, progress: ProgressLine, length: int, size: int, *, read_only: bool
) -> Iterator[Record]:
    """The requests that the disk may get."""
    for block in reader.blocks(data=reader.header.data):
        progress(min(block.at, length), length)
        for record in block.records:
            is_read = record.operation == READ or not record.length
            if record.offset + record.length <= size and (is_read or not read_only):
                yield record


def _facts(replay: Replay) -> dict[str, Any]:
    return {
        "passed": not (replay.failed or replay.different),
        "requests": replay.requests,
        "skipped": replay.skipped,
        "failed": replay.failed,
        "succeeded": replay.succeeded,
        "seconds": round(replay.seconds, 6),
        "behind_ns": replay.behind,
        "compared": replay.compared,
        "different": replay.different,
        "first_different": replay.first_different,
        "latency": [
            {
                "operation": name,
                "requests": replay.now[operation].count,
                "recorded_ns": _times(replay.recorded[operation]),
                "now_ns": _times(replay.now[operation]),
            }
            for operation, name in enumerate(OPERATIONS)
            if replay.now[operation].count
        ],
    }


def _times(histogram: Histogram) -> dict[str, int]:
    return {
        "mean": round(histogram.mean),
        **{f"p{part}": histogram.percentile(part) for part in _PARTS},
        "max": histogram.most,
    }


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{facts['requests']} requests in {facts['seconds']:.3f} s" + (
        f", {facts['skipped']} skipped" if facts["skipped"] else ""
    )
    yield f"{'':16}{'requests':>10}{'':>12}{'mean':>10}{'p50':>10}{'p99':>10}{'max':>10}"
    for each in facts["latency"]:
        for name, key in (("recorded", "recorded_ns"), ("now", "now_ns")):
            first = key == "recorded_ns"
            yield (
                f"{each['operation'] if first else '':16}"
                f"{each['requests'] if first else '':>10}{name:>12}"
                + "".join(f"{duration(value):>10}" for value in each[key].values())
            )
    if facts["behind_ns"]:
        yield f"at most {duration(facts['behind_ns'])} behind the recorded times"
    if facts["compared"]:
        yield (
            f"{format_size(facts['compared'])} of what was read is known from the trace, "
            + (
                f"{facts['different']} bytes are different, first in request "
                f"{facts['first_different']}"
                if facts["different"]
                else "all as it was written"
            )
        )
    if facts["succeeded"]:
        yield f"{facts['succeeded']} requests succeeded that had failed"
    if facts["failed"]:
        yield f"{facts['failed']} requests failed that had succeeded"
    yield "passed" if facts["passed"] else "FAILED"
