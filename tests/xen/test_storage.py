"""Storage that fails, by Linux's device-mapper: what a flush was answered OK for is there.

A device-mapper table is swapped under a disk that a guest writes to: for one whose reads and writes
are errors, for one that fails now and then, for one that loses what it takes; or the disk is a thin
volume whose pool runs out of room. Afterwards each block is compared with what may be there (see
``durable.py``), past every page cache.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable

import pytest

from .disk import Disk, xen_disk
from .durable import BLOCK, content
from .guest import PATIENCE, Dom0, Guest, Job, no_errors, sh
from .test_integrity import leave, mounted_in
from .test_reliability import ext4_load, facts, taken_over, wait_held, worker

MIB = 1 << 20
SECTORS = MIB // 512  # in a MiB
SIZE = 16  # MiB

Connect = Callable[..., Disk]

BACKENDS = [pytest.param("raw", marks=pytest.mark.smoke), "mmap"]
"""Those that leave it to Linux to write to the device."""


def dmsetup(command: str, *words: str, check: bool = True) -> str:
    """Run it; no udev is there to make the files in /dev/mapper."""
    return sh("env", "DM_DISABLE_UDEV=1", "dmsetup", command, *words, check=check)


def table(name: str, line: str) -> None:
    """Give a device another table, while it is used.

    What is under way waits meanwhile and is done by the new one.
    """
    dmsetup("suspend", "--noflush", "--nolockfs", name)
    try:
        dmsetup("load", name, "--table", line)
    finally:
        dmsetup("resume", name)


class Device:
    """A device-mapper device of ``SIZE`` MiB that does what its table says."""

    name = "lab"
    path = Path("/dev/mapper/lab")

    def __init__(self, loop: str) -> None:
        self.below = self._loop = loop

    def make(self) -> None:
        """Make it sound."""
        dmsetup("create", self.name, "--table", self._line("linear"))

    def _line(self, target: str, *words: object) -> str:
        where = () if target == "error" else (self._loop, 0)
        return " ".join(map(str, (0, SIZE * SECTORS, target, *where, *words)))

    def sound(self) -> None:
        """Have it do what it is asked."""
        table(self.name, self._line("linear"))

    def broken(self) -> None:
        """Have everything fail."""
        table(self.name, self._line("error"))

    def fails_now_and_then(self) -> None:
        """Have writes and flushes fail in every other second."""
        table(self.name, self._line("flakey", 1, 1, 1, "error_writes"))

    def loses(self) -> None:
        """Have it say of each write that it is done, and forget it: power that fails."""
        table(self.name, self._line("flakey", 0, 3600, 1, "drop_writes"))


class Thin:
    """A thin volume of ``SIZE`` MiB in a pool that has less."""

    path = Path("/dev/mapper/lab-thin")

    def __init__(self, loop: str, metadata: str) -> None:
        self._loop, self._metadata = loop, metadata

    def _line(self, mib: int, *features: str) -> str:
        words = (0, mib * SECTORS, "thin-pool", self._metadata, self._loop, 128, 0)
        return " ".join(map(str, (*words, len(features), *features)))

    def make(self, *features: str) -> None:
        """Make a pool with room for half of the volume."""
        self._features = features
        dmsetup("create", "lab-pool", "--table", self._line(SIZE // 2, *features))
        dmsetup("message", "lab-pool", "0", "create_thin 0")
        line = f"0 {SIZE * SECTORS} thin /dev/mapper/lab-pool 0"
        dmsetup("create", "lab-thin", "--table", line)

    def is_full(self) -> bool:
        """Tell whether the pool has no room."""
        return "out_of_data_space" in dmsetup("status", "lab-pool")

    def extend(self) -> None:
        """Give the pool room for all of the volume, and more."""
        table("lab-pool", self._line(2 * SIZE, *self._features))


def loop_device(stack: ExitStack, path: Path, mib: int) -> str:
    """Return a loop device of zeros, whose page cache is not asked: it is written past."""
    sh("modprobe", "loop")
    sh("truncate", "-s", f"{mib}M", str(path))
    loop = sh("losetup", "--find", "--show", str(path)).strip()
    stack.callback(sh, "losetup", "--detach", loop)
    return loop


def remove(name: str) -> None:
    """Remove a device; what waits for it to be sound is an error then."""
    dmsetup("remove", "--retry", "--force", name, check=False)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A sound device."""
    with ExitStack() as stack:
        sh("modprobe", "-a", "dm-mod", "dm-flakey")
        device = Device(loop_device(stack, tmp_path / "storage", SIZE))
        stack.callback(remove, device.name)
        device.make()
        yield device


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[Thin]:
    """A thin volume, not made yet."""
    with ExitStack() as stack:
        sh("modprobe", "-a", "dm-mod", "dm-thin-pool")
        data = loop_device(stack, tmp_path / "data", 2 * SIZE)
        yield_this = Thin(data, loop_device(stack, tmp_path / "metadata", 4))
        for name in ("lab-pool", "lab-thin"):
            stack.callback(remove, name)
        yield yield_this


