"""The handshake, step by step: what the backend does about each thing the other side does."""

from __future__ import annotations

import collections
import errno
import itertools
import random
import threading
import time
from types import SimpleNamespace

import pytest
from long_run import one_in, repeat

from xen_disk_py.blkif import (
    ARM,
    OKAY,
    READ,
    X86_32,
    X86_64,
    Connection,
    Ring,
    Transfer,
    decode_response,
)
from xen_disk_py.datapath import claim as claim_module
from xen_disk_py.datapath import retry
from xen_disk_py.datapath import statistics as count
from xen_disk_py.datapath.claim import Claim
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.journal import Journal
from xen_disk_py.datapath.queue import Options
from xen_disk_py.errors import BackendError, StoreLost
from xen_disk_py.ring import FrontRing
from xen_disk_py.synchronizing import HAS_GIL
from xen_disk_py.xenbus import device as device_module
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import State

S = State
LONG = 60.0  # seconds for what is not to happen before something else


class Guest:
    """A driver that does what a test tells it to, and nothing else."""

    def __init__(self, host, serving):
        self.host = host
        self.serving = serving
        self.device = serving.device
        self.address = serving.address
        self.store = host.open_store(host.DOMID)
        self.pages = []
        self.rings = []
        self.channels = []

    def write(self, **keys):
        for name, value in keys.items():
            self.store.write(f"{self.address.frontend}/{name.replace('_', '-')}", str(value))

    def remove(self, *names):
        for name in names:
            self.store.remove(f"{self.address.frontend}/{name}")

    def switch(self, state):
        self.write(state=int(state))

    @property
    def backend(self):
        """What the guest sees of the backend's state."""
        return State.parse(self.store.read(f"{self.address.backend}/state"))

    def publish(self, order=0, abi=X86_64, persistent=False, protocol=None, queues=1):
        """Share fresh rings and write the keys that lead to them."""
        self.close()
        self.abi = abi
        refs = []
        for _ in range(queues):
            shared = self.host.guest.share_pages(0, 1 << order, writable=True)
            self.pages.append(shared)
            refs.append(tuple(shared.refs))
            self.rings.append(FrontRing(shared.view, abi.slot_size, self.host.guest.fence))
            self.channels.append(self.host.guest.bind_unbound(0))
        self.remove("ring-ref", "ring-page-order", *(f"ring-ref{index}" for index in range(16)))
        self.remove("multi-queue-num-queues", *(f"queue-{index}" for index in range(8)))
        ports = [channel.port for channel in self.channels]
        connection = Connection(tuple(map(Ring, refs, ports)), protocol or abi.name, persistent)
        for name, value in connection.to_keys().items():
            self.store.write(f"{self.address.frontend}/{name}", value)

    def ask_to_read(self, queue=0):
        """Put a request; the page is where the data goes."""
        data = self.host.guest.share_pages(0, 1, writable=True)
        self.pages.append(data)
        ring = self.rings[queue]
        ring.put(self.abi.encode(Transfer(1, READ, 0, 8, tuple(data.refs), (0,), (7,))))
        if ring.push():
            self.channels[queue].notify()
        return data

    def read_works(self, queue=0):
        data = self.ask_to_read(queue)
        found = []
        self.host.until(lambda: found.extend(self.rings[queue].take()) or found)
        assert (1, READ, OKAY) == decode_response(found[0])
        return data.view == self.serving.backend.data[:4096]

    def close(self):
        for handle in (*self.rings, *self.channels):
            handle.close()
        self.rings.clear()
        self.channels.clear()
        while self.pages:
            self.pages.pop().close()


@pytest.fixture
def make(host):
    """A device whose nodes are there and that nobody drives but the test."""
    guests = []

    def make(backend=None, **options):
        backend = backend or host.memory(data=bytearray(random.Random(1).randbytes(1 << 20)))
        serving = host.serving(backend, start=False, **options)
        serving.attach()
        serving.device.watch()
        guests.append(Guest(host, serving))
        return guests[-1]

    yield make
    for guest in guests:
        guest.device.force()
        guest.close()
        toolstack.detach(host.store, guest.address)


@pytest.fixture
def guest(make):
    return make()


def connect(guest, **options):
    guest.publish(**options)
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.backend is S.CONNECTED
    guest.switch(S.CONNECTED)
    guest.device.update()
    assert guest.device.connected


# -- connecting ----------------------------------------------------------------------------


def test_init_wait_first(host, guest):
    """All that a frontend reads is there before it is told to begin."""
    assert guest.backend is S.INIT_WAIT
    guest.device.update()
    assert guest.backend is S.INIT_WAIT
    assert not guest.device.connected
    names = set(guest.store.list(guest.address.backend))
    assert names >= {
        "sectors",
        "sector-size",
        "physical-sector-size",
        "info",
        "feature-flush-cache",
        "feature-discard",
        "feature-persistent",
        "feature-max-indirect-segments",
        "max-ring-page-order",
        "mode",
        "params",
        "frontend",
        "frontend-id",
        "online",
        "dev",
        "device-type",
        "state",
    }
    assert host.hypervisor.mapped_pages == 0


