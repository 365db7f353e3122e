"""A process killed at any line of a resize, under load on four queues; its successor ends that."""

from __future__ import annotations

import itertools
import threading

import pytest
from long_run import stride

from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.xenbus.states import Address, State

ADDRESS = Address(0, 5, 51728, "vbd3")
MIB = 1 << 20
BLOCK, BLOCKS = 16384, 32

HOOK = """
import signal
import xen_disk_py.recovery.supervisor
from xen_disk_py.datapath import disk
from xen_disk_py.xenbus import device, resize

xen_disk_py.recovery.supervisor.Supervisor.__init__.__kwdefaults__["delays"] = (0.0,) * 1000
FILES = {module.__file__ for module in (disk, device, resize, record)}
answer = device.Device._answer_resize_requests

def traced(self):
    if not self._store.list(f"{self.address.backend}/resize") or not os.path.exists(TARGET):
        return answer(self)
    with open(TARGET) as file:
        target = int(file.read())
    os.unlink(TARGET)
    seen = 0

    def line(frame, event, argument):
        nonlocal seen
        seen += event == "line"
        if seen == target:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in FILES else None)
    answer(self)
    sys.settrace(None)
    open(TARGET + ".passed", "w").close()

device.Device._answer_resize_requests = traced
"""
"""Kills a process at the line of a resize that the file TARGET says, once."""


class Load(threading.Thread):
    """Writes blocks, on all rings at once, and reads them; follows the disk's size."""

    def __init__(self, frontend):
        super().__init__()
        self.sectors = 0
        self._frontend = frontend
        self._enough = False
        self.error = None
        self.start()

    def run(self):
        number = 0
        try:
            while not self._enough:
                number += 1
                self._round(number)
                self.sectors = self._frontend.look_again().sectors
        except BaseException as error:  # for end() to raise
            self.error = error

    def _round(self, number):
        frontend, got = self._frontend, {}
        blocks = {at: (number * BLOCKS + at).to_bytes(8, "big") * 2048 for at in range(BLOCKS)}
        for at, block in blocks.items():
            frontend.submit(WRITE, at * BLOCK, block)
        frontend.drain()
        for at in blocks:

            def keep(data, at=at):
                got[at] = bytes(data)

            frontend.submit(READ, at * BLOCK, length=BLOCK, done=keep)
        frontend.drain()
        assert blocks == got

    def end(self):
        self._enough = True
        self.join()
        if self.error is not None:
            raise self.error


@pytest.mark.timeout(600)
def test_killed_at_any_line_of_a_resize(host, processes, tmp_path):
    """The command has its answer, from the successor; so has the next."""
    target, passed = tmp_path / "target", tmp_path / "target.passed"
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    processes.install(HOOK.replace("TARGET", repr(str(target))))
    where = ("--vdev=xvdb", "--path", str(tmp_path / "disk.raw"), "--backend=raw", "--queues=4")
    process = processes.start("connect", "guest", "--supervise", *where)
    host.until(lambda: ADDRESS.backend in host.tree())
    frontend = host.frontend(ADDRESS, queues=4)
    frontend.connect()
    process.until("raw rw")
    load = Load(frontend)
    size = MIB

    def resize():
        nonlocal size
        size += 4096
        asked = processes.start("resize", "guest", "xvdb", str(size))
        assert (ExitStatus.OK, "") == (asked.wait(), asked.err)
        host.until(lambda: load.error or load.sectors == size // 512)

    first, step = stride(20)
    for kills, line in enumerate(itertools.count(first, step), 1):
        target.write_text(str(line))
        resize()
        host.until(
            lambda: passed.exists() or process.err.count("takes over\n") == kills  # noqa: B023 - called now
        )
        if passed.exists():
            break
        resize()
    load.end()
    assert line > 60
    process.signal()
    host.until(lambda: frontend.backend_state is State.CLOSING)
    frontend.disconnect()
    assert ExitStatus.OK == process.wait()
