"""Another size while the guest uses the disk: what is asked, what the disk does, what is told."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time

import pytest
from long_run import LONG

from xen_disk_py.backends import Backend
from xen_disk_py.blkif import READ, Transfer
from xen_disk_py.datapath import disk as disk_module
from xen_disk_py.datapath import statistics as count
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.errors import BackendError, DeviceError, StoreLost, XenDiskError
from xen_disk_py.session import Interrupts
from xen_disk_py.simulated.frontend import RequestFailed
from xen_disk_py.xenbus import resize, toolstack
from xen_disk_py.xenbus.resize import ResizeRequest
from xen_disk_py.xenbus.states import State

MIB = 1 << 20


class Elastic(Backend):
    """A disk that can have any size; ``capacity`` is what it finds when it looks."""

    def __init__(self, size=MIB):
        self.size = self.capacity = size
        self.resizes = []

    def read(self, buffers, offset):
        assert offset + sum(map(len, buffers)) <= self.size, "beyond the end"
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def write(self, buffers, offset):
        assert offset + sum(map(len, buffers)) <= self.size, "beyond the end"

    def resize(self, size):
        self.resizes.append(size)
        if size is None:
            return self.capacity
        self.size = self.capacity = size
        return size


def is_refused(disk, sector, sectors=1):
    request = Transfer(1, READ, sector, sectors, (9,), (0,), (sectors - 1,))
    return disk.refusal(request) is not None


# -- what is asked, what is answered -------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("size", [None, 1, 512, 3 << 60])
def test_a_request_is_read_as_it_was_written(size, force):
    assert ResizeRequest(size, force) == ResizeRequest.parse(str(ResizeRequest(size, force)))


@pytest.mark.parametrize(
    "text",
    [None, "", "current", "current 2", "current  0", "CURRENT 0", "0 0", "-1 0", "+1 0", "1_0 0"],
)
def test_what_is_no_request(text):
    assert ResizeRequest.parse(text) is None


@pytest.mark.parametrize("text", ["1 0 ", " 1 0", "1 0\n", "01 0", "٤ 0", "1e9 0", "9" * 20 + " 0"])
def test_what_is_no_size(text):
    assert ResizeRequest.parse(text) is None


def test_an_answer_is_read_as_it_was_written():
    assert 1 << 40 == resize.parse_answer(resize.granted(1 << 40))
    for why in ("no", "", "größer\nals \x00 100 %", "ok 512"):
        with pytest.raises(DeviceError) as caught:
            resize.parse_answer(resize.refused(why))
        assert why == str(caught.value)
    assert len(resize.refused("ü" * 10_000)) < 4096 - 200  # fits into a request


@pytest.mark.parametrize("text", ["", "ok", "ok -1", "ok 0", "ok 512 ", "okay 512", "512 0"])
def test_an_answer_that_makes_no_sense(text):
    with pytest.raises(DeviceError, match="makes no sense"):
        resize.parse_answer(text)


# -- the disk ------------------------------------------------------------------------------


def test_any_sequence_of_sizes():
    """The disk has the last size that was fine, and refuses exactly what lies beyond."""
    dice = random.Random(11)
    backend = Elastic()
    disk = Disk(backend)
    model = MIB
    outcomes = set()
    for _ in range(500):
        wanted = dice.choice([-4096, 0, 512, 4096, dice.randrange(1, 1000) * 4096, model])
        force = dice.random() < 0.3
        measured = dice.random() < 0.5
        if measured:
            backend.capacity = wanted
        fine = wanted > 0 and wanted % 4096 == 0 and (force or wanted >= model)
        try:
            result = disk.resize(None if measured else wanted, force=force, step=4096)
        except DeviceError:
            outcomes.add("refused")
            assert not fine
        else:
            outcomes.add("grown" if wanted > model else "shrunk" if wanted < model else "same")
            assert fine
            model = wanted
            assert wanted == result == backend.size
        assert model == disk.sectors * 512 == backend.size
        assert not is_refused(disk, model // 512 - 1)
        assert is_refused(disk, model // 512)
    assert {"refused", "grown", "shrunk", "same"} == outcomes


def test_the_order_of_things():
    """Requests never see a disk that is longer than its backend."""
    backend = Elastic()
    disk = Disk(backend)
    seen = []

    def resize(size):
        seen.append((size, disk.sectors * 512))
        return size

    backend.resize = resize
    disk.resize(2 * MIB)
    disk.resize(MIB, force=True)
    assert [(2 * MIB, MIB), (MIB, MIB)] == seen


class Fixed(Backend):
    size = MIB


class Broken(Fixed):
    def resize(self, size):
        raise ValueError(f"cannot do {size}")


class Refusing(Fixed):
    def resize(self, size):
        raise DeviceError("not today")


class Nonsense(Fixed):
    def resize(self, size):
        return "large"


@pytest.mark.parametrize(
    ("backend", "error", "said"),
    [
        (Fixed, DeviceError, "Fixed keeps its size"),
        (Broken, BackendError, r"resize failed in Broken: test_resize.py:\d+: ValueError"),
        (Refusing, DeviceError, "not today"),
        (Nonsense, XenDiskError, "Nonsense"),
    ],
)
@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB])
def test_a_backend_that_does_not(backend, error, said, size):
    disk = Disk(backend())
    with pytest.raises(error, match=said):
        disk.resize(size, force=True)
    # one that returned may have given up the rest, whatever it says
    assert (min(size, MIB) if backend is Nonsense else MIB) == disk.sectors * 512


def test_a_backend_that_measures_nonsense():
    disk = Disk(Nonsense())
    with pytest.raises(DeviceError, match="large bytes is not a positive multiple of 512"):
        disk.resize(None)
    assert MIB == disk.sectors * 512


def test_a_smaller_disk_waits_for_what_is_under_way():
    """Requests that were judged by the old size are done before the backend gives it up."""
    backend = Elastic()
    disk = Disk(backend)
    words = disk.statistics.of_queue(0).words
    words[count.IN_FLIGHT] = 1
    thread = threading.Thread(target=disk.resize, args=(4096,), kwargs={"force": True})
    thread.start()
    deadline = time.monotonic() + 30
    while not is_refused(disk, 8):  # new ones are refused at once
        assert time.monotonic() < deadline
    assert [] == backend.resizes
    words[count.REQUESTS] += 1
    words[count.IN_FLIGHT] = 0
    thread.join()
    assert [4096] == backend.resizes


def test_a_smaller_disk_waits_in_vain(monkeypatch):
    monkeypatch.setattr(disk_module, "SETTLING", 0.02)
    backend = Elastic()
    disk = Disk(backend)
    disk.statistics.of_queue(0).words[count.IN_FLIGHT] = 1
    with pytest.raises(DeviceError, match="not returned within"):
        disk.resize(4096, force=True)
    assert (MIB, []) == (disk.sectors * 512, backend.resizes)
    assert 2 * MIB == disk.resize(2 * MIB)  # nothing to wait for


# -- the device ----------------------------------------------------------------------------


@pytest.fixture
def served(host):
    """An elastic disk that the guest has, and its frontend."""
    serving = host.serving(Elastic())
    serving.front = serving.frontend()
    assert serving.connected.wait(host.PATIENCE)
    return serving


def ask(host, serving, text, name="1"):
    """Make a request and return the answer."""
    path = f"{serving.address.backend}/resize/{name}"
    host.store.write(path, text)
    host.until(lambda: host.tree()[path] != text, what="an answer")
    return host.tree()[path]


def test_the_guest_sees_the_new_size(host, served):
    front = served.front
    sectors = f"{served.address.backend}/sectors"
    for size in (2 * MIB, MIB + 4096, 3 * MIB):
        force = size == MIB + 4096
        assert f"ok {size}" == ask(host, served, f"{size} {int(force)}")
        host.until(lambda size=size: front.look_again().sectors == size // 512)
        assert str(size // 512) == host.tree()[sectors]
        assert bytes(4096) == front.read(size - 4096, 4096)
        with pytest.raises(RequestFailed):
            front.read(size, 4096)
        assert served.device.connected
    # what the toolstack noted is its own
    assert str(MIB // 512) == host.tree()[f"{served.address.toolstack}/sectors"]


def test_sectors_and_state_change_at_once(host, served):
    """Whoever looks when the watch on the state fires finds the new size."""
    store = host.open_store(host.DOMID)
    store.watch(f"{served.address.backend}/state")
    assert store.pending()
    ask(host, served, f"{2 * MIB} 0")
    host.until(store.pending)
    assert (str(2 * MIB // 512), "4") == tuple(
        store.read(f"{served.address.backend}/{name}") for name in ("sectors", "state")
    )
    ask(host, served, f"{2 * MIB} 0", "2")
    assert not store.pending()  # the same size is no news


def test_what_the_storage_has_become(host, served):
    served.backend.capacity = 2 * MIB
    assert f"ok {2 * MIB}" == ask(host, served, "current 0")
    served.backend.capacity = MIB
    assert "less than the disk has" in ask(host, served, "current 0")
    assert 2 * MIB == served.disk.sectors * 512
    assert f"ok {MIB}" == ask(host, served, "current 1")


def test_the_guest_was_told_of_larger_sectors(host, served):
    """What was published as physical-sector-size divides every size (blkif.h)."""
    assert "4096" == host.tree()[f"{served.address.backend}/physical-sector-size"]
    assert "not a positive multiple of 4096" in ask(host, served, f"{2 * MIB + 512} 0")
    odd = host.serving(Elastic(MIB + 512), "xvdb")
    assert f"ok {2 * MIB + 1024}" == ask(host, odd, f"{2 * MIB + 1024} 0")
    assert "512" == host.tree()[f"{odd.address.backend}/physical-sector-size"]


def test_several_ask_at_once(host, served):
    root = f"{served.address.backend}/resize"

    def leave(store):
        for name in ("7", "8", "9"):
            store.write(f"{root}/{name}", f"{int(name) * MIB} 0")

    host.store.transact(leave)
    host.until(lambda: all(host.tree()[f"{root}/{name}"][:2] == "ok" for name in "789"))
    assert served.disk.sectors * 512 == 9 * MIB


@pytest.mark.parametrize("text", ["", "larger", "1", "-1 0", "ok 512", "error x", "0 1"])
def test_nonsense_is_not_answered(host, served, text):
    path = f"{served.address.backend}/resize/1"
    host.store.write(path, text)
    assert f"ok {2 * MIB}" == ask(host, served, f"{2 * MIB} 0", "2")
    assert text == host.tree()[path]


def test_a_disk_that_is_not_connected_yet(host):
    """The frontend finds the new size when it comes."""
    serving = host.serving(Elastic())
    back = serving.address.backend
    assert f"ok {2 * MIB}" == ask(host, serving, f"{2 * MIB} 0")
    assert (str(2 * MIB // 512), "2") == (
        host.tree()[f"{back}/sectors"],
        host.tree()[f"{back}/state"],
    )
    assert 2 * MIB == serving.frontend().features.sectors * 512


def test_a_state_that_the_toolstack_wrote_is_not_overwritten(host, served):
    back = served.address.backend

    def detach(store):
        store.write(f"{back}/online", "0")
        store.write(f"{back}/state", "5")
        store.write(f"{back}/resize/1", f"{2 * MIB} 0")

    host.store.transact(detach)
    host.until(lambda: host.tree()[f"{back}/resize/1"] == f"ok {2 * MIB}")
    assert "5" == host.tree()[f"{back}/state"]
    assert str(2 * MIB // 512) == host.tree()[f"{back}/sectors"]


def test_xenstore_breaks_meanwhile(host):
    """The disk has the size already; the guest is told when xenstore is back."""
    serving = host.serving(Elastic(), start=False)
    serving.attach()
    device, store = serving.device, serving.store
    device.watch()
    sectors = f"{serving.address.backend}/sectors"
    store.close()
    with pytest.raises(StoreLost):
        device.resize(2 * MIB)
    assert (2 * MIB, str(MIB // 512)) == (serving.disk.sectors * 512, host.tree()[sectors])
    store.reconnect()
    device.store_reconnected()
    assert str(2 * MIB // 512) == host.tree()[sectors]
    device.unplug()
    assert device.finished
    toolstack.detach(host.store, serving.address)


def test_requests_are_served_meanwhile(host, served):
    """Sizes change at random under load: nothing reaches the backend beyond its end."""
    dice = random.Random(3)
    front, answers = served.front, {"done": 0, "refused": 0}

    def resize():
        for number in itertools.count():
            size = dice.randrange(1, 256) * 4096
            ask(host, served, f"{size} 1", str(number))
            if number >= (60 if LONG else 15) and min(answers.values()) > 0:
                break

    thread = threading.Thread(target=resize)
    thread.start()
    while thread.is_alive():
        try:
            front.read(dice.randrange(256) * 4096, 4096)
            answers["done"] += 1
        except RequestFailed:
            answers["refused"] += 1
    assert min(answers.values()) > 0
    assert answers["refused"] == served.disk.statistics.as_dict()["refused"]
    assert 0 == served.disk.statistics.as_dict()["errors"]


# -- the signal ----------------------------------------------------------------------------


def test_hangup_resizes_or_unplugs():
    for hangup_resizes, after in ((True, (True, False)), (False, (False, True))):
        interrupts = Interrupts(hangup_resizes=hangup_resizes)
        with interrupts.installed():
            signal.raise_signal(signal.SIGHUP)
            assert after == (interrupts.resize, interrupts.asked)
    interrupts = Interrupts(hangup_resizes=True)
    with interrupts.installed():
        signal.raise_signal(signal.SIGTERM)
        interrupts.calm = False
        signal.raise_signal(signal.SIGHUP)  # does not count as a second signal
        assert (interrupts.resize, interrupts.asked) == (True, True)


def test_a_session_that_is_asked_by_a_signal(host, served, caplog):
    served.backend.capacity = 2 * MIB
    served.interrupts.resize = True
    served.interrupts.wake()
    host.until(lambda: served.front.look_again().sectors == 2 * MIB // 512)
    served.backend.capacity = MIB
    served.interrupts.resize = True
    served.interrupts.wake()
    host.until(lambda: "not resized: " in caplog.text)
    assert "use --force" in caplog.text
    assert 2 * MIB == served.disk.sectors * 512
    assert served.device.state is State.CONNECTED
    assert not served.interrupts.resize


def test_the_size_is_told_after_each_try(host):
    told = []
    serving = host.serving(Elastic(), on_resize=told.append)
    ask(host, serving, f"{2 * MIB} 0", "1")
    ask(host, serving, f"{2 * MIB} 0", "2")
    ask(host, serving, f"{MIB} 0", "3")
    ask(host, serving, f"{MIB} 1", "4")
    assert [2 * MIB, 2 * MIB, 2 * MIB, MIB] == told