@pytest.mark.parametrize("abi", [X86_64, X86_32, ARM], ids=lambda abi: abi.name)
@pytest.mark.parametrize("order", [0, 1, 4])
def test_connect(host, guest, abi, order):
    guest.device.update()
    guest.publish(order, abi)
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.backend is S.CONNECTED
    assert not guest.device.connected  # the guest has still to make its disk
    guest.switch(S.CONNECTED)
    guest.device.update()
    assert guest.device.connected
    assert guest.read_works()
    guest.device.update()  # nothing new: nothing is done again
    assert host.hypervisor.mapped_pages == 1 << order


def test_a_frontend_that_jumps_to_connected(guest):
    """OVMF and mirage do, without waiting for InitWait."""
    guest.publish()
    guest.switch(S.CONNECTED)
    guest.device.update()
    assert guest.backend is S.CONNECTED
    assert guest.device.connected
    assert guest.read_works()


def test_a_frontend_that_never_says_connected(host, guest):
    """GRUB's: whoever reads the disk has it."""
    guest.publish()
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.backend is S.CONNECTED
    assert guest.read_works()
    host.until(lambda: guest.device.connected)


def test_no_protocol_means_x86_32(guest, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    guest.publish(abi=X86_32)
    guest.remove("protocol")
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.read_works()


def test_ring_ref0_and_order_0(guest):
    """Both spellings of a ring of one page are in use."""
    guest.publish()
    guest.write(ring_page_order=0, ring_ref0=guest.pages[0].refs[0])
    guest.remove("ring-ref")
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.read_works()


@pytest.mark.parametrize("promise", ["0", "1"])
def test_persistent_only_if_promised(host, guest, promise):
    guest.publish(persistent=promise == "1")
    guest.switch(S.INITIALISED)
    guest.device.update()
    guest.read_works()
    assert host.hypervisor.mapped_pages == 1 + int(promise)


@pytest.mark.parametrize(("grants", "kept"), [(Grants.AUTO, 1), (Grants.COPY, 0), (Grants.MAP, 0)])
def test_the_options_reach_the_queue(host, make, grants, kept):
    guest = make(options=Options(17, grants))
    assert guest.store.read(f"{guest.address.backend}/feature-max-indirect-segments") == "17"
    connect(guest, persistent=True)
    assert guest.read_works()
    assert host.hypervisor.mapped_pages == 1 + kept
    assert host.hypervisor.counters.copies == (grants is Grants.COPY)


# -- several queues ------------------------------------------------------------------------


@pytest.fixture
def threaded(host, make):
    """A device that offers eight queues."""
    data = bytearray(random.Random(1).randbytes(1 << 20))
    return make(host.memory(threads=8, data=data), max_queues=8)


@pytest.mark.parametrize(("threads", "offered"), [(1, "1"), (2, "2"), (16, "8")])
def test_queues_are_offered_where_threads_may_be_several(host, make, threads, offered):
    guest = make(host.memory(threads=threads), max_queues=8)
    assert offered == guest.store.read(f"{guest.address.backend}/multi-queue-max-queues")


@pytest.mark.parametrize("queues", range(2, 9))
@pytest.mark.parametrize(("abi", "order"), [(X86_64, 0), (X86_32, 1)])
def test_every_queue_is_served(host, threaded, queues, abi, order):
    guest = threaded
    connect(guest, queues=queues, abi=abi, order=order, persistent=True)
    front = guest.address.frontend
    assert guest.store.read(f"{front}/ring-ref") is None
    assert guest.store.read(f"{front}/queue-{queues - 1}/event-channel") is not None
    assert host.hypervisor.mapped_pages == queues << order
    for _ in range(3):
        for number in range(queues):
            assert guest.read_works(number)
    pages = (queues << order) + 3 * queues
    assert host.hypervisor.mapped_pages == pages
    counters = guest.serving.disk.statistics
    reads = [counters.of_queue(number).words[count.READS] for number in range(8)]
    assert [3] * queues + [0] * (8 - queues) == reads
    guest.switch(S.CLOSED)
    guest.device.update()
    assert host.hypervisor.mapped_pages == 0
    guest.switch(S.INITIALISING)
    guest.device.update()
    connect(guest)  # and with a single one next time
    assert guest.read_works()


def test_a_ring_that_overflows_leaves_the_others_alone(host, threaded, caplog):
    guest = threaded
    connect(guest, queues=4)
    with guest.pages[2].view[:16].cast("I") as indices:
        indices[0] = 1000
        guest.channels[2].notify()
        host.until(lambda: "not served any longer" in caplog.text)
    for number in (0, 1, 3, 0):
        assert guest.read_works(number)
    guest.device.unplug()
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.device.finished
    assert host.hypervisor.mapped_pages == 0


@pytest.fixture
def hanging(host, make, monkeypatch):
    """A connected guest that waits for a disk that hangs; and what ends that."""
    monkeypatch.setattr(device_module, "_FINISHING", 0.0)
    entered, allowed = threading.Event(), threading.Event()

    def read(buffers, offset):
        entered.set()
        allowed.wait(LONG)

    guest = make(host.memory(read=read))
    connect(guest)
    guest.ask_to_read()
    assert entered.wait(host.PATIENCE)
    yield guest, allowed
    allowed.set()


def settle(host, guest):
    """Update until there is nothing more to do."""

    def done():
        guest.device.update()
        return not guest.device.is_unsettled

    host.until(done)


@pytest.mark.parametrize("how", ["closed", "gone", "closed, and asked to leave"])
def test_nobody_waits_for_a_disk_that_takes_long_to_finish(host, hanging, how):
    """The session has signs of life to send, signals and commands to answer."""
    guest, allowed = hanging
    if how == "gone":
        host.store.remove(guest.address.frontend)
    else:
        guest.switch(S.CLOSED)
    for _ in range(3):
        guest.device.update()
        assert guest.device.is_unsettled
        if how.endswith("leave"):
            guest.device.unplug()
        assert guest.backend in (S.CONNECTED, S.CLOSING)
        assert host.hypervisor.mapped_pages
        assert not guest.device.finished
    allowed.set()
    settle(host, guest)
    assert S.CLOSED is guest.backend
    assert not host.hypervisor.mapped_pages
    assert (how != "closed") == guest.device.finished


def test_what_was_begun_is_finished_though_the_guest_changes_its_mind(host, hanging):
    """Its ring is not served any longer: so it is connected anew, and not left alone."""
    guest, allowed = hanging
    guest.switch(S.CLOSED)
    guest.device.update()
    guest.switch(S.CONNECTED)
    guest.device.update()
    assert guest.device.is_unsettled
    allowed.set()
    settle(host, guest)
    assert S.CONNECTED is guest.backend
    host.until(guest.rings[0].take)  # the answer to what was under way
    assert guest.read_works()


def test_a_disk_that_hangs_for_hours_when_it_is_to_finish(host, hanging):
    """Each update asks the queue to stop: no pipe may be full some day."""
    guest, _ = hanging
    guest.switch(S.CLOSED)
    guest.device.update()
    for _ in range(70_000):
        guest.device._disconnect()


class Refusing:
    """Threads that the system gives only so many of, as ``pids.max`` has it."""

    def __init__(self, monkeypatch, left, name="queue"):
        self.left = left
        start = threading.Thread.start

        def start_if_there_is_one(thread):
            if thread.name == name:
                if not self.left:
                    raise RuntimeError("can't start new thread")
                self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_if_there_is_one)


