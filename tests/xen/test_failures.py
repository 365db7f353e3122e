"""What goes wrong while a disk is in use: nobody else is harmed, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.blkif import READ
from xen_disk_py.libxen import Xen
from xen_disk_py.simulated.frontend import Frontend, RequestFailed
from xen_disk_py.xenbus.states import State
from xen_disk_py.xenbus.xenstore import Store

from .disk import (
    Disk,
    block_nodes,
    left_over,
    mapped_grants,
    open_files,
    resident,
    xen_disk,
)
from .disk import xenstore_snapshot as snapshot
from .guest import PATIENCE, Dom0, Guest, GuestError, Job, Shell, sh

MEBIBYTE = 1 << 20
RECORDS = Path("/run/xen_disk_py")
NO_MORE = 10  # seconds in which something that must stop would have continued
CHECKOUT = Path(__file__).resolve().parents[2]

Connect = Callable[..., Disk]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image of 16 MiB in memory, each run of 32 KiB saying where it is."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for sector in range(0, 16 * MEBIBYTE // 512, 64):
            file.write(sector.to_bytes(8, "little") * 64 * 64)
    return path


def records() -> list[str]:
    """Return the names of our files in /run."""
    return sorted(file.name for file in RECORDS.iterdir()) if RECORDS.exists() else []


def nothing_left(guest: Shell) -> None:
    """See that nothing tells of a disk in this guest any longer."""
    assert block_nodes(guest.domid) == {}
    assert [name for name in records() if name.startswith(f"{guest.domid}-")] == []


def load(guest: Shell, disk: Disk) -> Job:
    """Start reads and writes in the guest, 32 at a time, and wait until they flow.

    They end with the disk only.
    """
    guest.wait_for_device(disk.device)
    job = guest.spawn(
        f"fio --name=load --filename=/dev/{disk.device} --rw=randrw --bs=4k-64k --iodepth=32 "
        f"--direct=1 --ioengine=libaio --time_based --runtime=86400"
    )
    field = f"$(cut -c1-400 /sys/block/{disk.device}/stat | awk '{{print $1 + $5}}')"
    guest.wait_until(f'[ "{field}" -gt 100 ]', PATIENCE, "the load does not flow")
    return job


def usable(guest: Shell, disk: Disk, image: Path) -> None:
    """See that a disk serves what is in its image, and takes what is written."""
    guest.wait_for_device(disk.device)
    text = f"usable {disk.pid}"
    guest.check(f"echo {text} | dd of=/dev/{disk.device} bs=512 count=1 conv=sync oflag=direct")
    assert image.read_bytes()[: len(text)] == text.encode()
    expected = sh("sha256sum", str(image)).split()[0]
    got = guest.check(f"dd if=/dev/{disk.device} bs=1M iflag=direct 2> /dev/null | sha256sum")
    assert got.split()[0] == expected, disk.describe()


def alive(disk: Disk) -> None:
    """See that a process is still there."""
    assert disk.process.poll() is None, disk.describe()


def unload_driver() -> None:
    """Take the block driver out of dom0, as soon as nothing there uses it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            sh("modprobe", "-r", "xen-blkfront")
        except GuestError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


# -- the guest goes --------------------------------------------------------------------------------


