"""Which disks get a process, which have one already, and what becomes of those that lost it."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

import pytest
from libxl_stub import Libxl

from xen_disk_py.libxl.daemon import Supervisor
from xen_disk_py.recovery import record
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import Address


class Process:
    """A process as ``subprocess`` shows it, that ends when it is told to."""

    numbers = itertools.count(1000)

    def __init__(self):
        self.pid = next(self.numbers)
        self.returncode = None

    def poll(self):
        return self.returncode


class Spawner:
    """Notes whom it has been asked to start a process for."""

    def __init__(self):
        self.started = []
        self.processes = []
        self.error = None

    def __call__(self, address):
        if self.error is not None:
            raise self.error
        self.started.append(address)
        self.processes.append(Process())
        return self.processes[-1]


@pytest.fixture
def libxl(host, tmp_path):
    libxl = Libxl(host, tmp_path)
    yield libxl
    for domid in list(host.store.list("/local/domain/0/backend/vbd3")):
        for devid in list(host.store.list(f"/local/domain/0/backend/vbd3/{domid}")):
            libxl.remove(Address(0, int(domid), int(devid), "vbd3"))


@pytest.fixture
def spawner():
    return Spawner()


@pytest.fixture
def supervisor(host, spawner):
    return Supervisor(host.store, host.records, spawner)


def state(host, address):
    return host.tree()[f"{address.backend}/state"]


def test_one_process_for_each_disk(libxl, supervisor, spawner):
    first = libxl.create("/x", "xvdb")
    supervisor.look()
    second = libxl.create("/y", "xvdc")
    libxl.create("/z", "xvdd", script="/etc/xen/scripts/block-tap")
    supervisor.look()
    supervisor.look()
    assert [first, second] == spawner.started
    assert 2 == supervisor.served


def test_nothing_to_do(supervisor, spawner):
    supervisor.look()
    assert not supervisor.reap()
    assert ([], 0) == (spawner.started, supervisor.served)


def test_a_disk_that_a_former_supervisor_started(host, libxl, supervisor, spawner):
    address = libxl.create("/x", state="4", xen_disk_pid=str(os.getpid()))
    with Record(host.records, address):
        supervisor.look()
        assert ([], 1) == (spawner.started, supervisor.served)
        libxl.ask_to_detach(address)
        supervisor.look()
        assert ([], 1) == (spawner.started, supervisor.served)
        assert "5" == state(host, address)  # its process sees to it


def test_a_process_that_ends_well_while_we_look(host, libxl, supervisor, spawner, monkeypatch):
    """It has closed the disk; nobody needs to stand in for it."""
    address = libxl.create("/x", state="4", xen_disk_pid=str(os.getpid()))
    libxl.ask_to_detach(address)

    def find(directory, address):
        host.store.write(f"{address.backend}/state", "6")

    monkeypatch.setattr(record, "find", find)
    supervisor.look()
    assert ([], 0) == (spawner.started, supervisor.served)


def test_disks_of_connect_are_no_business_of_ours(host, supervisor, spawner):
    host.serving(host.memory())
    supervisor.look()
    assert ([], 0) == (spawner.started, supervisor.served)


@pytest.mark.parametrize("status", [1, -9])
def test_a_process_that_comes_to_nothing(host, libxl, supervisor, spawner, status, caplog):
    address = libxl.create("/x")
    supervisor.look()
    assert not supervisor.reap()
    (process,) = spawner.processes
    process.returncode = status
    assert supervisor.reap()
    supervisor.look()
    assert ([address], 0) == (spawner.started, supervisor.served)
    why = f"process {process.pid} ended with status {status}"
    told = host.tree()[f"{address.backend}/hotplug-error"]
    assert f"{why}; see the log of xen-disk serve" == told
    assert f"guest/xvdb: {why}" == caplog.records[0].getMessage()
    libxl.ask_to_detach(address)
    supervisor.look()
    libxl.finish_detach(address)


def test_no_process_can_be_started(host, libxl, supervisor, spawner):
    address = libxl.create("/x")
    spawner.error = OSError(11, "too many of them")
    supervisor.look()
    assert "too many of them" in host.tree()[f"{address.backend}/hotplug-error"]
    assert 0 == supervisor.served


def test_a_device_that_is_attached_anew_while_its_process_ends(libxl, supervisor, spawner):
    address = libxl.create("/x")
    supervisor.look()
    libxl.remove(address)
    libxl.create("/y")
    supervisor.look()
    assert [address] == spawner.started
    spawner.processes[0].returncode = 0
    assert supervisor.reap()
    supervisor.look()
    assert [address] * 2 == spawner.started


def test_a_refused_disk_is_closed_for_libxl(host, libxl, supervisor, spawner):
    address = libxl.create("/x", state="2", hotplug_error="bad", hotplug_status="error")
    supervisor.look()
    assert "2" == state(host, address)
    libxl.ask_to_detach(address)
    supervisor.look()
    libxl.finish_detach(address)
    assert [] == spawner.started


def test_a_disk_that_is_taken_away_before_we_look(libxl, supervisor, spawner):
    address = libxl.create("/x")
    libxl.ask_to_detach(address)
    supervisor.look()
    libxl.finish_detach(address)
    assert [] == spawner.started


def test_a_process_that_died(host, libxl, supervisor, spawner, caplog):
    """It is reported once; when libxl detaches the disk its requests are answered, once."""
    address = libxl.create("/x", state="4", xen_disk_pid="123", hotplug_status="connected")
    supervisor.look()
    supervisor.look()
    (line,) = caplog.records
    assert (
        "guest/xvdb: its process 123 has died; the guest waits for its requests until you "
        "take the disk away: xl block-detach 5 xvdb" == line.getMessage()
    )
    assert ([], 0) == (spawner.started, supervisor.served)
    assert "4" == state(host, address)
    libxl.ask_to_detach(address)
    supervisor.look()
    spawner.processes[0].returncode = 1
    supervisor.reap()
    supervisor.look()
    assert [address] == spawner.started
    libxl.remove(address)
    supervisor.look()
    libxl.create("/x", state="5", xen_disk_pid="124")  # another one, of the same number
    supervisor.look()
    assert [address] * 2 == spawner.started


@pytest.fixture
def orphan(host, libxl):
    """Have a process leave a disk that another could take over."""

    def orphan(vdev="xvdb", **changed):
        keys = {"state": "4", "xen_disk_pid": "123", "hotplug_status": "connected", **changed}
        address = libxl.create("/x", vdev, **keys)
        one = Record(host.records, address)
        one.describe(Facts(survives=True, disk={}))
        one.leave()
        left.append(address)
        return address

    left = []
    yield orphan
    for address in left:
        record.forget(host.records, address)


@pytest.fixture
def clock(monkeypatch):
    """A time that passes when a test says so."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(
        "xen_disk_py.libxl.daemon.time", SimpleNamespace(monotonic=lambda: clock.now)
    )
    return clock