def test_a_lock_that_there_is_no_thread_for_is_taken_when_there_is_one(
    host, make, monkeypatch, caplog
):
    threads = Refusing(monkeypatch, 0, "claim")
    taken = threading.Event()
    claim = Claim(SimpleNamespace(claim=lambda: None), taken.set)
    guest = make(claim=claim)
    guest.publish()
    guest.switch(S.INITIALISED)
    for _ in range(3):
        guest.device.update()
        assert guest.device.is_unsettled
    assert S.INIT_WAIT is guest.device.state
    (said,) = caplog.messages
    assert "the disk's lock is not asked for yet, since there is no thread to be had" in said
    assert "TasksMax=" in said
    threads.left = 1
    guest.device.update()
    assert taken.wait(host.PATIENCE)
    guest.device.update()
    assert S.CONNECTED is guest.device.state
    assert guest.read_works()


def test_a_lock_is_asked_for_again_whatever_error_there_was(host, make, monkeypatch, caplog):
    monkeypatch.setattr(claim_module, "_PATIENCE", 0)
    monkeypatch.setattr(claim_module, "_PAUSE", 0.01)
    errors, taken = [ValueError("a bug"), BackendError("another has it")], threading.Event()

    def take():
        if errors:
            raise errors.pop(0)

    claim = Claim(SimpleNamespace(claim=take), taken.set)
    assert claim.begin()
    assert taken.wait(host.PATIENCE)
    assert claim.is_done
    assert "the guest waits for its disk: test_device.py:" in caplog.messages[0]
    assert "ValueError: a bug" in caplog.messages[0]


def test_a_ring_that_there_is_no_thread_for_is_served_when_there_is_one(
    host, threaded, monkeypatch, caplog
):
    threads, guest = Refusing(monkeypatch, 0), threaded
    connect(guest, queues=3)
    assert guest.device.is_unsettled
    assert "a ring is not served yet, since there is no thread to be had" in caplog.text
    assert "TasksMax=" in caplog.text
    guest.device.update()
    assert guest.device.is_unsettled
    threads.left = 1 if HAS_GIL else 3  # one serves all where threads take turns
    guest.device.update()
    assert not guest.device.is_unsettled
    for number in range(3):
        assert guest.read_works(number)


@pytest.mark.parametrize("end", ["closed", "forced"])
def test_a_ring_that_there_is_no_thread_for_goes_like_any_other(host, threaded, monkeypatch, end):
    threads, guest = Refusing(monkeypatch, 0), threaded
    connect(guest, queues=3)
    if end == "forced":
        assert guest.device.force()
    else:
        guest.switch(S.CLOSED)
    threads.left = 3
    guest.device.update()
    assert not guest.device.is_unsettled
    assert host.hypervisor.mapped_pages == 0
    assert 3 == threads.left