class Load:
    """Writers in dom0 that flush; see ``durable.py``."""

    def __init__(self, dom0: Dom0, disk: Disk, directory: Path, writers: int, mib: int) -> None:
        dom0.wait_for_device(disk.device)
        self._disk = disk
        self._journal, self._stop = directory / "journal", directory / "stop"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.xen.durable", f"/dev/{disk.device}"),
                *(str(self._journal), str(self._stop), str(writers), str(mib * MIB // BLOCK)),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def notes(self) -> list[dict[str, Any]]:
        """Return what has happened to it so far."""
        text = self._journal.read_text() if self._journal.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def flushes(self, how: str) -> int:
        """Return how many flushes were ``good`` or ``failed``."""
        return sum(note.get("flush") == how for note in self.notes())

    def errors(self) -> list[dict[str, Any]]:
        """Return what failed."""
        return [note for note in self.notes() if "error" in note]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is the case."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            said = f"{what}: {self.notes()[-5:]}\n{self._disk.describe()}"
            assert self._process.poll() is None, said + self._process.communicate()[1]
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    def wait_flushes(self, more: int = 3) -> None:
        """Wait for flushes from now on that are good."""
        before = self.flushes("good")
        self.wait(lambda: self.flushes("good") >= before + more, "no flush was good")

    def wait_failure(self) -> None:
        """Wait for the one flush that fails: after it the guest does not flush any more."""
        self.wait(lambda: self.flushes("failed") > 0, "no flush failed")

    def kill(self) -> None:
        """End it, after a test that has failed too: it would not release the disk."""
        self._stop.touch()
        self._process.kill()

    def end(self) -> dict[int, list[int]]:
        """End it, and return what may be in each block."""
        self._stop.touch()
        _, said = self._process.communicate(timeout=PATIENCE)
        assert (self._process.returncode, said) == (0, ""), said
        last = self.notes()[-1]
        print(f"{self.flushes('good')} flushes, {self.flushes('failed')} failed, {last['durable']}")
        return {int(block): values for block, values in last["possible"].items()}


Starting = Callable[..., Load]


@pytest.fixture
def start(dom0: Dom0, connect: Connect, tmp_path: Path) -> Iterator[Starting]:
    """Return a function that starts writers; they have ended when the disk is taken away."""
    loads: list[Load] = []

    def begin(disk: Disk, mib: int = SIZE) -> Load:
        # One where errors are told: after one failed flush, blkfront tells others that all is well.
        writers = 3 if "hold" in disk.command else 1
        loads.append(Load(dom0, disk, tmp_path, writers, mib))
        return loads[-1]

    yield begin
    for each in loads:
        each.kill()


def compare(path: Path, possible: dict[int, list[int]]) -> None:
    """See that each block of a device, or of a file that is finished, is what it may be."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if path.is_block_device() else 0))
    try:
        with mmap.mmap(-1, BLOCK) as page:
            wrong = {}
            for block, values in possible.items():
                assert os.preadv(fd, [page], block * BLOCK) == BLOCK
                if page[:] not in [content(value) for value in values]:
                    wrong[block] = int.from_bytes(page[:8], "big"), values
    finally:
        os.close(fd)
    assert wrong == {}, f"{len(wrong)} of {len(possible)} blocks are not what was flushed"


# -- errors that are reported ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flush_never_lies_while_the_storage_fails(
    backend: str, dom0: Dom0, connect: Connect, device: Device, start: Starting
) -> None:
    """Under load everything fails for a while: what a later flush says is true, too."""
    disk = connect(dom0, "--path", device.path, "--backend", backend)
    load = start(disk)
    load.wait_flushes()
    device.broken()
    load.wait_failure()
    device.sound()
    before = len(load.notes())
    load.wait(lambda: len(load.notes()) > before + 10, "nothing happens")
    possible = load.end()
    leave(dom0, disk)
    compare(device.path, possible)


def test_a_flush_never_lies_to_whoever_has_a_successor(
    dom0: Dom0, connect: Connect, device: Device, start: Starting
) -> None:
    """The process that knows that a flush failed is killed before the storage works again."""
    disk = connect(dom0, "--supervise", "--path", device.path, "--backend", "raw")
    load = start(disk)
    load.wait_flushes()
    device.broken()
    load.wait_failure()
    os.kill(worker(disk), 9)
    device.sound()
    taken_over(disk, 1)
    before = len(load.notes())
    load.wait(lambda: len(load.notes()) > before + 10, "nothing happens")
    possible = load.end()
    leave(dom0, disk)
    compare(device.path, possible)


def test_a_flush_never_lies_while_writes_fail_now_and_then(
    dom0: Dom0, connect: Connect, device: Device, start: Starting
) -> None:
    """Every other second."""
    disk = connect(dom0, "--path", device.path, "--backend", "raw")
    load = start(disk)
    load.wait_flushes()
    device.fails_now_and_then()
    load.wait_failure()
    device.sound()
    possible = load.end()
    leave(dom0, disk)
    compare(device.path, possible)


def test_an_overlay_knows_what_did_not_arrive(
    dom0: Dom0, connect: Connect, device: Device, start: Starting, tmp_path: Path
) -> None:
    """Its file system fails, and is mounted again: the changes that were flushed are in it."""
    image, new, changes = tmp_path / "image", tmp_path / "new", tmp_path / "mnt" / "changes"
    changes.parent.mkdir()
    sh("truncate", "-s", f"{SIZE // 4}M", str(image))
    sh("mkfs.ext4", "-q", str(device.path))
    sh("mount", "-o", "errors=continue", str(device.path), str(changes.parent))
    try:
        disk = connect(dom0, "--path", image, "--overlay", changes)
        load = start(disk, SIZE // 4)
        load.wait_flushes()
        device.broken()
        load.wait(lambda: load.flushes("failed") > 0 or load.errors() != [], "nothing fails")
        device.sound()
        possible = load.end()
        leave(dom0, disk)
    finally:
        device.sound()
        sh("umount", str(changes.parent))
    sh("e2fsck", "-p", str(device.path), check=False)  # it says 1 for what it has corrected
    sh("mount", str(device.path), str(changes.parent))
    try:
        exported = xen_disk("export", changes, new)
        assert exported.returncode == 0, exported
        compare(new, possible)
    finally:
        sh("umount", str(changes.parent))


def test_what_was_flushed_outlives_a_loss_of_power(
    dom0: Dom0, connect: Connect, device: Device, start: Starting
) -> None:
    """A flush is not answered before all is past every cache of dom0's."""
    disk = connect(dom0, "--path", device.path, "--backend", "raw")
    load = start(disk)
    load.wait_flushes(20)
    possible = load.end()
    dom0.check(f"dd if=/dev/urandom of=/dev/{disk.device} bs=4k count=1 oflag=direct seek=9")
    possible.pop(9, None)  # written, and not flushed
    device.loses()
    disk.kill()
    disk.wait()
    sh("blockdev", "--flushbufs", str(device.path))  # what dom0 still has goes nowhere
    device.sound()
    gone = xen_disk("disconnect", dom0.name, disk.vdev, "--force")
    assert gone.returncode == 0, gone
    dom0.wait_gone(disk.device)
    compare(device.path, possible)


# -- errors that are waited for --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disk_that_holds_waits_until_the_storage_works(
    backend: str, dom0: Dom0, connect: Connect, device: Device, start: Starting
) -> None:
    """The guest sees a pause and no error, and all that it wrote is there."""
    disk = connect(dom0, "--path", device.path, "--backend", backend, "--on-error", "hold")
    load = start(disk)
    load.wait_flushes()
    for _ in range(2):
        device.broken()
        wait_held(disk)
        device.sound()
        load.wait_flushes()
    possible = load.end()
    assert load.errors() == []
    leave(dom0, disk)
    compare(device.path, possible)


def test_a_disk_that_holds_while_writes_fail_now_and_then(
    dom0: Dom0, connect: Connect, device: Device, start: Starting
) -> None:
    """Every other second, for as long as it takes to see some of it."""
    disk = connect(dom0, "--path", device.path, "--backend", "raw", "--on-error", "hold")
    load = start(disk)
    load.wait_flushes()
    device.fails_now_and_then()
    for _ in range(3):
        wait_held(disk)
        load.wait_flushes()
    device.sound()
    possible = load.end()
    assert load.errors() == []
    leave(dom0, disk)
    compare(device.path, possible)


@pytest.mark.smoke
def test_a_guests_file_system_outlives_storage_that_fails(
    pv_guest: Guest, connect: Connect, device: Device
) -> None:
    """A PV guest's ext4 is clean, and all its files are whole."""
    pv_guest.check("dmesg -c > /dev/null")
    sh("mkfs.ext4", "-q", str(device.path))
    disk = connect(pv_guest, "--path", device.path, "--backend", "raw", "--on-error", "hold")
    pv_guest.wait_for_device(disk.device)
    pv_guest.check(f"mount -t ext4 /dev/{disk.device} /mnt")
    try:
        job: Job = ext4_load(pv_guest)
        for _ in range(2):
            device.broken()
            wait_held(disk)
            device.sound()
        pv_guest.check("touch /tmp/enough")
        status, output = job.wait()
        assert status == 0, output + disk.describe() + pv_guest.dmesg()[-2000:]
    finally:
        device.sound()
        pv_guest.check("umount /mnt")
    assert no_errors(pv_guest), pv_guest.dmesg()[-2000:]
    pv_guest.check(f"/opt/bin/e2fsck -fn /dev/{disk.device}")
    with mounted_in(pv_guest, f"/dev/{disk.device}"):
        sums = pv_guest.check("cd /mnt/d && cat *.sum | sha256sum -c")
        assert sums.count(": OK\n") > 3, sums
    assert facts(disk)["counters"]["errors"] == 0
    leave(pv_guest, disk)
    sh("e2fsck", "-fn", str(device.path))


# -- a thin pool that runs full --------------------------------------------------------------------


def test_a_full_pool_is_reported(dom0: Dom0, connect: Connect, thin: Thin, start: Starting) -> None:
    """What did not find room is an error of a flush; what a flush was good for is there."""
    thin.make("error_if_no_space")
    disk = connect(dom0, "--path", thin.path, "--backend", "raw")
    load = start(disk)
    load.wait_failure()
    assert thin.is_full()
    thin.extend()
    before = len(load.notes())
    load.wait(lambda: len(load.notes()) > before + 10, "nothing happens")
    possible = load.end()
    leave(dom0, disk)
    compare(thin.path, possible)


@pytest.mark.smoke
def test_a_full_pool_is_waited_for(
    dom0: Dom0, connect: Connect, thin: Thin, start: Starting
) -> None:
    """The guest's writes wait until the pool has grown."""
    thin.make("error_if_no_space")
    disk = connect(dom0, "--path", thin.path, "--backend", "raw", "--on-error", "hold")
    load = start(disk)
    wait_held(disk)
    assert thin.is_full()
    thin.extend()
    load.wait_flushes()
    possible = load.end()
    assert load.errors() == []
    leave(dom0, disk)
    compare(thin.path, possible)


def test_a_full_pool_that_makes_linux_wait(
    dom0: Dom0, connect: Connect, thin: Thin, start: Starting
) -> None:
    """A pool may let writes wait by itself; then nothing fails whatever the disk is told to do."""
    thin.make()
    disk = connect(dom0, "--path", thin.path, "--backend", "raw")
    load = start(disk)
    load.wait(thin.is_full, "there is room")
    thin.extend()
    load.wait_flushes()
    possible = load.end()
    assert load.errors() == []
    leave(dom0, disk)
    compare(thin.path, possible)


# -- the same storage by another way ---------------------------------------------------------------


def test_what_is_mounted_through_a_volume_is_refused_to_readers(
    dom0: Dom0, device: Device, tmp_path: Path
) -> None:
    """By the device below the volume."""
    sh("mkfs.ext4", "-q", str(device.path))
    sh("mount", str(device.path), str(tmp_path))
    try:
        refused = xen_disk("connect", dom0.name, "--path", device.below, "--read-only")
        assert refused.returncode == 1, refused
        assert f", mounted on {tmp_path}" in refused.stderr, refused
    finally:
        sh("umount", str(tmp_path))


def test_what_the_kernel_exports_is_refused(dom0: Dom0, tmp_path: Path) -> None:
    """A file-backed LUN of LIO's: no lock, no loop device."""
    loaded = subprocess.run(["modprobe", "target_core_file"], capture_output=True, check=False)
    if loaded.returncode:
        pytest.skip("this dom0 has no LIO")
    config = Path("/sys/kernel/config")
    if not os.path.ismount(config):
        sh("mount", "-t", "configfs", "none", str(config))
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    lun = config / "target/core/fileio_0/lab"
    lun.mkdir(parents=True)
    try:
        (lun / "control").write_text(f"fd_dev_name={image},fd_dev_size={MIB}\n")
        (lun / "enable").write_text("1\n")
        print((lun / "info").read_text())
        refused = xen_disk("connect", dom0.name, "--path", image, "--backend", "raw")
        assert refused.returncode == 1, refused
        assert "exported by the kernel (LIO's fileio lab)" in refused.stderr, refused
    finally:
        lun.rmdir()
        lun.parent.rmdir()
