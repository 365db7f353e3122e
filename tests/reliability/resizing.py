"""A disk of two queues in processes, one of which is killed at a line of a resize; its successor.

Run as a program, it plays the frontend, which reads and writes all the time. The process that
resizes, or that of a queue, is killed (SIGKILL) at its n-th line of a resize, and all end. Whoever
serves the image then has every byte that was acknowledged, and one size on both rings. Then n plus
a step, until a resize gets through before its n-th line comes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import random
import select
import signal
import struct
import sys
import tempfile
import time

from xen_disk_py.backends import image, raw
from xen_disk_py.blkif import ERROR, OKAY, READ, WRITE, X86_64, Ring, Transfer, decode_response
from xen_disk_py.datapath import disk as disk_module
from xen_disk_py.datapath import processes, statistics
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.journal import SIZE, Journal
from xen_disk_py.datapath.processes import QueueProcesses
from xen_disk_py.datapath.queue import Options
from xen_disk_py.datapath.statistics import WORDS, Statistics
from xen_disk_py.errors import ImageError
from xen_disk_py.ring import FrontRing
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine

DOMID = 5
PAGE = 4096
SMALL, LARGE = 16, 32  # pages
MAIN = "main"
TRACED = {module.__file__ for module in (disk_module, processes, statistics, image, raw)}
PATIENCE = 60.0  # seconds; a busy machine may stop a process for many

disk_module.SETTLING = processes.ANSWER = PATIENCE


class SlowImage(raw.RawBackend):
    """Takes a moment for each write to the part that comes or goes."""

    def write(self, buffers, offset):
        if offset >= SMALL * PAGE:
            time.sleep(0.003)
        return super().write(buffers, offset)

    write_nowait = write


class Lane:
    """A ring, and pages for as many requests as may be under way."""

    def __init__(self, guest, stack):
        self.pages = stack.enter_context(guest.share_pages(0, 1, writable=True))
        self.data = stack.enter_context(guest.share_pages(0, 8, writable=True))
        self.channel = stack.enter_context(guest.bind_unbound(0))
        self.ring = FrontRing(self.pages.view, X86_64.slot_size, guest.fence)
        stack.callback(self.ring.close)
        self.journal = mmap.mmap(-1, SIZE)
        self.free = list(range(8))
        self.under_way = {}

    def put(self, operation, page, content=b""):
        """Have a page read or written."""
        slot = self.free.pop()
        at = PAGE * slot
        self.data.view[at : at + len(content)] = content
        ref = self.data.refs[slot]
        request = Transfer(slot, operation, 8 * page, 8, (ref,), (0,), (7,))
        self.ring.put(X86_64.encode(request).ljust(X86_64.slot_size, b"\0"))
        self.under_way[slot] = (operation, page, content)

    def take(self):
        """Each answer: the request, its status, and what was read."""
        for response in map(decode_response, self.ring.take()):
            self.free.append(response.id)
            at = PAGE * response.id
            data = bytes(self.data.view[at : at + PAGE])
            yield (*self.under_way.pop(response.id), response.status, data)


class Guest:
    """Reads and writes pages, and knows what was acknowledged."""

    def __init__(self, path, before, after, stack):
        self.path, self.before, self.after = path, before, after
        self.machine = stack.enter_context(SimulatedMachine(domid=DOMID, pages=64))
        guest = stack.enter_context(SimulatedGuest(self.machine))
        self.lanes = [Lane(guest, stack) for _ in range(2)]
        self.dice = random.Random(before)
        self.acknowledged = {page: bytes(PAGE) for page in range(before)}
        self.answers = 0
        self.is_shrunk = False  # what is put from now on lies beyond

    def step(self, *, is_more=True):
        """Take what was answered; put a few requests more."""
        busy = {page for lane in self.lanes for _, page, _ in lane.under_way.values()}
        for lane in self.lanes:
            for answer in lane.take():
                self.answers += 1
                self.judge(*answer)
        length = os.stat(self.path).st_size // PAGE
        assert length in (self.before, self.after), f"{length} pages long"
        assert length == self.after or not self.is_shrunk, "longer again"
        self.is_shrunk = self.is_shrunk or length < self.before
        for lane in self.lanes:
            while is_more and len(lane.free) > 4:
                page = self.dice.randrange(LARGE + 4)
                if page not in busy:
                    busy.add(page)
                    content = struct.pack("<Q", self.dice.getrandbits(63) + 1) * (PAGE // 8)
                    lane.put(*self.dice.choice([(READ, page), (WRITE, page, content)]))
            if lane.ring.push():
                lane.channel.notify()

    def judge(self, operation, page, content, status, data):
        """Compare an answer with what it may be."""
        assert status in (OKAY, ERROR)
        if page < SMALL:
            assert status == OKAY, f"page {page}"
        elif page >= LARGE:
            assert status == ERROR, f"page {page} is answered {status}"
        if status == OKAY and operation == WRITE:
            self.acknowledged[page] = content
        elif status == OKAY and not self.is_shrunk:
            assert data == self.acknowledged.get(page, bytes(PAGE)), f"page {page}"

    def generation(self, victim, cut, size):
        """Have the disk served until it is killed; tell whether the resize got through."""
        ended, lives = os.pipe()
        go, ask = os.pipe()
        done, tell = os.pipe()
        pid = os.fork()
        if not pid:
            for descriptor in (ended, ask, done):
                os.close(descriptor)
            try:
                self.serve(victim, cut, go, tell)
            finally:
                os._exit(4)
        for descriptor in (lives, go, tell):
            os.close(descriptor)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        try:
            if size is not None:
                self.until(lambda: self.answers > 40, poll)
                os.write(ask, str(size).encode())
                self.until(lambda: select.select([done], [], [], 0)[0], poll)
                self.answers = 0
                if not poll.poll(0):
                    self.until(lambda: self.answers > 40, poll)
            else:
                self.check(poll)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.read(ended, 1)  # its forks have ended
            is_through = os.read(done, 1) == b"!"
            for descriptor in (ended, ask, done):
                os.close(descriptor)
            self.machine.bury_backend()
        return is_through

    def until(self, condition, poll, *, is_more=True):
        """Serve the rings until then, or until the backend has died."""
        rounds = 0
        while not condition():
            self.step(is_more=is_more)
            if poll.poll(2):
                return
            rounds += 1
            assert rounds < PATIENCE * 500, "no answers"

    def check(self, poll):
        """See that a successor has all, and the same size on both rings."""
        self.until(lambda: not any(lane.under_way for lane in self.lanes), poll, is_more=False)
        size = os.stat(self.path).st_size // PAGE
        for lane in self.lanes:
            for first in range(0, LARGE + 2, 8):
                for page in range(first, min(first + 8, LARGE + 2)):
                    lane.put(READ, page)
                lane.ring.push()
                lane.channel.notify()
                answers = []
                while len(answers) < min(8, LARGE + 2 - first):
                    answers.extend(lane.take())
                    assert not poll.poll(1), "a successor has died"
                for _, page, _, status, data in answers:
                    assert status == (OKAY if page < size else ERROR), (page, size, status)
                    if page < size and page in self.acknowledged:
                        expected = self.acknowledged[page]
                        is_new = page >= self.before and data == bytes(PAGE)
                        assert data == expected or is_new, f"page {page} of {size}"

    def open_image(self):
        """Open it when the kernel has taken the locks from the last that has ended."""
        for attempt in range(1000):
            with contextlib.suppress(ImageError):
                return SlowImage(self.path)
            time.sleep(0.001 * attempt)
        raise AssertionError("the image is locked")

    def serve(self, victim, cut, go, tell):
        """Be the process of a disk, which resizes it when it is told."""
        logging.disable()  # that a process has ended, and what is refused
        lines, is_amid = 0, False

        def trace(frame, event, argument):
            nonlocal lines, is_amid
            if event == "call" and frame.f_code.co_filename not in TRACED:
                return None
            is_amid = is_amid or victim == MAIN or frame.f_code.co_name == "_check"
            if event == "line" and is_amid:
                lines += 1
                if lines == cut:
                    time.sleep(0.02)  # the others continue meanwhile
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        def prepare(number):
            if cut and number == victim:
                sys.settrace(trace)
            return SimulatedHypervisor(self.machine)

        words = memoryview(mmap.mmap(-1, 8 * WORDS)).cast("Q")
        disk = Disk(self.open_image(), Statistics(words))
        journals = [Journal(memoryview(lane.journal)) for lane in self.lanes]
        options = Options(8, Grants.AUTO)
        forks = QueueProcesses(disk, options, journals, prepare)
        for number, lane in enumerate(self.lanes):
            queue = forks.open_queue(
                SimulatedHypervisor(self.machine),
                DOMID,
                Ring(tuple(lane.pages.refs), lane.channel.port),
                X86_64,
                disk,
                options=options,
                persistent=True,
                sharers=2,
                number=number,
                journal=journals[number],
                statistics=disk.statistics.of_queue(number),
                on_failure=lambda error: os._exit(3),
            )
            assert queue.start()
        size = int(os.read(go, 20) or signal.pause())
        if cut and victim == MAIN:
            sys.settrace(trace)
        assert size == disk.resize(size, force=True)
        sys.settrace(None)
        os.write(tell, b"!")
        while True:
            signal.pause()


def main(setting):
    """Cut at one line in so many."""
    before, after = setting["pages"]
    cut, cuts, is_through = 1 + random.randrange(setting["step"]), 0, False
    while not is_through:
        with contextlib.ExitStack() as stack:
            path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "disk.raw")
            with open(path, "wb") as file:
                file.truncate(before * PAGE)
            guest = Guest(path, before, after, stack)
            try:
                is_through = guest.generation(setting["victim"], cut, after * PAGE)
                assert not is_through or os.stat(path).st_size == after * PAGE
                guest.generation(None, 0, None)
            except AssertionError as error:
                raise AssertionError(f"cut at line {cut}: {error}") from None
        cuts += not is_through
        cut += setting["step"]
    print(json.dumps({"lines": cut - setting["step"], "cuts": cuts}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
