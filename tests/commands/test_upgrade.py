"""``upgrade``: a process becomes another program while a guest uses its disk, or it does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from functools import partial

import pytest

import xen_disk_py
from xen_disk_py.blkif import READ
from xen_disk_py.cli import main
from xen_disk_py.commands import upgrade as upgrade_module
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.host.process import start_time
from xen_disk_py.recovery import record
from xen_disk_py.recovery import upgrade as upgrading_module
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.recovery.record import Record, find
from xen_disk_py.recovery.role import Role
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import Address, State
from xen_disk_py.xenbus.toolstack import Domain
from xen_disk_py.xenbus.vdev import parse

ADDRESS = Address(0, 5, 51728, "vbd3")
NEW = b"new" * 4096
VERSION = "import xen_disk_py.recovery.facts as facts\nfacts.__version__ = 'next'\n"


@pytest.fixture
def connect(host, processes, image):
    """Have a real process serve a disk to a guest."""

    def connect(*argv):
        argv = argv or ["--path", str(image), "--backend=raw"]
        process = processes.start("connect", *argv, "--vdev=xvdb", "guest")
        host.until(lambda: ADDRESS.backend in host.tree())
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        process.until(" rw")
        return process, frontend

    return connect


@pytest.fixture
def upgrade(host):
    def upgrade(*argv):
        env = host.environment()
        status = main(["upgrade", *(argv or ("guest", "xvdb"))], env)
        return status, env.stdout.getvalue(), env.stderr.getvalue()

    return upgrade


def end(host, process, frontend):
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()
    assert "xvdb: unplugged\n" in process.err
    assert "xvdb 51728 /dev/xvdb 1 MiB raw rw\n" == process.out  # and no second line


def test_another_program_takes_over(host, processes, connect, upgrade, image):
    """The same process, with the same disk, again and again."""
    process, frontend = connect()
    frontend.write(0, NEW)
    assert xen_disk_py.__version__ == find(host.records, ADDRESS).facts.version
    processes.install(VERSION)
    for _ in range(2):
        start = time.monotonic()
        status, out, err = upgrade("guest", "xvdb", "--json")
        told = json.loads(out)
        pause = told.pop("pause")
        assert status is ExitStatus.OK
        assert f"xvdb: version next takes over, nobody served for {pause:.2f} s\n" == err
        # As long as it takes to start a program; it is told in milliseconds.
        assert 0.01 < pause < time.monotonic() - start + 0.001
        assert {
            "domid": 5,
            "domain": "guest",
            "vdev": "xvdb",
            "number": 51728,
            "device": "/dev/xvdb",
            "pid": process.pid,
            "version": "next",
        } == told
        assert NEW == frontend.read(0, len(NEW))
        assert frontend.backend_state is State.CONNECTED
    status, out, err = upgrade()
    assert (ExitStatus.OK, "") == (status, out)
    frontend.write(8192, NEW)
    end(host, process, frontend)
    assert NEW == image.read_bytes()[8192 : 8192 + len(NEW)]
    assert 3 == process.err.count(f"xvdb: process {process.pid} takes over\n")


@pytest.fixture
def gate(processes, tmp_path):
    """Have a program wait before it begins: the one that is tried, or the one that takes over.

    Or, the latter, before it serves, when it has the disk's record already.
    """
    closed, arrived = tmp_path / "closed", tmp_path / "arrived"

    def close_later():
        closed.touch()
        processes.install(
            "import pathlib\n"
            "import time\n"
            "import xen_disk_py.commands.connect\n"
            "def wait(at, since=xen_disk_py.commands.connect.pause_since):\n"
            f"    pathlib.Path({str(arrived)!r}).touch()\n"
            f"    while os.path.exists({str(closed)!r}):\n"
            "        time.sleep(0.01)\n"
            "    return since(at)\n"
            "xen_disk_py.commands.connect.pause_since = wait\n"
        )
        return closed, arrived

    def close(*, tried, has_record=False):
        if has_record:
            return close_later()
        closed.touch()
        processes.install(
            "import pathlib\n"
            "import time\n"
            f"is_tried = '\"tries\"' in ' '.join(sys.argv)\n"
            f"if '--adopt' in sys.argv and is_tried is {tried}:\n"
            f"    pathlib.Path({str(arrived)!r}).touch()\n"
            f"    while os.path.exists({str(closed)!r}):\n"
            "        time.sleep(0.01)\n"
        )
        return closed, arrived

    yield close
    closed.unlink(missing_ok=True)


@pytest.fixture(params=["not begun", "not serving"])
def becoming(host, connect, gate, request):
    """Have the process of a disk become another program, which does not serve yet."""
    process, frontend = connect()
    closed, arrived = gate(tried=False, has_record=request.param == "not serving")
    process.signal(signal.SIGUSR2)
    host.until(arrived.exists)
    return closed, process, frontend


def test_who_is_told_to_end_while_another_program_is_tried_does(host, connect, gate):
    process, frontend = connect()
    closed, arrived = gate(tried=True)
    process.signal(signal.SIGUSR2)
    host.until(arrived.exists)
    process.signal(signal.SIGTERM)
    closed.unlink()
    process.until("not upgraded: it has been told to end")
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


def test_a_disk_whose_process_becomes_another_program_is_alive(host, becoming):
    gate, process, frontend = becoming
    env = host.environment()
    assert ExitStatus.OK == main(["list", "--json"], env)
    (row,) = json.loads(env.stdout.getvalue())
    told = {name: row[name] for name in ("pid", "alive", "adoptable", "state")}
    assert {"pid": process.pid, "alive": True, "adoptable": False, "state": "connected"} == told
    gate.unlink()
    process.until("takes over")
    end(host, process, frontend)


@pytest.mark.parametrize("command", ["upgrade", "resize", "filter", "disconnect"])
def test_commands_wait_for_the_program_that_a_process_becomes(host, monkeypatch, becoming, command):
    gate, process, frontend = becoming
    env, sleep, looks = host.environment(), time.sleep, []

    def wait(seconds):
        looks.append(gate.exists())
        gate.unlink(missing_ok=True)
        sleep(seconds)

    def close():
        host.until(lambda: frontend.backend_state is State.CLOSING)
        frontend.disconnect()

    more = {"resize": ["1M"], "filter": ["list"]}.get(command, [])
    closing = threading.Thread(target=close)
    with monkeypatch.context() as patch:
        patch.setattr(record.time, "sleep", wait)
        if command == "disconnect":
            closing.start()
        status = main([command, "guest", "xvdb", *more], env)
    assert (ExitStatus.OK, [True]) == (status, looks[:1]), env.stderr.getvalue()
    process.until("takes over")
    if command == "disconnect":
        closing.join()
        assert ExitStatus.OK == process.wait()
    else:
        end(host, process, frontend)


def test_requests_meanwhile(host, connect, upgrade):
    process, frontend = connect()
    for number in range(20):
        frontend.submit(READ, 4096 * number, length=4096)
    frontend.kick()
    assert ExitStatus.OK is upgrade()[0]
    frontend.drain()
    end(host, process, frontend)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            "raise RuntimeError('half installed')",
            "would not take over: RuntimeError: half installed",
        ),
        ("raise RuntimeError('x' * 50_000)", "would not take over: RuntimeError: xxx"),
        (None, "does not start: "),
        ("import xen_disk_py.recovery.upgrade as u\nu.FORMATS = ()", "another version's"),
        (
            "def no():\n    raise xen_disk_py.errors.XenUnavailable('no gntdev')\n"
            "import xen_disk_py.errors\nenv.open_hypervisor = no",
            "error: no gntdev",
        ),
    ],
)
def test_a_program_that_cannot_start(host, processes, connect, upgrade, broken, said):
    """Nobody has released anything; the reason is told, each time."""
    process, frontend = connect()
    before = find(host.records, ADDRESS).facts.started
    if broken is None:
        processes.program.unlink()
    else:
        processes.install(broken)
    for _ in range(1 if broken else 2):
        status, out, err = upgrade("guest", "xvdb", "--json")
        assert (ExitStatus.ERROR, "", 1) == (status, out, len(err.splitlines()))
        assert f"process {process.pid} continues as it was: " in err
        assert said in err
    assert before == find(host.records, ADDRESS).facts.started
    frontend.write(0, NEW)
    processes.install()
    assert ExitStatus.OK is upgrade()[0]  # it has been repaired
    assert find(host.records, ADDRESS).facts.not_upgraded is None
    end(host, process, frontend)


def test_a_program_that_vanishes_at_the_last_moment(host, processes, connect, upgrade):
    """Signals, which were held back for it, are heard again."""
    processes.install("def no(*what):\n    raise OSError('gone')\nos.execv = no\n")
    process, frontend = connect()
    assert "the new program does not start: gone" in upgrade()[2]
    frontend.write(0, NEW)
    end(host, process, frontend)


def test_a_worker_of_a_supervisor(host, processes, upgrade, image):
    """It keeps its number, and the supervisor keeps it."""
    process = processes.start(
        *("connect", "--supervise", "--path", str(image), "--backend=raw", "--vdev=xvdb", "5")
    )
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    pid = find(host.records, ADDRESS).facts.pid
    assert ExitStatus.OK is upgrade()[0]
    assert pid == find(host.records, ADDRESS).facts.pid
    end(host, process, frontend)


def test_copy_on_write_dies_with_its_process(host, connect, upgrade, image):
    process, frontend = connect("--path", str(image))
    status, _, err = upgrade()
    assert (ExitStatus.ERROR, True) == (status, "what the guest wrote would end with" in err)
    process.signal(signal.SIGTERM)
    host.until(lambda: frontend.backend_state is State.CLOSING)
    status, _, err = upgrade()
    assert (ExitStatus.ERROR, True) == (status, "xvdb is about to go" in err)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


@pytest.fixture
def served(host, monkeypatch):
    """Nodes and a record as a process has them; what it is sent, a script answers."""

    def serve(answer=lambda one: None, **facts):
        serving = host.serving(host.memory(), "xvdb", start=False)
        serving.attach()
        one = Record(host.records, ADDRESS)
        one.describe(Facts(**{"pid": os.getpid(), "started": 1.0, "version": "9", **facts}))
        signals = []

        def kill(pid, started, signum):
            signals.append((pid, signum))
            return answer(one) is not False

        monkeypatch.setattr(upgrade_module, "send_signal", kill)
        records.append(one)
        return signals

    records = []
    yield serve
    toolstack.detach(host.store, ADDRESS)
    while records:
        records.pop().close()
    record.forget(host.records, ADDRESS)


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda one: one.close(), "xvdb was disconnected meanwhile"),
        (lambda one: one.leave(), "the new program has died; to take over the disk: xen-disk"),
        (lambda one: None, "has not answered within 0 s: it is stopped or hangs"),
        (lambda one: False, "has died; to take over its disk: xen-disk"),
        (lambda one: fail(PermissionError()), "run as root"),
    ],
)
def test_a_process_that_does_not_answer(served, upgrade, answer, said):
    signals = served(answer)
    status, out, err = upgrade("guest", "xvdb", "--timeout=0")
    assert (ExitStatus.ERROR, "", 1) == (status, out, len(err.splitlines()))
    assert said in err
    assert [(os.getpid(), signal.SIGUSR2)] == signals


def test_a_new_program_that_has_not_begun_yet_is_not_taken_for_dead(served, upgrade):
    """It has no record until it has, and whoever adopts its disk would take that from it."""
    signals = served(lambda one: one.leave(), process_started=start_time(os.getpid()))
    status, _, err = upgrade("guest", "xvdb", "--timeout=0")
    assert (ExitStatus.ERROR, 1) == (status, len(signals))
    assert "has not answered within 0 s" in err


NO_PROCESS = (1 << 22) + 1  # more than Linux gives; 1 may be this process, in a namespace


@pytest.mark.parametrize("facts", [{"started": None}, {"pid": NO_PROCESS}])
def test_a_process_that_would_not_understand_is_sent_nothing(served, upgrade, facts):
    """The signal kills whoever does not know it."""
    signals = served(**facts)
    status, _, err = upgrade()
    assert (ExitStatus.ERROR, True) == (status, "cannot be followed" in err), err
    assert [] == signals


def test_a_record_of_another_version(served, upgrade, monkeypatch):
    signals = served()
    monkeypatch.setattr(upgrade_module, "FORMATS", ())
    assert "cannot be followed" in upgrade()[2]
    assert [] == signals


def test_a_dead_process(served, upgrade, host):
    signals = served()
    record.forget(host.records, ADDRESS)  # it is locked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upgrade_module.record, "find_served", lambda *what: None)
        assert "has died; to take over its disk: xen-disk connect --adopt 5 xvdb" in upgrade()[2]
    assert [] == signals


def test_a_disk_of_libxl_s(served, upgrade, host):
    signals = served()
    host.store.write(f"{ADDRESS.backend}/script", "/etc/xen/scripts/block-xen-disk")
    assert "xl has attached xvdb" in upgrade()[2]
    assert [] == signals


@pytest.mark.parametrize("argv", [("guest", "xvd"), ("guest",)])
def test_wrong_input(upgrade, argv):
    assert ExitStatus.USAGE is upgrade(*argv)[0]


def leaving(one, role):
    """What ends the process of a disk that another user serves, for the next program."""
    domain, vdev = Domain(5, "guest", ""), parse("xvdb")
    before, is_asked = (lambda: None), (lambda: False)
    return upgrading_module.Upgrade(role, [], "nobody", domain, vdev, one, before, is_asked)


class Ended(BaseException):
    """What ends a process, here."""


@pytest.fixture
def taking_over(host, monkeypatch):
    """Have the process of a disk that another user serves take over; how it has ended."""

    def take_over():
        with Record(host.records, ADDRESS) as one:
            one.describe(Facts(survives=True))
            successor = leaving(one, Role(leaves=True))
            monkeypatch.setattr(upgrading_module.os, "_exit", lambda status: fail(Ended(status)))
            try:
                successor.take_over()
            except Ended as end:
                return end.args[0], one.facts
            return None, one.facts

    return take_over


def test_who_has_no_privileges_leaves_it_to_who_started_it(
    taking_over, processes, monkeypatch, tmp_path
):
    """What the dry run has to know it is told: it may look nowhere."""
    heard = tmp_path / "heard"
    processes.install(f"open({str(heard)!r}, 'w').write(sys.stdin.read()); sys.exit()")
    monkeypatch.setattr("sys.executable", str(processes.program))
    monkeypatch.setattr("logging.shutdown", lambda: None)  # the handlers are pytest's
    descriptors = processes._host.machine.descriptors
    monkeypatch.setattr("subprocess.Popen", partial(subprocess.Popen, pass_fds=descriptors))
    status, facts = taking_over()
    assert ExitStatus.CRASHED == status
    assert facts.released_at > 0
    assert Facts(survives=True) == Facts.parse(heard.read_bytes())


def test_who_has_no_privileges_and_nobody_who_started_it(host, caplog):
    with Record(host.records, ADDRESS) as one:
        one.describe(Facts(survives=True))
        leaving(one, Role()).take_over()
        assert "needs --supervise or --recover" in one.facts.not_upgraded[1]
    caplog.clear()  # what is logged refers to everything
