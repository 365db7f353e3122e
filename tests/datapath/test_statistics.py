"""The counters of a disk, and how they are drawn."""

from __future__ import annotations

import random
import struct
import threading
import time

import pytest

from xen_disk_py.blkif import (
    DISCARD,
    FLUSH,
    MAX_QUEUES,
    READ,
    WRITE,
    WRITE_BARRIER,
    Discard,
    Transfer,
)
from xen_disk_py.datapath import statistics
from xen_disk_py.datapath.statistics import WORDS, Statistics, bucket_name, histogram, segments_word

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
    "held",
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


def transfer(operation, pages):
    return Transfer(1, operation, 0, 8 * pages, (9,) * pages, (0,) * pages, (7,) * pages)


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

    def test_they_live_in_the_words_given_each_queue_s_apart(self):
        memory = bytearray(8 * WORDS)
        counters = Statistics(memoryview(memory).cast("Q"))
        counters.add(statistics.READS, 3)
        counters.set_memory(9)
        for number in range(MAX_QUEUES):
            counters.of_queue(number).add(statistics.READS, 1 << number)
        counters.of_queue(1).words[segments_word(2)] += 1
        counters.of_queue(2).count_batch(5)

        expected = [[0] * (14 + 13 + 13) for _ in range(1 + MAX_QUEUES)]
        expected[0][1], expected[0][13] = 3, 9
        for number in range(MAX_QUEUES):
            expected[1 + number][1] = 1 << number
        expected[2][14 + 1] = 1
        expected[3][27 + 3] = 1
        assert [*(word for block in expected for word in block), 0] == list(
            struct.unpack(f"={WORDS}Q", memory)
        )
        again = Statistics(memoryview(memory).cast("Q"))
        assert counters.as_dict() == again.as_dict()
        assert (258, 9) == (again.as_dict()["reads"], again.as_dict()["memory"])
        assert [0, 1] + [0] * 11 == again.segments_per_request
        assert [0, 0, 0, 1] + [0] * 9 == again.requests_per_batch

    def test_sums_of_queues_wrap_too(self):
        counters = Statistics()
        for number in range(3):
            counters.of_queue(number).add(statistics.BYTES_DISCARDED, 2**63 - 1)

        assert 3 * (2**63 - 1) % 2**64 == counters.as_dict()["bytes_discarded"]

    def test_threads_that_add_at_once_lose_nothing(self, monkeypatch):
        """However they take turns: here amid each addition."""
        counters = Statistics()
        block = counters._blocks[0]
        add_up = block.add

        def slowly(counter, amount):
            before = block.words[counter]
            time.sleep(0)
            block.words[counter] = before
            add_up(counter, amount)

        monkeypatch.setattr(block, "add", slowly)

        def add():
            for _ in range(500):
                counters.add(statistics.ERRORS)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 2000 == counters.as_dict()["errors"]

    @pytest.mark.parametrize(
        ("request_", "expected"),
        [
            (transfer(READ, 3), {"reads": 1, "bytes_read": 3 * 4096}),
            (transfer(WRITE, 3), {"writes": 1, "bytes_written": 3 * 4096}),
            (transfer(FLUSH, 0), {"flushes": 1}),
            (transfer(FLUSH, 2), {"flushes": 1, "writes": 1, "bytes_written": 8192}),
            (transfer(WRITE_BARRIER, 0), {"flushes": 1}),
            (transfer(WRITE_BARRIER, 1), {"flushes": 1, "writes": 1, "bytes_written": 4096}),
            (Discard(1, DISCARD, 0, 8, secure=False), {"discards": 1, "bytes_discarded": 4096}),
        ],
    )
    def test_a_request_is_counted_as_what_it_is(self, request_, expected):
        counters = Statistics()
        counters.of_queue(3).count_request(request_)

        found = {name: count for name, count in counters.as_dict().items() if count}
        assert expected == found
        segments = len(getattr(request_, "grefs", ()))
        assert (1 if segments else 0) == sum(counters.segments_per_request)


