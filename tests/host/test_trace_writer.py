"""The process that waits for the end of a disk's, as others on the host see it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from xen_disk_py.host import trace_writer
from xen_disk_py.trace.shared import IS_OVER

PATIENCE = 30.0
START = """
import os, sys
from xen_disk_py.host import trace_writer
from xen_disk_py.trace.shared import IS_OVER

memory = os.memfd_create("memory")
os.pwrite(memory, (1).to_bytes(8, sys.byteorder), 8 * IS_OVER)
os.ftruncate(memory, 4096)
ended, alive = os.pipe()
os.setresgid(65534, 65534, 65534)
trace_writer.start(memory, memory, ended, sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


def named(name):
    """The ids of the processes that wait for the end of that trace's."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as line, open(f"/proc/{pid}/comm") as comm:
                is_it = line.read().endswith(f"\0{name}\0".encode())
                if is_it and comm.read() == "xen-disk-trace\n":
                    found.append(int(pid))
        except OSError:
            pass
    return found


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to have another group")
def test_another_process_of_that_user_cannot_look_into_it(tmp_path):
    """It holds what the guest has written; the disk's own process is hidden, too."""
    name = str(tmp_path / "a.xdt")
    command = [sys.executable, "-c", START, name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert b"\n" == process.stdout.readline()
        until(lambda: named(name))
        (pid,) = named(name)
        assert 0 == os.stat(f"/proc/{pid}/fd").st_gid  # of one that can be looked into, its own
        assert 65534 == os.stat(f"/proc/{pid}").st_gid
    until(lambda: not named(name))


def test_one_that_starts_slowly_leaves_no_zombie(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def starting(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(trace_writer, "_PATIENCE", 0)
    monkeypatch.setattr(subprocess, "Popen", starting)
    memory = os.memfd_create("memory")
    ended, alive = os.pipe()
    try:
        os.pwrite(memory, (1).to_bytes(8, sys.byteorder), 8 * IS_OVER)
        os.ftruncate(memory, 4096)
        trace_writer.start(memory, memory, ended, str(tmp_path / "a.xdt"))
        until(lambda: started[0].returncode is not None)
    finally:
        for each in (memory, ended, alive):
            os.close(each)
    assert 0 == started[0].returncode
    until(lambda: not named(str(tmp_path / "a.xdt")))
    until(lambda: "trace-start" not in [each.name for each in threading.enumerate()])
