"""A process is known by its id and when it was started; a signal goes to that one or to nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from xen_disk_py.host import process


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def test_it_is_there_until_it_has_ended(child):
    started = process.start_time(child.pid)
    assert process.is_process(child.pid, started)
    child.kill()
    child.wait()
    assert not process.is_process(child.pid, started)


def test_a_name_with_spaces_and_brackets_is_read_past(tmp_path):
    program = tmp_path / "a) b (c"
    program.symlink_to(sys.executable)
    with subprocess.Popen([str(program), "-c", "input()"], stdin=subprocess.PIPE) as made:
        assert 0 < process.start_time(made.pid) < 1 << 60
        made.kill()


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_signal_comes_to_the_process_that_is_meant(child, has_pidfd, monkeypatch):
    if not has_pidfd:
        monkeypatch.delattr(process.os, "pidfd_open", raising=False)
    started = process.start_time(child.pid)
    assert not process.send_signal(child.pid, started + 1, signal.SIGTERM)
    assert not process.send_signal(child.pid, None, signal.SIGTERM)
    assert child.poll() is None
    assert process.send_signal(child.pid, started, signal.SIGTERM)
    assert -signal.SIGTERM == child.wait()
    assert not process.send_signal(child.pid, started, signal.SIGTERM)


@pytest.mark.parametrize("pid", [None, "1", 0, -1, 999_999_999])
def test_what_is_no_process(pid):
    assert not process.send_signal(pid, 1, signal.SIGTERM)


def test_our_own():
    assert process.is_process(os.getpid(), process.start_time(os.getpid()))


def test_a_fork_is_killed_when_its_parent_ends():
    reader, writer = os.pipe()
    middle = os.fork()
    if not middle:
        parent = os.getpid()
        if not os.fork():
            process.end_with_parent(parent)
            os.write(writer, b"x")
            while True:
                signal.pause()
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(writer)
    os.waitpid(middle, 0)
    assert b"" == os.read(reader, 1)  # nobody has the other end
    os.close(reader)


def test_a_fork_whose_parent_has_gone_already_ends():
    pid = os.fork()
    if not pid:
        process.end_with_parent(1 << 22)  # no number of a process
        os._exit(0)
    assert 1 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
