"""A ring and the thread that serves it: every request is answered, once and rightly."""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import random
import select
import struct
import threading
import time
from types import SimpleNamespace

import pytest
from long_run import repeat

from xen_disk_py.backends import Backend
from xen_disk_py.backends.asynchronous import Asynchronous
from xen_disk_py.blkif import (
    ARM,
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    FLUSH_FAILED,
    INDIRECT,
    OKAY,
    READ,
    SEGMENTS_PER_PAGE,
    WRITE,
    WRITE_BARRIER,
    X86_32,
    X86_64,
    Discard,
    Indirect,
    Response,
    Ring,
    Transfer,
    decode_response,
    encode_response,
    encode_segments,
)
from xen_disk_py.datapath import disk as disk_module
from xen_disk_py.datapath import grants, idle, joining, polling, queue_thread, retry, stall
from xen_disk_py.datapath import queue as queue_module
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.journal import SIZE as JOURNAL_SIZE
from xen_disk_py.datapath.journal import Journal
from xen_disk_py.datapath.queue import Options, Queue
from xen_disk_py.errors import BackendError, DeviceError, HypervisorError
from xen_disk_py.ring import BackRing, FrontRing

pytestmark = pytest.mark.shared
ABIS = (X86_64, X86_32, ARM)
KEPT = {"persistent": True}
COPIED = {"grants": Grants.COPY}
MAPPED = {"grants": Grants.MAP}
every_way = pytest.mark.parametrize("way", [KEPT, COPIED, MAPPED], ids=["kept", "copied", "mapped"])
SECTORS = 1024  # of the disks here, unless said otherwise
SIZE = SECTORS * 512
PATIENCE = 30.0  # seconds for what must happen to happen
LONG = 2 * PATIENCE  # seconds for what is not to happen before something else


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


def queue_of(host, refs, port, disk, on_failure=print, journal=None, number=0):
    """Make a queue that is not started."""
    return Queue(
        host.hypervisor,
        host.DOMID,
        Ring(tuple(refs), port),
        X86_64,
        disk,
        options=Options(),
        persistent=False,
        number=number,
        journal=journal,
        statistics=disk.statistics.of_queue(number),
        on_failure=on_failure,
    )


def spy(monkeypatch, place, name):
    """Note the arguments that something is called with."""
    done, calls = getattr(place, name), []

    def noting(*args, **options):
        calls.append(args)
        return done(*args, **options)

    monkeypatch.setattr(place, name, noting)
    return calls


# -- every byte and every response ---------------------------------------------------------


class Model:
    """What a disk must hold, and requests of all kinds with the answers they must get.

    Args:
        overtaking: requests may be done in any order. Then no two that are asked for at once
            have a sector in common.
    """

    def __init__(self, line, backend, pages, dice, *, overtaking):
        self.line = line
        self.data = bytearray(dice.randbytes(backend.size))
        backend.data[:] = self.data
        self.sectors = backend.size // 512
        self.pages = pages
        self.dice = dice
        self.overtaking = overtaking
        self.free = list(range(len(pages.refs)))
        self.runs = []  # pages and segments that were used before
        self.next = 0  # the sector behind the last that was asked for
        self.transfers = 0
        self.expected = []  # (response, pages used, what they must hold then)

    def page(self, index):
        return self.pages.view[4096 * index : 4096 * (index + 1)]

    def step(self):
        """Put one request, if there are pages for it."""
        dice = self.dice
        # Duplicates are legal, and so is all of 64 bits.
        id_ = dice.getrandbits(64)
        if not self.overtaking:
            id_ = dice.choice([0, 7, 2**64 - 1, id_])
        kind = dice.choices(
            ["read", "write", "flush", "barrier", "discard", "refused"], [6, 6, 1, 1, 1, 1]
        )[0]
        if kind in ("flush", "barrier"):
            operation = FLUSH if kind == "flush" else WRITE_BARRIER
            if dice.random() < 0.5:
                return self.transfer(id_, operation)
            # What Linux has in an empty flush is sector 2**64 - 1.
            empty = Transfer(id_, operation, dice.choice([0, 2**64 - 1]), 0, (), (), ())
            self.put(empty, Response(id_, operation, OKAY))
        elif kind == "discard":
            count = dice.randint(1, 64)
            first = self.place(count)
            if first is None:
                return False
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

    def place(self, sectors):
        """Choose where on the disk; None if there is no room left."""
        if not self.overtaking:
            first = self.next  # behind the last one, or anywhere
            if first + sectors > self.sectors or self.dice.random() < 0.5:
                first = self.dice.randint(0, self.sectors - sectors)
            self.next = first + sectors
            return first
        first = self.next + self.dice.randint(0, 3)
        self.next = first + sectors
        return first if self.next <= self.sectors else None

    def take(self, operation):
        """Choose pages and segments, often such as were used together before."""
        dice, free = self.dice, set(self.free)
        known = [run for run in self.runs if free.issuperset(run[0])]
        if known and dice.random() < 0.8:
            run = dice.choice(known)
            if operation in (READ, WRITE) or not run[1]:
                self.free = list(free.difference(run[0]))
                return run
        count = dice.choice([1, dice.randint(1, 11), dice.randint(1, 256)])
        if operation in (FLUSH, WRITE_BARRIER):
            count = min(count, 11)
        indirect = count > 11 or (operation in (READ, WRITE) and dice.random() < 0.2)
        dice.shuffle(self.free)
        used, rest = self.free[: count + indirect], self.free[count + indirect :]
        if len(used) < count + indirect:
            return None
        self.free = rest
        if dice.random() < 0.4:
            used.sort()  # they may be neighbours
            segments = [(0, 7)] * count
        else:
            segments = [tuple(sorted(dice.choices(range(8), k=2))) for _ in range(count)]
        self.runs = [*self.runs[-11:], (used, indirect, segments)]
        return self.runs[-1]

    def transfer(self, id_, operation):
        dice = self.dice
        run = self.take(operation)
        if run is None:
            return False
        used, indirect, segments = run
        data = used[: len(segments)]
        sectors = sum(last - first + 1 for first, last in segments)
        sector = self.place(sectors)
        if sector is None:
            self.free += used
            return False
        self.transfers += 1
        contents = []
        at = sector * 512
        for index, (first, last) in zip(data, segments):
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
        firsts, lasts = zip(*segments)
        if indirect:
            descriptors = encode_segments(list(zip(refs, firsts, lasts)))
            self.page(used[-1])[: len(descriptors)] = descriptors
            indirect_refs = (self.pages.refs[used[-1]],)
            request = Indirect(id_, operation, sector, len(segments), indirect_refs)
        else:
            request = Transfer(id_, operation, sector, sectors, refs, firsts, lasts)
        self.put(request, Response(id_, operation, OKAY), used, contents)
        return True

    def put(self, request, response, used=(), contents=()):
        self.line.put(request)
        self.expected.append((response, used, contents))

    def collect(self):
        self.line.kick()
        answers = self.line.responses(len(self.expected))
        if self.overtaking:
            answers.sort()
            self.expected.sort(key=lambda expected: expected[0])
        for answer, (response, used, contents) in zip(answers, self.expected):
            assert response == answer
            for index, content in zip(used, contents):
                assert content == self.page(index)
            self.free += used
        self.expected = []
        self.next = self.dice.randrange(8)


def threaded(host, size):
    """Make a disk that does half of its requests at once, the others with more or less delay."""
    backend = host.memory(size, threads=4)

    def at_once(move):
        def done(buffers, offset):
            parts = buffers if offset // 512 % 2 else buffers[:1]  # all, or as far as it goes
            move(parts, offset)
            return sum(map(len, parts))

        return done

    def slowly(move):
        return lambda buffers, offset: time.sleep(offset % 11 / 20000) or move(buffers, offset)

    for name in ("read", "write"):
        move = getattr(backend, name)
        setattr(backend, f"{name}_nowait", at_once(move))
        setattr(backend, name, slowly(move))
    return backend


SQUEEZED = {"persistent": True, "limit": 100}


@pytest.mark.parametrize("order", [0, 4])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    "way", [KEPT, SQUEEZED, COPIED, MAPPED], ids=["kept", "squeezed", "copied", "mapped"]
)
@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_model(host, monkeypatch, abi, way, threads, order):
    monkeypatch.setattr(grants, "_TURN", 0.0)  # what is too much leaves at once
    dice = random.Random(f"{abi.name}{way}{threads}{order}")
    backend = host.memory(2 << 20) if threads == 1 else threaded(host, 2 << 20)
    line = host.line(backend, abi, order=order, **way)
    acquired = spy(monkeypatch, line.queue._pages, "acquire")
    model = Model(line, backend, host.share(600), dice, overtaking=threads > 1)
    for _ in repeat(15 if way is SQUEEZED else 6, 15):  # until they are too many
        for _ in range(dice.choice([1, 5, line.ring.slots])):
            if not (line.ring.free and model.step()):
                break
        model.collect()
        if not way.get("persistent"):
            assert host.hypervisor.mapped_pages == 1 << order  # the ring
        assert len(line.queue._pages.kept) <= way.get("limit", 600)
    assert model.data == backend.data
    planned = model.transfers - len(acquired)
    if way is KEPT:
        assert planned > model.transfers / 10
    if way is SQUEEZED:
        assert host.hypervisor.counters.unmaps > 2
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
    ring = FrontRing(pages.view, X86_64.slot_size, host.guest.fence)
    ring.put(X86_64.encode(one(1, READ, 0, data.refs[0])))
    ring.push()
    queue = queue_of(host, pages.refs, channel.port, disk)
    queue.start()
    host.until(ring.take)
    assert queue.stop()
    assert queue.stop()  # once more does no harm
    ring.close()
    channel.close()


def test_a_queue_that_never_starts(host):
    pages, channel = host.share(), host.guest.bind_unbound(0)
    queue = queue_of(host, pages.refs, channel.port, Disk(host.memory()))
    queue.ask_to_stop()
    assert queue.stop()
    queue.ask_to_stop()  # it has
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
        *map(bad_operation, [4, 7, 17, 255]),
        *map(bad_count, [0, 12, 255]),
        bad_count(0, WRITE),
        bad_count(12, FLUSH),
        bad_count(12, WRITE_BARRIER),
        bad_place(SECTORS, READ),
        bad_place(SECTORS - 1, READ, 1),
        bad_place(SECTORS - 7, WRITE, 7),
        bad_place(2**64 - 1, READ),
        bad_place(2**64 - 8, WRITE, 7),
        bad_place(2**63, WRITE),
        bad_place(2**64 - 1, FLUSH),
        bad_place(2**64 - 1, WRITE_BARRIER),
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
    """It is answered with its id, no page is looked at for it, and the next one works."""
    backend = host.memory(SIZE)
    line = host.line(backend, abi)
    pages = host.share()
    ref = pages.refs[0]
    maps = host.hypervisor.counters.maps
    assert Response(99, operation, status) == line.ask(request_of(abi, ref))
    assert (maps, 0) == (host.hypervisor.counters.maps, host.hypervisor.counters.copies)
    assert not backend.calls
    assert line.disk.statistics.as_dict()["refused"] == 1
    assert Response(100, READ, OKAY) == line.ask(one(100, READ, SECTORS - 1, ref))
    assert not line.failures


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_refused_once_its_segments_are_read(host, operation):
    """Of an indirect request one page must be mapped to see what it is; and no other."""
    backend = host.memory(SIZE)
    line = host.line(backend, grants=Grants.MAP)
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
        one(5, WRITE_BARRIER, 0, pages.refs[1]),
    ]
    assert [
        Response(1, WRITE, ERROR),
        Response(2, FLUSH, ERROR),
        Response(3, DISCARD, ERROR),
        Response(4, DISCARD, ERROR),
        Response(5, WRITE_BARRIER, ERROR),
    ] == line.ask(*refused)
    assert (maps, 0) == (host.hypervisor.counters.maps, host.hypervisor.counters.copies)
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


# -- requests that were seen before --------------------------------------------------------


class Known:
    """Pages whose use is known already: a direct request of them, and an indirect one."""

    def __init__(self, host, line, count=3):
        self.shared = host.share(count)
        self.table = host.share()
        self.refs = self.shared.refs
        self.line = line
        self.table.view[: 8 * count] = encode_segments([(ref, 0, 7) for ref in self.refs])
        answers = line.ask(*self.both(READ, 0))
        assert {OKAY} == {answer.status for answer in answers}
        assert 1 == len(line.queue._pages.plans)  # one for both

    def both(self, operation, sector):
        indirect = Indirect(2, operation, sector, len(self.refs), tuple(self.table.refs))
        return whole(1, operation, sector, self.refs), indirect

    def statuses(self, operation, sector):
        """Ask for both, and make sure that nothing but a look at a plan was needed."""
        return [answer.status for answer in self.line.ask(*self.both(operation, sector))]


