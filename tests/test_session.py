"""One disk's life from attaching to cleaning up, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from xen_disk_py.backends import Backend
from xen_disk_py.blkif import READ
from xen_disk_py.errors import DeviceError, DeviceTaken, StoreError, StoreLost, XenUnavailable
from xen_disk_py.session import Forced, Interrupts, Outcome
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.device import Device
from xen_disk_py.xenbus.states import State

pytestmark = pytest.mark.shared

PATIENCE = 30.0  # seconds for what must happen to happen
LONG = 2 * PATIENCE  # seconds for what is not to happen before something else


class Hanging(Backend):
    """A disk whose reads return when they are allowed to."""

    size = 1 << 20

    def __init__(self):
        self.entered = threading.Event()
        self.allowed = threading.Event()

    def read(self, buffers, offset):
        self.entered.set()
        self.allowed.wait(LONG)
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def write(self, buffers, offset):
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("xen_disk_py.session._RETRY", 0.05)


def write_state(host, serving, state):
    host.store.write(f"{serving.address.frontend}/state", str(int(state)))


class Clock:
    """The time of all sessions; it passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("xen_disk_py.session.time", clock)
    return clock


def watch_rounds(monkeypatch, serving):
    """Note each time that the session is about to sleep."""
    rounds, drain = [], serving.interrupts.drain
    monkeypatch.setattr(serving.interrupts, "drain", lambda: rounds.append(None) or drain())
    return rounds


def go_round(host, monkeypatch, serving):
    """Have the session look at everything once more, from the beginning."""
    with monkeypatch.context() as patch:
        rounds = watch_rounds(patch, serving)

        def has_gone_round():
            serving.interrupts.wake()
            return len(rounds) > 1  # the first may have begun before

        host.until(has_gone_round)


def set_timeout(serving, seconds):
    """Have the session's xenstore answer within that time, or be lost."""
    serving.store._timeout = serving.store._router.connection.transport._timeout = seconds


def backend_state(host, serving):
    return State.parse(host.tree().get(f"{serving.address.backend}/state"))


def test_unplug(host):
    backend = host.memory()
    serving = host.serving(backend)
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    frontend.write(4096, b"x" * 8192)
    assert b"x" * 8192 == frontend.read(4096, 8192)
    serving.unplug()
    assert serving.unplugging.wait(PATIENCE)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    assert b"x" * 8192 == frontend.read(4096, 8192)  # served until the guest has closed
    frontend.disconnect()
    assert serving.wait() is Outcome.UNPLUGGED
    assert b"x" * 8192 == backend.data[4096:12288]
    assert backend.closed == 0  # it belongs to whoever opened it


def test_unplug_of_a_disk_that_the_guest_never_looked_at(host):
    serving = host.serving(host.memory(), patience=60)
    serving.unplug()
    assert serving.wait() is Outcome.UNPLUGGED
    assert not serving.connected.is_set()


def test_an_unplug_asked_for_before_the_session_began(host):
    serving = host.serving(host.memory(), start=False)
    serving.interrupts.asked = True
    serving.thread.start()
    assert serving.wait() is Outcome.UNPLUGGED


def test_nothing_is_left_when_the_number_is_taken(host):
    first = host.serving(host.memory())
    second = host.serving(host.memory(), start=False)
    second.thread.start()
    with pytest.raises(DeviceTaken, match="xvda is taken in domain 5"):
        second.wait()
    frontend = first.frontend()  # is not disturbed
    frontend.write(0, bytes(512))


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (State.INITIALISING, "1 (Initialising); the guest has no block driver"),
        (State.INIT_WAIT, "2 (InitWait); the guest's driver began and did not finish"),
        (State.CLOSED, "6 (Closed); the guest's driver refused"),
    ],
)
def test_a_guest_that_does_not_connect(host, state, why):
    serving = host.serving(host.memory(), patience=0.1, start=False)
    attach = serving.attach

    def attach_to_such_a_guest():
        attach()
        serving.store.write(f"{serving.address.frontend}/state", str(int(state)))

    serving.attach = attach_to_such_a_guest
    serving.thread.start()
    with pytest.raises(DeviceError) as caught:
        serving.wait()
    assert f"did not connect within 0.1 s: its state is {why}" in str(caught.value)


