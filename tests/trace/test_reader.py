"""A trace is read up to where it ends, however that came about."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xen_disk_py.errors import ImageError
from xen_disk_py.trace.format import (
    FLUSH,
    GAP,
    HEADER_SIZE,
    MIN_RING,
    READ,
    RESUMED,
    STOPPED,
    WRITE,
    Header,
    Record,
)
from xen_disk_py.trace.reader import TraceReader
from xen_disk_py.trace.writer import TraceWriter, event


def header(**changes):
    facts = {"size": 1 << 30, "sector_size": 512, "started": 5, "clock": 7, "id": b"s" * 16}
    return Header(**{**facts, **changes})


def write(number, data=b"x" * 512):
    return Record(number, WRITE, number, 1, number * 512, len(data), data=data)


def make(path, *parts, **changes):
    """Make a trace of some blocks."""
    with TraceWriter.create(str(path), header(**changes)) as writer:
        for part in parts:
            writer.append(part)


def resume(path):
    with TraceReader(str(path)) as reader:
        return TraceWriter.resume(os.open(path, os.O_RDWR), reader)


def read(path, *, data=True):
    with TraceReader(str(path)) as reader:
        found = list(reader.records(data=data))
        return found, reader.ending


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "t.xdt"
    written = [write(0), Record(1, FLUSH, 9, 2, 0, 0), Record(2, READ, 3, 4, 0, 8, 5, 1)]
    make(path, written[:1], written[1:], [event(STOPPED, 20, text="asked to")])
    found, ending = read(path)
    assert written == found[:-1]
    assert (True, "asked to") == (ending.is_complete, ending.text)
    bare, ending = read(path, data=False)
    assert [each._replace(data=None) for each in written] == bare[:-1]
    assert "asked to" == ending.text


def test_a_file_for_its_owner_that_is_never_overwritten(tmp_path):
    path = tmp_path / "t.xdt"
    make(path)
    assert 0o600 == path.stat().st_mode & 0o777
    with pytest.raises(ImageError, match="never overwritten"):
        TraceWriter.create(str(path), header())


def test_a_file_that_is_not_there_or_no_trace(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        TraceReader(str(tmp_path / "t.xdt"))
    with pytest.raises(ImageError):
        TraceReader(str(tmp_path))


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The bytes of a trace, its records, and where its blocks end."""
    path = tmp_path_factory.mktemp("trace") / "t.xdt"
    parts = [[write(0)], [write(1), Record(2, FLUSH, 2, 1, 0, 0)], [write(3)]]
    ends = [HEADER_SIZE]
    with TraceWriter.create(str(path), header(data=True)) as writer:
        for part in parts:
            writer.append(part)
            ends.append(writer.at)
    return path, path.read_bytes(), parts, ends


@settings(max_examples=60)
@given(cut=st.integers(HEADER_SIZE), data=st.booleans())
def test_cut_anywhere_it_is_read_up_to_there(trace, cut, data):
    path, content, parts, ends = trace
    cut = HEADER_SIZE + (cut - HEADER_SIZE) % (len(content) - HEADER_SIZE + 1)
    path.with_name("cut").write_bytes(content[:cut])
    found, ending = read(path.with_name("cut"), data=data)
    whole = sum(end <= cut for end in ends[1:])
    expected = [record for part in parts[:whole] for record in part]
    assert expected == (
        found if data else [r._replace(data=e.data) for r, e in zip(found, expected)]
    )
    assert (cut not in ends, ends[whole]) == (ending.is_damaged, ending.at)
    assert ("cut at byte" in ending.text) == ending.is_damaged


@settings(max_examples=60)
@given(at=st.integers(HEADER_SIZE), bit=st.integers(0, 7))
def test_damaged_anywhere_it_is_read_up_to_there(trace, at, bit):
    path, content, parts, ends = trace
    at = HEADER_SIZE + (at - HEADER_SIZE) % (len(content) - HEADER_SIZE)
    bad = bytearray(content)
    bad[at] ^= 1 << bit
    path.with_name("bad").write_bytes(bad)
    found, ending = read(path.with_name("bad"))
    whole = sum(end <= at for end in ends[1:])
    assert [record for part in parts[:whole] for record in part] == found
    assert (True, ends[whole]) == (ending.is_damaged, ending.at)


def test_what_another_process_appends_continues_the_numbers(tmp_path):
    path = tmp_path / "t.xdt"
    make(path, [write(0), Record(1, FLUSH, 2, 1, 0, 0), Record(2, FLUSH, 2, 1, 0, 0, status=5)])
    with path.open("ab") as file:
        file.write(b"half a block")
    with resume(path) as writer:
        writer.append([event(RESUMED, 5), event(GAP, 5), write(3)])
        assert (4, 1) == (writer.requests, writer.flushes)
    found, ending = read(path)
    assert [0, 1, 2, 3, 3, 3] == [each.number for each in found]
    assert not ending.is_damaged


def test_what_an_older_program_has_begun_is_continued(tmp_path):
    path = tmp_path / "t.xdt"
    content = lzma.decompress((Path(__file__).parent / "recorded" / "guest.xdt.xz").read_bytes())
    assert 1 == content[16]
    path.write_bytes(content)
    before, ending = read(path)
    assert ending.is_complete
    with resume(path) as writer:
        writer.append([event(RESUMED, 5), write(7)])
    assert 2 == path.read_bytes()[16]
    after, ending = read(path)
    assert before == after[: len(before)]
    assert [RESUMED, WRITE] == [each.operation for each in after[len(before) :]]
    assert not ending.is_damaged


# -- a ring ------------------------------------------------------------------------------------


def fill(writer, count, start=0, length=1 << 20):
    for number in range(start, start + count):
        writer.append([write(number, number.to_bytes(4, "little") * (length // 4))])


@pytest.mark.parametrize("count", [1, 7, 57, 65, 130])
def test_a_ring_has_the_newest(tmp_path, count):
    path = tmp_path / "t.xdt"
    with TraceWriter.create(str(path), header(data=True, ring=MIN_RING, size=1 << 40)) as writer:
        fill(writer, count)
    assert path.stat().st_size <= HEADER_SIZE + MIN_RING
    with TraceReader(str(path)) as reader:
        found = list(reader.records(data=False))
        first = found[0].number
        assert (first > 0) == reader.lacks_beginning
        assert reader.first is not None
        assert first == reader.first.requests
        assert not reader.ending.is_damaged
    assert list(range(first, count)) == [each.number for each in found]
    assert len(found) >= min(count, 7 * 7)


def test_a_ring_is_continued_where_another_process_stopped(tmp_path):
    path = tmp_path / "t.xdt"
    with TraceWriter.create(str(path), header(data=True, ring=MIN_RING, size=1 << 40)) as writer:
        fill(writer, 70)
    with resume(path) as writer:
        fill(writer, 5, start=70)
    found, ending = read(path)
    assert 74 == found[-1].number
    assert (74).to_bytes(4, "little") == found[-1].data[:4]
    assert not ending.is_damaged


def test_the_block_that_was_being_written_into_a_ring_is_left_out(tmp_path):
    path = tmp_path / "t.xdt"
    with TraceWriter.create(str(path), header(data=True, ring=MIN_RING, size=1 << 40)) as writer:
        fill(writer, 66)
        end = writer.at
    with path.open("r+b") as file:
        file.seek(end - 5)
        file.write(b"?")
    found, _ = read(path)
    assert 64 == found[-1].number
