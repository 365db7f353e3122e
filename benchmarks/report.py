"""``python -m benchmarks.report FILE...``: from measurements to ``docs/benchmarks*.md``.

Each file is what one of the benchmarks wrote with ``--json``. Their tables, and the goals next to
what was measured, go between the marks in these pages (``<!-- local -->`` to ``<!-- /local -->``
and so on), and pictures beside them. What was not measured stays as it is, each goal by itself.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from pathlib import Path
from typing import Callable

from . import calls, queues
from . import loop as in_one_thread
from .local import BEFORE, EVENTS, LATE, LIMIT
from .loop import FIRST
from .results import BYTES, CPU, CPU_GIB, RATE, Results, Spread, number, spread

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = "benchmarks*.md"
GIB = 1 << 30


@dataclass(frozen=True)
class View:
    """One metric of a table, next to one contender of it.

    Attributes:
        title: with the unit of ``metric`` times ``scale``.
        metric: what is shown.
        scale: to the unit shown.
        base: the contender that the others are compared with.
    """

    title: str
    metric: str
    scale: float
    base: str


def _next_to(base: str) -> tuple[View, ...]:
    return (
        View(f"Requests per second, next to {base}", RATE, 1, base),
        View(f"Processor time for a request, µs, next to {base}", CPU, 1e6, base),
    )


LOCAL = {
    "requests": (
        View("Requests per second, next to the bare call", RATE, 1, LIMIT),
        View("The backend's processor time for a request, µs", CPU, 1e6, LIMIT),
    ),
    "all over": (
        View(
            "The backend's processor time for a request, µs, next to the bare call", CPU, 1e6, LIMIT
        ),
    ),
    in_one_thread.TABLE: (
        View("Processor time for a request, µs, next to the bare call", CPU, 1e6, LIMIT),
    ),
    in_one_thread.TIMING: (
        View("The same queue's processor time for a request, µs", CPU, 1e6, in_one_thread.UNTIMED),
    ),
    "one at a time": (View("Requests per second, next to bare events", RATE, 1, EVENTS),),
    "changes": (View("The backend's processor time for a request, µs", CPU, 1e6, "raw"),),
    "scattered": (View("GB/s, next to the bare call", BYTES, 1e-9, LIMIT),),
    "memory": (
        View("Requests per second, next to nbdkit's Python plugin", RATE, 1, "nbdkit Python"),
    ),
    queues.SERVED: (
        View("Requests per second, all queues together", RATE, 1, queues.ONE),
        View("The backend's processor time for a request, µs", CPU, 1e6, queues.ONE),
    ),
    queues.TABLE: (View("Requests per second, all processes together", RATE, 1, "1"),),
    "vhd": _next_to("raw"),
    "filters": _next_to("raw"),
    "record": _next_to("raw"),
    "replay": _next_to("raw"),
    "nbd": _next_to("fio"),
    "nbd, 10 ms": (View("Requests per second", RATE, 1, "one"),),
    "rbd": _next_to("rbd bench"),
    "many": (View("Requests per second, all disks together", RATE, 1, "1 disk"),),
    "sleeping": (View("Requests per second", RATE, 1, "depth 1"),),
    "slow": (View("Seconds until an answer is there", "seconds", 1, ""),),
    "idle": (
        View("Wake-ups per second", "wakeups_per_second", 1, ""),
        View("Resident memory, MB", "resident_bytes", 1e-6, ""),
    ),
    "fleet": (
        View("Seconds until the last guest has its disk", "seconds", 1, "process each"),
        View("Seconds of processor time until then", "cpu_seconds", 1, "process each"),
        View("MB of memory of each that no other has", "private_bytes", 1e-6, "process each"),
    ),
    "start": (View("Seconds", "seconds", 1, ""),),
}
PICTURED = ("changes", "memory")
"""Of these there are pictures, and of the lab's."""
LAB = (
    View("Requests per second, next to blkback", RATE, 1, "blkback"),
    View("Requests per second, next to qdisk", RATE, 1, "qdisk"),
    View("dom0's processor time, seconds per GiB, next to blkback", CPU_GIB, 1, "blkback"),
)

CALLS = View("µs", calls.SECONDS, 1e6, "")

