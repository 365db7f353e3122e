"""``python -m benchmarks.loop``: what a 4 KiB request costs in a queue's own thread.

A frontend in this process puts a batch on the ring; what is timed is the processor time that the
queue takes for it: taking it off the ring, doing it, publishing the answers, notifying. No process
is woken and nothing is busy-polled. In the same rounds stands the bare system call. Then it is
counted how many calls a request takes, of functions in Python and in C.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import cycle
from statistics import mean, median
from time import thread_time_ns
from types import FrameType
from typing import Any

from xen_disk_py.backends import Backend
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import READ, WRITE, X86_64, Ring, Transfer
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.queue import Options, Queue
from xen_disk_py.datapath.stopwatch import SAMPLE, Stopwatch
from xen_disk_py.errors import BackendError
from xen_disk_py.hypervisor import PAGE_SIZE
from xen_disk_py.ring import FrontRing
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine

from .results import CPU, Results, about

DEPTH = 32
GUEST = 1
SIZE = 16 << 20
TABLE = "loop"
LIMIT = "bare call"
FIRST = ", first write"
ROUNDS = 10
TIMING, TIMED, UNTIMED = "timing", "timed", "not timed"
TIMING_ROUNDS = 80
_PLACES = 1024  # batches are laid out for so many requests
_READ_ONLY = (", not written", ", not held")  # a write would change what they are


def _never(error: Exception) -> None:
    raise error


class Lane:
    """A ring and its queue, whose loop is called by hand.

    Args:
        stack: what closes all of it.
        backend: the disk, closed with the rest.
        is_first: each batch writes where nothing was written: all is discarded after it.
        disk: it has several queues, and whoever made it closes the backend.
        number: of this queue.
    """

    def __init__(
        self,
        stack: ExitStack,
        backend: Backend,
        *,
        is_first: bool = False,
        disk: Disk | None = None,
        number: int = 0,
    ) -> None:
        self.is_first = is_first
        self._backend = backend
        machine = stack.enter_context(SimulatedMachine(domid=GUEST))
        guest = stack.enter_context(SimulatedGuest(machine))
        hypervisor = stack.enter_context(SimulatedHypervisor(machine))
        if disk is None:
            stack.callback(backend.close)
            disk = Disk(backend)
        shared = stack.enter_context(guest.share_pages(0, 1, writable=True))
        pages = stack.enter_context(guest.share_pages(0, DEPTH, writable=True))
        self._channel = stack.enter_context(guest.bind_unbound(0))
        self._ring = FrontRing(shared.view, X86_64.slot_size, guest.fence)
        self.queue = Queue(
            hypervisor,
            GUEST,
            Ring(tuple(shared.refs), self._channel.port),
            X86_64,
            disk,
            options=Options(),
            persistent=True,
            statistics=disk.statistics.of_queue(number),
            on_failure=_never,
        )
        self.watches = {
            timed: Stopwatch(disk.statistics.of_queue(number), is_on=timed)
            for timed in (True, False)
        }
        stack.callback(self._end)
        dice = random.Random(1)
        self._slots: dict[int, list[bytes]] = {}
        for operation in (READ, WRITE):
            self._slots[operation] = [
                X86_64.encode(
                    Transfer(
                        number,
                        operation,
                        8 * dice.randrange(SIZE // PAGE_SIZE),
                        8,
                        (pages.refs[number % DEPTH],),
                        (0,),
                        (7,),
                    )
                )
                for number in range(_PLACES)
            ]
        self._at = 0

    def _end(self) -> None:
        self.queue._pages.plans.clear()
        self.queue._joined.clear()
        self.queue.stop()

    def put(self, operation: int, requests: int) -> None:
        """Put requests on the ring, at places by chance, and ask to hear of the last answer."""
        slots = self._slots[operation]
        for number in range(requests):
            self._ring.put(slots[(self._at + number) % _PLACES])
        self._at += requests
        self._ring.push()
        self._ring.arm()

    def do(self) -> None:
        """Have them done."""
        queue = self.queue
        queue._serve(queue._ring.take(DEPTH))

    def reap(self) -> None:
        """Take the answers."""
        for slot in self._ring.take():
            assert not slot[10]
        with suppress(BlockingIOError):
            self._channel.acknowledge()
        if self.is_first:
            self._backend.discard(0, SIZE)

    def batch(self, operation: int, requests: int = DEPTH) -> float:
        """Return the processor seconds of so many requests."""
        self.put(operation, requests)
        began = thread_time_ns()
        self.do()
        took = thread_time_ns() - began
        self.reap()
        return took / 1e9

    def calls(self, operation: int) -> tuple[Counter[str], Counter[str]]:
        """Count the calls of a batch of 32 beyond those of one of 16, in Python and in C."""
        found = []
        for requests in (DEPTH // 2, DEPTH):
            self.batch(operation, requests)
            names: dict[str, Counter[str]] = {"call": Counter(), "c_call": Counter()}

            def note(frame: FrameType, event: str, what: Any, names: Any = names) -> None:
                if event in names:
                    name = frame.f_code.co_name if event == "call" else what.__name__
                    names[event][name] += 1

            self.put(operation, requests)
            sys.setprofile(note)
            self.do()
            sys.setprofile(None)
            self.reap()
            found.append(names)
        return found[1]["call"] - found[0]["call"], found[1]["c_call"] - found[0]["c_call"]


def bare(path: str, operation: int) -> Any:
    """Return a function that does 32 requests with nothing but the system call."""
    descriptor = os.open(path, os.O_RDWR)
    call = os.pwritev if operation == WRITE else os.preadv
    pages = memoryview(mmap.mmap(-1, DEPTH * PAGE_SIZE))
    dice = random.Random(1)
    pairs = [
        ((pages[at : at + PAGE_SIZE],), dice.randrange(SIZE // PAGE_SIZE) * PAGE_SIZE)
        for at in [number % DEPTH * PAGE_SIZE for number in range(_PLACES)]
    ]
    batches = cycle([pairs[at : at + DEPTH] for at in range(0, _PLACES, DEPTH)])

    def batch() -> float:
        requests = next(batches)
        began = thread_time_ns()
        for buffers, offset in requests:
            call(descriptor, buffers, offset)
        return (thread_time_ns() - began) / 1e9

    return batch


def image_in(directory: str, name: str) -> str:
    """Make an image full of data."""
    path = f"{directory}/{name}"
    with open(path, "wb") as file:
        file.write(random.Random(name).randbytes(SIZE))
    return path


def disks(directory: str) -> dict[str, Backend]:
    """Open one of each kind, over images of their own."""
    image = partial(image_in, directory)

    found: dict[str, Backend] = {
        "raw": RawBackend(image("raw")),
        "mmap": MmapBackend(image("mmap")),
        "cow, not written": CowBackend(image("cow1")),
        "cow, written": CowBackend(image("cow2")),
        "overlay, not held": OverlayBackend(image("overlay1"), overlay=f"{directory}/over1"),
        "overlay, held": OverlayBackend(image("overlay2"), overlay=f"{directory}/over2"),
        f"raw{FIRST}": RawBackend(image("raw2")),
        f"cow{FIRST}": CowBackend(image("cow3")),
        f"overlay{FIRST}": OverlayBackend(image("overlay3"), overlay=f"{directory}/over3"),
    }
    page = [memoryview(bytes(PAGE_SIZE))]
    for name in ("cow, written", "overlay, held"):
        for offset in range(0, SIZE, PAGE_SIZE):
            found[name].write(page, offset)
    return found


def measure(results: Results, lanes: Mapping[str, Lane], path: str, batches: int) -> None:
    """Measure reads and writes of all disks in turn, batch by batch.

    Args:
        results: the table ``loop``: rounds, each of which is the median of its batches.
        lanes: by name.
        path: an image for the bare call.
        batches: of each, all rounds together.
    """
    for way, operation in (("read", READ), ("write", WRITE)):
        limit = bare(path, operation)
        for requests in (DEPTH, DEPTH // 2, 1):
            loops = {LIMIT: limit}
            for name, lane in lanes.items():
                if not name.endswith(_READ_ONLY if operation == WRITE else FIRST):
                    loops[name] = partial(lane.batch, operation, requests)
            for number in range(1 + ROUNDS):
                found: dict[str, list[float]] = {name: [] for name in loops}
                for _ in range(batches // ROUNDS):
                    for name, loop in loops.items():
                        found[name].append(loop())
                for name, series in found.items():
                    each = median(series) / (DEPTH if name == LIMIT else requests)
                    if number:  # after one to warm up
                        workload = f"4 KiB {way}, {requests} at once"
                        results.add(TABLE, workload, name, **{CPU: each})


def measure_timing(results: Results, lane: Lane, batches: int) -> None:
    """Measure the same queue with its requests timed and not, some batches each, in turn.

    Two queues are no measure of that: of the same code, one took up to 8 % more than the other, by
    where in memory they happened to be.

    Args:
        results: the table ``timing``: rounds, each of which is the mean of its batches.
        lane: of a raw disk.
        batches: of each, all rounds together.
    """
    for way, operation in (("read", READ), ("write", WRITE)):
        for requests in (DEPTH, DEPTH // 2, 1):
            for number in range(1 + TIMING_ROUNDS):
                for name in (UNTIMED, TIMED) if number % 2 else (TIMED, UNTIMED):
                    lane.queue._stopwatch = lane.watches[name == TIMED]
                    for _ in range(SAMPLE):  # until the pace is known
                        lane.batch(operation, requests)
                    each = mean(
                        lane.batch(operation, requests) for _ in range(batches // TIMING_ROUNDS)
                    )
                    if number:
                        workload = f"4 KiB {way}, {requests} at once"
                        results.add(TIMING, workload, name, **{CPU: each / requests})


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write what was measured there")
    parser.add_argument("--batches", type=int, default=1000, help="of each (default: 1000)")
    parser.add_argument("--only", metavar="NAME", default="", help="disks whose name begins so")
    args = parser.parse_args(arguments)
    command = f"python -m benchmarks.loop {shlex.join(arguments)}".strip()
    results = Results(about(command))
    with ExitStack() as stack:
        # a lane has had the loop's variables in its hands, and a page stays mapped until we end
        stack.enter_context(suppress(BackendError))
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="xen_disk_py-bench-", dir="/dev/shm")
        )
        lanes = {
            name: Lane(stack, disk, is_first=name.endswith(FIRST))
            for name, disk in disks(directory).items()
            if name.startswith(args.only)
        }
        # of its own: whoever comes behind it would find the cache full of what it wants
        measure(results, lanes, image_in(directory, "bare"), args.batches)
        if "raw" in lanes:
            measure_timing(results, lanes["raw"], 10 * args.batches)
        for table, base in ((TABLE, LIMIT), (TIMING, UNTIMED)):
            for workload, contenders in results.tables.get(table, {}).items():
                for name, series in contenders.items():
                    ratio = results.ratio(table, workload, CPU, name, base)
                    print(f"{workload:24} {name:18} {median(series[CPU]) * 1e6:7.3f} µs  x {ratio}")
        for way, operation in (("read", READ), ("write", WRITE)):
            for name, lane in lanes.items():
                python, c = lane.calls(operation)
                total = sum(python.values()), sum(c.values())
                names = [f"{what} {n / 16:g}" for what, n in (python + c).most_common() if n >= 16]
                print(
                    f"4 KiB {way}  {name:18}", *(f"{n / 16:.2f}" for n in total), "calls:", *names
                )
    if args.json:
        results.save(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
