"""No wake-up of a queue's thread is lost, wherever it is when somebody asks something of it.

The thread's loop runs in the test's own thread, on real queues, rings and pipes. At the n-th line
that it executes, somebody acts; for each n, one a run. Then it must not sleep with something to do:
``poll``, which does not wait here, finds nothing, and what was asked for has not been done.
"""

from __future__ import annotations

import random
import sys
import threading
from types import SimpleNamespace

import pytest
from long_run import LONG

from datapath.test_queue import Ailing, flush, one, queue_of
from xen_disk_py.backends.queues import here
from xen_disk_py.blkif import OKAY, READ, WRITE_BARRIER, X86_64, decode_response
from xen_disk_py.datapath import idle, queue_thread, retry
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.drained import DrainedSection
from xen_disk_py.ring import FrontRing
from xen_disk_py.synchronizing import HAS_GIL

TRACED = {module.__file__ for module in (queue_thread, idle)}
STEP = 1 if LONG else 11  # each line, or one of so many, by chance others each time
ERROR = -1

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not HAS_GIL, reason="each queue has a thread of its own"),
]


class LostWakeup(BaseException):
    """The thread would sleep with something to do; an ``Exception`` would only end a queue."""


class Drained(DrainedSection):
    """Left as soon as it is entered: whoever changes the disk is in the queues' thread here."""

    times = 0

    def want(self):
        with self._changed:
            self.is_wanted = True
            for ask in self._threads.values():
                ask()

    def enter(self, thread, ask):
        if self.is_wanted:
            self.times += 1
            self.is_wanted = False
        super().enter(thread, ask)

    def wait(self, thread):
        self.times += 1
        self.is_wanted = False
        for ask in self._threads.values():
            ask()


class Lane:
    """A queue, and its guest's side."""

    def __init__(self, host, number):
        self.guest, self.number = host.guest, number
        self.pages = host.share()

    def begin(self, host, disk):
        self.channel = self.guest.bind_unbound(0)
        self.pages.view[:] = bytes(len(self.pages.view))
        self.ring = FrontRing(self.pages.view, X86_64.slot_size, self.guest.fence)
        self.answers = {}
        port = self.channel.port
        self.queue = queue_of(host, self.pages.refs, port, disk, print, None, self.number)

    def put(self, request):
        self.ring.put(X86_64.encode(request).ljust(X86_64.slot_size, b"\0"))
        if self.ring.push():
            self.channel.notify()

    def status(self, id_):
        for answer in map(decode_response, self.ring.take()):
            self.answers[answer.id] = answer.status
        return self.answers.get(id_)