Measured = tuple[str, Spread]
Look = Callable[[Results, str], Iterator[Measured]]


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    Attributes:
        text: in words.
        wanted: the number.
        at_least: or at most.
        look: finds what was measured, with a label; of another build by what its contenders'
            names end with.
    """

    text: str
    wanted: float
    at_least: bool
    look: Look

    def met(self, value: float) -> bool:
        """Tell whether that is good enough."""
        return value >= self.wanted if self.at_least else value <= self.wanted


def _lab_tables(results: Results) -> list[str]:
    return [table for table in results.tables if table.startswith("xen-")]


def _lab(base: str, pattern: str, metric: str = RATE, host: str = "") -> Look:
    """Look for ``raw`` next to another backend, in the lab's tables whose name ends so."""

    def look(results: Results, build: str = "") -> Iterator[Measured]:
        for table in _lab_tables(results):
            if not table.endswith(host):
                continue
            for workload in results.tables[table]:
                ratio = results.ratio(table, workload, metric, f"raw{build}", base)
                if ratio and re.match(pattern, workload):
                    yield f"{table[4:]}, {workload}", ratio

    return look


def _local(table: str, pattern: str, metric: str, contender: str, base: str) -> Look:
    def look(results: Results, build: str = "") -> Iterator[Measured]:
        for workload in results.tables.get(table, {}):
            ratio = results.ratio(table, workload, metric, contender + build, base)
            if ratio and re.match(pattern, workload):
                yield workload, ratio

    return look


def _each(table: str, workload: str, metric: str, contenders: Sequence[str], base: str) -> Look:
    """Look for some contenders of one workload, whose name begins so."""

    def look(results: Results, build: str = "") -> Iterator[Measured]:
        for name in results.tables.get(table, {}):
            for contender in contenders:
                ratio = results.ratio(table, name, metric, contender + build, base)
                if ratio and name.startswith(workload):
                    yield contender, ratio

    return look


def _values(table: str, ending: str, contender: str, metric: str, scale: float) -> Look:
    """Look for one contender of the workloads whose name ends so."""

    def look(results: Results, build: str = "") -> Iterator[Measured]:
        for workload in results.tables.get(table, {}):
            values = results.values(table, workload, contender + build, metric)
            if values and workload.endswith(ending):
                yield workload, spread([value * scale for value in values])

    return look


def _value(table: str, workload: str, contender: str, metric: str, scale: float = 1) -> Look:
    def look(results: Results, build: str = "") -> Iterator[Measured]:
        values = results.values(table, workload, contender + build, metric)
        if values:
            yield workload, spread([value * scale for value in values])

    return look


