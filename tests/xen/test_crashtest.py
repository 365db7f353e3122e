"""What a power cut could have left of file systems and databases under load, on a real ring: all of
it is good, and a fault that was put there is found.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from .disk import PROGRAM, Disk, xen_disk
from .guest import Dom0, sh
from .test_integrity import leave

Connect = Callable[..., Disk]

HERE = Path(__file__).parent
LOAD = (sys.executable, str(HERE / "crashload.py"))
SIZES = {"ext4": "48M", "xfs": "300M"}  # xfsprogs 6 makes none that is smaller
STATES = 16
PATIENCE = 900


class Recording:
    """A file system in an image, the load that ran on it, and its trace."""

    def __init__(self, directory: Path, system: str, kind: str) -> None:
        sh("modprobe", "loop")
        self.kind = kind
        self.system = system
        self.image, self.base = directory / "disk.raw", directory / "base.raw"
        self.trace, self.notes = directory / "disk.xdt", directory / "notes"
        sh("truncate", "-s", SIZES[system], str(self.image))
        sh(f"mkfs.{system}", "-q", str(self.image))
        sh("cp", "--sparse=always", str(self.image), str(self.base))

    def run(self, dom0: Dom0, connect: Connect, *filters: str, options: str = "defaults") -> None:
        """Have dom0, as its own guest, mount it and do the load."""
        words = [word for each in filters for word in ("--filter", each)]
        record = f"record:file={self.trace},data=yes"
        disk = connect(dom0, "--path", self.image, "--backend", "raw", "--filter", record, *words)
        dom0.wait_for_device(disk.device)
        place = self.image.parent / "mounted"
        place.mkdir()
        sh("mount", "-t", self.system, "-o", options, f"/dev/{disk.device}", str(place))
        try:
            sh(*LOAD, "load", self.kind, str(place), str(self.notes), timeout=PATIENCE)
        finally:
            sh("umount", str(place))
        leave(dom0, disk)

    def crashtest(self, *options: str) -> dict[str, Any]:
        """Try what a power cut could have left; return what was found."""
        check = (
            f"{shlex.join([*LOAD, 'check', self.kind])} {{}} {shlex.quote(str(self.notes))} 2>&1"
        )
        command = [*PROGRAM, "crashtest", str(self.trace), "--base", str(self.base)]
        command += ["--check", check, "--json", "--timeout", "300", "--limit", str(STATES)]
        done = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        found = json.loads(done.stdout)
        print(json.dumps(found, indent=1))
        return found


LOADS = [
    ("ext4", "files"),
    ("xfs", "files"),
    ("ext4", "sqlite DELETE FULL"),
    ("ext4", "sqlite WAL FULL"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("system", "kind"), LOADS)
def test_all_states_are_good(
    system: str, kind: str, dom0: Dom0, connect: Connect, tmp_path: Path
) -> None:
    """Also, the end of the trace is the image, byte for byte."""
    recording = Recording(tmp_path, system, kind)
    recording.run(dom0, connect)
    found = recording.crashtest()
    assert found["failure"] is None
    assert found["flushes"] > 10
    assert found["tried"] > STATES // 2
    new = tmp_path / "new.raw"
    done = xen_disk("rewind", recording.trace, "--base", recording.base, "--at", "end", "-o", new)
    assert done.returncode == 0, done.stderr
    assert sh("cmp", str(new), str(recording.image)) == ""


FAULTS = [
    ("ext4", "files", f"{HERE / 'noflush.py'}:NoFlush", "defaults"),
    ("ext4", "files", None, "barrier=0"),
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
    dom0: Dom0,
    connect: Connect,
    tmp_path: Path,
) -> None:
    """A disk that lies, a file system told not to flush, a database that does not."""
    recording = Recording(tmp_path, system, kind)
    recording.run(dom0, connect, *([fault] if fault else []), options=options)
    failure = recording.crashtest()["failure"]
    assert failure is not None
    assert failure["steady"]
    again = recording.crashtest("--state", failure["least"])
    assert again["status"] != 0


def test_another_guest_reads_a_moment_while_the_disk_is_used(
    dom0: Dom0, connect: Connect, tmp_path: Path
) -> None:
    """``at:`` of a trace that grows."""
    image, base, trace = tmp_path / "disk.raw", tmp_path / "base.raw", tmp_path / "disk.xdt"
    image.write_bytes(b"0" * (1 << 20))
    shutil.copy(image, base)
    record = f"record:file={trace},data=yes"
    disk = connect(dom0, "--path", image, "--backend", "raw", "--filter", record)
    dom0.wait_for_device(disk.device)
    for letter in "12":
        dom0.check(
            f"head -c 65536 /dev/zero | tr '\\0' {letter} | "
            f"dd of=/dev/{disk.device} bs=64k iflag=fullblock oflag=direct conv=fsync 2>/dev/null"
        )
    dom0.wait_until(
        f"{shlex.join([*PROGRAM, 'rewind', str(trace), '--base', str(base)])} --at flush:2 "
        f"-o {tmp_path}/flushed 2>/dev/null",
        180,
        "the second flush is not in the trace",
    )
    then = connect(dom0, "--path", f"at:{trace}@flush:1", "--option", f"base={base}")
    dom0.wait_for_device(then.device)
    read = f"dd if=/dev/{then.device} bs=64k count=2 iflag=direct 2>/dev/null | tr -s 0-9"
    assert dom0.check(read) == "10"
    assert dom0.check(f"cat /sys/block/{then.device}/ro") == "1\n"
    leave(dom0, then)
    leave(dom0, disk)
