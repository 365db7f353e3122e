"""Real NBD servers: nbdkit and qemu-nbd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from xen_disk_py.backends.nbd.libnbd import NBD
from xen_disk_py.errors import XenUnavailable

PATIENCE = 30.0


def pytest_collection_modifyitems(items):
    try:
        NBD.load()
        missing = ""
    except XenUnavailable as error:
        missing = str(error)
    for item in items:
        if item.path.parent.name == "nbd" and missing:
            item.add_marker(pytest.mark.skip(reason=missing))


def stop(pid):
    """Stop a child, and wait until all its threads have."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


class Server:
    """A server on a socket, which can be killed and started again."""

    def __init__(self, command, path):
        self.path = path
        self.uri = f"nbd+unix:///?socket={path}"
        self._command = command
        self._process = None

    def start(self):
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.path))
                except OSError:
                    assert self._process.poll() is None, "the server ended"
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                else:
                    break

    def stop(self):
        """Stop it where it is: it answers nothing."""
        stop(self._process.pid)

    def resume(self):
        self._process.send_signal(signal.SIGCONT)

    def kill(self, signum=signal.SIGKILL):
        if self._process is not None:
            self._process.send_signal(signum)
            self._process.wait(PATIENCE)
            self._process = None


@pytest.fixture
def serve(tmp_path):
    """Start a server: ``serve("nbdkit", "memory", "1M")``; skip the test if there is none."""
    servers = []

    def start(program, *arguments):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
        path = tmp_path / f"nbd{len(servers)}.sock"
        if program == "nbdkit":
            command = ["nbdkit", "-f", "-U", str(path), *arguments]
        else:
            command = ["qemu-nbd", "-t", "-k", str(path), "--shared=8", *arguments]
        server = Server(command, path)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()
