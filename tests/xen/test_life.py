"""The life of a connection: drivers that come, go and take turns, guests that stand still or are
saved and restored, and a xenstored that is replaced; on one process, wherever it can be one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.simulated.frontend import Frontend
from xen_disk_py.xenbus.states import State

from .disk import Disk, block_nodes, mapped_grants, wait_offered, xenstore_snapshot
from .driver import Driver, drivers
from .guest import (
    CAN_MOVE,
    KERNEL_OPTIONS,
    LAB,
    PATIENCE,
    START_SECONDS,
    Dom0,
    Guest,
    Job,
    Shell,
    sh,
)

GRUB = Path("/usr/lib/grub-xen")
MIB = 1 << 20
SIZE = 16 * MIB

Connect = Callable[..., Disk]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image full of noise."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def driver(dom0: Dom0) -> Iterator[Driver]:
    """Return what connects a driver of ours to a disk of dom0's."""
    with drivers(dom0) as start:
        yield start


def backend(disk: Disk) -> str:
    """Return our directory of a disk."""
    return sh("xenstore-read", f"{front(disk)}/backend").strip()


def front(disk: Disk) -> str:
    """Return the guest's directory of a disk."""
    return f"/local/domain/{disk.guest.domid}/device/vbd/{disk.number}"


def wait_backend(disk: Disk, state: State, timeout: float = PATIENCE) -> None:
    """Wait until our half of a disk is in a state."""
    path = f"{backend(disk)}/state"
    deadline = time.monotonic() + timeout
    while sh("xenstore-read", path).strip() != str(int(state)):
        assert time.monotonic() < deadline, disk.describe()
        time.sleep(0.1)


def alive(disk: Disk) -> None:
    """See that the process that serves a disk is still there."""
    assert disk.process.poll() is None, disk.describe()


def unchanged(guest: Shell, disk: Disk, image: Path) -> None:
    """See that the guest reads what the image holds, past its page cache."""
    read = guest.check(f"dd if=/dev/{disk.device} bs=1M iflag=direct 2>/dev/null | sha256sum")
    assert read.split()[0] == hashlib.sha256(image.read_bytes()).hexdigest(), disk.describe()


def copying(guest: Shell, disk: Disk, rounds: int) -> Job:
    """Start to copy the disk's first half to its second, again and again, and wait until it does.

    It ends with a status other than 0 at the first error.
    """
    device = f"/dev/{disk.device}"
    once = f"dd if={device} of={device} bs=64k count=128 seek=128 iflag=direct conv=notrunc,fsync"
    loop = f"n=0; while [ $n -lt {rounds} ]; do {once} || exit 1; n=$((n+1)); done"
    job = guest.spawn(loop)
    field = f"$(awk '{{print $5}}' /sys/block/{disk.device}/stat)"
    guest.wait_until(f'[ "{field}" -gt 20 ]', PATIENCE, "nothing is written")
    return job


