"""Any traffic, right and wrong, against a model of the protocol: every answer and every byte.

The model (``oracle.py``) reads raw slots by itself and does the requests on its own copy of the
disk and of the guest's pages. Requests whose order is not defined (several queues, or several
threads) are put together only if they have nothing in common.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections import Counter
from typing import NamedTuple

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis, of the extra 'test'")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hostile.attacker import BAD_REFERENCES, DOMID, LONG, Memory, Wire, descriptors, direct
from hostile.attacker import discard as discard_slot
from hostile.attacker import indirect as indirect_slot
from hostile.oracle import BARRIER, FLUSH, INDIRECT, READ, WRITE, Oracle
from xen_disk_py.blkif import ARM, X86_32, X86_64
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import PERSISTENT_LIMIT, Grants
from xen_disk_py.datapath.queue import Options
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine

SECTORS = 8192
PAGES = 320  # granted for reading and writing; two more for reading only
PLACES = st.integers(0, SECTORS - 1)
WRONG_PLACES = st.sampled_from([None] * 6 + [2**64 - 1, 2**64 - 8, 2**63, SECTORS - 1, SECTORS])
IDS = st.sampled_from([0, 1, 7, 2**64 - 1]) | st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**32)


def _defined(operation, segments):
    """Make a write of a read that goes to one page twice: in which order is not defined."""
    pages = {ref for ref, _, _ in segments}
    return WRITE if operation == READ and len(pages) < len(segments) else operation


class Use(NamedTuple):
    """What a request has to do with."""

    sectors: range
    writes: bool
    listed: set  # pages that its descriptors may stand in
    pages: set  # and those of its data
    changed: set  # pages that it changes


class Traffic(RuleBasedStateMachine):
    """A guest that does what it likes.

    Attributes:
        way: to its pages.
        threads: how many the disk lets in; with one, all has an order.
    """

    way = "kept"
    threads = 1

    @initialize(
        abi=st.sampled_from([X86_64, X86_32, ARM]),
        order=st.integers(0, 4),
        queues=st.integers(1, 4),
        back=st.integers(0, 40),
        most=st.sampled_from([0, 8, 256, 256, 1024]),
        shape=st.sampled_from(["plain", "plain", "plain", "read-only", "large sectors"]),
        seed=SEEDS,
    )
    def connect(self, abi, order, queues, back, most, shape, seed):
        way, threads = self.way, self.threads
        self.undo = undo = contextlib.ExitStack()
        self.machine = undo.enter_context(SimulatedMachine(domid=DOMID, pages=1024))
        self.hypervisor = undo.enter_context(SimulatedHypervisor(self.machine))
        self.guest = undo.enter_context(SimulatedGuest(self.machine))
        self.dice = random.Random(seed)
        self.abi = abi
        self.backend = Memory(
            SECTORS * 512,
            threads=threads,
            read_only=shape == "read-only",
            sector_size=4096 if shape == "large sectors" else 512,
        )
        self.backend.at_once = lambda offset: offset & 4096
        self.disk = Disk(self.backend)
        self.persistent = way.startswith(("kept", "promised"))
        self.limit = 8 if way == "kept few" else PERSISTENT_LIMIT
        grants = {"mapped": Grants.MAP, "promised but copied": Grants.COPY}.get(way, Grants.AUTO)
        # A page for reading only fails where pages are kept, and works where they are copied:
        # where both happen to it, it would take a model of what is kept.
        self.read_only_pages = way != "kept few"
        shared = undo.enter_context(self.guest.share_pages(0, PAGES, writable=True))
        fixed = undo.enter_context(self.guest.share_pages(0, 2, writable=False))
        self.refs = [*shared.refs, *fixed.refs]
        views = [shared.view, fixed.view]
        self.views = [view[at : at + 4096] for view in views for at in range(0, len(view), 4096)]
        undo.callback(self.views.clear)
        self.oracle = Oracle(
            padding=abi.slot_size - 108,
            most=most,
            sectors=SECTORS,
            read_only=self.backend.read_only,
            step=self.disk.alignment,
            pages=[bytearray(4096) for _ in self.refs],
            references={ref: number for number, ref in enumerate(self.refs)},
            keeps=way.startswith("kept"),
        )
        self.backend.data[:] = self.oracle.disk[:] = self.dice.randbytes(SECTORS * 512)
        self.wires = []
        for number in range(queues if threads > 1 else 1):
            wire = Wire(
                self.guest,
                self.hypervisor,
                self.disk,
                abi,
                order=order,
                persistent=self.persistent,
                options=Options(most, grants, self.limit),
                number=number,
                start=(-back) & 0xFFFF_FFFF,  # wraps soon, or stands at 0
            )
            undo.callback(wire.close)
            self.wires.append(wire)
        self.is_ordered = threads == 1
        self.pending = [[] for _ in self.wires]  # of each queue (response, what to do)
        self.under_way = []  # of each request its Use
        self.sent = 0

    # -- what the guest does ------------------------------------------------------------

    @rule(
        queue=st.integers(0, 3),
        id_=IDS,
        operation=st.sampled_from([READ, READ, WRITE, WRITE, BARRIER, FLUSH]),
        sector=PLACES,
        wrong=WRONG_PLACES,
        count=st.integers(0, 11),
        lie=st.sampled_from([None] * 12 + [12, 255]),
        seed=SEEDS,
        whole=st.booleans(),
        bad=st.sampled_from(["", "", "", "", "segment", "reference"]),
    )
    def direct(self, queue, id_, operation, sector, wrong, count, lie, seed, whole, bad):
        segments = self._segments(random.Random(seed), count, whole, bad, queue)
        sector = self._place(sector, segments) if wrong is None else wrong
        operation = _defined(operation, segments)
        self._put(queue, direct(self.abi, operation, id_, sector, segments, lie))

    @rule(
        queue=st.integers(0, 3),
        id_=IDS,
        operation=st.sampled_from([READ, READ, READ, WRITE, WRITE, WRITE, FLUSH, 255]),
        sector=PLACES,
        wrong=WRONG_PLACES,
        count=st.integers(1, 256) | st.sampled_from([0, 257, 600, 1025, 65535]),
        seed=SEEDS,
        whole=st.booleans(),
        bad=st.sampled_from(["", "", "", "", "segment", "reference", "page"]),
    )
    def indirect(self, queue, id_, operation, sector, wrong, count, seed, whole, bad):
        dice = random.Random(seed)
        pages = dice.sample(range(PAGES), 2)
        listed = self._segments(dice, min(count, 1024), whole, bad, queue)
        sector = self._place(sector, listed) if wrong is None else wrong
        operation = _defined(operation, listed)
        data = descriptors(listed)
        for number, page in enumerate(pages):
            self._fill(page, data[4096 * number : 4096 * (number + 1)].ljust(4096, b"\0"))
        refs = [self.refs[page] for page in pages]
        if bad == "page":
            refs[0] = dice.choice(BAD_REFERENCES)
        self._put(queue, indirect_slot(self.abi, operation, id_, sector, count, refs))

    @rule(
        queue=st.integers(0, 3),
        id_=IDS,
        sector=PLACES,
        wrong=WRONG_PLACES,
        sectors=st.integers(0, 64).map(lambda n: 8 * n)
        | st.integers(0, 64)
        | st.sampled_from([SECTORS, 2**64 - 1, 2**63]),
        flag=st.sampled_from([0, 0, 0, 1, 254]),
    )
    def discard(self, queue, id_, sector, wrong, sectors, flag):
        if wrong is not None:
            sector = wrong
        elif not sectors % 8:
            sector -= sector % 8
        self._put(queue, discard_slot(self.abi, id_, sector, sectors, flag))

    @rule(queue=st.integers(0, 3), data=st.binary(min_size=1, max_size=112))
    def anything(self, queue, data):
        self._put(queue, data[: self.abi.slot_size].ljust(self.abi.slot_size, b"\0"))

    @rule(queue=st.integers(0, 3), count=st.integers(1, 40), seed=SEEDS)
    def again(self, queue, count, seed):
        """The same few pages time after time, as blkfront does: the quick way."""
        dice = random.Random(seed)
        for _ in range(count):
            page = PAGES // 4 * queue + dice.randrange(6)
            operation = dice.choice([READ, WRITE])
            sector = 8 * dice.randrange(SECTORS // 8)
            if dice.random() < 0.2:
                sector = dice.choice([SECTORS - n for n in (0, 8, 9, 15, 16, 17)] + [2**64 - 1, 4])
            segments = [(self.refs[page], 0, 7), (self.refs[page + 8], 0, 7)]
            self._put(queue, direct(self.abi, operation, dice.getrandbits(64), sector, segments))

    @rule(queue=st.integers(0, 3))
    def notify(self, queue):
        self.wires[queue % len(self.wires)].channel.notify()

    @rule()
    def settle(self):
        """Collect all answers; the model does what the device has done."""
        for wire in self.wires:
            wire.queue._pages._turned = float("-inf")  # pages may leave for others now
            wire.kick()
        for wire, pending in zip(self.wires, self.pending):
            answers = [tuple(answer) for answer in wire.responses(len(pending))]
            expected = [answer for answer, _ in pending]
            if self.is_ordered:
                assert expected == answers
            else:
                assert Counter(expected) == Counter(answers)
            for _, todo in pending:
                if todo:
                    self.oracle.do(*todo)
            self.sent += len(pending)
            pending.clear()
        self.under_way = []  # of each request its Use
        assert self.oracle.disk == self.backend.data
        pages = self.oracle.pages
        assert [] == [n for n, page in enumerate(pages) if page != self.views[n]]
        if self.is_ordered:  # else a page may leave later than it should, with its request
            assert not any(wire.queue._pages._stuck for wire in self.wires)
        if not self.persistent:
            assert sum(len(w.pages.refs) for w in self.wires) == self.hypervisor.mapped_pages

    @invariant()
    def nothing_fails(self):
        assert not any(wire.failures for wire in getattr(self, "wires", ()))

    # -- how it does it -----------------------------------------------------------------

    def _place(self, sector, segments):
        """Make a sector one at which the segments have room, and that is aligned."""
        room = SECTORS - sum(max(0, last - first + 1) for _, first, last in segments)
        sector %= max(1, room)
        return sector - sector % self.disk.alignment

    def _segments(self, dice, count, whole, bad, queue):
        whole = whole or self.disk.alignment > 1
        part = PAGES // 4  # mostly its own, so that the queues have something to do at once
        pages = range(PAGES + 2 * self.read_only_pages)
        if dice.random() < 0.8:
            pages = range(queue * part, (queue + 1) * part)
        if count > len(pages):
            pages = range(PAGES)
        segments = []
        for page in dice.sample(pages, min(count, len(pages))):
            first = 0 if whole else dice.randrange(8)
            last = 7 if whole else dice.randint(first, 7)
            segments.append((self.refs[page], first, last))
        segments += dice.choices(segments, k=count - len(segments)) if segments else []
        if dice.random() < 0.7:  # pages for reading only would fail most large requests
            segments = [each for each in segments if each[0] not in self.refs[PAGES:]]
        if bad and segments:
            where = dice.randrange(len(segments))
            ref, first, last = segments[where]
            segments[where] = {
                "segment": (ref, *dice.choice([(1, 0), (0, 8), (7, 255), (255, 255)])),
                "reference": (dice.choice(BAD_REFERENCES), first, last),
            }.get(bad, segments[where])
        return segments

    def _fill(self, page, content):
        if any(page in use.pages for use in self.under_way):
            self.settle()
        self.views[page][:] = content
        self.oracle.pages[page][:] = content

    def _put(self, queue, slot):
        queue %= len(self.wires)
        wire = self.wires[queue]
        if not wire.ring.free:
            self.settle()
        operation, status, todo = self.oracle.judge(slot)
        if self._conflicts(self._use(slot, todo)):
            self.settle()
            operation, status, todo = self.oracle.judge(slot)
        (id_,) = struct.unpack_from("<Q", slot, 4 + self.oracle.layout)
        wire.put(slot)
        self.pending[queue].append(((id_, operation, status), todo))
        self.under_way.append(self._use(slot, todo))

    def _use(self, slot, todo):
        """Say what a request has to do with; pages that its descriptors may stand in, too."""
        operation, sector, sectors, segments = todo or (READ, 0, 0, [])
        number_of = self.oracle.number_of
        data = {number_of[ref] for ref, _, _ in segments}
        refs = struct.unpack_from("<8I", slot, 24 + self.oracle.layout)
        listed = {number_of[ref] for ref in refs if slot[0] == INDIRECT and ref in number_of}
        return Use(
            range(sector, sector + sectors),
            operation != READ,
            listed,
            data | listed,
            data if operation == READ else set(),
        )

    def _conflicts(self, use):
        if self.is_ordered:  # the model reads descriptors before it has done what is under way
            return any(use.listed & other.changed for other in self.under_way)
        return any(
            use.pages & other.changed
            or use.changed & other.pages
            or (
                (use.writes or other.writes)
                and use.sectors.start < other.sectors.stop
                and other.sectors.start < use.sectors.stop
            )
            for other in self.under_way
        )

    def teardown(self):
        if hasattr(self, "wires"):
            with self.undo:
                self.settle()
                counters = self.disk.statistics.as_dict()
                assert self.sent == counters["requests"]
                assert not counters["errors"]
            assert self.hypervisor.mapped_pages == 0


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("way", ["kept", "kept few", "copied", "mapped", "promised but copied"])
def test_traffic(way, threads):
    kind = type("Traffic", (Traffic,), {"way": way, "threads": threads})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=300 if LONG else 4,
            stateful_step_count=60 if LONG else 25,
            deadline=None,
            database=None,
            derandomize=not LONG,
            suppress_health_check=list(HealthCheck),
        ),
    )
