"""Histograms of latency: fixed size, bounded error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.blkif import (
    DISCARD,
    FLUSH,
    READ,
    WRITE,
    WRITE_BARRIER,
    Discard,
    Transfer,
)
from xen_disk_py.datapath import latency
from xen_disk_py.datapath.latency import (
    BUCKETS,
    ERROR,
    PER_SECOND,
    SERIES,
    Latency,
    bucket_of,
    histogram_of,
    start_of,
)

pytestmark = pytest.mark.shared
UNITS = st.one_of(st.integers(0, 64), st.integers(0, (1 << 32) - 1))


def measured(times):
    """Count times, in units."""
    counts = [0] * BUCKETS
    for time in times:
        counts[bucket_of(time)] += 1
    return Latency(counts, sum(times) * 250)


@given(UNITS)
def test_a_time_is_in_its_bucket(units):
    bucket = bucket_of(units)
    assert start_of(bucket) <= units < start_of(bucket + 1)


def test_buckets_are_contiguous_and_none_is_left_out():
    starts = [start_of(bucket) for bucket in range(BUCKETS + 1)]
    assert sorted(set(starts)) == starts
    assert (0, 1 << 32) == (starts[0], starts[-1])
    assert list(range(BUCKETS)) == [bucket_of(start) for start in starts[:-1]]


@pytest.mark.parametrize("units", [1 << 32, 1 << 70])
def test_what_is_longer_than_any_bucket_is_in_the_last(units):
    assert BUCKETS - 1 == bucket_of(units)


@given(st.lists(UNITS, min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_as_exact_as_promised(times, percent):
    wanted = max(1, -int(-round(percent / 100 * len(times), 6) // 1))
    exact = sorted(times)[wanted - 1]
    found = measured(times).percentile(percent) * PER_SECOND
    assert abs(found - exact) <= max(0.5, ERROR * exact)


def test_nothing_has_no_percentile():
    assert (None, None, 0) == (Latency().percentile(50), Latency().maximum, Latency().count)


@given(st.lists(UNITS), st.lists(UNITS))
def test_what_came_later_is_what_was_not_there_before(before, later):
    first, both = measured(before), measured(before + later)
    since = both.since(first)
    assert measured(later).counts == since.counts
    assert sum(later) * 250 == since.total


@given(st.lists(UNITS), st.lists(UNITS))
def test_a_sum_is_that_of_all(some, others):
    both, whole = Latency.sum([measured(some), measured(others)]), measured(some + others)
    assert (whole.counts, whole.total) == (both.counts, both.total)


@given(st.lists(UNITS), st.integers(0, 32))
def test_requests_up_to_an_edge(times, power):
    edges = [1 << power, 1 << 32]
    expected = [sum(time < edge for time in times) for edge in edges]
    assert expected == list(measured(times).up_to(edges))


def transfer(operation, sectors):
    return Transfer(1, operation, 0, sectors, (), (), ())


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (transfer(READ, 1), ("read", "4K")),
        (transfer(READ, 8), ("read", "4K")),
        (transfer(READ, 9), ("read", "16K")),
        (transfer(READ, 513), ("read", "larger")),
        (transfer(WRITE, 128), ("write", "64K")),
        (transfer(WRITE, 512), ("write", "256K")),
        (transfer(FLUSH, 0), ("flush", "any")),
        (transfer(WRITE_BARRIER, 8), ("flush", "any")),
        (Discard(1, DISCARD, 0, 8, secure=False), ("discard", "any")),
    ],
)
def test_a_request_belongs_to_its_operation_and_size(request_, expected):
    series = SERIES[histogram_of(request_)]
    assert expected == (series.operation, series.size)


def test_a_histogram_fits_its_page():
    assert BUCKETS + 1 <= latency.HISTOGRAM
    assert latency.HISTOGRAMS == len(SERIES)