def copied(guest: Shell, disk: Disk, job: Job, image: Path) -> None:
    """See that the copying ends well and that the image says so."""
    status, output = job.wait(2 * PATIENCE)
    assert status == 0, output + disk.describe() + guest.dmesg()[-2000:]
    content = image.read_bytes()
    assert content[: SIZE // 2] == content[SIZE // 2 :]
    unchanged(guest, disk, image)


# -- drivers take turns ----------------------------------------------------------------------------


@pytest.mark.smoke
def test_drivers_take_turns(
    dom0: Dom0, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    """Linux's driver leaves, others come one after the other: one process serves them all.

    (6, then 1, then 2: Linux itself comes a second time only as another kernel, see ``test_grub``.)
    """
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)
    dom0.check(f"dd if=/dev/urandom of=/dev/{disk.device} bs=1M count=4 oflag=direct")
    dom0.check(f"echo vbd-{disk.number} > /sys/bus/xen/drivers/vbd/unbind")
    wait_backend(disk, State.CLOSED)
    assert mapped_grants(disk.pid) == 0
    expected = bytearray(image.read_bytes())
    with drivers(dom0) as driver:
        for number in range(3):
            frontend = driver(disk)
            assert frontend.read(0, SIZE) == expected
            expected[number * MIB : (number + 1) * MIB] = os.urandom(MIB)
            frontend.write(number * MIB, bytes(expected[number * MIB : (number + 1) * MIB]))
            frontend.disconnect()
            assert mapped_grants(disk.pid) == 0
            alive(disk)
        assert disk.disconnect() == 0, disk.describe()
    assert image.read_bytes() == expected


GRUBS = {
    "pv": ("grub-x86_64-xen.bin", "x86_64-abi"),
    "pvh": ("grub-i386-xen_pvh.bin", "x86_32-abi"),
}


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_grub(
    kind: str, dom0: Dom0, new_guest: Callable[..., Guest], connect: Connect, tmp_path: Path
) -> None:
    """GRUB's driver reads a kernel from the disk and leaves, then comes that kernel's: both are
    served by one process. GRUB of a PVH guest is a program of 32 bits, and its driver too.
    """
    if kind == "pv" and not (LAB / "vmlinuz").read_bytes().startswith(b"\x7fELF"):
        pytest.skip("GRUB cannot unpack this kernel for a PV guest")
    program, protocol = GRUBS[kind]
    boot = tmp_path / "content" / "boot"
    (boot / "grub").mkdir(parents=True)
    (kernel,) = Path("/boot").glob("vmlinuz-*")
    shutil.copy(kernel, boot / "vmlinuz")
    shutil.copy(LAB / "guest.cpio", boot / "initrd")
    (boot / "grub" / "grub.cfg").write_text(
        f"linux /boot/vmlinuz {KERNEL_OPTIONS}\ninitrd /boot/initrd\nboot\n"
    )
    image = tmp_path / "disk.raw"
    sh("mke2fs", "-q", "-t", "ext2", "-d", str(boot.parent), str(image), "64M")
    guest = new_guest(kind, memory=384, kernel=GRUB / program, paused=True)
    how = ("--vdev", "xvda", "--timeout", str(START_SECONDS))
    disk = connect(guest, "--path", image, "--backend", "raw", *how, wait=False)
    wait_offered(disk)
    guest.unpause()
    # GRUB never says that it is connected; that it reads must do, for its 20 s are too few
    key = f"/local/domain/{guest.domid}/device/vbd/51712/protocol"
    dom0.wait_until(f"xenstore-exists {key}", PATIENCE, "no driver has come")
    assert sh("xenstore-read", key).strip() == protocol
    disk.wait_connected(START_SECONDS)
    guest.wait_ready()
    guest.wait_for_device(disk.device)
    assert sh("xenstore-read", key).strip() == "x86_64-abi"
    unchanged(guest, disk, image)
    guest.check(f"dd if=/dev/urandom of=/dev/{disk.device} bs=1M count=4 oflag=direct")
    unchanged(guest, disk, image)
    assert disk.disconnect() == 0, disk.describe()
    guest.wait_gone(disk.device)


class Firmware(Frontend):
    """Like OVMF's driver: says Connected without having waited for anything."""

    def _await(self, *states: State) -> None:
        if states != (State.INIT_WAIT,):
            super()._await(*states)

    def _switch(self, state: State) -> None:
        super()._switch(State.CONNECTED if state is State.INITIALISED else state)

    def say(self, state: State, answer: State) -> None:
        """Switch to a state and wait for the backend's."""
        self._switch(state)
        self._await(answer)


@pytest.mark.smoke
def test_firmware(dom0: Dom0, connect: Connect, driver: Driver, image: Path) -> None:
    """A driver that skips states, and frees its pages only after it has begun anew: none of them is
    in use any longer when the backend says Closed.
    """
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    firmware = driver(disk, Firmware)
    assert isinstance(firmware, Firmware)
    assert firmware.read(0, SIZE) == image.read_bytes()
    firmware.say(State.CLOSING, State.CLOSING)
    assert firmware.read(0, 4096) == image.read_bytes()[:4096]
    assert mapped_grants(disk.pid) > 1
    firmware.say(State.CLOSED, State.CLOSED)
    assert mapped_grants(disk.pid) == 0
    firmware.say(State.INITIALISING, State.INIT_WAIT)
    firmware.close()
    kernel = driver(disk)
    assert kernel.read(0, SIZE) == image.read_bytes()
    kernel.disconnect()
    assert disk.disconnect() == 0, disk.describe()


def test_offline(dom0: Dom0, connect: Connect, driver: Driver, image: Path) -> None:
    """Told that it is not wanted any longer, a disk serves until the driver leaves, and ends."""
    disk = connect(dom0, "--path", image, "--backend", "raw", wait=False)
    frontend = driver(disk)
    sh("xenstore-write", f"{backend(disk)}/online", "0")
    assert frontend.read(0, SIZE) == image.read_bytes()
    alive(disk)
    frontend.disconnect()
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(0) == {}


@pytest.mark.parametrize("part", ["frontend", "backend"])
def test_directory_removed(
    part: str, pv_guest: Guest, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    """Without frontend or backend there is no disk: the process ends, the guest takes another."""
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    unchanged(pv_guest, disk, image)
    sh("xenstore-rm", front(disk) if part == "frontend" else backend(disk))
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(pv_guest.domid) == {}
    pv_guest.wait_gone(disk.device)
    again = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(again.device)
    unchanged(pv_guest, again, image)
    assert again.disconnect() == 0, again.describe()
    pv_guest.wait_gone(again.device)


# -- guests that stand still -----------------------------------------------------------------------


def test_guest_paused_under_io(
    pv_guest: Guest, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    """A guest that is paused amid its requests finds them done, or does them later."""
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    job = copying(pv_guest, disk, 10)
    for _ in range(5):
        pv_guest.pause()
        time.sleep(0.5)
        alive(disk)
        pv_guest.unpause()
        time.sleep(0.2)
    copied(pv_guest, disk, job, image)
    assert disk.disconnect() == 0, disk.describe()
    pv_guest.wait_gone(disk.device)


@CAN_MOVE
def test_checkpoint(
    new_guest: Callable[..., Guest], connect: Connect, image: Path, tmp_path: Path
) -> None:
    """A guest that is saved and continues (``xl save -c``) does so with the connection it has."""
    guest = new_guest("pv")
    disk = connect(guest, "--path", image, "--backend", "raw")
    guest.wait_for_device(disk.device)
    before = xenstore_snapshot(front(disk))
    job = copying(guest, disk, 4)
    guest.checkpoint(tmp_path / "saved")
    assert before == xenstore_snapshot(front(disk))
    copied(guest, disk, job, image)
    assert disk.disconnect() == 0, disk.describe()
    guest.wait_gone(disk.device)


@CAN_MOVE
@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.smoke), "pvh"])
def test_save_and_restore(
    kind: str,
    new_guest: Callable[..., Guest],
    connect: Connect,
    image: Path,
    tmp_path: Path,
) -> None:
    """A restored guest, which is another domain, gets its disk by the same name before it is
    unpaused; then it continues with what it has mounted, and with what it had not written yet.
    """
    guest = new_guest(kind)
    disk = connect(guest, "--path", image, "--backend", "raw")
    guest.wait_for_device(disk.device)
    guest.check(f"/opt/bin/mkfs.ext4 -q /dev/{disk.device} && mount /dev/{disk.device} /mnt")
    guest.check("dd if=/dev/urandom of=/mnt/stored bs=1M count=4 && sync")
    guest.check("dd if=/dev/urandom of=/mnt/late bs=64k count=16")
    sums = guest.check("cd /mnt && sha256sum stored late")
    saved, domid = tmp_path / "saved", guest.domid
    guest.save(saved)
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(domid) == {}

    guest.restore(saved)
    assert guest.domid != domid
    again = connect(
        guest,
        "--path",
        image,
        "--backend",
        "raw",
        "--vdev",
        disk.vdev,
        wait=False,
    )
    wait_offered(again)
    guest.unpause()
    again.wait_connected()
    guest.check("sync && echo 3 > /proc/sys/vm/drop_caches")
    assert guest.check("cd /mnt && sha256sum stored late") == sums
    guest.check("echo after > /mnt/after && umount /mnt")
    unchanged(guest, again, image)
    assert again.disconnect() == 0, again.describe()
    guest.wait_gone(again.device)
    sh("e2fsck", "-fn", str(image))
    assert sh("debugfs", "-R", "cat /after", str(image)).endswith("after\n")


# -- xenstored -------------------------------------------------------------------------------------


def test_xenstored_replaced_under_io(dom0: Dom0, connect: Connect, image: Path) -> None:
    """A xenstored that is replaced by another, which takes over what it knew, is not noticed.

    (One that is killed forgets all guests; what a disk does then is a matter of the fast tests.)
    """
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)
    job = copying(dom0, disk, 5)
    pid = sh("pidof", "xenstored").split()[0]
    program = os.readlink(f"/proc/{pid}/exe")
    arguments = Path(f"/proc/{pid}/cmdline")
    before = arguments.read_bytes()
    status, output = dom0.run(f"xenstore-control live-update -t 120 {program}")
    if status != 0:
        job.wait(2 * PATIENCE)
        pytest.skip(f"this xenstored cannot be replaced: {output.strip()}")
    assert before != arguments.read_bytes(), output  # it is told whose heir it is
    copied(dom0, disk, job, image)
    alive(disk)
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)
    assert block_nodes(0) == {}
