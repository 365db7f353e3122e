"""A ring and the thread that serves it: every request is answered, once and rightly."""

from __future__ import annotations

import errno
import itertools
import os
import random
import struct
import threading
import time

import pytest

from xen_disk_py.backends import Backend
from xen_disk_py.blkif import (
    ARM,
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    INDIRECT,
    OKAY,
    READ,
    SEGMENTS_PER_PAGE,
    WRITE,
    WRITE_BARRIER,
    X86_32,
    X86_64,
    Connection,
    Discard,
    Indirect,
    Response,
    Transfer,
    encode_segments,
)
from xen_disk_py.disk import Disk
from xen_disk_py.errors import HypervisorError
from xen_disk_py.queue import Queue

ABIS = (X86_64, X86_32, ARM)
SECTORS = 1024  # of the disks here, unless said otherwise
SIZE = SECTORS * 512


def whole(id_, operation, sector, refs):
    """Ask for whole pages."""
    count = len(refs)
    return Transfer(id_, operation, sector, 8 * count, tuple(refs), (0,) * count, (7,) * count)


def one(id_, operation, sector, ref, first=0, last=0):
    """Ask for a part of one page."""
    return Transfer(id_, operation, sector, last - first + 1, (ref,), (first,), (last,))


def raw_direct(abi, operation, count, id_, sector, segments):
    """Lay out what :meth:`Abi.encode` would refuse to: ``count`` need not be right."""
    padding = abi.slot_size - 20 - 88
    head = struct.pack(f"<BBH{padding}xQQ", operation, count, 0, id_, sector)
    return head + encode_segments(segments)


def raw_indirect(abi, operation, count, id_, sector, refs):
    padding = abi.slot_size - 20 - 88
    refs = (*refs, *(0,) * (8 - len(refs)))
    head = struct.pack(f"<BBH{padding}xQQHxx", INDIRECT, operation, count, id_, sector, 0)
    return head + struct.pack("<8I", *refs)


# -- every byte and every response ---------------------------------------------------------


class Model:
    """What a disk must hold, and requests of all kinds with the answers they must get."""

    def __init__(self, line, backend, pages, dice):
        self.line = line
        self.data = bytearray(dice.randbytes(backend.size))
        backend.data[:] = self.data
        self.sectors = backend.size // 512
        self.pages = pages
        self.dice = dice
        self.free = list(range(len(pages.refs)))
        self.expected = []  # (response, pages used, what they must hold then)

    def page(self, index):
        return self.pages.view[4096 * index : 4096 * (index + 1)]

    def take(self, count):
        self.dice.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def step(self):
        """Put one request, if there are pages for it."""
        dice = self.dice
        # Duplicates are legal, and so is all of 64 bits.
        id_ = dice.choice([0, 7, 2**64 - 1, dice.getrandbits(64)])
        kind = dice.choices(["read", "write", "flush", "discard", "refused"], [5, 5, 1, 1, 1])[0]
        if kind == "flush":
            # What Linux has in an empty flush is sector 2**64 - 1.
            sector = dice.choice([0, 2**64 - 1])
            self.put(Transfer(id_, FLUSH, sector, 0, (), (), ()), Response(id_, FLUSH, OKAY))
        elif kind == "discard":
            first = dice.randrange(self.sectors)
            count = dice.randint(1, min(64, self.sectors - first))
            self.data[first * 512 : (first + count) * 512] = bytes(count * 512)
            self.put(
                Discard(id_, DISCARD, first, count, secure=False), Response(id_, DISCARD, OKAY)
            )
        elif kind == "refused":
            self.put(
                one(id_, WRITE, self.sectors - 3, self.pages.refs[0], 0, 3),
                Response(id_, WRITE, ERROR),
            )
        else:
            return self.transfer(id_, READ if kind == "read" else WRITE)
        return True

    def transfer(self, id_, operation):
        dice = self.dice
        count = dice.choice([1, dice.randint(1, 11), dice.randint(1, 256)])
        indirect = count > 11 or dice.random() < 0.2
        used = self.take(count + indirect)
        if len(used) < count + indirect:
            self.free += used
            return False
        data = used[:count]
        if dice.random() < 0.4:
            firsts, lasts = [0] * count, [7] * count
        else:
            firsts = [dice.randint(0, 7) for _ in data]
            lasts = [dice.randint(first, 7) for first in firsts]
        sectors = sum(lasts) - sum(firsts) + count
        sector = dice.randint(0, self.sectors - sectors)
        contents = []
        at = sector * 512
        for index, first, last in zip(data, firsts, lasts):
            page = self.page(index)
            page[:] = dice.randbytes(4096)
            start, stop = first * 512, (last + 1) * 512
            content = bytearray(page)
            if operation == READ:  # and what is outside of the segment stays
                content[start:stop] = self.data[at : at + stop - start]
            else:
                self.data[at : at + stop - start] = content[start:stop]
            contents.append(content)
            at += stop - start
        refs = tuple(self.pages.refs[index] for index in data)
        if indirect:
            segments = encode_segments(list(zip(refs, firsts, lasts)))
            self.page(used[-1])[: len(segments)] = segments
            request = Indirect(id_, operation, sector, count, (self.pages.refs[used[-1]],))
        else:
            request = Transfer(id_, operation, sector, sectors, refs, tuple(firsts), tuple(lasts))
        self.put(request, Response(id_, operation, OKAY), used, contents)
        return True

    def put(self, request, response, used=(), contents=()):
        self.line.put(request)
        self.expected.append((response, used, contents))

    def collect(self):
        self.line.kick()
        answers = self.line.responses(len(self.expected))
        for answer, (response, used, contents) in zip(answers, self.expected):
            assert response == answer
            for index, content in zip(used, contents):
                assert content == self.page(index)
            self.free += used
        self.expected = []


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("persistent", [False, True], ids=["mapped-anew", "persistent"])
@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_model(host, abi, persistent, order):
    dice = random.Random(f"{abi.name}{persistent}{order}")
    backend = host.memory(2 << 20)
    line = host.line(backend, abi, order=order, persistent=persistent)
    model = Model(line, backend, host.share(600), dice)
    for _ in range(8):
        for _ in range(dice.choice([1, 5, line.ring.slots])):
            if not (line.ring.free and model.step()):
                break
        model.collect()
        if not persistent:
            assert host.hypervisor.mapped_pages == 1 << order  # the ring
    assert model.data == backend.data
    assert not line.failures


