"""``python -m benchmarks.queues``: what queues in processes of their own are worth.

First, ``connect --queues-in processes`` as it is, next to one thread for all queues and to a single
queue: a process sends to all rings, 32 requests of 4 KiB on each, and needs some of the processors
itself.

Then what they could be worth at most. One image, opened once; each process, a fork, has a ring and
a frontend of its own and calls the queue's loop by hand, as :mod:`.loop` does. No process is woken
and nothing is busy-polled. It is counted how many requests all processes do in the same time.
With ``--threads`` threads of one process do it, for a Python without the GIL.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import median

from xen_disk_py.backends import Backend
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.datapath.disk import Disk
from xen_disk_py.errors import BackendError
from xen_disk_py.hypervisor import PAGE_SIZE

from . import loop
from .loop import DEPTH, SIZE, image_in
from .results import CPU, RATE, Results, about
from .workload import Lane, send, served, terminable

TABLE = "queues"
COUNTS = (1, 2, 4)
SERVED = "served queues"
ONE = "1 queue"
WAYS = {
    ONE: (1, ()),
    "4 in one thread": (4, ("--queues", "4")),
    "2 processes": (2, ("--queues", "2", "--queues-in", "processes")),
    "4 processes": (4, ("--queues", "4", "--queues-in", "processes")),
}
_WARM_UP = 50  # batches


def _serve(backend: Backend, operation: int, started: int, told: int, seconds: float) -> None:
    """Do requests in a new process, from the time on that all are told."""
    with ExitStack() as stack:
        stack.enter_context(suppress(BackendError))  # the loop's variables have had its pages
        lane = loop.Lane(stack, backend)
        for _ in range(_WARM_UP):
            lane.batch(operation)
        os.write(told, b"r")
        start = float(os.read(started, 32))
        while time.perf_counter() < start:
            pass
        begun, requests = time.process_time(), 0
        while time.perf_counter() < start + seconds:
            lane.batch(operation)
            requests += DEPTH
        os.write(told, f"{requests} {time.process_time() - begun}".encode())


def at_once(count: int, backend: Backend, operation: int, seconds: float) -> dict[str, float]:
    """Return the rate of so many queues together, and the processor time of a request.

    The frontends' share is in both: they are in the same processes.
    """
    started, start = os.pipe()
    tellers, pids = [], []
    for _ in range(count):
        teller, told = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                _serve(backend, operation, started, told, seconds)
            finally:
                os._exit(0)
        os.close(told)
        tellers.append(teller)
        pids.append(pid)
    for teller in tellers:
        os.read(teller, 1)
    for _ in pids:
        os.write(start, f"{time.perf_counter() + 0.05:32.6f}".encode())
    requests = cpu = 0.0
    for teller in tellers:
        done, took = map(float, os.read(teller, 100).split())
        requests, cpu = requests + done, cpu + took
    for pid in pids:
        os.waitpid(pid, 0)
    for descriptor in (*tellers, started, start):
        os.close(descriptor)
    return {RATE: requests / seconds, CPU: cpu / requests}


def served_at_once(results: Results, backend: str, path: str, seconds: float) -> None:
    """Measure one round of each way to serve a disk, reads and writes."""
    dice = random.Random(1)
    places = [dice.randrange(SIZE // PAGE_SIZE) * PAGE_SIZE for _ in range(1024)]
    for way, (queues, options) in WAYS.items():
        disk_options = ("--path", path, "--backend", backend, *options)
        with served(*disk_options, pages=1, queues=queues) as disk:
            lanes = [Lane(disk.load, number) for number in range(queues)]
            for name, operation in (("read", READ), ("write", WRITE)):
                for lane in lanes:
                    lane.prepare(operation, PAGE_SIZE, DEPTH, places)
                send(lanes, seconds / 4)
                cpu = disk.cpu_seconds()
                requests, elapsed = send(lanes, seconds)
                cpu = (disk.cpu_seconds() - cpu) / requests
                found = {RATE: requests / elapsed, CPU: cpu}
                results.add(SERVED, f"{backend}, 4 KiB {name}", way, **found)
            for lane in lanes:
                lane.release()


def tell(results: Results, table: str, workload: str, base: str) -> None:
    """Print what was measured of a workload."""
    for contender, series in results.tables[table][workload].items():
        ratio = results.ratio(table, workload, RATE, contender, base)
        rate, cpu = median(series[RATE]), median(series[CPU])
        print(f"{workload}: {contender:15} {rate:10,.0f}/s {cpu * 1e6:6.2f} µs  x {ratio}")


def threads_at_once(
    count: int, backend: Backend, operation: int, seconds: float
) -> dict[str, float]:
    """Return the same of threads in this process, each with a ring of its own."""
    ready, requests, cpu = threading.Barrier(count), [0] * count, [0.0] * count

    def serve(number: int) -> None:
        lane, done = lanes[number], 0
        for _ in range(_WARM_UP):
            lane.batch(operation)
        ready.wait()
        begun, end = time.thread_time(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            lane.batch(operation)
            done += DEPTH
        requests[number], cpu[number] = done, time.thread_time() - begun

    with suppress(BackendError), ExitStack() as stack:  # as above
        disk = Disk(backend)
        lanes = [loop.Lane(stack, backend, disk=disk, number=number) for number in range(count)]
        threads = [threading.Thread(target=serve, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {RATE: sum(requests) / seconds, CPU: sum(cpu) / sum(requests)}


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queues", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write what was measured there")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run (default: 0.5)")
    parser.add_argument("--served", action="store_true", help="measure the first only")
    parser.add_argument("--threads", action="store_true", help="threads, and the second only")
    args = parser.parse_args(arguments)
    measure = threads_at_once if args.threads else at_once
    results = Results(about(f"python -m benchmarks.queues {shlex.join(arguments)}".strip()))
    with ExitStack() as stack:
        stack.enter_context(terminable())
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="xen_disk_py-bench-", dir="/dev/shm")
        )
        disks: dict[str, Backend] = {
            "raw": RawBackend(image_in(directory, "raw")),
            "mmap": MmapBackend(image_in(directory, "mmap")),
        }
        for name in disks if not args.threads else ():
            image = image_in(directory, f"served-{name}")
            for _ in range(args.rounds):
                served_at_once(results, name, image, args.seconds)
            for way in ("read", "write"):
                tell(results, SERVED, f"{name}, 4 KiB {way}", ONE)
        for name, disk in disks.items():
            stack.callback(disk.close)
            if args.served:
                continue
            for way, operation in (("read", READ), ("write", WRITE)):
                workload = f"{name}, 4 KiB {way}"
                for _ in range(args.rounds):
                    for count in COUNTS:
                        found = measure(count, disk, operation, args.seconds)
                        results.add(TABLE, workload, str(count), **found)
                tell(results, TABLE, workload, "1")
    if args.json:
        results.save(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
