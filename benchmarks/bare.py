"""The limit: the same transfers in a loop of nothing but the call that moves the data."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Callable

from xen_disk_py.blkif import WRITE
from xen_disk_py.host.process import end_with_parent
from xen_disk_py.hypervisor import PAGE_SIZE

from .workload import SLOTS, Sample, cpu_seconds

Loop = Callable[[float], Sample]


def system_call(
    path: str, operation: int, size: int, offsets: Sequence[int], buffers: int = 1
) -> Loop:
    """Loop over ``os.preadv`` or ``os.pwritev`` with so many buffers of ``size`` bytes, in turn."""
    memory = [[memoryview(mmap.mmap(-1, size))] for _ in range(buffers)]
    return _calls(path, operation, memory, offsets)


def scattered_system_call(path: str, operation: int, size: int, offsets: Sequence[int]) -> Loop:
    """Do the same with as many buffers as a ring has slots, each of pages from all over."""
    memory = memoryview(mmap.mmap(-1, size * SLOTS, mmap.MAP_SHARED))
    pages = [memory[at : at + PAGE_SIZE] for at in range(0, len(memory), PAGE_SIZE)]
    random.Random(1).shuffle(pages)
    count = size // PAGE_SIZE
    buffers = [pages[at : at + count] for at in range(0, len(pages), count)]
    return _calls(path, operation, buffers, offsets)


def slice_copy(path: str, operation: int, size: int, offsets: Sequence[int]) -> Loop:
    """Loop over copies between one buffer of ``size`` bytes and a mapping of the file."""
    buffer = memoryview(mmap.mmap(-1, size))
    with open(path, "r+b") as file:
        image = memoryview(mmap.mmap(file.fileno(), 0))

    def once() -> int:
        if operation == WRITE:
            for offset in offsets:
                image[offset : offset + size] = buffer
        else:
            for offset in offsets:
                buffer[:] = image[offset : offset + size]
        return len(offsets)

    return _timed(once)


_ECHO = """
import os, sys
here, there = map(int, sys.argv[1:])
while os.read(here, 8) != (2).to_bytes(8, sys.byteorder):
    os.write(there, (1).to_bytes(8, sys.byteorder))
"""


@contextmanager
def ping_pong() -> Iterator[Loop]:
    """Send an event to a process that does nothing but wait for it and answer it, and wait."""
    pair = [os.eventfd(0) for _ in range(2)]  # from Python 3.10 on
    there, here = pair
    one, two = ((number).to_bytes(8, sys.byteorder) for number in (1, 2))
    command = [sys.executable, "-c", _ECHO, *map(str, pair)]
    process = subprocess.Popen(
        command,
        pass_fds=pair,
        preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 we have no threads
    )

    def once() -> int:
        for _ in range(100):
            os.write(there, one)
            os.read(here, 8)
        return 100

    def loop(seconds: float) -> Sample:
        requests, clock = 0, time.perf_counter
        cpu, start = cpu_seconds(process.pid), clock()
        while clock() < start + seconds:
            requests += once()
        return Sample(requests, clock() - start, cpu_seconds(process.pid) - cpu)

    try:
        yield loop
    finally:
        os.write(there, two)
        process.wait()
        for descriptor in pair:
            os.close(descriptor)


def _calls(
    path: str, operation: int, buffers: Sequence[Sequence[memoryview]], offsets: Sequence[int]
) -> Loop:
    fd = os.open(path, os.O_RDWR)
    call = os.pwritev if operation == WRITE else os.preadv
    for buffer in buffers:
        call(fd, buffer, 0)  # so that its pages are there
    pairs = [(buffers[i % len(buffers)], offset) for i, offset in enumerate(offsets)]

    def once() -> int:
        for buffer, offset in pairs:
            call(fd, buffer, offset)
        return len(pairs)

    return _timed(once)


def _timed(once: Callable[[], int]) -> Loop:
    def loop(seconds: float) -> Sample:
        requests, clock = 0, time.perf_counter
        cpu, start = time.thread_time(), clock()
        while clock() < start + seconds:
            requests += once()
        return Sample(requests, clock() - start, time.thread_time() - cpu)

    return loop
