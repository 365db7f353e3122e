"""The software frontend against the backend that it is made for."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest

from xen_disk_py.blkif import ARM, EOPNOTSUPP, ERROR, READ, WRITE, X86_32
from xen_disk_py.datapath import statistics
from xen_disk_py.datapath.queue import Options
from xen_disk_py.errors import DeviceError
from xen_disk_py.simulated.frontend import RequestFailed
from xen_disk_py.xenbus.states import State


@contextlib.contextmanager
def in_a_hurry(frontend, allowed):
    """Have it wait for a moment only; afterwards for long, for what is allowed then."""
    patience, frontend._timeout = frontend._timeout, 0.05
    try:
        yield
    finally:
        frontend._timeout = patience
        allowed.set()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"abi": X86_32, "persistent": False},
        {"abi": ARM, "ring_page_order": 4, "depth": 512, "max_segments": 1},
        {"max_segments": 11, "depth": 1, "persistent": False},
        {"max_segments": 12, "ring_page_order": 1},
        {"max_segments": 10_000, "depth": 2},
    ],
)
def test_write_and_read(host, options):
    backend = host.memory(4 << 20)
    frontend = host.serving(backend).frontend(**options)
    data = bytes(range(256)) * 2 * 3000
    frontend.write(512, data)
    assert data == backend.data[512 : 512 + len(data)]
    assert data[1024:] == frontend.read(512 + 1024, len(data) - 1024)
    frontend.flush()
    assert ("flush", 0, 0) == backend.calls[-1]
    frontend.discard(4096, 8192)
    assert ("discard", 4096, 8192) == backend.calls[-1]
    assert bytes(8192) == frontend.read(4096, 8192)
    assert b"" == frontend.read(0, 0)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("wanted", "order"), [(2, 0), (3, 1), (8, 0), (20, 0)])
def test_several_queues(host, wanted, order, persistent):
    """Requests go to all of them in turn."""
    backend = host.memory(4 << 20, threads=8)
    serving = host.serving(backend, max_queues=8)
    queues = min(wanted, 8)
    frontend = serving.frontend(
        queues=wanted, ring_page_order=order, persistent=persistent, max_segments=16, depth=100
    )
    front = serving.address.frontend
    assert str(queues) == host.store.read(f"{front}/multi-queue-num-queues")
    assert host.store.read(f"{front}/queue-{queues - 1}/event-channel").isdigit()
    dice = random.Random(wanted)
    data = dice.randbytes(3 << 20)
    for _ in range(2):
        frontend.write(512, data)
        frontend.flush()
        assert data == backend.data[512:][: len(data)]
        assert data == frontend.read(512, len(data))
    counters = [serving.disk.statistics.of_queue(number).words for number in range(8)]
    requests = [words[statistics.REQUESTS] for words in counters]
    assert max(requests[:queues]) - min(requests[:queues]) <= 1
    assert [0] * (8 - queues) == requests[queues:]
    frontend.disconnect()
    assert host.hypervisor.mapped_pages == 0


def test_a_single_queue_where_no_more_are_offered(host):
    serving = host.serving(host.memory())
    frontend = serving.frontend(queues=4)
    frontend.write(0, b"q" * 4096)
    assert host.store.read(f"{serving.address.frontend}/multi-queue-num-queues") is None
    assert b"q" * 4096 == serving.backend.data[:4096]


def test_a_full_ring_of_several(host):
    """The others may have room: it is this one's turn."""
    allowed = threading.Event()
    backend = host.memory(threads=8)
    read = backend.read
    backend.read = lambda buffers, offset: allowed.wait(60) and read(buffers, offset)
    frontend = host.serving(backend, max_queues=2).frontend(queues=2, depth=1000, max_segments=1)
    for number in range(64):
        frontend.submit(READ, 512 * number, length=512)
    with in_a_hurry(frontend, allowed), pytest.raises(DeviceError, match="no response within"):
        frontend.submit(READ, 0, length=512)
    frontend.drain()


def test_features(host):
    serving = host.serving(host.memory(sector_size=4096), options=Options(17))
    frontend = serving.frontend(max_segments=100)
    features = frontend.features
    assert (2048, 4096, False, True, 17, 4) == (
        features.sectors,
        features.sector_size,
        features.read_only,
        features.discard,
        features.max_indirect_segments,
        features.max_ring_page_order,
    )
    assert frontend.max_bytes == 17 * 4096


def test_no_indirect_requests_where_none_are_offered(host):
    serving = host.serving(host.memory(), options=Options(0))
    frontend = serving.frontend(max_segments=100)
    assert frontend.max_bytes == 11 * 4096
    frontend.write(0, b"n" * 100_000 + bytes(352))
    assert serving.disk.statistics.as_dict()["errors"] == 0


