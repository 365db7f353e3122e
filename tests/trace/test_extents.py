"""The map of what was written last, against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.trace import extents as module
from xen_disk_py.trace.extents import Extents
from xen_disk_py.trace.powercut import ZEROS, Extent

SIZE = 24


@pytest.fixture(autouse=True)
def small_regions(monkeypatch):
    monkeypatch.setattr(module, "_REGION", 8)


@st.composite
def writes(draw):
    found = []
    for number in range(draw(st.integers(0, 8))):
        offset = draw(st.integers(0, SIZE - 1))
        length = draw(st.integers(1, SIZE - offset))
        found.append(Extent(offset, length, draw(st.sampled_from([ZEROS, 100 * number]))))
    return found


@given(writes(), st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_the_last_write_counts(found, offset, length):
    length = min(length, SIZE - offset)
    extents, model = Extents(), [None] * SIZE
    for each in found:
        extents.put(each)
        for at in range(each.length):
            model[each.offset + at] = ZEROS if each.source == ZEROS else each.source + at
    seen = []
    for at, count, source in extents.find(offset, length):
        assert offset + len(seen) == at
        seen += [source if source in (None, ZEROS) else source + each for each in range(count)]
    assert model[offset : offset + length] == seen
    assert sum(each.length for each in extents) == SIZE - model.count(None)
    assert extents.count == len(list(extents))
