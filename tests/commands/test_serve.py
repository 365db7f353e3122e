"""``serve``, whole: libxl, the supervisor, a real process for each disk, and a guest."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from libxl_stub import Libxl, LibxlError
from processes import PATIENT

import xen_disk_py
from xen_disk_py.blkif import READ
from xen_disk_py.cli import main
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.forkserver import ForkServer
from xen_disk_py.host.systemd import EXTEND_TIMEOUT
from xen_disk_py.recovery.record import find
from xen_disk_py.simulated.frontend import RequestFailed
from xen_disk_py.xenbus.states import Address, State

ADDRESS = Address(0, 5, 51728, "vbd3")
NEW = b"new" * 4096

# Stands in for Python as ``serve`` starts it: ``… fork-server``, on this host.
PROGRAM = """#!{python}
import os
import sys

sys.path.insert(0, {package!r})
import xen_disk_py.commands.adopt
from xen_disk_py.cli import main
from xen_disk_py.commands.environment import Environment
from xen_disk_py.simulated.hypervisor import SimulatedHypervisor, SimulatedMachine

assert sys.argv[1] == "-I"
assert sys.argv[-1] == "fork-server"
if {dies!r}:
    xen_disk_py.commands.adopt.run = lambda args, env: os._exit(3)
{patient}
xen_disk_py.commands.adopt._PATIENCE = 30.0
machine = SimulatedMachine.attach({machine!r})
env = Environment(
    record_directory={records!r},
    journal={journal!r},
    open_hypervisor=lambda: SimulatedHypervisor(machine),
)
sys.exit(main(sys.argv[4 if sys.argv[2] == "-m" else 3 :], env))
"""


@pytest.fixture
def libxl(host, tmp_path):
    return Libxl(host, tmp_path)


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """What systemd hears."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield lambda: listener.recv(1000).decode()


@pytest.fixture
def serve(host, tmp_path, monkeypatch, caplog):
    """Run ``serve`` here while a script plays libxl and the guest; then interrupt it."""
    caplog.set_level("INFO")
    monkeypatch.setenv("XENSTORED_PATH", host.xenstored.socket_path(0))
    monkeypatch.setattr("xen_disk_py.commands.serve._RETRY", 0.05)
    program = tmp_path / "python"
    processes = []

    popen_itself = subprocess.Popen

    def popen(*arguments, **options):
        return popen_itself(*arguments, **{**options, "pass_fds": host.machine.descriptors})

    fork = ForkServer.start

    def start(server, words):
        process = fork(server, words)
        processes.append(Started(process.pid))
        return process

    def serve(script, dies=False, signum=signal.SIGTERM, ready="ready: "):
        words = {
            "python": sys.executable,
            "package": str(Path(xen_disk_py.__file__).parents[1]),
            "machine": host.machine.address,
            "patient": PATIENT,
        }
        program.write_text(
            PROGRAM.format(records=host.records, journal=host.journal, dies=dies, **words)
        )
        program.chmod(0o755)
        env = host.environment()
        errors = []

        def play():
            try:
                host.until(lambda: ready in caplog.text)
                script()
            except BaseException as error:
                errors.append(error)
            finally:
                os.kill(os.getpid(), signum)

        with monkeypatch.context() as patch:
            patch.setattr("sys.executable", str(program))
            patch.setattr("subprocess.Popen", popen)
            patch.setattr(ForkServer, "start", start)
            before = signal.getsignal(signal.SIGCHLD)
            handlers = [
                (number, signal.signal(number, signal.SIG_IGN))  # one that comes after the end
                for number in (signal.SIGTERM, signal.SIGINT)
            ]
            thread = threading.Thread(target=play)
            thread.start()
            try:
                status = main(["serve"], env)
            finally:
                thread.join()
                for number, handler in handlers:
                    signal.signal(number, handler)
            assert signal.getsignal(signal.SIGCHLD) is before
        if errors:
            raise AssertionError(caplog.text + env.stderr.getvalue()) from errors[0]
        assert "" == env.stdout.getvalue()
        return status

    serve.processes = processes
    yield serve
    for process in processes:
        in_time = process.has_ended()
        process.kill()
        process.close()
        assert in_time


