"""The smallest part of some things that still fails (pure): delta debugging.

Zeller, Hildebrandt: Simplifying and Isolating Failure-Inducing Input, IEEE Transactions on Software
Engineering 28 (2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, TypeVar

T = TypeVar("T")


def minimize(items: Sequence[T], fails: Callable[[Sequence[T]], bool], most: int) -> list[T]:
    """Return a part that fails; without any single one of its items it does not.

    Args:
        items: all of them, which fail.
        fails: whether a part does; asked once for each.
        most: how often it may be asked; what was found by then is returned.
    """
    known: dict[tuple[int, ...], bool] = {}

    def ask(part: Sequence[int]) -> bool:
        key = tuple(part)
        if key not in known:
            known[key] = len(known) < most and fails([items[at] for at in part])
        return known[key]

    left = list(range(len(items)))
    if ask([]):
        return []
    pieces = 2
    while len(left) > 1:
        cuts = [len(left) * at // pieces for at in range(pieces + 1)]
        parts = [left[start:stop] for start, stop in zip(cuts, cuts[1:])]
        rests = [[at for at in left if at not in set(part)] for part in parts]
        smaller = next((part for part in parts if ask(part)), None)
        if smaller is not None:
            left, pieces = smaller, 2
            continue
        smaller = next((rest for rest in rests if ask(rest)), None)
        if smaller is not None:
            left, pieces = smaller, max(2, pieces - 1)
        elif pieces < len(left):
            pieces = min(len(left), 2 * pieces)
        else:
            break
    return [items[at] for at in left]