def test_a_successor_that_no_thread_is_to_be_had_for_keeps_the_disk(make, monkeypatch):
    threads, guest = Refusing(monkeypatch, 0), make(adopts=True)
    leave(guest, S.CONNECTED, S.CONNECTED)
    guest.device.update()
    assert (S.CONNECTED, True) == (guest.backend, guest.device.is_unsettled)
    threads.left = 1
    guest.device.update()
    assert guest.read_works()


@pytest.mark.parametrize("key", ["ring-ref", "event-channel"])
def test_one_queue_s_keys_that_make_no_sense(host, threaded, caplog, key):
    """No queue is served then, and nothing is left of those before."""
    guest = threaded
    guest.publish(queues=4)
    guest.store.write(f"{guest.address.frontend}/queue-3/{key}", "3")
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.backend is S.CLOSING
    assert "cannot connect to the frontend" in caplog.text
    assert host.hypervisor.mapped_pages == 0
    guest.switch(S.CLOSED)
    guest.device.update()
    guest.switch(S.INITIALISING)
    guest.device.update()
    connect(guest, queues=4)
    assert guest.read_works(3)


def test_more_queues_than_offered(guest, caplog):
    guest.publish(queues=2)
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.backend is S.CLOSING
    assert "multi-queue-num-queues is '2'" in caplog.text


def test_forcing_waits_for_all_queues_at_once(host, make):
    """The time is one for all, and what hangs is all that stays."""
    allowed = threading.Event()
    backend = host.memory(threads=8, read=lambda buffers, offset: allowed.wait(LONG) and None)
    guest = make(backend, max_queues=8)
    connect(guest, queues=8)
    for number in (2, 3, 5):
        guest.ask_to_read(number)
    host.until(lambda: guest.serving.disk.statistics.as_dict()["in_flight"] == 3)
    assert not guest.device.force(0.5)
    assert guest.device.finished
    assert host.hypervisor.mapped_pages == 3
    allowed.set()
    assert guest.device.force()
    assert host.hypervisor.mapped_pages == 0


# -- closing and connecting again ----------------------------------------------------------


def test_close(host, guest):
    connect(guest, persistent=True)
    guest.read_works()
    guest.switch(S.CLOSING)
    guest.device.update()
    assert guest.backend is S.CLOSING
    assert guest.read_works()  # it may have something to flush
    guest.switch(S.CLOSED)
    in_use = []
    publish = guest.device._publish

    def looking(state):
        in_use.append((state, host.hypervisor.mapped_pages))
        publish(state)

    guest.device._publish = looking
    guest.device.update()
    assert guest.backend is S.CLOSED
    assert [(S.CLOSED, 0)] == in_use  # unmapped before it is said
    assert not guest.device.finished  # the toolstack wants it yet


def test_closed_at_once(host, guest):
    """A watch may show only the last of several states."""
    connect(guest)
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.backend is S.CLOSED
    assert host.hypervisor.mapped_pages == 0


def test_reconnect(host, guest):
    """As a firmware hands over to a kernel, and a driver is loaded anew: 6, 1, 2, 3, 4."""
    for turn in range(5):
        connect(guest, order=turn % 3, persistent=bool(turn % 2))
        assert guest.read_works()
        guest.switch(S.CLOSING)
        guest.device.update()
        guest.switch(S.CLOSED)
        guest.device.update()
        assert guest.backend is S.CLOSED
        guest.switch(S.INITIALISING)
        guest.device.update()
        assert guest.backend is S.INIT_WAIT
        guest.close()  # nothing of it is mapped any longer
        assert host.hypervisor.mapped_pages == 0


def test_a_driver_that_was_killed_and_started_again(host, guest):
    connect(guest)
    guest.switch(S.INITIALISING)
    guest.device.update()
    assert guest.backend is S.INIT_WAIT
    assert host.hypervisor.mapped_pages == 0
    connect(guest)
    assert guest.read_works()


def test_closing_before_connecting(guest):
    guest.switch(S.CLOSING)
    guest.device.update()
    assert guest.backend is S.CLOSING
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.backend is S.CLOSED
    guest.switch(S.INITIALISING)
    guest.device.update()
    connect(guest)


# -- detaching -----------------------------------------------------------------------------


def ask_to_detach(host, guest):
    def ask(store):
        store.write(f"{guest.address.backend}/online", "0")
        store.write(f"{guest.address.backend}/state", "5")

    host.store.transact(ask)


def detach(host, guest):
    ask_to_detach(host, guest)
    guest.device.update()


def test_toolstack_detach(host, guest):
    connect(guest)
    detach(host, guest)
    assert guest.backend is S.CLOSING
    assert guest.read_works()
    guest.switch(S.CLOSING)
    guest.device.update()
    assert not guest.device.finished
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.backend is S.CLOSED
    assert guest.device.finished
    guest.device.update()  # has no say any more
    assert not guest.device.guest_gone


