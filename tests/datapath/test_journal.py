"""What a process has taken from a ring and not answered, as its successor finds it."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest

from xen_disk_py.blkif import Ring
from xen_disk_py.datapath.double_buffer import DoubleBuffer
from xen_disk_py.datapath.journal import SIZE, Journal, Unanswered

RING = Ring((8, 9), 17)
SLOT_SIZES = [112, 108]
HEAD = 21 * 4
MOST = 512  # slots of the largest ring


def shared():
    return memoryview(bytearray(SIZE))


def begun(memory, ring=RING, slot_size=112):
    journal = Journal(memory)
    journal.begin(ring, slot_size)
    return journal


def some(dice, count, size):
    return [dice.randbytes(size) for _ in range(count)]


@pytest.mark.parametrize("slot_size", SLOT_SIZES)
@pytest.mark.parametrize("pages", [1, 2, 16])
def test_what_was_noted_last_is_recalled(slot_size, pages):
    dice = random.Random(slot_size + pages)
    ring = Ring(tuple(range(100, 100 + pages)), 5)
    memory = shared()
    journal = begun(memory, ring, slot_size)
    numbers = [(0, 0), (MOST, MOST), (1, 0), (0, 1), (MOST, 0), (0, MOST), (3, 7), (32, 31)]
    for responses, requests in numbers:
        noted = Unanswered(
            dice.choice([0, 2**32 - 1, dice.getrandbits(32)]),
            some(dice, responses, 12),
            some(dice, requests, slot_size),
        )
        journal.note(noted.start, noted.responses, noted.requests)
        assert noted == Journal(memory).recall(ring, slot_size)


def test_without_memory_that_is_shared_it_is_as_good_for_its_own_process():
    journal = Journal()
    journal.begin(RING, 112)
    journal.note(3, [], [b"r" * 112])
    assert Unanswered(3, [], [b"r" * 112]) == journal.recall(RING, 112)


def test_nothing_is_recalled_where_nothing_was_noted():
    memory = shared()
    assert Journal(memory).recall(RING, 112) is None
    begun(memory)
    assert Journal(memory).recall(RING, 112) is None


@pytest.mark.parametrize(
    ("ring", "slot_size"),
    [
        (Ring((8, 10), 17), 112),
        (Ring((9, 8), 17), 112),
        (Ring((8,), 17), 112),
        (Ring((8, 9, 10), 17), 112),
        (Ring((8, 9), 18), 112),
        (RING, 108),
    ],
    ids=["refs", "order of refs", "fewer pages", "more pages", "port", "slot size"],
)
def test_another_ring_recalls_nothing(ring, slot_size):
    memory = shared()
    begun(memory).note(7, [b"a" * 12], [b"b" * 112 * 27])  # so long in slots of either size
    assert Journal(memory).recall(ring, slot_size) is None
    assert Journal(memory).recall(RING, 112) is not None  # and it is still there for its own


@pytest.mark.parametrize("forget", [Journal.clear, lambda journal: journal.begin(RING, 112)])
def test_what_is_forgotten_is_recalled_by_nobody(forget):
    memory = shared()
    journal = begun(memory)
    journal.note(7, [b"a" * 12], [])
    forget(journal)
    assert Journal(memory).recall(RING, 112) is None
    assert journal.recall(RING, 112) is None


def test_after_a_beginning_notes_are_about_the_new_ring():
    memory = shared()
    journal = begun(memory)
    journal.note(7, [], [])
    other = Ring((1, 2, 3), 4)
    journal.begin(other, 108)
    journal.note(9, [], [b"x" * 108])
    assert Journal(memory).recall(RING, 112) is None
    assert Unanswered(9, [], [b"x" * 108]) == Journal(memory).recall(other, 108)


def test_whoever_recalls_continues_from_there():
    memory = shared()
    begun(memory).note(7, [b"a" * 12], [b"b" * 112])
    for start in range(8, 12):
        successor = Journal(memory)
        assert successor.recall(RING, 112) is not None
        successor.note(start, [], [b"c" * 112] * start)
        assert Unanswered(start, [], [b"c" * 112] * start) == Journal(memory).recall(RING, 112)


def test_another_ring_s_process_does_not_continue_from_there():
    memory = shared()
    begun(memory).note(7, [], [])
    successor = Journal(memory)
    assert successor.recall(Ring((1,), 2), 112) is None
    successor.note(8, [], [])
    assert Journal(memory).recall(RING, 112) is None


# -- damage --------------------------------------------------------------------------------


def recall_bounded(memory, slot_size=112):
    """Recall whatever is there; it must be whole slots that fit into the memory, or None."""
    left = Journal(memory).recall(RING, slot_size)
    if left is not None:
        assert {12} >= set(map(len, left.responses))
        assert {slot_size} >= set(map(len, left.requests))
        assert 0 <= left.start < 2**32
        assert 12 * len(left.responses) + slot_size * len(left.requests) <= SIZE // 2
    return left


def head(start, responses, length):
    return struct.pack("<18I3I", 112, 17, 8, 9, *(0,) * 14, start, responses, length)


def test_the_head_is_laid_out_as_the_next_tests_say():
    memory = shared()
    DoubleBuffer(memory).write(head(5, 1, 112) + b"a" * 12 + b"b" * 112)
    assert Unanswered(5, [b"a" * 12], [b"b" * 112]) == recall_bounded(memory)


@pytest.mark.parametrize(
    ("responses", "length"),
    [
        (0, 112),
        (2, 112),
        (1, 0),
        (1, 111),
        (1, 224),
        (2**32 - 1, 112),
        (1, 2**32 - 1),
        (2**32 - 1, 2**32 - 1),
        (2**31, 0),
        (0, 124),  # as much as is there, but no whole slots
    ],
)
def test_counts_that_are_not_those_of_what_is_there(responses, length):
    memory = shared()
    DoubleBuffer(memory).write(head(5, responses, length) + b"a" * 12 + b"b" * 112)
    tracemalloc.start()
    try:
        assert recall_bounded(memory) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 72, HEAD - 1, HEAD, HEAD + 11, HEAD + 12 + 111])
def test_a_note_that_is_cut_off(length):
    memory = shared()
    DoubleBuffer(memory).write((head(5, 1, 112) + b"a" * 12 + b"b" * 112)[:length])
    assert recall_bounded(memory) is None


def test_damage_anywhere_is_found_or_does_no_harm():
    dice = random.Random(7)
    none = 0
    for _ in range(300):
        memory = shared()
        journal = begun(memory)
        for _ in range(dice.randint(1, 2)):
            journal.note(3, some(dice, dice.randint(0, 9), 12), some(dice, 9, 112))
        end = dice.choice([8, 8 + 4 + HEAD, SIZE])
        for _ in range(dice.randint(1, 40)):
            memory[dice.randrange(end)] = dice.getrandbits(8)
        none += recall_bounded(memory) is None
    assert 30 < none < 300  # both happen


@pytest.mark.parametrize("word", [1, 2])
def test_random_memory(word):
    dice = random.Random(word)
    for _ in range(20):
        memory = shared()
        memory[:] = dice.randbytes(SIZE)
        memory[:4].cast("I")[0] = word
        at = 8 if word == 1 else 8 + (SIZE - 8) // 2
        memory[at : at + 4] = dice.randrange(SIZE // 2).to_bytes(4, "little")
        assert recall_bounded(memory) is None
