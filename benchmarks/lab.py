"""``python3 -m benchmarks.lab``, in dom0: our disks next to the kernel's and QEMU's.

All of them are attached to one guest in one boot and take turns, in another order each round.
Under emulation, as in the lab, only ratios mean anything::

    python -m tests.xen.lab run -- python3 -m benchmarks.lab --kind pvh

The result goes to ``benchmarks-xen-VERSION-KIND-VCPUS-dom0-VCPUS.json`` in the lab's results.

The processor time is that of the whole of domain 0, as Xen counts it, around each run: threads
of the kernel and hypercalls are in it as well as processes. What running a command in the
guest costs dom0 anyway (its console), and how long dd takes that has nothing to do, is measured
and taken off.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

from tests.xen.disk import Disk
from tests.xen.guest import RESULTS, Guest, sh

from .results import BYTES, CPU, CPU_GIB, RATE, Results, about, number, tell

DIRECTORY = Path("/dev/shm")
MIB, GIB = 1 << 20, 1 << 30
MEBIBYTES = 100
PASSES = 4  # of dd over a disk in one run: one takes too little time for the guest's clock
OURS = ("raw", "cow", "mmap", "discard")
PEERS = ("blkback", "qdisk")


class Done(NamedTuple):
    """What the guest did in one run."""

    requests: int
    bytes: int
    seconds: float


def dd(guest: Guest, device: str, *, write: bool, mebibytes: int = MEBIBYTES) -> Done:
    """Transfer the start of the disk, all by default, 1 MiB at a time, past the guest's cache.

    It is done :data:`PASSES` times.
    """
    way = (
        f"if=/dev/zero of=/dev/{device} oflag=direct"
        if write
        else f"if=/dev/{device} of=/dev/null iflag=direct"
    )
    passes = " ".join(map(str, range(PASSES)))
    words = guest.check(
        f"cat /proc/uptime; for pass in {passes}; do dd {way} bs=1M count={mebibytes} 2>/dev/null;"
        " done; cat /proc/uptime",
        300,
    ).split()
    done = PASSES * mebibytes
    return Done(done, done * MIB, float(words[2]) - float(words[0]))


@dataclass(frozen=True)
class Fio:
    """Transfers at random places, past the guest's cache."""

    way: str
    size: str
    depth: int

    def command(self, device: str, seconds: float) -> str:
        """Return the command; its report goes to a file, since the console costs dom0 time."""
        return (
            f"fio --name=j --filename=/dev/{device} --rw={self.way} --bs={self.size} "
            f"--iodepth={self.depth} --direct=1 --ioengine=libaio --time_based "
            f"--runtime={seconds:g} --output-format=json --output=/tmp/fio.json >/dev/null"
        )

    def report(self, guest: Guest) -> Done:
        """Read the report of the last run."""
        text = guest.check("cat /tmp/fio.json")
        job = json.loads(text[text.index("{") :])["jobs"][0]
        directions = [job["read"], job["write"]]
        return Done(
            sum(each["total_ios"] for each in directions),
            sum(each["io_bytes"] for each in directions),
            max(each["runtime"] for each in directions) / 1000,
        )


WORKLOADS: dict[str, Fio | bool] = {
    "1 MiB read, direct": False,
    "1 MiB write, direct": True,
    "4 KiB random read, depth 1": Fio("randread", "4k", 1),
    "4 KiB random read, depth 32": Fio("randread", "4k", 32),
    "4 KiB random write, depth 1": Fio("randwrite", "4k", 1),
    "4 KiB random write, depth 32": Fio("randwrite", "4k", 32),
    "64 KiB random mix, depth 32": Fio("randrw", "64k", 32),
}
"""Fio's jobs; for dd, whether it writes."""
QUICK = ("1 MiB read, direct", "4 KiB random read, depth 32")


