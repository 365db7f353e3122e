"""What systemd is told, that nothing depends on its listening, and what it says."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from xen_disk_py.host.systemd import notify, watchdog_interval


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told(tmp_path, monkeypatch, abstract):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        notify("READY=1", "STATUS=3 disks")
        assert b"READY=1\nSTATUS=3 disks" == listener.recv(100)


def test_no_name_of_a_guest_becomes_an_assignment(tmp_path, monkeypatch):
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        notify("STATUS=xvdb of a\nMAINPID=1\udcff")
        assert b"STATUS=xvdb of a\\nMAINPID=1\\xff" == listener.recv(100)


@pytest.mark.parametrize("name", [None, "", "/nowhere/notify"])
def test_nobody_listens(monkeypatch, name):
    if name is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify("READY=1")


def test_a_listener_that_has_stopped_is_not_waited_for(tmp_path, monkeypatch):
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setattr("xen_disk_py.host.systemd._PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.sendto(b"WATCHDOG=1", path)
                sent += 1
        assert sent
        before = time.thread_time()
        notify("READY=1")
        assert time.thread_time() - before < 0.02  # it sleeps until there is room, or no longer
        assert [b"WATCHDOG=1"] * sent == [listener.recv(100) for _ in range(sent)]
        with pytest.raises(BlockingIOError):
            listener.recv(100)


@pytest.mark.parametrize(
    ("microseconds", "pid", "expected"),  # the pid less ours
    [
        ("60000000", None, 60.0),
        ("1500000", 0, 1.5),
        ("60000000", 1, None),  # for who started us
        ("60000000", "", None),
        (None, None, None),
        (None, 0, None),
        ("", None, None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
    ],
)
def test_how_long_we_may_be_silent(monkeypatch, microseconds, pid, expected):
    if isinstance(pid, int):
        pid += os.getpid()
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    assert expected == watchdog_interval()
