"""What a picture shows is what the trace has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.trace.format import FLUSH, READ, STOPPED, WRITE, Record
from xen_disk_py.trace.picture import Picture, span_of
from xen_disk_py.trace.writer import event

SIZE = 1 << 20


@given(
    st.lists(
        st.tuples(
            st.sampled_from([READ, WRITE, FLUSH]),
            st.integers(0, 10**10),
            st.integers(0, 10**12),
            st.integers(0, SIZE // 512 - 1),
            st.integers(1, 100),
        ),
        min_size=1,
    )
)
def test_no_request_and_no_byte_is_lost(drawn):
    records = [
        Record(0, operation, start, latency, at * 512, 0 if operation == FLUSH else length * 512)
        for operation, start, latency, at, length in drawn
    ]
    start, end, _, count = span_of([*records, event(STOPPED, 1 << 60)])
    assert len(records) == count
    assert start == min(each.start for each in records)
    assert end == max(each.end for each in records)
    picture = Picture(SIZE, start, end, 20, 10)
    for record in records:
        picture.add(record)
    for operation in (READ, WRITE):
        mine = [each for each in records if each.operation == operation]
        assert len(mine) == sum(picture.requests[operation]) == picture.total[operation]
        assert len(mine) == sum(picture.sizes[operation].values())
        moved = sum(each.length for each in mine)
        assert moved == sum(picture.moved[operation])
        shown = sum(map(sum, picture.heat[operation]))
        assert moved - 10 * len(mine) <= shown <= moved  # each is divided among its rows
    bounds, cells = picture.latency_cells()
    assert len(records) == sum(map(sum, cells))
    assert sorted(bounds) == bounds


@given(st.integers(1 << 10, 1 << 35))
def test_a_latency_is_in_its_row(latency):
    picture = Picture(SIZE, 0, 10, 1, 1)
    picture.add(Record(0, READ, 0, latency, 0, 512))
    bounds, cells = picture.latency_cells()
    row = cells[0].index(1)
    assert bounds[row] <= latency < bounds[row + 1]
    assert [bounds[row + 1]] == picture.latency(50)


def test_of_nothing_there_is_no_picture():
    assert span_of([event(STOPPED, 5)]) is None