@pytest.mark.parametrize("state", [S.UNKNOWN, S.INITIALISING, S.CLOSED])
def test_detach_from_a_guest_that_is_not_connected(host, guest, state):
    guest.switch(state)
    detach(host, guest)
    assert guest.backend is S.CLOSED
    assert guest.device.finished


@pytest.mark.parametrize("adopts", [False, True], ids=["connecting", "taken over"])
def test_detach_while_the_rings_are_mapped(host, make, monkeypatch, adopts):
    """The state that we write then hides nothing."""
    guest = make(adopts=adopts)
    guest.publish()
    guest.switch(S.CONNECTED if adopts else S.INITIALISED)
    if adopts:
        guest.serving.store.write(f"{guest.address.backend}/state", "4")

    def make_queues(make=guest.device._make_queues):
        ask_to_detach(host, guest)
        make()

    monkeypatch.setattr(guest.device, "_make_queues", make_queues)
    guest.device.update()
    assert guest.backend is S.CLOSING
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.device.finished


def test_detach_after_the_guest_has_closed(host, guest):
    """The toolstack leaves a Closed state as it is; or overwrites it."""
    for overwrite in (False, True):
        guest.device.finished = False
        host.store.write(f"{guest.address.backend}/online", "1")
        guest.device._publish(S.INIT_WAIT)
        guest.switch(S.INITIALISING)
        connect(guest)
        guest.switch(S.CLOSED)
        guest.device.update()
        assert not guest.device.finished
        host.store.write(f"{guest.address.backend}/online", "0")
        if overwrite:
            host.store.write(f"{guest.address.backend}/state", "5")
        guest.device.update()
        assert guest.backend is S.CLOSED
        assert guest.device.finished


def test_unplug(guest):
    connect(guest)
    guest.device.unplug()
    assert guest.backend is S.CLOSING
    assert guest.store.read(f"{guest.address.backend}/online") == "0"
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.device.finished


@pytest.mark.parametrize("gone", ["frontend", "backend", "state", "all", "domain"])
def test_something_vanishes(host, guest, gone):
    connect(guest, persistent=True)
    guest.read_works()
    if gone == "domain":
        host.xenstored.remove_domain(host.DOMID)
    elif gone == "state":
        guest.remove("state")
    elif gone == "all":
        toolstack.detach(host.store, guest.address)
    else:
        host.store.remove(getattr(guest.address, gone))
    guest.device.update()
    assert guest.device.finished
    assert guest.device.guest_gone is (gone == "domain")
    assert host.hypervisor.mapped_pages == 0
    if gone in ("backend", "all"):  # nothing is written where nothing is any longer
        assert host.store.read(f"{guest.address.backend}/state") is None


@pytest.mark.parametrize("returns", [True, False])
def test_a_guest_that_has_migrated_away(host, make, monkeypatch, returns):
    """What failed here is not tried again where the guest may run on another host already."""
    monkeypatch.setattr(retry, "_PAUSES", (0.001, 0.001))
    tried = threading.Semaphore(0)
    is_broken = True

    def read(buffers, offset):
        tried.release()
        if is_broken:
            raise OSError(errno.EIO, "broken")
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    guest = make(host.memory(read=read))
    guest.device._disk._holds = True
    connect(guest)
    guest.ask_to_read()
    for _ in range(3):
        assert tried.acquire(timeout=host.PATIENCE)
    name = f"/local/domain/{host.DOMID}/name"
    before = host.store.read(name)
    host.store.write(name, f"{before}--migratedaway")
    guest.device.update()
    # The disk is drained there; a retry is nothing that it would wait for.
    with guest.device._disk.drained.entered(host.PATIENCE):
        while tried.acquire(blocking=False):
            pass
        is_broken = False
    with guest.device._disk.drained.entered(host.PATIENCE):
        assert not tried.acquire(blocking=False)
    if returns:
        host.store.write(name, before)
        guest.device.update()
        found = []
        host.until(lambda: found.extend(guest.rings[0].take()) or found)
        assert (1, READ, OKAY) == decode_response(found[0])
    else:
        host.xenstored.remove_domain(host.DOMID)
        guest.device.update()
        assert guest.device.finished
        assert not tried.acquire(blocking=False)


@pytest.mark.parametrize("end", ["returns", "detached", "destroyed"])
def test_unanswered_requests_of_a_guest_that_has_migrated_away_meanwhile(host, make, caplog, end):
    done = []

    def read(buffers, offset):
        done.append(offset)
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    guest, name = make(host.memory(read=read), adopts=True), f"/local/domain/{host.DOMID}/name"
    leave(guest, S.CONNECTED, S.CONNECTED)
    guest.ask_to_read()
    before = host.store.read(name)
    host.store.write(name, f"{before}--migratedaway")
    for _ in range(2):
        guest.device.update()
    assert "xl rename" in caplog.text
    assert S.CONNECTED is guest.backend
    assert guest.device._queues == guest.device._unstarted != []
    if end == "returns":
        host.store.write(name, before)
        guest.device.update()
        found = []
        host.until(lambda: found.extend(guest.rings[0].take()) or found)
        assert (1, READ, OKAY) == decode_response(found[0])
        return
    if end == "detached":
        guest.device.unplug()
        guest.switch(S.CLOSED)
    else:
        host.xenstored.remove_domain(host.DOMID)
    guest.device.update()
    assert guest.device.finished
    assert [] == done
    assert host.hypervisor.mapped_pages == 0
    if end == "detached":
        host.store.write(name, before)


