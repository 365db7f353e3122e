"""``python3 -m benchmarks.latency``: what it costs to time requests.

4 KiB reads and writes of a raw disk, 32 at once, in this process: the processor time of
``Queue._serve``, which one thread spends alone, with and without the timing. Both are measured in
turns; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import median
from time import thread_time

from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import READ, WRITE, X86_64, Ring, Transfer
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.datapath.queue import Options, Queue
from xen_disk_py.errors import BackendError
from xen_disk_py.ring import FrontRing
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedHypervisor, SimulatedMachine

DEPTH = 32
GUEST = 1


def _never(error: Exception) -> None:
    raise error


class Lane:
    """A ring and its queue, whose loop is called by hand."""

    def __init__(self, stack: ExitStack, timed: bool) -> None:
        machine = stack.enter_context(SimulatedMachine(domid=GUEST))
        image = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))  # noqa: SIM115 - the stack closes it
        image.write(bytes(1 << 20))
        image.flush()
        guest = stack.enter_context(SimulatedGuest(machine))
        hypervisor = stack.enter_context(SimulatedHypervisor(machine))
        backend = RawBackend(image.name)
        stack.callback(backend.close)
        disk = Disk(backend)
        shared = stack.enter_context(guest.share_pages(0, 1, writable=True))
        self.pages = stack.enter_context(guest.share_pages(0, DEPTH, writable=True))
        channel = stack.enter_context(guest.bind_unbound(0))
        self.ring = FrontRing(shared.view, X86_64.slot_size, guest.fence)
        self.queue = Queue(
            hypervisor,
            GUEST,
            Ring(tuple(shared.refs), channel.port),
            X86_64,
            disk,
            options=Options(latency=timed),
            persistent=True,
            statistics=disk.statistics.of_queue(0),
            on_failure=_never,
        )
        stack.callback(self._end)

    def _end(self) -> None:
        self.queue._pages.plans.clear()
        self.queue._joined.clear()
        self.queue.stop()

    def batch(self, operation: int) -> float:
        """Return the processor seconds of 32 requests."""
        for number, ref in enumerate(self.pages.refs):
            request = Transfer(number, operation, 8 * number, 8, (ref,), (0,), (7,))
            self.ring.put(X86_64.encode(request).ljust(X86_64.slot_size, b"\0"))
        self.ring.push()
        slots = self.queue._ring.take()
        began = thread_time()
        self.queue._serve(slots)
        took = thread_time() - began
        self.ring.take()
        return took


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.latency", description=__doc__)
    parser.add_argument("--batches", type=int, default=4000, help="of each (default: 4000)")
    args = parser.parse_args(arguments)
    # batch() has had the loop's variables in its hands, and a page stays mapped until we end
    with suppress(BackendError), ExitStack() as stack:
        lanes = [Lane(stack, timed) for timed in (False, True)]
        for name, operation in (("read", READ), ("write", WRITE)):
            found: list[list[float]] = [[], []]
            for number in range(args.batches + 100):
                for which in (0, 1) if number % 2 else (1, 0):
                    took = lanes[which].batch(operation)
                    if number >= 100:
                        found[which].append(took)
            without, timed = (median(each) / DEPTH * 1e6 for each in found)
            print(
                f"4 KiB {name}, depth 32: {without:.3f} µs without, {timed:.3f} µs timed: "
                f"{100 * (timed / without - 1):+.2f} %"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
