"""Which states of a disk a power cut could have left (pure); docs/crashtest.md describes the model.

A flush that succeeded has stored every write that was answered before it was asked for. Of every
other write that had begun, each unit (a sector) may be on storage or not. Where several writes meet
in a unit, any of them may be the last on storage, unless one that is stored began after the other
was over.

Between two flushes the states only become more, so there is one :class:`Epoch` for each flush: the
instant before the next one was over.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from math import gcd
from typing import Union

from ..named import NamedTuple

ZEROS = -1
"""A source: not data, but zeros."""
EVERYTHING = 1 << 62
"""As many states as nobody counts."""

_EXHAUSTIVE = 12  # units of the pending writes; up to 2 ** 12 states are all tried
_TORN = 0.15  # the part of the writes of a random state that is there in part


class Change(NamedTuple):
    """A write or a discard.

    Attributes:
        number: of the request.
        start: when the storage was asked, in nanoseconds.
        end: when it had done it.
        offset, length: bytes of the disk, in whole units.
        source: where the data is; :data:`ZEROS`.
        is_certain: False: it failed. Any part of it may be there, flush or not.
    """

    number: int
    start: int
    end: int
    offset: int
    length: int
    source: int
    is_certain: bool = True


class Flush(NamedTuple):
    """A flush that succeeded."""

    start: int
    end: int


Event = Union[Change, Flush]


class Extent(NamedTuple):
    """Bytes of the disk, and where their content is."""

    offset: int
    length: int
    source: int


class Pending(NamedTuple):
    """A change of which any part may be on storage or not.

    Attributes:
        change: the request.
        extents: what of it counts: of the rest something newer is on storage.
    """

    change: Change
    extents: tuple[Extent, ...]

    def units(self, unit: int) -> int:
        """How many units it has."""
        return sum(extent.length for extent in self.extents) // unit


class Epoch(NamedTuple):
    """A flush, and what followed up to the instant before the next one was over.

    Attributes:
        number: how many flushes had succeeded.
        time: when this one was over, in nanoseconds; 0 before the first.
        until: when the next one was over; what was answered before that relies on this one. None
            after the last.
        stored: what is on storage now and was not before this flush, in order.
        pending: what may be, the oldest first.
    """

    number: int
    time: int
    until: int | None
    stored: tuple[Extent, ...]
    pending: tuple[Pending, ...]


Choice = tuple[int, ...]
"""For each pending change a mask of its units that are on storage; the lowest bit is the first."""


class _Live:
    """A change of which something counts."""

    __slots__ = ("change", "is_stored", "ranges")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.ranges = [(change.offset, change.offset + change.length)]
        self.is_stored = False  # in the base; another that met it may have won all the same

    def without(self, start: int, stop: int) -> None:
        """Forget what lies there: something newer is on storage."""
        left = []
        for low, high in self.ranges:
            left += [(low, min(high, start)), (max(low, stop), high)]
        self.ranges = [(low, high) for low, high in left if low < high]

    def pending(self) -> Pending:
        change = self.change
        return Pending(
            change,
            tuple(
                Extent(low, high - low, _moved(change.source, low - change.offset))
                for low, high in self.ranges
            ),
        )


def late_changes(events: Iterable[Event]) -> list[Change]:
    """Return the changes that had begun before a flush was over, and ended after it."""
    found = []
    last = -1
    for event in events:
        if isinstance(event, Flush):
            last = max(last, event.end)
        elif event.start < last:
            found.append(event)
    return found


def epochs(events: Iterable[Event], late: Sequence[Change] = ()) -> Iterator[Epoch]:
    """Cut what was done to a disk into epochs.

    Args:
        events: in the order in which the storage had done them.
        late: of the same events, from :func:`late_changes`.
    """
    live: list[_Live] = []
    waiting = sorted(late, key=lambda change: change.start)
    number = time = 0
    stored: tuple[Extent, ...] = ()
    for event in events:
        if isinstance(event, Change):
            if waiting and event in waiting:
                waiting.remove(event)
            live.append(_Live(event))
            continue
        begun = [change for change in waiting if change.start < event.end]
        yield _epoch(number, time, event.end, stored, live, begun)
        number, time = number + 1, event.end
        stored = _settle(live, event, waiting)
        live = [each for each in live if each.ranges]
    yield _epoch(number, time, None, stored, live, waiting)


def _epoch(
    number: int,
    time: int,
    until: int | None,
    stored: tuple[Extent, ...],
    live: Sequence[_Live],
    begun: Sequence[Change],
) -> Epoch:
    pending = [each.pending() for each in (*live, *map(_Live, begun))]
    return Epoch(number, time, until, stored, tuple(pending))


def _settle(live: Sequence[_Live], flush: Flush, waiting: Sequence[Change]) -> tuple[Extent, ...]:
    """Have a flush store what it covers; return that, and leave what may still win."""
    covered = [
        each
        for each in live
        if each.change.is_certain and not each.is_stored and each.change.end <= flush.start
    ]
    stored = tuple(extent for each in covered for extent in each.pending().extents)
    for each in covered:
        each.is_stored = True
    rivals: set[int] = set()
    for one, other in _meetings([*live, *map(_Live, waiting)]):
        before = one.change.end <= other.change.start
        if before == (other.change.end <= one.change.start):  # at the same time
            rivals |= {id(one), id(other)}
            continue
        older, newer = (one, other) if before else (other, one)
        if newer.is_stored:
            older.without(newer.change.offset, newer.change.offset + newer.change.length)
    for each in live:
        if each.is_stored and id(each) not in rivals:
            each.ranges = []
    return stored


def _meetings(live: list[_Live]) -> Iterator[tuple[_Live, _Live]]:
    """All pairs that have bytes in common."""
    live.sort(key=lambda each: each.change.offset)
    active: list[_Live] = []
    for each in live:
        offset = each.change.offset
        active = [one for one in active if one.change.offset + one.change.length > offset]
        for one in active:
            yield one, each
        active.append(each)


def states_of(epoch: Epoch, unit: int) -> int:
    """Return how many states an epoch has, at most, if no two writes are alike."""
    units = sum(each.units(unit) for each in epoch.pending)
    return 1 << units if units <= _EXHAUSTIVE else EVERYTHING


def choice(epoch: Epoch, unit: int, seed: int, turn: int) -> Choice:
    """Return a state of an epoch: the same for the same numbers, whatever was asked before.

    Turn 0 has nothing of what is pending, turn 1 has all. Where there are few, all come after
    these, each once more at most; else by turns a state that is nearly one of the two, or the
    first so many writes, and a random one.

    Args:
        epoch: of these.
        unit: bytes of a sector.
        seed: for what is random.
        turn: which; below :func:`states_of`.
    """
    sizes = [each.units(unit) for each in epoch.pending]
    whole = tuple((1 << size) - 1 for size in sizes)
    if turn == 0:
        return (0,) * len(whole)
    if turn == 1:
        return whole
    dice = random.Random(f"{seed} {epoch.number}")
    if sum(sizes) <= _EXHAUSTIVE:
        rest = (1 << sum(sizes)) - 2
        step = dice.randrange(rest)
        while gcd(step, rest) > 1:  # so that each comes once
            step = dice.randrange(rest)
        number = (dice.randrange(rest) + turn * step) % rest + 1
        at = list(accumulate(sizes, initial=0))
        return tuple(number >> shift & mask for shift, mask in zip(at, whole))
    if turn % 2 == 0 and turn // 2 - 1 < 4 * len(whole):
        picked = dice.sample(range(4 * len(whole)), 4 * len(whole))[turn // 2 - 1]
        return _simple(whole, sizes, *divmod(picked, 4), dice=dice)
    dice = random.Random(f"{seed} {epoch.number} {turn}")
    share = dice.choice((0.1, 0.5, 0.5, 0.9))
    return tuple(
        0 if dice.random() >= share else _torn(size, dice) if dice.random() < _TORN else mask
        for size, mask in zip(sizes, whole)
    )


def _simple(
    whole: Choice, sizes: Sequence[int], which: int, kind: int, *, dice: random.Random
) -> Choice:
    """One write alone, all but one, all up to one, or all up to one that is torn."""
    if kind == 0:
        return tuple(mask if at == which else 0 for at, mask in enumerate(whole))
    if kind == 1:
        return tuple(0 if at == which else mask for at, mask in enumerate(whole))
    last = whole[which] if kind == 2 else _torn(sizes[which], dice)
    return (*whole[:which], last, *(0 for _ in whole[which + 1 :]))


def _torn(size: int, dice: random.Random) -> int:
    """A part of a write: its beginning, its end, or any of its units."""
    cut = dice.randrange(size + 1)
    kind = dice.randrange(3)
    if kind == 0:
        return (1 << cut) - 1
    if kind == 1:
        return (1 << size) - (1 << cut)
    return dice.getrandbits(size) if size else 0


def extents_of(epoch: Epoch, chosen: Choice, unit: int) -> Iterator[Extent]:
    """What a state has over what is stored, in the order in which it is to be written."""
    for pending, mask in zip(epoch.pending, chosen):
        at = 0
        for extent in pending.extents:
            count = extent.length // unit
            for first, last in _ones(mask >> at & ((1 << count) - 1)):
                yield Extent(
                    extent.offset + first * unit,
                    (last - first) * unit,
                    _moved(extent.source, first * unit),
                )
            at += count


def _ones(mask: int) -> Iterator[tuple[int, int]]:
    """The extents of ones in a mask: from, to."""
    at = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        mask >>= zeros
        ones = (~mask & mask + 1).bit_length() - 1
        yield at + zeros, at + zeros + ones
        mask >>= ones
        at += zeros + ones


def _moved(source: int, by: int) -> int:
    return source if source == ZEROS else source + by


def spread(capacities: Sequence[int], limit: int) -> list[int]:
    """Share out a number of states: each epoch has as many turns as the others, if it has them.

    Args:
        capacities: how many each epoch has.
        limit: how many there are to be.

    Returns:
        For each epoch the number of turns. With more epochs than states these are far apart.
    """
    count = len(capacities)
    if limit < count:
        turns = [0] * count
        for at in range(limit):
            turns[at * count // limit] = 1
        return turns
    turns, left = [0] * count, limit
    open_ = list(range(count))
    while left and open_:
        share = max(1, left // len(open_))
        if left < len(open_):  # the rest, far apart
            for at in range(left):
                turns[open_[at * len(open_) // left]] += 1
            break
        for at in open_:
            more = min(share, capacities[at] - turns[at])
            turns[at] += more
            left -= more
        open_ = [at for at in open_ if turns[at] < capacities[at]]
    return turns
