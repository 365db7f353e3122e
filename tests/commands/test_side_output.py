"""No reader, no terminal and no full disk behind our output decides over a guest's disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from libxl_stub import Libxl

from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.errors import XenUnavailable
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.record import find
from xen_disk_py.xenbus.states import Address, State

ADDRESS = Address(0, 5, 51728, "vbd3")
NEW = b"new" * 4096
PATIENCE = 30.0

# A disk that prints with each request: its author looks for something.
CHATTY = """
import sys
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 1 << 20
    survives = True

    def __init__(self):
        self.file = open(__file__ + ".data", "r+b", buffering=0)

    def say(self, what):
        print("on stdout:", what, "x" * 1000, flush=True)
        print("on stderr:", what, "x" * 1000, file=sys.stderr, flush=True)

    def read(self, buffers, offset):
        self.say("read")
        self.file.seek(offset)
        for buffer in buffers:
            self.file.readinto(buffer)

    def write(self, buffers, offset):
        self.say("write")
        self.file.seek(offset)
        for buffer in buffers:
            self.file.write(buffer)
"""

QUICK = """
import xen_disk_py.recovery.supervisor
xen_disk_py.recovery.supervisor.Supervisor.__init__.__kwdefaults__["delays"] = (0.0, 0.0)
"""

CLOSES = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]

F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # in Python's fcntl from 3.10 on


class Pipe:
    """A pipe as stdout and stderr."""

    def __init__(self, *, full=False):
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        if full:
            self.fill()

    def fill(self):
        fcntl.fcntl(self.writer, F_SETPIPE_SZ, 4096)
        own = os.open(f"/proc/self/fd/{self.writer}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while os.write(own, b"x" * 4096):
                pass
        os.close(own)

    def leave(self):
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def close(self):
        self.leave()
        os.close(self.writer)


SIDES = ["nobody reads", "reader gone", "reader goes", "full disk", "closed"]


@pytest.fixture(params=SIDES)
def side(request):
    """How stdout and stderr are: options for ``Processes.start``, and what comes later."""
    with contextlib.ExitStack() as stack:
        later = lambda: None  # noqa: E731 - nothing
        if request.param == "closed":
            options = {"prefix": CLOSES, "stdin": None}
        elif request.param == "full disk":
            full = stack.enter_context(open("/dev/full", "w"))
            options = {"stdout": full, "stderr": full}
        else:
            pipe = Pipe(full=request.param == "nobody reads")
            stack.callback(pipe.close)
            options = {"stdout": pipe.writer, "stderr": pipe.writer}
            if request.param == "reader gone":
                pipe.leave()
            elif request.param == "reader goes":  # `| tee`, and a Ctrl-C that ends both
                later = pipe.leave
        yield options, later


@pytest.fixture
def disk(tmp_path):
    """A disk whose author prints, at a path that is not UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/chatty\xff.py"))
    path.write_text(CHATTY)
    Path(f"{path}.data").write_bytes(bytes(1 << 20))
    return path


def pid(host):
    found = find(host.records, ADDRESS)
    return (
        found.facts.pid if found and found.alive and found.facts and found.facts.started else None
    )


def use(frontend):
    for _ in range(10):
        frontend.write(4096, NEW)
        assert NEW == frontend.read(4096, len(NEW))


def connected(host):
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    use(frontend)
    return frontend


def test_connect(host, processes, disk, side):
    options, later = side
    process = processes.start(
        "--debug", "connect", "guest", "--vdev=xvdb", "--path", str(disk), **options
    )
    frontend = connected(host)
    later()
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    use(frontend)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()
    assert [] == os.listdir(host.records)


@pytest.mark.parametrize("side", ["nobody reads", "reader goes", "closed"], indirect=True)
def test_supervise(host, processes, disk, side):
    """Neither the supervisor, nor its worker, nor a successor."""
    options, later = side
    processes.install(QUICK)
    argv = ["connect", "--supervise", "guest", "--vdev=xvdb", "--path", str(disk)]
    process = processes.start("--debug", *argv, **options)
    frontend = connected(host)
    host.until(lambda: pid(host) is not None)
    before = pid(host)
    later()
    os.kill(before, signal.SIGKILL)
    host.until(lambda: pid(host) not in (None, before))
    use(frontend)
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    use(frontend)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()
    assert [] == os.listdir(host.records)


