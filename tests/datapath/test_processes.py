"""The processes of a disk's queues live and die together, and do what threads would."""

from __future__ import annotations

import json
import os
import pwd
import random
import signal
import socket
import threading
import time

import pytest
from long_run import LONG

from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.cli import main
from xen_disk_py.datapath import processes as processes_module
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.processes import QueueProcesses
from xen_disk_py.datapath.queue import Options
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.process import is_process, start_time
from xen_disk_py.recovery.record import find, forget
from xen_disk_py.simulated.frontend import RequestFailed
from xen_disk_py.xenbus.states import Address, State

pytestmark = pytest.mark.shared  # of forks and signals more than of Python

ADDRESS = Address(0, 5, 51728, "vbd3")
PAGE = 4096
QUEUES = ("--vdev=xvdb", "--queues=2", "--queues-in=processes")


class Served:
    """A disk whose two queues are processes, and its guest."""

    def __init__(self, host, processes, image):
        self.host, self.processes, self.image = host, processes, image
        self.process = None
        self.dice = random.Random(1)
        self.written = {}

    def start(self, *options, rings=2, backend="raw"):
        disk = ("--path", str(self.image), f"--backend={backend}")
        self.process = self.processes.start("connect", *QUEUES, *options, *disk, "5")
        self.host.until(lambda: ADDRESS.backend in self.host.tree() or self.process.is_over)
        self.frontend = self.host.frontend(ADDRESS, queues=rings)
        self.frontend.connect()
        self.process.until("rw")
        return self

    def adopt(self, *options):
        self.process = self.processes.start("connect", "--adopt", *options, "5", "xvdb")
        self.process.until("rw")

    @property
    def record(self):
        return find(self.host.records, ADDRESS)

    @property
    def queues(self):
        return self.record.facts.queues

    def write(self, *pages):
        for page in pages:
            data = self.dice.randbytes(PAGE)
            self.written[page * PAGE] = data
            self.frontend.submit(WRITE, page * PAGE, data)
        self.frontend.kick()

    def check(self):
        for offset, data in self.written.items():
            assert data == self.frontend.read(offset, PAGE)

    def is_served_by_another_than(self, pid):
        found = self.record
        facts = found.facts if found is not None else None
        return facts is not None and found.alive and facts.started and facts.pid != pid

    def await_end(self, queues):
        """Wait until all have ended, and do what a kernel does then."""
        self.process.wait()
        self.host.until(lambda: not any(is_process(*each) for each in queues))
        self.host.machine.bury_backend()

    def unplug_alone(self):
        """Have it end where no guest has it."""
        self.process.signal(signal.SIGINT)
        return self.process.wait()

    def unplug(self):
        self.process.signal(signal.SIGINT)
        self.host.until(lambda: self.frontend.backend_state is State.CLOSING)
        self.frontend.disconnect()
        return self.process.wait()


@pytest.fixture
def served(host, processes, tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(5).randbytes(1 << 20))
    return Served(host, processes, image)


def status_of(pid, name):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(line.split()[1:] for line in file if line.startswith(name))


HANGING = """
import os
import time

from xen_disk_py.backends.raw import RawBackend

class Disk(RawBackend):
    shared_by_forks = True

    def after_fork(self):
        os.write(1, b"opens %d\\n" % os.getpid())
        time.sleep(1000)
"""


def hanging(served, tmp_path):
    """Start a disk whose first queue's process does not come back from opening it."""
    path = tmp_path / "hanging.py"
    path.write_text(HANGING)
    disk = ("--path", str(served.image), f"--backend={path}")
    process = served.processes.start("connect", *QUEUES, *disk, "5")
    process.until("opens ")
    pid = int(process.out.split()[1])
    return process, pid, start_time(pid)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_disk_that_a_process_cannot_open_is_said_and_given_up(served, host, tmp_path, signum):
    """Its storage hangs, say: nobody knows for how long."""
    served.processes.install("xen_disk_py.datapath.processes.ANSWER = 0.01")
    process, pid, started = hanging(served, tmp_path)
    path = f"hanging.py:Disk ({served.image})"
    process.until(f"process {pid}, of a queue, has not opened {path} within 0.01 s")
    process.signal(signum)
    assert ExitStatus.ERROR == process.wait()
    assert f"process {pid}, of a queue, has not opened {path}: given up" in process.err
    host.until(lambda: not is_process(pid, started))
    assert ADDRESS.backend not in host.tree()
    assert served.record is None