@pytest.mark.parametrize("order", [0, 4])
def test_a_full_ring(host, order):
    backend = host.memory(SIZE)
    line = host.line(backend, order=order)
    ref = host.share().refs[0]
    slots = line.ring.slots
    for _ in range(3):
        requests = [one(i, READ, i % SECTORS, ref) for i in range(slots)]
        assert [Response(i, READ, OKAY) for i in range(slots)] == line.ask(*requests)
    assert line.disk.statistics.as_dict()["reads"] == 3 * slots


def test_requests_that_wait_already_when_the_queue_starts(host):
    """A frontend may put requests before it is told that it is connected."""
    disk = Disk(host.memory(SIZE))
    pages, channel = host.share(), host.guest.bind_unbound(0)
    data = host.share()
    from xen_disk_py.ring import FrontRing

    ring = FrontRing(pages.view, X86_64.slot_size, host.guest.fence)
    ring.put(X86_64.encode(one(1, READ, 0, data.refs[0])))
    ring.push()
    queue = Queue(
        host.hypervisor,
        host.DOMID,
        Connection(tuple(pages.refs), channel.port),
        X86_64,
        disk,
        max_indirect_segments=0,
        persistent_limit=0,
        on_failure=print,
    )
    queue.start()
    host.until(ring.take)
    assert queue.stop()
    assert queue.stop()  # once more does no harm
    ring.close()
    channel.close()


def test_a_queue_that_never_starts(host):
    pages, channel = host.share(), host.guest.bind_unbound(0)
    queue = Queue(
        host.hypervisor,
        host.DOMID,
        Connection(tuple(pages.refs), channel.port),
        X86_64,
        Disk(host.memory()),
        max_indirect_segments=0,
        persistent_limit=0,
        on_failure=print,
    )
    assert queue.stop()
    channel.close()


# -- requests that must not reach the disk -------------------------------------------------


def bad_segments(first, last):
    return pytest.param(
        lambda abi, ref: raw_direct(abi, READ, 1, 99, 0, [(ref, first, last)]),
        READ,
        ERROR,
        id=f"segment-{first}-{last}",
    )


def bad_operation(operation):
    return pytest.param(
        lambda abi, ref: raw_direct(abi, operation, 1, 99, 0, [(ref, 0, 0)]),
        operation,
        EOPNOTSUPP,
        id=f"operation-{operation}",
    )


def bad_count(count, operation=READ):
    return pytest.param(
        lambda abi, ref: raw_direct(abi, operation, count, 99, 0, [(ref, 0, 0)] * 11),
        operation,
        ERROR,
        id=f"operation-{operation}-of-{count}",
    )


def bad_place(sector, operation, last=0):
    return pytest.param(
        lambda abi, ref: abi.encode(one(99, operation, sector, ref, 0, last)),
        operation,
        ERROR,
        id=f"operation-{operation}-at-{sector}-{last}",
    )