def test_a_known_request_needs_no_decoding(host, monkeypatch):
    backend = host.memory(SIZE)
    line = host.line(backend, persistent=True)
    known = Known(host, line)
    begun = spy(monkeypatch, line.queue, "_begin")
    for operation in (WRITE, READ):
        known.shared.view[:] = random.Random(operation).randbytes(3 * 4096)
        assert [OKAY, OKAY] == known.statuses(operation, 8)
    assert [] == begun
    assert known.shared.view == backend.data[4096 : 4 * 4096]
    names = ["write", "write", "read", "read"]
    assert [(name, 4096, 3 * 4096) for name in names] == backend.calls[2:]


def test_known_requests_are_judged_like_any_other(host):
    backend = host.memory(SIZE)
    known = Known(host, host.line(backend, persistent=True))
    for sector in (SECTORS - 23, SECTORS, 2**63, 2**64 - 24, 2**64 - 1):
        assert [ERROR, ERROR] == known.statuses(READ, sector)
        assert [ERROR, ERROR] == known.statuses(WRITE, sector)
    assert 2 == len(backend.calls)
    assert [OKAY, OKAY] == known.statuses(READ, SECTORS - 24)
    assert known.line.disk.statistics.as_dict()["refused"] == 20


def test_known_requests_write_to_no_read_only_disk(host):
    backend = host.memory(SIZE, read_only=True)
    known = Known(host, host.line(backend, persistent=True))
    assert [ERROR, ERROR] == known.statuses(WRITE, 0)
    assert {"read"} == {name for name, *_ in backend.calls}


@pytest.mark.parametrize("sector_size", [1024, 4096])
def test_known_requests_are_aligned(host, sector_size):
    backend = host.memory(SIZE, sector_size=sector_size)
    known = Known(host, host.line(backend, persistent=True))
    step = sector_size // 512
    for sector in range(16):
        status = ERROR if sector % step else OKAY
        assert [status, status] == known.statuses(READ, sector)


@pytest.mark.parametrize("operation", [WRITE_BARRIER, FLUSH, DISCARD, INDIRECT, 4, 255])
def test_other_operations_of_known_pages(host, operation):
    """Nothing but a read or write is taken for one, direct or indirect."""
    backend = host.memory(SIZE)
    line = host.line(backend, persistent=True)
    known = Known(host, line)
    backend.calls.clear()
    answer = line.ask(raw_indirect(X86_64, operation, 3, 7, 0, known.table.refs))
    assert Response(7, operation, ERROR) == answer
    assert not backend.calls


def test_the_size_is_looked_at_again_after_a_resize(host):
    class Elastic(type(host.memory())):
        def resize(self, size):
            self.data.extend(bytes(max(0, size - self.size)))
            self.size = size
            return size

    backend = Elastic(SIZE)
    line = host.line(backend, persistent=True)
    known = Known(host, line)
    assert [ERROR, ERROR] == known.statuses(WRITE, SECTORS)
    line.disk.resize(2 * SIZE)
    assert [OKAY, OKAY] == known.statuses(WRITE, SECTORS)
    line.disk.resize(SIZE, force=True)
    assert [ERROR, ERROR] == known.statuses(WRITE, SECTORS)
    assert [OKAY, OKAY] == known.statuses(WRITE, SECTORS - 24)


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_a_direct_request_of_too_many_segments_is_no_known_one(host, abi):
    """Even if what stands behind it, the next request's first bytes, makes it look like one."""
    backend = host.memory(SIZE)
    line = host.line(backend, abi, persistent=True)
    pages, table = host.share(300), host.share()
    assert 256 in pages.refs
    segments = [*((ref, 0, 7) for ref in pages.refs[:11]), (256, 0, 0)]
    descriptors = encode_segments(segments)
    table.view[: len(descriptors)] = descriptors
    assert OKAY == line.ask(Indirect(1, READ, 0, 12, tuple(table.refs))).status
    assert descriptors in line.queue._pages.plans
    backend.calls.clear()
    wrong = raw_direct(abi, READ, 12, 99, 0, segments[:11])
    after = abi.encode(one(0, READ, 0, pages.refs[0]))
    assert descriptors == (wrong + after)[abi.segments_at :][: len(descriptors)]
    answers = line.ask(wrong, after)
    assert [Response(99, READ, ERROR), Response(0, READ, OKAY)] == answers
    assert [("read", 0, 512)] == backend.calls