def test_unplug_when_the_nodes_are_gone(host, guest):
    connect(guest)
    toolstack.detach(host.store, guest.address)
    guest.device.unplug()
    assert guest.device.finished
    assert not host.store.exists(guest.address.backend)


def test_xenstore_has_forgotten_the_device(host, guest, caplog):
    connect(guest)
    toolstack.detach(host.store, guest.address)
    guest.device.store_reconnected()
    assert "has lost this device" in caplog.text
    guest.device.update()
    assert guest.device.connected
    assert guest.read_works()
    guest.device.unplug()
    assert guest.device.finished
    guest.device.store_reconnected()
    assert host.hypervisor.mapped_pages == 0


def test_force(host, guest):
    connect(guest)
    assert guest.device.force()
    assert guest.device.finished
    assert guest.device.force()
    assert host.hypervisor.mapped_pages == 0


def test_domain_0_may_be_its_own_guest(host):
    """It is not introduced to xenstore as others are."""
    serving = host.serving(host.memory(), start=False)
    serving.device.address = serving.address.__class__(0, 0, 51712, "vbd3")
    serving.address = serving.device.address
    host.xenstored.domains.pop(0)
    serving.attach()
    serving.device.update()
    assert not serving.device.finished
    toolstack.detach(host.store, serving.address)


# -- nonsense ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["", "9", "-1", "44", "4 ", "0x4", "4" * 3000, "\x7f", "٤"])
def test_a_state_that_means_nothing(host, guest, state):
    path = f"{guest.address.frontend}/state"

    def scribble():
        value = state.encode()
        node = host.xenstored.nodes[path]
        host.xenstored._do(lambda: host.xenstored.nodes.update({path: node._replace(value=value)}))

    scribble()
    guest.device.update()
    assert guest.backend is S.INIT_WAIT
    guest.switch(S.INITIALISING)
    connect(guest)
    scribble()
    guest.device.update()
    assert guest.backend is S.CONNECTED
    assert guest.read_works()


@pytest.mark.parametrize("state", [S.INIT_WAIT, S.RECONFIGURING, S.RECONFIGURED, S.UNKNOWN])
def test_a_state_that_leads_nowhere(guest, state):
    guest.switch(state)
    guest.device.update()
    assert guest.backend is S.INIT_WAIT
    guest.switch(S.INITIALISING)
    connect(guest)
    guest.switch(state)
    guest.device.update()
    assert guest.backend is S.CONNECTED


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ring-ref": None}, "ring-ref is missing"),
        ({"event-channel": None}, "event-channel is missing"),
        ({"ring-ref": ""}, "ring-ref is ''"),
        ({"ring-ref": "-1"}, "ring-ref is '-1'"),
        ({"ring-ref": "0x8"}, "ring-ref is '0x8'"),
        ({"ring-ref": "4294967296"}, "ring-ref is '4294967296'"),
        ({"ring-ref": "9" * 3000}, "ring-ref is '999"),
        ({"ring-ref": "4294967295"}, "cannot map 1 granted pages"),
        ({"ring-ref": "0"}, "cannot map 1 granted pages"),
        ({"event-channel": "4294967295"}, "cannot bind to port"),
        ({"event-channel": "0"}, "cannot bind to port"),
        ({"ring-page-order": "5"}, "ring-page-order is '5'"),
        ({"ring-page-order": "4294967295"}, "ring-page-order"),
        ({"ring-page-order": "1"}, "ring-ref0 is missing"),
        ({"ring-page-order": "1", "ring-ref0": "9", "ring-ref1": "3"}, "cannot map 2"),
        ({"protocol": "sparc-abi"}, "unknown protocol 'sparc-abi'"),
        ({"protocol": ""}, "unknown protocol ''"),
        ({"protocol": "x" * 3000}, "unknown protocol 'xxx"),
    ],
)
def test_keys_that_make_no_sense(host, guest, caplog, keys, said):
    """The connection is refused; nothing stays mapped; a better try works."""
    guest.publish()
    for name, value in keys.items():
        if value is None:
            guest.remove(name)
        else:
            guest.write(**{name: value})
    guest.switch(S.INITIALISED)
    guest.device.update()
    assert guest.backend is S.CLOSING
    assert said in caplog.text
    assert max(map(len, caplog.messages)) < 300  # a guest's text is cut
    assert host.hypervisor.mapped_pages == 0
    guest.device.update()
    assert guest.backend is S.CLOSING
    guest.switch(S.CLOSED)
    guest.device.update()
    guest.switch(S.INITIALISING)
    guest.device.update()
    connect(guest)
    assert guest.read_works()


def test_who_it_is_comes_from_us(host, guest):
    """What the frontend's directory says of domains and modes has no effect."""
    guest.write(backend_id=7, frontend_id=9, backend="/local/domain/5/data", mode="w")
    connect(guest)
    assert guest.read_works()


