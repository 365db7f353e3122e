"""Which sectors a flush must still cover, against a model of sets."""

from __future__ import annotations

import mmap

from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.backends.overlay.unflushed import Unflushed

BLOCKS = 9000  # three pages of the map, the last one not whole
SECTORS = 8 * BLOCKS

places = st.one_of(st.integers(0, SECTORS - 1), st.sampled_from([0, 8, 4096 * 8 - 4, SECTORS - 3]))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), places, st.integers(1, 40)),
        st.tuples(st.just("copy"), places, st.integers(1, 7)),
        st.tuples(st.just("forget"), places, st.integers(1, 60)),
        st.tuples(st.sampled_from(["begin", "succeed", "fail"]), st.just(0), st.just(0)),
    ),
    max_size=40,
)


class Model:
    """The same with sets of sectors."""

    def __init__(self):
        self.written, self.flushing, self.lost = set(), set(), set()
        self.copied, self.copied_flushing = set(), set()
        self.is_flushing = self.failed = False

    def write(self, sectors):
        self.written |= sectors
        self.lost -= sectors
        self.copied -= sectors
        # a copy that the flush under way is to cover, and that was written over since
        self.copied_flushing -= sectors

    def copy(self, sectors):
        self.write(sectors)
        self.copied |= sectors

    def forget(self, sectors):
        for name in ("written", "lost", "copied", "copied_flushing"):
            setattr(self, name, getattr(self, name) - sectors)

    def begin(self):
        self.is_flushing = True
        self.flushing, self.written = self.written, set()
        self.copied_flushing, self.copied = self.copied, set()

    def succeed(self):
        self.is_flushing = self.failed = False
        self.flushing, self.copied_flushing = set(), set()

    def fail(self):
        self.is_flushing, self.failed = False, True
        self.copied |= self.copied_flushing
        self.lost |= self.flushing | self.written
        self.written, self.flushing, self.copied_flushing = set(), set(), set()


@given(actions)
def test_it_agrees_with_a_model(steps):
    unflushed = Unflushed(BLOCKS, lambda: mmap.mmap(-1, BLOCKS))
    model = Model()
    for name, at, length in steps:
        if name in ("write", "copy"):
            end = min(at + length, SECTORS)
            if name == "copy":
                end = min(end, (at // 8 + 1) * 8)
            sectors = set(range(at, end))
            unflushed.write(at * 512, end * 512)
            if name == "copy":
                unflushed.copy(at * 512, end * 512)
            getattr(model, name)(sectors)
        elif name == "forget":
            first, last = at // 8, min(at // 8 + length, BLOCKS)
            unflushed.forget(first, last)
            model.forget(set(range(first * 8, last * 8)))
            # what a flush under way covers of them is no loss: nobody reads it again
            model.flushing -= set(range(first * 8, last * 8))
        elif name == "begin" and not model.is_flushing:
            if not model.lost:  # no flush begins before
                unflushed.begin()
                model.begin()
        elif name != "begin" and model.is_flushing:
            getattr(unflushed, name)()
            getattr(model, name)()
        assert model.failed == unflushed.failed
        assert bool(model.lost) == unflushed.is_lost
        again = set()
        for start, stop in unflushed.copies():
            again |= set(range(start // 512, stop // 512))
        assert model.copied == again
        assert not model.written or not unflushed.is_empty
    unflushed.close()
