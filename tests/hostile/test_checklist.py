"""What went wrong in block backends before, and does not here; each test names its advisory.

The table in docs/security.md lists them all, with those that other modules test.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import random
import struct
import threading

import pytest
from long_run import repeat

from hostile.attacker import (
    BAD_REFERENCES,
    PATIENCE,
    Memory,
    descriptors,
    direct,
    discard,
    indirect,
    until,
)
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import ARM, MAX_QUEUES, X86_32, X86_64, Connection, Ring
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.queue import Options
from xen_disk_py.errors import HypervisorError
from xen_disk_py.simulated.frontend import RequestFailed
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import State

READ, WRITE, BARRIER, FLUSH, DISCARD = 0, 1, 2, 3, 5
OKAY, ERROR, NOT_SUPPORTED = 0, -1, -2
MEBIBYTE = 1 << 20
SECTORS = MEBIBYTE // 512

abis = pytest.mark.parametrize("abi", [X86_64, X86_32, ARM], ids=lambda abi: abi.name)
ways = pytest.mark.parametrize(
    ("persistent", "grants"),
    [(True, Grants.AUTO), (False, Grants.COPY), (False, Grants.MAP)],
    ids=["kept", "copied", "mapped"],
)
WAYS = [(True, Grants.AUTO), (False, Grants.COPY), (False, Grants.MAP)]


def operations(host):
    """Return how many times the hypervisor was asked for something of the guest's."""
    counters = host.hypervisor.counters
    return counters.maps, counters.copies


# -- the ring -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 4])
@pytest.mark.parametrize("start", [0, 2**32 - 3])
@pytest.mark.parametrize("beyond", [1, 2**31, -600])
def test_cve_2010_4247_a_producer_index_that_overflows(host, wire, caplog, order, start, beyond):
    """That ring is served no longer; the disk's other queue, and another disk, are."""
    disk = Disk(Memory(threads=4))
    attacked = wire(disk, order=order, start=start)
    sibling, other = wire(disk, number=1), wire()
    (ref,) = host.share().refs
    request = direct(X86_64, READ, 7, 0, [(ref, 0, 7)])
    slots = attacked.ring.slots
    answers = attacked.ask(*[request] * slots)  # exactly full is legal
    assert [(7, READ, OKAY)] * slots == answers
    calls = len(disk.backend.calls)
    with attacked.indices() as indices:
        answered = indices[2]
        indices[0] = answered + slots + beyond & 0xFFFF_FFFF
        attacked.channel.notify()
        until(lambda: "not served any longer" in caplog.text)
        until(attacked.queue._ended.is_set)
        assert answered == indices[2]
    assert calls == len(disk.backend.calls)
    for line in (sibling, other):
        assert [(7, READ, OKAY)] == line.ask(request)
    assert attacked.queue.stop(1)
    assert not attacked.failures


@pytest.mark.parametrize(
    ("persistent", "grants"),
    [(True, Grants.AUTO), (False, Grants.COPY), (False, Grants.MAP)],
    ids=["kept", "copied", "mapped"],
)
@pytest.mark.parametrize("first", [0, 1, 7])
def test_a_ring_that_the_guest_has_overwritten_with_data(host, wire, persistent, grants, first):
    """Its own ring is a granted page like any other; a read goes there as it goes anywhere."""
    line, other = wire(persistent=persistent, options=Options(256, grants)), wire()
    line.backend.data[:] = b"\xee" * MEBIBYTE
    own, (ref,) = line.pages.refs[0], host.share().refs
    line.put(*[direct(X86_64, READ, 1, 0, [(own, first, 7)])] * 3, bytes(112))
    line.kick()
    until(lambda: line.disk.statistics.as_dict()["requests"] >= 4)
    line.channel.notify()
    if not first:  # the indices, too: that is more requests than there can be
        until(line.queue._ended.is_set)
    assert line.queue.stop(5)
    assert [(2, READ, OKAY)] == other.ask(direct(X86_64, READ, 2, 0, [(ref, 0, 7)]))
    assert not line.failures