class Dom0Clock:
    """The processor time that domain 0 has taken.

    Attributes:
        method: where it comes from, in words.
    """

    def __init__(self) -> None:
        self.method = "/proc/stat of dom0, ticks of 10 ms"
        self._read: Callable[[], float] = _proc_stat
        for path in glob.glob("/usr/lib/*/libxenstat.so.*.*"):
            try:
                self._read = _xenstat(path)
            except OSError as error:
                tell(f"{path}: {error}")
            else:
                self.method = "Xen's own count, through libxenstat"
                break

    def __call__(self) -> float:
        """Return seconds."""
        return self._read()


def _proc_stat() -> float:
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _xenstat(path: str) -> Callable[[], float]:
    """Return a clock made of libxenstat (tools/libs/stat/include/xenstat.h)."""
    library = ctypes.CDLL(path)
    pointer = ctypes.c_void_p
    library.xenstat_init.restype = pointer
    library.xenstat_get_node.restype = pointer
    library.xenstat_get_node.argtypes = [pointer, ctypes.c_uint]
    library.xenstat_free_node.restype = None
    library.xenstat_free_node.argtypes = [pointer]
    library.xenstat_node_domain.restype = pointer
    library.xenstat_node_domain.argtypes = [pointer, ctypes.c_uint]
    library.xenstat_domain_cpu_ns.restype = ctypes.c_ulonglong
    library.xenstat_domain_cpu_ns.argtypes = [pointer]
    handle = library.xenstat_init()
    if not handle:
        raise OSError("xenstat_init failed")

    def read() -> float:
        node = library.xenstat_get_node(handle, 0)
        domain = library.xenstat_node_domain(node, 0) if node else None
        if not domain:
            raise OSError("libxenstat does not show domain 0")
        nanoseconds: int = library.xenstat_domain_cpu_ns(domain)
        library.xenstat_free_node(node)
        return nanoseconds / 1e9

    read()
    return read


class Bench:
    """One guest with all its disks.

    Args:
        guest: running.
        devices: name of each contender to its device in the guest.
        clock: dom0's.
        results: where values go.
        seconds: of each fio.
    """

    def __init__(
        self,
        guest: Guest,
        devices: dict[str, str],
        clock: Dom0Clock,
        results: Results,
        seconds: float,
    ) -> None:
        self._guest = guest
        self._devices = devices
        self._clock = clock
        self._results = results
        self._seconds = seconds
        for device in devices.values():
            dd(guest, device, write=False)  # to warm up
        # Starting a program in the guest takes time, there and (for its console) in dom0.
        costs, waits = [], []
        for _ in range(5):
            before = clock()
            waits.append(dd(guest, next(iter(devices.values())), write=False, mebibytes=0).seconds)
            costs.append(clock() - before)
        self._overhead, self._start = statistics.median(costs), statistics.median(waits)
        begun = time.monotonic()
        before = clock()
        time.sleep(3)
        idle = (clock() - before) / (time.monotonic() - begun)
        results.about["dom0 when idle"] = f"{idle:.1%} of a processor"
        results.about["taken off each run"] = (
            f"{self._overhead * 1000:.1f} ms of dom0's processor time; "
            f"{self._start * 1000:.0f} ms of dd's time"
        )

    def run(self, table: str, title: str, rounds: int) -> None:
        """Let every contender do a workload, one after the other, some rounds."""
        names = list(self._devices)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                done, cpu = self._measure(WORKLOADS[title], self._devices[name])
                metrics = {
                    RATE: done.requests / done.seconds,
                    BYTES: done.bytes / done.seconds,
                    CPU: cpu / done.requests,
                    CPU_GIB: cpu * GIB / done.bytes,
                }
                self._results.add(table, title, name, **metrics)

    def _measure(self, workload: Fio | bool, device: str) -> tuple[Done, float]:
        guest = self._guest
        before = self._clock()
        if isinstance(workload, Fio):
            guest.check(workload.command(device, self._seconds), 120 + 2 * self._seconds)
            cpu = self._clock() - before
            return workload.report(guest), cpu - self._overhead
        done = dd(guest, device, write=workload)
        cpu = self._clock() - before
        seconds = max(done.seconds - self._start, 0.01)  # the guest's clock has no finer steps
        return done._replace(seconds=seconds), cpu - self._overhead


