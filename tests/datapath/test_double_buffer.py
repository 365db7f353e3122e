"""Some bytes in memory that outlives its process: replaced as a whole, or not at all."""

from __future__ import annotations

import random

import pytest

from xen_disk_py.datapath.double_buffer import DoubleBuffer

SIZE = 8 + 2 * 64
ROOM = 60
WORD = 4


def memory(size=SIZE):
    return memoryview(bytearray(size))


def test_there_is_nothing_at_first():
    assert DoubleBuffer(memory()).read() is None


def test_what_was_written_last_is_read_here_and_by_a_successor():
    dice = random.Random(1)
    shared = memory()
    buffer = DoubleBuffer(shared)
    for _ in range(200):
        if dice.random() < 0.3:
            buffer = DoubleBuffer(shared)
        content = dice.randbytes(dice.choice([0, 1, ROOM, dice.randint(0, ROOM)]))
        buffer.write(content)
        assert content == buffer.read()
        assert content == DoubleBuffer(shared).read()


@pytest.mark.parametrize("size", [32, SIZE, 32 << 10, 33 * 4096])
def test_one_buffer_less_its_head_fits(size):
    buffer = DoubleBuffer(memory(size))
    assert (size - 8) // 2 - 4 == buffer.room
    buffer.write(bytes(buffer.room))
    assert bytes(buffer.room) == buffer.read()


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_what_is_too_long_changes_nothing(writes):
    shared = memory()
    buffer = DoubleBuffer(shared)
    for number in range(writes):
        buffer.write(b"old %d" % number)
    before, read = bytes(shared), buffer.read()
    with pytest.raises(ValueError, match="61 bytes do not fit into 60"):
        buffer.write(bytes(ROOM + 1))
    assert before == shared
    assert read == buffer.read()


@pytest.mark.parametrize("writes", [1, 2])
def test_once_cleared_nothing_is_there_and_more_can_be_written(writes):
    shared = memory()
    buffer = DoubleBuffer(shared)
    for _ in range(writes):
        buffer.write(b"old")
    buffer.clear()
    assert buffer.read() is None
    assert DoubleBuffer(shared).read() is None
    buffer.write(b"new")
    assert b"new" == DoubleBuffer(shared).read()


@pytest.mark.parametrize("word", [0, 3, 2**16, 2**31, 2**32 - 1])
def test_a_damaged_word_is_nothing_and_can_be_replaced(word):
    shared = memory()
    DoubleBuffer(shared).write(b"old")
    shared[:WORD].cast("I")[0] = word
    buffer = DoubleBuffer(shared)
    assert buffer.read() is None
    buffer.write(b"new")
    assert b"new" == DoubleBuffer(shared).read()


@pytest.mark.parametrize("length", [ROOM + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("writes", [1, 2])
def test_a_damaged_length_is_nothing(length, writes):
    shared = memory()
    buffer = DoubleBuffer(shared)
    for _ in range(writes):
        buffer.write(b"old")
    at = 8 if writes == 1 else 8 + 64
    shared[at : at + 4] = length.to_bytes(4, "little")
    assert buffer.read() is None
    assert DoubleBuffer(shared).read() is None


@pytest.mark.parametrize("order", ["first to last", "last to first", "at random"])
def test_wherever_a_write_is_cut_short_what_was_there_is_whole(order):
    """Its bytes may reach the memory in any order, but the word comes last.

    What a write stores is what differs after it; any part of that may have been done.
    """
    dice = random.Random(order)
    for _ in range(100):
        shared = memory()
        shared[WORD:] = dice.randbytes(SIZE - WORD)
        buffer = DoubleBuffer(shared)
        old = None
        for _ in range(dice.randint(0, 3)):
            if dice.random() < 0.3:
                buffer.clear()
                old = None
            else:
                old = dice.randbytes(dice.randint(0, ROOM))
                buffer.write(old)
        before = bytes(shared)
        new = dice.randbytes(dice.randint(1, ROOM))
        buffer.write(new)
        stored = [at for at in range(SIZE) if before[at] != shared[at]]
        content = [at for at in stored if at >= WORD]
        assert len(stored) > len(content)  # the word is another one
        if order == "last to first":
            content.reverse()
        elif order == "at random":
            dice.shuffle(content)
        torn = memoryview(bytearray(before))
        assert old == DoubleBuffer(torn).read()
        for at in content:
            torn[at] = shared[at]
            assert old == DoubleBuffer(torn).read()
        torn[:WORD] = shared[:WORD]
        assert new == DoubleBuffer(torn).read()


def test_a_write_stores_its_word_after_all_else():
    class Watched:
        """Memory that notes what is stored where, and what the word was then."""

        def __init__(self, view):
            self.view = view
            self.stores = []

        def __len__(self):
            return len(self.view)

        def __getitem__(self, where):
            return self.view[where]

        def __setitem__(self, where, data):
            self.stores.append((where.start, where.stop, self.view[0]))
            self.view[where] = data

    watched = Watched(memory())
    buffer = DoubleBuffer(watched)
    for content in (b"a" * 10, b"b" * 20, b"c" * ROOM):
        buffer.write(content)
    assert [(8, 8 + 14, 0), (72, 72 + 24, 1), (8, 8 + 64, 2)] == watched.stores
