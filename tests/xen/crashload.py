"""Run as a program in dom0: a load that notes what it was told, and the check of what is left.

``crashload.py load KIND DIRECTORY NOTES`` works in a mounted directory; ``crashload.py check KIND
IMAGE NOTES`` mounts what a power cut has left, and looks for all that the load was told before
(``XEN_DISK_UNTIL``): a file is there whole after its ``fsync`` and that of its directory, a
transaction after its commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROUNDS = {"files": 24, "sqlite": 40}
ROWS = 60
TOTAL = 1000 * ROWS
_MARGIN = 0.001  # seconds; the clocks of the trace and of the notes are read at different places


def content(number: int) -> bytes:
    """Return what a file holds."""
    length = random.Random(number).randrange(1, 40_000)
    return (hashlib.sha256(str(number).encode()).digest() * (length // 32 + 1))[:length]


class Notes:
    """What happened, a JSON line for each."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="ascii", buffering=1)  # noqa: SIM115

    def __call__(self, what: str, number: int) -> None:
        self._file.write(json.dumps([time.time(), what, number]) + "\n")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load_files(top: Path, note: Notes) -> None:
    """Make, replace and remove files, as mail servers and editors do."""
    for number in range(ROUNDS["files"]):
        (top / f"f{number}").write_bytes(content(number))
        if number % 3 == 2:
            continue  # nobody waits for this one
        _sync(top / f"f{number}")
        _sync(top)
        note("made", number)
        (top / "new").write_bytes(content(1000 + number))
        _sync(top / "new")
        os.rename(top / "new", top / "current")
        _sync(top)
        note("current", number)
        if number % 6 == 0 and number:
            note("removing", number - 6)
            (top / f"f{number - 6}").unlink()


def check_files(top: Path, noted: list[tuple[str, int]], begun: set[int]) -> None:
    """See that they are there."""
    current = -1
    for what, number in noted:
        if what == "made" and number not in begun:
            assert (top / f"f{number}").read_bytes() == content(number), f"f{number}"
        if what == "current":
            current = number
    if current >= 0:
        found = (top / "current").read_bytes()
        later = {content(1000 + number) for number in range(current, ROUNDS["files"])}
        assert found in later, f"current is older than {current}, or nothing"


def load_sqlite(top: Path, note: Notes, journal: str, synchronous: str) -> None:
    """Move money between accounts, and count the transactions."""
    database = sqlite3.connect(str(top / "bank.db"), isolation_level=None)
    database.execute(f"PRAGMA journal_mode={journal}")
    database.execute(f"PRAGMA synchronous={synchronous}")
    database.execute("CREATE TABLE bank (id INTEGER PRIMARY KEY, money INTEGER, filler TEXT)")
    database.execute("CREATE TABLE count (number INTEGER)")
    database.execute("BEGIN")
    database.executemany(
        "INSERT INTO bank VALUES (?, 1000, ?)", [(row, "x" * 700) for row in range(ROWS)]
    )
    database.execute("INSERT INTO count VALUES (0)")
    database.execute("COMMIT")
    _sync(top)
    note("committed", 0)
    dice = random.Random(1)
    for number in range(1, ROUNDS["sqlite"]):
        database.execute("BEGIN IMMEDIATE")
        for _ in range(4):
            one, other = dice.sample(range(ROWS), 2)
            database.execute("UPDATE bank SET money = money - 7 WHERE id = ?", (one,))
            database.execute("UPDATE bank SET money = money + 7 WHERE id = ?", (other,))
        database.execute("UPDATE count SET number = ?", (number,))
        database.execute("COMMIT")
        note("committed", number)
    database.close()


def check_sqlite(top: Path, noted: list[tuple[str, int]]) -> None:
    """See that no money is lost, and no transaction."""
    if not noted:
        return
    with closing(sqlite3.connect(str(top / "bank.db"))) as database:
        assert [("ok",)] == database.execute("PRAGMA integrity_check").fetchall()
        assert [(TOTAL,)] == database.execute("SELECT sum(money) FROM bank").fetchall()
        ((number,),) = database.execute("SELECT number FROM count").fetchall()
    assert number >= noted[-1][1], f"{number} transactions, {noted[-1][1]} were committed"


def load(kind: str, directory: str, path: str) -> None:
    """Do a load of a kind: ``files``, or ``sqlite JOURNAL SYNCHRONOUS``."""
    note = Notes(path)
    name, *options = kind.split()
    if name == "files":
        load_files(Path(directory), note)
    else:
        load_sqlite(Path(directory), note, *options)


def check(kind: str, image: str, path: str) -> None:
    """Mount an image, look, unmount, and have the file system's own program look, too."""
    until = float(os.environ.get("XEN_DISK_UNTIL") or "inf") - _MARGIN
    told = [json.loads(line) for line in Path(path).read_text(encoding="ascii").splitlines()]
    noted = [(what, number) for when, what, number in told if when < until]
    begun = {number for _, what, number in told if what == "removing"}
    system = subprocess.run(
        ["blkid", "-o", "value", "-s", "TYPE", image], capture_output=True, text=True, check=True
    ).stdout.strip()
    options = "loop,nouuid" if system == "xfs" else "loop"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", system, "-o", options, image, directory], check=True)
        try:
            if kind.startswith("files"):
                check_files(Path(directory), noted, begun)
            else:
                check_sqlite(Path(directory), noted)
        finally:
            subprocess.run(["umount", directory], check=True)
    program = ["xfs_repair", "-n"] if system == "xfs" else ["e2fsck", "-fn"]
    subprocess.run([*program, image], check=True)


if __name__ == "__main__":
    {"load": load, "check": check}[sys.argv[1]](*sys.argv[2:])
