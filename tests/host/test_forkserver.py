"""Processes that are forked by a process that does nothing else."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

import xen_disk_py
from xen_disk_py.host.forkserver import ForkServer

# What a process does is said by its arguments.
PROGRAM = """
import os, sys
sys.path.insert(0, {package!r})
from xen_disk_py.host.forkserver import Forked, serve
shared = object()
before = os.getpid()
def step():  # as long as the machine takes
    if len(sys.argv) > 1:
        os.read(int(sys.argv[1]), 1) or sys.exit(9)
try:
    serve(" ".join, [step, step])
except Forked as forked:
    words = forked.words
    if words[0] == "write":
        with open(words[1], "w") as file:
            own = os.getsid(0) == os.getpid() != before == os.getppid()
            open_files = sorted(map(int, os.listdir("/proc/self/fd")))
            print(own, repr(sys.stdin.read()), open_files[:4], file=file)
            print(open("/proc/self/cmdline").read().strip(chr(0)), file=file)
    elif words[0] == "wait":
        import signal
        signal.pause()
    sys.exit(int(words[-1]))
"""


@pytest.fixture
def server():
    package = str(Path(xen_disk_py.__file__).parents[1])
    command = [sys.executable, "-I", "-c", PROGRAM.format(package=package)]
    server = ForkServer(command, os.environ)
    yield server
    server.close()


@pytest.fixture
def slow():
    """Return a server whose start takes two steps, and what lets it do one more."""
    package = str(Path(xen_disk_py.__file__).parents[1])
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-c", PROGRAM.format(package=package), str(reader)]
    server = ForkServer(command, os.environ, [reader])
    os.close(reader)
    with open(writer, "wb", buffering=0) as file:
        yield server, file
    server.close()


def heard(server):
    return bool(select.select([server], [], [], 30)[0])


def end_of(process, server):
    while process.poll() is None:
        assert select.select([server], [], [], 30)[0]
    return process.returncode


def test_each_has_its_own_session_arguments_and_no_input(server, tmp_path):
    told = tmp_path / "told"
    process = server.start(["write", str(told), "0"])
    assert 0 == end_of(process, server)
    own, name = told.read_text().splitlines()
    # the file is 3, the directory that is listed 4: nothing of the server is open any longer
    assert "True '' [0, 1, 2, 3]" == own
    assert f"write {told} 0" == name


def test_how_each_ended_is_known(server):
    processes = [server.start(["exit", str(status)]) for status in (3, 0, 70)]
    waiting = server.start(["wait", "0"])
    assert [3, 0, 70] == [end_of(process, server) for process in processes]
    assert waiting.poll() is None
    os.kill(waiting.pid, signal.SIGKILL)
    assert -signal.SIGKILL == end_of(waiting, server)


def test_processes_outlive_the_server(server):
    process = server.start(["wait", "0"])
    pidfd = os.pidfd_open(process.pid)
    try:
        server.close()
        assert server.is_lost
        assert 0 == process.poll()  # nothing more is learned of it
        assert not select.select([pidfd], [], [], 0)[0]
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 30)[0]
    finally:
        os.close(pidfd)


def test_a_start_may_last_and_each_of_its_steps_is_heard(slow):
    server, steps = slow
    assert not server.is_ready()
    steps.write(b"1")
    assert heard(server)
    assert not server.is_ready()
    steps.write(b"2")
    while not server.is_ready():
        assert heard(server)
    assert 3 == end_of(server.start(["exit", "3"]), server)


def test_a_process_that_is_asked_for_too_early_waits(slow):
    server, steps = slow
    steps.write(b"12")
    assert 3 == end_of(server.start(["exit", "3"]), server)


def test_a_server_that_ends_while_it_starts(slow):
    server, steps = slow
    steps.close()
    with pytest.raises(ConnectionResetError, match="does not answer"):
        server.start(["exit", "0"])
    assert server.is_lost


def test_a_server_that_has_died(server):
    server._server.kill()
    with pytest.raises(OSError, match="does not answer"):
        server.start(["exit", "0"])
    assert server.is_lost


def test_a_server_that_cannot_be_started():
    with pytest.raises(FileNotFoundError):
        ForkServer(["/nowhere/python"], os.environ)