def bad_discard(sector, sectors, status=ERROR, *, secure=False):
    return pytest.param(
        lambda abi, ref: abi.encode(Discard(99, DISCARD, sector, sectors, secure=secure)),
        DISCARD,
        status,
        id=f"discard-{sector}-{sectors}-{secure}",
    )


def bad_indirect(operation, count, answered=None):
    return pytest.param(
        lambda abi, ref: raw_indirect(abi, operation, count, 99, 0, (ref,) * 8),
        operation,
        ERROR,
        id=f"indirect-{operation}-of-{count}",
    )


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
@pytest.mark.parametrize(
    ("request_of", "operation", "status"),
    [
        bad_segments(1, 0),
        bad_segments(7, 0),
        bad_segments(0, 8),
        bad_segments(8, 8),
        bad_segments(255, 255),
        bad_segments(0, 255),
        *map(bad_operation, [WRITE_BARRIER, 4, 7, 17, 255]),
        *map(bad_count, [0, 12, 255]),
        bad_count(0, WRITE),
        bad_count(12, FLUSH),
        bad_place(SECTORS, READ),
        bad_place(SECTORS - 1, READ, 1),
        bad_place(SECTORS - 7, WRITE, 7),
        bad_place(2**64 - 1, READ),
        bad_place(2**64 - 8, WRITE, 7),
        bad_place(2**63, WRITE),
        bad_place(2**64 - 1, FLUSH),
        bad_discard(SECTORS, 1),
        bad_discard(0, SECTORS + 1),
        bad_discard(1, 2**64 - 1),
        bad_discard(2**64 - 1, 2),
        bad_discard(0, 8, EOPNOTSUPP, secure=True),
        *[bad_indirect(READ, count) for count in (0, 257, 65535)],
        *[bad_indirect(operation, 1) for operation in (FLUSH, DISCARD, INDIRECT, 255)],
    ],
)
def test_refused(host, abi, request_of, operation, status):
    """It is answered with its id, nothing is mapped for it, and the next one works."""
    backend = host.memory(SIZE)
    line = host.line(backend, abi)
    pages = host.share()
    ref = pages.refs[0]
    maps = host.hypervisor.counters.maps
    assert Response(99, operation, status) == line.ask(request_of(abi, ref))
    assert maps == host.hypervisor.counters.maps
    assert not backend.calls
    assert line.disk.statistics.as_dict()["refused"] == 1
    assert Response(100, READ, OKAY) == line.ask(one(100, READ, SECTORS - 1, ref))
    assert not line.failures


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_refused_once_its_segments_are_read(host, operation):
    """Of an indirect request one page must be mapped to see what it is; and no other."""
    backend = host.memory(SIZE)
    line = host.line(backend)
    pages = host.share(2)
    maps = host.hypervisor.counters.maps
    wrong = [[(pages.refs[1], 3, 2)], [(pages.refs[1], 0, 8)], [(pages.refs[1], 0, 7)] * 200]
    for segments in wrong:
        pages.view[: 8 * len(segments)] = encode_segments(segments)
        request = Indirect(5, operation, 0, len(segments), (pages.refs[0],))
        assert Response(5, operation, ERROR) == line.ask(request)
    assert host.hypervisor.counters.maps == maps + len(wrong)
    assert host.guest.in_use(pages.refs) == 0
    assert not backend.calls
    assert Response(6, READ, OKAY) == line.ask(one(6, READ, 0, pages.refs[1]))


def test_an_indirect_request_that_was_not_offered(host):
    line = host.line(host.memory(SIZE), max_indirect_segments=0)
    ref = host.share().refs[0]
    request = raw_indirect(X86_64, READ, 1, 5, 0, (ref,))
    assert Response(5, READ, EOPNOTSUPP)._replace(operation=INDIRECT) == line.ask(request)


