"""XSA-155: what the guest rewrites while it is being read counts as it was, or as it is; no mix.

The first tests are exact: the queue's thread is traced, and at each of its steps in turn the
guest's memory is exchanged. Were a byte that decides something read twice, some step would give
an outcome that belongs to neither version, or the old one after the new one.
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time

import long_run
import pytest

from hostile.attacker import LONG, Memory, descriptors, direct, indirect
from xen_disk_py import blkif, ring
from xen_disk_py.blkif import ARM, X86_32, X86_64
from xen_disk_py.datapath import disk, grants, queue
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.queue import Options
from xen_disk_py.ring import BackRing

READ, WRITE = 0, 1
DATA_PATH = {module.__file__ for module in (blkif, disk, grants, queue, ring)}

ways = pytest.mark.parametrize(
    ("persistent", "grants"),
    [(True, Grants.AUTO), (False, Grants.COPY), (False, Grants.MAP)],
    ids=["kept", "copied", "mapped"],
)


class Tracer:
    """Does something at the n-th step that the queue's thread takes with a request.

    Steps are lines of the data path (opcodes in a long run), from the call of ``take`` that
    finds something to the ``push`` that publishes the answer.
    """

    def __init__(self):
        self.at = 0
        self.steps = 0
        self.act = None
        self.counts = False
        self.is_there = threading.Event()

    def arm(self, at, act):
        self.at, self.act, self.steps, self.counts = at, act, 0, False

    def trace(self, frame, event, arg):
        self.is_there.set()
        code = frame.f_code
        if code.co_filename not in DATA_PATH:
            return None
        frame.f_trace_opcodes = LONG
        if event == "call" and code is BackRing.take.__code__:
            self.counts = self.counts or frame.f_locals["self"].has_requests
        elif (
            event == "call"
            and code is BackRing.push.__code__
            and self.counts
            and frame.f_locals["self"].unpublished
        ):
            self.counts, self.at = False, 0
        if self.counts and self.at:
            self.steps += 1
            if self.steps == self.at:
                self.act()
        return self.trace

    @contextlib.contextmanager
    def tracing_new_threads(self):
        before = threading._trace_hook
        threading.settrace(self.trace)
        try:
            yield
        finally:
            threading.settrace(before)


@pytest.fixture
def traced(host, wire):
    """Return a function that makes a ring whose queue's thread is traced, and its tracer."""

    def make(**options):
        tracer = Tracer()
        with tracer.tracing_new_threads():
            line = wire(Memory(), **options)
            assert tracer.is_there.wait(60)  # a thread has started before it looks for a tracer
        return line, tracer

    return make


def outcomes(wire, tracer, slot, old, new, *, fresh):
    """Ask ``slot`` again and again; at its n-th step ``new()`` replaces what ``old()`` wrote.

    Args:
        fresh: whether what the queue knows of earlier requests is forgotten each time.

    Yields:
        What came of it: the answer, and the backend's calls.
    """

    def ask(at):
        if fresh:
            wire.queue._pages.plans.clear()
        wire.backend.calls.clear()
        wire.put(slot)
        old()
        tracer.arm(at, new)
        wire.kick()
        (answer,) = wire.responses(1)
        return tuple(answer), tuple(wire.backend.calls)

    at, (following, stride) = 1, long_run.stride(5)
    while True:
        outcome = ask(at)
        if not tracer.steps:  # it came amid a look: ``take`` had been called, and saw it then
            continue
        yield outcome
        if tracer.steps < at:  # all done before it came to that
            assert at > 40  # it was traced
            return
        at += following
        following = stride


def changes_once(found, before, after):
    """Say that outcomes are those of the new version, then of the old one, and nothing else."""
    switch = found.index(after)
    assert switch > 0
    assert [before] * switch + [after] * (len(found) - switch) == found


@ways
@pytest.mark.parametrize("fresh", [True, False], ids=["new", "known"])
@pytest.mark.parametrize("abi", [X86_64, X86_32, ARM], ids=lambda abi: abi.name)
@pytest.mark.parametrize("wrong", ["valid", "segments", "count", "reference", "sector"])
def test_xsa_155_a_slot(host, traced, abi, persistent, grants, fresh, wrong):
    wire, tracer = traced(abi=abi, persistent=persistent, options=Options(256, grants))
    one, two = host.share(2).refs
    slot = direct(abi, READ, 1, 8, [(one, 0, 7), (two, 0, 7)])
    other = {
        "valid": direct(abi, WRITE, 2, 800, [(two, 2, 3)]),
        "segments": direct(abi, READ, 2, 8, [(one, 0, 9), (two, 200, 7)]),
        "count": direct(abi, READ, 2, 8, [(one, 0, 7)] * 11, count=255),
        "reference": direct(abi, WRITE, 2, 8, [(3, 0, 7), (two, 0, 7)]),
        "sector": direct(abi, WRITE, 2, 2**64 - 8, [(one, 0, 7), (two, 0, 7)]),
    }[wrong]
    if LONG and (abi is not X86_64 or wrong == "count"):
        pytest.skip("the opcodes of one layout are enough")

    def place():
        return 64 + (wire.ring._produced - 1 & wire.ring.slots - 1) * abi.slot_size

    def write(data):
        def do():
            at = place()
            wire.pages.view[at : at + len(data)] = data

        return do

    (asked,) = wire.ask(slot)
    as_it_was = tuple(asked), tuple(wire.backend.calls)
    wire.backend.calls.clear()
    (asked,) = wire.ask(other)
    as_it_is = tuple(asked), tuple(wire.backend.calls)
    assert as_it_was != as_it_is
    found = list(outcomes(wire, tracer, slot, write(slot), write(other), fresh=fresh))
    changes_once(found, as_it_is, as_it_was)
    assert not wire.failures


