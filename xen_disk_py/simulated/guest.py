"""A guest in a process of its own: connects a disk, tries it, says how it went.

``demo --guest PLAN`` is what ``demo`` starts; PLAN and each line that it prints are JSON objects.
A line is one finished phase: its name, the bytes moved, the requests it took, the seconds; or
``{"error": …}``, the last line then.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Callable

from ..blkif import READ, WRITE
from ..errors import XenDiskError
from ..xenbus.xenstore import Store
from .frontend import Frontend, RequestFailed
from .hypervisor import SimulatedGuest, SimulatedMachine

BLOCK = 4096
_PATIENCE = 30.0  # seconds: a busy machine may stop the other side for some


@dataclass
class Plan:
    """What the guest is to do.

    Attributes:
        machine: the shared machine's address.
        socket: the guest's own xenstore socket.
        directory: the frontend's directory.
        length: how many bytes of the disk to work on, from its start.
        blocks: how many single 4 KiB requests to make.
        write: whether the disk may be written to.
        expect: what a read gives after writing: "written", "zeros" or "anything".
    """

    machine: str
    socket: str
    directory: str
    length: int
    blocks: int
    write: bool
    expect: str


@dataclass
class Phase:
    """One finished phase."""

    name: str
    bytes: int
    requests: int
    seconds: float


class VerificationFailed(XenDiskError):
    """The disk gave back something else than it should have."""


def pattern(length: int) -> bytes:
    """Return bytes among which no two 4 KiB blocks are alike."""
    return random.Random(length).randbytes(length)


def work(frontend: Frontend, plan: Plan) -> Iterator[Phase]:
    """Do the phases one by one on a connected frontend.

    Raises:
        VerificationFailed: wrong data.
        RequestFailed: the backend answered an error.
    """
    data = pattern(plan.length)
    count = max(1, plan.length // BLOCK)
    order = [random.Random(i).randrange(count) * BLOCK for i in range(plan.blocks)]
    requests = -(-plan.length // frontend.max_bytes)

    if plan.write:
        start = time.perf_counter()
        frontend.write(0, data)
        frontend.flush()
        yield Phase("sequential write", plan.length, requests + 1, time.perf_counter() - start)

    start = time.perf_counter()
    got = frontend.read(0, plan.length)
    yield Phase("sequential read", plan.length, requests, time.perf_counter() - start)
    if plan.write and plan.expect != "anything":
        expected = data if plan.expect == "written" else bytes(plan.length)
        if got != expected:
            raise VerificationFailed(_difference(expected, got))
        del expected

    start = time.perf_counter()
    for offset in order:
        frontend.submit(READ, offset, length=BLOCK)
    frontend.drain()
    yield Phase("random 4 KiB read", len(order) * BLOCK, len(order), time.perf_counter() - start)

    if plan.write:
        start = time.perf_counter()
        for offset in order:
            frontend.submit(WRITE, offset, data[offset : offset + BLOCK])
        frontend.drain()
        seconds = time.perf_counter() - start
        yield Phase("random 4 KiB write", len(order) * BLOCK, len(order), seconds)


def _difference(expected: bytes, got: bytes) -> str:
    wrong = [
        at
        for at in range(0, len(expected), BLOCK)
        if expected[at : at + BLOCK] != got[at : at + BLOCK]
    ]
    return (
        f"{len(wrong)} of {-(-len(expected) // BLOCK)} blocks came back wrong, "
        f"the first at byte {wrong[0]}"
    )


def main(text: str, say: Callable[[str], None]) -> int:
    """Carry out the plan in ``text`` and ``say`` how it goes; the result is the exit status."""
    plan = Plan(**json.loads(text))
    status = 0
    try:
        with ExitStack() as stack:
            machine = stack.enter_context(SimulatedMachine.attach(plan.machine))
            guest = stack.enter_context(SimulatedGuest(machine))
            store = stack.enter_context(Store.open(plan.socket, _PATIENCE))
            frontend = stack.enter_context(
                Frontend(store, guest, plan.directory, timeout=_PATIENCE)
            )
            frontend.connect()
            try:
                for phase in work(frontend, plan):
                    say(json.dumps(asdict(phase)))
            except (XenDiskError, RequestFailed) as error:
                status = _report(error, say)
            frontend.disconnect()  # after an error, too: until then its pages are mapped
    except XenDiskError as error:
        status = _report(error, say)
    return status


def _report(error: Exception, say: Callable[[str], None]) -> int:
    say(json.dumps({"error": str(error)}))
    return 1