def test_a_guest_that_hangs_on_the_way(host, monkeypatch, clock):
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    serving2 = host.serving(host.memory(), "xvdb")
    host.store.write(f"{serving2.address.frontend}/ring-ref", "nonsense")
    write_state(host, serving2, State.INITIALISED)
    host.until(lambda: backend_state(host, serving2) is State.CLOSING)
    go_round(host, monkeypatch, serving2)  # there is time yet
    clock.now += 1000
    serving2.interrupts.wake()
    with pytest.raises(DeviceError, match="did not connect"):
        serving2.wait()
    frontend.read(0, 4096)  # of the other disk
    go_round(host, monkeypatch, serving)
    assert serving.thread.is_alive()  # patience is for connecting only


def test_toolstack_detaches(host):
    """As ``xl block-detach`` does: it removes the nodes itself once it sees Closed."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    back = serving.address.backend

    def ask(store):
        store.write(f"{back}/online", "0")
        store.write(f"{back}/state", "5")

    host.store.transact(ask)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    host.until(lambda: backend_state(host, serving) is State.CLOSED)
    assert host.hypervisor.mapped_pages == 0
    time.sleep(0.05)
    assert serving.thread.is_alive()  # so that the toolstack sees Closed
    toolstack.detach(host.store, serving.address)
    assert serving.wait() is Outcome.DETACHED


def test_a_toolstack_that_does_not_come_back(host, monkeypatch):
    monkeypatch.setattr("xen_disk_py.session._TOOLSTACK_PATIENCE", 0.3)
    serving = host.serving(host.memory())
    host.store.write(f"{serving.address.backend}/online", "0")
    host.store.write(f"{serving.address.backend}/state", "5")
    assert serving.wait() is Outcome.DETACHED


def test_toolstack_removes_the_frontend_first(host):
    """As ``xl block-detach --force`` does."""
    serving = host.serving(host.memory())
    serving.frontend()
    host.store.remove(serving.address.frontend)
    assert serving.wait() is Outcome.DETACHED


def test_the_domain_is_destroyed(host):
    serving = host.serving(host.memory())
    serving.frontend()
    host.xenstored.remove_domain(host.DOMID)
    assert serving.wait() is Outcome.GUEST_GONE


def test_the_domain_is_destroyed_under_load(host):
    backend = host.memory()
    read = backend.read
    backend.read = lambda buffers, offset: time.sleep(0.002) or read(buffers, offset)
    serving = host.serving(backend)
    frontend = serving.frontend(persistent=False)
    for _ in range(20):
        frontend.submit(READ, 0, length=4096)
    frontend.kick()
    host.xenstored.remove_domain(host.DOMID)
    assert serving.wait() is Outcome.GUEST_GONE
    assert host.hypervisor.mapped_pages == 0


def test_an_unrelated_domain_goes(host):
    host.xenstored.add_domain(9, "other", "00000000-0000-0000-0000-000000000009")
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    host.xenstored.remove_domain(9)
    assert bytes(512) == frontend.read(0, 512)
    assert serving.thread.is_alive()


def test_serving_fails(host):
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    serving.interrupts.fail(RuntimeError("the event channel broke"))
    with pytest.raises(DeviceError, match="serving failed: RuntimeError"):
        serving.wait()
    assert frontend.backend_state is None


def test_no_wake_up_is_lost_between_a_look_and_the_sleep(host, monkeypatch):
    """A failure that comes after the last look but before the pipe is drained."""
    serving = host.serving(host.memory(), start=False)
    drain = serving.interrupts.drain

    def fail_first():
        if serving.connected.is_set() and serving.interrupts.failure is None:
            serving.interrupts.fail(RuntimeError("late"))
        drain()

    monkeypatch.setattr(serving.interrupts, "drain", fail_first)
    serving.start()
    serving.frontend()
    with pytest.raises(DeviceError, match="late"):
        serving.wait()


def test_an_exception_of_a_callback(host):
    serving = host.serving(host.memory(), start=False)

    def broken():
        raise BrokenPipeError

    serving.connected.set = broken
    serving.start()
    serving.frontend()
    with pytest.raises(BrokenPipeError):
        serving.wait()


def test_ticks(host, monkeypatch):
    monkeypatch.setattr("xen_disk_py.session.TICK", 0.01)
    serving = host.serving(host.memory(), start=False)
    ticks = []
    serving.observer.wants_ticks = True
    serving.observer.tick = lambda: ticks.append(serving.connected.is_set())
    serving.start()
    time.sleep(0.05)
    assert not ticks  # nothing to show before the guest has the disk
    serving.frontend()
    host.until(lambda: len(ticks) > 5)
    assert all(ticks)


def test_waiting_costs_no_cpu(host, monkeypatch, clock):
    """Also when the guest does not release the disk and its time to connect is over."""
    serving = host.serving(host.memory(), start=False)
    rounds = watch_rounds(monkeypatch, serving)
    serving.start()
    write_state(host, serving, State.CONNECTED)  # in vain: there are no keys
    host.until(lambda: backend_state(host, serving) is State.CLOSING)
    serving.unplug()
    assert serving.unplugging.wait(PATIENCE)
    clock.now += 1000
    serving.interrupts.wake()
    time.sleep(0.1)
    assert len(rounds) < 50  # each is for something that happened
    write_state(host, serving, State.CLOSED)
    assert serving.wait() is Outcome.UNPLUGGED


# -- xenstore goes away --------------------------------------------------------------------


def test_a_xenstore_that_stays_away_is_told_of_once(host, monkeypatch, caplog):
    refused = []

    def refuse(path, timeout):
        refused.append(path)
        raise XenUnavailable(f"may not open {path}: run this as root")

    monkeypatch.setattr("xen_disk_py.session._RETRY", 0.01)
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    with caplog.at_level("INFO", "xen_disk_py"):
        for _ in range(2):
            caplog.clear()
            refused.clear()
            with monkeypatch.context() as patch:
                patch.setattr("xen_disk_py.xenbus.xenstore._connect", refuse)
                host.xenstored.restart(keep=True)
                host.until(lambda: len(refused) > 3)
                assert bytes(4096) == frontend.read(0, 4096)
            host.until(lambda: "connected to xenstore again" in caplog.text)
            (away,) = (line for line in caplog.messages if "xenstore is away" in line)
            assert away.endswith("run this as root; served, but cannot be detached")
    frontend._store.reconnect()


@pytest.mark.parametrize("keep", [True, False])
def test_xenstored_restarts_during_io(host, keep, caplog):
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    stop = threading.Event()
    done = []

    def work():
        while not stop.is_set():
            frontend.write(0, b"y" * 4096)
            assert b"y" * 4096 == frontend.read(0, 4096)
            done.append(1)

    with caplog.at_level("DEBUG", "xen_disk_py"):
        worker = threading.Thread(target=work)
        worker.start()
        for _ in range(2):
            caplog.clear()
            host.xenstored.restart(keep=keep)
            host.until(lambda: "connected to xenstore again" in caplog.text)
            count = len(done)
            host.until(lambda count=count: len(done) > count + 3)
            if not keep:
                host.until(lambda: "has lost this device" in caplog.text)
                break
    stop.set()
    worker.join()
    assert serving.thread.is_alive()
    serving.unplug()
    if keep:
        host.until(lambda: backend_state(host, serving) is State.CLOSING)
        frontend._store.reconnect()
        frontend.disconnect()
    assert serving.wait() is Outcome.UNPLUGGED
    assert host.hypervisor.mapped_pages == 0


def test_xenstored_pauses_during_io_and_an_unplug(host):
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    set_timeout(serving, 0.1)
    host.store.write(f"{serving.address.frontend}/state", "4")  # for something to look at
    host.xenstored.pause()
    for _ in range(20):
        frontend.write(0, b"z" * 4096)
        assert b"z" * 4096 == frontend.read(0, 4096)
    serving.unplug()
    host.until(lambda: serving.store.is_lost)
    assert b"z" * 4096 == frontend.read(0, 4096)
    assert serving.thread.is_alive()
    serving.store._timeout = PATIENCE
    host.xenstored.resume()
    host.until(lambda: backend_state(host, serving) is State.CLOSING)
    set_timeout(serving, PATIENCE)
    frontend.disconnect()
    assert serving.wait() is Outcome.UNPLUGGED


@pytest.mark.parametrize("at", [State.CONNECTED, State.CLOSING, State.CLOSED])
def test_the_connection_breaks_before_a_state_is_published(host, monkeypatch, at):
    """The guest waits for that state: it is written when xenstore is back."""
    serving = host.serving(host.memory(), start=False)
    write, broken = serving.store.write, []

    def breaking(path, value):
        if path.endswith("/state") and value == str(int(at)) and not broken:
            broken.append(path)
            serving.store.close()
        write(path, value)

    serving.start()
    monkeypatch.setattr(serving.store, "write", breaking)
    frontend = serving.frontend()
    frontend.read(0, 4096)
    frontend.disconnect()
    assert broken
    serving.unplug()
    assert serving.wait() is Outcome.UNPLUGGED


def test_a_detach_that_xenstored_restarts_in(host):
    """What the toolstack wrote while we were away is found, and not overwritten."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    host.xenstored.restart(keep=True)
    host.store.reconnect()
    host.store.write(f"{serving.address.backend}/online", "0")
    host.store.write(f"{serving.address.backend}/state", "5")
    frontend._store.reconnect()
    frontend.disconnect()
    host.until(lambda: backend_state(host, serving) is State.CLOSED)
    toolstack.detach(host.store, serving.address)
    assert serving.wait() is Outcome.DETACHED