@pytest.mark.parametrize("side", ["nobody reads", "reader goes", "closed"], indirect=True)
def test_serve(host, processes, image, side, tmp_path):
    """Neither the daemon, nor the process of a disk."""
    options, later = side
    process = processes.start("--debug", "serve", **options)
    libxl = Libxl(host, tmp_path)
    address = libxl.attach(image)
    frontend = host.frontend(address)
    frontend.connect()
    use(frontend)
    later()
    use(frontend)
    libxl.ask_to_detach(address)
    frontend.disconnect()
    libxl.finish_detach(address)
    host.until(lambda: not os.listdir(host.records), what="the end of the disk's process")
    process.signal(signal.SIGTERM)
    assert ExitStatus.OK == process.wait()


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="needs nbdkit")
@pytest.mark.parametrize("side", ["nobody reads", "reader gone"], indirect=True)
def test_a_server_that_works_for_the_disk_is_not_stopped_by_the_reader_of_our_log(
    host, processes, side
):
    """It says a lot of each request."""
    try:
        NBD.load()
    except XenUnavailable as error:
        pytest.skip(str(error))
    options, later = side
    path = "[ nbdkit --verbose --exit-with-parent memory 1M ]"
    process = processes.start("connect", "guest", "--vdev=xvdb", "--path", path, **options)
    frontend = connected(host)
    later()
    for _ in range(20):
        use(frontend)
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    use(frontend)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


SAYS_MORE = """
import threading
from xen_disk_py import cli

main_part = cli._main

def then_say_more(*arguments, **options):
    status = main_part(*arguments, **options)
    late = lambda: print("late", file=getattr(sys, {stream!r}), flush=True)
    thread = threading.Thread(target=late, daemon=True)
    thread.start()
    thread.join(1.0)
    return status

cli._main = then_say_more
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_is_said_when_all_is_done_keeps_no_process_from_its_end(processes, stream):
    """By a server that works for the disk, or a thread of the disk's author; and nobody reads."""
    processes.install(SAYS_MORE.format(stream=stream))
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with contextlib.closing(Pipe(full=True)) as pipe:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: pipe.writer}
        if stream == "stdout":
            argv = ["disconnect", "nobody", "xvdb"]  # which prints nothing there
            status = ExitStatus.ERROR
        else:
            argv, status = ["list"], ExitStatus.OK
        process = processes.start(*argv, env=environment, **streams)
        assert status == process.wait()


# A leader of a session that opens a terminal has it as its own, and hears when it is hung up.
IN_TERMINAL = """
import os, sys
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def terminal(processes):
    """Start a program in a terminal of its own, which ``close`` closes."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    opened = [ours]

    def start(*argv):
        prefix = [sys.executable, "-c", IN_TERMINAL, name]
        return processes.start(*argv, prefix=prefix, start_new_session=True)

    def close():
        os.close(theirs)
        os.close(opened.pop())

    start.close = close
    start.master = ours
    yield start
    if opened:
        close()


@pytest.mark.parametrize("supervised", [False, True])
def test_a_closed_terminal(host, terminal, disk, supervised):
    """The guest is asked to release its disk, and has the time it takes."""
    argv = ["guest", "--vdev=xvdb", "--path", str(disk), *(["--supervise"] if supervised else [])]
    process = terminal("--debug", "connect", *argv)
    frontend = connected(host)
    host.until(lambda: pid(host) is not None)
    terminal.close()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    use(frontend)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


def test_a_stopped_terminal(host, terminal, disk):
    """Ctrl-S, and nobody looks at it again."""
    process = terminal("--debug", "connect", "guest", "--vdev=xvdb", "--path", str(disk))
    frontend = connected(host)
    os.write(terminal.master, b"\x13")
    for _ in range(10):
        use(frontend)
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    use(frontend)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


def test_what_an_author_prints_is_no_data_of_ours(host, processes, disk):
    process = processes.start("connect", "guest", "--vdev=xvdb", "--path", str(disk))
    frontend = connected(host)
    process.until("xvdb 51728")
    assert 1 == len(process.out.splitlines())
    assert "on stdout: read" in process.err
    process.signal()
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()


def test_no_closed_descriptor_becomes_the_disk(host, processes, image):
    """What a library prints on descriptor 2 does not go into an image."""
    processes.install("import os\nos.write(2, b'printed by a library')\n")
    before = image.read_bytes()
    process = processes.start(
        "connect", "guest", "--vdev=xvdb", "--path", str(image), "--backend=raw", prefix=CLOSES
    )
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    shown = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    assert ["/dev/null"] * 3 == shown
    process.signal()
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()
    assert before == image.read_bytes()


@pytest.mark.parametrize(
    ("redirection", "status"), [("> /dev/full", 1), ("2> /dev/full", 0), ("2>&-", 0), ("| :", None)]
)
def test_a_command_that_prints_what_it_was_asked_for(redirection, status):
    """That is its work: it fails if it cannot, in one line."""
    script = f"{sys.executable} -m xen_disk_py help {redirection}"
    done = subprocess.run(
        ["/bin/bash", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    if status is not None:
        assert status == done.returncode
    said = {1: "xen-disk: error: cannot write to stdout: No space left on device\n"}
    assert said.get(status, "") == done.stderr