def test_the_shared_response_index_is_never_believed(host, wire):
    """Both response indices are ours to write; what the guest makes of them is its own affair."""
    line = wire()
    (ref,) = host.share().refs
    line.ask(direct(X86_64, READ, 1, 0, [(ref, 0, 7)]))
    with line.indices() as indices:
        for value in (0, 5, 2**31, 2**32 - 1):
            indices[2] = value
            done = line.disk.statistics.as_dict()["requests"]
            line.put(direct(X86_64, READ, 2, 0, [(ref, 0, 7)]))
            indices[1] = indices[0]
            line.ring.push()
            line.channel.notify()
            until(lambda done=done: line.disk.statistics.as_dict()["requests"] == done + 1)
            until(lambda: indices[2] == line.ring._published)
            assert [(2, READ, OKAY)] == line.responses(1)
    assert not line.failures


@pytest.mark.parametrize("threads", [1, 4])
@abis
def test_xsa_216_no_byte_but_the_answer_changes(host, wire, abi, threads):
    """Whichever thread did it, and whether it was refused or done: 12 bytes, one of them zero."""
    line = wire(Memory(threads=threads), abi)
    pages = host.share(2)
    pages.view[:8] = descriptors([(pages.refs[1], 0, 9)])
    line.pages.view[64:] = b"\xa5" * (4096 - 64)
    slots = [
        direct(abi, READ, 0x1122334455667788, 1, [(pages.refs[0], 2, 3)]),
        direct(abi, READ, 2, 2**64 - 1, [(pages.refs[0], 2, 3)]),
        indirect(abi, WRITE, 3, 0, 1, [pages.refs[0]]),
        discard(abi, 4, 0, 8),
        b"\xee" * abi.slot_size,
    ]
    for number, slot in enumerate(slots):
        at = 64 + number * abi.slot_size
        (answer,) = line.ask(slot)
        after = bytes(line.pages.view[at : at + abi.slot_size])
        assert struct.pack("<QBxh", *answer) == after[:12]
        assert slot[12:] == after[12:]
    rest = 64 + len(slots) * abi.slot_size
    assert b"\xa5" * (4096 - rest) == line.pages.view[rest:]


# -- segments and ranges --------------------------------------------------------------------


@ways
@abis
def test_segments_are_checked_before_any_grant_operation(host, wire, abi, persistent, grants):
    line = wire(abi=abi, persistent=persistent, options=Options(256, grants))
    pages = host.share(2)
    ref = pages.refs[0]
    wrong = [
        *(
            direct(abi, operation, 9, 0, [(ref, 0, 7), (ref, *segment)])
            for operation in (READ, WRITE, BARRIER, FLUSH)
            for segment in [(1, 0), (7, 6), (0, 8), (8, 8), (255, 0), (0, 255), (255, 255)]
        ),
        *(direct(abi, READ, 9, 0, [(ref, 0, 7)] * 11, count) for count in (0, 12, 255)),
        *(indirect(abi, READ, 9, 0, count, [ref]) for count in (0, 257, 65535)),
        *(indirect(abi, inner, 9, 0, 1, [ref]) for inner in (2, 3, 5, 6, 255)),
        direct(abi, READ, 9, SECTORS, [(ref, 0, 0)]),
        direct(abi, WRITE, 9, 2**64 - 1, [(ref, 0, 7)]),
        discard(abi, 9, 2**64 - 1, 2),
        discard(abi, 9, 1, 2**64 - 1),
    ]
    before = operations(host)
    answers = [answer for slot in wrong for answer in line.ask(slot)]
    assert {(9, ERROR)} == {(answer.id, answer.status) for answer in answers}
    assert before == operations(host)
    # Of an indirect request the descriptors are fetched, and nothing else.
    for segment in [(1, 0), (0, 8), (255, 255)]:
        pages.view[4096:4104] = descriptors([(ref, *segment)])
        assert [(8, READ, ERROR)] == line.ask(indirect(abi, READ, 8, 0, 1, [pages.refs[1]]))
    assert host.guest.in_use([ref]) == 0
    assert not line.backend.calls
    assert [(7, READ, OKAY)] == line.ask(direct(abi, READ, 7, SECTORS - 8, [(ref, 0, 7)]))