@pytest.mark.parametrize("threads", [1, 4])
def test_random_states(host, make, threads, queue_threads):
    """Whatever the order, with slow requests under way: what is mapped fits the state."""
    dice = random.Random(5)
    backend = host.memory(threads=threads, read=lambda buffers, offset: time.sleep(0.0005))
    guest = make(backend)
    guest.publish(persistent=True)
    data = host.share()
    for _ in repeat(80, 400):
        guest.switch(S(dice.choice([1, 1, 2, 3, 4, 4, 5, 6, 6, 0, 7, 8])))
        guest.device.update()
        mapped = host.hypervisor.mapped_pages
        if guest.device.state in (S.INIT_WAIT, S.CLOSED):
            assert mapped == 0
        elif guest.device.state is S.CONNECTED:
            assert mapped > 0
            ring = guest.rings[0]
            if ring.free > 4 and dice.random() < 0.5:
                slot = guest.abi.encode(Transfer(1, READ, 0, 8, tuple(data.refs), (0,), (7,)))
                ring.put(slot)
                ring.push()
                guest.channels[0].notify()
        if mapped == 0 and guest.device.state is S.INIT_WAIT and dice.random() < 0.3:
            guest.publish(persistent=dice.random() < 0.5)
    assert len(queue_threads()) <= 1
    guest.device.unplug()
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.device.finished
    assert host.hypervisor.mapped_pages == 0


def test_many_connections(host, guest):
    for _ in range(30):
        connect(guest)
        guest.switch(S.CLOSED)
        guest.device.update()
        guest.switch(S.INITIALISING)
        guest.device.update()
    assert host.hypervisor.counters.maps == host.hypervisor.counters.unmaps == 30


def test_a_flood_of_writes(host, guest):
    """XSA-349: the watch is on the one node that counts, and no change of it is missed."""
    store = guest.serving.store
    store.pending()
    for index in range(300):
        guest.write(**{f"junk{index % 50}": "x" * 1000})
        guest.store.write(f"/local/domain/{host.DOMID}/data/junk", str(index))
    store.read("domid")  # what fired before that has arrived
    assert not store.pending()
    for _ in range(300):
        guest.switch(S.INITIALISING)
    guest.switch(S.CLOSING)
    store.read("domid")
    assert [f"{guest.address.frontend}/state"] == store.pending()
    guest.device.update()
    assert guest.backend is S.CLOSING
    for index in range(50):
        guest.remove(f"junk{index}")
    host.store.remove(f"/local/domain/{host.DOMID}/data/junk")


def test_a_ring_that_overflows_stays_detachable(host, guest, caplog):
    connect(guest)
    with guest.pages[0].view[:16].cast("I") as indices:
        indices[0] = 1000
        guest.channels[0].notify()
        host.until(lambda: "not served any longer" in caplog.text)
        guest.device.update()
        assert guest.backend is S.CONNECTED
        guest.device.unplug()
        guest.switch(S.CLOSED)
        guest.device.update()
    assert guest.device.finished
    assert host.hypervisor.mapped_pages == 0


def test_repr(guest):
    assert repr(guest.device) == "<Device 51712 of domain 5: 2 (InitWait)>"


# -- the connection breaks -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "shown", "after"),
    [
        (S.CONNECTED, "2", S.CONNECTED),  # was not written: it is written now
        (S.CONNECTED, "4", S.CONNECTED),
        (S.CLOSED, "5", S.CLOSED),
        (S.INIT_WAIT, "6", S.INIT_WAIT),
    ],
)
def test_what_was_not_written_is_written_later(host, guest, ours, shown, after):
    if ours is S.CONNECTED:
        connect(guest)
    elif ours is S.CLOSED:
        guest.switch(S.CLOSED)
        guest.device.update()
    host.store.write(f"{guest.address.backend}/state", shown)
    guest.device.store_reconnected()
    assert guest.backend is after


def test_what_the_toolstack_wrote_meanwhile_is_obeyed(host, guest):
    connect(guest)
    host.store.write(f"{guest.address.backend}/online", "0")
    host.store.write(f"{guest.address.backend}/state", "5")
    guest.device.store_reconnected()
    assert guest.backend is S.CLOSING
    guest.switch(S.CLOSED)
    guest.device.update()
    assert guest.device.finished


# -- in the place of a process that died ---------------------------------------------------


LIVES = [  # the backend's state, the frontend's; how the guest and the toolstack got there
    (S.INIT_WAIT, S.INITIALISING),
    (S.CONNECTED, S.INITIALISED),
    (S.CONNECTED, S.CONNECTED),
    (S.CLOSING, S.CONNECTED),
    (S.CLOSING, S.CLOSING),
    (S.CLOSED, S.CLOSED),
]


