"""Many disks of one image on one host: a process for each, and a fork for each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NamedTuple

from xen_disk_py.host.forkserver import ForkServer
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.simulated.hypervisor import SimulatedGuest, SimulatedMachine
from xen_disk_py.simulated.xenstored import SimulatedXenstored
from xen_disk_py.xenbus.vdev import from_number
from xen_disk_py.xenbus.xenstore import Store

from .workload import GUEST, await_device, cpu_seconds

_FIRST = 202 << 8 | 16 << 4  # xvdq: those before it have room for 15 partitions in their numbers
_EXTENDED = 1 << 28


class Fleet(NamedTuple):
    """What so many disks took, each in a process of its own.

    Attributes:
        seconds: from the start until the last guest has its disk.
        cpu: seconds of processor time of all processes until then.
        private: bytes of memory of each process that no other has; the median.
    """

    seconds: float
    cpu: float
    private: float


def fleet(count: int, image: str, *, forks: bool) -> Fleet:
    """Connect many ``cow`` disks of an image at once.

    Args:
        count: how many.
        image: its path.
        forks: start each as ``serve`` does; otherwise as a shell would.
    """
    with ExitStack() as stack:
        records = stack.enter_context(tempfile.TemporaryDirectory(prefix="xen_disk_py-bench-"))
        xenstored = stack.enter_context(SimulatedXenstored())
        xenstored.add_domain(GUEST, "bench", "00000000-0000-4000-8000-000000000001")
        machine = stack.enter_context(SimulatedMachine(domid=GUEST))
        guest = stack.enter_context(SimulatedGuest(machine))
        store = stack.enter_context(Store.open(xenstored.socket_path(GUEST)))
        program = [sys.executable, "-m", "benchmarks.serve"]
        program += [machine.address, xenstored.socket_path(0), records]
        start = _forks(program, machine, stack) if forks else _processes(program, machine)
        begun = time.perf_counter()
        pids, frontends = [], []
        numbers = [_EXTENDED | 256 * (30 + place) for place in range(count)]
        for number in numbers:
            name = from_number(number).name
            words = ["connect", "--quiet", "--vdev", name, "--path", image, str(GUEST)]
            pids.append(start(words))
        stack.callback(_end, pids)
        for number in numbers:
            directory = f"/local/domain/{GUEST}/device/vbd/{number}"
            await_device(store, directory)
            frontends.append(Frontend(store, guest, directory, max_segments=1, depth=1))
            frontends[-1].connect()
        seconds = time.perf_counter() - begun
        cpu = sum(map(cpu_seconds, pids))
        private = sorted(map(_private, pids))[count // 2]
        for frontend in frontends:
            frontend.disconnect()
            frontend.close()
        return Fleet(seconds, cpu, private)


def _processes(program: Sequence[str], machine: SimulatedMachine) -> Callable[[Sequence[str]], int]:
    def start(words: Sequence[str]) -> int:
        return subprocess.Popen(
            [*program, *words[1:]],
            stdout=subprocess.DEVNULL,
            pass_fds=machine.descriptors,
            cwd=Path(__file__).parents[1],
        ).pid

    return start


def _forks(
    program: Sequence[str], machine: SimulatedMachine, stack: ExitStack
) -> Callable[[Sequence[str]], int]:
    for descriptor in machine.descriptors:
        os.set_inheritable(descriptor, True)
    server = ForkServer([*program, "fork-server"], os.environ)
    stack.callback(server.close)
    return lambda words: server.start(words).pid


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGINT)