def test_eight_pages_of_segments(host):
    """More than is offered by default; whole and partly filled pages of descriptors."""
    backend = host.memory(4 << 20)
    line = host.line(backend, max_indirect_segments=4096)
    count = SEGMENTS_PER_PAGE + 100
    pages, indirect = host.share(count), host.share(2)
    backend.data[:] = random.Random(1).randbytes(4 << 20)
    segments = encode_segments([(ref, 0, 7) for ref in pages.refs])
    indirect.view[: len(segments)] = segments
    request = Indirect(1, READ, 8, count, tuple(indirect.refs))
    assert Response(1, READ, OKAY) == line.ask(request)
    assert backend.data[4096 : 4096 + count * 4096] == pages.view


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_read_only(host, abi):
    """No kind of write reaches the disk, whatever the frontend may believe (XSA-142)."""
    backend = host.memory(SIZE, read_only=True)
    line = host.line(backend, abi)
    pages = host.share(2)
    pages.view[:8] = encode_segments([(pages.refs[1], 0, 0)])
    maps = host.hypervisor.counters.maps
    refused = [
        one(1, WRITE, 0, pages.refs[1]),
        one(2, FLUSH, 0, pages.refs[1]),
        Discard(3, DISCARD, 0, 8, secure=False),
        Discard(4, DISCARD, 0, 8, secure=True),
    ]
    assert [
        Response(1, WRITE, ERROR),
        Response(2, FLUSH, ERROR),
        Response(3, DISCARD, ERROR),
        Response(4, DISCARD, ERROR),
    ] == line.ask(*refused)
    assert maps == host.hypervisor.counters.maps
    barrier = raw_direct(abi, WRITE_BARRIER, 1, 5, 0, [(pages.refs[1], 0, 0)])
    assert Response(5, WRITE_BARRIER, EOPNOTSUPP) == line.ask(barrier)
    assert Response(6, WRITE, ERROR) == line.ask(Indirect(6, WRITE, 0, 1, (pages.refs[0],)))
    assert not backend.calls
    assert Response(7, FLUSH, OKAY) == line.ask(Transfer(7, FLUSH, 2**64 - 1, 0, (), (), ()))
    assert Response(8, READ, OKAY) == line.ask(one(8, READ, 0, pages.refs[1]))


def test_alignment_to_larger_sectors(host):
    backend = host.memory(SIZE, sector_size=4096)
    line = host.line(backend)
    ref = host.share().refs[0]
    requests = [
        one(1, READ, 0, ref, 0, 7),
        one(2, READ, 8, ref, 0, 0),
        one(3, READ, 4, ref, 0, 7),
        one(4, WRITE, 0, ref, 1, 7),
        Discard(5, DISCARD, 4, 8, secure=False),
        Discard(6, DISCARD, 8, 4, secure=False),
        Discard(7, DISCARD, 8, 8, secure=False),
        Transfer(8, FLUSH, 2**64 - 1, 0, (), (), ()),
    ]
    expected = [OKAY, ERROR, ERROR, ERROR, ERROR, ERROR, OKAY, OKAY]
    assert expected == [answer.status for answer in line.ask(*requests)]
    assert [("read", 0, 4096), ("discard", 4096, 4096), ("flush", 0, 0)] == backend.calls


def test_a_flush_with_data(host):
    """The data is written, then flushed, as Linux and QEMU do."""
    backend = host.memory(SIZE)
    line = host.line(backend)
    pages = host.share()
    pages.view[:512] = b"f" * 512
    assert Response(1, FLUSH, OKAY) == line.ask(one(1, FLUSH, 3, pages.refs[0]))
    assert b"f" * 512 == backend.data[1536:2048]
    assert ("flush", 0, 0) == backend.calls[-1]


def test_ten_thousand_refusals_leave_nothing(host):
    """XSA-71: error paths release everything."""
    line = host.line(host.memory(SIZE), order=4)
    pages = host.share(2)
    pages.view[:8] = encode_segments([(pages.refs[1], 3, 2)])
    wrong = itertools.cycle(
        [
            one(1, WRITE, SECTORS, pages.refs[0]),
            Indirect(1, READ, 0, 1, (pages.refs[0],)),
            one(1, READ, 0, 3),
            Indirect(1, READ, 0, 1, (3,)),
        ]
    )
    for _ in range(20):
        answers = line.ask(*itertools.islice(wrong, 512))
        assert {ERROR} == {answer.status for answer in answers}
    assert host.hypervisor.mapped_pages == 16
    assert line.disk.statistics.as_dict()["refused"] == 20 * 512


def test_the_rest_of_a_slot_stays_as_it_was(host):
    """XSA-216: a response is 12 bytes, none of them of ours beyond id, operation, status."""
    for abi in ABIS:
        line = host.line(host.memory(SIZE), abi)
        ref = host.share().refs[0]
        line.pages.view[64:] = b"\xa5" * (4096 - 64)
        slot = abi.encode(one(0x1122334455667788, READ, 1, ref, 2, 3))
        line.ask(slot)
        after = bytes(line.pages.view[64 : 64 + abi.slot_size])
        assert struct.pack("<QBxh", 0x1122334455667788, READ, OKAY) + slot[12:] == after
        assert b"\xa5" * (4096 - 64 - abi.slot_size) == line.pages.view[64 + abi.slot_size :]


# -- grants that do not work ---------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_a_bad_reference(host, persistent, operation):
    backend = host.memory(SIZE)
    line = host.line(backend, persistent=persistent)
    pages = host.share(4)
    good = pages.refs[0]
    for bad in (0, 3, 5000, 2**32 - 1):
        for place in range(3):
            refs = list(pages.refs[:3])
            refs[place] = bad
            assert Response(7, operation, ERROR) == line.ask(whole(7, operation, 0, refs))
    assert Response(8, operation, ERROR) == line.ask(Indirect(8, operation, 0, 20, (3,)))
    assert host.guest.in_use(pages.refs) == 0
    assert host.hypervisor.mapped_pages == 1
    assert not backend.calls
    assert Response(9, operation, OKAY) == line.ask(one(9, operation, 0, good))


