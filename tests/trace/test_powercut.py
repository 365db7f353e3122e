"""What a power cut could have left, against a model that tries every instant and every unit."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.trace.powercut import (
    EVERYTHING,
    ZEROS,
    Change,
    Epoch,
    Extent,
    Flush,
    choice,
    epochs,
    extents_of,
    late_changes,
    spread,
    states_of,
)

UNITS = 3
START = ("start",) * UNITS


@st.composite
def events(draw, most=6):
    """A few writes, discards and flushes of a tiny disk, at any times."""
    count = draw(st.integers(0, most))
    times = draw(st.permutations(range(1, 2 * count + 1)))
    found = []
    for number in range(count):
        start, end = sorted(times[2 * number : 2 * number + 2])
        if draw(st.integers(0, 3)) == 0:
            found.append(Flush(start, end))
            continue
        first = draw(st.integers(0, UNITS - 1))
        length = draw(st.integers(1, UNITS - first))
        source = draw(st.sampled_from([10 * number, ZEROS]))
        found.append(Change(number, start, end, first, length, source, draw(st.booleans())))
    return sorted(found, key=lambda event: event.end)


def content(change, unit):
    return ZEROS if change.source == ZEROS else change.source + unit - change.offset


def brute_force(found):
    """Every state, of every instant: for each unit, what may be the last on storage."""
    changes = [each for each in found if isinstance(each, Change)]
    flushes = [each for each in found if isinstance(each, Flush)]
    states = set()
    for now in range(2 * len(found) + 2):
        allowed = []
        for unit in range(UNITS):
            here = [
                each
                for each in changes
                if each.start < now and each.offset <= unit < each.offset + each.length
            ]
            stored = [
                each
                for each in here
                if each.is_certain
                and any(each.end < flush.start for flush in flushes if flush.end < now)
            ]
            last = {
                content(each, unit)
                for each in here
                if not any(each.end < other.start for other in stored)
            }
            allowed.append(last | (set() if stored else {"start"}))
        states |= set(itertools.product(*allowed))
    return states


def put(state, extents):
    state = list(state)
    for offset, length, source in extents:
        for at in range(length):
            state[offset + at] = ZEROS if source == ZEROS else source + at
    return tuple(state)


def generated(found, turns):
    """The states of the first so many turns of each epoch; None: of all."""
    base, states = START, set()
    for epoch in epochs(found, late_changes(found)):
        base = put(base, epoch.stored)
        count = states_of(epoch, 1)
        for turn in range(count if turns is None else min(turns, count)):
            chosen = choice(epoch, 1, 5, turn)
            states.add(put(base, extents_of(epoch, chosen, 1)))
    return states


@given(events())
def test_every_state_is_possible(found):
    assert set() == generated(found, 12) - brute_force(found)


@given(events(most=4))
def test_every_possible_state_comes(found):
    assert brute_force(found) == generated(found, None)


def test_a_flush_stores_what_was_answered_before_it_was_asked_for():
    before, meanwhile = Change(0, 0, 1, 0, 1, 10), Change(1, 0, 3, 1, 1, 20)
    last = list(epochs([before, Flush(2, 4), meanwhile._replace(end=3)]))[-1]
    assert [1] == [each.change.number for each in last.pending]
    assert (Extent(0, 1, 10),) == last.stored


def test_a_write_that_ends_after_a_flush_may_be_there_before_it():
    late = Change(0, 1, 9, 0, 1, 10)
    found = [Flush(2, 4), late]
    first, last = epochs(found, late_changes(found))
    assert [late] == [each.change for each in first.pending]
    assert [late] == [each.change for each in last.pending]


def test_epochs_tell_their_times():
    found = [Flush(2, 4), Flush(6, 7)]
    assert [(0, 0, 4), (1, 4, 7), (2, 7, None)] == [each[:3] for each in epochs(found)]


def large(count, length=8):
    changes = [Change(n, n, n + 1, n * length, length, 100 * n) for n in range(count)]
    (epoch,) = epochs(changes)
    return epoch


def test_a_state_is_the_same_whatever_was_asked_before():
    epoch = large(20)
    assert EVERYTHING == states_of(epoch, 1)
    forward = [choice(epoch, 1, 7, turn) for turn in range(200)]
    assert forward[::-1] == [choice(epoch, 1, 7, turn) for turn in reversed(range(200))]
    assert forward != [choice(epoch, 1, 8, turn) for turn in range(200)]


def test_many_states_have_writes_that_are_missing_and_torn():
    epoch = large(20)
    states = [choice(epoch, 1, 7, turn) for turn in range(200)]
    assert (0,) * 20 == states[0]
    assert (255,) * 20 == states[1]
    assert {0, 255} < {mask for state in states for mask in state}
    lonely = {state.index(255) for state in states if sorted(state) == [0] * 19 + [255]}
    missing = {state.index(0) for state in states if sorted(state) == [0] + [255] * 19}
    assert set(range(20)) == lonely == missing
    assert len(set(states)) > 150


def test_a_state_with_a_part_of_a_write_has_the_data_of_that_part():
    epoch = Epoch(0, 0, None, (), large(1).pending)
    assert [Extent(1, 2, 1), Extent(7, 1, 7)] == list(extents_of(epoch, (0b10000110,), 1))


@pytest.mark.parametrize(
    ("capacities", "limit", "expected"),
    [
        ([1, 4, 9], 100, [1, 4, 9]),
        ([1, 4, 9], 8, [1, 4, 3]),
        ([9, 9, 9, 9], 2, [1, 0, 1, 0]),
        ([9, 9, 9, 9], 6, [2, 1, 2, 1]),
        ([], 5, []),
    ],
)
def test_the_states_are_shared_out(capacities, limit, expected):
    assert expected == spread(capacities, limit)
