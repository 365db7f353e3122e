"""An HVM guest: emulated hardware, a QEMU of its own, and disks of that QEMU's beside ours.

It takes minutes to start under emulation, so the machine is saved with one that runs, and all tests
share it: ``--suite hvm417`` and ``--suite hvm420``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.xenbus import toolstack

from .disk import Disk, block_nodes, left_over, open_files, xen_disk, xenstore_snapshot
from .guest import LAB, START_SECONDS, Guest, GuestError, sh
from .test_serve import LINE, VERSION, Daemon, image, serve, xl

__all__ = ["image", "serve"]  # fixtures

pytestmark = [
    pytest.mark.skipif(
        not (LAB / "hvm-kernel").exists(), reason="this lab has no HVM guest: --suite hvm417"
    ),
    pytest.mark.timeout(1800),
]
Connect = Callable[..., Disk]

MIB = 1 << 20
NEIGHBOURS = {"xvda": Path("/run/lab/hvm-a.img"), "xvdc": Path("/run/lab/hvm-b.img")}
"""The disks that QEMU serves."""


@pytest.fixture(scope="module")
def hvm() -> Iterator[Guest]:
    """Return the guest, which has stood still since the machine was saved."""
    guest = Guest.running("hvm", "hvm")
    guest.unpause()
    guest.check("true", START_SECONDS)  # it has told that it is ready before the console was opened
    guest.is_shared = True
    yield guest
    guest.destroy()


@pytest.fixture
def unchanged(hvm: Guest) -> Iterator[None]:
    """Fail the test if its disk leaves anything, or if QEMU's disks are not served as before."""
    nodes = block_nodes(hvm.domid)
    yield
    assert nodes == block_nodes(hvm.domid)
    for device, path in NEIGHBOURS.items():
        assert digest(hvm, device) == hashlib.sha256(path.read_bytes()).hexdigest()


def digest(guest: Guest, device: str) -> str:
    """Return the hash of what a guest reads from a device, past its page cache."""
    read = f"dd if=/dev/{device} bs=1M iflag=direct 2>/dev/null | sha256sum"
    return guest.check(read).split()[0]


def listed(guest: Guest) -> dict[int, str]:
    """Return the state of each device that ``xl block-list`` shows."""
    rows = [line.split() for line in sh("xl", "block-list", str(guest.domid)).splitlines()[1:]]
    return {int(row[0]): row[3] for row in rows}


def device_model(guest: Guest) -> int:
    """Return the process of a guest's QEMU."""
    return int(sh("pgrep", "-f", f"xen-domid {guest.domid} ").split()[0])


def test_it_is_one(hvm: Guest) -> None:
    """Linux has given QEMU's emulated disks up for paravirtual ones."""
    assert hvm.check("cat /sys/hypervisor/guest_type") == "HVM\n"
    assert list(listed(hvm).values()) == ["4", "4"]


def test_hot_plug_beside_disks_of_qemu(
    hvm: Guest, connect: Connect, image: Path, unchanged: None
) -> None:
    """QEMU, which looks for disks to serve, does not touch ours."""
    disk = connect(hvm, "--path", image, "--backend", "raw", "--vdev", "xvdb")
    hvm.wait_for_device("xvdb")
    assert digest(hvm, "xvdb") == hashlib.sha256(image.read_bytes()).hexdigest()
    hvm.check("dd if=/dev/xvda of=/dev/xvdb bs=64k count=32 conv=fsync")
    assert image.read_bytes()[: 2 * MIB] == NEIGHBOURS["xvda"].read_bytes()[: 2 * MIB]
    kinds = {path.split("/")[5] for path in block_nodes(hvm.domid) if "/51728/" in path}
    assert "vbd3" in kinds, disk.describe()
    opened = open_files(device_model(hvm)).values()
    assert str(NEIGHBOURS["xvda"]) in opened
    assert str(image) not in opened
    assert sorted(listed(hvm)) == [51712, 51728, 51744] or sorted(listed(hvm)) == [
        768,
        51728,
        51744,
    ]

    line = "vdev=xvdd,format=raw,access=rw,backendtype=qdisk,target=/run/lab/hvm-d.img"
    Path("/run/lab/hvm-d.img").write_bytes(os.urandom(MIB))
    assert xl("block-attach", str(hvm.domid), line) == (0, "")
    hvm.wait_for_device("xvdd")
    assert listed(hvm)[51760] == "4"
    assert xl("block-detach", str(hvm.domid), "xvdd") == (0, "")
    hvm.wait_gone("xvdd")

    assert disk.disconnect() == 0, disk.describe()
    hvm.wait_gone("xvdb")


def test_a_disk_that_xl_takes_away(
    hvm: Guest, connect: Connect, image: Path, unchanged: None
) -> None:
    """``xl block-detach`` can from Xen 4.19 on; before, ``connect`` says what does."""
    disk = connect(hvm, "--path", image, "--backend", "raw", "--vdev", "xvdb")
    hvm.wait_for_device("xvdb")
    status, said = xl("block-detach", str(hvm.domid), "xvdb")
    if VERSION is not None and VERSION < (4, 19):
        assert status != 0
        assert "Unrecognized disk backend type" in said
        assert "xl block-detach" in disk.stderr
        assert disk.process.poll() is None
        assert digest(hvm, "xvdb") == hashlib.sha256(image.read_bytes()).hexdigest()
        done = xen_disk("disconnect", hvm.name, "xvdb")
        assert done.returncode == 0, done.stderr
    else:
        assert (status, said) == (0, "")
        assert "xl block-detach" not in disk.stderr
    assert disk.wait() == 0, disk.describe()
    hvm.wait_gone("xvdb")


@pytest.mark.skipif(
    VERSION is not None and VERSION < (4, 19),
    reason=f"libxl of Xen {VERSION} rejects backendtype=tap",
)
def test_a_disk_of_serve(hvm: Guest, serve: Daemon, image: Path, unchanged: None) -> None:
    """Attached and detached with ``xl``, which starts neither QEMU nor blkback for it."""
    assert xl("block-attach", str(hvm.domid), LINE.format("xvdb", "rw", image)) == (0, "")
    hvm.wait_for_device("xvdb")
    assert digest(hvm, "xvdb") == hashlib.sha256(image.read_bytes()).hexdigest()
    assert str(image) not in open_files(device_model(hvm)).values()
    assert xl("block-detach", str(hvm.domid), "xvdb") == (0, "")
    hvm.wait_gone("xvdb")


def test_destroyed(hvm: Guest, connect: Connect, image: Path) -> None:
    """The process ends by itself, and nothing is left. (The last test: the guest has gone then.)"""
    before = xenstore_snapshot()
    disk = connect(hvm, "--path", image, "--backend", "raw", "--vdev", "xvdb")
    hvm.wait_for_device("xvdb")
    hvm.is_shared = False
    writing = hvm.spawn("dd if=/dev/zero of=/dev/xvdb bs=4k oflag=direct")
    hvm.wait_until("[ $(awk '{print $5}' /sys/block/xvdb/stat) -gt 20 ]", 180, "nothing is written")
    assert writing.status() is None or writing.status() == 1  # at the end of the disk
    domid = hvm.domid
    hvm.destroy()
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(domid) == {}
    assert left_over(before) == {}
    assert toolstack.xen_version() == VERSION
    with pytest.raises(GuestError):
        sh("xl", "domid", "hvm")
