"""Sector sizes, very large disks, and CD-ROMs, as Linux sees them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.backends.holes import punch_hole

from .disk import Disk, block_nodes
from .guest import IS_ARM, PATIENCE, Dom0, Guest
from .test_reliability import taken_over, worker

MIB = 1 << 20
TIB = 1 << 40

Connect = Callable[..., Disk]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"image " * (16 * MIB // 6) + bytes(16 * MIB % 6))
    return path


def attribute(guest: Dom0 | Guest, disk: Disk, name: str) -> str:
    """Return one of the attributes that the guest's kernel has of the disk."""
    return guest.check(f"cat /sys/block/{disk.device}/{name}").strip()


@pytest.mark.parametrize("size", [512, 1024, 2048, pytest.param(4096, marks=pytest.mark.smoke)])
@pytest.mark.parametrize("backend", ["raw", "mmap", "cow"])
def test_a_sector_size(
    backend: str,
    size: int,
    dom0: Dom0,
    connect: Connect,
    image: Path,
    tmp_path: Path,
    xenstore_unchanged: None,
) -> None:
    """Linux has the sectors that were asked for, the size in bytes stays, and data does."""
    disk = connect(dom0, "--path", image, "--backend", backend, "--sector-size", str(size))
    dom0.wait_for_device(disk.device)
    assert attribute(dom0, disk, "queue/logical_block_size") == str(size)
    assert int(attribute(dom0, disk, "queue/physical_block_size")) >= size
    assert attribute(dom0, disk, "size") == str(16 * MIB // 512)
    data = tmp_path / "data"
    data.write_bytes(b"written " * (size // 8) * 3)
    for sector in (0, 5, 16 * MIB // size - 3):  # where a page is written in part, and the end
        dom0.check(
            f"dd if={data} of=/dev/{disk.device} bs={size} seek={sector} oflag=direct && "
            f"dd if=/dev/{disk.device} of={tmp_path}/back bs={size} skip={sector} count=3 "
            f"iflag=direct && cmp {data} {tmp_path}/back"
        )
    assert disk.disconnect() == 0, disk.describe()
    assert [line for line in disk.stderr.splitlines() if line.split() == ["refused", "0"]]


@pytest.mark.parametrize("backend", ["raw", "mmap", "cow"])
def test_a_disk_of_5_tib(
    backend: str, dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Sectors beyond 2**32 are the right ones."""
    path = Path("/var/tmp/large.raw")
    try:
        with path.open("wb") as file:
            try:
                file.truncate(5 * TIB)
            except OSError as error:
                pytest.skip(f"no file of 5 TiB here: {error.strerror}")
        disk = connect(dom0, "--path", path, "--backend", backend)
        dom0.wait_for_device(disk.device)
        assert attribute(dom0, disk, "size") == str(5 * TIB // 512)
        data = tmp_path / "data"
        last = 5 * TIB // MIB - 1
        for block in (0, 2 * TIB // MIB - 1, 2 * TIB // MIB, last):
            data.write_bytes(block.to_bytes(8, "little") * (MIB // 8))
            dom0.check(f"dd if={data} of=/dev/{disk.device} bs=1M seek={block} oflag=direct")
        for block in (0, 2 * TIB // MIB - 1, 2 * TIB // MIB, last):
            data.write_bytes(block.to_bytes(8, "little") * (MIB // 8))
            dom0.check(
                f"dd if=/dev/{disk.device} of={tmp_path}/back bs=1M count=1 skip={block} "
                f"iflag=direct && cmp {data} {tmp_path}/back"
            )
        assert disk.disconnect() == 0, disk.describe()
    finally:
        path.unlink(missing_ok=True)


def makes_holes(path: Path, place: int) -> bool:
    """Tell whether a hole at that place of a file is made where the file system says so.

    ext4 of Linux 5.18 to 6.15 does nothing beyond 4 TiB (findings/ext4-punch-does-nothing.sh).
    """
    with path.open("w+b") as file:
        os.pwrite(file.fileno(), b"old " * (MIB // 4), place)
        punch_hole(file.fileno(), place, MIB)
        made = os.pread(file.fileno(), MIB, place) == bytes(MIB)
    path.unlink()
    return made


@pytest.mark.parametrize("backend", ["raw", "mmap"])
def test_a_discard_of_5_tib(
    backend: str, dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """All of it is answered, also by the successor of a process that is killed amid it.

    Linux 6 makes 1,281 requests of that, Linux 7 one for each 2 TiB. What is read afterwards is
    zeros, but for what dom0's file system has not given up.
    """
    path = Path("/var/tmp/large.raw")
    places = (0, 2 * TIB - MIB, 2 * TIB, 5 * TIB - MIB)
    try:
        with path.open("wb") as file:
            try:
                file.truncate(5 * TIB)
            except OSError as error:
                pytest.skip(f"no file of 5 TiB here: {error.strerror}")
            for place in places:
                os.pwrite(file.fileno(), b"old " * (MIB // 4), place)
        holes = [makes_holes(path.with_suffix(".other"), place) for place in places]
        assert all(holes[:-1])
        disk = connect(dom0, "--supervise", "--path", path, "--backend", backend)
        device = f"/dev/{disk.device}"
        dom0.wait_for_device(disk.device)
        trace, pid = tmp_path / "trace", worker(disk)
        slowly = ("-e", "inject=fallocate:delay_enter=1000000")
        strace = subprocess.Popen(
            ["strace", "-f", "-o", str(trace), "-e", "trace=fallocate", *slowly, "-p", str(pid)]
        )
        tracers = f"grep -h TracerPid /proc/{pid}/task/*/status"
        dom0.wait_until(f"! {tracers} | grep -qw 0", PATIENCE, "strace does not begin")
        dom0.check("echo discarding > /dev/kmsg")  # before it: errors that other tests asked for
        discarding = dom0.spawn(f"blkdiscard {device}")
        dom0.wait_until(f"[ $(grep -c fallocate {trace}) -ge 3 ]", PATIENCE, "no discards")
        os.kill(pid, signal.SIGKILL)
        strace.wait(PATIENCE)
        taken_over(disk, 1)
        status, said = discarding.wait(2 * PATIENCE)
        assert status == 0, said + disk.describe()
        assert "I/O error" not in dom0.dmesg().rpartition("discarding")[2]
        assert path.stat().st_blocks < 4 * MIB // 512, "nothing was given back"
        for place, is_hole in zip(places, holes):
            read = f"dd if={device} bs=1M count=1 skip={place // MIB} iflag=direct 2>/dev/null"
            dom0.check(f"{read} > {tmp_path}/back")
            expected = bytes(MIB) if is_hole else b"old " * (MIB // 4)
            assert (tmp_path / "back").read_bytes() == expected, place
        limit = attribute(dom0, disk, "queue/discard_max_bytes")
        print(f"Linux {platform.release()} discards {limit} bytes at most with one request")
        print(f"holes of dom0's file system at {places}: {holes}")
        assert disk.disconnect() == 0, disk.describe()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.smoke
@pytest.mark.skipif(IS_ARM, reason="Linux on ARM takes every Xen guest, dom0 too, for an HVM guest")
def test_a_cdrom(dom0: Dom0, connect: Connect, image: Path, xenstore_unchanged: None) -> None:
    """A PV guest, as domain 0 is, takes it, and cannot write."""
    disk = connect(dom0, "--path", image, "--cdrom")
    dom0.wait_for_device(disk.device)
    types = [value for path, value in block_nodes(0).items() if path.endswith("/device-type")]
    assert types == ["cdrom"] * 3
    assert disk.mode == "ro"
    assert attribute(dom0, disk, "ro") == "1"
    assert dom0.run(f"dd if=/dev/zero of=/dev/{disk.device} count=1 oflag=direct")[0] != 0
    dom0.check(f"dd if=/dev/{disk.device} bs=64k iflag=direct | cmp - {image}")
    assert disk.disconnect() == 0, disk.describe()


def test_a_cdrom_in_a_pvh_guest_is_told_to_be_in_vain(
    pvh_guest: Guest, connect: Connect, image: Path
) -> None:
    disk = connect(pvh_guest, "--path", image, "--cdrom", "--timeout", "3", wait=False)
    assert disk.wait() == 1, disk.describe()
    assert "PVH guest: Linux does not take a CD-ROM there" in disk.stderr
    assert block_nodes(pvh_guest.domid) == {}
