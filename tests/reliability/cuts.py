"""A queue that is killed at every line it executes, and its successors.

Run as a program, it plays the frontend. Backends are forked: the first is killed (SIGKILL) at its
n-th line, the second, on its results, at a line picked at random, the third lives. Then
each request must have been answered exactly once, and every byte be right. Then n + 1, until a
backend gets through before its n-th line comes.

A cut at every line is a cut between any two stores to the ring, the guest's pages, the journal,
the image and the event channel: none of these lines has two.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import mmap
import os
import random
import select
import signal
import struct
import sys
import threading
import traceback

from xen_disk_py import ring
from xen_disk_py.backends import Backend
from xen_disk_py.blkif import X86_32, X86_64, Ring, decode_response
from xen_disk_py.datapath import double_buffer, grants, journal, queue, queue_thread
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.grants import Grants
from xen_disk_py.datapath.journal import SIZE, Journal
from xen_disk_py.datapath.processes import QueueProcesses
from xen_disk_py.datapath.queue import Options, Queue
from xen_disk_py.exit_status import ExitStatus
from xen_disk_py.ring import FrontRing
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine

DOMID = 5
PAGE = 4096
READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6
TRACED = {
    module.__file__ for module in (queue, queue_thread, ring, journal, double_buffer, grants)
} | {__file__}
CRASHED = int(ExitStatus.CRASHED)
PATIENCE = 60.0  # seconds; a busy machine may stop a backend for many


class FileDisk(Backend):
    """A disk in a file that all generations share; every other read or write takes waiting."""

    def __init__(self, descriptor: int, size: int, threads: int) -> None:
        self.descriptor, self.size, self.threads = descriptor, size, threads

    def read(self, buffers, offset):
        return os.preadv(self.descriptor, buffers, offset)

    def write(self, buffers, offset):
        return os.pwritev(self.descriptor, buffers, offset)

    def read_nowait(self, buffers, offset):
        return self.read(buffers, offset) if offset // PAGE % 2 else 0

    def write_nowait(self, buffers, offset):
        return self.write(buffers, offset) if offset // PAGE % 2 else 0

    def flush(self):
        os.fdatasync(self.descriptor)

    def discard(self, offset, length):
        os.pwrite(self.descriptor, bytes(length), offset)


class Frontend:
    """The guest: a list of requests, each on a place of its own, and what they must do.

    With several ``queues`` there is one for each; the first knows the others.
    """

    SECTORS = 2048

    def __init__(self, setting, stack, first=None, number=0):
        self.abi = {"x86_64": X86_64, "x86_32": X86_32}[setting["abi"]]
        self.lanes = [self]
        self.first_sector = number * 1024
        if first is None:
            self.machine = stack.enter_context(SimulatedMachine(domid=DOMID, pages=256))
            self.file = os.memfd_create("disk")
            stack.callback(os.close, self.file)
        else:
            self.machine, self.file = first.machine, first.file
        self.guest = stack.enter_context(SimulatedGuest(self.machine))
        order = setting["order"]
        self.pages = stack.enter_context(self.guest.share_pages(0, 1 << order, writable=True))
        self.data = stack.enter_context(self.guest.share_pages(0, 64, writable=True))
        self.tables = stack.enter_context(self.guest.share_pages(0, 8, writable=True))
        self.channel = stack.enter_context(self.guest.bind_unbound(0))
        start = setting["start"]
        self.ring = FrontRing(self.pages.view, self.abi.slot_size, self.guest.fence, start)
        stack.callback(self.ring.close)
        self.before = b"".join(n.to_bytes(4, "big") for n in range(128 * self.SECTORS))
        os.pwrite(self.file, self.before, 0)
        self.after = bytearray(self.before)
        self.journal = mmap.mmap(-1, SIZE)
        self.checks = []
        self.slots = list(self._requests(setting["requests"]))
        self.answers = []
        self.sent = 0
        for more in range(1, setting.get("queues", 1) if first is None else 1):
            self.lanes.append(Frontend(setting, stack, self, more))

    def _lay_out(self, operation, id_, sector, segments):
        pad = self.abi.slot_size - 20 - 88
        head = struct.pack(f"<BBH{pad}xQQ", operation, len(segments), 0, id_, sector)
        return head + b"".join(struct.pack("<IBBxx", *segment) for segment in segments)

    def _requests(self, count):
        dice = random.Random(3)
        pad = self.abi.slot_size - 20 - 88
        kinds = WRITE, READ, DISCARD, FLUSH, INDIRECT, WRITE, BARRIER, READ
        for id_ in range(count):
            kind = kinds[id_ % len(kinds)]
            sector = self.first_sector + 24 * id_  # three pages apart: nothing overlaps
            where, at = 512 * sector, PAGE * id_
            segments = [(self.data.refs[id_], 0, 7)]
            if kind == FLUSH:
                yield self._lay_out(FLUSH, id_, 2**64 - 1, [])
            elif kind == DISCARD:
                self.after[where : where + PAGE] = bytes(PAGE)
                yield struct.pack(f"<BBH{pad}xQQQ", DISCARD, 0, 0, id_, sector, 8)
            elif kind in (WRITE, BARRIER):
                content = dice.getrandbits(8 * PAGE).to_bytes(PAGE, "big")
                self.data.view[at : at + PAGE] = content
                self.after[where : where + PAGE] = content
                yield self._lay_out(kind, id_, sector, segments)
            else:
                self.checks.append((at, self.before[where : where + PAGE]))
                if kind == READ:
                    yield self._lay_out(READ, id_, sector, segments)
                else:
                    page = id_ // len(kinds)
                    self.tables.view[page * PAGE : page * PAGE + 8] = struct.pack(
                        "<IBBxx", *segments[0]
                    )
                    head = struct.pack(f"<BBH{pad}xQQHxx", INDIRECT, READ, 1, id_, sector, 0)
                    yield head + struct.pack("<8I", self.tables.refs[page], *(0,) * 7)

    def step(self):
        """Take what was answered, put what there is room for."""
        self.answers.extend(map(decode_response, self.ring.take()))
        put = 0
        while self.sent < len(self.slots) and self.ring.free:
            self.ring.put(self.slots[self.sent].ljust(self.abi.slot_size, b"\0"))
            self.sent += 1
            put += 1
        if put and self.ring.push():
            self.channel.notify()

    @property
    def done(self):
        return all(len(lane.answers) >= len(lane.slots) for lane in self.lanes)

    def check(self):
        """Compare all with what must be."""
        for lane in self.lanes[1:]:
            lane.check()
        assert list(range(len(self.slots))) == sorted(a.id for a in self.answers), self.answers
        assert {0} == {answer.status for answer in self.answers}, self.answers
        for at, content in self.checks:
            assert content == self.data.view[at : at + PAGE], f"what was read into {at}"
        at, length = 512 * self.first_sector, 512 * (1024 if self.first_sector else self.SECTORS)
        if len(self.lanes) > 1:
            length //= 2
        assert self.after[at : at + length] == os.pread(self.file, length, at), "the disk"

    def backend(self, setting, cut):
        """Be a backend, in a process of its own, until line ``cut``; or indefinitely."""
        hypervisor = SimulatedHypervisor(self.machine)
        disk = Disk(FileDisk(self.file, 512 * self.SECTORS, setting["threads"]))
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            if event == "call" and frame.f_code.co_filename not in TRACED:
                return None
            if event == "line":
                lines += 1
                if lines == cut:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        def prepare(number):
            if cut and number == setting["victim"]:
                threading.settrace(trace)  # the queue's, which begins later
            return SimulatedHypervisor(self.machine)

        options = Options(8, Grants(setting["grants"]))
        journals = [Journal(memoryview(lane.journal)) for lane in self.lanes]
        open_queue = Queue
        if setting.get("victim") is not None:
            logging.disable()  # each time it would say that a process has ended
            open_queue = QueueProcesses(disk, options, journals, prepare).open_queue
        elif cut:
            sys.settrace(trace)
        queues = [
            open_queue(
                hypervisor,
                DOMID,
                Ring(tuple(lane.pages.refs), lane.channel.port),
                self.abi,
                disk,
                options=options,
                persistent=setting["persistent"],
                sharers=len(self.lanes),
                number=number,
                journal=journals[number],
                statistics=disk.statistics.of_queue(number),
                on_failure=lambda error: (
                    print(f"failed: {error!r}", file=sys.stderr) or os._exit(3)
                ),
            )
            for number, lane in enumerate(self.lanes)
        ]
        if open_queue is not Queue:
            for queue in queues:
                queue.start()
            while True:
                signal.pause()
        start, threading.Thread.start = threading.Thread.start, lambda thread: None
        for queue in queues:
            queue.start()  # in this thread, which may be the only one to be had
        threading.Thread.start = start
        queues[0]._thread.thread = threading.current_thread()
        queues[0]._thread._run()

    def generation(self, setting, number, cut):
        """Have a backend work until it dies, or until all is answered; True if it died."""
        ended, lives = os.pipe()  # of all its processes
        pid = os.fork()
        if not pid:
            os.close(ended)
            try:
                self.backend(setting, cut)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(4)
        os.close(lives)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        for lane in self.lanes:
            poll.register(lane.channel.fileno(), select.POLLIN)
        status = None
        try:
            while not self.done and status is None:
                for lane in self.lanes:
                    lane.step()
                if not self.done and not any(lane.ring.arm() for lane in self.lanes):
                    ready = dict(poll.poll(1000 * PATIENCE))
                    assert ready, f"{len(self.answers)} answers, and no event"
                    if ended in ready:
                        status = os.waitpid(pid, 0)[1]
                    for lane in self.lanes:
                        if lane.channel.fileno() in ready:
                            lane.channel.acknowledge()
        finally:
            if status is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            os.read(ended, 1)  # its forks have ended
            os.close(ended)
            self.machine.bury_backend()
        died = status is not None
        if died and setting.get("victim") is None:
            assert os.WIFSIGNALED(status), f"backend {number} ended with {status}"
        elif died:  # the other processes end with the one that was killed
            assert os.waitstatus_to_exitcode(status) == CRASHED, f"{number} ended with {status}"
        for lane in self.lanes:
            lane.step()
        return died


def main(setting):
    """Cut at every line, or at one in so many of them."""
    dice = random.Random(setting.get("seed", 1))
    cut, cuts, survived = 1 + dice.randrange(setting["step"]), 0, 0
    deaths = 0
    while not survived:
        with contextlib.ExitStack() as stack:
            frontend = Frontend(setting, stack)
            for lane in frontend.lanes:
                lane.step()
            if frontend.generation(setting, 0, cut):
                cuts += 1
                if dice.random() < 0.3:
                    deaths += frontend.generation(setting, 1, 1 + dice.randrange(1000))
                frontend.generation(setting, 2, 0)
            else:
                survived = cut
            assert frontend.done
            try:
                frontend.check()
            except AssertionError as error:
                raise AssertionError(f"cut at line {cut}: {error}") from None
        cut += setting["step"]
    print(json.dumps({"lines": survived, "cuts": cuts, "of successors": deaths}))


if __name__ == "__main__":
    gc.disable()
    main(json.loads(sys.argv[1]))
