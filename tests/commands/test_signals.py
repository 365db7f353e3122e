"""Ctrl-C ends a command, wherever the system keeps its main thread."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from fuse import HangingFile

from xen_disk_py.commands.signals import ended_though_it_hangs
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.recovery.record import find
from xen_disk_py.xenbus.states import Address

ADDRESS = Address(0, 5, 51728, "vbd3")
HURRY = "import xen_disk_py.commands.signals as s; s.ANSWER = s._GRACE = 0.2"
BLOCKED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(params=[False])
def hanging(tmp_path, request):
    """A file that hangs when it is opened; with True, so that nothing ends that."""
    try:
        file = HangingFile(tmp_path / "mount", reads=request.param)
    except OSError as error:
        pytest.skip(f"needs FUSE, and root: {error}")
    yield file
    file.close()


@pytest.fixture
def opens(processes, hanging):
    """Start ``connect`` with it, and return when it hangs."""

    def opens(**options):
        processes.install(HURRY)
        path = str(hanging.path)
        process = processes.start("connect", "guest", "--path", path, "--vdev=xvdb", **options)
        assert hanging.opened.wait(30)
        process.until(f"{path} is not open after 0.2 s; /proc/{process.pid}/stack shows")
        return process

    return opens


def test_an_image_that_does_not_open_is_said_and_ctrl_c_gives_it_up(opens, host, hanging):
    process = opens()
    process.signal(signal.SIGINT)
    assert ExitStatus.INTERRUPTED == process.wait()
    assert 1 == process.err.count("is not open")
    assert f"{hanging.path}: given up; if process {process.pid} stays, the kernel" in process.err
    assert ADDRESS.backend not in host.tree()
    assert find(host.records, ADDRESS) is None


@pytest.mark.parametrize("hanging", [True], indirect=True)
def test_where_the_kernel_does_not_let_it_end_that_is_said(opens, hanging):
    process = opens()
    process.signal(signal.SIGINT)
    process.until(f"given up; if process {process.pid} stays, the kernel keeps it")
    process.signal(signal.SIGKILL)
    time.sleep(0.1)
    assert not process.is_over
    hanging.answer()
    assert ExitStatus.INTERRUPTED == process.wait()


@pytest.mark.parametrize("before", [(), (signal.SIGINT,)])
def test_sigterm_ends_it_at_once(opens, host, before):
    process = opens()
    for signum in (*before, signal.SIGTERM):
        process.signal(signum)
    assert process.wait() in {-signal.SIGTERM, ExitStatus.INTERRUPTED}
    assert ADDRESS.backend not in host.tree()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_what_came_while_signals_were_blocked_gives_it_up(opens, signum):
    """As they are where a program has become this one, which takes its disk over."""
    process = opens(prefix=(sys.executable, "-c", BLOCKED))
    process.signal(signum)
    assert ExitStatus.INTERRUPTED == process.wait()
    assert "given up" in process.err


def test_an_image_that_opens_late_is_served(opens, host, hanging):
    process = opens()
    hanging.answer()
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS)
    frontend.connect()
    process.until(" rw")
    process.signal(signal.SIGINT)
    process.until("asked the guest")
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()
    frontend.close()


def test_a_command_that_hangs_ends_with_the_second_ctrl_c(processes, hanging, tmp_path):
    """The first may yet have something undone."""
    processes.install(HURRY)
    process = processes.start("export", str(hanging.path), str(tmp_path / "copy"))
    assert hanging.opened.wait(30)
    process.signal(signal.SIGINT)
    process.until(f"the system does not return, /proc/{process.pid}/stack shows why: Ctrl-C again")
    assert not process.is_over
    process.signal(signal.SIGINT)
    assert ExitStatus.INTERRUPTED == process.wait()


def test_a_cluster_that_does_not_answer_is_given_up(processes, tmp_path):
    """Its library waits for minutes, and comes back for no signal."""
    try:
        ctypes.CDLL("librbd.so.1")
    except OSError as error:
        pytest.skip(str(error))
    processes.install(HURRY)
    with socket.create_server(("127.0.0.1", 0)) as monitor:
        conf = tmp_path / "ceph.conf"
        conf.write_text(f"[global]\nmon_host = 127.0.0.1:{monitor.getsockname()[1]}\n")
        options = ("--path", "rbd:rbd/image", "--option", f"conf={conf}")
        process = processes.start("connect", "guest", *options)
        monitor.settimeout(30)
        with monitor.accept()[0]:
            process.until("rbd:rbd/image is not open after 0.2 s")
            process.signal(signal.SIGINT)
            assert ExitStatus.INTERRUPTED == process.wait()
    assert "rbd:rbd/image: given up" in process.err


UNDOES = """
import os, signal, sys, time
from xen_disk_py.commands import signals
from xen_disk_py.commands.environment import Environment

signals._GRACE = 0.05
with signals.ended_though_it_hangs(Environment(), "a disk"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        time.sleep(1)
        print("undone")
assert signal.default_int_handler is signal.getsignal(signal.SIGINT)
assert -1 == signal.set_wakeup_fd(-1)
"""


def test_who_has_taken_the_signal_has_all_the_time_to_undo_what_it_has_done():
    done = subprocess.run([sys.executable, "-c", UNDOES], capture_output=True, check=True)
    assert (b"undone\n", b"") == (done.stdout, done.stderr)


def test_nothing_stays(host):
    threads, descriptors = threading.active_count(), os.listdir("/proc/self/fd")
    handler = signal.getsignal(signal.SIGINT)
    for what in ("a disk", None):
        with ended_though_it_hangs(host.environment(), what):
            assert threads + 1 == threading.active_count()
        assert threads == threading.active_count()
        assert descriptors == os.listdir("/proc/self/fd")
        assert handler is signal.getsignal(signal.SIGINT)


def test_where_there_is_no_thread_it_is_done_nevertheless(host, monkeypatch):
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    descriptors = os.listdir("/proc/self/fd")
    with ended_though_it_hangs(host.environment(), "a disk"):
        pass
    assert descriptors == os.listdir("/proc/self/fd")


def test_another_thread_has_no_signals(host):
    def use():
        with ended_though_it_hangs(host.environment(), "a disk"):
            counts.append(threading.active_count())

    counts = [threading.active_count() + 1]
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert counts[:1] == counts[1:]
