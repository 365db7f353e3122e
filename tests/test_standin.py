"""Answering in place of a process that was killed."""

from __future__ import annotations

import threading

import pytest

from xen_disk_py import toolstack
from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.frontend import RequestFailed
from xen_disk_py.simulated.hypervisor import SimulatedHypervisor
from xen_disk_py.standin import stand_in
from xen_disk_py.xenbus import State

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
    connecting.join(5)
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


def test_a_guest_without_a_ring_needs_nobody(host, dead):
    before = host.tree()
    with stand_in(host.store, lambda: SimulatedHypervisor(host.machine), dead.address):
        pass
    assert before == host.tree()
