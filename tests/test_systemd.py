"""What systemd is told, and that nothing depends on its listening."""

from __future__ import annotations

import socket

import pytest

from xen_disk_py.systemd import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told(tmp_path, monkeypatch, abstract):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        notify("READY=1", "STATUS=3 disks")
        assert b"READY=1\nSTATUS=3 disks" == listener.recv(100)


@pytest.mark.parametrize("name", [None, "", "/nowhere/notify"])
def test_nobody_listens(monkeypatch, name):
    if name is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify("READY=1")
