"""Run as a program in a guest: a load that notes what it was told; and in dom0, the check of what
is left.

``crashload.py load KIND DIRECTORY NOTES DEVICE OFFSET`` works in a directory, and marks each
note in the recording of the disk: it reads a block behind the file system, the first, at OFFSET of
the device, for the first note. So the order of requests says what the load was told by when, and no
two clocks are compared. ``crashload.py check KIND IMAGE NOTES``, with the number of flushes before
each note, mounts what a power cut has left, and looks for all that the load was told by then
(``XEN_DISK_FLUSH``): a file is there whole after its ``fsync`` and that of its directory, a
transaction after its commit; and what our own program has made has one of the contents that it may
have.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Callable

with suppress(ImportError):  # a Python may be built without, and imports these tests all the same
    import sqlite3

ROUNDS = {"files": 24, "sqlite": 40}
ROWS = 60
TOTAL = 1000 * ROWS
MARK = 4096  # bytes of the block that is read for a note
_IMAGE = 1 << 20  # bytes of an image of ours
_WRITE = 32 << 10


def content(number: int) -> bytes:
    """Return what a file holds."""
    length = random.Random(number).randrange(1, 40_000)
    return (hashlib.sha256(str(number).encode()).digest() * (length // 32 + 1))[:length]


class Notes:
    """What happened, a JSON line for each, marked in the recording of a disk.

    Args:
        path: of the file, on another disk.
        device: the disk.
        offset: bytes of it before the block of the first note.
    """

    def __init__(self, path: str, device: str, offset: int) -> None:
        self._file = open(path, "a", encoding="ascii", buffering=1)  # noqa: SIM115
        self._device = os.open(device, os.O_RDONLY | os.O_DIRECT)
        self._offset = offset
        self._page = mmap.mmap(-1, MARK)  # aligned

    def __call__(self, what: str, number: int) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._file.write(json.dumps([now, what, number]) + "\n")
        assert os.preadv(self._device, [self._page], self._offset) == MARK
        self._offset += MARK


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


PROGRAM = (sys.executable, "-m", "xen_disk_py")
_WRITTEN = ((512, 3072), (70_144, 200_704), (_IMAGE - 4096, 4096))  # offsets, lengths


def _ours(*words: str | Path) -> None:
    subprocess.run([*PROGRAM, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def _contents() -> tuple[bytes, bytes]:
    """What an image of ours has before a commit, and after it."""
    before = b"".join(bytes([65 + at % 26]) * 512 for at in range(_IMAGE // 512))
    after = bytearray(before)
    for offset, length in _WRITTEN:
        end = offset + length
        after[offset:end] = bytes(each + 32 for each in before[offset:end])
    return before, bytes(after)


def load_commit(top: Path, note: Notes, kind: str) -> None:
    """Make an image and the changes to it; commit these."""
    before, after = _contents()
    image, changes = top / f"image.{kind}", top / f"changes.{kind}"
    if kind == "vhd":
        from xen_disk_py.backends.vhd import VhdBackend as Backend

        _ours("create", image, "--size", str(_IMAGE))
        _write(Backend(str(image)), bytes(_IMAGE), before)
        _ours("create", changes, "--parent", image)
        disk: Any = Backend(str(changes))
    else:
        from xen_disk_py.backends.overlay.backend import OverlayBackend

        image.write_bytes(before)
        _sync(image)
        disk = OverlayBackend(str(image), overlay=str(changes))
    _write(disk, before, after)
    _sync(top)
    note("made", 0)
    _ours("commit", changes)
    note("committed", 0)


def _write(disk: Any, before: bytes, after: bytes) -> None:
    """Write what differs, as a guest does, and flush."""
    for at in range(0, _IMAGE, _WRITE):
        if before[at : at + _WRITE] != after[at : at + _WRITE]:
            disk.write([memoryview(after)[at : at + _WRITE]], at)
    disk.flush()
    disk.close()


def check_commit(top: Path, noted: list[tuple[str, int]], kind: str) -> None:
    """See that the image is as before or as after; and that a commit that was begun is finished."""
    told = [what for what, _ in noted]
    if "made" not in told:
        return
    before, after = _contents()
    image, changes = top / f"image.{kind}", top / f"changes.{kind}"
    if kind == "overlay":
        assert image.read_bytes() in (before, after), "neither the old content nor the new"
    if changes.exists():
        _ours("commit", changes, *(("--path", image) if kind == "overlay" else ()))
    copy = image
    if kind == "vhd":
        copy = top / "copy"
        _ours("check", image)
        _ours("export", image, copy)
    assert copy.read_bytes() == after, "not the new content"


MADE = {  # how our program makes each image, in this order
    "empty.vhd": ("create", "empty.vhd", "--size", str(_IMAGE)),
    "child.vhd": ("create", "child.vhd", "--parent", "image.raw", "--parent-format", "raw"),
    "copy.raw": ("export", "--format", "raw", "image.raw", "copy.raw"),
    "copy.vhd": ("export", "--format", "raw", "--output-format", "vhd", "image.raw", "copy.vhd"),
    "copy.qcow2": (
        *("export", "--format", "raw", "--output-format", "qcow2"),
        *("image.raw", "copy.qcow2"),
    ),
    "again.raw": ("export", "--format", "vhd", "--force", "child.vhd", "again.raw"),
}
QEMU_IMG = shutil.which("qemu-img")


def load_make(top: Path, note: Notes) -> None:
    """Make images of all kinds; the last in the place of another."""
    before, after = _contents()
    (top / "image.raw").write_bytes(after)
    (top / "again.raw").write_bytes(before)
    for name in ("image.raw", "again.raw", "."):
        _sync(top / name)
    note("given", 0)
    for number, (name, words) in enumerate(MADE.items()):
        if name.endswith(".qcow2") and QEMU_IMG is None:
            continue
        _ours(*(top / word if "." in word else word for word in words))
        note(name, number)


def check_make(top: Path, noted: list[tuple[str, int]]) -> None:
    """See that each is whole if it is there, and that it is there once it was made."""
    told = [what for what, _ in noted]
    if "given" not in told:
        return
    before, after = _contents()
    for name in MADE:
        path = top / name
        if not path.exists():
            assert name not in told, f"{name} was made and is not there"
            continue
        content = _content_of(path)
        if name == "again.raw" and name not in told:
            assert content in (before, after), f"{name} is neither the old one nor the new one"
        else:
            assert content == (bytes(_IMAGE) if name == "empty.vhd" else after), name


def _content_of(path: Path) -> bytes:
    """Read an image; other programs find nothing wrong with it."""
    if path.suffix == ".raw":
        return path.read_bytes()
    if path.suffix == ".vhd":
        from xen_disk_py.backends.vhd import VhdBackend
        from xen_disk_py.backends.vhd.check import check

        assert not [each for each in check(str(path)) if each.is_error], path.name
        page = memoryview(bytearray(_IMAGE))
        with closing(VhdBackend(str(path), read_only=True)) as disk:
            done = 0
            while done < _IMAGE:
                done += disk.read([page[done:]], done)
        if path.name == "child.vhd" or QEMU_IMG is None:  # QEMU knows no VHD with a parent
            return bytes(page)
    form = "qcow2" if path.suffix == ".qcow2" else "vpc"
    with tempfile.NamedTemporaryFile() as raw:
        assert QEMU_IMG is not None
        if form == "qcow2":
            subprocess.run([QEMU_IMG, "check", "-q", "-f", form, path], check=True)
        words = ("convert", "-U", "-f", form, "-O", "raw", path, raw.name)
        subprocess.run([QEMU_IMG, *words], check=True)
        found = raw.read()[:_IMAGE]
    assert path.suffix == ".qcow2" or found == bytes(page), path.name
    return found


def start_anew() -> None:
    """Have the host look as if it had been started once more; in a namespace of its own."""
    other = tempfile.NamedTemporaryFile("w", delete=False)  # noqa: SIM115
    with other:
        other.write(f"{uuid.uuid4()}\n")
    place = "/proc/sys/kernel/random/boot_id"
    subprocess.run(["mount", "--bind", other.name, place], check=True)
    os.unlink(other.name)


def load(kind: str, directory: str, path: str, device: str, offset: str) -> None:
    """Do a load: ``files``, ``sqlite JOURNAL SYNCHRONOUS``, ``commit FORMAT``, or ``make``."""
    note = Notes(path, device, int(offset))
    name, *options = kind.split()
    loads: dict[str, Callable[..., None]] = {
        "files": load_files,
        "sqlite": load_sqlite,
        "commit": load_commit,
        "make": load_make,
    }
    loads[name](Path(directory), note, *options)


def check(kind: str, image: str, path: str) -> None:
    """Mount an image, look, unmount, and have the file system's own program look, too."""
    flushes = int(os.environ["XEN_DISK_FLUSH"])
    told = [json.loads(line) for line in Path(path).read_text(encoding="ascii").splitlines()]
    noted = [(what, number) for before, what, number in told if before <= flushes]
    begun = {number for _, what, number in told if what == "removing"}
    name, *options = kind.split()
    system = subprocess.run(
        ["blkid", "-o", "value", "-s", "TYPE", image], capture_output=True, text=True, check=True
    ).stdout.strip()
    how = "loop,nouuid" if system == "xfs" else "loop"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", system, "-o", how, image, directory], check=True)
        try:
            if name == "files":
                check_files(Path(directory), noted, begun)
            elif name == "sqlite":
                check_sqlite(Path(directory), noted)
            elif name == "make":
                check_make(Path(directory), noted)
            else:
                start_anew()
                check_commit(Path(directory), noted, *options)
        finally:
            subprocess.run(["umount", directory], check=True)
    program = ["xfs_repair", "-n"] if system == "xfs" else ["e2fsck", "-fn"]
    subprocess.run([*program, image], check=True)


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {"load": load, "check": check}
    programs[sys.argv[1]](*sys.argv[2:])