def test_a_process_that_opens_a_disk_ends_with_its_parent(served, host, tmp_path):
    process, *queue = hanging(served, tmp_path)
    process.signal(signal.SIGKILL)
    process.wait()
    host.until(lambda: not is_process(*queue))

    def is_forgotten():  # as soon as the other queue's process has ended, which has the lock, too
        forget(host.records, ADDRESS)
        return find(host.records, ADDRESS) is None

    host.until(is_forgotten)


LASTING = """
import time
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.datapath import processes

def after_fork(disk):
    os.write(1, b"opens %d\\n" % os.getpid())
    time.sleep(1000)

processes.end_with_parent = lambda parent: None  # it works for a storage that does not answer
RawBackend.after_fork = after_fork
"""


def test_a_successor_waits_for_the_forks_of_one_that_was_killed_before_it_served(served, host):
    served.start()
    served.write(1, 2)
    served.process.kill()
    queues = served.queues
    served.processes.install(LASTING)
    process = served.processes.start("connect", "--adopt", "5", "xvdb")
    process.until("opens ")
    process.signal(signal.SIGKILL)
    process.wait()
    host.machine.bury_backend()
    left = [int(line.split()[1]) for line in process.out.splitlines()]
    try:
        assert served.record.is_ending
        assert not served.record.alive
        assert served.record.facts.started is None  # it did not come to serve
        assert set(left) <= {pid for pid, _ in served.queues} - {pid for pid, _ in queues}
        served.processes.install()
        successor = served.processes.start("connect", "--adopt", "5", "xvdb")
        time.sleep(0.3)
        assert not successor.is_over
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    served.process = successor
    successor.until("rw")
    served.frontend.drain()
    served.check()
    assert ExitStatus.OK == served.unplug()


def test_a_disk_is_served_as_by_threads(served, host):
    """To its end: signals, another size, a guest that connects again, another program."""
    served.start(backend="mmap")
    queues = served.queues
    assert 3 == len({served.process.pid, *(pid for pid, _ in queues)})
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        for pid, _ in queues:  # they come from a terminal, and from systemd
            os.kill(pid, signum)
    served.write(*range(20))
    served.frontend.drain()
    served.frontend.flush()
    served.check()
    expected = {"reads": 20, "writes": 20, "flushes": 1}
    host.until(lambda: expected.items() <= served.record.counters.items(), what="the counters")

    env = host.environment()
    assert ExitStatus.ERROR == main(["record", "5", "xvdb", "start", "x"], env)
    assert "connect it without --queues-in processes" in env.stderr.getvalue()

    served.frontend.disconnect()
    for name in ("multi-queue-num-queues", "queue-0", "queue-1"):
        host.store.remove(f"{ADDRESS.frontend}/{name}")
    host.store.write(f"{ADDRESS.frontend}/state", "1")
    served.frontend = host.frontend(ADDRESS, queues=1)
    served.frontend.connect()
    asleep = status_of(queues[1][0], "voluntary_ctxt_switches")
    served.write(4, 5)
    served.frontend.drain()
    served.check()
    assert queues == served.queues
    assert asleep == status_of(queues[1][0], "voluntary_ctxt_switches")

    served.frontend.disconnect()
    host.store.write(f"{ADDRESS.frontend}/state", "1")
    served.frontend = host.frontend(ADDRESS, queues=2)
    served.frontend.connect()

    size = served.image.stat().st_size

    def resize(*words):
        assert ExitStatus.OK == main(["resize", "5", "xvdb", *words], host.environment())
        served.frontend.look_again()

    resize(str(2 * size))
    last = 2 * size // PAGE - 1
    served.write(last - 1, last)  # one on each ring
    served.frontend.drain()
    served.check()
    resize(str(size), "--force")
    assert size == served.image.stat().st_size
    for page in (last - 1, last):
        with pytest.raises(RequestFailed):
            served.frontend.read(page * PAGE, PAGE)
        del served.written[page * PAGE]
    assert 2 == served.record.counters["refused"]

    served.write(6, 7)
    assert ExitStatus.OK == main(["upgrade", "5", "xvdb"], host.environment())
    assert served.process.pid == served.record.facts.pid
    assert not any(is_process(*each) for each in queues)
    queues = served.queues
    served.write(8, 9)
    served.frontend.drain()
    served.check()
    assert ExitStatus.OK == served.unplug()
    assert not any(is_process(*each) for each in queues)
    data = served.image.read_bytes()
    assert all(data[at : at + PAGE] == content for at, content in served.written.items())


