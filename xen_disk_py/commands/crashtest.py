"""``crashtest``: try what a power cut could have left of a recorded disk."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from ..backends.at import check_stays, open_base
from ..crashtest.search import (
    REDUCE,
    Failure,
    Progress,
    Result,
    Setting,
    check_space,
    search,
    temporary,
    try_one,
)
from ..crashtest.states import Plan, State, name_of, ranges
from ..crashtest.trial import Outcome
from ..errors import ImageError, UsageError
from ..exit_status import ExitStatus
from ..text import printable
from ..trace.moment import Moment
from ..trace.powercut import Choice
from ..trace.reader import TraceReader
from .environment import Environment
from .orphaned import not_of_orphans
from .progress import ProgressLine
from .signals import interruptible

LIMIT = 1000
"""States that are tried, unless it is said how many."""


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Try, and say which state failed; the status is 1 then."""
    if "{}" not in args.check:
        raise UsageError("--check: has no {}, where the image's name belongs: 'e2fsck -fn {}'")
    _check_choice(args)
    jobs = args.jobs or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        reader = stack.enter_context(TraceReader(args.trace))
        base = stack.enter_context(open_base(reader, args.base))
        not_of_orphans(env)(base.path, False)
        since = Moment.parse(args.since or "flush:0")
        plan = Plan(reader, args.seed or 0, args.limit or LIMIT, since)
        check_stays(reader)
        env.tell_all(plan.notes)
        if args.state is not None:
            plan.find(args.state)
        try:
            directory, kept = stack.enter_context(temporary(args.directory))
            setting = Setting(reader, base, args.check, args.timeout, directory)
            before = os.fstat(base.fd).st_mtime_ns
            check_space(setting, plan.written, 1 if args.state is not None else jobs)
            if args.state is not None:
                return _one(args, env, setting, plan, kept)
            with ProgressLine(env, "trying states", quiet=args.quiet) as progress:

                def found(name: str) -> Progress:
                    """Say it at once: with a slow check, the least takes its time."""
                    progress.close()
                    if not args.quiet:
                        env.tell(f"state {name} fails; looking for the least of it that does")
                    return stack.enter_context(
                        ProgressLine(env, "checks, at most", quiet=args.quiet)
                    )

                most = REDUCE if args.reduce is None else args.reduce
                result = search(setting, plan, jobs, progress, found, most)
        except OSError as error:
            where = args.directory or "temporary directory"
            raise ImageError(f"{where}: {error.strerror or error}") from error
        if before != os.fstat(base.fd).st_mtime_ns and not base.is_block_device:
            raise ImageError(
                f"{printable(base.path)}: was written meanwhile, so nothing is certain: have the "
                "command use {} alone, and no disk the image"
            )
        if result.failure is not None and args.keep:
            kept.append(result.failure.kept)
    return _tell(args, env, plan, result, reader.header.sector_size)


def _check_choice(args: argparse.Namespace) -> None:
    """See that nothing is given that would have no effect.

    Raises:
        UsageError: so it is.
    """
    if args.state is None:
        return
    others = {
        "--limit": args.limit,
        "--from": args.since,
        "--jobs": args.jobs,
        "--reduce": args.reduce,
        "--seed": args.seed if ":" in args.state else None,
    }
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"--state is one state, {name} is for many: leave out one of them")


def _one(
    args: argparse.Namespace, env: Environment, setting: Setting, plan: Plan, kept: list[str]
) -> ExitStatus:
    state, outcome, path = try_one(setting, plan, args.state, keep=args.keep)
    if args.keep:
        kept.append(path)
    unit = setting.unit
    if args.json:
        facts = {
            **_facts(state, outcome, state.chosen, unit),
            "kept": path if args.keep else None,
            "notes": plan.notes,
        }
        env.say(json.dumps(facts))
    else:
        env.say(f"state {state.name}: {outcome.text}")
        env.say("\n".join(_lines(state, outcome, state.chosen, unit)))
        if args.keep:
            env.say(f"  kept: {path}")
    return ExitStatus.ERROR if outcome.has_failed else ExitStatus.OK


def _tell(
    args: argparse.Namespace, env: Environment, plan: Plan, result: Result, unit: int
) -> ExitStatus:
    failure = result.failure
    if args.json:
        facts: dict[str, Any] = {
            "tried": result.tried,
            "same": result.same,
            "flushes": plan.flushes,
            "failure": None,
            "notes": plan.notes,
        }
        if failure is not None:
            facts["failure"] = {
                **_facts(failure.state, failure.outcome, failure.least, unit),
                "least": failure.name,
                "steady": failure.is_steady,
                "kept": failure.kept if args.keep else None,
            }
        env.say(json.dumps(facts))
    else:
        env.say(
            f"{result.tried} states tried, {result.same} more had the same bytes; "
            f"{plan.flushes} flushes"
        )
        if failure is not None:
            env.say("\n".join(_of_failure(args, failure, unit)))
    return ExitStatus.OK if failure is None else ExitStatus.ERROR


def _of_failure(args: argparse.Namespace, failure: Failure, unit: int) -> Iterator[str]:
    state = failure.state
    yield f"state {state.name} fails: {failure.outcome.text}"
    if failure.is_steady is False:
        yield "  the same state did not fail a second time: the check is not deterministic"
    yield from _lines(state, failure.outcome, failure.least, unit)
    seed = f" --seed {args.seed}" if args.seed else ""
    yield f"  again: --state {state.name}{seed}, or the least that fails: --state {failure.name}"
    if args.keep:
        yield f"  kept: {failure.kept}"


def _lines(state: State, outcome: Outcome, chosen: Choice, unit: int) -> Iterator[str]:
    epoch = state.epoch
    count = sum(mask != 0 for mask in chosen)
    yield (
        f"  after flush {epoch.number} ({epoch.time / 1e9:.3f} s), with {count} of the "
        f"{len(epoch.pending)} writes that were not flushed:"
    )
    for each in _writes(state, chosen, unit):
        part = f", only sectors {each['sectors']} of it" if each["sectors"] is not None else ""
        yield (
            f"    request {each['request']} at {each['seconds']:.6f} s: {each['length']} bytes at "
            f"{each['offset']}{part}"
        )
    if outcome.has_failed and outcome.output.strip():
        yield "  it said:"
        yield from (f"    {line}" for line in outcome.output.strip().splitlines()[-12:])


def _writes(state: State, chosen: Choice, unit: int) -> Iterator[dict[str, Any]]:
    for pending, mask in zip(state.epoch.pending, chosen):
        if mask:
            is_whole = mask == (1 << pending.units(unit)) - 1
            parts = ",".join(f"{first}-{last}" for first, last in ranges(mask))
            yield {
                "request": pending.change.number,
                "seconds": pending.change.start / 1e9,
                "offset": pending.extents[0].offset,
                "length": sum(extent.length for extent in pending.extents),
                "sectors": None if is_whole else parts,
            }


def _facts(state: State, outcome: Outcome, chosen: Choice, unit: int) -> dict[str, Any]:
    return {
        "state": state.name,
        "flush": state.epoch.number,
        "seconds": state.epoch.time / 1e9,
        "pending": len(state.epoch.pending),
        "status": outcome.status,
        "output": outcome.output,
        "has": name_of(state.epoch, chosen, unit),
        "writes": list(_writes(state, chosen, unit)),
    }