def show(results: Results, table: str, title: str) -> None:
    """Print a workload's medians, and what they come to next to the peers'."""
    series = results.tables[table][title]
    print(title, flush=True)
    for name in series:
        rate, bytes_, cpu, gib = (
            statistics.median(series[name][metric]) for metric in (RATE, BYTES, CPU, CPU_GIB)
        )
        text = f"  {name:8}{rate:>9,.0f}/s{bytes_ / 1e6:>9.1f} MB/s"
        text += f"   dom0 CPU {number(cpu * 1000)} s/1000 requests, {number(gib)} s/GiB"
        print(text, flush=True)
        for peer in PEERS:
            if name in OURS and peer in series:
                rates = results.ratio(table, title, RATE, name, peer)
                cpus = results.ratio(table, title, CPU, name, peer)
                print(f"           x {rates} of {peer}; CPU x {cpus}", flush=True)


def image(name: str) -> Path:
    """Make an image full of data, in memory."""
    path = DIRECTORY / f"{name}.raw"
    path.write_bytes(os.urandom(MIB) * MEBIBYTES)
    return path


def attach(stack: ExitStack, guest: Guest, ours: Sequence[str]) -> dict[str, str]:
    """Give the guest, which has the qdisk, all other disks; the devices by name."""
    sh("modprobe", "-a", "xen-blkback", "loop")
    loop = sh("losetup", "--find", "--show", str(image("blkback"))).strip()
    stack.callback(subprocess.run, ["losetup", "-d", loop], check=False)
    phy = f"vdev=xvdp,access=rw,format=raw,backendtype=phy,target={loop}"
    sh("xl", "block-attach", str(guest.domid), phy)
    devices = {}
    for name in ours:
        where = ["--size", f"{MEBIBYTES}M"] if name == "discard" else ["--path", str(image(name))]
        devices[name] = stack.enter_context(Disk(guest, "--backend", name, *where)).device
    devices |= {"blkback": "xvdp", "qdisk": "xvdq"}
    for device in devices.values():
        guest.wait_for_device(device)
    return devices


def xen_version() -> str:
    """Return the hypervisor's version."""
    directory = Path("/sys/hypervisor/version")
    major, minor, extra = (
        (directory / name).read_text().strip() for name in ("major", "minor", "extra")
    )
    return f"{major}.{minor}{extra}"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.lab", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", type=float, default=3, help="of each fio (default: 3)")
    parser.add_argument("--kind", choices=("pv", "pvh"), default="pv", help="of the guest")
    parser.add_argument("--guest-vcpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--quick", action="store_true", help="only raw, two workloads, one round")
    args = parser.parse_args(arguments)
    rounds = 1 if args.quick else args.rounds
    clock = Dom0Clock()
    processors = len(os.sched_getaffinity(0))
    command = f"python -m tests.xen.lab run -- python3 -m benchmarks.lab {shlex.join(arguments)}"
    kind = args.kind
    results = Results(
        about(
            command.strip(),
            xen=xen_version(),
            guest=f"{kind}, {args.guest_vcpus} vCPU, Linux {platform.release()}",
            rounds=str(rounds),
            **{"dom0 CPU": clock.method},
        )
    )
    series = ".".join(xen_version().split(".")[:2])
    table = f"xen-{series}-{kind}-{args.guest_vcpus}-dom0-{processors}"
    with ExitStack() as stack:
        line = f"vdev=xvdq,access=rw,format=raw,backendtype=qdisk,target={image('qdisk')}"
        guest = Guest(kind, vcpus=args.guest_vcpus, fio=True, disks=[line])
        stack.enter_context(guest)
        devices = attach(stack, guest, ("raw",) if args.quick else OURS)
        bench = Bench(guest, devices, clock, results, args.seconds)
        for name, value in results.about.items():
            print(f"{name}: {value}", flush=True)
        for title in QUICK if args.quick else WORKLOADS:
            bench.run(table, title, rounds)
            show(results, table, title)
            results.save(RESULTS / f"benchmarks-{table}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
