"""Copies of what no flush covers: against a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.backends.copies import Copies

SIZE = 16
places = st.integers(0, SIZE - 1).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(start + 1, SIZE))
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), places),
        st.tuples(st.just("forget"), places),
        st.tuples(st.just("flushed"), st.integers(0, 3)),
    )
)


@given(steps)
def test_the_newest_of_what_was_added_and_not_flushed_nor_forgotten(steps):
    copies, kept = Copies(), []  # dictionaries of byte to value, in the order of the writes
    for number, (step, detail) in enumerate(steps):
        if step == "flushed":
            dropped = copies.flushed(copies.end - len(kept) + min(detail, len(kept)))
            gone, kept = kept[:detail], kept[detail:]
            assert sum(map(len, gone)) == sum(map(len, dropped))
            continue
        start, end = detail
        if step == "add":
            data = bytes([number % 256]) * (end - start)
            copies.add(start, memoryview(data) if number % 2 else data)
            kept.append(dict.fromkeys(range(start, end), number % 256))
        else:
            copies.forget(start, end - start)
            for write in kept:
                for place in range(start, end):
                    write.pop(place, None)
    expected = {place: value for write in kept for place, value in write.items()}
    found = {}
    for offset, data in copies.newest():
        assert not found.keys() & range(offset, offset + len(data))
        found.update(zip(range(offset, offset + len(data)), data))
    assert expected == found
    assert sum(map(len, kept)) == copies.size


def test_to_drop_what_was_dropped_is_nothing():
    copies = Copies()
    copies.add(0, b"a")
    assert [b"a"] == copies.flushed(1)
    assert [] == copies.flushed(0)
    assert (1, 0) == (copies.end, copies.size)