class Started:
    """A process that was forked for a disk; not our child."""

    def __init__(self, pid):
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it was quick
            self._pidfd = os.open(os.devnull, os.O_RDONLY)

    def kill(self):
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def has_ended(self, seconds=30.0):
        return bool(select.select([self._pidfd], [], [], seconds)[0])

    def close(self):
        os.close(self._pidfd)


def kill(process, host):
    """Kill a process that is idle; and give back what was its, as a kernel would."""
    host.machine.bury_backend()  # first: another may be there very soon
    process.kill()
    assert process.has_ended()


def detach(libxl, address, frontend):
    libxl.ask_to_detach(address)
    frontend.disconnect()
    libxl.finish_detach(address)


def after_steps(systemd):
    """Return what systemd hears after the signs of life of a start."""
    while True:
        said = systemd()
        if not said.startswith(EXTEND_TIMEOUT):
            return said


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_start_can_be_ended(serve, systemd, caplog, monkeypatch, signum):
    """It takes as long as the imports of what forks, which never end here."""

    def is_ready(server):
        os.kill(os.getpid(), signum)
        return False

    monkeypatch.setattr(ForkServer, "is_ready", is_ready)
    assert serve(lambda: None, signum=0, ready="") is ExitStatus.OK
    assert not re.search("ready|cannot start a process", caplog.text)


def test_a_disk_from_attach_to_detach(serve, host, libxl, image, systemd):
    def script():
        assert f"{EXTEND_TIMEOUT}60000000" == systemd()
        assert "READY=1\nSTATUS=0 disks are served" == after_steps(systemd)
        address = libxl.attach(image)
        assert "STATUS=1 disk is served" == systemd()
        frontend = host.frontend(address)
        frontend.connect()
        frontend.write(4096, NEW)
        assert NEW == frontend.read(4096, len(NEW))
        detach(libxl, address, frontend)
        assert "STATUS=0 disks are served" == systemd()

    assert serve(script) is ExitStatus.OK
    assert "STOPPING=1" == systemd()
    assert NEW == image.read_bytes()[4096 : 4096 + len(NEW)]
    assert [True] == [process.has_ended() for process in serve.processes]


def test_a_disk_whose_queues_are_processes_is_taken_over_when_one_of_them_dies(
    serve, host, libxl, image
):
    def script():
        address = libxl.attach(f"{image},queues=2,queues-in=processes")
        frontend = host.frontend(address, queues=2)
        frontend.connect()
        frontend.write(4096, NEW)
        before = find(host.records, address).facts
        assert 2 == len(before.queue_pids)
        host.machine.bury_backend()  # as a kernel would; before another is there
        os.kill(before.queue_pids[1], signal.SIGKILL)
        assert NEW * 2 == frontend.read(4096, len(NEW)) + frontend.read(4096, len(NEW))
        assert before.pid != find(host.records, address).facts.pid
        detach(libxl, address, frontend)

    assert serve(script) is ExitStatus.OK
    assert 2 == len(serve.processes)


def test_many_guests_disks_share_a_gold_image(serve, host, libxl, image):
    before = image.read_bytes()

    def script():
        frontends = {}
        for vdev in ("xvda", "xvdb", "xvdc"):
            address = libxl.attach(f"{image},backend=cow", vdev)
            frontends[address] = host.frontend(address)
            frontends[address].connect()
            frontends[address].write(0, vdev.encode() * 128)
        assert len(serve.processes) == 3
        for address, frontend in frontends.items():
            name = {51712: b"xvda", 51728: b"xvdb", 51744: b"xvdc"}[address.devid]
            assert name * 128 == frontend.read(0, 512)
            detach(libxl, address, frontend)

    assert serve(script) is ExitStatus.OK
    assert before == image.read_bytes()


def test_a_disk_outlives_the_supervisor(serve, host, libxl, image, caplog):
    """Restarted, it leaves the disk alone, and counts it."""
    kept = []

    def first():
        address = libxl.attach(image)
        kept.append((address, host.frontend(address)))
        kept[0][1].connect()

    assert serve(first, signum=signal.SIGINT) is ExitStatus.OK
    assert "stopped; 1 disk is served by a process of its own" in caplog.text
    (address, frontend) = kept[0]
    frontend.write(0, NEW)
    caplog.clear()

    def second():
        host.until(lambda: "ready: 1 disk is served" in caplog.text)
        assert NEW == frontend.read(0, len(NEW))
        detach(libxl, address, frontend)

    assert serve(second) is ExitStatus.OK
    assert len(serve.processes) == 1


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("/nowhere/disk.raw", "/nowhere/disk.raw: "),
        ("/nowhere/disk.raw,colour=blue", "there is no option colour="),
    ],
)
def test_a_disk_that_cannot_be_had(serve, libxl, target, said):
    def script():
        with pytest.raises(LibxlError) as caught:
            libxl.attach(target)
        assert said in str(caught.value)
        libxl.detach(ADDRESS)

    assert serve(script) is ExitStatus.OK


