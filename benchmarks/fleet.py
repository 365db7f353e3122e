"""Many disks of one image: a process for each, and a fork for each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NamedTuple, Union

from xen_disk_py.host.forkserver import ForkServer, Process
from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.simulated.hypervisor import CHANNELS
from xen_disk_py.xenbus.vdev import from_number

from .workload import GUEST, await_device, cpu_seconds, simulated_host, switches

_EXTENDED = 1 << 28
_FIRST = 30  # no name of it is in the old numbering

_Process = Union["subprocess.Popen[bytes]", Process]


class Fleet(NamedTuple):
    """What so many disks took, each in a process of its own.

    Attributes:
        seconds: from the start until the last guest has its disk.
        cpu: seconds of processor time of all processes until then.
        private: bytes of memory of each process that no other has; the median.
        wakeups: how often all of them were scheduled, and what forks, while nobody asked for
            anything.
        idle_cpu: seconds of processor time meanwhile.
    """

    seconds: float
    cpu: float
    private: float
    wakeups: int
    idle_cpu: float


def fleet(count: int, image: str, *, forks: bool, idle: float = 0.0, tree: str = "") -> Fleet:
    """Connect many ``cow`` disks of an image at once.

    A simulated guest has no more than 8 event channels, and is alone on its host. So more disks
    are those of several guests, and hosts, on this machine.

    Args:
        count: how many.
        image: its path.
        forks: start each as ``serve`` does; otherwise as a shell would.
        idle: for how many seconds nobody asks for anything.
        tree: the source that serves them, if it is not this one; it does not fork.
    """
    with ExitStack() as stack:
        hosts = [
            _Disks(stack, range(first, min(first + CHANNELS, count)), image, forks, tree)
            for first in range(0, count, CHANNELS)
        ]
        stack.callback(_kill, hosts)
        begun = time.perf_counter()
        for host in hosts:
            host.start()
        for host in hosts:
            host.connect()
        seconds = time.perf_counter() - begun
        pids = [process.pid for host in hosts for process in host.processes]
        cpu = sum(map(cpu_seconds, pids))
        private = sorted(map(_private, pids))[count // 2]
        servers = [host.server.pid for host in hosts if host.server is not None]
        wakeups, idle_cpu = _idle([*servers, *pids], idle)
        for host in hosts:
            host.disconnect()
        return Fleet(seconds, cpu, private, wakeups, idle_cpu)


class _Disks:
    """Those of one guest, on a host of its own.

    Attributes:
        server: what forks; None: nothing does.
        processes: those of the disks.
    """

    def __init__(
        self, stack: ExitStack, numbers: Sequence[int], image: str, forks: bool, tree: str
    ) -> None:
        self._machine, self._guest, self._store, _, self._program = simulated_host(stack)
        self._image = image
        self._tree = tree or Path(__file__).parents[1]
        self._numbers = [_EXTENDED | 256 * (_FIRST + number) for number in numbers]
        self._frontends: list[Frontend] = []
        self.processes: list[_Process] = []
        self.server: ForkServer | None = None
        if forks:
            command = [*self._program, "fork-server"]
            self.server = ForkServer(command, os.environ, self._machine.descriptors)
            stack.callback(self.server.close)
            self.server.wait()  # what is measured is disks, not imports

    def start(self) -> None:
        """Start the processes."""
        start: Callable[[Sequence[str]], _Process] = (
            self.server.start if self.server is not None else self._start
        )
        for number in self._numbers:
            words = ["connect", "--quiet", "--timeout", "300", "--vdev", from_number(number).name]
            self.processes.append(start([*words, "--path", self._image, str(GUEST)]))

    def _start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._program, *words[1:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=self._machine.descriptors,
            cwd=self._tree,
        )

    def connect(self) -> None:
        """Have the guest take all disks."""
        for number, process in zip(self._numbers, self.processes):
            directory = f"/local/domain/{GUEST}/device/vbd/{number}"
            await_device(self._store, directory, process.poll)
            frontend = Frontend(self._store, self._guest, directory, max_segments=1, depth=1)
            self._frontends.append(frontend)
            frontend.connect()

    def disconnect(self) -> None:
        """Have all processes end."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGINT)
        for frontend in self._frontends:
            frontend.disconnect()
            frontend.close()
        while any(self.running()):
            time.sleep(0.01)

    def running(self) -> Iterator[int]:
        """Yield the process ids of those that have not ended."""
        return (process.pid for process in self.processes if process.poll() is None)


def _idle(pids: Sequence[int], seconds: float) -> tuple[int, float]:
    """Let so much time pass; return how often they were scheduled, and their processor time."""
    if not seconds:
        return 0, 0.0
    time.sleep(1.0)  # they have done what they do when a guest has connected
    before = sum(map(switches, pids)), sum(map(cpu_seconds, pids))
    time.sleep(seconds)
    return sum(map(switches, pids)) - before[0], sum(map(cpu_seconds, pids)) - before[1]


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def _kill(hosts: Sequence[_Disks]) -> None:
    for host in hosts:
        for pid in host.running():
            os.kill(pid, signal.SIGKILL)
