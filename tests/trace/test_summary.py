"""The numbers of a summary are those of a plain count."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.trace.format import DISCARD, FLUSH, GAP, READ, WRITE, Header, Record
from xen_disk_py.trace.histogram import Histogram
from xen_disk_py.trace.reuse import ReuseDistance
from xen_disk_py.trace.summary import Summary

SIZE = 1 << 20  # the requests below fit in
RECORDS = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE, FLUSH, DISCARD]),
        st.integers(0, 1000),
        st.integers(1, 64),
        st.integers(0, 10**9),
        st.sampled_from([0, 0, 5]),
    ),
    min_size=1,
)


@given(st.lists(st.integers(0, 1 << 40), min_size=1), st.sampled_from([1, 50, 90, 99, 100]))
def test_a_percentile_is_right_to_some_percent(numbers, part):
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    exact = sorted(numbers)[max(0, -(-len(numbers) * part // 100) - 1)]
    assert exact <= histogram.percentile(part) <= exact * 17 / 16
    assert (min(numbers), max(numbers)) == (histogram.least, histogram.most)
    powers = dict(histogram.powers())
    for power, count in powers.items():
        assert count == sum(power // 2 <= number < power for number in numbers)
    assert len(numbers) == sum(powers.values())


@given(st.lists(st.integers(0, 30)))
def test_distances_of_few_blocks_are_those_of_a_stack(blocks):
    stack: OrderedDict[int, None] = OrderedDict()
    expected = Histogram()
    reuse = ReuseDistance()
    for block in blocks:
        reuse.use(block)
        if block in stack:
            names = list(stack)
            expected.add(len(names) - 1 - names.index(block))
            del stack[block]
        stack[block] = None
    assert len(stack) == reuse.first_uses
    assert vars(expected) == vars(reuse.distances)


def test_distances_of_many_blocks_are_near():
    reuse = ReuseDistance()
    for _ in range(2):
        for block in range(30_000):
            reuse.use(block)
    assert 25_000 < reuse.distances.percentile(50) < 35_000
    assert 4096 >= len(reuse._last)


@given(RECORDS)
def test_requests_and_bytes_are_counted(drawn):
    records = [
        Record(number, op, number, latency, at * 512, 0 if op == FLUSH else length * 512, status)
        for number, (op, at, length, latency, status) in enumerate(drawn)
    ]
    summary = Summary(Header(SIZE, 512, 0, 0, b""))
    for record in records:
        summary.add(record)
    facts = summary.facts()
    assert len(records) == sum(each["requests"] for each in facts["operations"].values())
    assert sum(each.length for each in records) == sum(
        each["bytes"] for each in facts["operations"].values()
    )
    blocks = {
        block
        for each in records
        if each.operation in (READ, WRITE)
        for block in range(each.offset // 4096, (each.offset + each.length - 1) // 4096 + 1)
    }
    assert len(blocks) * 4096 == facts["working_set"]["bytes"]
    assert 1.0 == facts["write_amplification"][0]["times"]


def test_of_nothing_and_of_what_lies_beyond_the_end():
    summary = Summary(Header(512, 512, 0, 0, b""))
    assert {} == summary.facts()["operations"]
    summary.add(Record(0, WRITE, 0, 1, 1 << 60, 512))
    summary.add(Record(1, GAP, 0, 0, 0, 0))
    facts = summary.facts()
    assert (1, 1) == (facts["operations"]["write"]["requests"], facts["gaps"])


def test_in_order_is_what_begins_where_another_ended():
    summary = Summary(Header(SIZE, 512, 0, 0, b""))
    for number in range(8):
        summary.add(Record(number, READ, number, 1, number // 2 * 4096 + number % 2 * 65536, 4096))
    assert 0.75 == summary.facts()["operations"]["read"]["sequential"]
