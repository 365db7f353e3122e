"""A guest that does too much of something: it costs little, nothing stays, nobody else suffers.

With XEN_DISK_LONG=1 the floods have their full length, and figures are printed.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from hostile.attacker import (
    BAD_REFERENCES,
    LONG,
    PATIENCE,
    Memory,
    costs,
    descriptors,
    direct,
    discard,
    indirect,
    resident,
    until,
)
from xen_disk_py.blkif import X86_64, Connection, Ring
from xen_disk_py.datapath import statistics as count
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.queue import MAX_IN_FLIGHT, Options
from xen_disk_py.ring import FrontRing
from xen_disk_py.xenbus.states import State

READ, WRITE = 0, 1
SECONDS = 10 if LONG else 0.15
MEBIBYTE = 1 << 20

ways = pytest.mark.parametrize(
    ("persistent", "grants"),
    [(True, Grants.AUTO), (False, Grants.COPY), (False, Grants.MAP)],
    ids=["kept", "copied", "mapped"],
)


# -- events ---------------------------------------------------------------------------------


def flood_of_events(line, seconds):
    """Notify at full rate.

    Returns:
        Events, wake-ups, processor time of the queue's thread, seconds that all of it took.
    """
    notify = line.channel.notify
    words = line.disk.statistics.of_queue(0).words
    start = time.monotonic()
    wakeups, cpu, sent = words[count.WAKEUPS], line.cpu(), 0
    while time.monotonic() < start + seconds:
        notify()
        sent += 1
    wakeups, cpu = words[count.WAKEUPS] - wakeups, line.cpu() - cpu
    return sent, wakeups, cpu, time.monotonic() - start


def test_xsa_332_a_flood_of_events(host, wire):
    """The port stays masked between two looks, so that a million of them cost little."""
    line = wire()
    (ref,) = host.share().refs
    for _ in range(100):  # a busy machine spoils some of them; a queue that is busy, all
        sent, wakeups, cpu, seconds = flood_of_events(line, SECONDS)
        most = 50 + 110 * seconds
        assert wakeups < most
        if most < sent and cpu < 0.2 * seconds:
            break
    else:
        pytest.fail(f"{sent} events took {cpu} s of the processor, within {seconds} s")
    print(f"{sent / seconds:.0f} events/s: {wakeups / seconds:.0f} wake-ups/s, {cpu / seconds:.2%}")
    assert [(1, READ, 0)] == line.ask(direct(X86_64, READ, 1, 0, [(ref, 0, 7)]))
    assert not line.failures


def test_xsa_332_a_flood_of_events_does_not_keep_it_from_stopping(host, wire):
    line = wire()
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            line.channel.notify()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        words = line.disk.statistics.of_queue(0).words
        until(lambda: words[count.WAKEUPS] > 5)
        assert line.queue.stop(PATIENCE)
    finally:
        stop.set()
        thread.join()


def test_xsa_332_events_after_the_ring_is_dead_cost_nothing(host, wire, caplog):
    line = wire()
    with line.indices() as indices:
        indices[0] = 1000
    line.channel.notify()
    until(lambda: "not served any longer" in caplog.text)
    until(line.queue._ended.is_set)
    for _ in range(10_000):
        line.channel.notify()
    assert line.queue.stop(PATIENCE)
    assert not line.failures


# -- requests -------------------------------------------------------------------------------


def wrong_requests(pages):
    """Give requests that must all be refused, of all kinds, again and again."""
    table, ref = pages.refs[:2]
    pages.view[:16] = descriptors([(ref, 3, 2), (BAD_REFERENCES[1], 0, 7)])
    dice = random.Random(1)
    kinds = [
        direct(X86_64, WRITE, 1, 2**64 - 1, [(ref, 0, 7)]),
        direct(X86_64, READ, 2, 0, [(ref, 5, 4)]),
        direct(X86_64, READ, 3, 0, [(ref, 0, 7)] * 11, count=255),
        *(direct(X86_64, READ, 4, 0, [(ref, 0, 7), (bad, 0, 7)]) for bad in BAD_REFERENCES),
        *(direct(X86_64, WRITE, 5, 0, [(bad, 0, 7), (ref, 0, 7)]) for bad in BAD_REFERENCES),
        indirect(X86_64, READ, 6, 0, 1, [table]),
        indirect(X86_64, WRITE, 7, 0, 65535, [table]),
        indirect(X86_64, 255, 8, 0, 1, [table]),
        *(indirect(X86_64, READ, 9, 0, 20, [bad]) for bad in BAD_REFERENCES),
        discard(X86_64, 10, 2**64 - 1, 2**64 - 1),
        bytes([99]) * 112,
    ]
    while True:
        yield dice.choice(kinds)


@ways
@pytest.mark.parametrize("threads", [1, 4])
def test_xsa_71_wrong_requests_without_end(host, wire, persistent, grants, threads, caplog):
    """Error paths release everything; what is said of them is rationed."""
    total = 1_000_000 if LONG else 5_000
    line = wire(
        Memory(threads=threads), order=4, persistent=persistent, options=Options(256, grants)
    )
    wrong = wrong_requests(host.share(3))
    before, calls = None, set()
    start = time.monotonic()
    for done in range(0, total, 500):
        answers = line.ask(*itertools.islice(wrong, 500))
        assert {-1, -2} >= {answer.status for answer in answers}
        calls.update(call[0] for call in line.backend.calls)
        line.backend.calls.clear()
        if done == 2_000:
            before = costs(host.hypervisor), resident()
    said, seconds = len(caplog.records), time.monotonic() - start
    after = costs(host.hypervisor), resident()
    assert before[0] == after[0]
    assert after[1] - before[1] < 2 * MEBIBYTE
    assert said < 8 + 2 * seconds  # five at once, then one a second
    # Where pages are copied, a read is done before it shows that it cannot be delivered.
    assert {call[0] for call in line.backend.calls} <= (
        {"read"} if grants is Grants.COPY else set()
    )
    assert not line.failures
    print(f"{total / seconds:.0f} wrong requests/s, {after[1] - before[1]} bytes more")


# -- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [WRITE, pytest.param(READ, marks=pytest.mark.slow)])
def test_memory_in_flight_is_bounded(host, wire, operation):
    """A backend that does not move, and many requests of 1 MiB each: few of them are begun."""
    most = MAX_IN_FLIGHT // MEBIBYTE
    requests = 3 * most
    backend = Memory(4 * MEBIBYTE, threads=most + 1)
    line = wire(backend, order=4, options=Options(256, Grants.COPY))
    go, busy = threading.Event(), threading.Semaphore(0)

    def slow(what):
        busy.release()
        go.wait(4 * PATIENCE)

    backend.before = slow
    pages = host.share(257)
    table, *refs = pages.refs
    pages.view[: 8 * 256] = descriptors([(ref, 0, 7) for ref in refs])
    assert requests < 512 == line.ring.slots
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        line.put(*(indirect(X86_64, operation, n, 0, 256, [table]) for n in range(requests)))
        line.kick()
        for _ in range(most):
            assert busy.acquire(timeout=PATIENCE)
        assert not busy.acquire(timeout=0.02)  # no more is begun
        assert most == line.queue._workers.unfinished
        go.set()
        answers = line.responses(requests)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        go.set()
        tracemalloc.stop()
    assert [(n, operation, 0) for n in range(requests)] == sorted(answers)
    assert MAX_IN_FLIGHT < peak < MAX_IN_FLIGHT + 8 * MEBIBYTE


# -- xenstore -------------------------------------------------------------------------------


class Driver:
    """A driver without manners, for a device that a session drives."""

    def __init__(self, host, serving):
        self.host = host
        self.serving = serving
        self.front = serving.address.frontend
        self.store = host.open_store(host.DOMID)
        self.pages = host.guest.share_pages(0, 1, writable=True)
        self.data = host.guest.share_pages(0, 1, writable=True)
        self.channel = host.guest.bind_unbound(0)
        self.ring = FrontRing(self.pages.view, X86_64.slot_size, host.guest.fence)
        ring = Ring(tuple(self.pages.refs), self.channel.port)
        for name, value in Connection((ring,), X86_64.name, persistent=True).to_keys().items():
            self.store.write(f"{self.front}/{name}", value)

    def switch(self, state):
        self.store.write(f"{self.front}/state", str(int(state)))

    def backend_state(self):
        return State.parse(self.host.tree().get(f"{self.serving.address.backend}/state"))

    def scribble(self, dice):
        """Put some requests on the ring, wherever the backend thinks it stands."""
        slot = direct(X86_64, READ, 1, 0, [(self.data.refs[0], 0, 7)])
        with self.pages.view[:16].cast("I") as indices:
            start = indices[2]
            for index in range(start, start + 32):
                at = 64 + 112 * (index % 32)
                self.pages.view[at : at + 112] = slot
            indices[0] = start + dice.randint(0, 32) & 0xFFFF_FFFF
        self.channel.notify()

    def close(self):
        self.ring.close()
        self.channel.close()
        self.data.close()
        self.pages.close()


@pytest.fixture
def driver(host, attacked):
    """Return a function that makes drivers, each of a disk of its own."""
    drivers = []

    def make(backend, **options):
        drivers.append(Driver(host, attacked(backend, **options)))
        return drivers[-1]

    yield make
    for one in drivers:
        one.switch(State.CLOSED)
        one.serving.unplug()
        one.serving.wait()
        one.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_xsa_350_states_back_and_forth(host, driver, threads):
    """Connecting and closing at full speed, with slow requests under way: all is in order after."""
    backend = Memory(threads=threads)
    backend.before = lambda what: time.sleep(0.001)
    one = driver(backend)
    dice = random.Random(1)
    threads_before = threading.active_count()
    connected, before = 0, None
    toggles = 10_000 if LONG else 200
    number = 0
    while number < toggles or connected <= toggles // 50:  # a busy machine needs more of them
        one.switch(dice.choice([3, 3, 4, 6, 6, 1, 5]))
        if dice.random() < 0.3:
            one.scribble(dice)
        if dice.random() < 0.5:  # let it get somewhere
            state = one.backend_state()
            end = time.monotonic() + 0.01
            while one.backend_state() is state and time.monotonic() < end:
                time.sleep(0)
        connected += one.backend_state() is State.CONNECTED
        if number == toggles // 10:
            before = resident()
        number += 1
    counters = host.hypervisor.counters
    one.switch(State.CLOSED)
    # Closed may be what it was before: the backend had yet to see the last states but one.
    until(
        lambda: one.backend_state() is State.CLOSED and host.hypervisor.mapped_pages == 0,
        what="Closed, and everything unmapped",
    )
    assert counters.maps == counters.unmaps
    until(lambda: threading.active_count() <= threads_before, what="the end of all threads")
    # A few toggles show little: each thread may leave the allocator an arena of its own.
    assert resident() - before < (4 if LONG else 16) * MEBIBYTE
    with one.pages.view[:16].cast("I") as indices:
        indices[0] = indices[2]
    one.switch(State.INITIALISING)
    until(lambda: one.backend_state() is State.INIT_WAIT, what="InitWait")
    one.switch(State.INITIALISED)
    until(lambda: one.backend_state() is State.CONNECTED, what="Connected")
    print(f"{number} toggles: connected {connected} times, {counters.maps} mappings")


def test_xsa_349_writes_to_the_frontends_directory(host, driver):
    """At full rate, below the watched node too: memory stays bounded, no state is missed."""
    one = driver(Memory())
    one.switch(State.INITIALISED)
    until(lambda: one.backend_state() is State.CONNECTED)
    one.switch(State.CONNECTED)
    paths = [f"{one.front}/junk{n}" for n in range(20)]
    paths += [f"{one.front}/state/{n}" for n in range(20)]
    written, before = 0, None
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or written < 400:
        one.store.write(paths[written % len(paths)], str(written) * 100)
        written += 1
        if written == 200:
            before = resident()
    assert resident() - before < 4 * MEBIBYTE
    one.switch(State.CLOSED)
    until(lambda: one.backend_state() is State.CLOSED)
    for path in paths:
        one.store.remove(path)
    print(f"{written / SECONDS:.0f} writes/s, {resident() - before} bytes more")


# -- another disk, in another process -------------------------------------------------------


def flood(kind, seconds):
    """Be the flood: a process with a hostile guest and the backend that it attacks."""
    from xen_disk_py.simulated.hypervisor import (
        SimulatedGuest,
        SimulatedHypervisor,
        SimulatedMachine,
    )

    with (
        SimulatedMachine(domid=5) as machine,
        SimulatedHypervisor(machine) as hypervisor,
        SimulatedGuest(machine) as guest,
    ):
        from hostile.attacker import Wire

        line = Wire(guest, hypervisor, Memory(), order=4)
        pages = guest.share_pages(0, 3, writable=True)
        print("begun", flush=True)
        if kind == "events":
            sent, wakeups, cpu, seconds = flood_of_events(line, seconds)
        else:
            wrong, sent, cpu, end = wrong_requests(pages), 0, line.cpu(), time.monotonic() + seconds
            while time.monotonic() < end:
                line.ask(*itertools.islice(wrong, 500))
                sent += 500
            wakeups, cpu = 0, line.cpu() - cpu
        line.close()
        pages.close()
    print(json.dumps({"per second": sent / seconds, "wakeups": wakeups, "cpu": cpu / seconds}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["events", "wrong requests"])
def test_another_disk_keeps_its_latency(host, wire, kind):
    """The attacked disk has a process of its own; the figures are printed."""
    line = wire(persistent=True)
    (ref,) = host.share().refs
    slot = direct(X86_64, READ, 1, 0, [(ref, 0, 7)])

    def latencies(seconds):
        found = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.perf_counter()
            line.ask(slot)
            found.append(time.perf_counter() - start)
        return sorted(found)

    latencies(0.5)
    before = latencies(3)
    command = [sys.executable, str(Path(__file__)), kind, "5"]
    environment = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as attacker:
        assert "begun\n" == attacker.stdout.readline()
        during = latencies(4)
        figures = json.loads(attacker.stdout.read())
    assert attacker.returncode == 0
    medians = statistics.median(before), statistics.median(during)
    p99 = before[len(before) * 99 // 100], during[len(during) * 99 // 100]
    print(f"{kind}: {figures}; latency median {medians[0]:.6f} -> {medians[1]:.6f}", end=" ")
    print(f"({medians[1] / medians[0]:.2f}), 99 % {p99[0]:.6f} -> {p99[1]:.6f}")
    assert medians[1] < 10 * medians[0]


if __name__ == "__main__":
    flood(sys.argv[1], float(sys.argv[2]))