class Run:
    """The thread, from its first queue to the end of its last; two are served, one is not yet.

    Args:
        lanes: three of them.
        page: of the guest, for reads.
        barriers: the queues that are amid a barrier, whose retries are paused.
        act: a method; called at line ``cut``, or when the thread sleeps if that is earlier.
        is_late: whoever acts has written the byte that wakes the thread, and comes no further
            until the thread would sleep.
    """

    def __init__(self, host, lanes, page, barriers, act, cut, *, is_late):
        self.lanes, self.page, self.barriers = lanes, page, barriers
        self.act, self.cut, self.is_late = act, cut, is_late
        self.lines, self.phase, self.is_amid, self.is_pending = 0, "before", False, False
        self.backend = Ailing(1, "flush")
        self.disk = Disk(self.backend, holds=True)
        self.disk.drained = self.drained = Drained()
        self.disk.threads = queue_thread.QueueThreads(self.drained)
        for lane in lanes:
            lane.begin(host, self.disk)
            lane.queue.pause_retries(True)
        self.thread = lanes[0].queue._thread
        self._wake, self.thread.wake = self.thread.wake, self.wake
        pace = SimpleNamespace(is_quick=False, window=0.0, is_to_be_timed=lambda: False)
        self.thread.idle._pace = pace
        self._sleeper, self.thread.idle._sleeper = self.thread.idle._sleeper, self

    # -- what is put in the thread's way -----------------------------------------------

    def __getattr__(self, name):
        return getattr(self._sleeper, name)

    def wake(self):
        before = self.thread._asked
        self._wake()
        if self.is_late:
            self.thread._asked, self.is_pending = before, True

    def trace(self, frame, event, arg):
        if event == "call" and frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            self.lines += 1
            if self.lines > self.cut + 5000:
                raise LostWakeup(f"no end of it, {self.act} at line {self.cut}, {self.phase}")
            # Whoever wants the lock while the thread has it comes when that has given it back.
            if self.phase == "before" and self.lines >= self.cut and not self.thread._lock.locked():
                self.is_amid = True
                self.do()
        return self.trace

    def poll(self, milliseconds):
        while True:
            if self.is_pending:
                self.thread._asked, self.is_pending = True, False
            ready = self._sleeper.poll(0)
            if ready:
                return ready
            self.next()

    def next(self):
        """The thread sleeps: see what is done, and take the next step."""
        if self.phase == "before":
            self.do()
        elif self.phase == "acted":
            self.see(is_repaired=False)
            self.phase = "repaired"
            self.backend.repair()
            for lane in self.lanes:
                lane.queue.pause_retries(False)
        elif self.phase == "repaired":
            self.see(is_repaired=True)
            self.phase = "stopping"
            for lane in self.lanes:
                lane.queue.ask_to_stop()
        else:
            raise LostWakeup("asked to stop")

    def see(self, *, is_repaired):
        if not self.is_done(is_repaired=is_repaired):
            raise LostWakeup(f"{self.act}, at line {self.cut}, {self.phase}")
        if is_repaired and None in [self.lanes[number].status(0) for number in self.barriers]:
            raise LostWakeup(f"a barrier, {self.act} at line {self.cut}")

    def do(self):
        self.phase = "acted"
        getattr(self, self.act)()

    # -- what somebody does, and what must come of it ----------------------------------

    def stop_first(self):
        self.lanes[0].queue.ask_to_stop()

    def stop_second(self):
        self.lanes[1].queue.ask_to_stop()

    def retry(self):
        self.backend.repair()
        self.lanes[0].queue.pause_retries(False)

    def drain(self):
        self.drained.want()

    def start(self):
        self.lanes[2].put(one(7, READ, 0, self.page))
        assert self.lanes[2].queue.start()

    def request(self):
        self.lanes[1].put(one(7, READ, 0, self.page))

    def is_done(self, *, is_repaired):
        lanes = self.lanes
        if self.act in ("stop_first", "stop_second"):
            lane = lanes[self.act == "stop_second"]
            if is_repaired or len(self.barriers) < 2:
                return lane.queue._ended.is_set()
            return lane.status(0) is not None  # it ends when the other does
        if self.act == "retry":
            return 0 not in self.barriers or lanes[0].status(0) == OKAY
        if self.act == "drain":
            return bool(self.drained.times) or bool(self.barriers and not is_repaired)
        lane = lanes[2 if self.act == "start" else 1]
        return lane.status(7) == OKAY or (lane.number in self.barriers and not is_repaired)

    def run(self):
        """Be the thread; tell whether somebody acted before it slept."""
        for number in self.barriers:
            self.lanes[number].put(flush(0, WRITE_BARRIER))
        for lane in self.lanes[:2]:
            assert lane.queue.start()
        self.thread.thread = threading.current_thread()
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            self.thread._run()
        finally:
            sys.settrace(before)
            here.number = -1  # no queue's thread any longer
        assert [True, True] == [lane.queue._ended.is_set() for lane in self.lanes[:2]]
        if not self.lanes[2].queue._has_started:
            self.lanes[2].queue._release()
        for lane in self.lanes:
            lane.ring.close()
            lane.channel.close()
        return self.is_amid


@pytest.mark.parametrize("barriers", [(), (0,), (0, 1)])
def test_wherever_the_thread_is_it_does_what_it_is_woken_for(host, monkeypatch, barriers):
    monkeypatch.setattr(retry, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    lanes = [Lane(host, number) for number in range(3)]
    page = host.share().refs[0]
    for act in ("stop_first", "stop_second", "retry", "drain", "start", "request"):
        for is_late in (False, True):
            cut, is_amid = 1 + random.randrange(STEP), True
            while is_amid:
                is_amid = Run(host, lanes, page, barriers, act, cut, is_late=is_late).run()
                cut += STEP
            assert cut > 100