def test_when_a_queue_s_process_is_killed_all_end_and_another_takes_over(served):
    """The guest waits meanwhile, and sees no error."""
    served.start()
    queues = served.queues
    served.write(1, 2, 3, 4)
    os.kill(queues[1][0], signal.SIGKILL)
    served.await_end(queues)
    assert ExitStatus.CRASHED == served.process.wait()
    assert f"process {queues[1][0]}, of a queue, has ended" in served.process.err
    assert served.record.is_orphan
    served.write(5, 6, 7)
    served.adopt()
    served.frontend.drain()
    served.check()
    assert not {pid for pid, _ in queues} & {pid for pid, _ in served.queues}
    assert ExitStatus.OK == served.unplug()


def test_whoever_of_them_is_killed_under_load_nothing_is_lost(served):
    """At any instant, again and again: each request is answered once, and each byte is right."""
    user = ["--user", "nobody"] if not os.geteuid() else []
    served.start("--supervise", *user)
    dice = random.Random()
    for number in range(8 if LONG else 2):  # the supervisor gives up after ten
        found = served.record
        queues = [pid for pid, _ in found.facts.queues]
        victim = dice.choice(queues) if number % 2 else found.facts.pid
        for pid in [found.facts.pid, *queues] if user else []:
            assert status_of(pid, "Uid") == [str(pwd.getpwnam("nobody").pw_uid)] * 4
            assert ["0" * 16] == status_of(pid, "CapEff")
        for _ in range(dice.randrange(1, 40)):
            served.write(*(dice.sample(range(256), 4)))
            served.frontend.drain()
        served.write(*(dice.sample(range(256), 8)))
        os.kill(victim, signal.SIGKILL)
        served.frontend.drain()
        served.host.until(lambda pid=found.facts.pid: served.is_served_by_another_than(pid))
    served.check()
    assert ExitStatus.OK == served.unplug()


STOPPING = """
import signal
from xen_disk_py.datapath import processes
from xen_disk_py.datapath import processes as processes_module
from xen_disk_py.datapath.disk import Disk

processes.ANSWER = 1.0
amid = {amid}
be, admit, resize = processes._Server.be, Disk.admit, processes._Server._resize

def stop(step, size):
    if amid == [step, size]:
        amid.clear()
        os.kill(os.getpid(), signal.SIGSTOP)

def admit_and_stop(self, sectors):
    admit(self, sectors)
    stop("admit", sectors * 512)

def stop_and_resize(self, *, size):
    stop("resize", size)
    resize(self, size=size)

def be_one_that_stops(self, *arguments):
    Disk.admit, processes._Server._resize = admit_and_stop, stop_and_resize
    return be(self, *arguments)

processes._Server.be = be_one_that_stops
"""
SIZE = 1 << 20  # of the image


def resize(host, size):
    env = host.environment()
    return main(["resize", "5", "xvdb", str(size), "--force"], env), env.stderr.getvalue()


def is_stopped(pid):
    return status_of(pid, "State")[0] == "T"


def stop(host, pid):
    os.kill(pid, signal.SIGSTOP)
    host.until(lambda: is_stopped(pid))


def wake(served):
    """Have those continue that are stopped; the result is how many are."""
    stopped = [pid for pid, _ in served.queues if is_stopped(pid)]
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    return len(stopped)


def assert_length(served, size):
    """See that each queue admits requests up to there, and no others."""
    for _ in served.queues:
        served.frontend.read(size - PAGE, PAGE)
    for _ in served.queues:
        with pytest.raises(RequestFailed):
            served.frontend.read(size, PAGE)


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_while_a_queue_s_process_is_stopped_the_size_stays(served, host, size):
    """The main process waits for it for a moment, and does its other duties."""
    served.processes.install(STOPPING.format(amid=[]))
    served.start()
    pid = served.queues[1][0]
    stop(host, pid)
    for _ in range(2):
        status, said = resize(host, size)
        assert ExitStatus.ERROR == status
        assert f"process {pid}, of a queue, has not answered within 1 s" in said
        assert f"kill -CONT {pid}" in said
    assert SIZE == served.image.stat().st_size
    served.frontend.read(0, PAGE)  # on the other ring
    os.kill(pid, signal.SIGCONT)
    assert_length(served, SIZE)
    host.until(lambda: resize(host, size) == (ExitStatus.OK, ""))
    assert size == served.image.stat().st_size
    assert_length(served, size)
    assert ExitStatus.OK == served.unplug()


