"""``connect --supervise``, whole: the parent, its workers, and a guest that notices nothing."""

from __future__ import annotations

import json
import os
import signal

import pytest

from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery import record
from xen_disk_py.recovery.record import find
from xen_disk_py.xenbus import toolstack
from xen_disk_py.xenbus.states import Address, State

ADDRESS = Address(0, 5, 51728, "vbd3")
NEW = b"new" * 4096

QUICK = """
import xen_disk_py.recovery.supervisor
from xen_disk_py.recovery import temporary
temporary._MEMORY = {memory!r}
xen_disk_py.recovery.supervisor.Supervisor.__init__.__kwdefaults__["delays"] = {delays!r}
"""


@pytest.fixture
def memory(tmp_path):
    """Where temporary overlays are."""
    path = tmp_path / "memory"
    path.mkdir()
    return path


@pytest.fixture
def install(processes, memory):
    """Install programs whose restarts come at once."""

    def install(hook="", delays=(0.0, 0.0)):
        processes.install(QUICK.format(memory=str(memory), delays=delays) + hook)

    install()
    return install


@pytest.fixture
def supervise(host, processes, install):
    """Start a supervisor, and connect a guest to its worker."""

    def supervise(*argv):
        process = processes.start("connect", "--supervise", "guest", "--vdev=xvdb", *map(str, argv))
        host.until(lambda: ADDRESS.backend in host.tree())
        frontend = host.frontend(ADDRESS)
        frontend.connect()
        process.until("rw")
        return process, frontend

    return supervise


def worker(host):
    """Return the process that serves the disk now, if one does."""
    found = find(host.records, ADDRESS)
    return found.facts.pid if found is not None and found.alive else None


def kill(host):
    """Kill the worker, and wait until another serves."""
    before = worker(host)
    os.kill(before, signal.SIGKILL)
    host.until(lambda: (worker(host) or before) != before and started(host) is not None)


def started(host):
    found = find(host.records, ADDRESS)
    return found.facts.started if found is not None else None


def unplug(host, process, frontend):
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    return process.wait()


def test_what_a_guest_wrote_survives(host, supervise, memory, image):
    """Copy-on-write, whose changes are in memory that no process owns, and go at the end."""
    before = image.read_bytes()
    process, frontend = supervise("--path", image, "--json")
    frontend.write(4096, NEW)
    for number in (1, 2):
        kill(host)
        assert NEW == frontend.read(4096, len(NEW))
        assert 1 == len(os.listdir(memory))
        host.until(lambda: process.err.count("takes over\n") == number)  # noqa: B023 - called now
    assert ExitStatus.OK == unplug(host, process, frontend)
    assert ([], [], before) == (os.listdir(memory), os.listdir(host.records), image.read_bytes())
    (line,) = process.out.splitlines()
    assert "xvdb" == json.loads(line)["vdev"]
    assert 2 == process.err.count("takes over\n")
    assert "xen-disk: guest/xvdb: disk 5 xvdb: process " in process.err
    assert "died of signal 9" in process.err
    assert "changes are kept in memory and vanish" in process.err
    assert process.err.count("xvdb: unplugged\n") == 1


def test_quiet(host, supervise, image):
    process, frontend = supervise("--path", image, "--backend=raw", "-q")
    kill(host)
    assert ExitStatus.OK == unplug(host, process, frontend)
    assert "reads " not in process.err
    assert "xvdb 51728 /dev/xvdb 1 MiB raw rw\n" == process.out


def test_two_signals_force(host, supervise, image):
    """Also of a successor, which was not asked before."""
    process, frontend = supervise("--path", image, "--backend=raw")
    kill(host)
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    process.until("Ctrl-C again to force")
    process.signal()
    assert ExitStatus.INTERRUPTED == process.wait()
    assert frontend.backend_state is None