def test_xenstored_is_gone_for_good(host, caplog):
    """A forced end does not wait for it indefinitely, and says what remains."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    set_timeout(serving, 0.1)
    host.xenstored.pause()
    serving.interrupts.drain = lambda: (_ for _ in ()).throw(Forced())
    serving.unplug()
    assert serving.wait() is Outcome.FORCED
    assert "xen-disk disconnect 5 xvda" in caplog.text
    assert host.hypervisor.mapped_pages == 0
    host.xenstored.resume()
    frontend.close()
    toolstack.detach(host.store, serving.address)


# -- force ---------------------------------------------------------------------------------


def test_force(host):
    """In the session's thread the second signal is played by an exception of its."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    serving.unplug()
    assert serving.unplugging.wait(PATIENCE)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    serving.interrupts.drain = lambda: (_ for _ in ()).throw(Forced())
    serving.interrupts.wake()
    assert serving.wait() is Outcome.FORCED
    assert host.hypervisor.mapped_pages == 0
    assert frontend.backend_state is None


def test_force_with_a_backend_that_hangs(host, monkeypatch, caplog):
    backend = Hanging()
    serving = host.serving(backend)
    frontend = serving.frontend()
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    assert backend.entered.wait(PATIENCE)
    force = serving.device.force
    monkeypatch.setattr(serving.device, "force", lambda: force(0.2))
    serving.interrupts.drain = lambda: (_ for _ in ()).throw(Forced())
    serving.unplug()
    assert serving.wait() is Outcome.FORCED
    assert "the backend does not return" in caplog.text
    assert frontend.backend_state is None  # the guest sees that its disk has gone
    backend.allowed.set()
    assert force()


