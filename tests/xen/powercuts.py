"""Recordings of loads in a guest, and what a power cut could have left of them.

``test_crashtest.py`` makes them in the lab, tries a few states of each, and keeps them among its
results. As a program, on any machine, as root, this tries many more::

    python -m tests.xen.lab test tests/xen/test_crashtest.py --states 0
    python -m tests.xen.powercuts build/xen/bookworm-test 2000
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from xen_disk_py.trace.format import FLUSH, READ
from xen_disk_py.trace.reader import TraceReader

from .crashload import MARK
from .disk import PROGRAM

LOAD = (sys.executable, str(Path(__file__).resolve().parent / "crashload.py"))
PATIENCE = 3600
MARKS = 256 * MARK  # bytes behind the file system, for the marks of its notes


@dataclass(frozen=True)
class Case:
    """A load, and what is to be found.

    Attributes:
        system: the file system.
        kind: the load, as ``crashload.py`` takes it.
        fault: a filter that the disk has.
        options: of the mount.
        is_good: whether every state is to be.
        sector: bytes of a sector of the disk, at which writes are torn.
    """

    system: str
    kind: str
    fault: str = ""
    options: str = "defaults"
    is_good: bool = True
    sector: int = 4096

    def __str__(self) -> str:
        fault = self.fault.rpartition(":")[2]
        sector = "" if self.sector == 4096 else str(self.sector)
        return " ".join(filter(None, (self.system, self.kind, fault, self.options, sector)))


class Recorded:
    """A directory with a trace, what the disk was before, and what the load was told."""

    def __init__(self, directory: Path, case: Case) -> None:
        self.directory = directory
        self.case = case
        self.image, self.base = directory / "disk.raw", directory / "base.raw"
        self.trace, self.notes = directory / "disk.xdt", directory / "notes"

    def pack(self, path: Path) -> None:
        """Write an archive of it, without the holes."""
        (self.directory / "case").write_text(json.dumps(vars(self.case)))
        names = ("case", self.base.name, self.trace.name, self.notes.name)
        subprocess.run(["tar", "-C", self.directory, "-cSf", path, *names], check=True)

    @classmethod
    def unpack(cls, path: Path, directory: Path) -> Recorded:
        """Read such an archive, one's own."""
        subprocess.run(["tar", "-C", directory, "-xSf", path], check=True)
        return cls(directory, Case(**json.loads((directory / "case").read_text())))

    def crashtest(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Try what a power cut could have left."""
        check = shlex.join([*LOAD, "check", self.case.kind])
        check = f"unshare -m {check} {{}} {shlex.quote(str(self.notes))} 2>&1"
        words = [*PROGRAM, "crashtest", str(self.trace), "--base", str(self.base)]
        words += ["--check", check, "--timeout", "300", *options]
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode in (0, 1), done.stderr
        return done

    def prove(self, limit: int) -> str:
        """Try the states, and see that it is as it should be; return what was said.

        Where a fault is to be found, the least that shows it does so again.
        """
        since: tuple[str, ...] = ()
        if self.case.kind.startswith(("commit", "make")):  # what came before has tests of its own
            made, *_ = json.loads(self.notes.read_text().splitlines()[0])
            since = ("--from", f"flush:{made}")
        most = str(min(limit, 200))  # in the lab a check takes some 20 seconds
        done = self.crashtest("--limit", str(limit), "--reduce", most, *since)
        said = done.stdout
        tried, flushes = map(
            int, re.findall(r"^(\d+) states tried, .*; (\d+) flushes$", said, re.MULTILINE)[0]
        )
        if self.case.is_good:
            assert done.returncode == 0, said
            assert flushes > 10, said
            assert tried > limit // 2, said
            return said
        assert done.returncode == 1, said
        assert "did not fail a second time" not in said, said
        least = re.search(r"the least that fails: --state (\S+)$", said, re.MULTILINE)
        assert least, said
        again = self.crashtest("--state", least[1])
        assert again.returncode == 1, again.stdout
        return said


def marks(trace: Path, offset: int) -> list[tuple[int, float]]:
    """Return what a recording has of the notes: the flushes before each, and when, in seconds.

    Args:
        trace: the recording.
        offset: bytes of the disk before the block of the first note; nothing else is read there.
    """
    found: list[tuple[int, float]] = []
    flushes = 0
    with TraceReader(str(trace)) as reader:
        for record in reader.records():
            flushes += record.operation == FLUSH and not record.status
            if record.operation == READ and 0 <= record.offset - offset < MARKS:
                assert (record.offset, record.length) == (offset + len(found) * MARK, MARK)
                found.append((flushes, record.start / 1e9))
    return found


def main(directory: str, limit: str) -> None:
    """Prove it of all recordings in a directory."""
    for path in sorted(Path(directory).glob("crashtest *.tar")):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            recorded = Recorded.unpack(path, Path(place))
            said = recorded.prove(int(limit))
        lines = said.splitlines()
        print(f"{recorded.case}: {'; '.join(lines[:2])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
