"""The smallest part that fails."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.crashtest.minimize import minimize


@given(st.integers(1, 12), st.sets(st.integers(0, 11), max_size=4))
def test_what_is_needed_is_found(count, needed):
    needed = {each for each in needed if each < count}
    assert sorted(needed) == minimize(range(count), lambda part: needed <= set(part), 10_000)


@given(st.integers(1, 8), st.sets(st.frozensets(st.integers(0, 7), max_size=4), min_size=1))
def test_without_any_one_of_it_nothing_fails(count, causes):
    def fails(part):
        return any(cause <= set(part) for cause in causes) or len(part) == count

    found = minimize(range(count), fails, 10_000)
    assert fails(found)
    assert not any(fails([each for each in found if each != one]) for one in found)


def test_what_was_found_by_then_is_returned():
    asked = []

    def fails(part):
        asked.append(list(part))
        return 3 in part

    assert 3 in minimize(range(64), fails, 3)
    assert 3 == len(asked)