def test_a_timeout_with_a_backend_that_hangs(host, monkeypatch):
    """A clean-up that nobody can interrupt is bounded, too, whatever the guest's state says."""
    backend = Hanging()
    serving = host.serving(backend)
    frontend = serving.frontend()
    force = serving.device.force
    monkeypatch.setattr(serving.device, "force", lambda: force(0.2))
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    assert backend.entered.wait(PATIENCE)
    assert serving.connected.wait(PATIENCE)
    update = serving.device.update

    def late_failure():
        if serving.store.read(f"{serving.address.frontend}/state") != str(int(State.CLOSED)):
            return
        serving.device.update = update
        raise DeviceError("something else")

    serving.device.update = late_failure
    go_round(host, monkeypatch, serving)  # no update is still under way
    write_state(host, serving, State.CLOSED)
    with pytest.raises(DeviceError, match="something else"):
        serving.wait()
    backend.allowed.set()
    assert force()


def test_the_second_signal_raises_forced_once():
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.installed():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # calm until a session serves
        assert interrupts.asked
        poll = select.poll()
        poll.register(interrupts.fileno(), select.POLLIN)
        assert poll.poll(0)
        interrupts.drain()
        assert not poll.poll(0)
        interrupts.calm = False
        with pytest.raises(Forced):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)  # the clean-up that follows is not disturbed
    assert before == signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(interrupts.fileno())