class Elastic(Memory):
    """A disk in memory that can be made smaller, and notes what lies beyond its end."""

    threads = 4

    def __init__(self, size=MEBIBYTE):
        super().__init__(size)
        self.beyond = []

    def resize(self, size):
        if size is not None:
            self.size = size
        return self.size

    def write(self, buffers, offset):
        super().write(buffers, offset)
        length = sum(map(len, buffers))
        if offset + length > self.size:
            self.beyond.append((offset, length))


@pytest.mark.parametrize("threads", [1, 4])
def test_a_range_is_compared_with_the_size_of_now(host, wire, threads):
    """Known requests too: a plan says nothing about the disk."""
    backend = Elastic()
    backend.threads = threads
    line = wire(backend, persistent=True)
    (ref,) = host.share().refs
    half = SECTORS // 2
    ahead = direct(X86_64, WRITE, 1, half - 4, [(ref, 0, 7)])
    beyond = direct(X86_64, WRITE, 2, half, [(ref, 0, 7)])
    assert [OKAY] * 4 == [each.status for each in line.ask(ahead, beyond, ahead, beyond)]
    line.disk.resize(half * 512, force=True)
    assert [ERROR] * 2 == [each.status for each in line.ask(ahead, beyond)]
    line.disk.resize(SECTORS * 512)
    assert [OKAY] * 2 == [each.status for each in line.ask(ahead, beyond)]
    assert not backend.beyond


def shrinking(line, size):
    """Have a disk made smaller by another thread; return it."""
    thread = threading.Thread(target=line.disk.resize, args=(size,), kwargs={"force": True})
    thread.start()
    return thread