def test_a_process_that_dies_at_once(serve, libxl, image):
    def script():
        with pytest.raises(LibxlError, match=r"process \d+ ended with status 3"):
            libxl.attach(image)
        libxl.detach(ADDRESS)

    assert serve(script, dies=True) is ExitStatus.OK


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_is_killed(serve, host, libxl, image, caplog, when):
    """Another takes over: also under a supervisor that was started after that."""
    kept = []

    def first():
        kept.append(libxl.attach(image))
        kept.append(host.frontend(kept[0]))
        kept[1].connect()
        kept[1].write(0, NEW)
        if when == "before":
            second()

    def second():
        address, frontend = kept
        if when == "before":
            frontend.submit(READ, 0, length=4096)
            kill(serve.processes[0], host)
            frontend.kick()
        host.until(lambda: len(serve.processes) == 2)
        frontend.drain()
        assert NEW == frontend.read(0, len(NEW))
        assert frontend.backend_state is State.CONNECTED
        detach(libxl, address, frontend)

    assert serve(first) is ExitStatus.OK
    if when == "after":
        kill(serve.processes[0], host)
        assert serve(second) is ExitStatus.OK
    assert "another process takes over from" in caplog.text
    assert [True, True] == [process.has_ended() for process in serve.processes]


def test_a_process_that_is_killed_with_what_the_guest_wrote(serve, host, libxl, image, caplog):
    """The guest learns that what it waits for has failed; libxl can detach the disk."""

    def script():
        address = libxl.attach(f"{image},backend=cow")
        frontend = host.frontend(address)
        frontend.connect()
        kill(serve.processes[0], host)
        host.until(lambda: "has died" in caplog.text)
        assert not find(host.records, address).alive
        assert frontend.backend_state is State.CONNECTED
        frontend.submit(READ, 0, length=4096)
        frontend.kick()
        libxl.ask_to_detach(address)
        with pytest.raises(RequestFailed):
            frontend.drain()
        frontend.disconnect()
        libxl.finish_detach(address)

    assert serve(script) is ExitStatus.OK
    assert "ended with status -9" in caplog.text
    assert [True, True] == [process.has_ended() for process in serve.processes]


def test_an_image_that_is_away_for_a_while(serve, host, libxl, image, caplog):
    """It is looked for again and again, with nothing else happening."""

    def script():
        address = libxl.attach(image)
        frontend = host.frontend(address)
        frontend.connect()
        image.rename(image.with_name("away"))
        kill(serve.processes[0], host)
        host.until(lambda: caplog.text.count("ended with status 70") >= 2)
        image.with_name("away").rename(image)
        assert 4096 == len(frontend.read(0, 4096))
        detach(libxl, address, frontend)

    assert serve(script) is ExitStatus.OK


def test_xenstored_restarts(serve, host, libxl, image, caplog):
    """The disks stay, and new ones are seen."""

    def script():
        address = libxl.attach(f"{image},backend=cow")
        frontend = host.frontend(address)
        frontend.connect()
        host.xenstored.restart(keep=True)
        host.until(lambda: "connected to xenstore again" in caplog.text)
        frontend.write(0, NEW)
        for store in (libxl.store, frontend._store, host.store):
            store.reconnect()
        libxl.detach(libxl.attach(f"{image},backend=cow", "xvdc"))
        detach(libxl, address, frontend)

    assert serve(script) is ExitStatus.OK


@pytest.mark.parametrize("version", [(4, 17), (4, 18), (3, 4)])
def test_an_older_xen(host, version):
    env = host.environment()
    env.xen_version = lambda: version
    assert main(["serve"], env) is ExitStatus.ERROR
    said = env.stderr.getvalue()
    assert f"Xen {version[0]}.{version[1]}: its libxl refuses disks with backendtype=tap" in said
    assert len(said.splitlines()) == 1
