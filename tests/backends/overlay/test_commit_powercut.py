"""What a power cut could leave of a commit, its files torn at sectors: it was, or never was."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from long_run import LONG

from xen_disk_py.backends.overlay import file as file_module
from xen_disk_py.backends.overlay import maintenance
from xen_disk_py.backends.overlay.backend import OverlayBackend

SECTOR = 512
BEFORE = b"i" * (32 << 10)
AFTER = b"i" * 512 + b"x" * 9000 + BEFORE[9512:]
NAMES = ("link", "rename", "unlink")


@pytest.fixture
def memory(tmp_path):
    """A directory where nothing waits for storage."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=where) as directory:
        yield Path(directory)


class Files:
    """An image and an overlay that was flushed, by names of any length: the header has them."""

    def __init__(self, memory, dice):
        self.directory = Path(tempfile.mkdtemp(dir=memory)) / ("d" * dice.randrange(1, 250))
        self.directory.mkdir()
        self.image, self.overlay = (str(self.directory / name) for name in ("image", "changes"))
        Path(self.image).write_bytes(BEFORE)
        disk = OverlayBackend(self.image, overlay=self.overlay)
        disk.write([memoryview(AFTER)[512:9728]], 512)
        disk.close()

    def commit(self, keep):
        maintenance.commit(self.overlay, keep=keep, progress=lambda done, total: None)

    def read(self):
        if not os.path.exists(self.overlay):
            return Path(self.image).read_bytes()
        page = memoryview(bytearray(len(BEFORE)))
        disk = OverlayBackend(self.image, overlay=self.overlay)
        disk.read([page], 0)
        disk.close()
        return bytes(page)


class Storage:
    """Stands between a process and its files: notes what is not on stable storage yet."""

    def __init__(self, log, stop, lies):
        self._log = open(log, "w", encoding="ascii", buffering=1)  # noqa: SIM115
        self._stop, self._lies, self._effects = stop, lies, 0
        for name in ("pwrite", "pwritev"):
            setattr(os, name, self._writing(getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._syncing(getattr(os, name)))
        for name in NAMES:
            setattr(os, name, self._naming(name, getattr(os, name)))
        file_module.punch_hole = self._punching(file_module.punch_hole)
        del os.copy_file_range

    def _count(self):
        self._effects += 1
        if self._effects == self._stop:
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, *words):
        print(*words, file=self._log)

    def _writing(self, real):
        def write(fd, data, offset, *more):
            self._count()
            length = sum(map(len, data)) if isinstance(data, list) else len(data)
            first = offset // SECTOR * SECTOR
            size = -(-(offset + length) // SECTOR) * SECTOR - first
            old = os.pread(fd, size, first).ljust(size, b"\0")
            done = real(fd, data, offset, *more)
            new = os.pread(fd, size, first).ljust(size, b"\0")
            self._note("write", os.fstat(fd).st_ino, first, old.hex(), new.hex())
            return done

        return write

    def _punching(self, real):
        def punch(fd, offset, length):
            self._count()
            old = os.pread(fd, length, offset).ljust(length, b"\0")
            real(fd, offset, length)
            self._note("write", os.fstat(fd).st_ino, offset, old.hex(), bytes(length).hex())

        return punch

    def _syncing(self, real):
        def sync(fd):
            self._count()
            real(fd)
            if not self._lies:
                self._note("sync", os.fstat(fd).st_ino)

        return sync

    def _naming(self, name, real):
        def change(*args, **options):
            self._count()
            self._note("name", name)
            return real(*args, **options)

        return change


def cut(files, keep, stop, log, *, lies):
    """Commit, and lose the power before an effect; return whether it was, and what is not stored.

    What is not: of each file by its inode, of each sector the contents that it may have.
    """
    child = os.fork()
    if not child:
        try:
            Storage(log, stop, lies)
            files.commit(keep)
        except BaseException:  # pytest must not continue in the child
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    pending, is_named = defaultdict(dict), False
    for line in log.read_text("ascii").splitlines():
        what, *words = line.split()
        if what == "sync":
            pending.pop(int(words[0]), None)
            is_named = False  # of the directory, or before anything was named
        elif what == "name":
            is_named = True
        else:
            # else a name that is not stored would have to be taken back here, too
            assert lies or not is_named
            inode, offset, old, new = int(words[0]), int(words[1]), *map(bytes.fromhex, words[2:])
            for at in range(0, len(old), SECTOR):
                sector = pending[inode].setdefault(offset + at, [old[at : at + SECTOR]])
                sector.append(new[at : at + SECTOR])
    return bool(status), pending


def lose(files, pending, dice):
    """Put any of its possible contents into each sector."""
    for name in os.listdir(files.directory):
        path = files.directory / name
        before = path.stat()
        with open(path, "r+b") as file:
            for at, contents in pending.get(before.st_ino, {}).items():
                file.seek(at)
                file.write(dice.choice(contents))
        os.truncate(path, before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def states(memory, boot, *, keep, then, lies=False, turns=2 if LONG else 1):
    """Try all instants; yield of each state what is wrong with it, or None."""
    stop, is_cut = 0, True
    dice = random.Random(7)
    while is_cut:
        stop += 1
        for _ in range(turns):
            boot("a")
            files = Files(memory, dice)
            boot("b")
            is_cut, pending = cut(files, keep, stop, memory / "log", lies=lies)
            boot("c")
            lose(files, pending, dice)
            try:
                assert Path(files.image).read_bytes() in (BEFORE, AFTER)
                if then == "commit" and os.path.exists(files.overlay):
                    files.commit(keep)
                    assert Path(files.image).read_bytes() == AFTER
                assert files.read() == AFTER
            except Exception as error:  # whatever makes the disk unusable
                yield stop, repr(error)
            else:
                yield None


@pytest.mark.parametrize(("keep", "then"), [(False, "commit"), (True, "connect")])
def test_every_state_has_the_changes(memory, boot, keep, then):
    found = list(states(memory, boot, keep=keep, then=then))
    assert len(found) > 12  # effects, each tried as often
    assert [] == [each for each in found if each]


def test_a_commit_that_does_not_wait_for_its_storage_is_found(memory, boot):
    assert any(states(memory, boot, keep=False, then="commit", lies=True))