@ways
@pytest.mark.parametrize("fresh", [True, False], ids=["new", "known"])
@pytest.mark.parametrize("wrong", ["valid", "shorter", "segments", "reference"])
def test_xsa_155_an_indirect_page(host, traced, persistent, grants, fresh, wrong):
    wire, tracer = traced(persistent=persistent, options=Options(256, grants))
    table, *refs = host.share(21).refs
    view = host._shared[-1].view
    good = descriptors([(ref, 0, 7) for ref in refs])
    bad = {
        "valid": descriptors([(ref, 0, 7) for ref in reversed(refs)]),
        "shorter": descriptors([(ref, 3, 3) for ref in refs]),
        "segments": descriptors([(ref, 7, 200) for ref in refs]),
        "reference": descriptors([(3, 0, 7)] * len(refs)),
    }[wrong]
    # What is in the disk's pages 0 to 19 shows which page got what.
    wire.backend.data[: 20 * 4096] = b"".join(bytes([n + 1]) * 4096 for n in range(20))
    slot = indirect(X86_64, READ, 1, 0, 20, [table])

    def write(data):
        def do():
            view[: len(data)] = data

        return do

    def shown():
        return tuple(view[4096 * n] for n in range(1, 21))

    def asking(first, second):
        for outcome in outcomes(wire, tracer, slot, first, second, fresh=fresh):
            yield outcome, shown()
            view[4096:] = bytes(20 * 4096)

    def ask(data):
        write(data)()
        view[4096:] = bytes(20 * 4096)
        wire.backend.calls.clear()
        (asked,) = wire.ask(slot)
        result = (tuple(asked), tuple(wire.backend.calls)), shown()
        view[4096:] = bytes(20 * 4096)
        return result

    as_it_was, as_it_is = ask(good), ask(bad)
    assert as_it_was != as_it_is
    changes_once(list(asking(write(good), write(bad))), as_it_is, as_it_was)
    assert not wire.failures


# -- how often it is read -------------------------------------------------------------------


class Counting:
    """A buffer that notes which of its bytes are copied out of it."""

    def __init__(self, view, reads, at=0):
        self.view = view
        self.reads = reads  # [first byte, end] of each copy
        self.at = at

    def __len__(self):
        return len(self.view)

    def __getitem__(self, where):
        start, stop, _ = where.indices(len(self.view))
        return Counting(self.view[start:stop], self.reads, self.at + start)

    def __setitem__(self, where, data):
        self.view[where] = data

    def __bytes__(self):
        self.reads.append([self.at, self.at + len(self.view)])
        return bytes(self.view)


@ways
def test_xsa_155_each_slot_is_read_once(host, wire, persistent, grants):
    reads = []

    def count(wire):
        wire.queue._ring._bytes = Counting(wire.pages.view, reads)

    line = wire(persistent=persistent, options=Options(256, grants), before_start=count)
    pages = host.share(12)
    table, *refs = pages.refs
    pages.view[:80] = descriptors([(ref, 0, 7) for ref in refs[:10]])
    expected = 0
    for round_ in range(8):  # the ring wraps; from the second round on requests are known
        slots = [
            direct(X86_64, READ, 1, 0, [(refs[0], 0, 7)]),
            direct(X86_64, WRITE, 2, 0, [(refs[1], 2, 3)]),
            indirect(X86_64, WRITE, 3, 80, 10, [table]),
            direct(X86_64, READ, 4, 2**63, [(refs[0], 0, 7)]),
            bytes([round_ + 100]) * 112,
        ]
        line.ask(*slots)
        expected += len(slots)
    bytes_read = sorted(at for start, stop in reads for at in range(start, stop, 112))
    assert all((start - 64) % 112 == 0 == (stop - start) % 112 for start, stop in reads)
    assert expected == len(bytes_read)
    slots = line.ring.slots
    assert sorted(64 + 112 * (n % slots) for n in range(expected)) == bytes_read