@pytest.mark.smoke
def test_guest_destroyed_under_load(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """The process says so and ends well; no zombie of the domain stays."""
    before = snapshot()
    guest = new_guest("pv", fio=True)
    disk = connect(guest, "--path", image, "--backend", "raw")
    load(guest, disk)
    guest.destroy()
    assert disk.wait() == 0, disk.describe()
    # xl detaches a guest's devices before it lets the guest go: we may see either first.
    assert disk.stderr.startswith(
        (f"{disk.vdev}: the guest has gone", f"{disk.vdev}: detached by the toolstack")
    ), disk.describe()
    nothing_left(guest)
    assert left_over(before) == {}
    deadline = time.monotonic() + PATIENCE
    while "(null)" in sh("xl", "list") and time.monotonic() < deadline:
        time.sleep(0.2)
    listed = sh("xl", "list")
    assert "(null)" not in listed, listed
    assert guest.name not in listed, listed


# -- our process goes ------------------------------------------------------------------------------


@pytest.mark.smoke
def test_process_killed_under_load(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """The guest's requests fail at last, the rest is cleaned up, and a new disk is usable."""
    guest = new_guest("pv", fio=True)
    disk = connect(guest, "--path", image, "--backend", "raw")
    job = load(guest, disk)
    disk.kill()
    assert disk.wait() == -signal.SIGKILL, disk.describe()

    assert sh("xl", "list").count(guest.name) == 1
    assert guest.run("echo sound") == (0, "sound\n")
    listed = xen_disk("list")
    (line,) = (line for line in listed.stdout.splitlines() if str(disk.pid) in line)
    assert " orphan " in line, listed
    graceful = xen_disk("disconnect", guest.name, disk.vdev)
    if graceful.returncode:
        assert "--force" in graceful.stderr, graceful
        forced = xen_disk("disconnect", guest.name, disk.vdev, "--force")
        assert forced.returncode == 0, forced
    nothing_left(guest)

    status, output = job.wait()
    assert status != 0, output
    assert "error" in output.lower(), output
    guest.wait_gone(disk.device)
    again = connect(guest, "--path", image, "--backend", "raw")
    usable(guest, again, image)
    assert again.disconnect() == 0, again.describe()
    nothing_left(guest)


# -- Ctrl-C ----------------------------------------------------------------------------------------


@contextmanager
def mounted(guest: Shell, disk: Disk) -> Iterator[None]:
    """Have a file system on the disk mounted at /mnt, with a synced file in it."""
    guest.wait_for_device(disk.device)
    guest.check(f"mkfs.ext4 -q -F /dev/{disk.device} && mount -t ext4 /dev/{disk.device} /mnt")
    try:
        guest.check("echo kept > /mnt/file && sync")
        yield
    finally:
        guest.run("umount /mnt || umount -l /mnt")


def failing(guest: Shell) -> None:
    """See that what is mounted gives errors, not what memory still has of it."""
    status, output = guest.run("dd if=/dev/zero of=/mnt/new bs=4096 count=1 conv=fsync")
    assert status != 0, output
    assert "error" in output.lower() or "read-only" in output.lower(), output


def test_interrupt_while_mounted(pv_guest: Guest, connect: Connect, image: Path) -> None:
    """Linux releases a disk even if it is mounted (from 5.15 on); what was synced is there."""
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    with mounted(pv_guest, disk):
        disk.interrupt()
        assert disk.wait() == 0, disk.describe()
        assert "asked the guest to release the disk" in disk.stderr, disk.describe()
        nothing_left(pv_guest)
        failing(pv_guest)
    checked = sh("e2fsck", "-fy", str(image), check=False)
    assert "kept" in sh("debugfs", "-R", "cat /file", str(image)), checked
    pv_guest.wait_gone(disk.device)
    again = connect(pv_guest, "--path", image, "--backend", "raw")
    usable(pv_guest, again, image)
    assert again.disconnect() == 0, again.describe()


def test_interrupt_under_load(pv_guest: Guest, connect: Connect, image: Path) -> None:
    """Every request in flight is answered, or the guest would never take another disk."""
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    job = load(pv_guest, disk)
    assert disk.disconnect() == 0, disk.describe()
    nothing_left(pv_guest)
    assert job.wait()[0] != 0
    pv_guest.wait_gone(disk.device)


def test_interrupted_twice_while_mounted(pv_guest: Guest, connect: Connect, image: Path) -> None:
    """A guest that is releasing the disk when the second Ctrl-C comes can use a new disk.

    (One that has not noticed the first is forced, see below: in Linux, what is mounted may hang.)
    """
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    with mounted(pv_guest, disk):
        disk.interrupt()
        front = f"/local/domain/{pv_guest.domid}/device/vbd/{disk.number}/state"
        deadline = time.monotonic() + PATIENCE
        while sh("xenstore-read", front, check=False).strip() == str(int(State.CONNECTED)):
            assert time.monotonic() < deadline, disk.describe()
        disk.interrupt()
        # by the signal itself: it came when all was done but to end
        assert disk.wait() in {0, 130, -signal.SIGINT}, disk.describe()
        nothing_left(pv_guest)
        failing(pv_guest)
    pv_guest.wait_gone(disk.device)
    again = connect(pv_guest, "--path", image, "--backend", "raw")
    usable(pv_guest, again, image)
    assert again.disconnect() == 0, again.describe()


@pytest.mark.smoke
def test_forced_while_mounted(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """A guest that does nothing about being asked loses the disk all the same, and lives on.

    (Linux then finds its disk gone without having been asked, and waits for it while it syncs.)
    """
    guest = new_guest("pv")
    disk = connect(guest, "--path", image, "--backend", "raw")
    guest.wait_for_device(disk.device)
    guest.check(f"mkfs.ext4 -q -F /dev/{disk.device} && mount -t ext4 /dev/{disk.device} /mnt")
    guest.check("echo kept > /mnt/file && sync")
    guest.pause()
    disk.interrupt()
    disk.wait_stderr("Ctrl-C again to force")
    time.sleep(2)
    alive(disk)
    disk.interrupt()
    assert disk.wait() == 130, disk.describe()
    nothing_left(guest)
    guest.unpause()
    assert guest.run("echo sound") == (0, "sound\n")
    checked = sh("e2fsck", "-fy", str(image), check=False)
    assert "kept" in sh("debugfs", "-R", "cat /file", str(image)), checked


@pytest.fixture
def frontend() -> Iterator[Callable[[Disk], Frontend]]:
    """Return a function that plays dom0's block driver, which releases a disk when told."""
    unload_driver()
    with Store.open(timeout=PATIENCE) as store, Xen() as xen:
        made: list[Frontend] = []

        def start(disk: Disk) -> Frontend:
            deadline = time.monotonic() + PATIENCE
            directories: list[str] = []
            while not directories:
                assert time.monotonic() < deadline, disk.describe()
                time.sleep(0.1)
                directories = [
                    path.rpartition("/")[0]
                    for path in block_nodes(0)
                    if path.startswith("/local/domain/0/device/vbd/") and path.endswith("/state")
                ]
            (directory,) = directories
            if made:
                store.write(f"{directory}/state", str(int(State.INITIALISING)))
            # few buffers: the kernel grants 1024 pages on behalf of programs, no more
            made.append(Frontend(store, xen, directory, depth=8, timeout=PATIENCE))
            made[-1].connect()
            disk.wait_connected()
            return made[-1]

        yield start
        for one in made:
            one.close()
    sh("modprobe", "xen-blkfront")


def test_interrupt_waits_for_the_guest(
    dom0: Dom0, connect: Connect, frontend: Callable[[Disk], Frontend], image: Path
) -> None:
    """A driver that keeps a disk in use is served until it releases it."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    driver = frontend(disk)
    disk.interrupt()
    disk.wait_stderr("asked the guest to release the disk")
    deadline = time.monotonic() + PATIENCE
    while driver.backend_state is not State.CLOSING:  # it is asked after that is said
        assert time.monotonic() < deadline, disk.describe()
        time.sleep(0.05)
    expected = image.read_bytes()[:MEBIBYTE]
    for _ in range(10):
        assert driver.backend_state is State.CLOSING
        assert driver.read(0, MEBIBYTE) == expected
        time.sleep(0.3)
    alive(disk)
    driver.disconnect()
    assert disk.wait() == 0, disk.describe()
    nothing_left(dom0)


def test_forced_with_requests_in_flight(
    dom0: Dom0, connect: Connect, frontend: Callable[[Disk], Frontend], image: Path
) -> None:
    """What is on the ring when the disk is cut off is answered."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    driver = frontend(disk)
    disk.interrupt()
    disk.wait_stderr("Ctrl-C again to force")
    for number in range(8):
        driver.submit(READ, number * 4096, length=4096)
    driver.kick()
    disk.interrupt()
    assert disk.wait() == 130, disk.describe()
    try:
        driver.drain()  # raises DeviceError if an answer does not come
    except RequestFailed:
        driver.drain()
    nothing_left(dom0)


# -- again and again -------------------------------------------------------------------------------


def grants() -> int:
    """Count the grants of domain 0 that are in use, by the word of the hypervisor."""
    sh("xl", "debug-keys", "g")
    text = sh("xl", "dmesg").rpartition("gnttab_usage_print_all [ key")[2]
    mine = text.partition("grant-table for remote d0")[2].partition("grant-table")[0]
    return sum(line.startswith("(XEN) [0x") for line in mine.splitlines())


def test_connected_50_times(dom0: Dom0) -> None:
    """Fifty lives of a disk in one process leave nothing in xenstore, in /run, of its grants, and
    cost it neither descriptors nor mappings nor memory.
    """
    before = snapshot(), records(), grants()
    churned = subprocess.run(
        [sys.executable, "-m", "tests.xen.churn", "50"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    said = f"{churned.stdout}\n{churned.stderr}"
    assert churned.returncode == 0, said
    lines = [list(map(int, line.split())) for line in churned.stdout.splitlines()]
    assert len(lines) == 50, said
    descriptors, mappings, memory = zip(*lines)
    assert len(set(descriptors[2:])) == 1, said
    assert set(mappings) == {0}, said
    assert memory[49] - memory[9] < MEBIBYTE, said
    assert left_over(before[0]) == {}, said
    assert records() == before[1], said
    deadline = time.monotonic() + PATIENCE
    while grants() > before[2]:  # the kernel unmaps for a process when it comes to it
        assert time.monotonic() < deadline, said


def test_driver_comes_10_times(
    dom0: Dom0, connect: Connect, frontend: Callable[[Disk], Frontend], image: Path
) -> None:
    """A driver that closes and comes again is served each time, at no growing cost to one process.

    It is a driver of ours: Linux keeps blkfront loaded, and bound for good, while it has a device.
    """
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    expected = image.read_bytes()[: 4 * MEBIBYTE]
    costs = []
    for _ in range(10):
        driver = frontend(disk)
        assert driver.read(0, len(expected)) == expected
        costs.append((len(open_files(disk.pid)), mapped_grants(disk.pid), resident(disk.pid)))
        driver.disconnect()
        deadline = time.monotonic() + PATIENCE
        while mapped_grants(disk.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert mapped_grants(disk.pid) == 0, disk.describe()
    files, mappings, memory = zip(*costs)
    assert len(set(files)) == 1, costs
    assert len(set(mappings)) == 1, costs
    assert memory[9] - memory[2] < MEBIBYTE, costs
    assert disk.disconnect() == 0, disk.describe()
    nothing_left(dom0)


# -- others stand still ----------------------------------------------------------------------------


def test_guest_paused_at_connect(pv_guest: Guest, connect: Connect, image: Path) -> None:
    """The time runs out, and the message tells in which state the guest is."""
    pv_guest.pause()
    try:
        result = xen_disk("connect", pv_guest.name, "--path", image, "--timeout", "3")
    finally:
        pv_guest.unpause()
    assert result.returncode == 1, result
    assert "did not connect within 3 s" in result.stderr, result
    assert "1 (Initialising)" in result.stderr, result
    assert "paused" in result.stderr, result
    nothing_left(pv_guest)
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    usable(pv_guest, disk, image)
    assert disk.disconnect() == 0, disk.describe()


def test_xenstored_stalled_during_io(dom0: Dom0, connect: Connect, image: Path) -> None:
    """Serving does not need xenstore; when it is back the disk is as before."""
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)
    read = f"dd if=/dev/{disk.device} of=/dev/null bs=1M count=8 iflag=direct"
    xenstored = int(sh("pidof", "xenstored").split()[0])
    os.kill(xenstored, signal.SIGSTOP)
    try:
        rounds, deadline = 0, time.monotonic() + NO_MORE
        while time.monotonic() < deadline or rounds < 4:
            dom0.check(read)
            rounds += 1
        alive(disk)
    finally:
        os.kill(xenstored, signal.SIGCONT)
    usable(dom0, disk, image)
    assert disk.disconnect() == 0, disk.describe()
    nothing_left(dom0)


HANGING = """\
import sys
import time
from xen_disk_py.backends import Backend


class Hanging(Backend):
    size = 1 << 20
    read_only = True

    def read(self, buffers, offset):
        print("it hangs", file=sys.stderr, flush=True)
        while True:
            time.sleep(1000)
"""


def test_backend_that_hangs(
    dom0: Dom0, connect: Connect, frontend: Callable[[Disk], Frontend], tmp_path: Path
) -> None:
    """The second Ctrl-C ends the process though a request never comes back."""
    path = tmp_path / "hanging.py"
    path.write_text(HANGING)
    disk = connect(dom0, "--path", path, wait=False)
    driver = frontend(disk)
    driver.submit(READ, 0, length=4096)
    driver.kick()
    disk.wait_stderr("it hangs")
    disk.interrupt()
    disk.wait_stderr("Ctrl-C again to force")
    time.sleep(1)
    alive(disk)
    disk.interrupt()
    assert disk.wait() == 130, disk.describe()
    assert "the backend does not return" in disk.stderr, disk.describe()
    nothing_left(dom0)
