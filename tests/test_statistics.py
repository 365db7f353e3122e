"""The counters of a disk, and how they are drawn."""

from __future__ import annotations

import random
import struct

import pytest

from xen_disk_py import statistics
from xen_disk_py.statistics import WORDS, Statistics, bucket_name, histogram

NAMES = [
    "requests",
    "reads",
    "writes",
    "flushes",
    "discards",
    "refused",
    "errors",
    "bytes_read",
    "bytes_written",
    "bytes_discarded",
    "wakeups",
    "in_flight",
    "memory",
]
# (the least number, the greatest) of each bucket
BUCKETS = [
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 32),
    (33, 64),
    (65, 128),
    (129, 256),
    (257, 512),
    (513, 1024),
    (1025, 2048),
    (2049, 10**9),
]


class TestCounters:
    def test_all_are_zero_at_first(self):
        fresh = Statistics()

        assert dict.fromkeys(NAMES, 0) == fresh.as_dict()
        assert [0] * 13 == fresh.segments_per_request == fresh.requests_per_batch

    def test_each_constant_counts_under_its_own_name(self):
        counters = Statistics()
        for amount, name in enumerate(NAMES, 1):
            counters.add(getattr(statistics, name.upper()), amount)

        assert {name: amount for amount, name in enumerate(NAMES, 1)} == counters.as_dict()
        assert [0] * 13 == counters.segments_per_request == counters.requests_per_batch

    def test_they_are_sums_of_what_was_added(self):
        dice = random.Random(1)
        counters, expected = Statistics(), dict.fromkeys(NAMES, 0)
        for _ in range(500):
            name = dice.choice(NAMES)
            amount = dice.choice((1, 512, dice.getrandbits(40)))
            counters.add(getattr(statistics, name.upper()), amount)
            expected[name] += amount

        assert expected == counters.as_dict()

    def test_one_is_added_unless_told_otherwise(self):
        counters = Statistics()
        counters.add(statistics.FLUSHES)
        counters.add(statistics.FLUSHES)

        assert 2 == counters.as_dict()["flushes"]

    def test_a_guest_that_discards_without_end_wraps_its_counter_and_does_no_harm(self):
        counters = Statistics()
        for _ in range(5):
            counters.add(statistics.BYTES_DISCARDED, 2**63 - 1)

        assert 5 * (2**63 - 1) % 2**64 == counters.as_dict()["bytes_discarded"]

    def test_they_live_in_the_words_given(self):
        memory = bytearray(8 * WORDS)
        counters = Statistics(memoryview(memory).cast("Q"))
        counters.add(statistics.READS, 3)
        counters.count_segments(2)
        counters.count_batch(5)

        words = struct.unpack(f"={WORDS}Q", memory)
        expected = [0] * (13 + 13 + 13)
        expected[1] = 3
        expected[13 + 1] = 1
        expected[26 + 3] = 1
        assert expected == list(words)
        assert counters.as_dict() == Statistics(memoryview(memory).cast("Q")).as_dict()


class TestHistograms:
    @pytest.mark.parametrize("bucket", range(13))
    def test_a_number_falls_into_its_bucket(self, bucket):
        counters = Statistics()
        low, high = BUCKETS[bucket]
        for number in (low, high, (low + high) // 2):
            counters.count_segments(number)
            counters.count_batch(number)

        expected = [3 if i == bucket else 0 for i in range(13)]
        assert expected == counters.segments_per_request
        assert expected == counters.requests_per_batch

    def test_a_request_without_a_segment_counts_with_the_smallest(self):
        counters = Statistics()
        counters.count_segments(0)

        assert [1] + [0] * 12 == counters.segments_per_request

    def test_each_number_is_counted_once(self):
        dice = random.Random(2)
        counters = Statistics()
        expected = [0] * 13
        for _ in range(500):
            number = dice.randint(1, 1 << dice.randrange(13))
            counters.count_batch(number)
            expected[next(i for i, (low, high) in enumerate(BUCKETS) if low <= number <= high)] += 1

        assert expected == counters.requests_per_batch
        assert [0] * 13 == counters.segments_per_request

    def test_buckets_are_named_by_what_falls_into_them(self):
        names = [str(low) if low == high else f"{low}-{high}" for low, high in BUCKETS[:-1]]

        assert [*names, "2049+"] == [bucket_name(i) for i in range(13)]

    def test_nothing_is_drawn_of_nothing(self):
        assert [] == histogram("title", [0] * 13)

    def test_it_is_drawn_from_the_first_to_the_last_bucket_in_use(self):
        counts = [0, 1, 0, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0]

        assert [
            "segments",
            "          2          1 #",
            "        3-4          0",
            "        5-8         40 ########################################",
        ] == histogram("segments", counts)

    def test_bars_are_as_long_as_their_counts(self):
        dice = random.Random(3)
        for _ in range(200):
            counts = [dice.choice((0, 1, dice.getrandbits(dice.randint(1, 60)))) for _ in range(13)]
            counts[dice.randrange(13)] = max(*counts, 1)
            bars = [line.count("#") for line in histogram("title", counts, width=20)[1:]]
            shown = counts[next(i for i, count in enumerate(counts) if count) :][: len(bars)]

            assert sum(counts) == sum(shown)
            assert 20 == max(bars)
            for count, bar in zip(shown, bars):
                assert (count > 0) == (bar > 0)  # whatever was counted shows
                assert bar - 1 < count * 20 / max(counts) <= bar + 1e-6
