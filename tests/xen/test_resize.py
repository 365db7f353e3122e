"""Another size while Linux's blkfront uses the disk."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from .disk import Disk, xen_disk
from .guest import PATIENCE, Dom0, Guest, Shell, sh

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
def loop(image: Path) -> Iterator[str]:
    """The image as a block device."""
    sh("modprobe", "loop")
    device = sh("losetup", "--find", "--show", str(image)).strip()
    yield device
    sh("losetup", "--detach", device)


def resize(disk: Disk, *arguments: str) -> int:
    """Resize the disk and return the size that the command prints."""
    result = xen_disk("resize", disk.guest.name, disk.vdev, *arguments, "--json")
    assert (result.returncode, result.stderr) == (0, ""), result.stderr + disk.describe()
    return int(json.loads(result.stdout)["size"])


def wait_for_size(guest: Shell, disk: Disk, size: int) -> None:
    """Wait until the guest's kernel knows the size."""
    attribute = f"/sys/block/{disk.device}/size"
    guest.wait_until(
        f'[ "$(cat {attribute})" = {size // 512} ]', PATIENCE, f"{attribute} is not {size // 512}"
    )


def sectors(disk: Disk) -> dict[str, str]:
    """Return the size as the backend's and the toolstack's directories have it."""
    domid, number = disk.guest.domid, disk.number
    kinds = sh("xenstore-list", "/local/domain/0/backend").split()
    found = {"libxl": sh("xenstore-read", f"/libxl/{domid}/device/vbd/{number}/sectors").strip()}
    for kind in kinds:
        path = f"/local/domain/0/backend/{kind}/{domid}/{number}/sectors"
        text = sh("xenstore-read", path, check=False).strip()
        if text.isdecimal():
            found["backend"] = text
    return found


@pytest.mark.parametrize("backend", ["raw", "mmap"])
def test_a_mounted_file_system_grows(
    backend: str,
    dom0: Dom0,
    connect: Connect,
    image: Path,
    tmp_path: Path,
    xenstore_unchanged: None,
) -> None:
    """With SIZE, then without: what was there stays, what is new can be used."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    disk = connect(dom0, "--path", image, "--backend", backend)
    dom0.wait_for_device(disk.device)
    device = f"/dev/{disk.device}"
    dom0.check(f"mkfs.ext4 -q -F {device} && mount -t ext4 {device} {mount}")
    try:
        dom0.check(f"dd if=/dev/urandom of={mount}/first bs=1M count=6 && sync")
        digest = dom0.check(f"md5sum < {mount}/first")
        assert resize(disk, "48M") == 48 * MIB == image.stat().st_size
        wait_for_size(dom0, disk, 48 * MIB)
        dom0.check(f"resize2fs {device}")
        dom0.check(f"dd if=/dev/urandom of={mount}/second bs=1M count=24 && sync")
        os.truncate(image, 64 * MIB)
        assert resize(disk) == 64 * MIB
        wait_for_size(dom0, disk, 64 * MIB)
        dom0.check(f"resize2fs {device}")
        dom0.check("echo 3 > /proc/sys/vm/drop_caches")
        assert dom0.check(f"md5sum < {mount}/first") == digest
        assert sectors(disk) == {
            "backend": str(64 * MIB // 512),
            "libxl": str(SIZE // 512),
        }
    finally:
        dom0.run(f"umount {mount}")
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)
    sh("e2fsck", "-fn", str(image))


def test_shrinking(
    dom0: Dom0, connect: Connect, image: Path, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Refused unless forced; then the guest has the smaller disk and nothing more."""
    content = image.read_bytes()
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)
    result = xen_disk("resize", dom0.name, disk.vdev, "8M")
    assert (result.returncode, result.stdout) == (1, "")
    assert "--force" in result.stderr
    assert image.read_bytes() == content
    wait_for_size(dom0, disk, SIZE)

    assert resize(disk, "8M", "--force") == 8 * MIB
    wait_for_size(dom0, disk, 8 * MIB)
    assert image.read_bytes() == content[: 8 * MIB]
    device = f"/dev/{disk.device}"
    assert dom0.run(f"dd if={device} bs=1M skip=7 count=1 iflag=direct of=/dev/null")[0] == 0
    assert dom0.run(f"dd if=/dev/zero of={device} bs=4k seek=2048 count=1 oflag=direct")[0] != 0
    assert image.stat().st_size == 8 * MIB
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)


def test_hangup(dom0: Dom0, connect: Connect, image: Path, xenstore_unchanged: None) -> None:
    """SIGHUP, without a terminal: the guest gets what the image has become, unless it is less."""
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)
    os.truncate(image, 2 * SIZE)
    disk.process.send_signal(signal.SIGHUP)
    wait_for_size(dom0, disk, 2 * SIZE)
    dom0.check(f"dd if=/dev/{disk.device} bs=1M skip=31 count=1 iflag=direct of=/dev/null")
    os.truncate(image, SIZE)
    disk.process.send_signal(signal.SIGHUP)
    disk.wait_stderr("not resized")
    wait_for_size(dom0, disk, 2 * SIZE)
    os.truncate(image, 2 * SIZE)
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)


def test_a_block_device(
    dom0: Dom0, connect: Connect, image: Path, loop: str, xenstore_unchanged: None
) -> None:
    """Its owner makes it larger; without SIZE the guest gets that."""
    disk = connect(dom0, "--path", loop, "--backend", "raw")
    dom0.wait_for_device(disk.device)
    result = xen_disk("resize", dom0.name, disk.vdev, "32M")
    assert (result.returncode, "lvresize" in result.stderr) == (1, True), result.stderr
    os.truncate(image, 2 * SIZE)
    sh("losetup", "--set-capacity", loop)
    assert resize(disk) == 2 * SIZE
    wait_for_size(dom0, disk, 2 * SIZE)
    dom0.check(f"dd if=/dev/zero of=/dev/{disk.device} bs=1M seek=31 count=1 oflag=direct")
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)


@pytest.mark.smoke
def test_a_guest(pv_guest: Guest, connect: Connect, xenstore_unchanged: None) -> None:
    """A guest under load sees a throwaway disk grow, shrink, and read to its new end."""
    disk = connect(pv_guest, "--size", "64M")
    pv_guest.wait_for_device(disk.device)
    device = f"/dev/{disk.device}"
    load = pv_guest.spawn(
        f"while dd if={device} of=/dev/null bs=64k count=64 iflag=direct; do :; done"
    )
    for size, arguments in ((256, ()), (512, ()), (128, ("--force",)), (1024, ())):
        assert resize(disk, f"{size}M", *arguments) == size * MIB
        wait_for_size(pv_guest, disk, size * MIB)
        pv_guest.check(f"dd if={device} of=/dev/null bs=1M skip={size - 1} count=1")
    load.kill()
    assert disk.disconnect() == 0, disk.describe()
    pv_guest.wait_gone(disk.device)


def test_a_process_that_is_stopped(dom0: Dom0, connect: Connect, xenstore_unchanged: None) -> None:
    """The command says that there is no answer, and takes back what it asked."""
    disk = connect(dom0)
    dom0.wait_for_device(disk.device)
    disk.process.send_signal(signal.SIGSTOP)
    result = xen_disk("resize", dom0.name, disk.vdev, "2G", "--timeout", "2")
    assert (result.returncode, "does not answer" in result.stderr) == (1, True), result.stderr
    disk.process.send_signal(signal.SIGCONT)
    assert resize(disk) == disk.size
    wait_for_size(dom0, disk, disk.size)
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)