GOALS = (
    Goal(
        "4 KiB, 32 in flight, anywhere on the disk: processor time in bare calls of the same",
        3.0,
        False,
        _local("all over", "4 KiB", CPU, "raw", LIMIT),
    ),
    Goal(
        "the same within 1 MiB, which the bare call has in its processor's own cache",
        3.0,
        False,
        _local("requests", "4 KiB.*depth 32", CPU, "raw", LIMIT),
    ),
    Goal(
        "the same in the queue's own thread, in bare calls of the same places and pages",
        2.0,
        False,
        _local("loop", "4 KiB read, 32", CPU, "raw", LIMIT),
    ),
    Goal(
        "cow, 4 KiB read: processor time of raw's",
        1.2,
        False,
        _each("loop", "4 KiB read, 32", CPU, ("cow, not written", "cow, written"), "raw"),
    ),
    Goal(
        "cow, 4 KiB write",
        1.3,
        False,
        _each("loop", "4 KiB write, 32", CPU, ("cow, written",), "raw"),
    ),
    Goal(
        "overlay, 4 KiB read",
        1.3,
        False,
        _each("loop", "4 KiB read, 32", CPU, ("overlay, not held", "overlay, held"), "raw"),
    ),
    Goal(
        "overlay, 4 KiB write",
        1.8,
        False,
        _each("loop", "4 KiB write, 32", CPU, ("overlay, held",), "raw"),
    ),
    Goal(
        "cow, 4 KiB write of what was not written: of raw's where the image has a hole",
        1.3,
        False,
        _each("loop", "4 KiB write, 32", CPU, (f"cow{FIRST}",), f"raw{FIRST}"),
    ),
    Goal(
        "overlay, 4 KiB write of what is not allocated in its file: the same",
        1.8,
        False,
        _each("loop", "4 KiB write, 32", CPU, (f"overlay{FIRST}",), f"raw{FIRST}"),
    ),
    Goal(
        "4 KiB, 32 in flight: rate of nbdkit's Python plugin",
        8.0,
        True,
        _local("memory", "4 KiB.*depth 32", RATE, "raw", "nbdkit Python"),
    ),
    Goal(
        "the same, of nbdkit's memory plugin",
        3.0,
        True,
        _local("memory", "4 KiB.*depth 32", RATE, "raw", "nbdkit memory"),
    ),
    Goal(
        "the same, of nbdkit's Python plugin with a disk in Python on our side, too",
        5.0,
        True,
        _local("memory", "4 KiB.*depth 32", RATE, "Python disk", "nbdkit Python"),
    ),
    Goal(
        "4 KiB, one at a time: rate of events that another process answers",
        1 / 1.5,
        True,
        _local("one at a time", "4 KiB", RATE, "raw", EVENTS),
    ),
    Goal(
        "a disk of 1 ms, up to 16 at once: from done to answered, ms",
        1.2,
        False,
        _values("slow", ", 1 ms each", LATE, "seconds", 1e3),
    ),
    Goal(
        "1 MiB, 32 in flight: GB/s of the bare call that has the buffers of 32 requests, too",
        0.9,
        True,
        _local("scattered", "1 MiB.*depth 32", BYTES, "raw", LIMIT),
    ),
    Goal(
        "idle: wake-ups per second",
        0,
        False,
        _value("idle", "raw", "connect", "wakeups_per_second"),
    ),
    Goal(
        "idle: resident memory, MB",
        30,
        False,
        _value("idle", "raw", "connect", "resident_bytes", 1e-6),
    ),
    Goal(
        "cow disks of one image by `serve`: memory of each that no other has, MB",
        5.24,
        False,
        _value("fleet", "8 cow disks at once", "fork each", "private_bytes", 1e-6),
    ),
    Goal(
        "50 disks at once, until the last guest has its own: of the time of *before*",
        0.5,
        False,
        _local("fleet", "50", "seconds", "fork each", "process each, before"),
    ),
    Goal(
        "the same, processor time",
        1 / 3,
        False,
        _local("fleet", "50", "cpu_seconds", "fork each", "process each, before"),
    ),
    Goal(
        "100 idle disks: wake-ups per second of all together",
        0,
        False,
        _value("idle", "100 cow disks", "fork each", "wakeups_per_second"),
    ),
    Goal(
        "100 idle disks: processor time in 5 s, ms",
        0,
        False,
        _value("idle", "100 cow disks", "fork each", "cpu_seconds", 1e3),
    ),
    Goal("--help, seconds", 0.15, False, _value("start", "xen-disk --help", "wall", "seconds")),
    Goal(
        "connect until the guest has the disk, our own part, seconds",
        0.5,
        False,
        _value("start", "connect", "wall", "seconds"),
    ),
    Goal(
        "8 disks on 2 processors, of the rate of one",
        0.9,
        True,
        _local("many", "", RATE, "8 disks", "1 disk"),
    ),
    Goal(
        "a disk that sleeps 1 ms: depth 32, of the rate one at a time",
        8.0,
        True,
        _local("sleeping", "", RATE, "depth 32", "depth 1"),
    ),
    Goal(
        "4 queues, one thread for all, 4 KiB, 32 in flight on each: of one queue's rate",
        0.9,
        True,
        _local(queues.SERVED, "", RATE, "4 in one thread", queues.ONE),
    ),
    Goal(
        "4 queues, a process each, 2 processors, 4 KiB, 32 in flight on each: of one queue's rate",
        1.7,
        True,
        _local(queues.SERVED, "", RATE, "4 processes", queues.ONE),
    ),
    Goal(
        "Xen, PV, 2 processors for dom0: 1 MiB direct, of blkback's rate",
        1.1,
        True,
        _lab("blkback", "1 MiB", host="pv-1-dom0-2"),
    ),
    Goal(
        "Xen, PV, 2 processors for dom0: 4 KiB, 32 in flight, of blkback's rate",
        2.5,
        True,
        _lab("blkback", "4 KiB.*depth 32", host="pv-1-dom0-2"),
    ),
    Goal(
        "Xen, PV, 2 processors for dom0: 4 KiB, one at a time, of blkback's rate",
        1.0,
        True,
        _lab("blkback", "4 KiB.*depth 1$", host="pv-1-dom0-2"),
    ),
    Goal(
        "Xen, PV, 1 processor for dom0: 4 KiB, one at a time, of blkback's rate",
        0.8,
        True,
        _lab("blkback", "4 KiB.*depth 1$", host="pv-1-dom0-1"),
    ),
    Goal(
        "Xen, PV, 1 processor for dom0: 4 KiB, one at a time, of blkback's processor time",
        3.0,
        False,
        _lab("blkback", "4 KiB.*depth 1$", CPU_GIB, "pv-1-dom0-1"),
    ),
    Goal("Xen, any guest, 1 MiB direct: of qdisk's rate", 3.0, True, _lab("qdisk", "1 MiB")),
    Goal(
        "Xen, any guest, smaller requests: of qdisk's rate", 1.5, True, _lab("qdisk", "(4|64) KiB")
    ),
)


