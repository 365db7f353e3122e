"""What a power cut could have left of file systems and databases of a guest under load: all of it
is good, and a fault that was put there is found. So for our own formats, with dom0 as the guest.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.trace.reader import TraceReader

from .disk import PROGRAM, Disk, xen_disk
from .guest import Dom0, Guest, Shell, sh
from .test_integrity import leave
from .tools import command, write_ramdisk

Connect = Callable[..., Disk]

HERE = Path(__file__).parent
SCRIPT = HERE / "crashload.py"
LOAD = (sys.executable, str(SCRIPT))
RESULTS = os.environ.get("XEN_LAB_RESULTS")
MAKE = {  # with blocks of one sector: ext4's superblock has two of 512 bytes, and a checksum
    "ext4": ("48M", "-b", "4096"),
    "xfs": ("300M", "-s", "size=4096"),  # xfsprogs 6 makes none that is smaller
}
STATES = 12
PATIENCE = 900


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with Python, SQLite and xfs."""
    ramdisk = tmp_path_factory.mktemp("tools") / "ramdisk"
    write_ramdisk(ramdisk, SCRIPT)
    with Guest("pv", ramdisk=ramdisk, memory=384) as guest:
        guest.is_shared = True
        yield guest


def booted(shell: Shell) -> float:
    """Return when a guest was booted, in seconds since 1970, or a moment later: what it notes has
    happened by then.
    """
    times = []
    for _ in range(5):
        uptime = shell.uptime()
        times.append(time.time() - uptime)
    return min(times)


class Recording:
    """A file system in an image, the load that ran on it, and its trace."""

    def __init__(self, directory: Path, system: str, kind: str) -> None:
        sh("modprobe", "loop")
        self.kind = kind
        self.system = system
        self.image, self.base = directory / "disk.raw", directory / "base.raw"
        self.trace, self.notes = directory / "disk.xdt", directory / "notes"
        size, *options = MAKE[system]
        sh("truncate", "-s", size, str(self.image))
        sh(f"mkfs.{system}", "-q", *options, str(self.image))
        sh("cp", "--sparse=always", str(self.image), str(self.base))

    def run(self, shell: Shell, connect: Connect, *filters: str, options: str = "defaults") -> None:
        """Have a guest mount it and do the load."""
        words = [word for each in filters for word in ("--filter", each)]
        record = f"record:file={self.trace},data=yes"
        bare = self.trace.with_name(f"{self.system} {self.kind}.xdt")
        where = ("--path", self.image, "--backend", "raw", "--sector-size", "4096")
        disk = connect(shell, *where, "--filter", record, "--filter", f"record:file={bare}", *words)
        shell.wait_for_device(disk.device)
        place, notes = ("/mnt", "/tmp/notes") if shell.domid else ("/run/lab/mounted", "/run/notes")
        does = ("load", self.kind, place, notes)
        start = booted(shell)
        mount = f"mount -t {self.system} -o {options} /dev/{disk.device} {place}"
        shell.check(f"rm -f {notes}; mkdir -p {place}; {mount}")
        try:
            load = command(SCRIPT, *does) if shell.domid else shlex.join([*LOAD, *does])
            shell.check(load, PATIENCE)
        finally:
            shell.check(f"umount {place}")
        told = [json.loads(line) for line in shell.check(f"cat {notes}").splitlines()]
        self.notes.write_text(
            "".join(json.dumps([start + when, *what]) + "\n" for when, *what in told)
        )
        leave(shell, disk)
        if RESULTS is not None:  # such as benchmarks/traces has
            shutil.copy(bare, RESULTS)

    def crashtest(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Try what a power cut could have left."""
        check = shlex.join([*LOAD, "check", self.kind])
        check = f"unshare -m {check} {{}} {shlex.quote(str(self.notes))} 2>&1"
        words = [*PROGRAM, "crashtest", str(self.trace), "--base", str(self.base)]
        words += ["--check", check, "--timeout", "300", *options]
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        print(done.stdout)
        assert done.returncode in (0, 1), done.stderr
        return done

    def all_is_good(self, limit: int = STATES, *options: str) -> None:
        """Try the states, none of which may fail; and the end of the trace is the image."""
        found = json.loads(self.crashtest("--json", "--limit", str(limit), *options).stdout)
        assert found["failure"] is None
        assert found["flushes"] > 10
        assert found["tried"] > limit // 2
        new = self.image.with_name("new.raw")
        where = ("--base", self.base, "--at", "end", "-o", new)
        done = xen_disk("rewind", self.trace, *where)
        assert done.returncode == 0, done.stderr
        assert sh("cmp", str(new), str(self.image)) == ""


LOADS = [
    ("ext4", "files"),
    ("xfs", "files"),
    ("ext4", "sqlite DELETE EXTRA"),
    ("ext4", "sqlite WAL FULL"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("system", "kind"), LOADS)
def test_all_states_are_good(
    system: str, kind: str, guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    recording = Recording(tmp_path, system, kind)
    recording.run(guest, connect)
    recording.all_is_good()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["overlay", "vhd"])
def test_a_commit_of_ours_is_finished_or_never_was(
    kind: str, dom0: Dom0, connect: Connect, tmp_path: Path
) -> None:
    """The storage of our own files is recorded, and the next commit finishes the first."""
    recording = Recording(tmp_path, "ext4", f"commit {kind}")
    recording.run(dom0, connect)
    made, *_ = json.loads(recording.notes.read_text().splitlines()[0])
    with TraceReader(str(recording.trace)) as reader:
        since = made - reader.header.started / 1e9
    recording.all_is_good(STATES, "--from", f"{since:.6f}s")


FAULTS = [
    ("ext4", "files", f"{HERE / 'noflush.py'}:NoFlush", "defaults"),
    ("ext4", "files", None, "barrier=0"),
    # it does not wait for the directory after it has removed its journal, which comes back then
    ("ext4", "sqlite DELETE FULL", None, "defaults"),
    ("ext4", "sqlite DELETE OFF", None, "defaults"),
    ("ext4", "sqlite WAL OFF", None, "defaults"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("system", "kind", "fault", "options"), FAULTS)
def test_a_fault_is_found(
    system: str,
    kind: str,
    fault: str | None,
    options: str,
    guest: Guest,
    connect: Connect,
    tmp_path: Path,
) -> None:
    """A disk that lies, a file system told not to flush, a database that does not."""
    recording = Recording(tmp_path, system, kind)
    recording.run(guest, connect, *([fault] if fault else []), options=options)
    said = recording.crashtest("--limit", str(STATES)).stdout
    assert "did not fail a second time" not in said
    least = re.search(r"the least that fails: --state (\S+)$", said, re.MULTILINE)
    assert least
    assert recording.crashtest("--state", least[1]).returncode == 1
    if RESULTS is not None:  # docs/crashtest.md shows one
        (Path(RESULTS) / f"crashtest {kind} {options}.txt").write_text(said)


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
