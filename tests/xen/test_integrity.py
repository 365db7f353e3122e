"""What guests write is what the image holds: verified by fio, by ext4, byte by byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable

import pytest

from .disk import Disk
from .guest import PATIENCE, Guest, GuestError, Shell, sh

MIB = 1 << 20

Connect = Callable[..., Disk]


def digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(MIB), b""):
            total.update(block)
    return total.hexdigest()


def guest_digest(guest: Guest, device: str) -> str:
    """Hash what the guest reads from the disk, past its page cache."""
    return guest.check(f"dd if=/dev/{device} bs=1M iflag=direct 2>/dev/null | sha256sum")[:64]


def leave(guest: Shell, disk: Disk) -> None:
    """Disconnect, which must go well."""
    assert disk.disconnect() == 0, disk.describe()
    guest.wait_gone(disk.device)


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """Mount an image in dom0, without changing it."""
    directory.mkdir()
    sh("modprobe", "loop")
    sh("mount", "-t", "ext4", "-o", "ro,noload,loop", str(image), str(directory))
    try:
        yield directory
    finally:
        sh("umount", str(directory))


@contextmanager
def mounted_in(guest: Guest, device: str) -> Iterator[None]:
    """Mount a device in the guest; a file system left behind would spoil the tests that follow."""
    guest.check(f"mount -t ext4 {device} /mnt")
    try:
        yield
    finally:
        guest.check("umount /mnt")


@pytest.mark.smoke
def test_fio_verifies(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Random writes of random sizes, sixteen at once, each with its checksum: verified by the guest
    as it reads them back, and by dom0 in the image file.
    """
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(MIB) * 32)
    job = (
        "--name=verify --rw=randwrite --bsrange=4k-128k --size=32M --verify=crc32c "
        "--verify_fatal=1 --randseed=4711 --minimal"
    )
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    try:
        pv_guest.check(
            f"fio {job} --filename=/dev/{disk.device} --ioengine=libaio --direct=1 --iodepth=16 "
            "--do_verify=1",
            2 * PATIENCE,
        )
    except GuestError as error:
        raise AssertionError(f"{error}\n{disk.describe()}\n{pv_guest.dmesg()[-2000:]}") from None
    seen = guest_digest(pv_guest, disk.device)
    leave(pv_guest, disk)
    assert seen == digest(image)
    sh("fio", *job.split(), f"--filename={image}", "--verify_only")
    # Would it have noticed? One changed byte in a block's data must not pass.
    with image.open("r+b") as file:
        file.seek(5 * MIB + 2048)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(GuestError, match="verify failed"):
        sh("fio", *job.split(), f"--filename={image}", "--verify_only")