def test_a_read_into_a_page_that_is_granted_for_reading_only(host):
    line = host.line(host.memory(SIZE))
    ref = host.share(writable=False).refs[0]
    assert Response(1, READ, ERROR) == line.ask(one(1, READ, 0, ref))
    assert Response(2, WRITE, OKAY) == line.ask(one(2, WRITE, 0, ref))


def test_an_error_of_each_single_mapping(host):
    """XSA-361 and after: whatever fails, what was mapped is unmapped, and no more."""
    line = host.line(host.memory(SIZE))
    pages = host.share(2)
    pages.view[:8] = encode_segments([(pages.refs[1], 0, 7)])
    for failing in range(3):
        numbers = itertools.count()

        def refuse(domid, refs, writable, numbers=numbers, failing=failing):
            if next(numbers) == failing:
                raise HypervisorError(errno.EAGAIN, "cannot map")

        host.hypervisor.before_map = refuse
        request = Indirect(1, READ, 0, 1, (pages.refs[0],))  # takes two mappings
        status = OKAY if failing == 2 else ERROR
        assert Response(1, READ, status) == line.ask(request)
        assert host.hypervisor.mapped_pages == 1
    host.hypervisor.before_map = None


def test_nothing_is_in_use_when_the_answer_is_there(host):
    """Linux gives a disk up for good if a page is still mapped when its response arrives."""
    line = host.line(host.memory(SIZE))
    pages = host.share(40)
    pages.view[: 8 * 20] = encode_segments([(ref, 0, 7) for ref in pages.refs[20:]])
    push, in_use = line.queue._ring.push, []

    def looking():
        in_use.append(host.guest.in_use(pages.refs))
        return push()

    line.queue._ring.push = looking
    requests = [
        whole(1, READ, 0, pages.refs[1:11]),
        whole(2, WRITE, 0, pages.refs[1:11]),
        Indirect(3, READ, 0, 20, (pages.refs[0],)),
        Indirect(4, WRITE, 9999, 20, (pages.refs[0],)),
        whole(5, READ, 0, (pages.refs[1], 3)),
    ]
    line.ask(*requests)
    for request in requests:
        line.ask(request)
    assert {0} == set(in_use)


def test_persistent_pages_are_mapped_once(host):
    line = host.line(host.memory(SIZE), persistent=True)
    pages = host.share(8)
    line.ask(whole(1, WRITE, 0, pages.refs))
    maps = host.hypervisor.counters.maps
    for _ in range(50):
        assert Response(2, READ, OKAY) == line.ask(whole(2, READ, 0, pages.refs))
    assert maps == host.hypervisor.counters.maps
    assert host.guest.in_use(pages.refs) == 8
    assert host.hypervisor.mapped_pages == 9


def test_the_limit_of_persistent_pages(host):
    line = host.line(host.memory(SIZE), persistent=True, limit=8)
    pages = host.share(20)
    assert Response(1, READ, OKAY) == line.ask(whole(1, READ, 0, pages.refs[:6]))
    assert host.hypervisor.mapped_pages == 1 + 6
    assert Response(2, READ, OKAY) == line.ask(whole(2, READ, 0, pages.refs[3:10]))
    assert host.hypervisor.mapped_pages == 1 + 6  # four more are too many: for once only
    assert Response(3, READ, OKAY) == line.ask(whole(3, READ, 0, pages.refs[6:8]))
    assert host.hypervisor.mapped_pages == 1 + 8
    assert Response(4, READ, OKAY) == line.ask(whole(4, READ, 0, pages.refs[8:19]))
    assert host.hypervisor.mapped_pages == 1 + 8


# -- backends that misbehave ---------------------------------------------------------------


class Broken(Backend):
    """Does what it is told to do wrong, then is well again."""

    size = SIZE

    def __init__(self):
        self.fault = None
        self.kept = []

    def read(self, buffers, offset):
        if self.fault == "exit":
            raise SystemExit(3)
        if self.fault == "raise":
            raise ValueError("no such thing")
        if self.fault == "keep":
            self.kept.append(buffers[0])
        if self.fault == "short":
            return 100
        return None

    def write(self, buffers, offset):
        self.read(buffers, offset)
        return sum(map(len, buffers)) - 1 if self.fault == "short" else None

    def flush(self):
        self.read((), 0)

    def discard(self, offset, length):
        self.read((), 0)

    @property
    def memory(self):
        if self.fault == "memory":
            raise AttributeError("nothing")
        return 0


