"""A guest in a process of its own: connects a disk, tries it, says how it went.

``demo --guest PLAN`` is what ``demo`` starts; PLAN and each line that it prints are JSON objects:
a finished phase (:class:`Phase`), ``{"progress": …}`` now and then during one, or, as the last
line, ``{"error": …}``. A guest whose backend wants to close stops, and ends with
:data:`STOPPED`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Callable

from ..blkif import READ, WRITE
from ..errors import XenDiskError
from ..named import NamedTuple
from ..units import format_size
from ..xenbus.states import State
from ..xenbus.xenstore import Store
from .frontend import Frontend, RequestFailed
from .hypervisor import SimulatedGuest, SimulatedMachine

STOPPED = 3
"""The exit status of a guest that was asked to release the disk before it was done."""

BLOCK = 4096
_CHUNK = 1 << 20  # bytes of the pattern that are made at once
_WINDOW = 16 << 20  # bytes that are kept at once
_PATIENCE = 30.0  # seconds: a busy machine may stop the other side for some
_LOOK = 0.1  # seconds between two looks at the backend's state
_PROGRESS = 0.5  # seconds between two words of progress


class Plan(NamedTuple):
    """What the guest is to do.

    Attributes:
        machine: the shared machine's address.
        socket: the guest's own xenstore socket.
        directory: the frontend's directory.
        length: how many bytes of the disk to work on, from its start.
        blocks: how many single requests of a block to make.
        write: whether the disk may be written to.
        expect: what a read gives after writing: "written", "zeros" or "anything".
        seconds: how long a phase may take, about; what is under way then is finished.
    """

    machine: str
    socket: str
    directory: str
    length: int
    blocks: int
    write: bool
    expect: str
    seconds: float = _PATIENCE


class Phase(NamedTuple):
    """One finished phase."""

    name: str
    bytes: int
    requests: int
    seconds: float


class VerificationFailed(XenDiskError):
    """The disk gave back something else than it should have."""


class Stopped(Exception):
    """The backend wants the disk back."""


def pattern(length: int, start: int = 0) -> bytes:
    """Return bytes among which no two 4 KiB blocks are alike: those from ``start`` on."""
    first, end = start // _CHUNK, start + length
    chunks = (random.Random(number).randbytes(_CHUNK) for number in range(first, -(-end // _CHUNK)))
    return b"".join(chunks)[start - first * _CHUNK :][:length]


class Runner:
    """Does requests of one phase after the other, and says now and then how far it is.

    Args:
        frontend: connected.
        seconds: that a phase may take.
        tell: called with the phase's name and how much of it is done, from 0 to 1.
    """

    def __init__(
        self,
        frontend: Frontend,
        seconds: float,
        tell: Callable[[str, float], None] = lambda name, done: None,
    ) -> None:
        self._frontend = frontend
        self._seconds = seconds
        self._tell = tell
        self._next_look = self._next_word = 0.0

    def begin(self, name: str) -> None:
        """Begin a phase."""
        self.name = name
        self._spent = 0.0
        self._submitted = 0

    @property
    def is_over(self) -> bool:
        """Whether the phase's time is over."""
        return self._spent >= self._seconds

    @property
    def spent(self) -> float:
        """Seconds that the phase's requests took."""
        return self._spent

    def run(self, requests: Iterable[Callable[[], None]], done: float, step: float) -> int:
        """Submit requests until the time is over, and wait for their answers.

        Args:
            requests: each submits one.
            done: how much of the phase is done, from 0 to 1.
            step: how much each does.

        Returns:
            How many were done.

        Raises:
            Stopped: the backend wants the disk back; all that was submitted is answered.
        """
        frontend, start, count = self._frontend, time.perf_counter(), 0
        before = self._spent
        for submit in requests:
            self._look(done + step * count)
            if self.is_over:
                break
            while frontend.in_flight > self._allowed():
                frontend.kick()
                frontend.reap(wait=True)
            submit()
            count += 1
            self._submitted += 1
            self._spent = before + time.perf_counter() - start
        frontend.drain()
        self._spent = before + time.perf_counter() - start
        return count

    def _allowed(self) -> int:
        """Return how many may be in flight: few at first, and no more than end in a second."""
        answered = self._submitted - self._frontend.in_flight
        if self._spent < 2 * _LOOK:
            return answered
        return max(1, int(answered / self._spent))

    def _look(self, done: float) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK
            if self._frontend.backend_state is State.CLOSING:
                self._frontend.drain()
                raise Stopped
        if now >= self._next_word:
            self._next_word = now + _PROGRESS
            self._tell(self.name, done)