def test_wake_ups_that_nobody_takes():
    interrupts = Interrupts()
    with interrupts.installed():
        for _ in range(70_000):
            interrupts.wake()
        interrupts.drain()
        poll = select.poll()
        poll.register(interrupts.fileno(), select.POLLIN)
        assert not poll.poll(0)


STUBBORN = """
import os, signal, sys, threading, time
from xen_disk_py.xenbus import toolstack
from xen_disk_py.backends import Backend
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.blkif import READ
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus.states import State
from xen_disk_py.xenbus.xenstore import Store

closing = sys.argv[2] == "closing"
xenstored = SimulatedXenstored()
xenstored.add_domain(5, "guest", "00000000-0000-0000-0000-000000000005")
machine = SimulatedMachine(domid=5)
env = Environment(
    open_store=lambda: Store.open(xenstored.socket_path(0), 60),
    open_hypervisor=lambda: SimulatedHypervisor(machine),
    xen_version=lambda: None,
    record_directory=sys.argv[1],
    journal=sys.argv[1] + ".journal",
)

def play():
    store = Store.open(xenstored.socket_path(5), 60)
    front = "/local/domain/5/device/vbd/51712"
    while not store.exists(front + "/backend"):
        time.sleep(0.01)
    frontend = Frontend(store, SimulatedGuest(machine), front, timeout=60)
    frontend.connect()
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    while not os.path.exists(sys.argv[3] + ".entered"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    while frontend.backend_state is not State.CLOSING:
        time.sleep(0.01)
    if closing:  # now the main thread waits for the queue's thread
        store.write(front + "/state", "6")
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=play, daemon=True).start()
status = main(["connect", "guest", "--path", sys.argv[3]], env)
print(sorted(path for path in xenstored.nodes if "vbd" in path), os.listdir(sys.argv[1]))
sys.exit(status)
"""

NEVER = """
import threading
from xen_disk_py.backends import Backend
class Disk(Backend):
    size = 1 << 20
    def read(self, buffers, offset):
        open(__file__ + ".entered", "w").close()
        threading.Event().wait()
    def write(self, buffers, offset):
        pass
"""


@pytest.mark.parametrize("guest", ["closing", "busy"])
def test_two_signals_end_a_process_whose_backend_hangs(tmp_path, guest):
    (tmp_path / "never.py").write_text(NEVER)
    (tmp_path / "records").mkdir()
    code = STUBBORN
    # five seconds for a request to come back are too long for a test
    patch = """
from xen_disk_py.xenbus.device import Device
import xen_disk_py.simulated.xenstored

Device.force.__defaults__ = (0.3,)
xen_disk_py.simulated.xenstored._PATIENCE = 60
"""
    done = subprocess.run(
        [sys.executable, "-c", patch + code, tmp_path / "records", guest, tmp_path / "never.py"],
        capture_output=True,
        text=True,
        timeout=2 * LONG,
        check=False,
    )
    assert "the backend does not return" in done.stderr
    assert "unplugged by force" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "[] []"
    assert done.returncode == 130


# -- disks that outlive their process ------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError(), StoreError(errno.ENOSPC, "full")])
def test_an_error_of_our_own_comes_to_light_before_anything_is_cleaned_up(host, error):
    serving = host.serving(host.memory(), start=False)
    seen = []

    def crash(error):
        seen.append((error, backend_state(host, serving)))

    def fail():
        raise error

    serving.observer.crashing = crash
    serving.connected.set = fail
    serving.start()
    serving.frontend()
    with pytest.raises(type(error)):
        serving.wait()
    assert [(error, State.CONNECTED)] == seen
    assert serving.address.backend not in host.tree()


def test_what_is_no_error_of_our_own_ends_the_disk(host):
    serving = host.serving(host.memory(), patience=0.01, start=False)
    seen = []
    serving.observer.crashing = seen.append
    serving.start()
    with pytest.raises(DeviceError, match="did not connect"):
        serving.wait()
    assert [] == seen


def test_a_disk_that_the_guest_had_before_is_announced_at_once(host):
    """And it may take its time to come back."""
    serving = host.serving(host.memory(), patience=0.0, start=False)
    serving.session._is_known = True
    serving.start()
    assert serving.connected.wait(PATIENCE)
    serving.frontend().read(0, 4096)


