"""A guest whose root is our disk: there before its kernel starts, served while it boots."""

from __future__ import annotations

import time
from typing import Callable

import pytest

from .disk import Disk, DiskError, block_nodes, left_over, xenstore_snapshot
from .guest import LAB, PATIENCE, START_SECONDS, Guest, sh

GOLD = LAB / "guest-root.ext4"


def wait_offered(disk: Disk, timeout: float = PATIENCE) -> None:
    """Wait until the guest, which cannot answer yet, would find the disk."""
    deadline = time.monotonic() + timeout
    while not any("/device/vbd/" in path for path in block_nodes(disk.guest.domid)):
        if disk.process.poll() is not None or time.monotonic() > deadline:
            raise DiskError(f"not in xenstore after {timeout} s: {disk.describe()}")
        time.sleep(0.2)


@pytest.mark.smoke
def test_guest_boots_from_a_gold_image(
    connect: Callable[..., Disk], new_guest: Callable[..., Guest]
) -> None:
    """Created paused, connected, unpaused: root is our disk, and the image is not changed by it."""
    digest = sh("sha256sum", str(GOLD))
    before = xenstore_snapshot()
    guest = new_guest("pv", paused=True, cmdline="lab.root=xvda")
    boot = ("--timeout", str(START_SECONDS))
    disk = connect(guest, "--path", GOLD, "--vdev", "xvda", *boot, wait=False)
    wait_offered(disk)
    guest.unpause()
    disk.wait_connected(START_SECONDS)
    guest.wait_ready()
    assert "/dev/xvda / ext4 rw" in guest.check("cat /proc/mounts"), disk.describe()

    guest.check("echo from the guest > /new && cp /new /sbin/new && rm /lab-root && sync")
    guest.check("echo 3 > /proc/sys/vm/drop_caches")
    assert guest.check("cat /new /sbin/new") == "from the guest\n" * 2
    assert guest.run("ls /lab-root")[0] != 0
    assert "I/O error" not in guest.dmesg()

    guest.shutdown()
    guest.wait_dead()
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(guest.domid) == {}
    assert left_over(before) == {}
    assert digest == sh("sha256sum", str(GOLD)), "the gold image has changed"