def test_the_guest_is_destroyed_while_nobody_serves(host, supervise, install, memory, image):
    process, frontend = supervise("--path", image)
    frontend.write(0, NEW)
    pid = worker(host)
    os.kill(pid, signal.SIGSTOP)
    host.xenstored.remove_domain(5)
    os.kill(pid, signal.SIGKILL)
    assert ExitStatus.OK == process.wait()
    assert "xvdb: the guest has gone\n" in process.err
    assert ([], []) == (os.listdir(memory), os.listdir(host.records))


def test_given_up(host, supervise, install, processes, memory, image):
    """The disk is left behind, with what the guest wrote, to whoever repairs what is broken."""
    install(delays=())
    process, frontend = supervise("--path", image)
    frontend.write(0, NEW)
    os.kill(worker(host), signal.SIGKILL)
    assert ExitStatus.ERROR == process.wait()
    assert "disk 5 xvdb is left behind" in process.err
    assert 1 == len(os.listdir(memory))
    assert find(host.records, ADDRESS).is_orphan

    process = processes.start("connect", "--supervise", "--adopt", "5", "xvdb")
    process.until("xvdb 51728 /dev/xvdb 1 MiB overlay rw")
    assert NEW == frontend.read(0, len(NEW))
    assert ExitStatus.OK == unplug(host, process, frontend)
    assert ([], []) == (os.listdir(memory), os.listdir(host.records))


MAY_NOT_REMOVE = """
from xen_disk_py.recovery import record
from xen_disk_py.commands import connect
def deny(*args):
    raise PermissionError
if "--supervise" not in sys.argv:
    connect.temporary.remove = lambda path: None
    record._unlink = deny
"""


@pytest.mark.parametrize("adopts", [False, True])
def test_a_worker_that_may_not_remove_its_files(
    host, supervise, install, processes, memory, image, adopts
):
    """It has become another user; we have not."""
    install(MAY_NOT_REMOVE, delays=())
    process, frontend = supervise("--path", image)
    if adopts:
        os.kill(worker(host), signal.SIGKILL)
        assert ExitStatus.ERROR == process.wait()
        process = processes.start("connect", "--supervise", "--adopt", "5", "xvdb")
        process.until("overlay rw")
    assert ExitStatus.OK == unplug(host, process, frontend)
    assert ([], []) == (os.listdir(memory), os.listdir(host.records))


def test_a_disk_that_does_not_survive(processes, install, host, tmp_path):
    (tmp_path / "disk.py").write_text(
        "from xen_disk_py.backends import Backend\n"
        "class Disk(Backend):\n"
        "    size = 1 << 20\n"
        "    def read(self, buffers, offset): pass\n"
        "    def write(self, buffers, offset): pass\n"
    )
    path = str(tmp_path / "disk.py")
    process = processes.start("connect", "--supervise", "guest", "--path", path)
    assert ExitStatus.USAGE == process.wait()
    assert f"a {path} disk ends with its process" in process.err
    assert "survives = True" in process.err


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("", "no domain 'nobody'"),
        (
            "import os\n"
            "if 'temporary' in str(sys.argv):\n"
            "    main(sys.argv[3:], env)\n"
            "    os.abort()\n",
            "before it attached the disk",
        ),
    ],
)
def test_a_worker_that_comes_to_nothing(processes, install, memory, image, hook, said):
    install(hook)
    process = processes.start("connect", "--supervise", "nobody", "--path", str(image))
    assert ExitStatus.ERROR == process.wait()
    assert said in process.err
    assert [] == os.listdir(memory)


def test_what_cannot_be_adopted(host, processes, install, supervise, memory, image):
    """It is not tried again and again; and stays for whoever can."""
    install(delays=())
    process, frontend = supervise("--path", image, "--backend=raw")
    os.kill(worker(host), signal.SIGKILL)
    process.wait()
    image.with_name("other").write_bytes(image.read_bytes())
    image.with_name("other").replace(image)
    process = processes.start("connect", "--supervise", "--adopt", "guest", "xvdb")
    assert ExitStatus.ERROR == process.wait()
    assert "is not what" in process.err
    assert find(host.records, ADDRESS).is_orphan
    frontend.close()
    toolstack.detach(host.store, ADDRESS)
    record.forget(host.records, ADDRESS)
