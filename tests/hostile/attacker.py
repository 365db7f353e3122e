"""A guest that means harm: every byte of its ring, its pages and its indices is the test's."""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import time

import long_run
from rings import responses_of

from xen_disk_py.backends import Backend
from xen_disk_py.blkif import X86_64, Ring
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.queue import Options, Queue
from xen_disk_py.ring import FrontRing

LONG = long_run.LONG
"""Whether the event floods are to have their full length."""

DOMID = 5
PATIENCE = 30.0  # seconds for what must happen to happen
U32 = 0xFFFF_FFFF
BAD_REFERENCES = (0, 3, 5000, 0x7FFF_FFFF, U32)  # none of them is granted on a small machine


# -- requests, laid out without the product's own encoder -----------------------------------


def _padding(abi):
    return abi.slot_size - 20 - 88  # what the u64 behind the four leading bytes is aligned by


def direct(abi, operation, id_, sector, segments, count=None):
    """Lay out a request; ``count`` may lie about its segments, (reference, first, last) each."""
    count = len(segments) if count is None else count
    head = struct.pack(f"<BBH{_padding(abi)}xQQ", operation, count, 0, id_, sector)
    return (head + descriptors(segments[:11])).ljust(abi.slot_size, b"\0")


def indirect(abi, operation, id_, sector, count, refs):
    """Lay out an indirect request whose descriptors stand in the pages ``refs``."""
    refs = (*refs, *(0,) * (8 - len(refs)))
    head = struct.pack(f"<BBH{_padding(abi)}xQQHxx", 6, operation, count, id_, sector, 0)
    return (head + struct.pack("<8I", *refs)).ljust(abi.slot_size, b"\0")


def discard(abi, id_, sector, sectors, flag=0):
    """Lay out a discard."""
    head = struct.pack(f"<BBH{_padding(abi)}xQQQ", 5, flag, 0, id_, sector, sectors)
    return head.ljust(abi.slot_size, b"\0")


def descriptors(segments):
    """Lay out segments as they stand in a slot and in an indirect page."""
    return b"".join(struct.pack("<IBBxx", *segment) for segment in segments)


# -- a disk ---------------------------------------------------------------------------------


class Memory(Backend):
    """A disk in memory that notes its calls as (operation, offset, length).

    Attributes:
        before: called before each read and write with which it is; it may wait, or raise.
        at_once: says of an offset whether it takes no waiting, where several threads may be in.
    """

    def __init__(self, size=1 << 20, **attributes):
        self.data = bytearray(size)
        self.size = size
        self.calls = []
        self.before = lambda what: None
        self.at_once = lambda offset: False
        for name, value in attributes.items():
            setattr(self, name, value)

    def _buffers(self, what, buffers, offset):
        self.before(what)
        self.calls.append((what, offset, sum(map(len, buffers))))
        for buffer in buffers:
            yield buffer, slice(offset, offset + len(buffer))
            offset += len(buffer)

    def read(self, buffers, offset):
        for buffer, where in self._buffers("read", buffers, offset):
            buffer[:] = memoryview(self.data)[where]

    def write(self, buffers, offset):
        for buffer, where in self._buffers("write", buffers, offset):
            memoryview(self.data)[where] = buffer  # without a copy in between

    def read_nowait(self, buffers, offset):
        if not self.at_once(offset):
            return 0
        self.read(buffers, offset)
        return sum(map(len, buffers))

    def write_nowait(self, buffers, offset):
        if not self.at_once(offset):
            return 0
        self.write(buffers, offset)
        return sum(map(len, buffers))

    def flush(self):
        self.calls.append(("flush", 0, 0))

    def discard(self, offset, length):
        self.calls.append(("discard", offset, length))
        self.data[offset : offset + length] = bytes(length)


# -- a ring ---------------------------------------------------------------------------------


class Wire:
    """A ring of a hostile frontend and the queue that serves it.

    Args:
        start: where all four indices of the ring stand at first.
        before_start: called with this before the queue's thread runs.
    """

    def __init__(
        self,
        guest,
        hypervisor,
        disk,
        abi=X86_64,
        *,
        domid=DOMID,
        order=0,
        persistent=False,
        options=Options(),  # noqa: B008 - it cannot change
        number=0,
        start=0,
        before_start=lambda wire: None,
    ):
        self.abi = abi
        self.disk = disk if isinstance(disk, Disk) else Disk(disk)
        self.backend = self.disk.backend
        self.failures = []
        with contextlib.ExitStack() as undo:
            self.pages = undo.enter_context(guest.share_pages(0, 1 << order, writable=True))
            self.ring = FrontRing(self.pages.view, abi.slot_size, guest.fence, start)
            undo.callback(self.ring.close)
            self.channel = undo.enter_context(guest.bind_unbound(0))
            self.queue = Queue(
                hypervisor,
                domid,
                Ring(tuple(self.pages.refs), self.channel.port),
                abi,
                self.disk,
                options=options,
                persistent=persistent,
                statistics=self.disk.statistics.of_queue(number),
                on_failure=self.failures.append,
            )
            undo.pop_all()
        before_start(self)
        self.queue.start()

    def put(self, *slots):
        for slot in slots:
            self.ring.put(bytes(slot).ljust(self.abi.slot_size, b"\0"))

    def kick(self):
        if self.ring.push():
            self.channel.notify()

    def responses(self, count):
        """Wait for that many responses; the next has to come within ``PATIENCE``."""
        return responses_of(self, count)

    def ask(self, *slots):
        """Put requests, and return their responses."""
        self.put(*slots)
        self.kick()
        return self.responses(len(slots))

    @contextlib.contextmanager
    def indices(self):
        """Give req_prod, req_event, rsp_prod and rsp_event to write at will."""
        with self.pages.view[:16].cast("I") as words:
            yield words

    def cpu(self):
        """Return the seconds of processor time that the queue's thread has had."""
        return time.clock_gettime(time.pthread_getcpuclockid(self.queue._thread.thread.ident))

    def close(self):
        assert self.queue.stop(PATIENCE), "the queue does not stop"
        self.ring.close()
        self.channel.close()
        self.pages.close()


# -- what an attack may not cost ------------------------------------------------------------


def costs(hypervisor):
    """Return what must not grow: pages mapped, mappings of the process, descriptors."""
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mappings = sum("memfd:" in line for line in maps)
    return hypervisor.counters.mapped_pages, mappings, len(os.listdir("/proc/self/fd"))


def resident():
    """Return the resident memory of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def until(condition, seconds=PATIENCE, what="the condition"):
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds} s"
        time.sleep(0.001)
