"""How much work requests take, counted: system calls and map operations, not seconds.

A faster machine does not make these pass, and a busy one does not make them fail. Counted are the
calls of the queue's thread into C that are system calls, and what the hypervisor was asked for.
"""

from __future__ import annotations

import collections
import random
import select
import struct
import threading
from math import inf

import pytest

from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import READ, WRITE, Indirect, Transfer
from xen_disk_py.datapath import polling, queue
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import Grants

SYSTEM_CALLS = {"poll", "preadv", "pwrite", "pwritev", "read", "write", "fdatasync"}
DEPTH = 32
PATIENCE = 30
SLEEP = 2  # poll, then the event is acknowledged: for each time that there was nothing to do


class Work:
    """A ring whose queue's thread is watched; its disk is a file."""

    def __init__(self, host, path, **options):
        self.calls = collections.Counter()
        self.in_python = self.in_c = self.batches = 0  # calls amid batches, and those
        self._is_amid = False
        self._is_watched = threading.Event()
        self.host = host
        disk = Disk(RawBackend(str(path)))
        host._stack.callback(disk.close)
        threading.setprofile(self._note)
        try:
            self.line = host.line(disk, **options)
            assert self._is_watched.wait(PATIENCE)  # it looks for a profile after it has started
        finally:
            threading.setprofile(None)

    def _note(self, frame, event, what):
        self._is_watched.set()
        if event == "c_call" and what.__name__ in SYSTEM_CALLS:
            self.calls[what.__name__] += 1
        if frame.f_code is queue.Queue._serve.__code__ and event in {"call", "return"}:
            self._is_amid = event == "call"
            self.batches += self._is_amid
        elif self._is_amid:
            self.in_python += event == "call"
            self.in_c += event == "c_call"

    def _settle(self):
        """Wait until all is counted and told that belongs to the answers there are."""
        self.host.until(lambda: self.line.disk.statistics.as_dict()["in_flight"] == 0)

    def wait_for_quiet(self):
        """Wait until no event is left to be looked at."""
        channel = self.line.queue._channel.fileno()
        self.host.until(lambda: not select.select([channel], [], [], 0)[0])

    def of(self, *requests):
        """Have requests done, once to warm up, then again; the work of the second time."""
        self.line.ask(*requests)
        self.line.ask(*requests)
        self._settle()
        counters = self.host.hypervisor.counters
        self.calls.clear()
        self.in_python = self.in_c = self.batches = 0
        before = counters.maps, counters.unmaps, counters.copies, counters.notifications
        answers = self.line.ask(*requests)
        assert {0} == {answer.status for answer in (answers if len(requests) > 1 else [answers])}
        self._settle()
        after = counters.maps, counters.unmaps, counters.copies, counters.notifications
        maps, unmaps, copies, notifications = (b - a for a, b in zip(before, after))
        calls = {name: self.calls[name] for name in SYSTEM_CALLS}
        return {**calls, "maps": maps + unmaps, "copies": copies, "notifications": notifications}


@pytest.fixture
def work(host, tmp_path, monkeypatch):
    monkeypatch.setattr(polling, "_MOST", 0.0)  # busy-polling is bounded by time, not counts
    # Nor is publishing because a request took long: a busy machine may stop us anywhere.
    monkeypatch.setattr(queue, "coarse", lambda: 0.0)
    monkeypatch.setattr(queue, "_SLOW", inf)
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(4 << 20))
    return lambda **options: Work(host, path, **options)


def small(host, operation, count):
    """Requests of one page each, all over the disk."""
    dice = random.Random(2)
    refs = host.share(count).refs
    places = dice.sample(range(512), count)
    return [
        Transfer(number, operation, 8 * place, 8, (ref,), (0,), (7,))
        for number, (place, ref) in enumerate(zip(places, refs))
    ]


@pytest.mark.parametrize(("operation", "call"), [(READ, "preadv"), (WRITE, "pwrite")])
def test_small_requests_take_one_call_each(host, work, operation, call):
    done = work(persistent=True).of(*small(host, operation, DEPTH))
    assert 0 == done["maps"] == done["copies"] == done["fdatasync"]
    assert DEPTH == done["preadv"] + done["pwrite"] + done["pwritev"] == done[call]
    assert done["notifications"] <= 1
    assert done["write"] == done["notifications"]
    assert done["poll"] + done["read"] <= 3 * SLEEP


@pytest.mark.parametrize(("operation", "calls"), [(READ, 5), (WRITE, 6)])
def test_small_requests_take_few_calls_of_functions(host, work, operation, calls):
    """One in Python, the backend's; in C a look-up, the system call, and two for the answer.

    A write takes one more: one buffer goes by another call than several. And a batch takes up to 10
    more where libatomic is missing: a fence is a function in Python then, which takes a lock.
    """
    watched = work(persistent=True)
    watched.of(*small(host, operation, DEPTH))
    for_a_batch = 70
    assert watched.in_python <= DEPTH + for_a_batch / 2 * watched.batches
    assert watched.in_python + watched.in_c <= calls * DEPTH + for_a_batch * watched.batches


def test_a_large_request_takes_one_call(host, work):
    """A mebibyte of pages that lie side by side is one buffer for the system."""
    pages = host.share(257)
    table, *refs = pages.refs
    pages.view[: 8 * 256] = b"".join(struct.pack("<IBBxx", ref, 0, 7) for ref in refs)
    request = Indirect(1, READ, 0, 256, (table,))
    done = work(persistent=True).of(request)
    assert 0 == done["maps"] == done["copies"]
    assert 1 == done["preadv"]
    assert done["notifications"] <= 1
    assert done["poll"] + done["read"] <= 3 * SLEEP


def test_a_mebibyte_in_several_requests_takes_one_call(host, work):
    """Linux's driver cuts what a program reads into requests of 128 KiB or less."""
    refs = [host.share(8).refs for _ in range(DEPTH)]
    requests = [
        Transfer(number, READ, 64 * number, 64, tuple(pages), (0,) * 8, (7,) * 8)
        for number, pages in enumerate(refs)
    ]
    done = work(persistent=True).of(*requests)
    assert 0 == done["maps"] == done["copies"]
    assert 1 == done["preadv"]
    assert done["notifications"] <= 1


def test_without_a_promise_pages_are_copied_once_for_a_request(host, work):
    done = work(persistent=False).of(*small(host, READ, DEPTH))
    assert (0, DEPTH, DEPTH) == (done["maps"], done["copies"], done["preadv"])


def test_where_nothing_can_be_copied_pages_are_mapped_once_for_a_request(host, work):
    done = work(grants=Grants.MAP).of(*small(host, READ, DEPTH))
    assert (2 * DEPTH, 0, DEPTH) == (done["maps"], done["copies"], done["preadv"])


def test_a_disk_that_nobody_uses_makes_no_call(host, work):
    watched = work(persistent=True)
    watched.of(*small(host, READ, 4))
    watched.wait_for_quiet()
    watched.calls.clear()
    threading.Event().wait(0.3)
    assert watched.calls["poll"] <= 1  # the one that waits
    assert not sum(count for name, count in watched.calls.items() if name != "poll")
