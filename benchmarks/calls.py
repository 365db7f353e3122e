"""``python3 -m benchmarks.calls``: what the single calls of the data path cost here.

In dom0 those of Xen are among them::

    python -m tests.xen.lab run -- python3 -m benchmarks.calls

The result goes to ``benchmarks-calls.json`` in the lab's results, or to ``--json``. Each is
timed in a loop with nothing else in it, so caches and the TLB are warm: amid other work it
costs more. The best of some rounds counts.
"""

from __future__ import annotations

import argparse
import mmap
import os
import select
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Callable

from xen_disk_py.errors import XenDiskError
from xen_disk_py.hypervisor import PAGE_SIZE, Piece
from xen_disk_py.libxen import Xen

from .results import Results, about, number

TABLE, CONTENDER, SECONDS = "calls", "one call", "seconds"
MIB = 1 << 20
ROUNDS, TIMES = 20, 20


def best(call: Callable[[], Any], times: int = TIMES) -> float:
    """Return the seconds that a call takes."""
    call()
    taken = []
    for _ in range(ROUNDS):
        began = perf_counter()
        for _ in range(times):
            call()
        taken.append(perf_counter() - began)
    return min(taken) / times


def system_calls(undo: ExitStack) -> dict[str, float]:
    """Time what needs no Xen."""
    descriptor = os.memfd_create("image")
    undo.callback(os.close, descriptor)
    os.write(descriptor, os.urandom(MIB))
    view = memoryview(bytearray(MIB))
    mapped = memoryview(mmap.mmap(descriptor, MIB))
    pages = [view[at : at + PAGE_SIZE] for at in range(0, MIB, PAGE_SIZE)]
    poller = select.poll()
    ear, mouth = os.pipe()
    undo.callback(os.close, ear)
    undo.callback(os.close, mouth)
    poller.register(ear, select.POLLIN)

    def copy() -> None:
        view[: 128 << 10] = mapped[: 128 << 10]

    return {
        "a Python function that does nothing": best(lambda: None),
        "getppid": best(os.getppid),
        "sched_yield": best(os.sched_yield),
        "perf_counter": best(perf_counter),
        "poll, nothing ready": best(lambda: poller.poll(0)),
        "preadv, 4 KiB": best(lambda: os.preadv(descriptor, pages[:1], 0)),
        "preadv, 128 KiB": best(lambda: os.preadv(descriptor, [view[: 128 << 10]], 0)),
        "preadv, 128 KiB in pages": best(lambda: os.preadv(descriptor, pages[:32], 0)),
        "preadv, 1 MiB in pages": best(lambda: os.preadv(descriptor, pages, 0)),
        "pwritev, 128 KiB in pages": best(lambda: os.pwritev(descriptor, pages[:32], 0)),
        "slice copy from a mapping, 128 KiB": best(copy),
    }


def xen_calls(undo: ExitStack) -> dict[str, float]:
    """Time what the hypervisor does, with domain 0 as its own guest."""
    xen = undo.enter_context(Xen())
    shared = undo.enter_context(xen.share_pages(0, 32, writable=True))
    there = undo.enter_context(xen.bind_unbound(0))
    here = undo.enter_context(xen.bind_interdomain(0, there.port))
    memory = memoryview(bytearray(128 << 10))
    pieces = [Piece(ref, 0, PAGE_SIZE) for ref in shared.refs]

    def event() -> None:
        here.notify()
        there.acknowledge()

    def map_and_unmap() -> None:
        xen.map_grants(0, shared.refs, writable=True).close()

    return {
        "notify": best(here.notify),
        "notify and acknowledge": best(event),
        "map and unmap 32 pages": best(map_and_unmap, 3),
        "grant copy, 32 pages": best(lambda: xen.copy_to_grants(0, pieces, memory), 5),
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.calls", description=__doc__)
    directory = os.environ.get("XEN_LAB_RESULTS")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the result there (default: to the lab's results, in the lab)",
        default=Path(directory) / "benchmarks-calls.json" if directory else None,
    )
    args = parser.parse_args(arguments)
    results = Results(about(f"python3 -m benchmarks.calls {shlex.join(arguments)}".strip()))
    with ExitStack() as undo:
        found = system_calls(undo)
        try:
            found.update(xen_calls(undo))
        except XenDiskError as error:
            print(f"without Xen: {error}", file=sys.stderr)
    for name, seconds in found.items():
        print(f"{name:36}{number(seconds * 1e6):>8} µs")
        results.add(TABLE, name, CONTENDER, **{SECONDS: seconds})
    if args.json:
        results.save(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