def live(guest, ours, theirs):
    """Bring a device that somebody drives there."""
    if ours is not S.INIT_WAIT:
        guest.publish()
        guest.switch(S.INITIALISED)
        guest.device.update()
    if theirs not in (S.INITIALISING, S.INITIALISED):
        guest.switch(S.CONNECTED)
        guest.device.update()
    if ours is S.CLOSING and theirs is S.CONNECTED:
        guest.serving.store.write(f"{guest.address.backend}/state", "5")
    elif theirs in (S.CLOSING, S.CLOSED):
        guest.switch(theirs)
    guest.device.update()
    assert ours is guest.device.state


def leave(guest, ours, theirs):
    """Have everything as it is when the process has died that brought it there."""
    if ours is not S.INIT_WAIT:
        guest.publish()
    guest.switch(theirs)
    guest.serving.store.write(f"{guest.address.backend}/state", str(int(ours)))


def change(guest, theirs, detached):
    """Do what happens while nobody looks."""
    if theirs is None:
        guest.host.store.remove(guest.address.frontend)
    else:
        guest.switch(theirs)
    if detached:
        guest.host.store.write(f"{guest.address.backend}/online", "0")
        if guest.backend is not S.CLOSED:
            guest.host.store.write(f"{guest.address.backend}/state", "5")


AFTERWARDS = [None, *S]


@pytest.mark.parametrize(
    ("before", "now", "detached"),
    [
        pytest.param(
            before, now, detached, id="-".join(map(str, (*map(int, before), now, detached)))
        )
        for (i, before), (j, now) in itertools.product(enumerate(LIVES), enumerate(AFTERWARDS))
        for detached in (False, True)
        if one_in(3, i, j, detached)
    ],
)
def test_it_ends_up_as_if_nobody_had_died(host, make, before, now, detached):
    """Whatever the guest and the toolstack do meanwhile, short of a new ring."""
    living, heir = make(), make(vdev="xvdb", adopts=True)
    live(living, *before)
    leave(heir, *before)
    found = []
    for guest in (living, heir):
        change(guest, now, detached)
        guest.device.update()
        is_served = bool(guest.device._queues)
        if is_served and before[0] is not S.INIT_WAIT:
            assert guest.read_works()
        found.append((guest.backend, guest.device.state, guest.device.finished, is_served))
    assert found[0] == found[1]


@pytest.mark.parametrize("theirs", [S.INITIALISED, S.CONNECTED])
def test_a_new_ring_that_a_dead_process_never_saw(make, theirs):
    """What was noted is about another one."""
    journal = Journal()
    journal.begin(Ring((8,), 17), X86_64.slot_size)
    journal.note(3, [b"\1" * 16], [])
    guest = make(adopts=True, journals=[journal])
    leave(guest, S.CONNECTED, theirs)
    guest.device.update()
    assert guest.backend is S.CONNECTED
    assert guest.read_works()


def test_the_guest_of_a_dead_process_is_gone(host, make):
    guest = make(adopts=True)
    leave(guest, S.CONNECTED, S.CONNECTED)
    host.xenstored.remove_domain(host.DOMID)
    guest.device.update()
    assert (True, True) == (guest.device.finished, guest.device.guest_gone)


def test_a_size_that_the_guest_has_not_been_told(host, make):
    """It looks again when the state is written, though that is the same."""
    guest = make(host.memory((3 << 20) + 512), adopts=True)
    host.store.write(f"{guest.address.backend}/physical-sector-size", "4096")
    leave(guest, S.CONNECTED, S.CONNECTED)
    guest.store.watch(f"{guest.address.backend}/state")
    guest.store.pending()
    guest.device.update()
    guest.store.read("domid")  # what fired before that has arrived
    assert [f"{guest.address.backend}/state"] == guest.store.pending()
    assert str((3 << 20) // 512) == guest.store.read(f"{guest.address.backend}/sectors")


def test_what_a_dead_process_had_under_way_is_not_counted(make):
    guest = make(adopts=True)
    words = guest.serving.disk.statistics.of_queue(0).words
    words[count.IN_FLIGHT], words[count.HELD], words[count.REQUESTS] = 3, 2, 1
    leave(guest, S.CONNECTED, S.CONNECTED)
    guest.device.update()
    assert guest.read_works()
    told = guest.serving.disk.statistics.as_dict()
    assert (0, 2) == (told["held"], told["requests"])


@pytest.mark.parametrize("calls", range(1, 12))
def test_xenstore_is_lost_while_a_disk_is_adopted(host, make, monkeypatch, calls):
    """At any of its calls; what the dead process has shown is not overwritten."""
    guest = make(adopts=True)
    leave(guest, S.CONNECTED, S.CONNECTED)
    store, left = guest.serving.store, [calls]
    ask = store._ask

    def breaking(*what):
        left[0] -= 1
        if not left[0]:
            store.close()
        return ask(*what)

    monkeypatch.setattr(store, "_ask", breaking)
    guest.store.watch(f"{guest.address.backend}/state")
    guest.store.pending()
    update = itertools.repeat(guest.device.update)
    with pytest.raises(StoreLost):
        collections.deque(step() for step in update)
    store.reconnect()
    guest.device.store_reconnected()
    assert (S.CONNECTED, [], S.CONNECTED) == (
        guest.backend,
        guest.store.pending(),
        guest.device.state,
    )
    assert guest.read_works()