def test_requests_that_fail(host):
    frontend = host.serving(host.memory(1 << 20, read_only=True)).frontend()
    assert frontend.features.read_only
    with pytest.raises(RequestFailed) as caught:
        frontend.write(0, bytes(512))
    assert caught.value.status == ERROR
    assert isinstance(caught.value, OSError)
    with pytest.raises(RequestFailed):
        frontend.read(1 << 20, 512)
    with pytest.raises(RequestFailed):
        frontend.discard(0, 4096)
    assert bytes(4096) == frontend.read(0, 4096)


def test_an_operation_that_is_not_supported(host):
    class NoDiscard(type(host.memory())):
        can_discard = False

    frontend = host.serving(NoDiscard()).frontend()
    with pytest.raises(RequestFailed) as caught:
        frontend.discard(0, 4096)
    assert caught.value.status == EOPNOTSUPP


def test_one_failure_among_many(host):
    """All others are done nevertheless."""
    backend = host.memory(1 << 20)
    frontend = host.serving(backend).frontend(persistent=False)
    done = []
    for index in range(20):
        offset = 1 << 20 if index == 7 else index * 4096
        frontend.submit(READ, offset, length=4096, done=lambda view, i=index: done.append(i))
    with pytest.raises(RequestFailed):
        frontend.drain()
    frontend.drain()
    assert [index for index in range(20) if index != 7] == done


@pytest.mark.parametrize("max_segments", [11, 32])
def test_nothing_is_in_use_when_a_request_is_done(host, max_segments):
    """Without persistent grants; as Linux checks it, when the response arrives."""
    serving = host.serving(host.memory(1 << 20))
    frontend = serving.frontend(persistent=False, max_segments=max_segments)
    seen = []

    def look(view):
        # Of the whole batch: it is answered at once, after all of it is unmapped.
        refs = [ref for pages in frontend._shared[1:] for ref in pages.refs]
        seen.append(host.guest.in_use(refs))

    for index in range(32):
        frontend.submit(
            (READ, WRITE)[index % 2],
            index * 4096,
            b"i" * 4096 if index % 2 else None,
            length=4096,
            done=look,
        )
    frontend.drain()
    assert [0] * 32 == seen


def test_persistent_grants_are_in_use_until_the_end(host):
    serving = host.serving(host.memory(1 << 20))
    frontend = serving.frontend(persistent=True, depth=4, max_segments=4)
    frontend.write(0, bytes(4 * 4 * 4096))
    maps = host.hypervisor.counters.maps
    for _ in range(10):
        frontend.read(0, 4 * 4 * 4096)
    assert maps == host.hypervisor.counters.maps
    frontend.disconnect()
    assert host.hypervisor.mapped_pages == 0


def test_no_backend(host):
    serving = host.serving(host.memory(), start=False)
    serving.attach()
    host.store.write(f"{serving.address.backend}/state", "1")
    frontend = host.frontend(serving.address, timeout=0.05)
    with pytest.raises(DeviceError, match=r"the backend is 1 \(Initialising\) after 0.05 s"):
        frontend.connect()
    with pytest.raises(DeviceError, match="not connected"):
        frontend.kick()
    assert frontend.max_bytes == 0
    serving.session._clean_up(serving.observer, forced=False)


def test_a_backend_that_is_gone(host):
    serving = host.serving(host.memory())
    frontend = host.frontend(serving.address, timeout=0.05)
    serving.unplug()
    serving.wait()
    with pytest.raises(DeviceError, match="the backend is gone"):
        frontend.connect()
    assert frontend.backend_state is None


def test_no_response_in_time(host):
    backend = host.memory()
    allowed = threading.Event()
    read = backend.read
    backend.read = lambda buffers, offset: allowed.wait(60) and read(buffers, offset)
    serving = host.serving(backend)
    frontend = serving.frontend()
    with in_a_hurry(frontend, allowed), pytest.raises(DeviceError, match="no response within"):
        frontend.read(0, 4096)
    frontend.drain()


def test_leaving_a_context(host):
    serving = host.serving(host.memory())
    with serving.frontend(persistent=False) as frontend:
        frontend.submit(READ, 0, length=512)
        serving.unplug()
        frontend.drain()
        frontend.disconnect()
    frontend.close()  # once more
    assert serving.wait().name == "UNPLUGGED"
    assert host.tree().get(f"{serving.address.frontend}/state") is None


def test_disconnecting_when_everything_is_removed(host):
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    host.store.remove(serving.address.frontend)
    serving.wait()
    frontend.disconnect()
    assert State.parse(None) is frontend.backend_state


def test_a_new_size_is_noticed_when_the_state_is_written_again(host):
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    back = serving.address.backend
    host.store.write(f"{back}/sectors", "4096")
    assert 2048 == frontend.look_again().sectors
    host.store.write(f"{back}/state", "4")
    host.until(lambda: frontend.look_again().sectors == 4096)
