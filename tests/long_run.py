"""How much of what can be repeated is: with XEN_DISK_LONG=1 all of it, ordinarily a part.

The ordinary run of all tests takes less than a minute of one processor; each value of each
dimension, each kind of thing that can happen, is still in it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from typing import Any

LONG = bool(os.environ.get("XEN_DISK_LONG"))


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


def on_this_python(values: Sequence[Any], share: int, start: int = 0) -> list[Any]:
    """Return one in ``share`` of the values; so many Pythons, one after the other, have them all.

    For tests that start processes, and do the same on every Python. A long run has all on each.

    Args:
        values: of a dimension, as many as ``share`` or more.
        share: at most as many as there are Pythons to test on.
        start: another one for another test: then one Python does not have the same of each.
    """
    first = 0 if LONG else (sys.version_info.minor + start) % share
    return list(values[first :: 1 if LONG else share])


def stride(step: int) -> tuple[int, int]:
    """Return where to begin and how far to go; by chance, others each time."""
    return (1, 1) if LONG else (random.randint(1, step), step)