def test_serving_is_said_when_xenstore_has_been_looked_at(host):
    serving = host.serving(host.memory(), start=False)
    update, said = serving.device.update, []

    def lose():
        serving.device.update = update
        serving.store.close()
        update()

    serving.device.update = lose
    serving.observer.serving = lambda: said.append(serving.store.is_lost)
    serving.start()
    serving.frontend()
    assert serving.connected.wait(PATIENCE)
    assert [False] == said


def test_another_program_is_to_take_over(host):
    serving = host.serving(host.memory(), start=False)
    asked = threading.Event()
    serving.observer.upgrade_requested = asked.set
    serving.start()
    frontend = serving.frontend()
    serving.interrupts.upgrade = True
    serving.interrupts.wake()
    assert asked.wait(PATIENCE)
    frontend.read(0, 4096)  # it did not, and all is as it was
    serving.unplug()
    assert serving.unplugging.wait(PATIENCE)
    asked.clear()
    serving.interrupts.upgrade = True
    serving.interrupts.wake()
    host.until(lambda: not serving.interrupts.upgrade)
    assert not asked.is_set()  # too late


class Failing(Backend):
    """A disk whose storage is gone until it is fixed."""

    size = 1 << 20

    def __init__(self):
        self.tried = threading.Event()
        self.fixed = False

    def read(self, buffers, offset):
        self.tried.set()
        if not self.fixed:
            raise OSError(errno.EIO, "the storage is gone")

    def write(self, buffers, offset):
        pass


@pytest.fixture
def watchdog(host, tmp_path, monkeypatch):
    """Wait for signs of life; they are due all the time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        listener.settimeout(PATIENCE)

        def signs(count):
            """Wait for so many from now on."""
            listener.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while listener.recv(100):
                    pass
            listener.settimeout(PATIENCE)
            return {listener.recv(100) for _ in range(count)}

        signs.listener = listener
        yield signs


def test_a_request_that_is_queued_for_retry_is_no_reason_to_be_killed(host, watchdog, caplog):
    backend = Failing()
    serving = host.serving(backend, start=False)
    serving.disk._holds = True
    serving.start()
    frontend = serving.frontend()
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    assert backend.tried.wait(PATIENCE)
    host.until(lambda: serving.disk.statistics.as_dict()["held"] == 1)
    assert {b"WATCHDOG=1"} == watchdog(6)  # for thrice as long as it takes to be killed
    backend.fixed = True
    frontend.drain()


@contextlib.contextmanager
def flooding(host, serving, *states):
    """Have the guest write states into its own node as fast as it can, until the end."""
    store, stop = host.open_store(host.DOMID), threading.Event()
    states = states or (serving.store.read(f"{serving.address.frontend}/state"),)

    def flood():
        while not stop.is_set():
            for state in states:
                store.write(f"{serving.address.frontend}/state", state)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def updates(monkeypatch):
    """Count how often a serving's device looks at xenstore, and note over which time."""

    def updates(serving):
        update, times = serving.device.update, []
        monkeypatch.setattr(
            serving.device, "update", lambda: times.append(time.monotonic()) or update()
        )
        return times

    return updates


def is_rationed(times, burst=16, rate=100):
    return len(times) <= burst + 1 + rate * (times[-1] - times[0])


def test_a_guest_that_floods_its_own_state_gets_its_turn_and_no_more(host, watchdog, updates):
    """Signs of life are sent, others are served, and the disk can be taken away."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    times = updates(serving)
    with flooding(host, serving, str(int(State.CONNECTED))):
        assert {b"WATCHDOG=1"} == watchdog(6)
        frontend.write(0, b"x" * 4096)
        serving.unplug()
        host.until(lambda: backend_state(host, serving) is State.CLOSING)
        assert is_rationed(times)
    frontend.disconnect()
    assert serving.wait() is Outcome.UNPLUGGED


def test_a_guest_that_shakes_hands_without_end(host, watchdog, updates, monkeypatch, caplog):
    """Each step of the handshake asks for the next one; an update ends all the same."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    device, do = serving.device, serving.device._do
    steps, path = [], f"{serving.address.frontend}/state"

    def doing(action):
        do(action)
        steps.append(action)
        # between the end of one step and the look for the next
        closed = serving.device.state is State.CLOSED
        serving.store.write(path, str(int(State.INITIALISING if closed else State.CLOSED)))

    monkeypatch.setattr(device, "_do", doing)
    times = updates(serving)
    write_state(host, serving, State.CLOSED)
    host.until(lambda: len(steps) > 40)
    assert {b"WATCHDOG=1"} == watchdog(3)
    assert is_rationed(times)
    monkeypatch.setattr(device, "_do", do)
    serving.unplug()
    write_state(host, serving, State.CLOSED)
    serving.wait()
    frontend.close()


