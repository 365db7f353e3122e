"""libvirt beside us: its guests get our disks by name, and what it does to them does no harm.

``--suite libvirt`` is the only one that has it. libvirt keeps a list of a guest's disks of its own
and takes nothing from xenstore: it neither shows our disks nor detaches them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from .disk import Disk, block_nodes, left_over, xenstore_snapshot
from .guest import KERNEL_OPTIONS, LAB, PATIENCE, RESULTS, Guest, sh

pytestmark = pytest.mark.skipif(
    shutil.which("virsh") is None, reason="this lab has no libvirt: --suite libvirt"
)
Connect = Callable[..., Disk]

DRIVERS = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver")
XML = f"""\
<domain type='xen'>
  <name>virt</name>
  <memory unit='MiB'>192</memory>
  <vcpu>1</vcpu>
  <os>
    <type machine='xenpv'>linux</type>
    <kernel>{LAB}/vmlinuz</kernel>
    <initrd>{LAB}/guest.cpio</initrd>
    <cmdline>{KERNEL_OPTIONS}</cmdline>
  </os>
  <on_reboot>destroy</on_reboot>
  <devices>
    <console type='pty'/>
  </devices>
</domain>
"""


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[subprocess.Popen[bytes]]:
    """A running libvirtd that knows Xen only."""
    for driver in DRIVERS.glob("*.so"):
        if driver.name != "libvirt_driver_libxl.so":
            driver.unlink()
    with (RESULTS / "libvirtd.log").open("wb") as log:
        daemon = subprocess.Popen(["libvirtd"], stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE
    while virsh("list")[0] != 0:
        assert daemon.poll() is None, (RESULTS / "libvirtd.log").read_text()
        assert time.monotonic() < deadline, (RESULTS / "libvirtd.log").read_text()
        time.sleep(0.5)
    yield daemon
    daemon.terminate()
    daemon.wait(PATIENCE)


def virsh(*words: str) -> tuple[int, str]:
    """Run virsh; return its status and what it said."""
    done = subprocess.run(
        ["virsh", "--connect", "xen:///system", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_guest_of_libvirt(
    libvirtd: subprocess.Popen[bytes], connect: Connect, tmp_path: Path
) -> None:
    """Created, given a disk by its name, asked about it, and destroyed."""
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(8 << 20))
    before = xenstore_snapshot()
    domain = tmp_path / "virt.xml"
    domain.write_text(XML)
    status, said = virsh("create", str(domain))
    assert status == 0, said
    guest = Guest.running("pv", "virt")
    try:
        guest.wait_ready()
        own = block_nodes(guest.domid)
        disk = connect(guest, "--path", image, "--backend", "raw", "--vdev", "xvdb")
        guest.wait_for_device("xvdb")
        expected = hashlib.sha256(image.read_bytes()).hexdigest()

        def read() -> str:
            return guest.check("dd if=/dev/xvdb bs=1M iflag=direct 2>/dev/null | sha256sum")

        assert read().split()[0] == expected
        assert len(sh("xl", "block-list", str(guest.domid)).splitlines()) == 2
        assert "xvdb" not in virsh("domblklist", "virt")[1]
        assert "xvdb" not in virsh("dumpxml", "virt")[1]
        status, said = virsh("detach-disk", "virt", "xvdb")
        assert (status, "disk" in said) == (1, True), said
        other = tmp_path / "other.raw"
        other.write_bytes(bytes(1 << 20))
        status, said = virsh("attach-disk", "virt", str(other), "xvdb")
        assert status == 1, said  # the name is taken
        assert read().split()[0] == expected
        assert virsh("suspend", "virt")[0] == virsh("resume", "virt")[0] == 0
        guest.check("dd if=/dev/zero of=/dev/xvdb bs=1M count=1 oflag=direct")
        assert image.read_bytes()[: 1 << 20] == bytes(1 << 20)
        assert disk.disconnect() == 0, disk.describe()
        guest.wait_gone("xvdb")
        assert own == block_nodes(guest.domid)

        disk = connect(guest, "--path", image, "--backend", "raw", "--vdev", "xvdb")
        guest.wait_for_device("xvdb")
        status, said = virsh("destroy", "virt")
        assert status == 0, said
        assert disk.wait() == 0, disk.describe()
    finally:
        guest.destroy()
    assert block_nodes(guest.domid) == {}
    assert left_over(before) == {}
    assert "virt" not in virsh("list", "--all")[1]
    assert libvirtd.poll() is None
