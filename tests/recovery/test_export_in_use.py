"""What is asked of the process that serves a disk while that is exported."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest

from xen_disk_py.errors import DeviceError
from xen_disk_py.recovery import export_in_use
from xen_disk_py.recovery.export_in_use import Exports

SIZE = 1 << 20


@pytest.fixture
def begin(tmp_path):
    """Ask for before-images with a descriptor; what stays open is found."""
    with open(tmp_path / "disk", "wb") as file:
        status = os.fstat(file.fileno())
        backend = SimpleNamespace(
            exported_fd=file.fileno(), size=SIZE, read=None, keep_before_images=lambda images: None
        )
        exports = Exports(SimpleNamespace(backend=backend))

        def begin(descriptor):
            request = {
                "file": [status.st_dev, status.st_ino],
                "size": SIZE,
                "descriptors": [descriptor],
            }
            exports.begin(request)

        before = os.listdir("/proc/self/fd")
        yield begin
        assert before == os.listdir("/proc/self/fd")


def test_a_descriptor_of_no_socket(begin, tmp_path):
    with (
        open(tmp_path / "other", "wb") as file,
        pytest.raises(DeviceError, match="the descriptor is no socket to send to"),
    ):
        begin(file.fileno())


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_there_is_no_thread(begin, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(export_in_use, "BeforeImages", fail)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(DeviceError, match="the guest overwrites cannot be kept"):
        begin(theirs.fileno())
