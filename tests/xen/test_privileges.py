"""A disk that is served by somebody who may do nothing."""

from __future__ import annotations

import os
import pwd
import signal
from pathlib import Path
from typing import Callable

import pytest

from .disk import Disk, block_nodes, xen_disk
from .driver import drivers
from .guest import PATIENCE, Dom0, Guest

MIB = 1 << 20
NOBODY = pwd.getpwnam("nobody")

Connect = Callable[..., Disk]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image that is root's alone."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(16 * MIB))
    path.chmod(0o600)
    return path


def status(disk: Disk) -> dict[str, list[str]]:
    """Return what the kernel shows of the process that serves a disk."""
    lines = Path(f"/proc/{disk.pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def move_data(guest: Guest, disk: Disk, word: str) -> None:
    """Write in the guest, and read it there."""
    guest.wait_for_device(disk.device)
    guest.check(
        f"yes {word} | head -c {MIB} > /tmp/data && "
        f"dd if=/tmp/data of=/dev/{disk.device} bs=64k oflag=direct conv=fsync && "
        f"dd if=/dev/{disk.device} of=/tmp/back bs=64k count=16 iflag=direct && "
        "cmp /tmp/data /tmp/back"
    )


@pytest.mark.smoke
def test_nobody_serves_a_disk(
    pv_guest: Guest, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    disk = connect(pv_guest, "--path", image, "--backend", "raw", "--user", "nobody")
    shown = status(disk)
    assert shown["Uid"] == [str(NOBODY.pw_uid)] * 4
    assert shown["Gid"] == [str(NOBODY.pw_gid)] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert shown[name] == ["0" * 16]
    assert shown["NoNewPrivs"] == ["1"]
    move_data(pv_guest, disk, "first")
    assert image.read_bytes().startswith(b"first\n")
    assert disk.disconnect() == 0, disk.describe()
    assert block_nodes(pv_guest.domid) == {}


def test_nobody_serves_one_driver_after_another(
    dom0: Dom0, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    """All that is opened at a later connection was opened before."""
    with drivers(dom0) as driver:
        disk = connect(dom0, "--path", image, "--backend", "raw", "--user", "nobody", wait=False)
        for number in range(3):
            frontend = driver(disk)
            frontend.write(number * MIB, bytes([number]) * MIB)
            frontend.disconnect()
        assert disk.disconnect() == 0, disk.describe()
    assert image.read_bytes()[: 3 * MIB] == b"\0" * MIB + b"\1" * MIB + b"\2" * MIB


def test_nobody_is_forced_off(
    pv_guest: Guest, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    """A forced end needs another connection to xenstore."""
    disk = connect(pv_guest, "--path", image, "--user", "nobody")
    pv_guest.wait_for_device(disk.device)
    pv_guest.pause()
    try:
        disk.interrupt()
        disk.wait_stderr("Ctrl-C again to force")
        disk.interrupt()
        assert disk.wait() == 130, disk.describe()
    finally:
        pv_guest.unpause()
    assert block_nodes(pv_guest.domid) == {}
    pv_guest.wait_gone(disk.device)


def test_nobodys_disk_is_listed_resized_and_taken_away(
    pv_guest: Guest, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    """What other commands ask of the process works as well, and its record goes in the end."""
    disk = connect(pv_guest, "--path", image, "--backend", "raw", "--user", "nobody")
    pv_guest.wait_for_device(disk.device)
    assert str(disk.pid) in xen_disk("list", pv_guest.name).stdout
    resized = xen_disk("resize", pv_guest.name, disk.vdev, "32M")
    assert resized.returncode == 0, resized.stderr + disk.describe()
    sectors = 32 * MIB // 512
    size = f"$(cat /sys/block/{disk.device}/size)"
    pv_guest.wait_until(f'[ "{size}" = {sectors} ]', PATIENCE, "not larger")
    gone = xen_disk("disconnect", pv_guest.name, disk.vdev)
    assert gone.returncode == 0, gone.stderr + disk.describe()
    assert disk.wait() == 0, disk.describe()
    with connect(pv_guest):  # whoever comes next removes what nobody could not
        names = os.listdir("/run/xen_disk_py")
        names = [name for name in names if name.startswith(f"{pv_guest.domid}-")]
        assert len({name.partition(".")[0] for name in names}) == 1, names
        assert [name for name in names if name.endswith(".sealed")] == []


@pytest.mark.smoke
def test_what_a_killed_nobody_leaves_can_be_removed(
    pv_guest: Guest, connect: Connect, image: Path, xenstore_unchanged: None
) -> None:
    disk = connect(pv_guest, "--path", image, "--user", "nobody")
    pv_guest.wait_for_device(disk.device)
    disk.kill()
    assert disk.wait() == -signal.SIGKILL
    gone = xen_disk("disconnect", pv_guest.name, disk.vdev)
    assert gone.returncode == 0, gone.stderr
    pv_guest.wait_gone(disk.device)
