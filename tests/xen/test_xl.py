"""What Xen's own toolstack does with our disks: it lists them, detaches them, and takes guests
away under them.
"""

from __future__ import annotations

from typing import Callable

import pytest

from .disk import Disk, block_nodes, left_over, xenstore_snapshot
from .guest import Guest, sh


def listed(guest: Guest) -> dict[int, list[str]]:
    """Return what ``xl block-list`` shows, by device number: BE, handle, state and so on."""
    lines = sh("xl", "block-list", str(guest.domid)).splitlines()[1:]
    return {int(line.split()[0]): line.split() for line in lines}


@pytest.mark.smoke
def test_block_list_and_detach(
    pv_guest: Guest, connect: Callable[..., Disk], xenstore_unchanged: None
) -> None:
    """``xl`` lists the disk as any other, detaches it by name, and then it can be had again."""
    for _ in range(2):
        disk = connect(pv_guest, "--size", "16M")
        pv_guest.wait_for_device(disk.device)
        shown = listed(pv_guest)
        assert list(shown) == [disk.number], disk.describe()
        _, backend, _, state, _, _, path = shown[disk.number]
        assert (backend, state) == ("0", "4"), shown
        assert path.endswith(f"/{pv_guest.domid}/{disk.number}")
        assert path in block_nodes(pv_guest.domid)

        said = sh("xl", "block-detach", str(pv_guest.domid), disk.vdev)
        assert said == "", said + disk.describe()
        assert disk.wait() == 0, disk.describe()
        assert "detached by the toolstack" in disk.stderr
        pv_guest.wait_gone(disk.device)
        assert listed(pv_guest) == {}
        assert block_nodes(pv_guest.domid) == {}


def ends_for_a_reason(disk: Disk) -> bool:
    """Tell whether the product says why it ended: libxl takes a guest's devices away by force a
    moment before the guest itself, so either may be what is seen first.
    """
    return "the guest has gone" in disk.stderr or "detached by the toolstack" in disk.stderr


@pytest.mark.parametrize("command", ["destroy", "shutdown"])
def test_guest_ends(
    command: str, new_guest: Callable[..., Guest], connect: Callable[..., Disk]
) -> None:
    """A guest that ends takes its disk with it: the process ends by itself, nothing is left.

    ``test_boot.py`` ends its guest from the inside.
    """
    before = xenstore_snapshot()
    guest = new_guest("pv")
    # What the kernel runs when it is asked to shut down; the lab's init would not hear a signal.
    guest.check("rm -f /sbin/poweroff; printf '#!/bin/sh\\npoweroff -f\\n' > /sbin/poweroff")
    guest.check("chmod +x /sbin/poweroff")
    disk = connect(guest, "--size", "16M")
    guest.wait_for_device(disk.device)
    guest.check(f"dd if=/dev/zero of=/dev/{disk.device} bs=1M count=2 oflag=direct")
    sh("xl", command, str(guest.domid))
    guest.wait_dead()
    assert disk.wait() == 0, disk.describe()
    assert ends_for_a_reason(disk), disk.describe()
    assert block_nodes(guest.domid) == {}
    assert left_over(before) == {}