class TestSettling:
    """Whether what was in flight is done, as far as counts tell."""

    @pytest.mark.parametrize("in_order", [True, False])
    def test_nothing_in_flight_is_settled(self, in_order):
        counters = Statistics()
        counters.of_queue(0).words[statistics.REQUESTS] = 7
        assert counters.settled(in_order=in_order)()

    def test_each_queue_is_waited_for_until_as_many_were_answered(self):
        counters = Statistics()
        queues = [counters.of_queue(number).words for number in range(MAX_QUEUES)]
        for number, words in enumerate(queues):
            words[statistics.REQUESTS], words[statistics.IN_FLIGHT] = 100 * number, 2
        is_settled = counters.settled(in_order=True)
        for words in queues:
            assert not is_settled()
            words[statistics.REQUESTS] += 1
            assert not is_settled()
            words[statistics.REQUESTS] += 1  # as many as there were; others are under way
        assert is_settled()

    @pytest.mark.parametrize("counter", [statistics.IN_FLIGHT, statistics.HELD])
    def test_several_that_are_busy_need_not_be_idle_at_once(self, counter):
        counters = Statistics()
        one, other = (counters.of_queue(number).words for number in range(2))
        for words in (one, other):
            words[statistics.IN_FLIGHT] = words[counter] = 1
        is_settled = counters.settled(in_order=counter == statistics.HELD)
        assert not is_settled()
        one[statistics.REQUESTS] += 1
        one[counter] = 0
        assert not is_settled()
        one[counter] = 1  # of what was asked for meanwhile
        other[statistics.REQUESTS] += 1
        other[counter] = 0
        assert is_settled()

    @pytest.mark.parametrize("in_order", [True, False])
    def test_a_queue_that_is_idle_has_nothing_left(self, in_order):
        counters = Statistics()
        words = counters.of_queue(0).words
        words[statistics.IN_FLIGHT] = 3
        is_settled = counters.settled(in_order=in_order)
        assert not is_settled()
        words[statistics.IN_FLIGHT] = 0
        assert is_settled()

    def test_a_request_that_is_held_may_be_overtaken(self):
        counters = Statistics()
        words = counters.of_queue(0).words
        words[statistics.IN_FLIGHT] = 2
        is_settled = counters.settled(in_order=True)
        words[statistics.HELD] = 1
        words[statistics.REQUESTS] += 1000
        assert not is_settled()
        words[statistics.HELD] = 0
        assert is_settled()

    def test_where_requests_overtake_each_other_answers_prove_nothing(self):
        counters = Statistics()
        words = counters.of_queue(0).words
        words[statistics.IN_FLIGHT] = 1
        is_settled = counters.settled(in_order=False)
        words[statistics.REQUESTS] += 1000
        assert not is_settled()


class TestHistograms:
    @pytest.mark.parametrize("bucket", range(13))
    def test_a_number_falls_into_its_bucket(self, bucket):
        counters = Statistics()
        queue = counters.of_queue(0)
        low, high = BUCKETS[bucket]
        for number in (low, high, (low + high) // 2):
            queue.words[segments_word(number)] += 1
            queue.count_batch(number)

        expected = [3 if i == bucket else 0 for i in range(13)]
        assert expected == counters.segments_per_request
        assert expected == counters.requests_per_batch

    def test_nothing_counts_with_the_smallest(self):
        counters = Statistics()
        counters.of_queue(0).count_batch(0)

        assert [1] + [0] * 12 == counters.requests_per_batch

    def test_each_number_is_counted_once(self):
        dice = random.Random(2)
        counters = Statistics()
        expected = [0] * 13
        for _ in range(500):
            number = dice.randint(1, 1 << dice.randrange(13))
            counters.of_queue(dice.randrange(MAX_QUEUES)).count_batch(number)
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