def test_ext4_stays_clean(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """A file system made, filled to the brim and unmounted in the guest is clean there and in dom0,
    which reads the same files from the image.
    """
    image = tmp_path / "disk.raw"
    sh("truncate", "-s", "48M", str(image))
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    device = f"/dev/{disk.device}"
    pv_guest.wait_for_device(disk.device)
    pv_guest.check(f"/opt/bin/mkfs.ext4 -q {device}")
    listing = "find . -type f | sort | xargs sha256sum"
    with mounted_in(pv_guest, device):
        many = "for n in $(seq 100); do seq $n 2000 > part-$n; done"
        pv_guest.check(f"mkdir /mnt/d && cd /mnt/d && {many}")
        full = pv_guest.run("dd if=/dev/urandom of=/mnt/big bs=64k", 2 * PATIENCE)[1]
        assert "No space left" in full, full
        pv_guest.check("cd /mnt && rm d/part-1 d/part-2 && echo more > more && sync")
        pv_guest.check("echo 3 > /proc/sys/vm/drop_caches")
        files = pv_guest.check(f"cd /mnt && {listing}")
        assert files.count("\n") == 100, files
    pv_guest.check(f"/opt/bin/e2fsck -fn {device}")
    leave(pv_guest, disk)

    sh("e2fsck", "-fn", str(image))
    with mounted(image, tmp_path / "mnt") as directory:
        assert files == sh("sh", "-c", f"cd {directory} && {listing}")


def test_two_guests_on_one_gold_image(
    pv_guest: Guest,
    pvh_guest: Guest,
    connect: Connect,
    tmp_path: Path,
    xenstore_unchanged: None,
) -> None:
    """Each sees the image and what it has written itself, and nothing of the other."""
    content = tmp_path / "content"
    content.mkdir()
    (content / "name").write_text("gold\n")
    image = tmp_path / "gold.raw"
    sh("mkfs.ext4", "-q", "-d", str(content), str(image), "32M")
    before = digest(image)
    guests = (pv_guest, pvh_guest)
    disks = [connect(guest, "--path", image, wait=False) for guest in guests]
    with ExitStack() as stack:
        for guest, disk in zip(guests, disks):
            disk.wait_connected()
            guest.wait_for_device(disk.device)
            stack.enter_context(mounted_in(guest, f"/dev/{disk.device}"))
            assert guest.check("cat /mnt/name") == "gold\n", disk.describe()
        for guest in guests:
            guest.check(f"echo {guest.name} > /mnt/name; seq 1 50000 > /mnt/{guest.name}; sync")
        for guest in guests:
            guest.check("echo 3 > /proc/sys/vm/drop_caches")
        for guest in guests:
            seen = guest.check(f"cd /mnt; cat name; tail -n 1 {guest.name}; ls").split()
            assert seen[:2] == [guest.name, "50000"]
            assert set(seen[2:]) == {"lost+found", "name", guest.name}
    for guest, disk in zip(guests, disks):
        guest.check(f"/opt/bin/e2fsck -fn /dev/{disk.device}")
        leave(guest, disk)
    assert before == digest(image), "the gold image has changed"


@pytest.mark.smoke
def test_discard_reaches_a_sparse_file(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """What the guest discards is a hole in the image: no blocks, zeros for both."""
    image = tmp_path / "disk.raw"
    noise = os.urandom(16 * MIB)
    image.write_bytes(noise)
    blocks = image.stat().st_blocks
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    pv_guest.check(f"/opt/bin/blkdiscard -o {4 * MIB} -l {8 * MIB} /dev/{disk.device}")
    expected = noise[: 4 * MIB] + bytes(8 * MIB) + noise[12 * MIB :]
    seen = guest_digest(pv_guest, disk.device)
    assert image.stat().st_blocks == blocks - 8 * MIB // 512, disk.describe()
    leave(pv_guest, disk)
    assert seen == hashlib.sha256(expected).hexdigest()
    assert image.read_bytes() == expected


@contextmanager
def traced(disk: Disk, call: str, output: Path) -> Iterator[None]:
    """Record which system calls of that name every thread of the product makes."""
    command = ["strace", "-f", "-qq", "-e", f"trace={call}", "-o", str(output), "-p", str(disk.pid)]
    strace = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        tasks = list(Path(f"/proc/{disk.pid}/task").iterdir())
        deadline = time.monotonic() + PATIENCE
        while any("TracerPid:\t0\n" in (task / "status").read_text() for task in tasks):
            assert strace.poll() is None, "strace ended"
            assert time.monotonic() < deadline, "strace did not attach"
            time.sleep(0.1)
        yield
    finally:
        strace.terminate()
        strace.wait(PATIENCE)


@pytest.mark.parametrize(("backend", "call"), [("raw", "fdatasync"), ("mmap", "msync")])
def test_flush_reaches_the_file(
    backend: str,
    call: str,
    pv_guest: Guest,
    connect: Connect,
    tmp_path: Path,
    xenstore_unchanged: None,
) -> None:
    """A write with an fsync in the guest is in the image, and the kernel was told to store it."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    trace = tmp_path / "trace"
    disk = connect(pv_guest, "--path", image, "--backend", backend)
    pv_guest.wait_for_device(disk.device)
    cache = pv_guest.check(f"cat /sys/block/{disk.device}/queue/write_cache").strip()
    assert cache == "write back"
    with traced(disk, call, trace):
        pv_guest.check(f"echo stored | dd of=/dev/{disk.device} bs=512 seek=3 conv=notrunc,fsync")
        assert image.read_bytes()[1536:1544] == b"stored\n\0", disk.describe()
    assert f"{call}(" in trace.read_text(), f"{trace.read_text()}\n{disk.describe()}"
    leave(pv_guest, disk)
