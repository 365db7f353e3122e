"""``trace``: show what a guest asked of its disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import UsageError
from ..exit_status import ExitStatus
from ..trace.export import blkparse, iolog
from ..trace.format import OPERATIONS, STOPPED, Record, as_json
from ..trace.reader import TraceReader
from ..trace.summary import Summary
from ..units import format_size
from .environment import Environment

_COLUMNS = ("number", "operation", "start_ns", "latency_ns", "offset", "length", "status", "queue")
_BATCH = 1000  # lines that are printed at once


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Print it; status 1 if the trace is damaged, after all that can be read."""
    if args.fio_path is not None and not args.fio:
        raise UsageError("--fio-path is for --fio: give that, too, or leave it out")
    name = args.fio_path or "/dev/xvda"
    if any(letter.isspace() for letter in name) or not name.startswith("/"):
        raise UsageError(f"--fio-path {name!r}: fio takes an absolute path without white space")
    if args.json and (args.csv or args.fio or args.blkparse):
        raise UsageError("--json goes with --summary, or alone: say how to print it, one of them")
    with TraceReader(args.trace) as reader:
        records = reader.records()
        if args.summary:
            summary = Summary(reader.header)
            for record in records:
                summary.add(record)
            facts = {**summary.facts(), "notes": reader.notes}
            env.say(json.dumps(facts) if args.json else "\n".join(_summary(facts)))
        else:
            _print(env, _lines(args, name, records))
        ending = reader.ending
        assert ending is not None
        env.tell_all(reader.notes)
    return ExitStatus.ERROR if ending.is_damaged else ExitStatus.OK


def _print(env: Environment, lines: Iterable[str]) -> None:
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == _BATCH:
            env.say("\n".join(batch))
            batch.clear()
    if batch:
        env.say("\n".join(batch))


def _lines(args: argparse.Namespace, name: str, records: Iterable[Record]) -> Iterator[str]:
    if args.fio:
        return iolog(records, name)
    if args.blkparse:
        return blkparse(records)
    if args.json:
        return (json.dumps(as_json(record)) for record in records)
    if args.csv:
        return _csv(records)
    return _text(records)


def _csv(records: Iterable[Record]) -> Iterator[str]:
    yield ",".join(_COLUMNS)
    for record in records:
        facts = as_json(record)
        yield ",".join(str(facts.get(column, "")) for column in _COLUMNS)


def _text(records: Iterable[Record]) -> Iterator[str]:
    yield (
        f"{'number':>8} {'seconds':>12} {'latency':>10}  {'operation':<14} {'offset':>14} "
        f"{'length':>9}"
    )
    for record in records:
        seconds = f"{record.start / 1e9:12.6f}"
        if record.is_request:
            line = (
                f"{record.number:8} {seconds} {duration(record.latency):>10}  {record.name:<14} "
                f"{record.offset:>14} {record.length:>9}"
            )
            yield line + (f"  error {record.status}" if record.status else "")
        else:
            detail = (
                "" if record.operation == STOPPED else f" {record.offset or record.length or ''}"
            )
            yield f"{'':8} {seconds} {'':>10}  {record.name}{detail}"


def duration(nanoseconds: float) -> str:
    """Write a time for people: ``1.5 ms``."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds:.0f} ns"


def _summary(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{facts['seconds']:.3f} s, {facts['depth']:.2f} requests under way on average" + (
        f", {facts['gaps']} gaps" if facts["gaps"] else ""
    )
    yield ""
    yield (
        f"{'':14}{'requests':>10}{'':>12}{'errors':>8}{'in order':>10}{'p50':>10}{'p90':>10}"
        f"{'p99':>10}{'p99.9':>10}{'max':>10}"
    )
    for name in OPERATIONS:
        kind = facts["operations"].get(name)
        if kind is None:
            continue
        times = kind["latency_ns"]
        yield (
            f"{name:14}{kind['requests']:>10}{format_size(kind['bytes']):>12}{kind['errors']:>8}"
            f"{kind['sequential'] * 100:>8.0f} %"
            + "".join(
                f"{duration(times[key]):>10}" for key in ("p50", "p90", "p99", "p99.9", "max")
            )
        )
    for name in ("read", "write"):
        kind = facts["operations"].get(name)
        if kind is None:
            continue
        yield ""
        yield f"sizes of {name}s"
        for each in kind["sizes"]:
            part = each["requests"] / kind["requests"]
            label = f"< {format_size(each['below'])}"
            bar = "█" * round(part * 40)
            yield f"  {label:>12}{each['requests']:>10} {part * 100:>5.1f} % {bar}".rstrip()
    used = facts["working_set"]
    yield ""
    yield (
        f"working set    {format_size(used['bytes'])} (read {format_size(used['read'])}, written "
        f"{format_size(used['written'])}), in blocks of {format_size(used['block'])}"
    )
    reuse = facts["reuse"]
    yield (
        f"used again     {reuse['again'] * 100:.0f} %; as much else meanwhile: "
        + ", ".join(f"p{part} {format_size(reuse[f'p{part}'])}" for part in (50, 90, 99))
    )
    flushes = facts["flushes"]
    if "flush" in facts["operations"]:
        apart, before = flushes["apart_ns"], flushes["written_before"]
        yield "flushes        apart: " + ", ".join(
            f"{key} {duration(value)}" for key, value in apart.items()
        )
        yield "               written before one: " + ", ".join(
            f"{key} {format_size(value)}" for key, value in before.items()
        )
    if "write" in facts["operations"]:
        yield "amplification  " + ", ".join(
            f"{format_size(each['block'])}: {each['times']}"
            for each in facts["write_amplification"]
        )
    if facts["top"]:
        yield ""
        yield f"{'most used':>14}{'reads':>12}{'writes':>10}"
        for each in facts["top"]:
            yield (
                f"{format_size(each['offset']):>14}{each['reads']:>12}{each['writes']:>10}"
                f"{format_size(each['bytes']):>12}"
            )
