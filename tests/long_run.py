"""How much of what can be repeated is: with XEN_DISK_LONG=1 all of it, ordinarily a part.

The ordinary run of all tests takes less than a minute of one processor; each value of each
dimension, each kind of thing that can happen, is still in it.
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

LONG = bool(os.environ.get("XEN_DISK_LONG"))
SHARED = {
    *("backends", "commands", "crashtest", "host", "hostile", "libxl"),
    *("recovery", "reliability", "simulated", "trace", "xenbus"),
    *("test_benchmarks.py", "test_blkif.py", "test_docs.py", "test_json_page.py"),
    *("test_lab_bootstrap.py", "test_lab_peer.py", "test_lab_progress.py"),
    *("test_layers.py", "test_nbdkit_plugin.py", "test_words.py"),
}
_RUNS_ALL = 11  # Python 3.11
_SHARE = 4


def repeat(count: int, in_a_long_run: int) -> range:
    """Return the rounds of a loop."""
    return range(in_a_long_run if LONG else count)


def one_in(share: int, *indices: int) -> bool:
    """Tell whether a combination is tested: every one in a long run, else one in ``share``.

    Args:
        share: a prime number; then each value of a dimension is met with as many of the others as
            can be.
        indices: where the combination lies in each dimension.
    """
    return LONG or sum(n * index for n, index in enumerate(indices, 1)) % share == 0


def runs_all() -> bool:
    """Tell whether this Python runs every test: alone, or as 3.11 where several do."""
    is_one = LONG or sys.version_info.minor == _RUNS_ALL
    return is_one or not os.environ.get("XEN_DISK_SHARE")


def of_this_python(tests: Sequence[pytest.Function]) -> list[bool]:
    """Tell which tests run on this Python, where several Pythons share them out.

    Python 3.11 runs all. Of each function that is shared every other Python runs one case in four,
    so that each case runs on two Pythons. Shared are the tests in the directories and files SHARED
    and those that are marked ``shared``: they depend on kernels, protocols, formats and other
    programs more than on Python, and each Python still runs a part of every file. Of a property,
    every other Python tries the first 25 examples of the 100 that 3.11 does. Without
    XEN_DISK_SHARE=1, which says that several Pythons run the tests, this one runs everything.

    Args:
        tests: all of them, in order.
    """
    if runs_all():
        return [True] * len(tests)
    minor = sys.version_info.minor
    number = minor - (minor > _RUNS_ALL)
    cases: Counter[str] = Counter()
    chosen = []
    for test in tests:
        path, _, _ = test.nodeid.partition("::")
        function = f"{path}::{test.originalname}"
        case = cases[function] + zlib.crc32(function.encode())
        cases[function] += 1
        is_shared = path.split("/")[1] in SHARED or test.get_closest_marker("shared") is not None
        chosen.append(not is_shared or (case - number) % _SHARE == 0)
    return chosen


def stride(step: int) -> tuple[int, int]:
    """Return where to begin and how far to go; by chance, others each time."""
    return (1, 1) if LONG else (random.randint(1, step), step)


def note_time(seconds: float) -> str:
    """Return what to say of a run's processor time; note it in the file XEN_DISK_TIMES, if any.

    Args:
        seconds: of this process and of all those that ended and were waited for.
    """
    version = ".".join(map(str, sys.version_info[:2]))
    if name := os.environ.get("XEN_DISK_TIMES"):
        with open(name, "a", encoding="utf-8") as file:
            file.write(f"Python {version}: {seconds:.0f} s\n")
    return f"processor time on Python {version}: {seconds:.0f} s"


def why(report: pytest.TestReport) -> str:
    """Return where a test failed, the lines that led there and what was said: ten lines at most.

    Of a report in full the end may be nothing but local variables.
    """
    text = report.longreprtext.splitlines()
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:  # no exception of a test's
        return "\n".join(text[-10:])
    steps = [line for line in text if line.startswith(">")][-3:]
    return "\n".join([f"{crash.path}:{crash.lineno}:", *steps, *crash.message.splitlines()[:6]])
