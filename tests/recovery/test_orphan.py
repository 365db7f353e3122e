"""Answering in place of a process that was killed."""

from __future__ import annotations

import threading

import pytest

from xen_disk_py.blkif import (
    ERROR,
    OKAY,
    READ,
    WRITE,
    X86_64,
    Ring,
    Transfer,
    decode_response,
    encode_response,
)
from xen_disk_py.datapath.journal import SIZE, Journal
from xen_disk_py.recovery.orphan import stand_in
from xen_disk_py.ring import FrontRing
from xen_disk_py.simulated.frontend import RequestFailed
from xen_disk_py.simulated.hypervisor import SimulatedHypervisor
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import State

PAGE = 4096


@pytest.fixture
def dead(host):
    """A device whose nodes are there and whose process is not."""
    serving = host.serving(host.memory(threads=4), start=False, max_queues=4)
    serving.attach()
    yield serving
    toolstack.detach(host.store, serving.address)


@pytest.fixture(params=[1, 4], ids=["one-queue", "four-queues"])
def orphan(host, dead, request):
    """A connected frontend with requests on its ring, and nobody there to answer them."""
    frontend = host.frontend(dead.address, queues=request.param)
    # the part of the killed process: it had said Connected, and answered nothing since
    state = f"{dead.address.frontend}/state"
    connecting = threading.Thread(target=frontend.connect)
    connecting.start()
    host.until(lambda: host.tree().get(state) == str(int(State.INITIALISED)))
    host.store.write(f"{dead.address.backend}/state", str(int(State.CONNECTED)))
    connecting.join()
    return dead.address, frontend


def test_every_request_is_answered_with_an_error(host, orphan):
    address, frontend = orphan
    for number in range(4):
        frontend.submit(READ, number * PAGE, length=PAGE)
        frontend.submit(WRITE, number * PAGE, b"x" * PAGE)
    frontend.kick()
    assert 0 == frontend.reap()
    with stand_in(host.store, lambda: SimulatedHypervisor(host.machine), address):
        with pytest.raises(RequestFailed):
            frontend.drain()
        for ask in 2 * (  # and what comes meanwhile, on each queue
            lambda: frontend.read(0, PAGE),
            lambda: frontend.write(0, bytes(PAGE)),
            frontend.flush,
            lambda: frontend.discard(0, PAGE),
        ):
            with pytest.raises(RequestFailed):
                ask()
    assert 0 == host.guest.in_use(range(8, 8 + 2048))


def test_where_no_thread_is_to_be_had_another_moment_is_waited_for(
    host, orphan, monkeypatch, caplog
):
    address, frontend = orphan
    start, refused = threading.Thread.start, [3]

    def start_later(thread):
        if thread.name == "queue" and refused[0]:
            refused[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_later)
    frontend.submit(READ, 0, length=PAGE)
    frontend.kick()
    with (
        stand_in(host.store, lambda: SimulatedHypervisor(host.machine), address),
        pytest.raises(RequestFailed),
    ):
        frontend.drain()
    assert "no thread to be had" in caplog.text


def test_a_guest_without_a_ring_needs_nobody(host, dead):
    before = host.tree()
    with stand_in(host.store, lambda: SimulatedHypervisor(host.machine), dead.address):
        pass
    assert before == host.tree()


def test_requests_that_were_overtaken_are_answered_too(host, dead):
    """Nothing but the journal tells of them; without it this guest would wait indefinitely."""
    abi = X86_64
    pages, data = host.share(), host.share()
    channel = host.guest.bind_unbound(0)
    ring = FrontRing(pages.view, abi.slot_size, host.guest.fence)
    slots = [
        abi.encode(Transfer(id_, WRITE, 0, 8, tuple(data.refs), (0,), (7,))) for id_ in range(4)
    ]
    for slot in slots:
        ring.put(slot.ljust(abi.slot_size, b"\0"))
    ring.push()
    front = dead.address.frontend
    keys = {"ring-ref": pages.refs[0], "event-channel": channel.port, "protocol": abi.name}
    for name, value in keys.items():
        host.store.write(f"{front}/{name}", str(value))
    # requests 1 and 2 are done, 0 and 3 were begun
    memory = memoryview(bytearray(SIZE))
    journals = [Journal(memory), Journal()]
    journals[0].begin(Ring(tuple(pages.refs), channel.port), abi.slot_size)
    done = [encode_response(id_, WRITE, OKAY) for id_ in (1, 2)]
    journals[0].note(0, done, [slots[id_].ljust(abi.slot_size, b"\0") for id_ in (0, 3)])
    for number, response in enumerate(done):
        at = 64 + number * abi.slot_size
        pages.view[at : at + len(response)] = response
    with pages.view[:16].cast("I") as indices:
        indices[2] = 2
    found = []

    def all_answered():
        found.extend(map(decode_response, ring.take()))
        return len(found) >= 4

    open_hypervisor = lambda: SimulatedHypervisor(host.machine)  # noqa: E731
    with stand_in(host.store, open_hypervisor, dead.address, [Journal(memory), Journal()]):
        host.until(all_answered)
    assert [(0, ERROR), (1, OKAY), (2, OKAY), (3, ERROR)] == sorted(
        (answer.id, answer.status) for answer in found
    )
    assert Journal(memory).recall(Ring(tuple(pages.refs), channel.port), abi.slot_size) is None
    ring.close()
    channel.close()


@pytest.mark.parametrize("count", [0, 1, 8])
def test_there_need_not_be_a_journal_for_each_queue(host, orphan, count):
    address, frontend = orphan
    with stand_in(
        host.store,
        lambda: SimulatedHypervisor(host.machine),
        address,
        [Journal() for _ in range(count)],
    ):
        for _ in range(8):  # all queues in turn
            with pytest.raises(RequestFailed):
                frontend.read(0, PAGE)