def die(supervisor, spawner, status=-9):
    spawner.processes[-1].returncode = status
    assert supervisor.reap()
    supervisor.look()


@pytest.mark.parametrize("state", ["2", "4"])
@pytest.mark.parametrize("status", [-9, 70])
def test_another_process_takes_over(
    host, supervisor, spawner, orphan, clock, caplog, state, status
):
    """At once, then later and later; when there were too many it is reported as ever."""
    caplog.set_level("INFO")
    address = orphan(state=state)
    waits = []
    supervisor.look()
    while not any("the guest waits" in line for line in caplog.messages):
        waits.append(supervisor.pause)
        if supervisor.pause is not None:
            clock.now += supervisor.pause * 0.99
            supervisor.look()
            assert waits[-1] * 0.01 == pytest.approx(supervisor.pause)
            clock.now += supervisor.pause
            supervisor.look()
        assert ([address] * len(waits), 1) == (spawner.started, supervisor.served)
        assert supervisor.pause is None
        die(supervisor, spawner, status)
    assert [None, 0.1, 0.2, 0.5, 1, 2, 5, 5, 5, 5] == pytest.approx(waits)
    assert (None, 0) == (supervisor.pause, supervisor.served)
    assert "guest/xvdb: another process takes over from 123" in caplog.messages


def test_a_calm_minute_forgives(supervisor, spawner, orphan, clock):
    orphan()
    supervisor.look()
    for life, pause in ((1, 0.1), (1, 0.2), (60, None), (1, 0.1), (59.9, 0.2)):
        clock.now += life
        die(supervisor, spawner)
        assert supervisor.pause == (None if pause is None else pytest.approx(pause))
        clock.now += pause or 0.0
        supervisor.look()


def test_a_process_that_refuses_is_not_tried_again(supervisor, spawner, orphan, caplog):
    """Another would refuse, too: the image is another one, say."""
    address = orphan()
    supervisor.look()
    die(supervisor, spawner, 1)
    assert ([address], None, 0) == (spawner.started, supervisor.pause, supervisor.served)
    assert "the guest waits for its requests until" in caplog.messages[-1]


def test_a_restart_that_is_overtaken(host, libxl, supervisor, spawner, orphan, clock):
    """libxl takes the disk away while it waits; nothing is due any longer."""
    address = orphan()
    supervisor.look()
    die(supervisor, spawner)
    assert supervisor.pause > 0
    libxl.ask_to_detach(address)
    clock.now += 100
    supervisor.look()
    assert ([address] * 2, None) == (spawner.started, supervisor.pause)  # it closes the disk
    libxl.remove(address)
    supervisor.look()
    assert {} == supervisor._restarts


def test_what_nobody_can_take_over_is_reported(host, libxl, supervisor, spawner, caplog):
    """Copy-on-write, whose changes have died."""
    address = libxl.create("/x", state="4", xen_disk_pid="123", hotplug_status="connected")
    one = Record(host.records, address)
    one.describe(Facts(survives=False, disk={}))
    one.leave()
    supervisor.look()
    assert ([], None) == (spawner.started, supervisor.pause)
    assert "has died; the guest waits" in caplog.text
    record.forget(host.records, address)


def test_a_process_that_ended_in_order(libxl, supervisor, spawner, caplog):
    libxl.create("/x", state="6", xen_disk_pid="123")
    supervisor.look()
    assert ([], 0, []) == (spawner.started, supervisor.served, caplog.records)


def test_what_is_no_device_is_passed_over(host, libxl, supervisor, spawner):
    address = libxl.create("/x")
    root = "/local/domain/0/backend/vbd3"
    for path in (f"{root}/x/1/script", f"{root}/5/x/script", f"{root}/5/7/state"):
        host.store.write(path, "block-xen-disk")
    supervisor.look()
    assert [address] == spawner.started
    for path in (f"{root}/x", f"{root}/5/x", f"{root}/5/7"):
        host.store.remove(path)


def test_other_kinds_are_passed_over(host, libxl, supervisor, spawner):
    address = Address(0, 5, 51728, "qdisk")
    host.store.write(f"{address.backend}/script", "block-xen-disk")
    supervisor.look()
    assert [] == spawner.started
    toolstack.detach(host.store, address)