SHOWN = {"goals": 1, "goals in full": 4}
"""By mark, how many workloads of a goal are shown."""


def goals(runs: Sequence[Results], wanted: Sequence[Goal], shown: int, older: str = "") -> str:
    """Write the table of goals, with the worst of what was measured for each.

    Args:
        runs: what was measured.
        wanted: the goals.
        shown: workloads of a goal, if it has several.
        older: such a table, for those of which there is nothing new.
    """
    stood = {row.split(" | ")[0][2:]: row for row in older.splitlines()}
    lines = ["| goal | wanted | measured | | before |", "|---|---|---|---|---|"]
    for goal in wanted:
        found = [measured for run in runs for measured in goal.look(run, "")]
        if not found and goal.text in stood:
            lines.append(stood[goal.text])
            continue
        found.sort(key=lambda measured: measured[1].median, reverse=not goal.at_least)
        cells = "<br>".join(f"{label}: {ratio}" for label, ratio in found[:shown])
        if len(found) > shown > 1:
            cells += f"<br>and {len(found) - shown} better ones"
        verdict = "" if not found else "yes" if goal.met(found[0][1].median) else "no"
        before = {label: ratio for run in runs for label, ratio in goal.look(run, BEFORE)}
        then = [number(before[label].median) for label, _ in found[:shown] if label in before]
        row = (
            goal.text,
            f"{'≥' if goal.at_least else '≤'} {goal.wanted:.2g}",
            cells or "not measured",
            verdict,
            "<br>".join(then),
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def table(results: Results, name: str, view: View) -> str:
    """Write one table: a row for each workload, a column for each contender."""
    workloads = results.tables[name]
    columns = list(dict.fromkeys(contender for rows in workloads.values() for contender in rows))
    lines = [f"| {view.title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for workload in workloads:
        cells = []
        for contender in columns:
            values = results.values(name, workload, contender, view.metric)
            cell = number(spread(values).median * view.scale) if values else ""
            ratio = results.ratio(name, workload, view.metric, contender, view.base)
            if ratio and contender != view.base:
                cell += f"<br>× {ratio}"
            cells.append(cell)
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(results: Results, name: str, views: Sequence[View], directory: Path) -> str:
    """Write a table's views and its plot."""
    parts = []
    for view in views:
        parts.append(table(results, name, view))
        if view is views[0] and view.base and (name in PICTURED or name not in LOCAL):
            path = directory / f"benchmarks-{'-'.join(name.split())}.svg"
            path.write_text(plot(results, name, view))
            if name not in LOCAL:  # those stand where the page begins
                parts.append(f"![{view.title}]({path.name})")
    return "\n\n".join(parts)


def facts(results: Results) -> str:
    """Write what, where and how was measured."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in results.about.items() if value)
    return f"| | |\n|---|---|\n{rows}"


LABELS, WIDTH, ROW, TOP = 330, 860, 18, 40
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")


def plot(results: Results, name: str, view: View) -> str:
    """Draw the ratios to the base: a dot for the median, a line from the least to the greatest."""
    rows: list[tuple[str, str, Spread]] = []
    for workload, contenders in results.tables[name].items():
        for contender in contenders:
            ratio = results.ratio(name, workload, view.metric, contender, view.base)
            if ratio and contender != view.base:
                rows.append((workload, contender, ratio))
    names = list(dict.fromkeys(contender for _, contender, _ in rows))
    low = floor(min(0.0, *(log2(ratio.low) for *_, ratio in rows)))
    high = ceil(max(1.0, *(log2(ratio.high) for *_, ratio in rows)))

    def x(ratio: float) -> float:
        return LABELS + (WIDTH - LABELS - 20) * (log2(ratio) - low) / (high - low)

    height = TOP + ROW * len(rows) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{html.escape(view.title)} ({view.base} = 1)</text>',
    ]
    for power in range(low, high + 1):
        at, label = x(2.0**power), f"{2**power}" if power >= 0 else f"1/{2**-power}"
        colour = "#111" if power == 0 else "#ddd"
        out.append(f'<path d="M{at:.1f} {TOP - 8}V{height - 25}" stroke="{colour}"/>')
        out.append(f'<text x="{at:.1f}" y="{height - 10}" text-anchor="middle">{label}</text>')
    before = ""
    for index, (workload, contender, ratio) in enumerate(rows):
        y = TOP + ROW * index + ROW // 2
        colour = COLOURS[names.index(contender) % len(COLOURS)]
        if workload != before:
            out.append(f'<path d="M10 {y - ROW // 2}H{WIDTH - 10}" stroke="#eee"/>')
            out.append(f'<text x="10" y="{y + 4}">{html.escape(workload)}</text>')
            before = workload
        out.append(
            f'<text x="{LABELS - 10}" y="{y + 4}" text-anchor="end" fill="{colour}">'
            f"{html.escape(contender)}</text>"
        )
        ends = f"M{x(ratio.low):.1f} {y}H{x(ratio.high):.1f}"
        out.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<circle cx="{x(ratio.median):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return "\n".join([*out, "</svg>", ""])


def filled(text: str, mark: str, content: Callable[[str], str]) -> str:
    """Replace what stands between a mark and its end; what stands there is what is called with."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = text.partition(start)
    older, _, after = rest.partition(end)
    return f"{before}{start}{content(older)}\n{end}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write the pages' tables and pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON files")
    parser.add_argument(
        "--only",
        action="append",
        metavar="MARK",
        help=f"what to write: {', '.join(SHOWN)}, local, lab, calls (default: all)",
    )
    parser.add_argument(
        "--directory", type=Path, default=DOCS, help=f"where {PAGES} are (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    runs = [Results.load(file) for file in args.files]
    directory: Path = args.directory
    tables: dict[str, list[str]] = {"local": [], "lab": [], "calls": []}
    for run in runs:
        if args.only is not None and not {*tables} & {*args.only}:
            continue  # their plots stay as well
        own = [section(run, name, LOCAL[name], directory) for name in LOCAL if name in run.tables]
        others = [section(run, name, LAB, directory) for name in _lab_tables(run)]
        tables["local"] += [facts(run), *own] if own else []
        tables["lab"] += [facts(run), *others] if others else []
        if calls.TABLE in run.tables:
            tables["calls"] += [facts(run), table(run, calls.TABLE, CALLS)]
    pages = {path: path.read_text() for path in sorted(directory.glob(PAGES))}
    for mark in (*SHOWN, *tables):
        if args.only is not None and mark not in args.only:
            continue

        def content(older: str, mark: str = mark) -> str:
            if mark in SHOWN:
                return goals(runs, GOALS, SHOWN[mark], older)
            return "\n\n".join(tables[mark]) or older.rstrip("\n")

        marked = [path for path, text in pages.items() if f"<!-- {mark} -->\n" in text]
        if not marked:
            parser.error(f"no page in {directory} has a place for {mark}")
        for path in marked:
            pages[path] = filled(pages[path], mark, content)
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
