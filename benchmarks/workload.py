"""A disk served by a process of its own, and a load that costs its sender next to nothing.

A frontend written in Python takes as long to make a request as the backend to do it, so the
two together say little about either. Here the requests are laid out beforehand, in whole
rings; sending some is a copy into the ring and a kick.
"""

from __future__ import annotations

import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Callable, NamedTuple, TextIO

from xen_disk_py.blkif import (
    MAX_SEGMENTS,
    SECTOR,
    SECTORS_PER_PAGE,
    Indirect,
    Transfer,
    encode_segments,
)
from xen_disk_py.errors import DeviceError
from xen_disk_py.hypervisor import PAGE_SIZE, GuestHypervisor
from xen_disk_py.ring import HEADER
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedMachine
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus.xenstore import Store

GUEST = 1
VDEV = 51712
"""``xvda``: the first free device."""
SLOTS = 32
"""Requests that a ring of one page holds."""

_PAGES = 256  # of the largest request, 1 MiB
_LAPS = 8  # rings full of requests that are laid out beforehand, at least
_MASK = 0xFFFF_FFFF
_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = range(4)
_UNANSWERED = 0xFFFF << 16  # in a request's id: where a response has its status


class Load(Frontend):
    """A frontend that sends requests laid out beforehand, and looks only at their status.

    Args:
        store: xenstore, as the guest sees it.
        guest: shares pages, opens ports.
        directory: the device's directory.
        pages: of the largest request.
        queues: rings; it sends to the first, and a :class:`Lane` to any.
    """

    def __init__(
        self,
        store: Store,
        guest: GuestHypervisor,
        directory: str,
        pages: int = _PAGES,
        queues: int = 1,
    ) -> None:
        super().__init__(store, guest, directory, max_segments=pages, depth=SLOTS, queues=queues)
        self._fence = guest.fence
        self._laps: list[bytes] = []
        self._depth = self._half = self._produced = self._consumed = 0

    def prepare(
        self,
        operation: int,
        size: int,
        depth: int,
        offsets: Sequence[int],
        *,
        scatter: bool = False,
    ) -> None:
        """Lay requests out, to be sent again and again.

        Args:
            operation: READ or WRITE.
            size: bytes of each, a multiple of 4096.
            depth: how many to keep in flight.
            offsets: where, in turn; bytes.
            scatter: take each request's pages from all over the guest's memory, as in one that
                has run for a while; otherwise they lie side by side, as in one just booted.
        """
        ring = self._shared[0].view
        self._ring_bytes, self._indices = ring, ring[:16].cast("I")
        self._depth, self._half = depth, max(1, depth // 2)
        self._indices[_RSP_EVENT] = (self._consumed + self._half) & _MASK
        count = -(-size // PAGE_SIZE)
        pages = self.max_bytes // PAGE_SIZE
        while self._make_buffer():
            pass
        refs = [ref for buffer in self._free for ref in buffer.refs]
        if scatter:
            random.Random(1).shuffle(refs)
        slots = []
        for number in range(max(_LAPS, -(-len(offsets) // SLOTS)) * SLOTS):
            at = number % depth  # which of the requests in flight, so which pages
            buffer = self._free[at]
            grefs = tuple(refs[at * pages : at * pages + count])
            id_, sector = _UNANSWERED | number % SLOTS, offsets[number % len(offsets)] // SECTOR
            if count <= MAX_SEGMENTS:
                sectors = count * SECTORS_PER_PAGE
                firsts, lasts = (0,) * count, (7,) * count
                slot = self._abi.encode(
                    Transfer(id_, operation, sector, sectors, grefs, firsts, lasts)
                )
            else:
                segments = encode_segments([(ref, 0, 7) for ref in grefs])
                buffer.indirect_view[: len(segments)] = segments
                slot = self._abi.encode(
                    Indirect(id_, operation, sector, count, buffer.indirect_refs)
                )
            slots.append(slot)
        self._laps = [b"".join(slots[at : at + SLOTS]) for at in range(0, len(slots), SLOTS)]

    def turn(self) -> bool:
        """Look once; if there is room for half of the requests or more, send some."""
        answered = (self._indices[_RSP_PROD] - self._consumed) & _MASK
        if answered >= self._half:
            self._reap()
        elif self._produced - self._consumed == self._depth:
            return False
        self._refill()
        return True

    def answer_times(self) -> list[float]:
        """Send half of the requests at once; how many seconds later each answer was there."""
        before, times = self._consumed, list[float]()
        start = time.perf_counter()
        self._refill()
        sent = self._produced - before
        while len(times) < sent:
            answered = (self._indices[_RSP_PROD] - before) & _MASK
            now = time.perf_counter() - start
            times += [now] * (answered - len(times))
            if now > self._timeout:
                raise DeviceError("no response in time")
            time.sleep(0.0001)
        self._reap()
        return times

    def finish(self) -> None:
        """Wait until everything is answered.

        Raises:
            DeviceError: an error, or no answer in time.
        """
        deadline = time.monotonic() + self._timeout
        while self._consumed < self._produced:
            if not self._reap() and time.monotonic() > deadline:
                raise DeviceError("no response in time")

    @property
    def answered(self) -> int:
        """How many requests have been answered, ever."""
        return self._consumed

    def quiet(self) -> bool:
        """There is nothing to do for :meth:`turn`, and ``fileno`` will tell when there is."""
        self._fence()  # our request for a notification is visible before the last look
        return (self._indices[_RSP_PROD] - self._consumed) & _MASK < self._half

    def fileno(self) -> int:
        """Return a descriptor that becomes readable with the next answer."""
        return self._channels[0].fileno()

    def acknowledge(self) -> None:
        """Make ``fileno`` quiet again."""
        self._channels[0].acknowledge()

    def _refill(self) -> None:
        # Not more than half a ring at once, so that a backend that answers all it took
        # together finds the rest when it looks again.
        produced = self._produced
        count = min(self._depth - (produced - self._consumed), self._half)
        position, size = produced % SLOTS, self._abi.slot_size
        count = min(count, SLOTS - position)
        start, stop = position * size, (position + count) * size
        lap = self._laps[produced // SLOTS % len(self._laps)]
        self._ring_bytes[HEADER + start : HEADER + stop] = lap[start:stop]
        self._fence()
        self._produced = new = produced + count
        self._indices[_REQ_PROD] = new & _MASK
        self._fence()
        if (new - self._indices[_REQ_EVENT]) & _MASK < count:
            self._channels[0].notify()

    def _reap(self) -> int:
        consumed = self._consumed
        answered = (self._indices[_RSP_PROD] - consumed) & _MASK
        if not answered:
            return 0
        self._fence()
        first = consumed % SLOTS
        self._check(first, min(first + answered, SLOTS))
        self._check(0, max(first + answered - SLOTS, 0))
        self._consumed = consumed + answered
        self._indices[_RSP_EVENT] = (self._consumed + self._half) & _MASK
        return answered

    def _check(self, first: int, last: int) -> None:
        size, ring = self._abi.slot_size, self._ring_bytes
        start, stop = HEADER + first * size, HEADER + last * size
        if any(ring[start + 10 : stop : size]) or any(ring[start + 11 : stop : size]):
            raise DeviceError("the backend answered an error")

    def close(self) -> None:
        """Give everything back."""
        if self._laps:
            self._indices.release()
            del self._ring_bytes
            self._laps = []
        super().close()


class Lane(Load):
    """One of the rings of a load that is connected, to be sent to as to a disk of its own.

    Args:
        load: has the ring, and what is made for it, as soon as this is released.
        number: of the ring.
    """

    def __init__(self, load: Load, number: int) -> None:
        self.__dict__.update(load.__dict__)
        self._load = load
        self._rings = [load._rings[number]]
        self._shared = [load._shared[number]]
        self._channels = [load._channels[number]]
        self._free, self._laps = [], []

    def release(self) -> None:
        """Send no more."""
        self._indices.release()
        del self._ring_bytes
        self._load._shared += self._shared[1:]
        self._load._free += self._free


@dataclass
class Sample:
    """What one run came to."""

    requests: int
    seconds: float
    cpu: float
    """Seconds of processor time, of the backends alone."""


def send(loads: Sequence[Load], seconds: float) -> tuple[int, float]:
    """Keep the prepared loads going, asleep while there is nothing to do for any.

    Returns:
        How many requests were answered, and the seconds that it took, the last ones included.
    """
    sleeper = select.poll()
    for load in loads:
        sleeper.register(load.fileno(), select.POLLIN)
    before = sum(load.answered for load in loads)
    clock = time.perf_counter
    start = clock()
    while clock() < start + seconds:
        moved = [load.turn() for load in loads]
        if not any(moved) and all(load.quiet() for load in loads):
            sleeper.poll(100)
            for load in loads:
                load.acknowledge()
    for load in loads:
        load.finish()
    return sum(load.answered for load in loads) - before, clock() - start


def drive(disks: Sequence[ServedDisk], seconds: float) -> Sample:
    """Send the prepared loads of all disks, and look at the processor time of their backends."""
    cpu = sum(disk.cpu_seconds() for disk in disks)
    requests, elapsed = send([disk.load for disk in disks], seconds)
    return Sample(requests, elapsed, sum(disk.cpu_seconds() for disk in disks) - cpu)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process so far, those that ended included."""
    # What clock_getcpuclockid(3) returns, which Python does not have: linux/posix-timers.h.
    return time.clock_gettime(~pid << 3 | 2)


def switches(pid: int) -> int:
    """Return how often a process's threads have gone to sleep, or were made to, so far."""
    return sum(
        int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
        if "ctxt_switches" in line
    )


class ServedDisk:
    """A disk that ``connect`` serves in another process, and the load for it."""

    def __init__(self, process: subprocess.Popen[str], load: Load, seconds: float) -> None:
        self.process = process
        self.load = load
        self.connect_seconds = seconds
        """From the start of the process until the guest has the disk."""

    @property
    def pids(self) -> list[int]:
        """Its process, and those of its queues."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def cpu_seconds(self) -> float:
        """Return the processor time it has taken so far."""
        return sum(map(cpu_seconds, self.pids))

    def switches(self) -> int:
        """Return how often its threads have gone to sleep, or were made to, so far."""
        return sum(map(switches, self.pids))

    def memory(self) -> dict[str, int]:
        """Return its resident memory in bytes, by the kernel's names (``VmRSS``, ``RssAnon``…)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = (line.split() for line in status.splitlines())
        return {f[0][:-1]: int(f[1]) << 10 for f in fields if f[0].startswith(("VmRSS", "Rss"))}


class Host(NamedTuple):
    """A simulated host with one guest.

    Attributes:
        machine: its memory.
        guest: shares pages, opens ports.
        store: xenstore, as the guest sees it.
        records: a directory.
        program: the command line that serves there, to be followed by what ``connect`` takes.
    """

    machine: SimulatedMachine
    guest: SimulatedGuest
    store: Store
    records: str
    program: list[str]


def simulated_host(stack: ExitStack) -> Host:
    """Make a host, which goes with the stack."""
    records = stack.enter_context(tempfile.TemporaryDirectory(prefix="xen_disk_py-bench-"))
    xenstored = stack.enter_context(SimulatedXenstored())
    xenstored.add_domain(GUEST, "bench", "00000000-0000-4000-8000-000000000001")
    machine = stack.enter_context(SimulatedMachine(domid=GUEST))
    guest = stack.enter_context(SimulatedGuest(machine))
    store = stack.enter_context(Store.open(xenstored.socket_path(GUEST)))
    program = [sys.executable, "-m", "benchmarks.serve"]
    program += [machine.address, xenstored.socket_path(0), records]
    return Host(machine, guest, store, records, program)


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM end what is done in between as Ctrl-C does: images and processes go with it."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def served(
    *arguments: str, pages: int = _PAGES, queues: int = 1, tree: str = ""
) -> Iterator[ServedDisk]:
    """Serve a disk on a simulated host of its own.

    Args:
        arguments: what comes after ``connect VM``.
        pages: of the largest request to be sent.
        queues: rings of the guest.
        tree: the source that serves it, if it is not this one.
    """
    with ExitStack() as stack:
        machine, guest, store, records, program = simulated_host(stack)
        directory = f"/local/domain/{GUEST}/device/vbd/{VDEV}"
        store.watch(directory)
        said = stack.enter_context((Path(records) / "stderr").open("w+"))
        start = time.perf_counter()
        process = subprocess.Popen(
            [*program, str(GUEST), "--json", "--quiet", *arguments],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            pass_fds=machine.descriptors,
            cwd=tree or Path(__file__).parents[1],
        )
        stack.callback(_end, process, said)
        await_device(store, directory, process.poll)
        load = stack.enter_context(Load(store, guest, directory, pages, queues))
        load.connect()
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - start
        try:
            yield ServedDisk(process, load, seconds)
            load.disconnect()
        except BaseException:
            _force(process)  # else its mappings are in the way, and their error hides this one
            raise


def await_device(store: Store, directory: str, ended: Callable[[], int | None]) -> None:
    """Wait until a guest finds a device; ``ended`` says how the process that makes it ended.

    Raises:
        DeviceError: it did.
    """
    poller = select.poll()
    poller.register(store.fileno(), select.POLLIN)
    while store.read(f"{directory}/state") is None:
        status = ended()
        if status is not None:
            raise DeviceError(f"connect ended with status {status}")
        if not store.has_pending:
            poller.poll(100)
        store.pending()


def _force(process: subprocess.Popen[str]) -> None:
    """End it whatever the guest does; what it has mapped of the guest's is unmapped."""
    for _ in range(50):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        return


def _end(process: subprocess.Popen[str], said: TextIO) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
    if process.returncode:
        said.seek(0)
        sys.stderr.write(said.read())
