"""Requests that wait while a guest uses the disk hold no thread."""

from __future__ import annotations

import threading

import pytest

from xen_disk_py.backends.loader import wrap
from xen_disk_py.blkif import OKAY, READ, WRITE, Transfer
from xen_disk_py.datapath import workers as workers_module


@pytest.mark.parametrize("idle", [[], ["log:file={},on=no"]])
def test_requests_wait_for_the_clock_and_no_thread_waits_with_them(
    host, monkeypatch, tmp_path, idle
):
    clock = [1000.0]
    monkeypatch.setattr(workers_module, "monotonic", lambda: clock[0])
    memory = host.memory()
    above = [text.format(tmp_path / "log") for text in idle]
    disk = wrap(memory, ["delay:read=3600s", *above])
    line = host.line(disk)
    workers = line.queue._workers
    before = set(threading.enumerate())
    refs = host.share(20, writable=True).refs
    line.put(*(Transfer(n, READ, 0, 8, (refs[n],), (0,), (7,)) for n in range(20)))
    line.kick()
    host.until(lambda: workers._timer is not None and len(workers._timer._waiting) == 20)
    assert 1 == len(set(threading.enumerate()) - before)
    assert [] == memory.calls

    line.put(Transfer(99, WRITE, 8, 8, (refs[0],), (0,), (7,)))  # has no time: it overtakes
    line.kick()
    assert [(99, OKAY)] == [(one.id, one.status) for one in line.responses(1)]

    clock[0] += 3600
    with workers._timer._changed:
        workers._timer._changed.notify()
    found = {(one.id, one.status) for one in line.responses(20)}
    assert {(number, OKAY) for number in range(20)} == found
    disk.close()
