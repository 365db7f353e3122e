"""How much of what can be repeated is: with XEN_DISK_LONG=1 all of it, ordinarily a part.

Each value of each dimension, each kind of thing that can happen, is in the ordinary run, too. Where
several Pythons run the tests, they share them out: all of them together run every test, each of
those that are shared on one Python, which is another from case to case; all others on each.
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


def sharing() -> tuple[int, int]:
    """Return which of the Pythons that share the tests this is, and how many they are.

    The environment names them, as in XEN_DISK_SHARE="3.9 3.11 3.13"; else this runs every test.
    """
    version = ".".join(map(str, sys.version_info[:2]))
    pythons = os.environ.get("XEN_DISK_SHARE", "").split()
    return (pythons.index(version), len(pythons)) if version in pythons and not LONG else (0, 1)


def is_shared(test: pytest.Function) -> bool:
    """Tell whether a test runs on one of the Pythons that share the tests, and not on each.

    So do those in the directories and files SHARED, and those that are marked ``shared``: they
    depend on kernels, protocols, formats and other programs more than on Python. Not those that are
    marked ``each_python``: what they need only one Python may have, and no other would miss them.
    """
    if test.get_closest_marker("each_python") is not None:
        return False
    return test.nodeid.partition("::")[0].split("/")[1] in SHARED or (
        test.get_closest_marker("shared") is not None
    )


def of_this_python(tests: Sequence[pytest.Function]) -> list[bool]:
    """Tell which tests run on this Python, where several Pythons share them out.

    Of each function that is shared, the first case runs on a Python that its name picks, the second
    on the next one, and so on: each function of as many cases as there are Pythons runs on each.

    Args:
        tests: all of them, in order.
    """
    ours, pythons = sharing()
    cases: Counter[str] = Counter()
    chosen = []
    for test in tests:
        path, _, _ = test.nodeid.partition("::")
        function = f"{path}::{test.originalname}"
        turn = cases[function] + zlib.crc32(function.encode())
        cases[function] += 1
        chosen.append(not is_shared(test) or turn % pythons == ours)
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