def test_a_bad_key_fills_no_log(host, updates, caplog):
    """However often the guest tries to connect with it."""
    serving = host.serving(host.memory(), patience=None)
    front, store = serving.address.frontend, host.open_store(host.DOMID)
    host.until(lambda: backend_state(host, serving) is State.INIT_WAIT)
    store.write(f"{front}/ring-ref", "nonsense")
    store.write(f"{front}/event-channel", "nonsense")
    began = time.monotonic()
    for _ in range(30):
        store.write(f"{front}/state", str(int(State.INITIALISED)))
        host.until(lambda: backend_state(host, serving) is State.CLOSING)
        store.write(f"{front}/state", str(int(State.CLOSED)))
        host.until(lambda: backend_state(host, serving) is State.CLOSED)
        store.write(f"{front}/state", str(int(State.INITIALISING)))
        host.until(lambda: backend_state(host, serving) is State.INIT_WAIT)
    lines = [line for line in caplog.messages if "cannot connect to the frontend" in line]
    assert 1 <= len(lines) <= 6 + time.monotonic() - began


def test_xenstore_is_away_and_an_event_is_unread(host, watchdog, monkeypatch):
    """No reason to run without a pause, nor to be silent."""
    serving = host.serving(host.memory())
    frontend = serving.frontend()
    assert serving.connected.wait(PATIENCE)
    update, tried = serving.device.update, []

    def lose():
        serving.device.update = update
        path = f"{serving.address.backend}/state"
        serving.store.write(path, serving.store.read(path))
        serving.store.read(path)  # the event has come before this answer
        serving.store.close()
        assert serving.store.has_pending
        raise StoreLost(errno.ENOTCONN, "on purpose")

    def refuse(path, timeout):
        tried.append(time.monotonic())
        raise XenUnavailable("away")

    serving.device.update = lose
    rounds = watch_rounds(monkeypatch, serving)
    with monkeypatch.context() as patch:
        patch.setattr("xen_disk_py.xenbus.xenstore._connect", refuse)
        write_state(host, serving, State.CONNECTED)
        host.until(lambda: tried)
        began = len(rounds)
        assert {b"WATCHDOG=1"} == watchdog(6)
        # each round waits for the next try (0.05 s) or the next sign (0.05 s)
        assert len(rounds) - began <= 3 + 2 * (time.monotonic() - tried[0]) / 0.05
    frontend.read(0, 4096)


def test_a_disk_that_takes_its_time_to_finish_is_no_reason(host, watchdog, monkeypatch):
    """Its guest has closed, and what was taken before is done, one after the other."""
    monkeypatch.setattr("xen_disk_py.xenbus.device._FINISHING", 0.01)
    monkeypatch.setattr(Device, "stalled_for", 0.0)  # each answer is progress
    backend = Hanging()
    serving = host.serving(backend)
    frontend = serving.frontend()
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    assert backend.entered.wait(PATIENCE)
    write_state(host, serving, State.CLOSED)
    host.until(lambda: serving.device.is_unsettled)
    assert {b"WATCHDOG=1"} == watchdog(6)
    serving.unplug()
    assert {b"WATCHDOG=1"} == watchdog(6)
    backend.allowed.set()
    assert Outcome.UNPLUGGED is serving.wait()


def test_a_request_that_hangs_is(host, watchdog, caplog):
    backend = Hanging()
    serving = host.serving(backend)
    frontend = serving.frontend()
    frontend.submit(READ, 0, length=4096)
    frontend.kick()
    assert backend.entered.wait(PATIENCE)
    host.until(lambda: "the watchdog ends us" in caplog.text)
    assert set() == watchdog(0)
    watchdog.listener.settimeout(0.2)
    with pytest.raises(socket.timeout):
        watchdog.listener.recv(100)
    backend.allowed.set()
    watchdog.listener.settimeout(PATIENCE)
    assert b"WATCHDOG=1" == watchdog.listener.recv(100)  # it has come back after all