def test_more_than_a_page_of_descriptors_is_no_known_request(host):
    """Though its first page is all there is to one."""
    backend = host.memory(4 << 20)
    line = host.line(backend, persistent=True, max_indirect_segments=4096)
    pages, table = host.share(600), host.share(2)
    backend.data[:] = random.Random(1).randbytes(4 << 20)
    descriptors = encode_segments([(ref, 0, 7) for ref in pages.refs])
    table.view[: len(descriptors)] = descriptors
    for count in (512, 600, 512, 513):
        pages.view[:] = bytes(600 * 4096)
        request = Indirect(1, READ, 8, count, tuple(table.refs[: -(-count // 512)]))
        assert Response(1, READ, OKAY) == line.ask(request)
        expected = backend.data[4096:][: count * 4096] + bytes((600 - count) * 4096)
        assert expected == pages.view
    assert {512 * 8, 600 * 8, 513 * 8} == set(map(len, line.queue._pages.plans))


def test_an_offer_smaller_than_a_page_of_descriptors_holds_for_known_requests(host):
    line = host.line(host.memory(SIZE), persistent=True, max_indirect_segments=3)
    known = Known(host, line)
    known.table.view[24:32] = encode_segments([(known.refs[0], 0, 7)])
    for count, status in [(0, ERROR), (3, OKAY), (4, ERROR)]:
        slot = raw_indirect(X86_64, READ, count, 9, 0, known.table.refs)
        assert Response(9, READ, status) == line.ask(slot)


# -- grants that do not work ---------------------------------------------------------------


@every_way
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_a_bad_reference(host, way, operation):
    backend = host.memory(SIZE)
    line = host.line(backend, **way)
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
    if (way, operation) != (COPIED, READ):  # then the data is read, and cannot be delivered
        assert not backend.calls
    assert Response(9, operation, OKAY) == line.ask(one(9, operation, 0, good))


@pytest.mark.parametrize("mode", [Grants.COPY, Grants.MAP])
def test_a_read_into_a_page_that_is_granted_for_reading_only(host, mode):
    line = host.line(host.memory(SIZE), grants=mode)
    ref = host.share(writable=False).refs[0]
    assert Response(1, READ, ERROR) == line.ask(one(1, READ, 0, ref))
    assert Response(2, WRITE, OKAY) == line.ask(one(2, WRITE, 0, ref))


def test_an_error_of_each_single_mapping(host):
    """XSA-361 and after: whatever fails, what was mapped is unmapped, and no more."""
    line = host.line(host.memory(SIZE), grants=Grants.MAP)
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


@pytest.mark.parametrize("threads", [1, 4])
def test_nothing_is_in_use_when_the_answer_is_there(host, threads):
    """Linux gives a disk up for good if a page is still mapped when its response arrives."""
    line = host.line(host.memory(SIZE, threads=threads), grants=Grants.MAP)
    pages = [host.share(21) for _ in range(5)]
    for shared in pages:
        shared.view[: 8 * 20] = encode_segments([(ref, 0, 7) for ref in shared.refs[1:]])
    respond, in_use = line.queue._ring.respond, []

    def looking(response):
        in_use.append(host.guest.in_use(pages[decode_response(response).id].refs))
        respond(response)

    line.queue._ring.respond = looking
    requests = [
        whole(0, READ, 0, pages[0].refs[1:11]),
        whole(1, WRITE, 0, pages[1].refs[1:11]),
        Indirect(2, READ, 0, 20, (pages[2].refs[0],)),
        Indirect(3, WRITE, 9999, 20, (pages[3].refs[0],)),
        whole(4, READ, 0, (pages[4].refs[1], 3)),
    ]
    line.ask(*requests)
    for request in requests:
        line.ask(request)
    assert [0] * 10 == in_use


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


def test_the_limit_of_persistent_pages(host, monkeypatch):
    monkeypatch.setattr(grants, "_TURN", 1e9)  # none leaves
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


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_each_single_copy(host, threads):
    """It is one of that request only, and nobody gets data that is not his."""
    backend = host.memory(SIZE, threads=threads)
    line = host.line(backend, grants=Grants.COPY)
    pages = host.share(8)
    tables = host.share(4)
    for index in range(4):
        refs = pages.refs[2 * index : 2 * index + 2]
        tables.view[4096 * index :][:16] = encode_segments([(ref, 0, 7) for ref in refs])
    operations = [READ, WRITE, READ, WRITE]
    for failing in range(9):
        backend.data[:] = random.Random(failing).randbytes(SIZE)
        pages.view[:] = b"p" * len(pages.view)
        before = bytes(backend.data)
        backend.calls.clear()
        failed, numbers = [], itertools.count()

        def refuse(domid, refs, writable, failed=failed, numbers=numbers, failing=failing):
            if next(numbers) == failing:
                failed.extend(refs)
                raise HypervisorError(errno.EAGAIN, "cannot copy")

        host.hypervisor.before_copy = refuse
        answers = [
            line.ask(Indirect(index, operation, 64 * index, 2, (tables.refs[index],)))
            for index, operation in enumerate(operations)
        ]
        host.hypervisor.before_copy = None
        for index, operation in enumerate(operations):
            own = {*pages.refs[2 * index : 2 * index + 2], tables.refs[index]}
            status = ERROR if own & set(failed) else OKAY
            assert Response(index, operation, status) == answers[index]
            place = slice(64 * 512 * index, 64 * 512 * index + 8192)
            page = pages.view[8192 * index : 8192 * (index + 1)]
            if operation == WRITE:
                assert backend.data[place] == (b"p" * 8192 if status == OKAY else before[place])
            else:
                assert page == (before[place] if status == OKAY else b"p" * 8192)
        assert len(failed) == (0 if failing == 8 else 1 if failing % 2 == 0 else 2)
    assert host.hypervisor.mapped_pages == 1


def test_memory_for_copies_shows_nobody_what_another_one_wrote(host):
    """A read that fails, half way or at once, leaves the guest's page as it was."""

    def half(buffers, offset):
        buffers[0][:512] = b"d" * 512
        return 0 if offset else 512

    line = host.line(host.memory(SIZE, read=half), grants=Grants.COPY)
    secret, page = host.share(), host.share()
    secret.view[:] = b"s" * 4096
    page.view[:] = b"p" * 4096
    assert OKAY == line.ask(whole(1, WRITE, 0, secret.refs)).status
    assert ERROR == line.ask(whole(2, READ, 0, page.refs)).status
    assert b"p" * 4096 == page.view


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


@every_way
def test_a_backend_that_fails(host, way):
    backend = Broken()
    line = host.line(backend, **way)
    ref = host.share().refs[0]
    requests = [
        one(1, READ, 0, ref),
        one(2, WRITE, 0, ref),
        Transfer(3, FLUSH, 0, 0, (), (), ()),
        one(4, FLUSH, 0, ref),
        Discard(5, DISCARD, 0, 8, secure=False),
    ]
    backend.repeats_flush = True
    for fault, failing in [("raise", 5), ("exit", 5), ("short", 3), ("memory", 0), (None, 0)]:
        backend.fault = fault
        errors = line.disk.statistics.as_dict()["errors"]
        answers = line.ask(*requests)
        assert [1, 2, 3, 4, 5] == [answer.id for answer in answers]
        statuses = [answer.status for answer in answers]
        assert failing == statuses.count(ERROR) + statuses.count(FLUSH_FAILED)
        assert line.disk.statistics.as_dict()["errors"] == errors + failing
        assert host.hypervisor.mapped_pages == 1 + (way is KEPT)
    assert not line.failures


def test_a_backend_that_keeps_a_buffer(host, caplog):
    """The pages cannot be unmapped then; that is logged, once, and the disk lives on."""
    backend = Broken()
    line = host.line(backend, grants=Grants.MAP)
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


def test_what_a_backend_keeps_for_a_while_is_unmapped_after_that(host):
    """A frontend that uses each grant once gets all but the last ones back."""
    backend = Broken()
    line = host.line(backend, grants=Grants.MAP)
    pages = host.share(32)
    for id_, ref in enumerate(pages.refs):
        backend.fault = "keep" if id_ % 4 else None
        if not id_ % 8:
            backend.kept.clear()
        line.ask(one(id_, READ, 0, ref))
    assert host.hypervisor.mapped_pages <= 1 + 8
    backend.kept.clear()


def test_a_backend_that_keeps_a_buffer_indefinitely(host, caplog):
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
        allowed.wait(LONG)
        read(buffers, offset)

    backend.read = slow
    line = host.line(backend, grants=Grants.MAP)
    ref = host.share().refs[0]
    line.put(one(1, READ, 0, ref), one(2, READ, 0, ref))
    line.kick()
    assert entered.wait(PATIENCE)
    assert not line.queue.stop(0.05)
    assert not line.queue.stop(0.05)
    assert host.hypervisor.mapped_pages == 2  # nothing is taken away from under it
    allowed.set()
    assert line.queue.stop(PATIENCE)
    assert 2 == len(line.responses(2))  # what was taken is finished and answered
    assert host.hypervisor.mapped_pages == 0


def test_what_waits_when_it_is_cut_off_is_refused(host):
    """Linux does not finish removing a disk while one request of it is unanswered."""
    backend = host.memory(SIZE)
    entered, allowed = threading.Event(), threading.Event()
    backend.flush = lambda: entered.set() or (allowed.wait(LONG) and None)
    line = host.line(backend)
    ref = host.share().refs[0]
    line.put(Transfer(1, FLUSH, 0, 0, (), (), ()))
    line.kick()
    assert entered.wait(PATIENCE)
    line.put(one(2, READ, 0, ref), Discard(3, DISCARD, 0, 8, secure=False), b"\7" * 112)
    line.kick()
    assert not line.queue.stop(0.01)
    allowed.set()
    assert line.queue.stop(PATIENCE)
    expected = [(1, OKAY), (2, ERROR), (3, ERROR), (0x0707070707070707, ERROR)]
    assert expected == [(answer.id, answer.status) for answer in line.responses(4)]
    assert not backend.calls


class CutShortError(BaseException):
    """What a signal's handler may raise anywhere."""


@pytest.mark.parametrize("where", ["_ended.wait", "_thread.thread.join"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_that_is_cut_short(host, monkeypatch, where, when):
    """It can be done again from wherever it was."""
    line = host.line(host.memory(SIZE), persistent=True)
    pages = host.share()
    line.ask(one(1, READ, 0, pages.refs[0]))
    *path, name = where.split(".")
    part = functools.reduce(getattr, path, line.queue)
    done = getattr(part, name)

    def interrupted(*args):
        if when == "after":
            done(*args)
        monkeypatch.undo()
        raise CutShortError

    monkeypatch.setattr(part, name, interrupted)
    with pytest.raises(CutShortError):
        line.queue.stop()
    assert line.queue.stop(PATIENCE)
    assert host.hypervisor.mapped_pages == 0


def test_everything_is_unmapped_where_no_signal_is_handled(host, monkeypatch):
    line = host.line(host.memory(SIZE), persistent=True)
    thread, threads = line.queue._thread.thread, []
    for part in (line.queue._pages, line.queue._ring, line.queue._channel):
        done = part.close

        def close(done=done):
            threads.append(threading.current_thread())
            done()

        monkeypatch.setattr(part, "close", close)
    assert line.queue.stop(PATIENCE)
    assert [thread] * 3 == threads


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
        line.queue = queue_of(
            host, line.pages.refs, line.channel.port, line.disk, line.failures.append
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
        host.until(line.queue._ended.is_set)  # it costs nothing now
        line.channel.notify()
        assert indices[2] == start + 32 & 2**32 - 1
    assert calls == len(backend.calls)
    assert not line.failures
    assert line.queue.stop(PATIENCE)


def test_segments_that_change_while_they_are_read(host, switch_often):
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

    def overwritten(most):
        slots = take(most)
        if slots:
            line.pages.view[64:] = b"\xff" * (4096 - 64)
        return slots

    monkeypatch.setattr(line.queue._ring, "take", overwritten)
    line.ask(one(1, READ, 3, pages.refs[0]))  # the loop already has the method in hand
    assert Response(2, READ, OKAY) == line.ask(one(2, READ, 4, pages.refs[0], 2, 3))
    assert ("read", 2048, 1024) == backend.calls[-1]


@every_way
def test_descriptors_are_read_once(host, monkeypatch, way):
    """What the guest writes there after that changes nothing, be the request known or not."""
    backend = host.memory(SIZE)
    line = host.line(backend, **way)
    pages, table = host.share(12), host.share()
    descriptors = encode_segments([(ref, 0, 7) for ref in pages.refs])

    def overwrite(*args):
        table.view[:] = b"\xff" * 4096

    class Overwriting(dict):
        def get(self, key):
            overwrite()
            return super().get(key)

    def resolve(request, data):
        overwrite()
        return resolved(request, data)

    line.queue._pages.plans = Overwriting()
    resolved = queue_module.resolve
    monkeypatch.setattr(queue_module, "resolve", resolve)
    for id_ in range(3):
        backend.data[:] = random.Random(id_).randbytes(SIZE)
        table.view[: len(descriptors)] = descriptors
        request = Indirect(id_, READ, 8, 12, tuple(table.refs))
        assert Response(id_, READ, OKAY) == line.ask(request)
        assert b"\xff" * 4096 == table.view
        assert backend.data[4096 : 4096 * 13] == pages.view


@every_way
def test_each_page_of_descriptors_is_got_at_once(host, way):
    line = host.line(host.memory(4 << 20), max_indirect_segments=4096, **way)
    pages, table = host.share(520), host.share(2)
    descriptors = encode_segments([(ref, 0, 7) for ref in pages.refs])
    table.view[: len(descriptors)] = descriptors
    got = []
    host.hypervisor.before_map = host.hypervisor.before_copy = lambda domid, refs, writable: (
        got.extend(refs)
    )
    assert OKAY == line.ask(Indirect(1, READ, 8, 520, tuple(table.refs))).status
    assert [*table.refs, *pages.refs] == got


def test_an_event_flood(host):
    """Events without requests wake the thread, and that is all."""
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    for id_ in range(200):
        line.channel.notify()
        if id_ % 20 == 0:
            assert Response(id_, READ, OKAY) == line.ask(one(id_, READ, 0, ref))
    assert not line.failures


@pytest.fixture
def flood(host, monkeypatch):
    """A line whose queue was woken for nothing as often as it puts up with."""
    line = host.line(host.memory(SIZE))
    line.acknowledged = spy(monkeypatch, line.queue._channel, "acknowledge")
    ref = host.share().refs[0]
    line.ask(one(0, READ, 0, ref))  # the first event comes with the channel

    def quiet():
        return not select.select([line.queue._channel.fileno()], [], [], 0)[0]

    host.until(quiet)
    line.queue.wakeups.spurious = 0  # the request may have been found before its event

    def rage(events=idle._FLOOD):
        for _ in range(events):
            host.until(quiet)
            line.channel.notify()
        host.until(quiet)

    line.quiet, line.rage, line.read = quiet, rage, lambda: line.ask(one(1, READ, 0, ref))
    return line


def test_in_a_flood_events_are_masked_for_a_while(host, monkeypatch, flood):
    """So that a guest cannot keep a processor of ours busy with them (XSA-332)."""
    monkeypatch.setattr(idle, "_CALM", 1_000_000)
    flood.rage()
    before = len(flood.acknowledged)
    wakeups = flood.disk.statistics.as_dict()["wakeups"]
    flood.channel.notify()
    host.until(lambda: flood.disk.statistics.as_dict()["wakeups"] == wakeups + 1)
    time.sleep(0.02)
    assert before == len(flood.acknowledged)
    assert not flood.quiet()
    assert flood.queue.stop(PATIENCE)  # meanwhile


def test_after_a_flood_requests_are_served(flood):
    for _ in range(3):
        flood.rage(idle._FLOOD + 3)
        assert flood.read().status == OKAY


def test_a_request_ends_a_flood(monkeypatch, flood):
    monkeypatch.setattr(idle, "_CALM", 1_000_000)
    for _ in range(4):
        flood.rage(idle._FLOOD - 2)
        assert flood.read().status == OKAY


def test_random_slots(host):
    """Any 112 bytes are answered with the id that is in them."""
    dice = random.Random(4)
    line = host.line(host.memory(SIZE), order=2)
    for _ in range(30):
        slots = [
            bytes([dice.choice([0, 1, 2, 3, 5, 6, dice.randrange(256)]), dice.randrange(256)])
            + dice.randbytes(110)
            for _ in range(100)
        ]
        answers = line.ask(*slots)
        assert [slot[8:16] for slot in slots] == [
            answer.id.to_bytes(8, "little") for answer in answers
        ]
        assert {ERROR, EOPNOTSUPP} >= {
            a.status for a, slot in zip(answers, slots) if slot[0] not in (FLUSH, WRITE_BARRIER)
        }
    assert not line.failures


# -- requests that wait, in threads --------------------------------------------------------


class Gate(Backend):
    """A disk whose calls wait for a gate of their own if there is one, and are noted."""

    size = SIZE
    threads = 8

    def __init__(self):
        self.gates = {}
        self.log = []
        self.changed = threading.Condition()

    def shut(self, name):
        self.gates[name] = threading.Event()

    def open(self, *names):
        for name in names or list(self.gates):
            self.gates.pop(name).set()

    def note(self, *what):
        with self.changed:
            self.log.append(what)
            self.changed.notify_all()

    def wait_for(self, count, what="begin"):
        """Wait until that many calls have begun; return them."""
        with self.changed:
            found = []

            def enough():
                found[:] = [name for kind, name in self.log if kind == what]
                return len(found) >= count

            assert self.changed.wait_for(enough, PATIENCE)
            return found

    def _do(self, name):
        gate = self.gates.get(name)
        self.note("begin", name)
        assert gate is None or gate.wait(LONG)
        self.note("end", name)

    def read(self, buffers, offset):
        self._do(offset // 512)

    write = read

    def flush(self):
        self._do("flush")

    def discard(self, offset, length):
        self._do(offset // 512)


def flush(id_, operation=FLUSH):
    return Transfer(id_, operation, 0, 0, (), (), ())


@every_way
def test_a_slow_request_does_not_hold_back_the_others(host, way):
    backend = Gate()
    line = host.line(backend, **way)
    refs = host.share(8).refs
    for slow in (0, 3, 7):
        backend.shut(slow)
        line.put(*(one(id_, (READ, WRITE)[id_ % 2], id_, ref) for id_, ref in enumerate(refs)))
        line.kick()
        answers = line.responses(7)
        assert set(range(8)) - {slow} == {answer.id for answer in answers}
        host.until(lambda: line.disk.statistics.as_dict()["in_flight"] == 1)
        backend.open(slow)
        assert slow == line.responses(1)[0].id
    host.until(lambda: line.disk.statistics.as_dict()["in_flight"] == 0)
    counters = line.disk.statistics.as_dict()
    assert (24, 12, 12) == (counters["requests"], counters["reads"], counters["writes"])


def test_answers_come_in_the_order_in_which_they_are_ready(host):
    backend = Gate()
    line = host.line(backend)
    refs = host.share(8).refs
    for sector in range(8):
        backend.shut(sector)
    line.put(*(one(100 + sector, READ, sector, ref) for sector, ref in enumerate(refs)))
    line.kick()
    backend.wait_for(8)
    for sector in (5, 0, 7, 2, 1, 6, 4, 3):
        backend.open(sector)
        assert [Response(100 + sector, READ, OKAY)] == line.responses(1)


@pytest.mark.parametrize("waiting", [flush(1), Discard(1, DISCARD, 0, 8, secure=False)])
def test_a_flush_or_discard_waits_in_a_thread(host, waiting):
    backend = Gate()
    line = host.line(backend)
    ref = host.share().refs[0]
    name = "flush" if waiting.operation == FLUSH else 0
    backend.shut(name)
    line.put(waiting)
    line.kick()
    backend.wait_for(1)
    assert Response(2, READ, OKAY) == line.ask(one(2, READ, 9, ref))
    backend.open(name)
    assert [Response(1, waiting.operation, OKAY)] == line.responses(1)


def test_what_can_be_done_at_once_needs_no_thread(host):
    backend = Gate()
    backend.read_nowait = backend.write_nowait = lambda buffers, offset: (
        0 if offset else sum(map(len, buffers))
    )
    line = host.line(backend, persistent=True)
    ref = host.share().refs[0]
    for _ in range(3):
        assert OKAY == line.ask(one(1, READ, 0, ref)).status
        assert OKAY == line.ask(one(2, WRITE, 0, ref)).status
    assert [] == line.queue._workers._threads
    assert OKAY == line.ask(one(3, READ, 1, ref)).status
    assert [1] == backend.wait_for(1)
    counters = line.disk.statistics.as_dict()
    assert (4, 3) == (counters["reads"], counters["writes"])


@pytest.mark.parametrize("data", [True, False])
def test_a_barrier_is_in_between(host, data):
    """All before it is done before it, and all after it begins when it is stable."""
    backend = Gate()
    line = host.line(backend)
    refs = host.share(8).refs
    for name in (0, 1, 2, "flush"):
        backend.shut(name)
    barrier = one(3, WRITE_BARRIER, 3, refs[3]) if data else flush(3, WRITE_BARRIER)
    line.put(*(one(id_, WRITE, id_, refs[id_]) for id_ in range(3)), barrier)
    line.put(*(one(id_, WRITE, id_, refs[id_]) for id_ in range(4, 8)))
    line.kick()
    assert {0, 1, 2} == set(backend.wait_for(3))
    backend.open(1, 0)
    assert {0, 1} == {answer.id for answer in line.responses(2)}  # and they are answered
    assert 3 == len(backend.wait_for(3))
    backend.open(2)
    assert "flush" == backend.wait_for(4)[3]
    assert ("end", 2) in backend.log
    backend.open("flush")
    answers = [answer.id for answer in line.responses(6)]
    assert [2, 3] == answers[:2]
    assert {4, 5, 6, 7} == set(answers[2:])
    middle = ["flush", 3, "flush"] if data else ["flush", "flush"]
    begun = backend.wait_for(7 + len(middle))
    assert middle == begun[3 : 3 + len(middle)]
    last = max(place for place, (_, name) in enumerate(backend.log) if name == "flush")
    later = [name for _, name in backend.log[last + 1 :]]
    assert {4, 5, 6, 7} == set(later)


def test_what_a_barrier_holds_back_is_still_in_flight(host):
    """Whoever makes the disk smaller waits for it: it was judged by the size before."""
    seen = []

    def looking(buffers, offset):
        seen.append(line.disk.statistics.as_dict()["in_flight"])
        return 0

    backend = Gate()
    backend.write_nowait = looking
    line = host.line(backend)
    refs = host.share(2).refs
    line.ask(one(0, WRITE, 0, refs[0]), flush(1, WRITE_BARRIER), one(2, WRITE, 1, refs[1]))
    assert 2 == len(seen)
    assert min(seen) >= 1


def test_no_more_is_on_its_way_than_there_is_memory_for(host, monkeypatch):
    monkeypatch.setattr(queue_module, "MAX_IN_FLIGHT", 3 * 256 * 4096)
    backend = Gate()
    line = host.line(backend, grants=Grants.COPY)
    refs = host.share(32).refs
    for sector in range(32):
        backend.shut(sector)
    line.put(*(one(sector, WRITE, sector, ref) for sector, ref in enumerate(refs)))
    line.kick()
    answered = set()
    while len(answered) < 32:
        begun = set(backend.wait_for(min(32, len(answered) + 3)))
        assert begun == set(range(min(32, len(answered) + 3)))
        under_way = begun - answered
        assert line.queue._workers.unfinished <= 3
        first = min(under_way)
        backend.open(first)
        assert first == line.responses(1)[0].id
        answered.add(first)
    assert len(line.queue._pages._spare) <= 3


def test_a_limit_below_one_request_lets_one_through(host, monkeypatch):
    monkeypatch.setattr(queue_module, "MAX_IN_FLIGHT", 4096)
    line = host.line(Gate())
    ref = host.share().refs[0]
    answers = line.ask(*(one(id_, WRITE, id_, ref) for id_ in range(32)))
    assert list(range(32)) == [answer.id for answer in answers]


@every_way
def test_a_thread_that_takes_its_time_to_stop(host, monkeypatch, way):
    """Nothing is taken away from under it, and what was taken is answered."""
    backend = Gate()
    line = host.line(backend, **way)
    refs = host.share(3).refs
    backend.shut(1)
    line.put(*(one(id_, READ, id_, ref) for id_, ref in enumerate(refs)))
    line.kick()
    assert {0, 2} == {answer.id for answer in line.responses(2)}
    mapped = host.hypervisor.mapped_pages
    assert (
        mapped
        == {"kept": 4, "copied": 1, "mapped": 2}[
            "kept" if way is KEPT else "copied" if way is COPIED else "mapped"
        ]
    )
    line.put(one(3, READ, 3, refs[0]))
    drains = spy(monkeypatch, line.queue, "_drain")
    assert not line.queue.stop(0.03)
    host.until(lambda: drains)
    line.ring.push()  # is not even looked at any longer
    assert not line.queue.stop(0.03)
    assert mapped == host.hypervisor.mapped_pages
    backend.open(1)
    assert line.queue.stop(PATIENCE)
    assert [(1, OKAY), (3, ERROR)] == [(a.id, a.status) for a in line.responses(2)]
    assert host.hypervisor.mapped_pages == 0


def test_pages_that_a_thread_works_in_stay_until_it_has_done(host, monkeypatch):
    """Whatever else is used meanwhile; and then they go."""
    monkeypatch.setattr(grants, "_TURN", 0.0)
    backend = Gate()
    line = host.line(backend, persistent=True, limit=2)
    busy, others = host.share(2), host.share(6)
    backend.shut(0)
    line.put(whole(0, READ, 0, busy.refs))
    line.kick()
    backend.wait_for(1)

    def bustle():
        for number in range(6):
            refs = others.refs[number - 1 : number + 1] or others.refs[:2]
            assert OKAY == line.ask(whole(9, WRITE, 16, refs)).status

    bustle()
    assert host.guest.in_use(busy.refs) == 2
    backend.open(0)
    assert 0 == line.responses(1)[0].id
    bustle()
    assert host.guest.in_use(busy.refs) == 0
    assert not line.failures


def test_a_thread_s_failure_is_that_request_s(host):
    class Failing(Gate):
        def _do(self, name):
            super()._do(name)
            if name == 1:
                raise SystemExit(3)

    line = host.line(Failing())
    refs = host.share(3).refs
    answers = line.ask(*(one(id_, READ, id_, ref) for id_, ref in enumerate(refs)))
    assert [(0, OKAY), (1, ERROR), (2, OKAY)] == sorted((a.id, a.status) for a in answers)
    assert line.disk.statistics.as_dict()["errors"] == 1


@pytest.mark.parametrize("way", [KEPT, MAPPED], ids=["kept", "mapped"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_failure_of_our_own_leaves_nothing_mapped(host, monkeypatch, way, threads):
    """Though the error is kept, and with it where it came from."""
    line = host.line(host.memory(SIZE, threads=threads), **way)
    pages = host.share(2)
    for _ in range(2):
        line.ask(whole(1, READ, 0, pages.refs))

    def broken():
        raise HypervisorError(errno.EIO, "cannot notify")

    monkeypatch.setattr(line.queue._channel, "notify", broken)
    line.put(*[whole(1, READ, 0, pages.refs)] * 3)
    line.ring.arm()
    line.kick()
    host.until(lambda: line.failures)
    assert line.queue.stop(PATIENCE)
    assert host.hypervisor.mapped_pages == 0


def test_a_failure_amid_large_requests_leaves_nothing_mapped(host, monkeypatch):
    """One is about to be joined with the next when the one before cannot be told of."""
    monkeypatch.setattr(queue_module, "_PUBLISH", 1)
    line = host.line(host.memory(SIZE), persistent=True)
    request = large(host, line, 3)

    def broken():
        raise HypervisorError(errno.EIO, "cannot notify")

    monkeypatch.setattr(line.queue._channel, "notify", broken)
    line.put(*[request(id_, READ, 128 * id_) for id_ in range(3)])
    line.ring.arm()
    line.kick()
    host.until(lambda: line.failures)
    assert line.queue.stop(PATIENCE)
    assert host.hypervisor.mapped_pages == 0


@every_way
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("pages", [1, 8])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_failure_of_our_own_amid_a_batch_leaves_no_request_unanswered(
    host, monkeypatch, way, threads, pages, at
):
    """Linux does not finish removing a disk as long as one is."""
    line = host.line(host.memory(SIZE, threads=threads), **way)
    refs = host.share(pages).refs
    for _ in range(2):
        line.ask(whole(0, READ, 0, refs))
    calls = []

    def broken(*response):
        calls.append(response)
        if len(calls) == at + 1:
            raise MemoryError
        return encode_response(*response)

    monkeypatch.setattr(queue_module, "encode_response", broken)
    requests = [whole(id_, id_ & 1, 8 * pages * (8 - id_), refs) for id_ in range(9)]
    line.put(*requests, flush(9))
    line.kick()
    host.until(lambda: line.failures)
    assert line.queue.stop(PATIENCE)
    answers = [decode_response(slot).id for slot in line.ring.take()]
    assert list(range(10)) == sorted(answers)


@every_way
def test_a_failure_of_our_own_that_does_not_pass_leaves_nothing_mapped(host, monkeypatch, way):
    """Then no answer can be made, and that is told once."""
    line = host.line(host.memory(SIZE), **way)
    monkeypatch.setattr(queue_module, "encode_response", lambda *response: 1 / 0)
    line.put(*(whole(id_, READ, 0, host.share(2).refs) for id_ in range(3)))
    line.kick()
    host.until(lambda: line.failures)
    assert line.queue.stop(PATIENCE)
    assert host.hypervisor.mapped_pages == 0
    assert [ZeroDivisionError] == list(map(type, line.failures))


def test_everything_unmapped_while_a_backend_hangs(host):
    """As when the process ends: the thread finds its ring gone, and ends as well."""
    backend = Gate()
    backend.threads = 1
    line = host.line(backend)
    ref = host.share().refs[0]
    backend.shut(0)
    line.put(one(0, READ, 0, ref))
    line.kick()
    backend.wait_for(1)
    line.put(one(1, READ, 1, ref))
    line.kick()
    assert not line.queue.stop(0.01)
    with pytest.raises(BackendError):
        host.hypervisor.close()
    backend.open(0)
    assert line.queue.stop(PATIENCE)
    assert [0] == backend.wait_for(1)
    assert [ValueError] == list(map(type, line.failures))


def test_what_cannot_be_given_back_is_told(host, monkeypatch, caplog):
    line = host.line(host.memory(SIZE))
    close = line.queue._channel.close

    def broken():
        close()
        raise HypervisorError(errno.EIO, "cannot unbind")

    monkeypatch.setattr(line.queue._channel, "close", broken)
    assert line.queue.stop(PATIENCE)
    assert "cannot unbind" in caplog.text
    host.hypervisor.close()


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
    assert line.queue.stop(PATIENCE)


def test_an_idle_queue_sleeps(host):
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    line.ask(one(1, READ, 0, ref))
    host.until(lambda: not select.select([line.queue._channel.fileno()], [], [], 0)[0])
    wakeups = line.disk.statistics.as_dict()["wakeups"]
    time.sleep(0.05)
    assert wakeups == line.disk.statistics.as_dict()["wakeups"]


def large(host, line, count, pages=8):
    """Return a function that lays out large requests of pages that are known."""
    refs = [host.share(pages).refs for _ in range(count)]
    line.ask(*[whole(id_, READ, 0, refs[id_]) for id_ in range(count)])
    line.disk.backend.calls.clear()
    return lambda id_, operation, sector: whole(id_, operation, sector, refs[id_])


def test_large_neighbours_are_done_in_one_call(host, monkeypatch):
    monkeypatch.setattr(joining, "MOST", 3 * 32768)
    backend = host.memory(SIZE)
    line = host.line(backend, persistent=True)
    request = large(host, line, 8)
    small = host.share().refs[0]
    line.ask(
        request(0, READ, 64),
        request(1, READ, 128),
        request(2, READ, 192),
        request(3, READ, 256),  # too much for one call
        one(9, READ, 320, small),
        request(4, READ, 321),  # not behind a large one
        request(5, WRITE, 385),  # another operation
        request(6, WRITE, 457),  # not behind it
        request(7, WRITE, 521),
    )
    calls = [(name, offset // 512, length // 512) for name, offset, length in backend.calls]
    assert [
        ("read", 64, 192),
        ("read", 256, 64),
        ("read", 320, 1),
        ("read", 321, 64),
        ("write", 385, 64),
        ("write", 457, 128),
    ] == calls
    host.until(lambda: counted(line, "in_flight") == (0,))
    assert (8 + 6, 3) == counted(line, "reads", "writes")
    assert (3 * 32768,) == counted(line, "bytes_written")


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("operation", [READ, WRITE])
@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.usefixtures("hurry")
def test_of_large_neighbours_that_fail_together_each_is_done_by_itself(
    host, holds, operation, threads
):
    """An error is that of one; what is held is that one alone."""
    backend = host.memory(SIZE, threads=threads)
    broken = [False]

    def failing(do):
        def done(buffers, offset):
            if broken[0] and offset < 200 * 512 < offset + sum(map(len, buffers)):
                raise OSError(errno.EIO, "broken")
            return do(buffers, offset)

        return done

    for name in ("read", "write", "read_nowait", "write_nowait"):
        setattr(backend, name, failing(getattr(backend, name)))
    line = host.line(Disk(backend, holds=holds), persistent=True)
    request = large(host, line, 4)
    broken[0] = True
    for id_ in range(4):
        line.put(request(id_, operation, 64 * id_))
    line.kick()
    if holds:
        assert [0, 1, 2] == sorted(answer.id for answer in line.responses(3))
        host.until(lambda: counted(line, "held") == (1,))
        assert (0,) == counted(line, "errors")
        broken[0] = False
        assert [Response(3, operation, OKAY)] == line.responses(1)
    else:
        answers = sorted(line.responses(4))
        assert [OKAY, OKAY, OKAY, ERROR] == [answer.status for answer in answers]
        assert (1,) == counted(line, "errors")
    host.until(lambda: counted(line, "in_flight", "held") == (0, 0))


@pytest.mark.usefixtures("clock")  # else late ones are published, too
def test_answers_are_published_amid_a_batch(host, monkeypatch):
    """A guest that asks for much can work with the first of it."""
    monkeypatch.setattr(queue_module, "_PUBLISH", 64 << 10)
    seen = []

    def looking(buffers, offset):
        with line.pages.view[:16].cast("I") as indices:
            seen.append(indices[2])

    line = host.line(host.memory(SIZE, read=looking), persistent=True)
    refs = host.share(8).refs
    line.ask(whole(0, READ, 0, refs))
    seen.clear()
    line.ask(*[whole(1, READ, 0, refs)] * 6)
    assert [1, 1, 3, 3, 5, 5] == seen
    host.until(lambda: line.disk.statistics.as_dict()["in_flight"] == 0)
    counters = line.disk.statistics.as_dict()
    assert (7, 7) == (counters["requests"], counters["reads"])


@pytest.mark.usefixtures("clock")
def test_a_few_answers_wait_while_there_is_more_to_do(host):
    """The guest is notified once for them; no answer waits for a request that never comes."""
    seen = []

    def busy(buffers, offset):
        """For each request another one comes while it is done, until there were six."""
        with line.pages.view[:16].cast("I") as indices:
            seen.append(indices[2])
        if len(seen) < 6:
            line.put(one(len(seen), READ, 0, ref))
            line.kick()

    line = host.line(host.memory(SIZE, read=busy))
    ref = host.share().refs[0]
    line.put(one(0, READ, 0, ref))
    line.kick()
    answers = line.responses(6)
    assert [0, 0, 0, 0, 4, 4] == seen
    assert list(range(6)) == [answer.id for answer in answers]


@pytest.mark.usefixtures("clock")
def test_a_batch_is_in_flight_though_answers_are_published_that_are_none_of_it(host, monkeypatch):
    """Whoever makes the disk smaller waits for all that was judged by the old size."""
    monkeypatch.setattr(queue_module, "_PUBLISH", 1)
    monkeypatch.setattr(queue_module, "_LOOK", 1)
    calls, is_settled = [], []

    def busy(buffers, offset):
        """Six come while one is done whose answer waits for theirs, then."""
        calls.append(offset // 512)
        if len(calls) == 1:
            line.put(*(one(id_, READ, id_, ref) for id_ in range(1, 7)))
            line.kick()
        elif len(calls) == 2:
            is_settled.append(line.disk.statistics.settled(in_order=True))
        else:
            seen.append(is_settled[0]())

    seen = []
    line = host.line(host.memory(SIZE, read=busy), **KEPT)
    ref = host.share().refs[0]
    line.put(one(0, READ, 0, ref))
    line.kick()
    assert list(range(7)) == [answer.id for answer in line.responses(7)] == calls
    assert [False] * 5 == seen
    host.until(is_settled[0])


def test_no_answer_waits_for_what_a_guest_takes_back(host, monkeypatch):
    """The index shows a request, and when it is to be taken there is none."""
    monkeypatch.setattr(BackRing, "has_requests", property(lambda ring: True))
    line = host.line(host.memory(SIZE))
    assert 1 == line.ask(one(1, READ, 0, host.share().refs[0])).id


class Looks:
    """The clock of a queue: it stands still, but for some seconds with each look at it."""

    def __init__(self):
        self.taken = 0
        self.seconds = 0
        self.step = 1
        self.later = 0

    def __call__(self):
        self.taken += 1
        self.seconds += self.step
        return self.seconds + self.later


@pytest.mark.parametrize(
    ("later", "crowded", "is_quick"),
    [(1000, idle._CROWDED, False), (1e12, math.inf, True)],
    ids=["crowded", "long"],
)
def test_where_the_guest_is_quick_the_thread_busy_polls(
    host, monkeypatch, later, crowded, is_quick
):
    """It is awake when the next request comes, until others want the processor or none comes."""
    looks = Looks()
    monkeypatch.setattr(idle, "perf_counter", looks)
    monkeypatch.setattr(idle, "_CROWDED", crowded)
    for name, value in (("_TIMES", 1e9), ("_LITTLE", 1e9), ("_MOST", 1e9), ("_TIMED", 2)):
        monkeypatch.setattr(polling, name, value)
    line = host.line(host.memory(SIZE))
    ref = host.share().refs[0]
    idler = line.queue._idle

    def busy_poll():
        before = looks.taken
        host.until(lambda: looks.taken > before + 10, what="busy-polling")

    host.until(lambda: line.ask(one(0, READ, 0, ref)) and idler._pace.is_quick)
    busy_poll()
    sleep, sleeps = idler.sleep, []

    def sleeping(milliseconds, **options):
        sleeps.append(idler._pace.is_quick)  # an event that came late may end it at once
        return sleep(milliseconds, **options)

    monkeypatch.setattr(idler, "sleep", sleeping)
    for id_ in range(50):
        assert id_ == line.ask(one(id_, READ, 0, ref)).id
        busy_poll()
    assert [] == sleeps
    looks.later = later
    host.until(lambda: sleeps)
    assert is_quick == sleeps[0]
    looks.step = 1e12  # then it would busy-poll again
    assert line.queue.stop(PATIENCE)


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
    host.until(lambda: host.hypervisor.counters.notifications == 1)
    notifications = 1
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
        queue_of(host, refs, port, Disk(host.memory()))
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
    host.until(lambda: line.disk.statistics.as_dict()["in_flight"] == 0)
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
    assert expected == {name: counters[name] for name in expected}
    # one segment, three (the flush has none), and five requests at once
    assert [1, 0, 1] == line.disk.statistics.segments_per_request[:3]
    assert [0, 0, 0, 1] == line.disk.statistics.requests_per_batch[:4]


# -- requests that the storage cannot do ---------------------------------------------------


class Ailing(Backend):
    """A disk that fails at some sectors, or in its flush; it notes what was tried, and when."""

    size = SIZE

    def __init__(self, threads, *broken, error=OSError):
        self.threads = threads
        self.broken = set(broken)
        self.error = error
        self.tries = []
        self.times = []
        self.changed = threading.Condition()

    def _do(self, what):
        with self.changed:
            self.tries.append(what)
            self.times.append(time.perf_counter())
            self.changed.notify_all()
            if what in self.broken:
                raise self.error(errno.EIO, "broken")

    def repair(self):
        with self.changed:
            self.broken.clear()

    def wait_for(self, what, times):
        """Wait until that was tried so many times more."""
        with self.changed:
            wanted = self.tries.count(what) + times
            assert self.changed.wait_for(lambda: self.tries.count(what) >= wanted, PATIENCE)

    def read(self, buffers, offset):
        self._do(offset // 512)

    write = read

    def flush(self):
        self._do("flush")

    def discard(self, offset, length):
        self._do(offset // 512)


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(retry, "_PAUSES", (0.001, 0.004))


@pytest.fixture
def tried_once(monkeypatch):
    """Nothing that is held is tried again."""
    monkeypatch.setattr(retry, "_PAUSES", (1000.0, 1000.0))


in_order_or_not = pytest.mark.parametrize("threads", [1, 4])


def counted(line, *names):
    counters = line.disk.statistics.as_dict()
    return tuple(counters[name] for name in names)


@pytest.mark.usefixtures("hurry")
@in_order_or_not
@pytest.mark.parametrize(
    ("operation", "what"),
    [(READ, 3), (WRITE, 3), (FLUSH, "flush"), (DISCARD, 3), (WRITE_BARRIER, 3), (FLUSH, 3)],
)
def test_what_the_storage_cannot_do_is_answered_when_it_can(host, operation, what, threads):
    backend = Ailing(threads, what)
    line = host.line(Disk(backend, holds=True))
    ref = host.share().refs[0]
    if operation == DISCARD:
        line.put(Discard(1, DISCARD, 3, 1, secure=False))
    else:
        line.put(flush(1) if what == "flush" else one(1, operation, 3, ref))
    line.kick()
    backend.wait_for(what, 5)
    assert [] == line.ring.take()
    host.until(lambda: counted(line, "held") == (1,))
    assert (1, 0, 0) == counted(line, "in_flight", "errors", "requests")
    backend.repair()
    assert [Response(1, operation, OKAY)] == line.responses(1)
    host.until(lambda: counted(line, "in_flight") == (0,))
    tries = len(backend.tries)
    line.ask(one(2, READ, 9, ref))
    assert (0, 0, 2) == counted(line, "held", "errors", "requests")
    assert tries + 1 == len(backend.tries)  # it is not tried again, nor answered


@pytest.mark.usefixtures("hurry")
@in_order_or_not
@pytest.mark.parametrize("way", [KEPT, COPIED], ids=["kept", "copied"])
def test_model_of_a_storage_that_fails_now_and_then(host, way, threads):
    """Every byte and every response is right nevertheless."""
    dice = random.Random(threads)
    backend = host.memory(2 << 20, threads=threads)

    def failing(do):
        def done(*arguments):
            if dice.random() < 0.3:
                raise OSError(errno.EIO, "broken")
            return do(*arguments)

        return done

    for name in ("read", "write", "flush", "discard"):
        setattr(backend, name, failing(getattr(backend, name)))
    line = host.line(Disk(backend, holds=True), **way)
    model = Model(line, backend, host.share(300), dice, overtaking=True)
    for _ in range(10):
        while line.ring.free and model.step():
            pass
        model.collect()
    assert model.data == backend.data
    host.until(lambda: counted(line, "in_flight", "held") == (0, 0))
    assert (0,) == counted(line, "errors")
    assert not line.failures


@pytest.mark.usefixtures("hurry")
@in_order_or_not
def test_what_can_be_done_is_answered_meanwhile(host, threads):
    backend = Ailing(threads, 0, 5)
    line = host.line(Disk(backend, holds=True), persistent=True)
    refs = host.share(8).refs
    for _ in range(3):
        backend.broken = {0, 5}
        line.put(*(one(id_, WRITE, id_, ref) for id_, ref in enumerate(refs)))
        line.kick()
        assert {1, 2, 3, 4, 6, 7} == {answer.id for answer in line.responses(6)}
        host.until(lambda: counted(line, "in_flight") == (2,))
        backend.wait_for(0, 3)
        assert [] == line.ring.take()
        backend.repair()
        assert {0, 5} == {answer.id for answer in line.responses(2)}
        host.until(lambda: counted(line, "in_flight", "held") == (0, 0))
    assert (24, 24, 0) == counted(line, "requests", "writes", "errors")


@pytest.mark.usefixtures("hurry")
@in_order_or_not
@pytest.mark.parametrize("data", [True, False])
def test_what_is_behind_a_held_barrier_is_not_begun(host, threads, data):
    backend = Ailing(threads, "flush")
    line = host.line(Disk(backend, holds=True))
    refs = host.share(3).refs
    barrier = one(1, WRITE_BARRIER, 1, refs[1]) if data else flush(1, WRITE_BARRIER)
    line.put(one(0, WRITE, 0, refs[0]), barrier, one(2, WRITE, 2, refs[2]))
    line.kick()
    assert [0] == [answer.id for answer in line.responses(1)]
    backend.wait_for("flush", 5)
    assert {0, "flush"} == set(backend.tries)
    assert [] == line.ring.take()
    host.until(lambda: counted(line, "held") == (1,))  # not amid a retry
    (in_flight,) = counted(line, "in_flight")
    assert 2 <= in_flight <= 3  # where they are in order a batch is, as long as it lasts
    backend.repair()
    assert [(1, OKAY), (2, OKAY)] == [(a.id, a.status) for a in line.responses(2)]


@pytest.mark.usefixtures("hurry")
@in_order_or_not
def test_a_barrier_waits_for_what_is_held_before_it(host, threads):
    backend = Ailing(threads, 0)
    line = host.line(Disk(backend, holds=True))
    ref = host.share().refs[0]
    line.put(one(0, WRITE, 0, ref), flush(1, WRITE_BARRIER))
    line.kick()
    backend.wait_for(0, 5)
    assert {0} == set(backend.tries)
    backend.repair()
    assert [(0, OKAY), (1, OKAY)] == [(a.id, a.status) for a in line.responses(2)]


@pytest.mark.usefixtures("tried_once")
@in_order_or_not
def test_a_barrier_queued_for_retry_sleeps_though_it_is_asked_to_drain(host, monkeypatch, threads):
    polls = []

    class Poll:
        def poll(self, timeout=None):
            polls.append(timeout)
            return sleeper.poll(timeout)

        def __getattr__(self, name):
            return getattr(sleeper, name)

    backend = Ailing(threads, "flush")
    line = host.line(Disk(backend, holds=True))
    sleeper = line.queue._idle._sleeper
    monkeypatch.setattr(line.queue._idle, "_sleeper", Poll())
    line.put(flush(0, WRITE_BARRIER))
    line.kick()
    host.until(lambda: counted(line, "held") == (1,))
    for _ in range(3):
        with pytest.raises(DeviceError, match="has not returned"), line.disk.drained.entered(0.05):
            pass
    assert len(polls) < 20
    line.queue.pause_retries(True)
    backend.repair()
    assert line.queue.stop(PATIENCE)
    assert [FLUSH_FAILED] == [answer.status for answer in line.responses(1)]


@pytest.mark.usefixtures("tried_once")
@in_order_or_not
def test_a_queue_amid_a_barrier_ends_though_another_has_just_woken_it(host, monkeypatch, threads):
    """What wakes it to end may be taken together with what woke it before."""
    backend = Ailing(threads, "flush")
    line = host.line(Disk(backend, holds=True))
    line.put(flush(0, WRITE_BARRIER))
    line.kick()
    host.until(lambda: counted(line, "held") == (1,))
    line.queue.pause_retries(True)
    thread = line.queue._thread
    host.until(lambda: thread._waiting)
    apply_changes = thread._apply_changes

    def asked_again():
        def read(*args):
            line.queue.ask_to_stop()
            return os.read(*args)

        with monkeypatch.context() as patch:
            patch.setattr(queue_thread, "os", SimpleNamespace(read=read, write=os.write))
            return apply_changes()

    monkeypatch.setattr(thread, "_apply_changes", asked_again)
    thread.wake()
    host.until(lambda: line.queue.is_stopping)
    assert line.queue.stop(PATIENCE)
    assert [FLUSH_FAILED] == [answer.status for answer in line.responses(1)]


@pytest.mark.usefixtures("tried_once")
@in_order_or_not
def test_what_would_be_wrong_again_is_an_error_at_once(host, threads):
    backend = Ailing(threads, 0, error=ValueError)
    line = host.line(Disk(backend, holds=True))
    ref = host.share().refs[0]
    assert Response(1, WRITE, ERROR) == line.ask(one(1, WRITE, 0, ref))
    assert [0] == backend.tries
    assert (0, 1) == counted(line, "held", "errors")


@in_order_or_not
def test_the_pause_between_tries_grows_and_is_bounded(host, monkeypatch, threads):
    monkeypatch.setattr(retry, "_PAUSES", (0.01, 0.04))
    backend = Ailing(threads, 0)
    line = host.line(Disk(backend, holds=True))
    ref = host.share().refs[0]
    for _ in range(2):  # and begins anew
        assert 0.01 == line.queue._retries.pause
        wakeups = counted(line, "wakeups")[0]
        backend.tries, backend.times, backend.broken = [], [], {0}
        line.put(one(1, READ, 0, ref))
        line.kick()
        backend.wait_for(0, 8)
        assert 0.04 == line.queue._retries.pause
        backend.repair()
        assert OKAY == line.responses(1)[0].status
        times = backend.times[1:] if threads == 1 else backend.times  # at once is tried twice
        pauses = [after - before for before, after in zip(times, times[1:])]
        for least, pause in zip([0.01, 0.02, *[0.04] * 9], pauses):
            assert pause >= least
        assert counted(line, "wakeups")[0] - wakeups < 4 * len(times)  # it sleeps meanwhile


@pytest.mark.usefixtures("tried_once")
@in_order_or_not
@pytest.mark.parametrize("operation", [READ, WRITE_BARRIER])
def test_what_is_held_at_the_end_is_an_error(host, threads, operation):
    backend = Ailing(threads, 0)
    line = host.line(Disk(backend, holds=True))
    refs = host.share(2).refs
    line.put(one(0, operation, 0, refs[0]), one(1, READ, 0, refs[1]))
    line.kick()
    held = 2 if operation == READ else 1
    host.until(lambda: counted(line, "held") == (held,))
    backend.repair()
    tries = list(backend.tries)
    assert line.queue.stop(PATIENCE)
    assert tries == backend.tries  # neither it nor what waits for it: the guest may run elsewhere
    failed = ERROR if operation == READ else FLUSH_FAILED
    assert [(0, failed), (1, ERROR)] == sorted((a.id, a.status) for a in line.responses(2))
    assert (0, 2) == counted(line, "held", "errors")
    assert host.hypervisor.mapped_pages == 0


@pytest.mark.usefixtures("hurry")
@in_order_or_not
@pytest.mark.parametrize("ended", [True, False])
def test_retries_that_are_paused(host, threads, ended):
    """Nothing of them reaches the storage until they are resumed; at the end nothing at all."""
    backend = Ailing(threads, 0)
    line = host.line(Disk(backend, holds=True))
    refs = host.share(2).refs
    line.put(one(0, WRITE, 0, refs[0]))
    line.kick()
    backend.wait_for(0, 3)
    line.queue.pause_retries(True)
    for number in (1, 2):  # a retry that had begun has ended before the second
        assert OKAY == line.ask(one(number, WRITE, 8, refs[1])).status
    tries = backend.tries.count(0)
    backend.repair()
    for number in range(3, 20):
        assert (number, OKAY) == line.ask(one(number, WRITE, 8, refs[1]))[::2]
    assert tries == backend.tries.count(0)
    if ended:
        assert line.queue.stop(PATIENCE)
        assert (0, ERROR) == line.responses(1)[0][::2]
        assert tries == backend.tries.count(0)
    else:
        line.queue.pause_retries(False)
        assert (0, OKAY) == line.responses(1)[0][::2]


@pytest.mark.usefixtures("hurry")
@in_order_or_not
def test_no_more_is_held_than_may_be_on_its_way(host, monkeypatch, threads):
    monkeypatch.setattr(queue_module, "MAX_IN_FLIGHT", 3 * 256 * 4096)
    backend = Ailing(threads, *range(32))
    line = host.line(Disk(backend, holds=True))
    refs = host.share(32).refs
    line.put(*(one(sector, WRITE, sector, ref) for sector, ref in enumerate(refs)))
    line.kick()
    backend.wait_for(0, 8)
    host.until(lambda: counted(line, "held") == (3,))
    assert {0, 1, 2} == set(backend.tries)
    assert (3,) == counted(line, "in_flight")
    backend.repair()
    answers = line.responses(32)
    assert {(id_, OKAY) for id_ in range(32)} == {(a.id, a.status) for a in answers}


@pytest.mark.usefixtures("hurry")
@in_order_or_not
def test_it_is_told_that_the_storage_fails_and_that_it_works_again(
    host, monkeypatch, caplog, threads
):
    monkeypatch.setattr(disk_module.time, "monotonic", lambda: 1000.0)
    caplog.set_level("INFO")
    backend = Ailing(threads, *range(20))
    line = host.line(Disk(backend, holds=True))
    refs = host.share(20).refs
    line.put(*(one(sector, WRITE, sector, ref) for sector, ref in enumerate(refs)))
    line.kick()
    # Each is known to be held, in a thread or not, when it is tried for the second time.
    host.until(lambda: all(backend.tries.count(sector) > 1 for sector in range(20)))
    (said,) = caplog.messages
    assert "write failed in Ailing, to be retried" in said
    backend.repair()
    line.responses(20)
    assert [said, "the storage works again"] == caplog.messages


@pytest.mark.usefixtures("hurry")
@in_order_or_not
def test_it_is_told_when_the_last_retry_ends_in_another_error(host, threads):
    backend = Ailing(threads, 0)
    disk, told = Disk(backend, holds=True), []
    disk.on_error = disk.on_retry = disk.on_recovery = told.append
    line = host.line(disk)
    ref = host.share().refs[0]
    line.put(one(0, WRITE, 0, ref))
    line.kick()
    backend.wait_for(0, 3)
    backend.error = ValueError  # as one that is no longer there, say
    assert ERROR == line.responses(1)[0].status
    assert "OSError" in told[0]
    assert "ValueError" in told[1]
    assert ["no request is queued for retry any longer"] == told[2:]
    assert retry._PAUSES[0] == line.queue._retries.pause
    backend.error = OSError
    line.put(one(0, WRITE, 0, ref))
    line.kick()
    backend.wait_for(0, 3)
    backend.repair()
    assert OKAY == line.responses(1)[0].status
    assert "the storage works again" == told[-1]
    assert 5 == len(told)


@pytest.mark.usefixtures("hurry")
def test_it_works_again_when_all_queues_have_nothing_to_retry(host):
    backend = Ailing(1, 0, 1)
    disk, told = Disk(backend, holds=True), []
    disk.on_recovery = told.append
    lines = [host.line(disk), host.line(disk)]
    for sector, line in enumerate(lines):
        line.put(one(0, WRITE, sector, host.share().refs[0]))
        line.kick()
        backend.wait_for(sector, 3)
    for sector, line in enumerate(lines):
        assert [] == told
        backend.broken.discard(sector)
        assert OKAY == line.responses(1)[0].status
    assert ["the storage works again"] == told


@pytest.mark.usefixtures("tried_once")
@in_order_or_not
def test_it_is_told_when_what_was_queued_for_retry_is_given_up(host, threads):
    disk, told = Disk(Ailing(threads, 0), holds=True), []
    disk.on_recovery = told.append
    line = host.line(disk)
    line.put(one(0, WRITE, 0, host.share().refs[0]))
    line.kick()
    host.until(lambda: counted(line, "held") == (1,))
    assert line.queue.stop(PATIENCE)
    assert ["no request is queued for retry any longer"] == told


# -- how long the oldest request has been under way ----------------------------------------


@in_order_or_not
@pytest.mark.parametrize("operation", [READ, WRITE_BARRIER, FLUSH])
def test_a_backend_that_hangs_is_seen(host, threads, operation):
    backend = Gate()
    backend.threads = threads
    line = host.line(backend)
    ref = host.share().refs[0]
    assert 0 == line.queue.stalled_for
    line.ask(one(0, READ, 1, ref))
    host.until(lambda: line.queue.stalled_for == 0)
    backend.shut(0)
    line.put(one(1, operation, 0, ref))
    line.kick()
    backend.wait_for(2)
    before = line.queue.stalled_for
    host.until(lambda: line.queue.stalled_for > before + 0.02)
    if threads > 1:  # nor do others hide it
        line.put(one(2, READ, 1, ref))
        line.kick()
        if operation != WRITE_BARRIER:
            line.responses(1)
        assert line.queue.stalled_for > before + 0.02
    backend.open(0)
    line.responses(2 if threads > 1 and operation == WRITE_BARRIER else 1)
    host.until(lambda: line.queue.stalled_for == 0)


def test_a_barrier_that_waits_for_a_backend_that_hangs(host):
    backend = Gate()
    line = host.line(backend)
    refs = host.share(2).refs
    backend.shut(0)
    line.put(one(0, WRITE, 0, refs[0]), one(1, WRITE_BARRIER, 1, refs[1]))
    line.kick()
    host.until(lambda: line.queue.stalled_for > 0.05)
    backend.open(0)
    line.responses(2)
    host.until(lambda: line.queue.stalled_for == 0)


@pytest.mark.usefixtures("tried_once")
@in_order_or_not
@pytest.mark.parametrize("operation", [READ, WRITE_BARRIER])
def test_what_is_held_does_not_hang(host, threads, operation):
    line = host.line(Disk(Ailing(threads, 0), holds=True))
    refs = host.share(2).refs
    line.put(one(0, operation, 0, refs[0]))
    line.kick()
    host.until(lambda: counted(line, "held") == (1,))
    host.until(lambda: line.queue.stalled_for == 0)
    time.sleep(0.01)
    assert 0 == line.queue.stalled_for
    assert line.queue.stop(PATIENCE)
    line.responses(1)


@pytest.mark.usefixtures("hurry")
@in_order_or_not
@pytest.mark.parametrize("operation", [READ, WRITE_BARRIER])
def test_a_backend_that_hangs_when_it_is_tried_again(host, threads, operation):
    backend = Gate()
    backend.threads = threads
    line = host.line(Disk(backend, holds=True))
    do, failures = backend._do, [OSError(errno.EIO, "broken")] * 3

    def failing(name):
        if failures:
            raise failures.pop()
        do(name)

    backend._do = failing
    backend.shut(0)
    backend.shut("flush")
    line.put(one(1, operation, 0, host.share().refs[0]))
    line.kick()
    backend.wait_for(1)
    host.until(lambda: line.queue.stalled_for > 0.05)
    backend.open()
    line.responses(1)


# -- a ring on which another process was killed --------------------------------------------


class Left:
    """An orphan: eight writes on a ring, and its journal.

    It had taken the first six; 2 and 5 are done, and it was about to tell so. Request n writes
    page n to sector 8 n.
    """

    RESPONSES = tuple(encode_response(id_, WRITE, OKAY) for id_ in (2, 5))
    WAITING = (0, 1, 3, 4)

    def __init__(self, host, start):
        self.host = host
        self.start = start
        self.pages, self.data = host.share(), host.share(8)
        self.data.view[:] = random.Random(4).randbytes(8 * 4096)
        self.channel = host.guest.bind_unbound(0)
        self.ring = FrontRing(self.pages.view, X86_64.slot_size, host.guest.fence, start)
        self.shape = Ring(tuple(self.pages.refs), self.channel.port)
        self.slots = [
            X86_64.encode(whole(id_, WRITE, 8 * id_, [self.data.refs[id_]])).ljust(112, b"\0")
            for id_ in range(8)
        ]
        for slot in self.slots:
            self.ring.put(slot)
        self.ring.push()
        self.memory = memoryview(bytearray(JOURNAL_SIZE))
        self.queues = []

    def note(self, responses=RESPONSES, waiting=WAITING, start=None):
        journal = Journal(self.memory)
        journal.begin(self.shape, 112)
        start = self.start if start is None else start
        journal.note(start, responses, [self.slots[id_] for id_ in waiting])

    def tell(self, responses=RESPONSES):
        """Do what comes right after the note."""
        for number, response in enumerate(responses):
            at = 64 + (self.start + number & 31) * 112
            self.pages.view[at : at + 12] = response
        with self.pages.view[:16].cast("I") as indices:
            indices[2] = self.start + len(responses) & 0xFFFF_FFFF

    def successor(self, disk, on_failure=print):
        made = queue_of(
            self.host,
            self.pages.refs,
            self.channel.port,
            disk,
            on_failure=on_failure,
            journal=Journal(self.memory),
        )
        self.queues.append(made)
        return made

    def answers(self, count):
        found = []

        def enough():
            found.extend(map(decode_response, self.ring.take()))
            return len(found) >= count

        self.host.until(enough)
        time.sleep(0.005)  # for one too many
        found.extend(map(decode_response, self.ring.take()))
        return sorted(found)

    def close(self):
        for made in self.queues:
            assert made.stop(PATIENCE)
        self.ring.close()
        self.channel.close()


@pytest.fixture(params=[0, 2**32 - 3, 2**31 - 1])
def left(host, request):
    left = Left(host, request.param)
    yield left
    left.close()


@in_order_or_not
@pytest.mark.parametrize("told", [False, True])
def test_each_request_is_answered_once_though_its_process_was_killed(host, left, threads, told):
    in_flight = []

    def watched(buffers, offset):
        in_flight.append(disk.statistics.as_dict()["in_flight"])
        type(backend).write(backend, buffers, offset)

    backend = host.memory(SIZE, threads=threads, write=watched)
    disk = Disk(backend)
    left.note()
    if told:
        left.tell()
    notifications = host.hypervisor.counters.notifications
    left.successor(disk).start()
    assert [Response(id_, WRITE, OKAY) for id_ in range(8)] == left.answers(8)
    assert [0, 1, 3, 4, 6, 7] == sorted(offset // 4096 for _, offset, _ in backend.calls)
    for id_ in (0, 1, 3, 4, 6, 7):
        assert (
            left.data.view[4096 * id_ : 4096 * (id_ + 1)]
            == backend.data[4096 * id_ : 4096 * (id_ + 1)]
        )
    assert host.hypervisor.counters.notifications > notifications
    host.until(lambda: disk.statistics.as_dict()["in_flight"] == 0)
    assert 1 <= min(in_flight) <= max(in_flight) <= 6
    assert 6 == disk.statistics.as_dict()["requests"]


def test_the_guest_is_notified_though_nothing_is_left_to_do(host, left):
    """The process may have been killed between its last response and the event."""
    done = tuple(encode_response(id_, WRITE, OKAY) for id_ in range(8))
    left.note(done, ())
    left.tell(done)
    notifications = host.hypervisor.counters.notifications
    left.successor(Disk(host.memory(SIZE))).start()
    host.until(lambda: host.hypervisor.counters.notifications == notifications + 1)
    assert list(range(8)) == [answer.id % 8 for answer in left.answers(8)]


def test_who_begins_where_a_process_was_killed_before_it_noted_anything(host, left):
    backend = host.memory(SIZE)
    Journal(left.memory).begin(left.shape, 112)
    left.successor(Disk(backend)).start()
    assert [Response(id_, WRITE, OKAY) for id_ in range(8)] == left.answers(8)
    assert left.data.view == backend.data[: 8 * 4096]


@pytest.mark.parametrize("other", ["ring", "place"])
def test_what_is_noted_of_another_ring_is_not_done(host, left, other):
    if other == "ring":
        left.shape = left.shape._replace(event_channel=left.shape.event_channel + 1)
        left.note()
    else:
        left.note(start=left.start + 1 & 0xFFFF_FFFF)
    backend = host.memory(SIZE)
    left.successor(Disk(backend)).start()
    assert [Response(id_, WRITE, OKAY) for id_ in range(8)] == left.answers(8)
    assert 8 == len(backend.calls)  # all those of the ring, and none of the journal


def test_a_successor_that_never_starts_leaves_it_to_the_next(host, left):
    left.note()
    assert left.successor(Disk(host.memory(SIZE))).stop()
    left.successor(Disk(host.memory(SIZE))).start()
    assert [Response(id_, WRITE, OKAY) for id_ in range(8)] == left.answers(8)


def test_one_that_ends_as_it_should_leaves_nothing(host, left):
    left.note()
    queue = left.successor(Disk(host.memory(SIZE)))
    queue.start()
    left.answers(8)
    assert Journal(left.memory).recall(left.shape, 112) is not None
    assert queue.stop(PATIENCE)
    assert Journal(left.memory).recall(left.shape, 112) is None


def test_what_is_under_way_is_noted_when_others_are_answered(host, left):
    """So that a successor of the successor finds it: slots, order, and where the ring stands."""
    backend = Gate()
    for sector in (8, 24, 48):  # requests 1 and 3, which were taken before, and 6
        backend.shut(sector)
    left.note()
    left.successor(Disk(backend)).start()
    assert [0, 2, 4, 5, 7] == [answer.id for answer in left.answers(5)]
    noted = Journal(left.memory).recall(left.shape, 112)
    assert [left.slots[id_] for id_ in (1, 3, 6)] == noted.requests
    assert left.start + 5 & 0xFFFF_FFFF == noted.start + len(noted.responses) & 0xFFFF_FFFF
    backend.open()
    assert [1, 3, 6] == [answer.id for answer in left.answers(3)]
    assert [] == Journal(left.memory).recall(left.shape, 112).requests


@in_order_or_not
def test_a_successor_that_hangs_is_seen(host, left, threads):
    backend = Gate()
    backend.threads = threads
    backend.shut(0)
    left.note()
    queue = left.successor(Disk(backend))
    queue.start()
    host.until(lambda: queue.stalled_for > 0.05)
    backend.open()
    left.answers(8)
    host.until(lambda: queue.stalled_for == 0)


@pytest.mark.usefixtures("hurry")
@in_order_or_not
def test_what_a_successor_cannot_do_is_held(host, left, threads):
    backend = Ailing(threads, 8, 24)
    disk = Disk(backend, holds=True)
    left.note()
    left.successor(disk).start()
    assert [0, 2, 4, 5, 6, 7] == [answer.id for answer in left.answers(6)]
    backend.wait_for(8, 3)
    assert 2 == disk.statistics.as_dict()["in_flight"]
    noted = Journal(left.memory).recall(left.shape, 112)
    assert [left.slots[id_] for id_ in (1, 3)] == noted.requests
    backend.repair()
    assert [Response(1, WRITE, OKAY), Response(3, WRITE, OKAY)] == left.answers(2)
    host.until(lambda: disk.statistics.as_dict()["in_flight"] == 0)


def test_a_journal_that_knows_of_more_than_was_asked_for(host, left, caplog):
    """What it has is answered; the ring, which cannot be right, is not served."""
    left.slots += [left.slots[0]] * 24
    left.note((), range(32))
    failures = []
    left.successor(Disk(host.memory(SIZE)), failures.append).start()
    host.until(lambda: "the guest's ring is not served any longer" in caplog.text)
    assert not failures


# -- a slow disk ----------------------------------------------------------------------------


class Clock:
    """The time, of both clocks of a queue: it stands still but for :meth:`tick`."""

    def __init__(self, monkeypatch):
        self.now = self.coarse = 1000.0
        monkeypatch.setattr(queue_module, "coarse", lambda: self.coarse)
        for module in (queue_module, idle, retry, stall):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)

    def tick(self, seconds):
        self.now += seconds
        self.coarse += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Slow(Backend):
    """A disk that takes half a second for each read or write, and notes what the guest knows.

    Attributes:
        answered: to be called when a request begins: how many are answered so far.
        known: what it said, each time.
        seconds: so many.
    """

    size = SIZE

    def __init__(self, clock):
        self.clock = clock
        self.seconds = 0.5
        self.answered = lambda: 0
        self.known = []

    def read(self, buffers, offset):
        self.known.append(self.answered())
        self.clock.tick(self.seconds)

    write = read


@every_way
@pytest.mark.parametrize("pages", [1, 8])
def test_a_slow_disk_answers_as_it_goes(host, clock, way, pages):
    """Its guest need not wait for a whole batch, nor take the disk for dead."""
    backend = Slow(clock)
    line = host.line(backend, **way)
    refs = host.share(16 * pages).refs
    runs = [refs[start : start + pages] for start in range(0, len(refs), pages)]
    # none begins where another ended, so that each is a call of its own
    requests = [whole(id_, READ, 8 * pages * (15 - id_), run) for id_, run in enumerate(runs)]
    for speed in ("slow from the beginning", "and when all pages are known"):
        first, backend.known[:] = line.ring._consumed, []
        with line.pages.view[:16].cast("I") as indices:
            backend.answered = lambda first=first, indices=indices: indices[2] - first
            line.ask(*requests)
        most = 1 if way is KEPT and pages == 8 else 0  # one waits to be joined with its neighbour
        late = [number - known for number, known in enumerate(backend.known)]
        assert max(late) <= most, speed


def test_a_disk_that_becomes_slow(host, clock):
    """The clock is not looked at for each request of a quick one."""
    backend = Slow(clock)
    line = host.line(backend, **KEPT)
    refs = host.share(32).refs
    requests = [whole(id_, READ, 8 * (31 - id_), [ref]) for id_, ref in enumerate(refs)]
    backend.seconds = 0
    for _ in range(4):
        line.ask(*requests)
    backend.seconds, backend.known[:] = 0.5, []
    with line.pages.view[:16].cast("I") as indices:
        first = line.ring._consumed
        backend.answered = lambda: indices[2] - first
        line.ask(*requests)
    late = [number - known for number, known in enumerate(backend.known)]
    assert max(late) <= 16
    assert {0} == set(late[17:])


@pytest.mark.parametrize("latency", [True, False])
def test_a_disk_of_a_millisecond_answers_as_it_goes(host, clock, latency):
    """From the second batch on, timed or not: the first one shows how slow it is."""
    backend = Slow(clock)
    line = host.line(backend, **KEPT, latency=latency)
    refs = host.share(16).refs
    requests = [whole(id_, READ, 16 * id_, [ref]) for id_, ref in enumerate(refs)]

    def late():
        backend.known[:] = []
        with line.pages.view[:16].cast("I") as indices:
            first = line.ring._consumed
            backend.answered = lambda: indices[2] - first
            line.ask(*requests)
        host.until(lambda: counted(line, "in_flight") == (0,))  # the batch's end
        return max(number - known for number, known in enumerate(backend.known))

    backend.seconds = 0.001
    late()
    assert 0 == late()
    backend.seconds = 0.0001
    late()
    assert late() > 8  # as long as it is quick, many at once cost the guest the least


def test_an_answer_left_from_a_batch_is_not_late(host, clock):
    """A guest that has always one more request than are answered leaves few to publish."""
    backend = Slow(clock)
    line = host.line(backend, **KEPT)
    refs = host.share(12).refs
    rest = [whole(id_, READ, 16 * id_, [ref]) for id_, ref in enumerate(refs)]
    with line.pages.view[:16].cast("I") as indices:

        def answered():
            if rest:
                line.put(rest.pop(0))
                line.ring.push()
            return indices[2]

        backend.answered = answered
        line.put(rest.pop(0))
        line.kick()
        line.responses(12)
    assert list(range(12)) == backend.known


@pytest.mark.usefixtures("hurry")
def test_a_slow_disk_answers_as_it_goes_when_it_works_again(host, clock):
    backend = Slow(clock)
    backend.answered, do = lambda: 0, backend.write
    backend.write = lambda buffers, offset: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
    line = host.line(Disk(backend, holds=True))
    refs = host.share(6).refs
    line.put(*(whole(id_, WRITE, 16 * id_, [ref]) for id_, ref in enumerate(refs)))
    line.kick()
    host.until(lambda: counted(line, "held") == (6,))
    with line.pages.view[:16].cast("I") as indices:
        backend.answered = lambda: indices[2]
        line.disk._write = line.disk._write_first = do
        line.disk.moves = line.disk.moves._replace(write=do)
        while len(backend.known) < 6:
            clock.tick(0.001)
            time.sleep(0.001)
        line.responses(6)
    assert list(range(6)) == backend.known


def test_a_successor_with_a_slow_disk_answers_as_it_goes(left, clock):
    """Else a watchdog that kills it has the next one begin anew."""
    backend = Slow(clock)
    left.note()
    with left.pages.view[:16].cast("I") as indices:
        backend.answered = lambda: indices[2] - left.start & 0xFFFF_FFFF
        noted = []

        def write(buffers, offset):
            Slow.read(backend, buffers, offset)
            noted.append(Journal(left.memory).recall(left.shape, 112).requests)

        backend.write = write
        left.successor(Disk(backend)).start()
        left.answers(8)
    # those that had been done were published at once, but not noted anew
    assert [2, 3, 4, 5, 6, 7] == backend.known
    slots = left.slots
    assert [slots[at] for at in (1, 3, 4)] == noted[1]
    assert [slots[at] for at in (3, 4)] == noted[2]


def test_a_barrier_of_which_a_successor_learns_does_not_hide_what_comes_after_it(host, left):
    """What it publishes before the barrier tells the next successor of all the others."""
    barrier = X86_64.encode(whole(1, WRITE_BARRIER, 8, [left.data.refs[1]])).ljust(112, b"\0")
    left.slots[1] = barrier
    left.note()
    backend = Gate()
    backend.shut(8)
    left.successor(Disk(backend)).start()
    backend.wait_for(2)  # a write that came before it, then the barrier
    noted = Journal(left.memory).recall(left.shape, 112)
    try:
        assert [left.slots[id_] for id_ in (1, 3, 4)] == noted.requests
        assert left.start + 3 & 0xFFFF_FFFF == noted.start + len(noted.responses) & 0xFFFF_FFFF
    finally:
        backend.open()
    left.answers(8)


@every_way
def test_each_answer_counts_as_progress_though_it_is_not_published(host, clock, way):
    backend = Gate()
    backend.threads = 1
    line = host.line(backend, **way)
    refs = host.share(4).refs
    requests = [whole(id_, READ, 16 * id_, [ref]) for id_, ref in enumerate(refs)]
    line.ask(*requests)
    host.until(lambda: line.queue.stalled_for == 0)
    for sector in (0, 16, 32, 48):
        backend.shut(sector)
    line.put(*requests)
    line.kick()
    for number, sector in enumerate((0, 16, 32, 48)):
        backend.wait_for(4 + number + 1)
        assert 0 == line.queue.stalled_for
        clock.now += 50  # by the other clock no time passes
        assert 50 == line.queue.stalled_for
        backend.open(sector)
    line.responses(4)
    host.until(lambda: line.queue.stalled_for == 0)


@in_order_or_not
def test_each_part_of_a_long_discard_counts_as_progress(host, clock, threads):
    """Linux 7 discards 2 TiB with one request: no watchdog may end us amid it."""

    class Vast(Gate):
        size = 5 << 40

        def discard(self, offset, length):
            self._do(offset)

    backend = Vast()
    backend.threads = threads
    line = host.line(backend)
    length = (1 << 41) - 512  # what Linux makes of 5 TiB
    parts = [number << 34 for number in range(length + (1 << 34) - 1 >> 34)]
    slow = parts[:3]
    for part in slow:
        backend.shut(part)
    line.put(Discard(7, DISCARD, 0, length // 512, secure=False))
    line.kick()
    for number, part in enumerate(slow, 1):
        backend.wait_for(number)
        # the queue's own thread may still be about to note that a worker has it
        host.until(lambda: line.queue.stalled_for == 0)
        clock.now += 50
        assert 50 == line.queue.stalled_for
        backend.open(part)
    (answer,) = line.responses(1)
    assert Response(7, DISCARD, OKAY) == answer
    assert parts == backend.wait_for(len(parts))
    host.until(lambda: line.queue.stalled_for == 0)


def test_what_waits_for_a_thread_is_not_under_way(host, clock):
    backend = Gate()
    backend.threads = 2
    line = host.line(backend)
    refs = host.share(4).refs
    for number in range(4):
        backend.shut(16 * number)
    line.put(*(whole(id_, READ, 16 * id_, [ref]) for id_, ref in enumerate(refs)))
    line.kick()
    backend.wait_for(2)
    host.until(lambda: counted(line, "in_flight") == (4,))
    for number in (0, 1):
        backend.open(16 * number)
        backend.wait_for(3 + number)
        host.until(lambda number=number: len(line.queue._unanswered) == 3 - number)
        clock.tick(50)
    assert 100 == line.queue.stalled_for  # the third, which began before the second had ended
    backend.open(32)
    host.until(lambda: line.queue.stalled_for == 50)
    backend.open(48)
    line.responses(4)
    assert 0 == line.queue.stalled_for


class Many(Asynchronous):
    """Begins requests, and ends those that it is told to, by their offsets."""

    def __init__(self):
        super().__init__()
        self.begun = {}

    def _begin(self, request):
        self.begun[request.offset] = request

    def _progress(self):
        self._told()

    def close(self):
        self.begun.clear()
        super().close()

    def end(self, offset, error=None):
        with self._lock:
            self._end(self.begun.pop(offset), error)
            self._tell()


def test_an_asynchronous_backend_may_have_requests_wait_for_others(host, clock):
    """Its oldest counts, from when it is that: a server does one after the other."""
    backend = Backend()
    backend.size, backend.threads = SIZE, 1
    backend.asynchronous = many = Many()
    host._stack.callback(many.close)
    line = host.line(backend)
    refs = host.share(3).refs
    line.put(*(whole(id_, READ, 8 * id_, [ref]) for id_, ref in enumerate(refs)))
    line.kick()
    host.until(lambda: len(many.begun) == 3)
    assert 0 == line.queue.stalled_for
    clock.tick(50)
    assert 50 == line.queue.stalled_for
    many.end(0)
    line.responses(1)
    assert 0 == line.queue.stalled_for
    clock.tick(50)
    many.end(2 * 4096)  # not the oldest: that one may be lost
    line.responses(1)
    assert 50 == line.queue.stalled_for
    many.end(4096)
    line.responses(1)
    assert 0 == line.queue.stalled_for


class _Broken(Many):
    """Raises what an author did not think of, on each look at what is over."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.is_open = True

    def _begin(self, request):
        super()._begin(request)
        self._tell()

    def _progress(self):
        raise self.error

    def close(self):
        self.is_open = False
        super().close()


@pytest.mark.parametrize("error", [RuntimeError("no idea"), BackendError("no idea")])
def test_an_asynchronous_backend_that_raises_ends_its_queue_with_errors(host, error):
    backend = Backend()
    backend.size = SIZE
    backend.asynchronous = many = _Broken(error)
    host._stack.callback(many.close)
    line = host.line(backend)
    line.put(*(whole(id_, READ, 8 * id_, [ref]) for id_, ref in enumerate(host.share(2).refs)))
    line.kick()
    host.until(lambda: line.failures)
    assert line.queue.stop(PATIENCE)
    assert [Response(id_, READ, ERROR) for id_ in range(2)] == line.responses(2)
    assert [error] == line.failures
    assert not many.is_open
    assert 0 == host.hypervisor.mapped_pages


def test_what_an_asynchronous_backend_cannot_begin_is_an_error_of_that_request(host, caplog):
    backend = Backend()
    backend.size = SIZE
    backend.asynchronous = many = Many()
    begin = many._begin

    def broken(request):
        if request.offset == 0:
            raise RuntimeError("no idea")
        begin(request)

    many._begin = broken
    host._stack.callback(many.close)
    line = host.line(backend)
    line.put(*(whole(id_, READ, 8 * id_, [ref]) for id_, ref in enumerate(host.share(2).refs)))
    line.kick()
    assert [Response(0, READ, ERROR)] == line.responses(1)
    assert "no idea" in caplog.text
    host.until(lambda: many.begun)
    many.end(4096)
    assert [Response(1, READ, OKAY)] == line.responses(1)
    assert 0 == many.unfinished
    assert not line.failures


@pytest.fixture
def many():
    many = Many()
    yield many
    many.close()


@pytest.fixture
def known(host, many):
    """A line of an asynchronous backend, and requests whose pages it knows already."""
    backend = Backend()
    backend.size = SIZE
    backend.asynchronous = many
    line = host.line(backend, persistent=True)
    refs = host.share(3).refs
    for operation in (READ, WRITE):
        for id_, ref in enumerate(refs):
            line.put(whole(id_, operation, 8 * id_, [ref]))
            line.kick()
            host.until(lambda id_=id_: 4096 * id_ in many.begun)
            many.end(4096 * id_)
            line.responses(1)

    def ask(operation):
        line.put(*(whole(id_, operation, 8 * id_, [ref]) for id_, ref in enumerate(refs)))
        line.kick()
        host.until(lambda: len(many.begun) == 3)

    return line, ask


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_requests_of_known_pages_are_answered_as_they_end(known, many, operation):
    line, ask = known
    before = line.disk.statistics.as_dict()
    ask(operation)
    many.end(8192)
    assert [Response(2, operation, OKAY)] == line.responses(1)
    many.end(0, OSError(errno.EILSEQ, "no"))
    assert [Response(0, operation, ERROR)] == line.responses(1)
    many.end(4096)
    assert [Response(1, operation, OKAY)] == line.responses(1)
    assert line.queue.stop(PATIENCE)
    after = line.disk.statistics.as_dict()
    name = "reads" if operation == READ else "writes"
    moved = "bytes_read" if operation == READ else "bytes_written"
    changes = {key: after[key] - before[key] for key in ("requests", "errors", name, moved)}
    assert {"requests": 3, "errors": 1, name: 3, moved: 3 * 4096} == changes
    assert 0 == after["in_flight"]


def test_requests_of_known_pages_are_retried_under_hold(host, many, monkeypatch):
    monkeypatch.setattr(retry, "_PAUSES", (0.001, 0.001))
    backend = Backend()
    backend.size = SIZE
    backend.asynchronous = many
    backend.repeats_flush = True
    line = host.line(Disk(backend, holds=True), persistent=True)
    (ref,) = host.share().refs
    for _ in range(2):
        line.put(whole(7, WRITE, 0, [ref]))
        line.kick()
        host.until(lambda: many.begun)
        many.end(0, OSError(errno.EIO, "not now"))
        host.until(lambda: many.begun)
        many.end(0)
        assert [Response(7, WRITE, OKAY)] == line.responses(1)
    assert line.queue.stop(PATIENCE)


def test_known_requests_that_a_broken_backend_has_are_answered_with_errors(known, many, host):
    line, ask = known
    ask(READ)

    def broken():
        raise RuntimeError("no idea")

    many._progress = broken
    many.end(0)
    host.until(lambda: line.failures)
    assert line.queue.stop(PATIENCE)
    assert [Response(id_, READ, ERROR) for id_ in range(3)] == line.responses(3)


def test_who_asks_while_another_is_answered_leaves_nothing_that_wakes_it_again_and_again(
    host, monkeypatch
):
    thread = host.line(host.memory()).queue._thread
    read, asked = os.read, []

    def read_and_be_asked(fd, count):
        found = read(fd, count)
        if fd == thread._wake_read and not asked:
            asked.append(True)
            thread.wake()
        return found

    monkeypatch.setattr(os, "read", read_and_be_asked)
    thread.wake()
    host.until(lambda: asked and not select.select([thread._wake_read], [], [], 0)[0])


def test_threads_take_parts_of_pages_that_were_mapped_together(host):
    """They are one memory: whoever cuts a piece off it takes nothing away from another."""

    class Parts(type(host.memory())):
        def read(self, buffers, offset):
            for _ in range(20_000):
                for buffer in buffers:
                    assert len(buffer[8:16]) == 8
            super().read(buffers, offset)

    disk = Parts(threads=8)
    disk.data[:] = random.Random(1).randbytes(disk.size)
    line = host.line(disk, persistent=True)
    pages = host.share(8)
    whole = Transfer(0, READ, 0, 64, tuple(pages.refs), (0,) * 8, (7,) * 8)
    assert OKAY == line.ask(whole).status
    for _ in range(5):
        requests = [
            Transfer(number, READ, 8 * number, 8, (ref,), (0,), (7,))
            for number, ref in enumerate(pages.refs)
        ]
        assert [OKAY] * 8 == [answer.status for answer in line.ask(*requests)]
    assert pages.view == disk.data[: len(pages.view)]
    assert line.queue.stop(PATIENCE)
    assert host.hypervisor.mapped_pages == 0
