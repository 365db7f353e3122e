"""``python -m benchmarks.local``: how fast a disk is served, without Xen.

The backend is ``connect`` in a process of its own, on a simulated host; the load was laid out
beforehand (see :mod:`.workload`). Next to it, in the same rounds, stand the same transfers in a
bare loop, and nbdkit.
"""

from __future__ import annotations

import argparse
import random
import select
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Callable

from xen_disk_py.backends import Backend
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.replay import Replay
from xen_disk_py.backends.vhd import VhdBackend
from xen_disk_py.backends.vhd.create import create, create_child
from xen_disk_py.blkif import READ, WRITE
from xen_disk_py.trace.reader import TraceReader

from . import bare, ceph, nbdkit
from .fleet import fleet
from .results import BYTES, CPU, RATE, Results, about, number, tell
from .workload import Sample, ServedDisk, drive, served, terminable

KIB, MIB = 1 << 10, 1 << 20
DISK = 64 * MIB
SIZES = {"4 KiB": 4 * KIB, "64 KiB": 64 * KIB, "1 MiB": MIB}
DEPTHS = (1, 32)
OPERATIONS = {"read": READ, "write": WRITE}
LIMIT, COPY, EVENTS = "bare call", "bare copy", "bare events"
HERE = Path(__file__).parent
LATE = "from done to answered"
BEFORE = ", before"
MANY = 4096  # places of 4 KiB, all over the image
IDLE_SECONDS = 5
FLEETS, LARGE_FLEET = (8, 50), 100

Loop = Callable[[float], Sample]


class Bench:
    """What every table needs.

    Args:
        results: where values go.
        directory: for images.
        seconds: how long one run takes.
        rounds: how often everything is run.
        before: the source of an earlier build, to be measured in the same rounds; or nothing.
    """

    def __init__(
        self, results: Results, directory: Path, seconds: float, rounds: int, before: str = ""
    ) -> None:
        self.results = results
        self.directory = directory
        self.seconds = seconds
        self.rounds = rounds
        self.before = before

    def image(self, name: str) -> str:
        """Make an image full of data."""
        path = self.directory / f"{name}.raw"
        path.write_bytes(random.Random(name).randbytes(DISK))
        return str(path)

    def interleave(self, table: str, workload: str, size: int, loops: dict[str, Loop]) -> None:
        """Run all contenders in turn, as often as there are rounds, after one to warm up.

        Each round in another order: whoever comes behind the one that leaves the processor's cache
        full of other data takes up to 15 % longer.
        """
        for name, loop in loops.items():
            loop(self.seconds / 5)
            self.results.add(table, workload, name)  # in this order they are shown
        dice = random.Random(workload)
        for _ in range(self.rounds):
            for name, loop in dice.sample(list(loops.items()), len(loops)):
                sample = loop(self.seconds)
                rate = sample.requests / sample.seconds
                metrics = {RATE: rate, BYTES: rate * size, CPU: sample.cpu / sample.requests}
                self.results.add(table, workload, name, **metrics)

    def show(self, table: str, workload: str, base: str) -> None:
        """Print a workload's medians and what they come to next to ``base``."""
        tell(f"{table}: {workload}")
        for name, series in self.results.tables[table][workload].items():
            rate, bytes_, cpu = (statistics.median(series[m]) for m in (RATE, BYTES, CPU))
            text = f"  {name:15}{rate:>10,.0f}/s{bytes_ / 1e9:>7.2f} GB/s{cpu * 1e6:>9.2f} µs CPU"
            if name != base:
                for metric, what in ((RATE, "rate"), (CPU, "CPU")):
                    ratio = self.results.ratio(table, workload, metric, name, base)
                    text += f"   {what} x {ratio}"
            tell(text)


