"""The lab itself: Xen, guests of both kinds, and the kernel's own backend work before anything of
ours is tried.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from .disk import gained, xenstore_snapshot
from .guest import IS_ARM, LAB, Dom0, Guest, GuestError, SharedGuest, sh


@pytest.mark.smoke
def test_dom0_is_dom0() -> None:
    """xl talks to Xen, and this is the control domain."""
    assert "control_d" in Path("/proc/xen/capabilities").read_text()
    assert "Domain-0" in sh("xl", "list")


@pytest.mark.smoke
def test_pv_guest_answers(pv_guest: Guest) -> None:
    """A PV guest, or what takes its place on ARM, runs commands."""
    kind = "HVM" if IS_ARM else "PV"  # as Linux there calls the only one
    wanted = (7, f"Linux\n{kind}\n")
    assert pv_guest.run("uname -s; cat /sys/hypervisor/guest_type; exit 7") == wanted


def test_pvh_guest_answers(pvh_guest: Guest) -> None:
    """A PVH guest runs commands."""
    assert pvh_guest.run("uname -s; cat /sys/hypervisor/guest_type") == (0, "Linux\nPVH\n")


def test_console_is_robust(pv_guest: Guest) -> None:
    """Quotes, long output, syntax errors and marks in a command's text do no harm."""
    assert pv_guest.run("echo \"it's\" '$HOME' @1-1@") == (0, "it's $HOME @1-1@\n")
    assert pv_guest.check("seq 1 20000").split() == [str(number) for number in range(1, 20001)]
    assert pv_guest.run("if then")[0] == 2
    assert pv_guest.run("printf unfinished") == (0, "unfinished")


def test_command_that_hangs(pv_guest: Guest) -> None:
    """A command without an end is an error that shows the console, and the guest is usable when it
    has ended.
    """
    pv_guest.pause()
    try:
        with pytest.raises(GuestError, match="has not ended"):
            pv_guest.run("echo waiting", timeout=1)
    finally:
        pv_guest.unpause()
    assert pv_guest.run("echo again") == (0, "again\n")


def test_background_job(pv_guest: Guest) -> None:
    """A job runs on while commands do, and hands over status and output."""
    job = pv_guest.spawn("sleep 1; echo done; exit 5")
    assert pv_guest.check("echo here") == "here\n"
    assert job.wait() == (5, "done\n")


def test_programs_in_guest(pv_guest: Guest) -> None:
    """What the tests need is in the guest."""
    assert "fio-" in pv_guest.check("fio --version")
    for program in ("mkfs.ext4 -V", "e2fsck -V", "/opt/bin/blkdiscard --version"):
        pv_guest.check(program)


def test_blkback(dom0: Dom0, tmp_path: Path) -> None:
    """The kernel's backend serves a file to dom0: the rig that ours is compared with works."""
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 4096 * 4)
    before = xenstore_snapshot()
    sh("modprobe", "-a", "loop", "xen-blkback")
    loop = sh("losetup", "--find", "--show", str(image)).strip()
    try:
        sh(
            "xl",
            "block-attach",
            str(dom0.domid),
            f"vdev=xvdc,access=rw,format=raw,backendtype=phy,target={loop}",
        )
        dom0.wait_for_device("xvdc")
        expected = sh("sha256sum", str(image)).split()[0]
        assert (
            expected
            == dom0.check("dd if=/dev/xvdc bs=1M iflag=direct 2>/dev/null | sha256sum").split()[0]
        )
        sh("xl", "block-detach", str(dom0.domid), "xvdc")
        dom0.wait_gone("xvdc")
    finally:
        sh("losetup", "-d", loop)
    assert not [path for path in gained(before, xenstore_snapshot()) if "51744" in path]


def test_a_shared_guest_that_has_died() -> None:
    """The next test gets another: an emulated guest dies of a triple fault once in a while."""
    with closing(SharedGuest("pv")) as shared:
        first = shared.get()
        assert shared.get() is first
        sh("xl", "destroy", str(first.domid))
        second = shared.get()
        assert second.domid != first.domid
        assert second.run("true") == (0, "")
    assert not second.alive()


def test_paused_guest(xenstore_unchanged: None) -> None:
    """A guest made paused says nothing until it is unpaused; a destroyed one leaves nothing."""
    with Guest("pv", paused=True) as guest:
        assert guest.console == ""
        guest.unpause()
        guest.wait_ready()
        assert guest.run("true") == (0, "")
        guest.shutdown()
        guest.wait_dead()


def test_guest_boots_from_a_disk() -> None:
    """The lab's root image boots when the kernel's backend serves it, so a failure with ours is
    ours.
    """
    image = Path("/tmp/root.ext4")
    image.write_bytes((LAB / "guest-root.ext4").read_bytes())
    sh("modprobe", "-a", "loop", "xen-blkback")
    loop = sh("losetup", "--find", "--show", str(image)).strip()
    try:
        disk = f"format=raw,vdev=xvda,access=rw,backendtype=phy,target={loop}"
        with Guest("pv", cmdline="lab.root=xvda", disks=[disk]) as guest:
            assert "/dev/xvda / ext4" in guest.check("cat /proc/mounts")
    finally:
        sh("losetup", "-d", loop)
        image.unlink()