@pytest.mark.parametrize("persistent", [False, True])
def test_a_backend_that_fails(host, persistent):
    backend = Broken()
    line = host.line(backend, persistent=persistent)
    ref = host.share().refs[0]
    requests = [
        one(1, READ, 0, ref),
        one(2, WRITE, 0, ref),
        Transfer(3, FLUSH, 0, 0, (), (), ()),
        one(4, FLUSH, 0, ref),
        Discard(5, DISCARD, 0, 8, secure=False),
    ]
    for fault, failing in [("raise", 5), ("exit", 5), ("short", 3), ("memory", 0), (None, 0)]:
        backend.fault = fault
        errors = line.disk.statistics.as_dict()["errors"]
        answers = line.ask(*requests)
        assert [1, 2, 3, 4, 5] == [answer.id for answer in answers]
        assert failing == [answer.status for answer in answers].count(ERROR)
        assert line.disk.statistics.as_dict()["errors"] == errors + failing
        assert host.hypervisor.mapped_pages == 1 + persistent
    assert not line.failures


def test_a_backend_that_keeps_a_buffer(host, caplog):
    """The pages cannot be unmapped then; that is logged, once, and the disk lives on."""
    backend = Broken()
    line = host.line(backend)
    pages = host.share(4)
    backend.fault = "keep"
    for id_, ref in enumerate(pages.refs):
        assert Response(id_, READ, OKAY) == line.ask(one(id_, READ, 0, ref))
    assert host.hypervisor.mapped_pages == 1 + 4
    backend.fault = None
    assert Response(9, READ, OKAY) == line.ask(one(9, READ, 0, pages.refs[0]))
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert ["a buffer was kept after its request: 1 pages stay mapped"] == [
        record.getMessage() for record in warnings
    ]
    backend.kept.clear()  # then they are unmapped at the end: the fixture looks


def test_a_backend_that_keeps_a_buffer_for_ever(host, caplog):
    backend = Broken()
    line = host.line(backend, persistent=True)
    pages = host.share()
    backend.fault = "keep"
    line.ask(one(1, READ, 0, pages.refs[0]))
    assert line.queue.stop()
    assert host.hypervisor.mapped_pages == 1  # and the ring is not
    assert "a buffer was kept" in caplog.text
    backend.kept.clear()
    host.hypervisor.close()


def test_a_backend_that_takes_its_time_to_stop(host):
    backend = host.memory(SIZE)
    entered, allowed = threading.Event(), threading.Event()
    read = backend.read

    def slow(buffers, offset):
        entered.set()
        allowed.wait(5)
        read(buffers, offset)

    backend.read = slow
    line = host.line(backend)
    ref = host.share().refs[0]
    line.put(one(1, READ, 0, ref), one(2, READ, 0, ref))
    line.kick()
    assert entered.wait(5)
    start = time.monotonic()
    assert not line.queue.stop(0.05)
    assert not line.queue.stop(0.05)
    assert time.monotonic() - start < 1
    assert host.hypervisor.mapped_pages == 2  # nothing is taken away from under it
    allowed.set()
    assert line.queue.stop(5)
    assert 2 == len(line.responses(2))  # what was taken is finished and answered
    assert host.hypervisor.mapped_pages == 0


def test_what_waits_when_it_is_cut_off_is_refused(host):
    """Linux does not finish removing a disk while one request of it is unanswered."""
    backend = host.memory(SIZE)
    entered, allowed = threading.Event(), threading.Event()
    backend.flush = lambda: entered.set() or (allowed.wait(5) and None)
    line = host.line(backend)
    ref = host.share().refs[0]
    line.put(Transfer(1, FLUSH, 0, 0, (), (), ()))
    line.kick()
    assert entered.wait(5)
    line.put(one(2, READ, 0, ref), Discard(3, DISCARD, 0, 8, secure=False), b"\7" * 112)
    line.kick()
    assert not line.queue.stop(0.01)
    allowed.set()
    assert line.queue.stop(5)
    expected = [(1, OKAY), (2, ERROR), (3, ERROR), (0x0707070707070707, ERROR)]
    assert expected == [(answer.id, answer.status) for answer in line.responses(4)]
    assert not backend.calls


class CutShortError(BaseException):
    """What a signal's handler may raise anywhere."""


