"""``disconnect``: gracefully, by force, and behind a process that was killed."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from xen_disk_py.blkif import Ring
from xen_disk_py.cli import main
from xen_disk_py.commands import disconnect as disconnect_module
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record, find, forget
from xen_disk_py.session import Forced, Outcome
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import State


@pytest.fixture
def disconnect(host):
    """Run ``disconnect``; give its status and stderr."""

    def disconnect(*argv):
        env = host.environment()
        status = main(["disconnect", *argv], env)
        assert env.stdout.getvalue() == ""
        return status, env.stderr.getvalue()

    return disconnect


@pytest.fixture
def served(host):
    """A disk that a living process serves."""
    serving = host.serving(host.memory(), "xvdb", start=False)
    with Record(host.records, serving.address):
        yield serving.start()
        host.end_sessions()


@pytest.fixture
def orphan(host):
    """A disk whose process was killed: the nodes are there, and nobody serves."""
    serving = host.serving(host.memory(), "xvdb", start=False)
    serving.attach()
    record = Record(host.records, serving.address)
    content = Path(record.path).read_bytes()
    record.close()
    Path(record.path).write_bytes(content)
    return serving


class Driver(threading.Thread):
    """A guest that releases the disk when it is asked to."""

    def __init__(self, host, frontend):
        super().__init__()
        self.host = host
        self.frontend = frontend
        self.start()

    def run(self):
        self.host.until(lambda: self.frontend.backend_state is State.CLOSING)
        self.frontend.disconnect()


def test_gracefully(disconnect, served, host):
    frontend = served.frontend()
    frontend.write(0, bytes(4096))
    driver = Driver(host, frontend)
    status, said = disconnect("guest", "xvdb")
    assert (ExitStatus.OK, "xvdb: gone from guest (domain 5)\n") == (status, said)
    driver.join()
    assert served.wait() is Outcome.DETACHED
    assert served.address.backend not in host.tree()
    assert host.hypervisor.mapped_pages == 0


def test_a_guest_that_never_connected(disconnect, served):
    assert disconnect("5", "51728")[0] is ExitStatus.OK
    assert served.wait() is Outcome.DETACHED


def test_a_guest_that_holds_on(disconnect, served, host):
    frontend = served.frontend()
    status, said = disconnect("guest", "xvdb", "--timeout", "0.2")
    assert status is ExitStatus.ERROR
    assert "the guest has not released xvdb within 0.2 s" in said
    assert "--force" in said
    frontend.read(0, 4096)  # the disk is as it was
    assert served.address.backend in host.tree()


def test_force(disconnect, served, host, monkeypatch):
    """Two signals to the process; its first asks, its second forces."""
    monkeypatch.setattr(disconnect_module, "_FORCE_GRACE", 0.1)
    frontend = served.frontend()
    signals = []

    def kill(pid, started, signum):
        signals.append((pid, signum))
        if len(signals) == 2:
            served.interrupts.drain = lambda: (_ for _ in ()).throw(Forced())
        served.unplug()

    monkeypatch.setattr(disconnect_module, "send_signal", kill)
    status, said = disconnect("guest", "xvdb", "--force")
    assert (ExitStatus.OK, "xvdb: forced off guest (domain 5)\n") == (status, said)
    assert [15, 15] == [signum for _, signum in signals]
    assert served.wait() is Outcome.FORCED
    assert frontend.backend_state is None


def test_force_a_process_that_does_not_end(disconnect, served, monkeypatch):
    monkeypatch.setattr(disconnect_module, "send_signal", lambda pid, started, signum: None)
    waited = []
    monkeypatch.setattr(disconnect_module, "until", lambda *args: waited.append(args[-1]))
    status, said = disconnect("guest", "xvdb", "--force", "--timeout", "7")
    assert status is ExitStatus.ERROR
    assert "does not end; kill it, then try again" in said
    assert [disconnect_module._FORCE_GRACE, 7] == waited


def test_force_a_process_that_ends_just_now(disconnect, served, host, monkeypatch):
    def kill(pid, started, signum):
        served.unplug()
        served.wait()
        return False

    monkeypatch.setattr(disconnect_module, "send_signal", kill)
    # its nodes go between our look and the signal
    assert disconnect("guest", "xvdb", "--force")[0] is ExitStatus.OK


@pytest.mark.parametrize("state", [State.INITIALISING, State.CLOSED])
def test_a_dead_process(disconnect, orphan, host, state):
    host.store.write(f"{orphan.address.frontend}/state", str(int(state)))
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK
    assert orphan.address.backend not in host.tree()
    assert find(host.records, orphan.address) is None


def test_a_dead_process_whose_guest_releases_the_disk(disconnect, orphan, host):
    front = orphan.address.frontend
    host.store.write(f"{front}/state", "4")

    def release():
        store = host.open_store(host.DOMID)
        host.until(lambda: store.read(f"{orphan.address.backend}/state") == "5")
        store.write(f"{front}/state", "6")

    guest = threading.Thread(target=release)
    guest.start()
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK
    guest.join()


@pytest.fixture
def answered(monkeypatch):
    """Note what is recalled by whoever answers."""
    seen = []

    @contextmanager
    def stand_in(store, open_hypervisor, address, journals):
        seen.append([journal.recall(RING, 112) for journal in journals])
        yield

    monkeypatch.setattr(disconnect_module, "stand_in", stand_in)
    return seen


RING = Ring((8,), 17)


def left_by(host, orphan, queues=2):
    """Make the record of a dead process, with something noted."""
    forget(host.records, orphan.address)
    left = Record(host.records, orphan.address, queues)
    left.describe(Facts(path="/a"))
    left.journals[-1].begin(RING, 112)
    left.journals[-1].note(7, [], [b"x" * 112])
    left.leave()


def test_what_a_dead_process_noted_is_answered(disconnect, orphan, host, answered):
    left_by(host, orphan)
    host.store.write(f"{orphan.address.frontend}/state", "6")
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK
    assert [[None, (7, [], [b"x" * 112])]] == answered
    assert find(host.records, orphan.address) is None


def test_nobody_adopts_what_is_disconnected(disconnect, orphan, host, monkeypatch):
    left_by(host, orphan)
    host.store.write(f"{orphan.address.frontend}/state", "6")
    ask, detach = disconnect_module._ask, toolstack.detach
    seen = []

    def look(then):
        def looking(*arguments):
            seen.append(find(host.records, orphan.address).alive)
            then(*arguments)

        return looking

    monkeypatch.setattr(disconnect_module, "_ask", look(ask))
    monkeypatch.setattr(toolstack, "detach", look(detach))
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK
    assert [True, True] == seen
    assert find(host.records, orphan.address) is None


def test_what_was_adopted_just_now_is_left_alone(disconnect, orphan, host, answered, monkeypatch):
    left_by(host, orphan)
    before = host.tree()
    adopt = Record.adopt
    quicker = []

    def late(*arguments):
        quicker.append(adopt(*arguments))
        return adopt(*arguments)

    monkeypatch.setattr(Record, "adopt", late)
    status, said = disconnect("guest", "xvdb", "--force")
    assert status is ExitStatus.ERROR
    assert "a process that lives serves xvdb of domain 5" in said
    assert before == host.tree()
    assert [] == answered
    assert find(host.records, orphan.address).alive
    quicker.pop().close()
    toolstack.detach(host.store, orphan.address)


def test_a_record_that_cannot_be_read_is_no_hindrance(disconnect, orphan, host, answered):
    left_by(host, orphan)
    path = Path(host.records, f"{host.DOMID}-{orphan.address.devid}")
    path.write_bytes(b"\3" * 100_000)
    host.store.write(f"{orphan.address.frontend}/state", "6")
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK
    assert [[]] == answered
    assert not path.exists()


def test_a_dead_process_whose_guest_holds_on_can_still_be_followed(
    disconnect, orphan, host, answered
):
    left_by(host, orphan)
    host.store.write(f"{orphan.address.frontend}/state", "4")
    assert disconnect("guest", "xvdb", "--timeout", "0.05")[0] is ExitStatus.ERROR
    with Record.adopt(host.records, orphan.address) as left:
        assert "/a" == left.facts.path
    toolstack.detach(host.store, orphan.address)


def test_a_dead_process_whose_guest_holds_on(disconnect, orphan, host, monkeypatch):
    monkeypatch.setattr(disconnect_module, "_FORCE_PATIENCE", 0.1)
    host.store.write(f"{orphan.address.frontend}/state", "4")
    status, said = disconnect("guest", "xvdb", "--timeout", "0.1")
    assert status is ExitStatus.ERROR
    assert "--force" in said
    assert disconnect("guest", "xvdb", "--force")[0] is ExitStatus.OK
    assert orphan.address.frontend not in host.tree()


def test_a_dead_process_that_had_closed(disconnect, orphan, host):
    """The state Closed is not taken back."""
    host.store.write(f"{orphan.address.backend}/state", "6")
    host.store.remove(f"{orphan.address.frontend}")
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nobody", "xvdb"], "no domain 'nobody' is running"),
        (["guest", "xvdc"], "no xvdc of ours in domain 5; connected there: xvdb"),
    ],
)
def test_what_is_not_there(disconnect, served, argv, said):
    status, err = disconnect(*argv)
    assert status is ExitStatus.ERROR
    assert said in err


def test_nothing_is_there(disconnect):
    assert "connected there: none" in disconnect("guest", "xvdb")[1]


def test_a_disk_of_somebody_else(disconnect, host):
    """What the kernel or QEMU serves is not ours to take away."""
    back = "/local/domain/0/backend/vbd3/5/51728"
    host.store.write(f"{back}/state", "4")
    assert disconnect("guest", "xvdb", "--force")[0] is ExitStatus.ERROR
    assert back in host.tree()
    host.store.remove("/local/domain/0/backend")


def test_the_nodes_go_while_we_ask(disconnect, served, host, monkeypatch):
    ask = disconnect_module._ask

    def late(store, disk):
        toolstack.detach(host.store, disk.address)
        ask(store, disk)

    monkeypatch.setattr(disconnect_module, "_ask", late)
    assert disconnect("guest", "xvdb")[0] is ExitStatus.OK