@pytest.mark.parametrize(
    ("step", "size", "stays"),
    [
        ("admit", SIZE // 2, SIZE),
        ("resize", SIZE // 2, SIZE // 2),  # the rest of the image has gone already
        ("resize", 2 * SIZE, SIZE),
        ("admit", 2 * SIZE, SIZE),
    ],
)
def test_all_queues_have_one_size_though_their_processes_are_stopped_amid_another(
    served, host, step, size, stays
):
    served.processes.install(STOPPING.format(amid=[step, size]))
    served.start()
    host.until(lambda: "kill -CONT" in resize(host, size)[1])  # a busy machine may be slow, too
    assert stays == served.record.facts.size
    assert str(stays // 512) == host.store.read(f"{ADDRESS.backend}/sectors")
    wake(served)
    host.until(lambda: resize(host, stays) == (ExitStatus.OK, ""))  # they answer again
    assert_length(served, stays)
    host.until(lambda: resize(host, size) == (ExitStatus.OK, "") or wake(served) < 0)
    assert_length(served, size)
    assert ExitStatus.OK == served.unplug()


KILLING = """
import contextlib
import signal
from xen_disk_py.datapath.processes import _Server

def killed_at(step):
    real = getattr(_Server, step)

    def call(self, **arguments):
        with contextlib.suppress(FileNotFoundError):
            os.unlink({flag!r})
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, **arguments)

    setattr(_Server, step, call)

killed_at({step!r})
"""


@pytest.mark.parametrize(
    ("step", "size"), [("_admit", SIZE // 2), ("_resize", SIZE // 2), ("_resize", 2 * SIZE)]
)
def test_a_queue_s_process_that_is_killed_amid_a_resize_leaves_it_to_a_successor(
    served, host, tmp_path, step, size
):
    """Which ends it; the guest sees no error."""
    flag = tmp_path / "flag"
    flag.touch()
    served.processes.install(KILLING.format(flag=str(flag), step=step))
    served.start("--supervise")
    pid = served.record.facts.pid
    served.write(*range(16))
    asked = served.processes.start("resize", "5", "xvdb", str(size), "--force")
    served.write(*range(8, 24))
    served.frontend.drain()
    assert (ExitStatus.OK, "") == (asked.wait(), asked.err)
    assert not flag.exists()
    assert pid != served.record.facts.pid
    host.until(lambda: served.record.facts.size == size)
    served.frontend.look_again()
    assert_length(served, size)
    served.check()
    assert ExitStatus.OK == served.unplug()


def test_a_guest_that_connects_and_leaves_waits_for_a_process_that_is_stopped(served, host):
    served.processes.install(STOPPING.format(amid=[]))
    served.start()
    pid = served.queues[1][0]
    for _ in range(2):
        served.frontend.disconnect()
        stop(host, pid)
        host.store.write(f"{ADDRESS.frontend}/state", "1")
        served.frontend = host.frontend(ADDRESS, queues=2)
        served.frontend.connect()
        served.process.until("a ring is not served yet: process")
        served.write(1, 2)
        os.kill(pid, signal.SIGCONT)
        served.frontend.drain()
        served.check()
    stop(host, pid)
    host.store.write(f"{ADDRESS.frontend}/state", str(int(State.CLOSING)))
    host.until(lambda: served.frontend.backend_state is State.CLOSING)
    host.store.write(f"{ADDRESS.frontend}/state", str(int(State.CLOSED)))
    assert ExitStatus.ERROR == resize(host, SIZE // 2)[0]
    assert served.frontend.backend_state is State.CLOSING  # its pages are in use
    os.kill(pid, signal.SIGCONT)
    host.until(lambda: served.frontend.backend_state is State.CLOSED)
    served.frontend.close()
    assert ExitStatus.OK == served.unplug_alone()


def test_a_process_that_gives_no_answer_counts_as_stalled(monkeypatch):
    """It is asked once; what it says late is nobody's."""
    there, socketpair = [], socket.socketpair

    def make_pair(*arguments):
        here, other = socketpair(*arguments)
        there.append(other.dup())
        return here, other

    monkeypatch.setattr(processes_module, "ANSWER", 0.01)
    monkeypatch.setattr(socket, "socketpair", make_pair)
    monkeypatch.setattr(os, "fork", os.getpid)
    fork = processes_module._Fork()
    queue = processes_module.RemoteQueue(fork, None, {})
    before = queue.stalled_for
    assert before > 0
    assert queue.stalled_for > before
    commands = there[0]
    number, do, _ = json.loads(commands.recv(1000))
    assert "stalled_for" == do
    with pytest.raises(BlockingIOError):
        commands.recv(1000, socket.MSG_DONTWAIT)
    for answer in ([number, 70.0, None, None], [number + 1, 0.0, None, None]):
        commands.send(json.dumps(answer).encode())
    assert 0 == queue.stalled_for
    for end in (fork.commands, fork.told, *there):
        end.close()


SLOW = """
import logging, time

def shutdown():
    os.write(2, b"begins to end")
    time.sleep(1)

logging.shutdown = shutdown
"""


def test_whoever_asks_something_of_one_that_was_killed_cleans_nothing_up(served, host):
    """The thread that ends the process takes a moment; then another takes the disk over."""
    served.processes.install(SLOW)
    served.start()
    queues = served.queues
    os.kill(queues[1][0], signal.SIGKILL)
    served.process.until("begins to end")
    served.process.signal(signal.SIGHUP)  # is it to have another size?
    served.await_end(queues)
    assert ExitStatus.CRASHED == served.process.wait()
    assert "4" == host.tree()[f"{ADDRESS.backend}/state"]
    assert "Errno" not in served.process.err
    served.adopt()
    served.frontend.drain()
    assert ExitStatus.OK == served.unplug()


FAILING = """
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.datapath.journal import Journal
real, note = RawBackend.read_nowait, Journal.note

def read(self, buffers, offset):
    if offset == 4096:
        raise OSError(5, "a bad sector")
    if offset == 8192:
        Journal.note = fail
    return real(self, buffers, offset)

def fail(*arguments):
    Journal.note = note
    raise RuntimeError("a bug of ours")

RawBackend.read_nowait = RawBackend.read = read
"""


@pytest.mark.parametrize("leaves", [True, False])
def test_what_fails_in_a_queue_s_process_is_told_and_ends_as_in_a_thread(served, leaves):
    """An error of the storage is counted; one of ours leaves the disk, or takes it away."""
    served.processes.install(FAILING)
    served.start(*(["--recover"] if leaves else []))
    queues = served.queues
    for _ in range(2):  # once on each ring
        with pytest.raises(RequestFailed):
            served.frontend.read(4096, PAGE)
    assert 2 == served.record.counters["errors"]
    served.host.until(lambda: not served.record.counters["in_flight"], what="an end of requests")
    assert "guest/xvdb: read failed in " in served.process.err
    assert "a bad sector" in served.process.err
    served.frontend.submit(READ, 8192, length=PAGE)
    served.frontend.kick()
    if leaves:
        served.await_end(queues)
        assert ExitStatus.CRASHED == served.process.wait()
        served.processes.install()
        served.adopt()
        served.frontend.drain()
        assert ExitStatus.OK == served.unplug()
    else:
        served.host.until(lambda: served.frontend.backend_state in (State.CLOSING, None))
        assert ExitStatus.ERROR == served.process.wait()
        assert "serving failed" in served.process.err
        assert "a bug of ours" in served.process.err


SHORT = """
import errno

def fork():
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

os.fork = fork
"""


def test_where_no_process_is_to_be_had_another_tries_to_take_over(served):
    """A guest has the disk: that it cannot be served now is no reason to give it up."""
    served.start("--recover")
    queues = served.queues
    served.write(1, 2)
    os.kill(served.process.pid, signal.SIGKILL)
    served.await_end(queues)
    served.processes.install(SHORT)
    process = served.processes.start("connect", "--recover", *QUEUES, "5", "--backend=raw")
    assert ExitStatus.CRASHED == process.wait()
    assert "the queues cannot have processes of their own" in process.err
    assert served.record.is_orphan
    served.processes.install()
    served.adopt("--recover")
    served.frontend.drain()
    served.check()
    assert ExitStatus.OK == served.unplug()


def test_no_fork_is_made_of_a_process_with_threads(host):
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="a thread has been started"):
            QueueProcesses(Disk(host.memory()), Options(), [], lambda number: host.hypervisor)
    finally:
        go.set()
        thread.join()