@pytest.mark.parametrize("where", ["_ended.wait", "_thread.join"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_that_is_cut_short(host, monkeypatch, where, when):
    """It can be done again from wherever it was."""
    line = host.line(host.memory(SIZE), persistent=True)
    pages = host.share()
    line.ask(one(1, READ, 0, pages.refs[0]))
    part, name = where.split(".")
    done = getattr(getattr(line.queue, part), name)

    def interrupted(*args):
        if when == "after":
            done(*args)
        monkeypatch.undo()
        raise CutShortError

    monkeypatch.setattr(getattr(line.queue, part), name, interrupted)
    with pytest.raises(CutShortError):
        line.queue.stop()
    assert line.queue.stop(5)
    assert host.hypervisor.mapped_pages == 0


def test_everything_is_unmapped_where_no_signal_is_handled(host, monkeypatch):
    line = host.line(host.memory(SIZE), persistent=True)
    threads = []
    for part in (line.queue._pages, line.queue._ring, line.queue._channel):
        done = part.close

        def close(done=done):
            threads.append(threading.current_thread())
            done()

        monkeypatch.setattr(part, "close", close)
    assert line.queue.stop(5)
    assert [line.queue._thread] * 3 == threads


# -- guests that misbehave -----------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 7, 2**32 - 3])
@pytest.mark.parametrize("ahead", [33, 34, 2**31, 2**32 - 1])
def test_a_producer_index_out_of_bounds(host, caplog, start, ahead):
    """The ring is served no longer, at no cost, and can be taken down as ever."""
    backend = host.memory(SIZE)
    line = host.line(backend)
    ref = host.share().refs[0]
    if start:
        line.queue.stop()
        struct.pack_into("<4I", line.pages.view, 0, start, start + 1 & 2**32 - 1, start, 0)
        line.pages.view[:16].cast("I")[3] = start + 1 & 2**32 - 1
        line.queue = Queue(
            host.hypervisor,
            host.DOMID,
            Connection(tuple(line.pages.refs), line.channel.port),
            X86_64,
            line.disk,
            max_indirect_segments=0,
            persistent_limit=0,
            on_failure=line.failures.append,
        )
        line.queue.start()
    slot = X86_64.encode(one(1, READ, 0, ref))
    for index in range(32):
        line.pages.view[64 + 112 * index :][:112] = slot
    with line.pages.view[:16].cast("I") as indices:
        indices[0] = start + 32 & 2**32 - 1  # exactly full is legal
        line.channel.notify()
        host.until(lambda: indices[2] == start + 32 & 2**32 - 1)
        calls = len(backend.calls)
        assert calls == 32
        indices[0] = start + 32 + ahead & 2**32 - 1
        line.channel.notify()
        host.until(lambda: "not served any longer" in caplog.text)
        before = time.process_time()
        for _ in range(5):
            line.channel.notify()
            time.sleep(0.01)
        assert time.process_time() - before < 0.04
        assert indices[2] == start + 32 & 2**32 - 1
    assert calls == len(backend.calls)
    assert not line.failures
    assert line.queue.stop(5)


def test_segments_that_change_while_they_are_read(host):
    """XSA-155: what is decided upon is a private copy."""
    backend = host.memory(SIZE)
    line = host.line(backend)
    pages = host.share(3)
    good = encode_segments([(pages.refs[1], 0, 7)] * 100)
    bad = encode_segments([(3, 9, 200)] * 100)
    pages.view[: len(good)] = good
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            pages.view[: len(bad)] = bad
            pages.view[: len(good)] = good

    flipper = threading.Thread(target=flip)
    flipper.start()
    statuses = set()
    for id_ in range(100):
        answer = line.ask(Indirect(id_, WRITE, 0, 100, (pages.refs[0],)))
        assert (id_, WRITE) == answer[:2]
        statuses.add(answer.status)
    stop.set()
    flipper.join()
    assert statuses <= {OKAY, ERROR}
    assert {("write", 0, 409600)} >= set(backend.calls)
    assert not line.failures


def test_a_slot_is_read_once(host, monkeypatch):
    """What the guest writes into it after that changes nothing (XSA-155)."""
    backend = host.memory(SIZE)
    line = host.line(backend)
    pages = host.share()
    take = line.queue._ring.take

    def overwritten():
        slots = take()
        if slots:
            line.pages.view[64:] = b"\xff" * (4096 - 64)
        return slots

    monkeypatch.setattr(line.queue._ring, "take", overwritten)
    line.ask(one(1, READ, 3, pages.refs[0]))  # the loop has the method in hand by now
    assert Response(2, READ, OKAY) == line.ask(one(2, READ, 4, pages.refs[0], 2, 3))
    assert ("read", 2048, 1024) == backend.calls[-1]


def test_an_event_storm(host):
    """Events without requests wake the thread, and that is all."""
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    for id_ in range(200):
        line.channel.notify()
        if id_ % 20 == 0:
            assert Response(id_, READ, OKAY) == line.ask(one(id_, READ, 0, ref))
    assert not line.failures


def test_random_slots(host):
    """Any 112 bytes are answered with the id that is in them."""
    dice = random.Random(4)
    line = host.line(host.memory(SIZE), order=2)
    for _ in range(30):
        slots = [
            bytes([dice.choice([0, 1, 3, 5, 6, dice.randrange(256)]), dice.randrange(256)])
            + dice.randbytes(110)
            for _ in range(100)
        ]
        answers = line.ask(*slots)
        assert [slot[8:16] for slot in slots] == [
            answer.id.to_bytes(8, "little") for answer in answers
        ]
        assert {ERROR, EOPNOTSUPP} >= {
            a.status for a, slot in zip(answers, slots) if slot[0] != FLUSH
        }
    assert not line.failures


# -- the thread itself ---------------------------------------------------------------------


def test_a_failure_of_our_own_is_told(host, monkeypatch):
    line = host.line(host.memory(SIZE))

    def broken():
        raise HypervisorError(errno.EIO, "cannot notify")

    monkeypatch.setattr(line.queue._channel, "notify", broken)
    ref = host.share().refs[0]
    line.put(one(1, READ, 0, ref))
    line.kick()
    host.until(lambda: line.failures)
    assert "cannot notify" in str(line.failures[0])
    assert line.queue.stop(5)


def test_an_idle_queue_sleeps(host):
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    line.ask(one(1, READ, 0, ref))
    time.sleep(0.02)
    wakeups = line.disk.statistics.as_dict()["wakeups"]
    time.sleep(0.05)
    assert wakeups == line.disk.statistics.as_dict()["wakeups"]


def test_no_wake_up_is_lost(host):
    """One request at a time, each as soon as the last is answered."""
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    for id_ in range(3000):
        assert id_ == line.ask(one(id_, READ, 0, ref)).id


def test_the_frontend_is_notified_only_if_it_asks(host):
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    line.ask(one(1, READ, 0, ref))
    notifications = host.hypervisor.counters.notifications
    with line.pages.view[:16].cast("I") as indices:
        indices[3] = indices[2] + 3  # wants to hear of the third response only
        for count in (1, 2):
            line.put(one(count, READ, 0, ref))
            line.kick()
            host.until(lambda count=count: indices[2] == 1 + count)
        time.sleep(0.01)
        assert notifications == host.hypervisor.counters.notifications
        line.put(one(3, READ, 0, ref))
        line.kick()
        host.until(lambda: host.hypervisor.counters.notifications == notifications + 1)
    assert [1, 2, 3] == [answer.id for answer in line.responses(3)]


@pytest.mark.parametrize("wrong", ["ring", "channel", "pipe"])
def test_a_queue_that_cannot_be_made(host, monkeypatch, wrong):
    """Nothing of it is left."""
    pages, channel = host.share(2), host.guest.bind_unbound(0)
    refs, port = tuple(pages.refs), channel.port
    error = HypervisorError
    if wrong == "ring":
        refs = (refs[0], 3)
    elif wrong == "channel":
        port = 9999
    else:
        error = OSError

        def full(flags):
            raise OSError(errno.EMFILE, "too many")

        monkeypatch.setattr(os, "pipe2", full)
    with pytest.raises(error):
        Queue(
            host.hypervisor,
            host.DOMID,
            Connection(refs, port),
            X86_64,
            Disk(host.memory()),
            max_indirect_segments=0,
            persistent_limit=0,
            on_failure=print,
        )
    assert host.hypervisor.mapped_pages == 0
    host.hypervisor.bind_interdomain(host.DOMID, channel.port).close()  # it is free again
    channel.close()


def test_statistics(host):
    line = host.line(host.memory(SIZE))
    pages = host.share(3)
    line.ask(
        whole(1, READ, 0, pages.refs),
        one(2, WRITE, 0, pages.refs[0]),
        Transfer(3, FLUSH, 0, 0, (), (), ()),
        Discard(4, DISCARD, 0, 8, secure=False),
        one(5, READ, SECTORS, pages.refs[0]),
    )
    counters = line.disk.statistics.as_dict()
    expected = {
        "requests": 5,
        "reads": 1,
        "writes": 1,
        "flushes": 1,
        "discards": 1,
        "refused": 1,
        "errors": 0,
        "bytes_read": 12288,
        "bytes_written": 512,
        "bytes_discarded": 4096,
        "in_flight": 0,
    }
    host.until(lambda: line.disk.statistics.as_dict()["in_flight"] == 0)
    assert expected == {name: counters[name] for name in expected}
    # one segment (the flush has none, but counts there), three, and five requests at once
    assert [2, 0, 1] == line.disk.statistics.segments_per_request[:3]
    assert [0, 0, 0, 1] == line.disk.statistics.requests_per_batch[:4]