def work(
    frontend: Frontend, plan: Plan, tell: Callable[[str, float], None] = lambda name, done: None
) -> Iterator[Phase]:
    """Do the phases one by one on a connected frontend.

    Raises:
        VerificationFailed: wrong data.
        RequestFailed: the backend answered an error.
        Stopped: the backend wants the disk back.
    """
    runner = Runner(frontend, plan.seconds, tell)
    length = plan.length
    if plan.write:
        phase, _ = _stream(runner, frontend, plan, length, writes=True)
        length = phase.bytes  # a slow disk has got no more
        yield phase
    phase, fault = _stream(runner, frontend, plan, length, writes=False)
    yield phase
    if fault is not None:
        raise fault

    block = max(frontend.features.sector_size, min(BLOCK, length))
    count = max(1, length // block)
    order = [random.Random(i).randrange(count) * block for i in range(plan.blocks)]
    for writes in (False, True) if plan.write else (False,):
        runner.begin(f"random {format_size(block)} {'write' if writes else 'read'}")
        done = runner.run(_blocks(frontend, order, block, writes), 0.0, 1 / len(order))
        yield Phase(runner.name, done * block, done, runner.spent)


def _stream(
    runner: Runner, frontend: Frontend, plan: Plan, length: int, *, writes: bool
) -> tuple[Phase, VerificationFailed | None]:
    """Write or read from the start on, and compare what was written; in windows."""
    runner.begin(f"sequential {'write' if writes else 'read'}")
    step, at, requests = frontend.max_bytes, 0, 0
    wrong: list[int] = []
    compares = plan.write and not writes and plan.expect != "anything"
    while at < length and not runner.is_over:
        size = min(_WINDOW, length - at)
        data = pattern(size, at) if writes or compares else b""
        got = bytearray(size)
        pieces = [(begin, min(step, size - begin)) for begin in range(0, size, step)]
        count = runner.run(
            _pieces(frontend, at, pieces, data if writes else None, got), at / length, step / length
        )
        size = sum(each for _, each in pieces[:count])
        if compares:
            expected = data[:size] if plan.expect == "written" else bytes(size)
            if got[:size] != expected:
                wrong += _difference(expected, got, at)
        at, requests = at + size, requests + count
    if writes:
        start = time.perf_counter()
        frontend.flush()
        seconds = runner.spent + time.perf_counter() - start
        return Phase(runner.name, at, requests + 1, seconds), None
    fault = None
    if wrong:
        blocks = -(-at // BLOCK)
        fault = VerificationFailed(
            f"{len(wrong)} of {blocks} blocks came back wrong, the first at byte {wrong[0]}"
        )
    return Phase(runner.name, at, requests, runner.spent), fault


def _pieces(
    frontend: Frontend,
    at: int,
    pieces: Iterable[tuple[int, int]],
    data: bytes | None,
    got: bytearray,
) -> Iterator[Callable[[], None]]:
    for begin, size in pieces:
        if data is not None:
            yield (
                lambda begin=begin, size=size: frontend.submit(  # type: ignore[misc]
                    WRITE, at + begin, data[begin : begin + size]
                )
            )
        else:
            yield lambda begin=begin, size=size: frontend.submit(  # type: ignore[misc]
                READ, at + begin, length=size, done=_keeping(got, begin)
            )


def _keeping(got: bytearray, begin: int) -> Callable[[memoryview], None]:
    def keep(data: memoryview) -> None:
        got[begin : begin + len(data)] = data

    return keep


def _blocks(
    frontend: Frontend, order: Iterable[int], block: int, writes: bool
) -> Iterator[Callable[[], None]]:
    pool = pattern(_CHUNK)
    for offset in order:
        if writes:
            begin = offset % _CHUNK
            data = pool[begin : begin + block]
            yield lambda offset=offset, data=data: frontend.submit(  # type: ignore[misc]
                WRITE, offset, data
            )
        else:
            yield lambda offset=offset: frontend.submit(  # type: ignore[misc]
                READ, offset, length=block
            )


def _difference(expected: bytes, got: bytearray, start: int) -> list[int]:
    """Return where the blocks are that are otherwise than expected."""
    return [
        start + at
        for at in range(0, len(expected), BLOCK)
        if expected[at : at + BLOCK] != got[at : min(at + BLOCK, len(expected))]
    ]


def main(text: str, say: Callable[[str], None]) -> int:
    """Carry out the plan in ``text`` and ``say`` how it goes; the result is the exit status."""
    plan = Plan(**json.loads(text))
    status = 0

    def tell(name: str, done: float) -> None:
        say(json.dumps({"progress": name, "done": done}))

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
                for phase in work(frontend, plan, tell):
                    say(json.dumps(phase._asdict()))
            except Stopped:
                status = STOPPED
            except (XenDiskError, RequestFailed) as error:
                status = _report(error, say)
            frontend.disconnect()  # after an error, too: until then its pages are mapped
    except XenDiskError as error:
        status = _report(error, say)
    return status


def _report(error: Exception, say: Callable[[str], None]) -> int:
    say(json.dumps({"error": str(error)}))
    return 1