def test_a_slow_write_that_others_overtake_is_waited_for_before_a_shrink(host, wire):
    backend = Elastic()
    line = wire(backend, persistent=True)
    (ref,) = host.share().refs
    entered, go = threading.Event(), threading.Event()

    def slow(what):
        if what == "write":
            entered.set()
            go.wait(2 * PATIENCE)

    backend.before = slow
    line.put(direct(X86_64, WRITE, 1, SECTORS - 8, [(ref, 0, 7)]))
    line.kick()
    assert entered.wait(PATIENCE)
    thread = shrinking(line, MEBIBYTE // 2)
    until(lambda: line.disk.sectors < SECTORS)
    for _ in range(5):
        assert [(2, READ, OKAY)] == line.ask(direct(X86_64, READ, 2, 0, [(ref, 0, 7)]))
        thread.join(0.02)
    go.set()
    assert [(1, WRITE, OKAY)] == line.responses(1)
    thread.join()
    assert [] == backend.beyond


def test_a_batch_that_is_half_done_is_waited_for_before_a_shrink(host, wire):
    """A barrier drains what is in the workers' hands; what waits behind it is in flight, too."""
    backend = Elastic()
    backend.at_once = bool
    line = wire(backend, persistent=True)
    (ref,) = host.share().refs
    known = direct(X86_64, WRITE, 1, SECTORS - 8, [(ref, 0, 7)])
    line.ask(known)
    threads = []

    def flush():
        if not threads:
            threads.append(shrinking(line, MEBIBYTE // 2))
            until(lambda: line.disk.sectors < SECTORS)
            threads[0].join(0.1)

    backend.flush = flush
    line.put(direct(X86_64, WRITE, 2, 0, [(ref, 0, 7)]))  # goes to a worker
    line.put(direct(X86_64, BARRIER, 3, 0, []), known)
    line.kick()
    line.responses(3)
    for thread in threads:
        thread.join()
    assert [] == backend.beyond


def test_what_a_worker_has_done_is_answered_though_the_ring_is_never_empty(host, wire):
    """Quick requests without end do not keep the answer of a slow one back."""
    backend = Memory(threads=4)
    served, answers = [], []

    def at_once(offset):
        if not offset:
            return False
        served.append(1)
        if 2 not in answers:
            until(lambda: line.queue._workers._results)
        if len(served) < 40:  # the guest puts the next one while this one is done
            line.put(quick)
            line.ring.push()
        return True

    backend.at_once = at_once
    line = wire(backend, order=1, persistent=True)
    (ref,) = host.share().refs
    quick = direct(X86_64, READ, 1, 8, [(ref, 0, 7)])
    respond = line.queue._ring.respond
    line.queue._ring.respond = lambda data: (answers.append(data[0]), respond(data))
    line.put(direct(X86_64, READ, 2, 0, [(ref, 0, 7)]), quick)
    line.kick()
    until(lambda: len(answers) == 41)
    line.responses(41)
    assert answers.index(2) < 10


# -- read-only ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["raw", "mmap"])
@abis
def test_cve_2013_2140_nothing_changes_a_read_only_disk(host, wire, tmp_path, abi, backend):
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(MEBIBYTE))
    before = hashlib.sha256(path.read_bytes()).digest()
    disk = open_backend(backend, {"path": str(path), "read_only": True})
    opened = [
        fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}")
        and os.path.realpath(f"/proc/self/fd/{name}") == str(path)
    ]
    assert {os.O_RDONLY} == set(opened)
    host._stack.callback(disk.close)
    for persistent, grants in WAYS:
        line = wire(disk, abi, persistent=persistent, options=Options(256, grants))
        pages = host.share(2)
        table, ref = pages.refs
        pages.view[:8] = descriptors([(ref, 0, 7)])
        slots = [
            direct(abi, WRITE, 1, 0, [(ref, 0, 7)]),
            direct(abi, BARRIER, 2, 0, [(ref, 0, 7)]),
            direct(abi, FLUSH, 3, 0, [(ref, 0, 7)]),
            indirect(abi, WRITE, 4, 0, 1, [table]),
            discard(abi, 5, 0, 8),
            discard(abi, 6, 0, 8, flag=1),
        ]
        for _ in range(2):
            assert {ERROR} == {answer.status for answer in line.ask(*slots)}
            # A read makes the same segments known; they must not be written all the same.
            assert [(7, READ, OKAY)] == line.ask(direct(abi, READ, 7, 0, [(ref, 0, 7)]))
    assert before == hashlib.sha256(path.read_bytes()).digest()


@ways
@pytest.mark.parametrize("threads", [1, 4])
def test_cve_2013_2140_no_write_reaches_a_read_only_backend(
    host, wire, persistent, grants, threads
):
    """Not even one that would do it: whatever was learnt of the segments by reading."""
    backend = Memory(read_only=True, threads=threads)
    backend.at_once = lambda offset: True
    line = wire(backend, persistent=persistent, options=Options(256, grants))
    pages = host.share(2)
    table, ref = pages.refs
    pages.view[:8] = descriptors([(ref, 0, 7)])
    for _ in range(3):
        reads = [
            direct(X86_64, READ, 1, 0, [(ref, 0, 7)]),
            indirect(X86_64, READ, 2, 0, 1, [table]),
        ]
        writes = [
            *(
                direct(X86_64, operation, 3, 0, [(ref, 0, 7)])
                for operation in (WRITE, BARRIER, FLUSH)
            ),
            indirect(X86_64, WRITE, 4, 0, 1, [table]),
            discard(X86_64, 5, 0, 8),
        ]
        assert {OKAY} == {answer.status for answer in line.ask(*reads)}
        assert {ERROR} == {answer.status for answer in line.ask(*writes)}
    assert {"read"} == {call[0] for call in backend.calls}


def test_xsa_142_read_only_is_not_the_frontends_to_say(host, attacked):
    backend = Memory(read_only=True)
    serving = attacked(backend)
    store = host.open_store(host.DOMID)
    for name, value in {"mode": "w", "info": "0", "read-only": "0", "params": "x"}.items():
        store.write(f"{serving.address.frontend}/{name}", value)
    frontend = serving.frontend()
    assert frontend.features.read_only
    with pytest.raises(RequestFailed):
        frontend.write(0, bytes(4096))
    assert not any(call[0] == "write" for call in backend.calls)


# -- grants ---------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("threads", [1, 4])
def test_xsa_361_each_grant_operation_fails_in_turn(host, wire, persistent, grants, threads):
    """Each error is the answer to its request; what was mapped is unmapped, and nothing else."""
    line = wire(Memory(threads=threads), persistent=persistent, options=Options(256, grants))
    line.backend.data[:4096] = b"d" * 4096
    pages = host.share(6)
    table, read_here, write_there, *refs = pages.refs
    requests = [
        indirect(X86_64, READ, 1, 0, 3, [table]),
        direct(X86_64, READ, 2, 0, [(read_here, 0, 7)]),
        direct(X86_64, WRITE, 3, 800, [(write_there, 0, 7)]),
    ]
    number, done = 0, False
    while not done:
        numbers = itertools.count()

        def fail(domid, refs, writable, numbers=numbers, number=number):
            if next(numbers) == number:
                raise HypervisorError(errno.EFAULT, "cannot")

        pages.view[:] = b"g" * len(pages.view)
        pages.view[:24] = descriptors([(ref, 0, 7) for ref in refs])
        line.backend.calls.clear()
        host.hypervisor.before_map = host.hypervisor.before_copy = fail
        answers = sorted(line.ask(*requests))
        host.hypervisor.before_map = host.hypervisor.before_copy = None
        done = next(numbers) <= number
        failed = [answer.id for answer in answers if answer.status != OKAY]
        assert ([] if done else [1]) == [1] * len(failed)
        if 2 in failed:  # what was read, or was in our memory, is not delivered
            assert b"g" * 4096 == pages.view[4096:8192]
        if 3 in failed:
            assert "write" not in [call[0] for call in line.backend.calls]
        if 1 in failed:
            assert b"g" * 3 * 4096 == pages.view[3 * 4096 :]
        mapped = host.hypervisor.mapped_pages
        assert mapped <= 7 if persistent else mapped == 1
        number += 1
    assert number > 3 - 2 * persistent
    assert [1, 2, 3] == [answer.id for answer in answers]
    line.queue.stop(5)
    counters = host.hypervisor.counters
    assert (counters.maps, 0) == (counters.unmaps, counters.mapped_pages)
    assert not line.failures


@ways
@pytest.mark.parametrize("threads", [1, 4])
def test_xsa_365_bad_references_at_each_place(host, wire, persistent, grants, threads):
    line = wire(Memory(threads=threads), persistent=persistent, options=Options(256, grants))
    pages = host.share(12)
    good = [(ref, 0, 7) for ref in pages.refs[:11]]
    for operation, bad, place in itertools.product((READ, WRITE), BAD_REFERENCES, (0, 5, 10)):
        segments = [*good[:place], (bad, 0, 7), *good[place + 1 :]]
        pages.view[11 * 4096 : 11 * 4096 + 88] = descriptors(segments)
        answers = line.ask(
            direct(X86_64, operation, 1, 0, segments),
            indirect(X86_64, operation, 2, 0, 11, [pages.refs[11]]),
            indirect(X86_64, operation, 3, 0, 11, [bad]),
        )
        assert [(n, operation, ERROR) for n in (1, 2, 3)] == sorted(answers)
    # The references of another domain are none of this one's: the ring's owner comes from us.
    assert not any(call[0] == "write" for call in line.backend.calls)
    assert host.guest.in_use(pages.refs[:11]) == 0
    assert [(4, READ, OKAY)] == line.ask(direct(X86_64, READ, 4, 0, good))


def test_xsa_396_nothing_is_mapped_when_closed_shows(host, attacked, monkeypatch):
    """Linux says that a grant is still in use, and keeps the page indefinitely."""
    serving = attacked(Memory())
    frontend = serving.frontend(persistent=True)
    frontend.read(0, 65536)
    assert host.hypervisor.mapped_pages > 1
    publish, shown = serving.device._publish, []

    def looking(state):
        shown.append((state, host.hypervisor.mapped_pages))
        publish(state)

    monkeypatch.setattr(serving.device, "_publish", looking)
    frontend.disconnect()
    until(lambda: State.CLOSED in dict(shown))
    assert dict(shown)[State.CLOSED] == 0


@ways
def test_xsa_396_bytes_outside_of_the_segments_stay(host, wire, persistent, grants):
    line = wire(persistent=persistent, options=Options(256, grants))
    line.backend.data[:] = b"d" * MEBIBYTE
    pages = host.share(3)
    for first, last in itertools.combinations_with_replacement(range(8), 2):
        pages.view[:] = b"g" * len(pages.view)
        segments = [(ref, first, last) for ref in pages.refs]
        assert [(1, READ, OKAY)] == line.ask(direct(X86_64, READ, 1, 0, segments))
        page = b"g" * 512 * first + b"d" * 512 * (last - first + 1) + b"g" * 512 * (7 - last)
        assert page * 3 == pages.view


# -- keys -----------------------------------------------------------------------------------

NONSENSE = [
    *(b"", b"-1", b"+1", b" 1", b"1 ", b"0x1", b"1e1", b"4294967296", b"99999999999999999999"),
    *(b"\xd9\xa4", b"\xff\xfe", b"9" * 3000, b"%s%n", b"../../0", b"\n\n", b"00000000001"),
]


class Keys:
    """A device that nobody drives but the test, and the frontend's keys."""

    def __init__(self, host, backend, **options):
        self.host = host
        self.serving = host.serving(backend, start=False, **options)
        self.serving.attach()
        self.device = self.serving.device
        self.device.watch()
        self.front = self.serving.address.frontend
        self.pages = host.share(16 * 4)
        self.channels = [host.guest.bind_unbound(0) for _ in range(4)]
        self.written = set()

    def write(self, name, value):
        """Write any bytes, as a guest can and our own store will not."""
        path = f"{self.front}/{name}"
        value = value if isinstance(value, bytes) else str(value).encode()
        self.host.store.write(path, "")
        nodes = self.host.xenstored.nodes
        node = nodes[path]._replace(value=value)
        self.host.xenstored._do(lambda: nodes.update({path: node}))
        self.written.add(name)

    def sound(self, queues, order):
        """Write keys that are right."""
        for name in self.written:
            self.host.store.remove(f"{self.front}/{name}")
        self.written.clear()
        refs = iter(self.pages.refs)
        rings = tuple(
            Ring(tuple(itertools.islice(refs, 1 << order)), self.channels[number].port)
            for number in range(queues)
        )
        for name, value in Connection(rings, X86_64.name, persistent=True).to_keys().items():
            self.write(name, value)

    def switch(self, state):
        self.write("state", int(state))
        self.written.discard("state")
        self.device.update()
        return self.device.state

    def close(self):
        self.device.force()
        for channel in self.channels:
            channel.close()
        toolstack.detach(self.host.store, self.serving.address)


@pytest.fixture
def keys(host):
    made = []

    def make(backend, **options):
        made.append(Keys(host, backend, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("max_queues", [1, 4])
def test_xsa_175_any_keys(host, keys, caplog, max_queues):
    """Connected or Closing, nothing mapped unless connected, and the next try works."""
    one = keys(Memory(threads=4), max_queues=max_queues)
    dice = random.Random(max_queues)
    seen = set()
    for round_ in repeat(25, 100):
        queues, order = dice.randint(1, max_queues), dice.randint(0, 4)
        one.sound(queues, order)
        if round_:
            for _ in range(dice.randint(1, 3)):
                names = ["protocol", "feature-persistent", "ring-page-order", "ring-ref"]
                names += ["multi-queue-num-queues", "event-channel", "ring-ref0", "ring-ref15"]
                names += [f"queue-{n}/{key}" for n in range(5) for key in names[3:]]
                values = [*NONSENSE, *range(6), 255, 2**32 - 1, one.pages.refs[0]]
                values += [one.channels[0].port, "x86_32-abi", "arm-abi", "sparc-abi"]
                one.write(dice.choice(names), dice.choice(values))
            if dice.random() < 0.2:
                one.host.store.remove(f"{one.front}/{dice.choice(sorted(one.written))}")
        state = one.switch(State.INITIALISED)
        seen.add(state)
        if state is State.CLOSING:
            assert host.hypervisor.mapped_pages == 0
        else:
            assert state is State.CONNECTED
            assert 0 < host.hypervisor.mapped_pages <= 16 * max_queues
        assert one.switch(State.CLOSED) is State.CLOSED
        assert host.hypervisor.mapped_pages == 0
        assert one.switch(State.INITIALISING) is State.INIT_WAIT
    assert {State.CONNECTED, State.CLOSING} == seen
    assert max(map(len, caplog.messages)) < 300
    assert all(text.isprintable() for text in caplog.messages)
    one.sound(max_queues, 4)
    assert one.switch(State.INITIALISED) is State.CONNECTED


@pytest.mark.parametrize("asked", [0, 5, MAX_QUEUES + 1, 2**32 - 1])
def test_xsa_175_more_queues_than_offered(host, keys, asked):
    one = keys(Memory(threads=4), max_queues=4)
    one.sound(4, 0)
    one.write("multi-queue-num-queues", asked)
    threads = set(threading.enumerate())
    assert one.switch(State.INITIALISED) is State.CLOSING
    assert set(threading.enumerate()) <= threads


def test_queues_that_share_one_ring_harm_only_their_guest(host, keys):
    one = keys(Memory(threads=4), max_queues=2)
    one.sound(2, 0)
    shared = one.pages.refs[0]
    one.write("queue-1/ring-ref", shared)
    assert one.switch(State.INITIALISED) is State.CONNECTED
    view = one.pages.view
    slot = direct(X86_64, READ, 1, 0, [(one.pages.refs[40], 0, 7)])
    with view[:16].cast("I") as indices:
        for number in range(1, 200):
            view[64:4096] = (slot * 36)[: 4096 - 64]
            indices[0] = number
            for channel in one.channels[:2]:
                channel.notify()
    assert one.switch(State.CLOSED) is State.CLOSED
    assert host.hypervisor.mapped_pages == 0


def test_one_event_channel_for_two_queues_is_refused(host, keys):
    one = keys(Memory(threads=4), max_queues=2)
    one.sound(2, 0)
    one.write("queue-1/event-channel", one.channels[0].port)
    assert one.switch(State.INITIALISED) is State.CLOSING
    assert host.hypervisor.mapped_pages == 0


# -- images ---------------------------------------------------------------------------------


def qcow2_header(backing):
    """Return what makes a qcow2 image whose backing file is ``backing``."""
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(backing), 16, 1 << 30, *[0] * 7)
    return header + backing


@pytest.mark.parametrize("backend", ["raw", "mmap", "cow", None])
@pytest.mark.parametrize("kind", ["qcow2", "vhd", "vmdk"])
def test_cve_2008_2004_an_image_is_not_what_it_says(host, wire, tmp_path, backend, kind):
    """CVE-2013-1922, too: a guest writes a header that names a file of the host, and reconnects."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MEBIBYTE)
    name = str(secret).encode()
    header = {
        "qcow2": qcow2_header(name),
        "vhd": b"conectix" + struct.pack(">IIQ", 2, 0x10000, 512) + bytes(488),
        "vmdk": b'# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "' + name + b'" 0\n',
    }[kind]
    content = (header + random.Random(1).randbytes(MEBIBYTE))[:MEBIBYTE]
    path = tmp_path / "image"
    path.write_bytes(content)
    disk = open_backend(backend, {"path": str(path)})
    host._stack.callback(disk.close)
    assert disk.size == MEBIBYTE
    line = wire(disk)
    pages = host.share(11)
    segments = [(ref, 0, 7) for ref in pages.refs]
    assert [(1, READ, OKAY)] == line.ask(direct(X86_64, READ, 1, 0, segments))
    assert content[: 11 * 4096] == pages.view
    opened = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert str(path) in opened or backend == "mmap"
    assert str(secret) not in opened


def test_xsa_229_no_direct_io_to_pages_of_the_guest(tmp_path):
    """The kernel never holds a guest's page after the call: all goes through the page cache."""
    path = tmp_path / "image"
    path.write_bytes(bytes(MEBIBYTE))
    disk = RawBackend(str(path))
    assert not fcntl.fcntl(disk._fd, fcntl.F_GETFL) & os.O_DIRECT
    disk.close()


class Full(CowBackend):
    """Changes that at some time there is no space for."""

    full = False

    def write(self, buffers, offset):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(buffers, offset)

    def write_nowait(self, buffers, offset):
        return 0 if self.full else super().write_nowait(buffers, offset)


def test_changes_beyond_the_limit_are_errors_for_the_guest(host, wire, tmp_path):
    """So is a full file system; the disk lives on, and what was there can be written again."""
    path = tmp_path / "image"
    path.write_bytes(bytes(MEBIBYTE))
    disk = Full(str(path), cow_limit=4 * 4096)
    host._stack.callback(disk.close)
    line = wire(disk)
    (ref,) = host.share().refs
    statuses = [
        line.ask(direct(X86_64, WRITE, n, 8 * n, [(ref, 0, 7)]))[0].status for n in range(6)
    ]
    assert [OKAY] * 4 + [ERROR] * 2 == statuses
    assert [(9, DISCARD, ERROR)] == line.ask(discard(X86_64, 9, 0, 2**63))
    assert [(9, WRITE, OKAY)] == line.ask(direct(X86_64, WRITE, 9, 0, [(ref, 0, 7)]))
    assert [(9, READ, OKAY)] == line.ask(direct(X86_64, READ, 9, 40, [(ref, 0, 7)]))

    line.disk.backend.full = True
    assert [(9, WRITE, ERROR)] == line.ask(direct(X86_64, WRITE, 9, 0, [(ref, 0, 7)]))
    assert not line.failures


def test_what_is_read_is_never_what_was_in_our_memory(host, wire):
    """A backend that fails half-way delivers nothing of an earlier request's data."""
    line = wire(options=Options(256, Grants.COPY))
    pages = host.share(2)
    first, second = pages.refs
    pages.view[:4096] = b"o" * 4096
    line.ask(direct(X86_64, WRITE, 1, 0, [(first, 0, 7)]))

    def fails(what):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    line.backend.before = fails
    pages.view[4096:] = b"g" * 4096
    assert [(2, READ, ERROR)] == line.ask(direct(X86_64, READ, 2, 0, [(second, 0, 7)]))
    assert b"g" * 4096 == pages.view[4096:]
    assert not line.failures
