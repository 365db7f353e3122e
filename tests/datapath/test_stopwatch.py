"""Timing requests: by a look at the clock a batch, and nothing slow is missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.blkif import FLUSH, READ, WRITE
from xen_disk_py.datapath import latency, stopwatch
from xen_disk_py.datapath.statistics import Statistics
from xen_disk_py.datapath.stopwatch import SAMPLE, SLOW, WRITES, Stopwatch, cost_of_a_look, kind

pytestmark = pytest.mark.shared


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
    """One whose first batch counts, and all others that come half a millisecond later or more."""
    return lambda **more: Stopwatch(statistics.of_queue(0), clock=clock, cost=0.0, **more)


def do(one, clock, seconds, requests=1):
    """One batch of reads."""
    one.take()
    one.counts[kind(1, 4096)] += requests
    clock.now += seconds
    one.published()


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
    one.take()
    one.counts[kind(1, 4096)] += 3
    one.counts[kind(16, 65536) + WRITES] += 1
    clock.now += 0.25
    one.published()
    assert {("read", "4K"): (3, 0.75), ("write", "64K"): (1, 0.25)} == found(statistics)
    assert [3, 0, 0, 0, 1] == statistics.segments_per_request[:5]


def test_what_is_published_with_the_next_batch_took_since_its_own(watch, statistics, clock):
    one = watch()
    one.take()
    one.counts[kind(1, 4096)] += 1
    clock.now += 1
    one.look()
    one.take()
    one.counts[kind(1, 4096)] += 1
    clock.now += 1
    one.published()
    assert {("read", "4K"): (2, 3.0)} == found(statistics)
    one.published()
    assert {("read", "4K"): (2, 3.0)} == found(statistics)


def test_a_request_that_ends_later_took_since_it_was_taken(watch, statistics, clock):
    one = watch()
    one.take()
    start = one.start
    clock.now += 2
    one.look()
    one.take()
    one.end(latency.SERIES.index(("flush", None, "any")), start)
    clock.now += 1
    one.published()
    assert {("flush", "any"): (1, 3.0)} == found(statistics)


def test_switched_off_it_times_nothing(watch, statistics, clock):
    one = watch(is_on=False)
    for _ in range(2 * SAMPLE):
        one.take()
        one.counts[kind(1, 4096)] += 1
        one.end(0, one.start)
        clock.now += 1
        one.published()
    assert {} == found(statistics)
    assert 2 * SAMPLE == statistics.segments_per_request[0]
    assert 1 == one.now - one.taken


def test_of_quick_batches_one_is_timed_for_many(watch, statistics, clock):
    one = watch()
    looks = clock.looks
    for _ in range(2 + 10 * SAMPLE):  # two until they are known to be quick
        do(one, clock, 0.0001)
    requests, seconds = found(statistics)["read", "4K"]
    assert 2 + 10 * SAMPLE == requests
    assert pytest.approx(seconds, 0.001) == requests * 0.0001
    batches = 2 + 10 * SAMPLE
    assert clock.looks - looks <= batches + 2 * 12
    assert batches == statistics.segments_per_request[0]


def test_batches_that_do_not_follow_each_other_quickly_are_all_timed(watch, statistics, clock):
    one = watch()
    for number in range(1, 100):
        do(one, clock, number / 1e6)
        clock.now += 0.001
        one.look()
    each = latency.read(statistics.of_queue(0).latencies)[0]
    assert 99 == each.count
    assert pytest.approx(each.seconds, 1e-3) == sum(range(1, 100)) / 1e6


@given(st.lists(st.booleans(), min_size=200, max_size=400))
def test_every_slow_request_is_counted_once_amid_quick_ones(slow):
    statistics, clock = Statistics(), Clock()
    one = Stopwatch(statistics.of_queue(0), clock=clock, cost=0.0)
    for is_slow in slow:
        do(one, clock, 0.005 if is_slow else 1e-5)
    each = latency.read(statistics.of_queue(0).latencies)[0]
    edge = int(SLOW * latency.PER_SECOND)
    late = sum(n for bucket, n in each.counts.items() if latency.start_of(bucket + 1) > edge)
    assert sum(slow) == late


@pytest.mark.parametrize("period", [2, 3, 8, 30])
def test_what_comes_in_turns_is_sampled_evenly(watch, statistics, clock, period):
    one = watch()
    for number in range(period * SAMPLE * 4):
        one.take()
        one.counts[kind(1, 4096) + (WRITES if number % period else 0)] += 1
        clock.now += 1e-5
        one.published()
    timed = found(statistics)
    assert timed["read", "4K"][0] == pytest.approx(4 * SAMPLE, abs=SAMPLE)
    assert timed["write", "4K"][0] == pytest.approx(4 * SAMPLE * (period - 1), abs=SAMPLE)


def test_one_that_idled_took_nothing_of_that(watch, statistics, clock):
    one = watch()
    for _ in range(10):
        do(one, clock, 1e-5)
    clock.now += 60
    one.look()
    do(one, clock, 1e-5)
    assert found(statistics)["read", "4K"][1] < 0.001


def test_where_the_clock_is_dear_a_coarse_one_finds_what_is_slow(statistics, clock):
    coarse = Clock()
    one = Stopwatch(statistics.of_queue(0), clock=clock, coarse=coarse, cost=20e-6, tick=0.004)
    looks = clock.looks
    for number in range(2 + SAMPLE * 10):
        one.take()
        one.counts[kind(1, 4096)] += 1
        clock.now += 0.001
        if number == 100:
            clock.now += 0.012
        coarse.now = clock.now // 0.004 * 0.004
        one.published()
    each = latency.read(statistics.of_queue(0).latencies)[0]
    assert 1 == sum(n for bucket, n in each.counts.items() if latency.start_of(bucket) > 20000)
    assert 2 * 12 >= clock.looks - looks


def test_the_clock_says_itself_what_it_costs(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 2e-5
        return now[0]

    monkeypatch.setattr(stopwatch, "perf_counter", clock)
    cost_of_a_look.cache_clear()
    assert pytest.approx(2e-5) == cost_of_a_look()
    cost_of_a_look.cache_clear()


@given(st.one_of(st.integers(0, 64), st.integers(0, 1 << 36)))
def test_a_time_is_in_the_bucket_that_latency_says(units):
    statistics, clock = Statistics(), Clock()
    clock.now = 0.0
    one = Stopwatch(statistics.of_queue(0), clock=clock, cost=0.0)
    one.take()
    one.counts[kind(1, 4096)] += 1
    clock.now = units / latency.PER_SECOND
    one.published()
    nanoseconds = int(clock.now * 1e9)
    expected = latency.bucket_of(nanoseconds // latency.NANOSECONDS)
    (each,) = (each for each in latency.read(statistics.of_queue(0).latencies) if each.count)
    assert {expected: 1} == each.counts


def test_a_sum_wraps_and_stops_nobody(watch, statistics, clock):
    statistics.of_queue(0).latencies[latency.SUM] = (1 << 64) - 1
    do(watch(), clock, 1)
    assert 999_999_999 == statistics.of_queue(0).latencies[latency.SUM]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_request_of_a_ring_is_counted_once(host, threads, monkeypatch):
    """Reads, writes and flushes, whoever does them."""
    monkeypatch.setattr(stopwatch, "SAMPLE", 1)
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
    assert {("read", "4K"): 12, ("write", "4K"): 12, ("flush", "any"): 3} == counts