def offsets(size: int, count: int = 256) -> list[int]:
    """Return places for requests of that size, anywhere on the disk."""
    chosen = random.Random(size)
    return [chosen.randrange(DISK // size) * size for _ in range(count)]


def prepared(
    disk: ServedDisk,
    operation: int,
    size: int,
    depth: int,
    *,
    scatter: bool = False,
    places: int = 256,
) -> Loop:
    """Return a run against a served disk."""

    def loop(seconds: float) -> Sample:
        disk.load.prepare(operation, size, depth, offsets(size, places), scatter=scatter)
        return drive([disk], seconds)

    return loop


def _disks(bench: Bench, stack: ExitStack, names: Sequence[str]) -> dict[str, ServedDisk]:
    disks = {}
    for name in names:
        where = ["--size", "64M"] if name == "discard" else ["--path", bench.image(name)]
        disks[name] = stack.enter_context(served("--backend", name, *where))
        if bench.before and name in ("raw", "cow", "mmap"):
            image = bench.image(f"{name}-before")
            disks[f"{name}{BEFORE}"] = stack.enter_context(
                served("--backend", name, "--path", image, tree=bench.before)
            )
    return disks


def requests(
    bench: Bench,
    names: Sequence[str] = ("raw", "cow", "mmap", "discard"),
    sizes: Sequence[str] = tuple(SIZES),
    depths: Sequence[int] = DEPTHS,
) -> None:
    """Every size, depth and direction, next to bare loops."""
    table = "requests"
    with ExitStack() as stack:
        disks = _disks(bench, stack, names)
        path = bench.image("bare")
        for label in reversed(sizes):  # the largest first: it has all pages mapped, side by side
            size = SIZES[label]
            for depth in depths:
                for way, operation in OPERATIONS.items():
                    loops = {
                        LIMIT: bare.system_call(path, operation, size, offsets(size)),
                        COPY: bare.slice_copy(path, operation, size, offsets(size)),
                    }
                    for name, disk in disks.items():
                        loops[name] = prepared(disk, operation, size, depth)
                    workload = f"{label} {way}, depth {depth}"
                    bench.interleave(table, workload, size, loops)
                    bench.show(table, workload, LIMIT)


def all_over(bench: Bench) -> None:
    """4 KiB requests at so many places that no processor's own cache holds them."""
    table, size = "all over", 4 * KIB
    with ExitStack() as stack:
        disks = _disks(bench, stack, ("raw",))
        path = bench.image("bare")
        for way, operation in OPERATIONS.items():
            places = offsets(size, MANY)
            loops = {LIMIT: bare.system_call(path, operation, size, places, buffers=32)}
            for name, disk in disks.items():
                loops[name] = prepared(disk, operation, size, 32, places=MANY)
            workload = f"4 KiB {way}, depth 32"
            bench.interleave(table, workload, size, loops)
            bench.show(table, workload, LIMIT)


def one_at_a_time(bench: Bench) -> None:
    """Compare 4 KiB requests, one at a time, with events that another process answers."""
    table, size = "one at a time", 4 * KIB
    with ExitStack() as stack:
        disks = _disks(bench, stack, ("raw", "cow"))
        echo = stack.enter_context(bare.ping_pong())
        for way, operation in OPERATIONS.items():
            loops = {EVENTS: echo}
            for name, disk in disks.items():
                loops[name] = prepared(disk, operation, size, 1)
            workload = f"4 KiB {way}, depth 1"
            bench.interleave(table, workload, size, loops)
            bench.show(table, workload, EVENTS)


def changes(bench: Bench) -> None:
    """Compare disks that keep changes apart, before they hold a block and after, with raw."""
    table, size = "changes", 4 * KIB
    with ExitStack() as stack:
        disks = _disks(bench, stack, ("raw", "cow"))
        path = bench.image("overlay")
        disks["overlay"] = stack.enter_context(
            served("--path", path, "--overlay", str(bench.directory / "changes"))
        )
        if bench.before:
            arguments = ("--path", bench.image("old"), "--overlay", str(bench.directory / "older"))
            disks[f"overlay{BEFORE}"] = stack.enter_context(served(*arguments, tree=bench.before))
        for what, operation in (("read", READ), ("write", WRITE), ("read of what it holds", READ)):
            loops = {name: prepared(disk, operation, size, 32) for name, disk in disks.items()}
            workload = f"4 KiB {what}, depth 32"
            bench.interleave(table, workload, size, loops)
            bench.show(table, workload, "raw")


def core(bench: Bench) -> None:
    """Do what matters most of ``requests``: raw, 4 KiB and 1 MiB, depth 32."""
    requests(bench, names=("raw",), sizes=("4 KiB", "1 MiB"), depths=(32,))


def scattered(bench: Bench) -> None:
    """1 MiB whose pages lie all over the guest's memory, next to a bare call of the same."""
    table = "scattered"
    with ExitStack() as stack:
        disks = _disks(bench, stack, ("raw", "mmap"))
        path = bench.image("bare")
        for way, operation in OPERATIONS.items():
            loops = {LIMIT: bare.scattered_system_call(path, operation, MIB, offsets(MIB))}
            for name, disk in disks.items():
                loops[name] = prepared(disk, operation, MIB, 32, scatter=True)
            workload = f"1 MiB {way}, depth 32"
            bench.interleave(table, workload, MIB, loops)
            bench.show(table, workload, LIMIT)


def memory(bench: Bench) -> None:
    """Disks in memory: ours and nbdkit's, and the same in Python for both."""
    table = "memory"
    with ExitStack() as stack:
        disks = _disks(bench, stack, ("raw", "mmap"))
        disks["Python disk"] = stack.enter_context(served("--path", str(HERE / "memory_disk.py")))
        servers = {
            "nbdkit Python": ("python", str(HERE / "nbdkit_disk.py")),
            "nbdkit memory": ("memory", f"size={DISK}"),
        }
        peers = {}
        for name, words in servers.items():
            if nbdkit.has(words[0]):
                peers[name] = stack.enter_context(nbdkit.served(*words))
            else:
                tell(f"{name}: not here (package nbdkit, or nbdkit-plugin-{words[0]})")
        for label, size in SIZES.items():
            for depth in DEPTHS:
                for way, operation in OPERATIONS.items():
                    loops = {
                        name: prepared(disk, operation, size, depth) for name, disk in disks.items()
                    }
                    for name, peer in peers.items():
                        loops[name] = peer.fio(operation, size, depth)
                    workload = f"{label} {way}, depth {depth}"
                    bench.interleave(table, workload, size, loops)
                    bench.show(table, workload, next(iter(peers), "raw"))


def vhd(bench: Bench) -> None:
    """A dynamic VHD, and a chain of three whose layers each have a part, next to raw.

    And the same dynamic VHD in qemu-nbd, through fio, whose own work is in its figures.
    """
    table = "vhd"
    image = bench.image("vhd-raw")
    content = memoryview(Path(image).read_bytes())
    whole, base = str(bench.directory / "whole.vhd"), str(bench.directory / "base.vhd")
    for path in (whole, base):
        create(path, DISK)
        _fill(path, content, 1)
    leaf = base
    for name in ("middle.vhd", "leaf.vhd"):
        parent, leaf = leaf, str(bench.directory / name)
        create_child(leaf, parent)
        _fill(leaf, content, 3)
    with ExitStack() as stack:
        disks = {"raw": stack.enter_context(served("--backend", "raw", "--path", image))}
        for name, path in (("vhd", whole), ("vhd chain of 3", leaf)):
            disks[name] = stack.enter_context(served("--format", "vhd", "--path", path))
        peers = {}
        if shutil.which("qemu-nbd") and shutil.which("fio"):
            copy = shutil.copyfile(whole, bench.directory / "copy.vhd")
            peers["qemu-nbd, fio"] = stack.enter_context(nbdkit.served_by_qemu(str(copy), "vpc"))
        # Writes last: they bring all into the leaf.
        for way, operation in OPERATIONS.items():
            for label in ("1 MiB", "4 KiB") if operation == READ else ("4 KiB", "1 MiB"):
                size = SIZES[label]
                loops = {name: prepared(disk, operation, size, 32) for name, disk in disks.items()}
                for name, peer in peers.items():
                    loops[name] = peer.fio(operation, size, 32)
                workload = f"{label} {way}, depth 32"
                bench.interleave(table, workload, size, loops)
                bench.show(table, workload, "raw")


def filters(bench: Bench) -> None:
    """Filters that change nothing, next to the disk without."""
    table = "filters"
    image = bench.image("filters")
    idle = {"delay": "delay", "log": f"log:file={bench.directory}/requests.log,on=no"}
    with ExitStack() as stack:
        disks = {}
        for name, text in {"raw": "", **idle}.items():
            filtered = [f"--filter={text}"] if text else []
            where = ["--backend", "raw", "--path", image, "--force"]
            disks[name] = stack.enter_context(served(*where, *filtered))
        for way, operation in OPERATIONS.items():
            for label in ("4 KiB", "1 MiB"):
                size = SIZES[label]
                loops = {name: prepared(disk, operation, size, 32) for name, disk in disks.items()}
                workload = f"{label} {way}, depth 32"
                bench.interleave(table, workload, size, loops)
                bench.show(table, workload, "raw")


def record(bench: Bench) -> None:
    """Compare a disk with the same one that is recorded, without and with what is written."""
    table = "record"
    trace = bench.directory / "trace"
    ways = {
        "raw": (),
        "record:on=no": ("--filter", "record:on=no"),
        "record": ("--filter", f"record:file={trace}-1,ring=64M"),
        "record, data=yes": ("--filter", f"record:file={trace}-2,data=yes,ring=256M"),
    }
    trees = {"": "", **({BEFORE: bench.before} if bench.before else {})}
    with ExitStack() as stack:
        disks = {}
        for name, options in ways.items():
            for suffix, tree in trees.items():
                given = [each.replace(str(trace), f"{trace}{suffix[2:]}") for each in options]
                image = bench.image(f"{name}{suffix}")
                disks[f"{name}{suffix}"] = stack.enter_context(
                    served("--backend", "raw", "--path", image, *given, tree=tree)
                )
        for depth in DEPTHS:
            for way, operation in OPERATIONS.items():
                workload = f"4 KiB {way}, depth {depth}"
                loops = {
                    name: prepared(disk, operation, 4 * KIB, depth) for name, disk in disks.items()
                }
                bench.interleave(table, workload, 4 * KIB, loops)
                bench.show(table, workload, "raw")


def replay(bench: Bench) -> None:
    """Replay what guests did (``benchmarks/traces``), as fast as possible, against backends."""
    table = "replay"
    for trace in sorted((HERE / "traces").glob("*.xdt")):
        with TraceReader(str(trace)) as reader:
            size, records = reader.header.size, list(reader.records())
        for _ in range(bench.rounds):
            for name in ("raw", "cow", "mmap"):
                path = bench.directory / f"replay-{name}.raw"
                path.write_bytes(bytes(size))
                with closing(open_backend(name, {"path": str(path)})) as disk:
                    replayed = Replay(disk, speed=None, compare=False)
                    begun = time.process_time()
                    replayed.run(records)
                    took = time.process_time() - begun
                requests = replayed.requests
                rate = requests / replayed.seconds
                metrics = {RATE: rate, BYTES: 0.0, CPU: took / requests}
                bench.results.add(table, trace.stem, name, **metrics)
        bench.show(table, trace.stem, "raw")


def _fill(path: str, content: memoryview, every: int) -> None:
    """Write one of so many pieces of 64 KiB, chosen by chance."""
    disk = VhdBackend(path)
    try:
        dice = random.Random(path)
        for offset in range(0, DISK, 64 * KIB):
            if not dice.randrange(every):
                disk.write([content[offset : offset + 64 * KIB]], offset)
    finally:
        disk.close()


def idle(bench: Bench) -> None:
    """A disk that nobody asks anything of."""
    for name, tree in {
        "connect": "",
        **({f"connect{BEFORE}": bench.before} if bench.before else {}),
    }.items():
        with served("--path", bench.image("idle"), "--backend", "raw", tree=tree) as disk:
            resident = disk.memory()["VmRSS"]
            prepared(disk, READ, 4 * KIB, 32)(bench.seconds)
            for _ in range(bench.rounds):
                time.sleep(0.2)
                before = disk.switches()
                time.sleep(IDLE_SECONDS)
                wakeups = (disk.switches() - before) / IDLE_SECONDS
                bench.results.add(
                    "idle", "raw", name, wakeups_per_second=wakeups, resident_bytes=resident
                )
        tell(f"idle: {name}: {number(wakeups)} wake-ups/s, {resident / 1e6:.1f} MB resident")
    name = f"{LARGE_FLEET} cow disks"
    for _ in range(bench.rounds):
        found = fleet(LARGE_FLEET, bench.image("idle"), forks=True, idle=IDLE_SECONDS)
        bench.results.add(
            "idle",
            name,
            "fork each",
            wakeups_per_second=found.wakeups / IDLE_SECONDS,
            cpu_seconds=found.idle_cpu,
            seconds=found.seconds,
            private_bytes=found.private,
        )
    tell(
        f"idle: {name}: {number(found.wakeups / IDLE_SECONDS)} wake-ups/s, "
        f"{found.idle_cpu * 1000:.3f} ms of processor time in {IDLE_SECONDS} s, "
        f"{found.private / 1e6:.1f} MB private each; {found.seconds:.2f} s to connect"
    )


def start(bench: Bench) -> None:
    """How long it takes to begin."""
    table = "start"
    programs = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "xen-disk --help": [sys.executable, "-m", "xen_disk_py", "--help"],
    }
    image = bench.image("start")
    for _ in range(bench.rounds):
        for name, command in programs.items():
            begun = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            bench.results.add(table, name, "wall", seconds=time.perf_counter() - begun)
        with served("--path", image, pages=11) as disk:
            bench.results.add(table, "connect", "wall", seconds=disk.connect_seconds)
    for name, series in bench.results.tables[table].items():
        tell(f"start: {name:16} {statistics.median(series['wall']['seconds']):.3f} s")


def many(bench: Bench) -> None:
    """Compare eight disks at once with one."""
    table, workload, size = "many", "4 KiB read, depth 32, raw", 4 * KIB
    with ExitStack() as stack:
        disks = []
        for number_ in range(8):
            path = bench.image(f"many{number_}")
            disks.append(stack.enter_context(served("--path", path, "--backend", "raw", pages=1)))
            disks[-1].load.prepare(READ, size, 32, offsets(size))
        loops: dict[str, Loop] = {
            "1 disk": lambda seconds: drive(disks[:1], seconds),
            "8 disks": lambda seconds: drive(disks, seconds),
        }
        bench.interleave(table, workload, size, loops)
    bench.show(table, workload, "1 disk")


def fleet_of(bench: Bench) -> None:
    """Compare many disks of one image as ``serve`` starts them with processes of their own."""
    table, image = "fleet", bench.image("fleet")
    ways = {"process each": (False, ""), "fork each": (True, "")}
    if bench.before:
        ways[f"process each{BEFORE}"] = False, bench.before
    for count in FLEETS:
        workload = f"{count} cow disks at once"
        for _ in range(bench.rounds):
            for name, (forks, tree) in random.sample(sorted(ways.items()), len(ways)):
                found = fleet(count, image, forks=forks, tree=tree)
                bench.results.add(
                    table,
                    workload,
                    name,
                    seconds=found.seconds,
                    cpu_seconds=found.cpu,
                    private_bytes=found.private,
                )
        for name, series in bench.results.tables[table][workload].items():
            tell(
                f"fleet: {workload}: {name:13} {statistics.median(series['seconds']):.2f} s, "
                f"{statistics.median(series['cpu_seconds']):.2f} s of processor time, "
                f"{statistics.median(series['private_bytes']) / 1e6:.1f} MB private each"
            )


def sleeping(bench: Bench) -> None:
    """Compare many requests at once with one at a time, to a disk that takes a millisecond."""
    table, size = "sleeping", 4 * KIB
    with served("--path", str(HERE / "sleeping_disk.py"), pages=1) as disk:
        loops = {f"depth {depth}": prepared(disk, READ, size, depth) for depth in DEPTHS}
        bench.interleave(table, "4 KiB read", size, loops)
    bench.show(table, "4 KiB read", "depth 1")


def slow(bench: Bench) -> None:
    """How soon answers come of a disk that takes 10 ms, or one, for each request, one at a time.

    What an answer waits, having been done, is what it comes later than its share of the whole time.
    """
    table = "slow"
    for milliseconds in (10, 1):
        option = f"seconds={milliseconds / 1000}"
        with served("--path", str(HERE / "slow_disk.py"), "--option", option, pages=1) as disk:
            for count in (16, 4, 1):
                workload = f"4 KiB read, {count} at once, {milliseconds} ms each"
                disk.load.prepare(READ, 4 * KIB, 2 * count, offsets(4 * KIB))
                for _ in range(bench.rounds):
                    times = disk.load.answer_times()
                    own = times[-1] / count
                    late = [at - own * number for number, at in enumerate(times, start=1)]
                    series = {
                        "first": times[0],
                        "mean": statistics.mean(times),
                        "last": times[-1],
                        LATE: statistics.mean(late),
                    }
                    for name, seconds in series.items():
                        bench.results.add(table, workload, name, seconds=seconds)
                shown = bench.results.tables[table][workload]
                tell(
                    f"slow: {workload}: "
                    + ", ".join(
                        f"{name} {statistics.median(found['seconds']) * 1000:.1f} ms"
                        for name, found in shown.items()
                    )
                )


def without_a_guest(
    disk: Backend,
    operation: int,
    size: int,
    depth: int,
    clock: Callable[[], float] = time.thread_time,
) -> Loop:
    """Return a run of random requests by an asynchronous disk, from this very thread.

    As fio does it: the pages are its own, there is no ring and nobody else to wake. ``clock`` tells
    the processor time: that of the process, if a library has threads.
    """
    many = disk.asynchronous
    assert many is not None
    places = offsets(size)
    pages = [memoryview(bytearray(size)) for _ in range(depth)]
    poller = select.poll()
    poller.register(many.fileno(), select.POLLIN)

    def loop(seconds: float) -> Sample:
        free, requests = list(range(depth)), 0
        cpu, start = clock(), time.perf_counter()
        while free or many.unfinished:
            while free and time.perf_counter() < start + seconds:
                number = free.pop()
                place = places[requests % len(places)]
                many.submit(operation, [pages[number]], place, size, number)
                requests += 1
            done = many.collect()
            if not done:
                if not many.unfinished:
                    break
                poller.poll(1000)
            for number, error in done:
                if error is not None:
                    raise error
                free.append(number)
        return Sample(requests, time.perf_counter() - start, clock() - cpu)

    return loop


def nbd(bench: Bench) -> None:
    """A disk on an NBD server next to fio's nbd engine on that server; the client's own time.

    fio is alone with the server. A disk has a guest besides, in a process of its own, which takes
    its share of the processors: so there is also what our client does without one.

    Then a server that takes 10 ms for each request, of which it does 64 at once.
    """
    table = "nbd"
    if not nbdkit.has("memory"):
        tell(f"nbd: {nbdkit.version()}")
        return
    with ExitStack() as stack:
        server = stack.enter_context(nbdkit.served("memory", f"size={DISK}"))
        disk = stack.enter_context(served("--path", server.uri, "--option", "connections=1"))
        alone = stack.enter_context(
            closing(open_backend("nbd", {"path": server.uri}, pairs=["connections=1"]))
        )
        for label in ("4 KiB", "1 MiB"):
            for way, operation in OPERATIONS.items():
                size = SIZES[label]
                loops = {
                    "fio": server.fio(operation, size, 32, counts_client=True),
                    "no guest": without_a_guest(alone, operation, size, 32),
                    "nbd": prepared(disk, operation, size, 32),
                }
                workload = f"{label} {way}, depth 32"
                bench.interleave(table, workload, size, loops)
                bench.show(table, workload, "fio")
    slow = ("--threads=64", "--filter=delay", "memory", f"size={DISK}", "rdelay=10ms")
    with ExitStack() as stack:
        server = stack.enter_context(nbdkit.served(*slow))
        disks = [stack.enter_context(served("--path", server.uri)) for _ in range(2)]

        def all_at_once(seconds: float) -> Sample:
            """A ring of one page has room for 32 requests: two disks have 64."""
            for disk in disks:
                disk.load.prepare(READ, 4 * KIB, 32, offsets(4 * KIB))
            return drive(disks, seconds)

        table, workload = "nbd, 10 ms", "4 KiB read"
        loops = {"one": prepared(disks[0], READ, 4 * KIB, 1), "64": all_at_once}
        bench.interleave(table, workload, 4 * KIB, loops)
        bench.show(table, workload, "one")


def rbd(bench: Bench) -> None:
    """A disk in a Ceph cluster next to ``rbd bench`` and fio's rbd engine on the same image.

    ``rbd bench`` writes the same memory each time, which nobody has to copy and whose checksum
    Ceph has noted. fio has memory of its own for each request, as a guest has.
    """
    table = "rbd"
    why = ceph.missing()
    if why:
        tell(f"rbd: not measured: {why}")
        return
    with ExitStack() as stack:
        image = stack.enter_context(ceph.image(DISK))
        for label in ("4 KiB", "1 MiB"):
            for way, operation in OPERATIONS.items():
                size = SIZES[label]
                # One after the other: whoever writes has the image's lock.
                theirs, fio = image.bench(operation, size, 32), image.fio(operation, size, 32)
                workload = f"{label} {way}, depth 32"

                def alone(seconds: float, operation: int = operation, size: int = size) -> Sample:
                    with served(*image.arguments) as disk:
                        loop = prepared(disk, operation, size, 32)
                        loop(seconds / 5)  # maps the guest's pages
                        return loop(seconds)

                def no_guest(
                    seconds: float, operation: int = operation, size: int = size
                ) -> Sample:
                    with closing(
                        open_backend("rbd", {"path": image.path}, pairs=[image.option])
                    ) as disk:
                        loop = without_a_guest(disk, operation, size, 32, time.process_time)
                        loop(seconds / 5)
                        return loop(seconds)

                loops = {"rbd bench": theirs, "fio": fio, "no guest": no_guest, "rbd": alone}
                bench.interleave(table, workload, size, loops)
                bench.show(table, workload, "rbd bench")


TABLES: dict[str, Callable[[Bench], None]] = {
    "record": record,
    "replay": replay,
    "requests": requests,
    "all over": all_over,
    "one at a time": one_at_a_time,
    "changes": changes,
    "scattered": scattered,
    "memory": memory,
    "vhd": vhd,
    "filters": filters,
    "nbd": nbd,
    "rbd": rbd,
    "many": many,
    "fleet": fleet_of,
    "sleeping": sleeping,
    "slow": slow,
    "idle": idle,
    "start": start,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write what was measured there")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run (default: 0.5)")
    parser.add_argument("--rounds", type=int, default=5, help="of each table (default: 5)")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*TABLES, "core"],
        metavar="NAME",
        help=f"{', '.join(TABLES)}; core: what matters most of requests",
    )
    parser.add_argument(
        "--before", metavar="TREE", default="", help="source of an earlier build, measured besides"
    )
    parser.add_argument(
        "--directory", default="/dev/shm", help="where to make images (default: /dev/shm)"
    )
    args = parser.parse_args(arguments)
    command = f"python -m benchmarks.local {shlex.join(arguments)}".strip()
    facts = about(command, nbdkit=nbdkit.version(), images=args.directory)
    results = Results({**facts, "rounds": str(args.rounds), "seconds": str(args.seconds)})
    with ExitStack() as stack:
        stack.enter_context(terminable())
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="xen_disk_py-bench-", dir=args.directory)
        )
        bench = Bench(results, Path(directory), args.seconds, args.rounds, args.before)
        for name in args.only or TABLES:
            (core if name == "core" else TABLES[name])(bench)
            if args.json:
                results.save(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