def test_xsa_155_each_indirect_descriptor_is_read_once_where_it_is_kept(host, wire):
    """On the quick way and on the other, which takes over what the quick one has copied."""
    reads = []
    line = wire(persistent=True)
    pages = host.share(12)
    table, *refs = pages.refs
    slot = indirect(X86_64, READ, 1, 0, 10, [table])
    pages.view[:80] = descriptors([(ref, 0, 7) for ref in refs[:10]])
    line.ask(slot)
    kept = line.queue._pages.kept
    kept[table] = Counting(kept[table], reads)
    line.ask(slot)
    assert [[0, 80]] == reads
    for segment in [(refs[10], 0, 7), (refs[10], 0, 9), (3, 0, 7)]:  # new, wrong, not granted
        reads.clear()
        pages.view[:8] = descriptors([segment])
        line.ask(slot)
        assert [[0, 80]] == reads
    del kept[table]


def test_xsa_155_each_indirect_descriptor_is_copied_once_where_it_is_copied(host, wire):
    line = wire(options=Options(256, Grants.COPY))
    pages = host.share(12)
    table, *refs = pages.refs
    pages.view[:80] = descriptors([(ref, 0, 7) for ref in refs[:10]])
    copied = []
    host.hypervisor.before_copy = lambda domid, refs, writable: copied.extend(refs)
    for _ in range(3):
        line.ask(indirect(X86_64, READ, 1, 0, 10, [table]))
        assert [table, *refs[:10]] == copied
        copied.clear()


def test_xsa_155_each_indirect_page_is_mapped_once_where_it_is_mapped(host, wire, monkeypatch):
    reads = []
    line = wire(options=Options(256, Grants.MAP))
    pages = host.share(12)
    table, *refs = pages.refs
    pages.view[:80] = descriptors([(ref, 0, 7) for ref in refs[:10]])
    map_grants = host.hypervisor.map_grants

    class Mapping:
        def __init__(self, mapping):
            self.view = Counting(mapping.view, reads)
            self.mapping = mapping

        def close(self):
            self.view.view = None
            self.mapping.close()

    def counting(domid, refs, *, writable):
        mapping = map_grants(domid, refs, writable=writable)
        return Mapping(mapping) if list(refs) == [table] else mapping

    monkeypatch.setattr(line.queue._pages._hypervisor, "map_grants", counting)
    for _ in range(3):
        line.ask(indirect(X86_64, READ, 1, 0, 10, [table]))
        assert [[0, 80]] == reads
        reads.clear()


# -- at full speed --------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("threads", [1, 4])
def test_xsa_155_all_is_rewritten_all_the_time(host, wire, persistent, grants, threads):
    """Slots, descriptors and data change under the queue's hands: legal answers, no harm."""
    answers = []

    def listen(wire):
        respond = wire.queue._ring.respond
        wire.queue._ring.respond = lambda data: (answers.append(data), respond(data))

    line = wire(
        Memory(threads=threads),
        order=1,
        persistent=persistent,
        options=Options(256, grants),
        before_start=listen,
    )
    pages = host.share(40)
    dice = random.Random(1)
    tables, data = pages.refs[:4], pages.refs[4:]
    good = [
        direct(X86_64, READ, 1, 0, [(data[0], 0, 7)]),
        direct(X86_64, WRITE, 2, 8, [(data[1], 0, 7), (data[2], 3, 5)]),
        *(indirect(X86_64, operation, 3, 0, 30, [ref]) for operation in (0, 1) for ref in tables),
    ]
    lists = [
        descriptors([(ref, 0, 7) for ref in data[:30]]),
        descriptors([(ref, 7, 0) for ref in data[:30]]),
        descriptors([(3, 0, 255)] * 30),
        bytes(240),
        b"\xff" * 240,
    ]
    stop = threading.Event()
    slots = line.ring.slots

    def scribble():
        while not stop.is_set():
            at = 64 + 112 * dice.randrange(slots)
            line.pages.view[at : at + 112] = dice.choice([*good, dice.randbytes(112)])
            at = 4096 * dice.randrange(4)
            pages.view[at : at + 240] = dice.choice(lists)
            at = 4096 * dice.randrange(4, 40)
            pages.view[at : at + 512] = dice.randbytes(512)

    scribblers = [threading.Thread(target=scribble) for _ in range(2)]
    for scribbler in scribblers:
        scribbler.start()
    try:
        asked = 0
        end = time.monotonic() + (20 if LONG else 0.1)
        while asked <= 16 or time.monotonic() < end:
            batch = dice.randint(1, slots)
            line.put(*(dice.choice(good) for _ in range(batch)))
            line.kick()
            line.responses(batch)  # what they say is overwritten, perhaps
            asked += batch
    finally:
        stop.set()
        for scribbler in scribblers:
            scribbler.join()
    assert asked == len(answers) > 16
    for answer in answers:
        _, operation, zero, status = struct.unpack("<QBBh", answer)
        assert zero == 0
        assert status in (0, -1, -2)
        assert 0 <= operation <= 255
    for what, offset, length in line.backend.calls:
        assert 0 <= offset <= offset + length <= line.backend.size, what
    pages.view[:240] = lists[0]
    (answer,) = line.ask(indirect(X86_64, READ, 9, 0, 30, [tables[0]]))
    assert (9, READ, 0) == answer
    assert not line.failures
