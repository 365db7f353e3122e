"""Timing requests: by two looks at the clock a batch, and exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.blkif import FLUSH, READ, WRITE
from xen_disk_py.datapath import latency, stopwatch
from xen_disk_py.datapath.statistics import Statistics
from xen_disk_py.datapath.stopwatch import WRITES, Stopwatch, batches_per_sample, kind


class Clock:
    def __init__(self):
        self.now = 100.0
        self.looks = 0

    def __call__(self):
        self.looks += 1
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def statistics():
    return Statistics()


@pytest.fixture
def watch(statistics, clock):
    return lambda every=1: Stopwatch(statistics.of_queue(0), every=every, clock=clock)


def found(statistics):
    """Requests and seconds by operation and size."""
    read = latency.read(statistics.of_queue(0).latencies)
    return {
        (series.operation, series.size): (each.count, round(each.seconds, 6))
        for series, each in zip(latency.SERIES, read)
        if each.count
    }


def test_all_that_is_published_at_once_took_since_its_batch(watch, statistics, clock):
    one = watch()
    one.start()
    one.counts[kind(1, 4096)] += 3
    one.counts[kind(16, 65536) + WRITES] += 1
    clock.now += 0.25
    one.published()
    assert {("read", "4K"): (3, 0.75), ("write", "64K"): (1, 0.25)} == found(statistics)
    assert 2 == clock.looks
    assert [3, 0, 0, 0, 1] == statistics.segments_per_request[:5]


def test_what_is_published_with_the_next_batch_took_since_its_own(watch, statistics, clock):
    one = watch()
    one.start()
    one.counts[kind(1, 4096)] += 1
    clock.now += 1
    one.start()
    one.counts[kind(1, 4096)] += 1
    clock.now += 1
    one.published()
    assert {("read", "4K"): (2, 3.0)} == found(statistics)
    one.published()
    assert {("read", "4K"): (2, 3.0)} == found(statistics)


def test_a_request_that_ends_later_took_since_it_was_taken(watch, statistics, clock):
    one = watch()
    one.start()
    taken = one.taken
    clock.now += 2
    one.start()
    one.end(latency.SERIES.index(("flush", None, "any")), taken)
    clock.now += 1
    one.published()
    assert {("flush", "any"): (1, 3.0)} == found(statistics)


def test_switched_off_it_never_looks_at_the_clock(watch, statistics, clock):
    one = watch(0)
    for _ in range(20):
        one.start()
        one.counts[kind(1, 4096)] += 1
        one.end(0, one.taken)
        one.published()
    assert (0, {}) == (clock.looks, found(statistics))
    assert 20 == statistics.segments_per_request[0]


def test_where_the_clock_is_dear_one_batch_of_eight_is_timed(watch, statistics):
    one = watch(8)
    for _ in range(80):
        one.start()
        one.counts[kind(1, 4096)] += 1
        one.published()
    assert 10 == found(statistics)["read", "4K"][0]
    assert 80 == statistics.segments_per_request[0]


@pytest.mark.parametrize(("cost", "expected"), [(1e-7, 1), (2e-5, 8)])
def test_the_clock_says_itself_what_it_costs(monkeypatch, cost, expected):
    now = [0.0]

    def clock():
        now[0] += cost
        return now[0]

    monkeypatch.setattr(stopwatch, "perf_counter", clock)
    batches_per_sample.cache_clear()
    assert expected == batches_per_sample()
    batches_per_sample.cache_clear()


@given(st.one_of(st.integers(0, 64), st.integers(0, 1 << 36)))
def test_a_time_is_in_the_bucket_that_latency_says(units):
    statistics, clock = Statistics(), Clock()
    clock.now = 0.0
    one = Stopwatch(statistics.of_queue(0), every=1, clock=clock)
    one.start()
    one.counts[kind(1, 4096)] += 1
    clock.now = units / latency.PER_SECOND
    one.published()
    nanoseconds = int(clock.now * 1e9)
    expected = latency.bucket_of(nanoseconds // latency.NANOSECONDS)
    (each,) = (each for each in latency.read(statistics.of_queue(0).latencies) if each.count)
    assert {expected: 1} == each.counts


def test_a_sum_wraps_and_stops_nobody(watch, statistics, clock):
    statistics.of_queue(0).latencies[latency.SUM] = (1 << 64) - 1
    one = watch()
    one.start()
    one.counts[kind(1, 4096)] += 1
    clock.now += 1
    one.published()
    assert 999_999_999 == statistics.of_queue(0).latencies[latency.SUM]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_request_of_a_ring_is_counted_once(host, threads):
    """Reads, writes and flushes, whoever does them."""
    from xen_disk_py.blkif import Transfer
    from xen_disk_py.datapath.disk import Disk

    disk = Disk(host.memory(threads=threads))
    line = host.line(disk, persistent=True)
    pages = host.share(8)
    sent = []
    for lap in range(3):
        for page in range(8):
            operation = WRITE if page % 2 else READ
            sent.append(
                Transfer(lap * 10 + page, operation, page * 8, 8, (pages.refs[page],), (0,), (7,))
            )
        sent.append(Transfer(lap * 10 + 9, FLUSH, 0, 0, (), (), ()))
    for request in sent:
        line.ask(request)
    assert line.queue.stop(30)
    counts = {key: count for key, (count, _) in found(disk.statistics).items()}
    if batches_per_sample() == 1:
        assert {("read", "4K"): 12, ("write", "4K"): 12, ("flush", "any"): 3} == counts
