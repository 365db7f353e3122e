"""What was measured, round by round, and what it comes to next to something else.

Measurements are kept raw. A comparison is made within each round, where both sides had the
same machine in the same mood; what is reported is the median of those ratios with the
smallest and the largest.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

RATE = "requests_per_second"
BYTES = "bytes_per_second"
CPU = "cpu_seconds_per_request"
CPU_GIB = "cpu_seconds_per_gib"
"""Metrics; others are named where they are measured."""

Tables = dict[str, dict[str, dict[str, dict[str, list[float]]]]]


class Spread(NamedTuple):
    """A median, and how far the rounds lie apart."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """Summarise the values of all rounds."""
    return Spread(statistics.median(values), min(values), max(values))


class Results:
    """Values by table, workload, contender and metric, one for each round.

    Args:
        about: what, where and how it was measured, as text by name.
        tables: what was measured already.
    """

    def __init__(self, about: dict[str, str], tables: Tables | None = None) -> None:
        self.about = about
        self.tables: Tables = tables if tables is not None else {}

    def add(self, table: str, workload: str, contender: str, **metrics: float) -> None:
        """Note one round; without metrics, that the contender is to stand in this place."""
        workloads = self.tables.setdefault(table, {})
        series = workloads.setdefault(workload, {}).setdefault(contender, {})
        for metric, value in metrics.items():
            series.setdefault(metric, []).append(value)

    def values(self, table: str, workload: str, contender: str, metric: str) -> list[float]:
        """Return what each round measured; empty if it was not measured."""
        series = self.tables.get(table, {}).get(workload, {})
        return series.get(contender, {}).get(metric, [])

    def ratio(
        self, table: str, workload: str, metric: str, contender: str, base: str
    ) -> Spread | None:
        """Compare two contenders round by round; None if one of them was not measured."""
        ours = self.values(table, workload, contender, metric)
        theirs = self.values(table, workload, base, metric)
        pairs = [a / b for a, b in zip(ours, theirs) if b]
        return spread(pairs) if pairs else None

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps({"about": self.about, "tables": self.tables}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what :meth:`save` wrote."""
        data = json.loads(Path(path).read_text())
        return cls(data["about"], data["tables"])


def about(command: str, **more: str) -> dict[str, str]:
    """Describe this machine and the program; ``more`` comes behind."""
    from xen_disk_py import __version__

    return {
        "command": command,
        "xen_disk_py": __version__,
        "commit": output("git", "describe", "--always", "--dirty"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": f"{len(os.sched_getaffinity(0))} x {_processor()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        **more,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def output(*command: str) -> str:
    """Return the first line that a program prints, or nothing if there is no such program."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
    except OSError:
        return ""
    return result.stdout.partition("\n")[0]


def number(value: float) -> str:
    """Write a number with three digits that mean something."""
    if not value:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def tell(text: str = "") -> None:
    """Say on stderr how far we are."""
    print(text, file=sys.stderr, flush=True)
