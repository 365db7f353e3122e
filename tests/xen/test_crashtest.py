"""What a power cut could have left of file systems and databases of a guest under load: all of it
is good, and a fault that was put there is found. So for our own formats, with dom0 as the guest.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from .disk import PROGRAM, Disk, xen_disk
from .guest import RESULTS, Dom0, Guest, Shell, sh
from .powercuts import LOAD, MARKS, Case, Recorded, marks
from .test_integrity import leave
from .tools import command, write_ramdisk

Connect = Callable[..., Disk]

HERE = Path(__file__).parent
SCRIPT = HERE / "crashload.py"
MAKE = {  # with blocks of one sector: ext4's superblock has two of 512 bytes, and a checksum
    "ext4": (48 << 20, "-b 4096 {image} 48M"),
    "xfs": (300 << 20, "-s size={sector} -d size=300M {image}"),  # xfsprogs 6 makes none smaller
}
PATIENCE = 900


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with Python, SQLite and xfs."""
    ramdisk = tmp_path_factory.mktemp("tools") / "ramdisk"
    write_ramdisk(ramdisk, SCRIPT)
    with Guest("pv", ramdisk=ramdisk, memory=384) as guest:
        guest.is_shared = True
        yield guest


class Recording(Recorded):
    """A file system in an image, to be recorded."""

    def __init__(self, directory: Path, case: Case) -> None:
        super().__init__(directory, case)
        sh("modprobe", "loop")
        self.size, options = MAKE[case.system]
        # udev looks at the end of a disk, so nothing is marked there
        sh("truncate", "-s", str(self.size + 2 * MARKS), str(self.image))
        words = options.format(image=self.image, sector=case.sector).split()
        sh(f"mkfs.{case.system}", "-q", *words)
        sh("cp", "--sparse=always", str(self.image), str(self.base))

    def run(self, shell: Shell, connect: Connect) -> None:
        """Have a guest mount it and do the load; the end of the trace is the image."""
        case = self.case
        bare = self.trace.with_name(f"{case.system} {case.kind}.xdt")
        filters = [f"record:file={self.trace},data=yes", f"record:file={bare}"]
        filters += [case.fault] if case.fault else []
        words = [word for each in filters for word in ("--filter", each)]
        where = ("--path", self.image, "--backend", "raw", "--sector-size", str(case.sector))
        disk = connect(shell, *where, *words)
        shell.wait_for_device(disk.device)
        place, notes = ("/mnt", "/tmp/notes") if shell.domid else ("/run/lab/mounted", "/run/notes")
        does = ("load", case.kind, place, notes, f"/dev/{disk.device}", str(self.size))
        mount = f"mount -t {case.system} -o {case.options} /dev/{disk.device} {place}"
        shell.check(f"rm -f {notes}; mkdir -p {place}; {mount}")
        try:
            load = command(SCRIPT, *does) if shell.domid else shlex.join([*LOAD, *does])
            shell.check(load, PATIENCE)
        finally:
            shell.check(f"umount {place}")
        told = [json.loads(line) for line in shell.check(f"cat {notes}").splitlines()]
        leave(shell, disk)
        marked = marks(self.trace, self.size)
        assert len(marked) == len(told)
        lines = [[flushes, *what] for (flushes, _), (_, *what) in zip(marked, told)]
        self.notes.write_text("".join(json.dumps(line) + "\n" for line in lines))
        apart = [when - noted for (_, when), (noted, *_) in zip(marked, told)]
        with (RESULTS / "crashtest clocks.txt").open("a") as file:  # docs/crashtest.md has the most
            file.write(f"{case}: {1e3 * (max(apart) - min(apart)):.1f} ms\n")
        shutil.copy(bare, RESULTS)  # such as benchmarks/traces has
        self.pack(RESULTS / f"crashtest {case}.tar")
        new = self.image.with_name("new.raw")
        done = xen_disk("rewind", self.trace, "--base", self.base, "--at", "end", "-o", new)
        assert done.returncode == 0, done.stderr
        assert sh("cmp", str(new), str(self.image)) == ""


CASES = [
    Case("ext4", "files"),
    Case("xfs", "files"),
    Case("ext4", "sqlite DELETE EXTRA"),
    Case("ext4", "sqlite WAL FULL"),
    # Torn at 512 bytes: ext4's superblock, of two such sectors, has a fault of its own then.
    Case("xfs", "files", sector=512),
    Case("xfs", "sqlite WAL FULL", sector=512),
    # A disk that lies, a file system told not to flush, a database that does not.
    Case("ext4", "files", fault=f"{HERE / 'noflush.py'}:NoFlush", is_good=False),
    Case("ext4", "files", options="barrier=0", is_good=False),
    # it does not wait for the directory after it has removed its journal, which comes back then
    Case("ext4", "sqlite DELETE FULL", is_good=False),
    Case("ext4", "sqlite DELETE OFF", is_good=False),
    Case("ext4", "sqlite WAL OFF", is_good=False),
    # The storage of our own files: the next commit finishes the first.
    Case("ext4", "commit overlay"),
    Case("ext4", "commit vhd"),
    # What our program makes is whole when it has its name.
    Case("ext4", "make"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_states_are_good_or_the_fault_is_found(
    case: Case, request: pytest.FixtureRequest, connect: Connect, tmp_path: Path
) -> None:
    recording = Recording(tmp_path, case)
    is_ours = case.kind.startswith(("commit", "make"))
    recording.run(request.getfixturevalue("dom0" if is_ours else "guest"), connect)
    states = request.config.getoption("--states", 12)
    if not states:
        pytest.skip("--states 0: it is only recorded")
    said = recording.prove(states)
    (RESULTS / f"crashtest {case}.txt").write_text(said)  # docs/crashtest.md shows one


def test_another_guest_reads_a_moment_while_the_disk_is_used(
    dom0: Dom0, guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    """``at:`` of a trace that grows."""
    image, base, trace = tmp_path / "disk.raw", tmp_path / "base.raw", tmp_path / "disk.xdt"
    image.write_bytes(b"0" * (1 << 20))
    shutil.copy(image, base)
    record = f"record:file={trace},data=yes"
    disk = connect(guest, "--path", image, "--backend", "raw", "--filter", record)
    guest.wait_for_device(disk.device)
    for letter in "12":
        guest.check(
            f"head -c 65536 /dev/zero | tr '\\0' {letter} | "
            f"dd of=/dev/{disk.device} bs=64k iflag=fullblock oflag=direct conv=fsync 2>/dev/null"
        )
    rewind = shlex.join([*PROGRAM, "rewind", str(trace), "--base", str(base), "--at", "flush:2"])
    dom0.wait_until(f"{rewind} -o {tmp_path}/flushed 2>/dev/null", 180, "no second flush")
    then = connect(dom0, "--path", f"at:{trace}@flush:1", "--option", f"base={base}")
    dom0.wait_for_device(then.device)
    read = "dd if=/dev/{} bs=64k count=2 iflag=direct 2>/dev/null | tr -s 0-9"
    assert dom0.check(read.format(then.device)) == "10"
    assert guest.check(read.format(disk.device)) == "20"
    assert dom0.check(f"cat /sys/block/{then.device}/ro") == "1\n"
    leave(dom0, then)
    leave(guest, disk)
