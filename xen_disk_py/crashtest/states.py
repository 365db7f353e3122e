"""The states of a trace, and their names: ``17.3`` is the third after flush 17 (0: the first).

``17:104,107/0-3`` names one by what it has: after flush 17, of what was not flushed, request 104
and the sectors 0 to 3 of request 107.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from ..errors import ImageError, UsageError
from ..named import NamedTuple
from ..text import printable
from ..trace.format import FLUSH, GAP, RESIZED
from ..trace.moment import Moment, Reach, change_of, check_usable, sources, unchecked
from ..trace.powercut import (
    Change,
    Choice,
    Epoch,
    Event,
    Flush,
    choice,
    epochs,
    late_changes,
    spread,
    states_of,
)
from ..trace.reader import TraceReader

_TURN = re.compile(r"(\d{1,9})\.(\d{1,9})", re.ASCII)
_PART = re.compile(r"(\d{1,18})(?:/(\d{1,9})-(\d{1,9}))?", re.ASCII)


_FEW = 16  # turns, among which each kind of state is


class State(NamedTuple):
    """A state of an epoch.

    Attributes:
        name: see the module.
        epoch: after which flush.
        chosen: what it has of what was not flushed.
    """

    name: str
    epoch: Epoch
    chosen: Choice


class Plan:
    """Which states of a trace are tried.

    Args:
        reader: of the trace.
        seed: for what is random.
        limit: how many at most.
        first: only what a power cut after that could have left: a flush or a time.

    Attributes:
        count: how many.
        flushes: how many there are in the trace.
        written: bytes that are written up to the end, about.
        notes: lines for a person.

    Raises:
        ImageError: the disk cannot be made again of the trace.
        UsageError: ``first`` is something else, or a flush that there is not.
    """

    def __init__(self, reader: TraceReader, seed: int, limit: int, first: Moment) -> None:
        check_usable(reader)
        if first.kind not in ("flush", "after", "at"):
            raise UsageError("--from: give flush:N or a time")
        self._reader = reader
        self._name = printable(reader.path)
        self._seed = seed
        self._unit = reader.header.sector_size
        self._stop: int | None = None  # the request before which the trace is left
        self.notes = unchecked(reader)
        self._late: list[Change] = late_changes(self._events())
        since = first.nanoseconds(reader.header)
        if first != ("flush", 0):
            reach = Reach.of(reader, (GAP, RESIZED))
            if not reach.has(first, reader.header):  # nothing tried is nothing found
                raise UsageError(f"--from: {reach.lacking(first, reader)}")
        capacities = []
        self.written = 0
        for epoch in epochs(self._events(), self._late):
            self.written += sum(extent.length for extent in epoch.stored)
            if since is None:
                is_wanted = epoch.number >= first.value
            else:
                is_wanted = epoch.until is None or epoch.until > since
            capacities.append(states_of(epoch, self._unit) if is_wanted else 0)
            last = epoch
        self.flushes = last.number
        self.written += sum(pending.change.length for pending in last.pending)
        wanted = [at for at, capacity in enumerate(capacities) if capacity]
        counts = spread([capacities[at] for at in wanted], limit)
        self._turns: dict[int, Sequence[int]] = {}
        for at, count in zip(wanted, counts):
            if count:
                self._turns[at] = _some(len(self._turns), count, capacities[at])
        self.count = sum(counts)
        if self._stop is None:
            self.notes += reader.notes

    def epochs(self) -> Iterator[Epoch]:
        """All epochs, in order."""
        return epochs(self._events(), self._late)

    def states(self, epoch: Epoch) -> Iterator[State]:
        """Those of an epoch that are tried."""
        for turn in self._turns.get(epoch.number, ()):
            yield self._state(epoch, turn)

    def _state(self, epoch: Epoch, turn: int) -> State:
        return State(f"{epoch.number}.{turn}", epoch, choice(epoch, self._unit, self._seed, turn))

    def find(self, name: str) -> tuple[int, str]:
        """Return the flush in a name, and the rest.

        Raises:
            UsageError: it is no name of a state of this trace.
        """
        match = re.fullmatch(r"(\d{1,9})[.:].*", name, re.ASCII)
        if match is None:
            raise UsageError(f"--state {name}: write it as FLUSH.NUMBER or FLUSH:REQUEST,REQUEST")
        if int(match[1]) > self.flushes:
            raise UsageError(f"--state {name}: the trace has {self.flushes} flushes")
        return int(match[1]), name

    def named(self, name: str, epoch: Epoch) -> State:
        """Return the state of a name, of its epoch.

        Raises:
            UsageError: there is none.
        """
        match = _TURN.fullmatch(name)
        if match is not None:
            turn = int(match[2])
            if turn >= states_of(epoch, self._unit):
                raise UsageError(
                    f"--state {name}: there are {states_of(epoch, self._unit)} states after that "
                    "flush"
                )
            return self._state(epoch, turn)
        at = {pending.change.number: at for at, pending in enumerate(epoch.pending)}
        masks = [0] * len(epoch.pending)
        for part in filter(None, name.partition(":")[2].split(",")):
            match = _PART.fullmatch(part)
            if match is None or int(match[1]) not in at:
                raise UsageError(f"--state {name}: {part} is no request that was not flushed then")
            which = at[int(match[1])]
            size = epoch.pending[which].units(self._unit)
            whole = (1 << size) - 1
            if match[2] is not None:
                start, stop = int(match[2]), int(match[3]) + 1
                whole &= (1 << min(stop, size)) - (1 << min(start, stop, size))
            masks[which] |= whole
        return State(name, epoch, tuple(masks))

    def _events(self) -> Iterator[Event]:
        for record, source in sources(self._reader):
            if record.operation in (GAP, RESIZED):
                if self._stop is None:
                    self._stop = record.number
                    what = "was resized" if record.operation == RESIZED else "was not recorded"
                    self.notes.append(
                        f"{self._name}: the disk {what} before request {record.number}: "
                        "only what came before is tried"
                    )
                return
            if record.operation == FLUSH and not record.status:
                yield Flush(record.start, record.end)
            change = change_of(record, source)
            if change is not None:
                if change.offset % self._unit or change.length % self._unit:
                    raise ImageError(
                        f"{self._name}: request {record.number} is not in whole sectors"
                    )
                yield change


def _some(place: int, count: int, capacity: int) -> Sequence[int]:
    """Return which turns of an epoch are tried: of each kind some, if not all can be.

    Args:
        place: how many epochs have turns before it.
        count: how many.
        capacity: how many there are.
    """
    if count >= min(_FEW, capacity):
        return range(count)
    # what is flushed and nothing else, or, if there is but one for each epoch, in every second
    first = [] if count == 1 and place % 2 else [0]
    others = random.Random(place).sample(range(1, min(_FEW, capacity)), count - len(first))
    return [*first, *sorted(others)]


def name_of(epoch: Epoch, chosen: Choice, unit: int) -> str:
    """Name a state by what it has."""
    parts = []
    for pending, mask in zip(epoch.pending, chosen):
        size, number = pending.units(unit), pending.change.number
        if mask == (1 << size) - 1:
            parts.append(str(number))
        else:
            parts += [f"{number}/{first}-{last}" for first, last in ranges(mask)]
    return f"{epoch.number}:{','.join(parts)}"


def ranges(mask: int) -> Sequence[tuple[int, int]]:
    """The extents of ones in a mask: first, last."""
    found: list[tuple[int, int]] = []
    for at in range(mask.bit_length()):
        if mask >> at & 1:
            if found and found[-1][1] == at - 1:
                found[-1] = (found[-1][0], at)
            else:
                found.append((at, at))
    return found
