"""Many disks of one image on one host: a process for each, and a fork for each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NamedTuple, Union

from xen_disk_py.host.forkserver import ForkServer, Process
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.simulated.hypervisor import SimulatedMachine
from xen_disk_py.xenbus.vdev import from_number

from .workload import GUEST, await_device, cpu_seconds, simulated_host

_EXTENDED = 1 << 28
_FIRST = 30  # no name of it is in the old numbering

_Start = Callable[[Sequence[str]], Union["subprocess.Popen[bytes]", Process]]


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
        machine, guest, store, _, program = simulated_host(stack)
        start = _forks(program, machine, stack) if forks else _processes(program, machine)
        begun = time.perf_counter()
        processes, frontends = [], []
        numbers = [_EXTENDED | 256 * (_FIRST + place) for place in range(count)]
        for number in numbers:
            name = from_number(number).name
            words = ["connect", "--quiet", "--timeout", "300", "--vdev", name, "--path", image]
            processes.append(start([*words, str(GUEST)]))
        stack.callback(_kill, processes)
        for number, process in zip(numbers, processes):
            directory = f"/local/domain/{GUEST}/device/vbd/{number}"
            await_device(store, directory, process.poll)
            frontends.append(Frontend(store, guest, directory, max_segments=1, depth=1))
            frontends[-1].connect()
        seconds = time.perf_counter() - begun
        cpu = sum(cpu_seconds(process.pid) for process in processes)
        private = sorted(_private(process.pid) for process in processes)[count // 2]
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
        for frontend in frontends:
            frontend.disconnect()
            frontend.close()
        while any(process.poll() is None for process in processes):
            time.sleep(0.01)
        return Fleet(seconds, cpu, private)


def _processes(program: Sequence[str], machine: SimulatedMachine) -> _Start:
    def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*program, *words[1:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=machine.descriptors,
            cwd=Path(__file__).parents[1],
        )

    return start


def _forks(program: Sequence[str], machine: SimulatedMachine, stack: ExitStack) -> _Start:
    server = ForkServer([*program, "fork-server"], os.environ, machine.descriptors)
    stack.callback(server.close)
    return server.start


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def _kill(processes: Sequence[subprocess.Popen[bytes] | Process]) -> None:
    for process in processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
