"""The layout of a trace: what was packed is unpacked, and nothing else is."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_disk_py.errors import ImageError
from xen_disk_py.trace.format import (
    BATCHED_SIZE,
    BLOCK_HEADER_SIZE,
    FLUSH,
    HEADER_SIZE,
    READ,
    RECORD_SIZE,
    WRITE,
    BlockHeader,
    Damaged,
    Header,
    Record,
    entries,
    pack_batch_into,
    pack_block,
    pack_head,
    pack_record_into,
    unpack_data,
    unpack_records,
)

SEED = bytes(range(16))
NUMBERS = st.integers(0, (1 << 64) - 1)


def header(**changes):
    facts = {"size": 1 << 30, "sector_size": 512, "started": 5, "clock": 7, "id": SEED}
    return Header(**{**facts, **changes})


def whole(block):
    """A block's records and data."""
    head = BlockHeader.parse(block[:BLOCK_HEADER_SIZE])
    body = block[BLOCK_HEADER_SIZE:][: head.body_length]
    records = list(unpack_records(SEED, head, block[:BLOCK_HEADER_SIZE], body))
    return head, records, unpack_data(SEED, head, body, block[BLOCK_HEADER_SIZE + len(body) :])


@given(
    records=st.lists(
        st.tuples(
            *[NUMBERS] * 4,
            st.binary(max_size=20),
            st.integers(0, 0xFFFF),
            st.integers(-1, 100),
            st.integers(0, 254),
        ),
        min_size=1,
    ),
    numbers=st.tuples(NUMBERS, NUMBERS, NUMBERS),
)
def test_a_block_is_what_was_packed(records, numbers):
    data = [each[4] for each in records]
    packed = [(*each[:4], len(each[4]), *each[5:]) for each in records]
    head, found, written = whole(b"".join(pack_block(SEED, *numbers, packed, data)))
    assert numbers == (head.sequence, head.requests, head.flushes)
    assert [it or None for it in data] == written
    assert [(*each[:4], *each[5:]) for each in records] == [
        (r.start, r.latency, r.offset, r.length, r.status, r.queue, r.operation) for r in found
    ]
    assert found[-1].number == numbers[1] + sum(r.is_request for r in found[:-1])


BATCHED = st.tuples(
    st.integers(0, 1 << 40),  # nanoseconds it took
    st.integers(0, (1 << 54) - 1),
    st.integers(1, 1 << 20),
    st.sampled_from((READ, WRITE)),
)


@given(
    requests=st.lists(BATCHED, min_size=1, max_size=40),
    are_alike=st.booleans(),
    began=st.integers(1 << 40, 1 << 62),
    queue=st.integers(-1, 100),
    has_data=st.booleans(),
)
def test_a_batch_is_what_was_packed(requests, are_alike, began, queue, has_data):
    if are_alike:
        requests = [(took, sector, 4096, operation) for took, sector, _, operation in requests]
    written = [length for _, _, length, operation in requests if operation == WRITE and has_data]
    body = bytearray(2 * RECORD_SIZE + len(requests) * BATCHED_SIZE)
    size = pack_batch_into(
        body,
        0,
        began,
        1 << 40,
        [began + sum(took for took, *_ in requests[: n + 1]) for n in range(len(requests))],
        [length for _, _, length, _ in requests],
        [sector * 512 for _, sector, _, _ in requests],
        bytes(operation for *_, operation in requests),
        sum(written),
        queue,
    )
    pack_record_into(body, size, 1, 2, 3, 4, 0, 5, 6, FLUSH)
    body = bytes(body[: size + RECORD_SIZE])
    assert [(size, sum(written), len(requests), 0), (RECORD_SIZE, 0, 1, 0)] == list(entries(body))
    head = pack_head(SEED, 1, 10, 3, body, [])
    known = BlockHeader.parse(head)
    found = list(unpack_records(SEED, known, head, body))
    start = began - (1 << 40)
    for number, (took, sector, length, operation) in enumerate(requests):
        expected = Record(10 + number, operation, start, took, sector * 512, length, 0, queue)
        assert expected == found[number]
        start += took
    assert [Record(10 + len(requests), FLUSH, 1, 2, 3, 4, 5, 6)] == found[len(requests) :]
    if sum(written) < 1 << 20:
        data = bytes(sum(written))
        head = pack_head(SEED, 1, 10, 3, body, [data[:7], data[7:]])
        parts = unpack_data(SEED, BlockHeader.parse(head), body, data)
        assert written == [len(part) for part in parts if part is not None]


@given(body=st.binary(min_size=1, max_size=200), is_batch=st.booleans())
def test_a_body_that_makes_no_sense_is_damaged_or_records(body, is_batch):
    if is_batch:
        body = body.ljust(RECORD_SIZE, b"\0")
        body = body[:24] + bytes([len(body) % 8]) + bytes(7) + body[32:40] + b"\xff" + body[41:]
    head = pack_head(SEED, 0, 0, 0, body, [])
    try:
        for each in unpack_records(SEED, BlockHeader.parse(head), head, body):
            assert each.latency >= 0
    except Damaged:
        pass


@given(at=st.integers(0), bit=st.integers(0, 7))
def test_no_bit_of_a_block_flips_unnoticed(at, bit):
    records = [(1, 2, 512, 4, 4, 0, -1, 1)]
    block = bytearray(b"".join(pack_block(SEED, 1, 2, 3, records, [b"data"])))
    block[at % len(block)] ^= 1 << bit
    with pytest.raises(Damaged):
        whole(bytes(block))


def test_a_block_of_another_trace_does_not_count():
    block = pack_block(b"another trace's!", 0, 0, 0, [(0, 0, 0, 0, 0, 0, 0, 2)], [])
    with pytest.raises(Damaged):
        whole(b"".join(block))


def test_a_header_is_what_was_packed():
    made = header(data=True, guest="vm", path="/x.raw", samples=((0, 1), (4096, 2)))
    assert HEADER_SIZE == len(made.pack())
    assert made == Header.parse(made.pack(), "x")


def test_a_header_without_room_for_the_path_has_none():
    page = header(path="/" + "long/" * 1000, vdev="xvda").pack()
    found = Header.parse(page, "x")
    assert HEADER_SIZE == len(page)
    assert (None, "xvda") == (found.path, found.vdev)


def test_a_future_version_says_what_to_do():
    page = bytearray(header().pack())
    struct.pack_into("<I", page, 16, 3)
    with pytest.raises(ImageError, match=r"version 3.*use the xen-disk that made it"):
        Header.parse(bytes(page), "x")


@pytest.mark.parametrize(
    ("page", "what"),
    [
        (b"", "not a trace"),
        (b"QFI\xfb".ljust(4096, b"\0"), "not a trace"),
        (header().pack()[:100], "cut in its header"),
        (header().pack().replace(b"sector_size", b"sector_sizE"), "checksum"),
        (header(sector_size=3).pack(), "makes no sense"),
        (header(size=-512).pack(), "makes no sense"),
        (header(guest=5).pack(), "makes no sense"),
        (header(ring=100).pack(), "makes no sense"),
        (header(samples=[(1 << 40, 0)]).pack(), "makes no sense"),
        (header(started="now").pack(), "makes no sense"),
    ],
)
def test_what_is_no_header_is_refused(page, what):
    with pytest.raises(ImageError, match=what):
        Header.parse(page, "x")


def test_what_a_later_program_adds_to_the_header_is_left_alone(monkeypatch):
    made = header()
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda facts: dumps({**facts, "colour": "red"}))
    assert made == Header.parse(made.pack(), "x")
