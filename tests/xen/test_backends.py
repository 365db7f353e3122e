"""Every backend and every option of ``connect`` under a Linux frontend.

Domain 0 is the guest wherever that proves as much: its blkfront is the same, and it needs no boot.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from .disk import PROGRAM, Disk, DiskError, patient, xen_disk, xenstore_snapshot
from .guest import PATIENCE, Dom0, sh

MIB = 1 << 20
SIZE = 16 * MIB
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

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


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(guest: Dom0, disk: Disk, offset: int, length: int) -> bytes:
    """Read what the guest sees, past its page cache, into memory that held something else."""
    code = (
        "import mmap, os, sys\n"
        f"fd = os.open('/dev/{disk.device}', os.O_RDONLY | os.O_DIRECT)\n"
        f"buffer = mmap.mmap(-1, {length})\n"
        f"buffer[:] = b'\\x5a' * {length}\n"
        f"done = os.preadv(fd, [buffer], {offset})\n"
        f"assert done == {length}, done\n"
        "sys.stdout.buffer.write(buffer)\n"
    )
    assert guest.domid == 0
    result = subprocess.run(
        [sys.executable, "-Sc", code], capture_output=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr.decode() + disk.describe()
    return result.stdout


def write(guest: Dom0, disk: Disk, data: bytes, offset: int, directory: Path) -> tuple[int, str]:
    """Write in the guest, past its page cache, MiB by MiB; return status and what dd said."""
    source = directory / "data"
    source.write_bytes(data)
    return guest.run(
        f"dd if={source} of=/dev/{disk.device} bs=1M oflag=direct,seek_bytes seek={offset}"
    )


def queue(guest: Dom0, disk: Disk, name: str) -> str:
    """Return one of the attributes that the guest's kernel has of the disk."""
    return guest.check(f"cat /sys/block/{disk.device}/{name}").strip()


def listing(*arguments: str) -> list[dict[str, Any]]:
    """Return what ``list --json`` says."""
    result = xen_disk("list", "--json", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def total(disk: Disk, what: str) -> int:
    """Return what the product counted, of the totals that it prints at its end."""
    (found,) = (line for line in disk.stderr.splitlines() if line.split()[:1] == [what])
    return int(found.split()[1])


def counters(disk: Disk) -> dict[str, int]:
    """Return what ``list --json`` counts of one disk."""
    (found,) = (row["counters"] for row in listing() if row["number"] == disk.number)
    return dict(found)


# -- each backend ----------------------------------------------------------------------------------


@pytest.mark.smoke
def test_discard(dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None) -> None:
    """Reads give zeros, even through pages that just held what was written, or other things."""
    disk = connect(dom0)
    dom0.wait_for_device(disk.device)
    assert (disk.backend, disk.mode, disk.size) == ("discard", "rw", 1 << 30)
    assert queue(dom0, disk, "size") == str((1 << 30) // 512)
    for offset in (0, (1 << 30) - MIB):
        status, said = write(dom0, disk, b"\xa5" * MIB, offset, tmp_path)
        assert status == 0, said + disk.describe()
        assert read(dom0, disk, offset, MIB) == bytes(MIB)
    dom0.check(f"blkdiscard /dev/{disk.device}")
    assert disk.disconnect() == 0, disk.describe()
    assert total(disk, "discards") > 0
    dom0.wait_gone(disk.device)


@pytest.mark.parametrize(
    "kind",
    ["raw on a file", "raw on a block device", pytest.param("mmap", marks=pytest.mark.smoke)],
)
def test_persistent(
    kind: str,
    dom0: Dom0,
    connect: Connect,
    image: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    xenstore_unchanged: None,
) -> None:
    """The guest reads the image, and what it writes is in the image."""
    content = bytearray(image.read_bytes())
    path: str | Path = request.getfixturevalue("loop") if kind == "raw on a block device" else image
    disk = connect(dom0, "--path", path, "--backend", kind[:4].strip())
    dom0.wait_for_device(disk.device)
    assert (disk.size, disk.mode) == (SIZE, "rw")
    assert read(dom0, disk, 0, SIZE) == content
    # one large and unaligned to pages, the last sector, and one through the page cache
    for offset, length in ((3 * MIB + 512, 2 * MIB + 512), (SIZE - 512, 512), (4096, 8192)):
        data = os.urandom(length)
        status, said = write(dom0, disk, data, offset, tmp_path)
        assert status == 0, said + disk.describe()
        content[offset : offset + length] = data
    dom0.check(f"echo through the cache | dd of=/dev/{disk.device} bs=512 conv=notrunc,sync,fsync")
    content[:512] = b"through the cache\n".ljust(512, b"\0")
    assert read(dom0, disk, 0, SIZE) == content
    assert disk.disconnect() == 0, disk.describe()
    assert total(disk, "flushes") > 0
    dom0.wait_gone(disk.device)
    if kind == "raw on a block device":
        assert Path(path).read_bytes() == content
        sh("blockdev", "--flushbufs", str(path))
    assert image.read_bytes() == content


@pytest.mark.smoke
def test_cow_limit(
    dom0: Dom0, connect: Connect, image: Path, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Beyond the limit writes fail, which is said once; what was written and the rest can be read,
    rewritten and discarded; the image stays as it is.
    """
    content = image.read_bytes()
    disk = connect(dom0, "--path", image, "--cow-limit", "1M")
    dom0.wait_for_device(disk.device)
    disk.wait_stderr("vanish when the disk is disconnected")
    first = os.urandom(MIB)
    assert write(dom0, disk, first, MIB, tmp_path)[0] == 0, disk.describe()
    for offset in (4 * MIB, 8 * MIB):
        status, said = write(dom0, disk, b"\xa5" * MIB, offset, tmp_path)
        assert status != 0, disk.describe()
        assert "Input/output error" in said or "No space left" in said
    disk.wait_stderr("--cow-limit")
    assert read(dom0, disk, 0, SIZE) == content[:MIB] + first + content[2 * MIB :]
    second = os.urandom(MIB)
    assert write(dom0, disk, second, MIB, tmp_path)[0] == 0, disk.describe()
    assert read(dom0, disk, MIB, MIB) == second

    dom0.check(f"blkdiscard --offset {MIB} --length {MIB // 2} /dev/{disk.device}")
    assert counters(disk)["memory"] == MIB // 2
    assert read(dom0, disk, MIB, MIB) == content[MIB : MIB + MIB // 2] + second[MIB // 2 :]
    assert write(dom0, disk, first[: MIB // 2], 4 * MIB, tmp_path)[0] == 0, disk.describe()
    assert disk.disconnect() == 0, disk.describe()
    assert disk.stderr.count("--cow-limit") == 1, disk.stderr
    dom0.wait_gone(disk.device)
    assert image.read_bytes() == content


# -- disks that somebody wrote ---------------------------------------------------------------------


@pytest.mark.smoke
def test_address_disk(dom0: Dom0, connect: Connect, xenstore_unchanged: None) -> None:
    """The first example: each sector tells where it is; read-only by itself."""
    disk = connect(dom0, "--path", "address_disk.py", "--size", "32M", cwd=EXAMPLES)
    dom0.wait_for_device(disk.device)
    assert (disk.size, disk.mode) == (32 * MIB, "ro")
    assert queue(dom0, disk, "ro") == "1"
    for offset, length in ((0, 512), (31 * MIB, MIB), (12345 * 512, 64 * 1024 + 512)):
        data = read(dom0, disk, offset, length)
        assert [int(data[at : at + 512]) for at in range(0, length, 512)] == list(
            range(offset, offset + length, 512)
        )
    assert disk.disconnect() == 0, disk.describe()


@pytest.mark.smoke
def test_counting_disk(
    dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """The second example: keeps what is written, and counts."""
    disk = connect(dom0, "--path", EXAMPLES / "counting_disk.py", "--size", "8M")
    dom0.wait_for_device(disk.device)
    data = os.urandom(MIB)
    assert write(dom0, disk, data, 5 * MIB, tmp_path)[0] == 0, disk.describe()
    assert read(dom0, disk, 5 * MIB, MIB) == data
    assert disk.disconnect() == 0, disk.describe()
    counted = [line for line in disk.stderr.splitlines() if line.startswith("MiB 5: ")]
    assert len(counted) == 1, disk.stderr
    assert int(counted[0].split()[2]) >= 8  # blkfront's requests have at most 128 KiB


@pytest.mark.smoke
def test_custom_disk_that_fails(
    dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Sectors of 4096 bytes reach the guest; an exception is its I/O error and names the line."""
    lines = (
        "from xen_disk_py.backends import Backend",
        "class Fussy(Backend):",
        "    sector_size = 4096",
        "    read_only = True",
        "    def __init__(self, *, size: int, letter: str = 'x', bad: int):",
        "        self.size, self.letter, self.bad = size, letter.encode(), bad",
        "    def read(self, buffers, offset):",
        "        if offset <= self.bad < offset + sum(map(len, buffers)):",
        "            raise ValueError('a bad place')",
        "        for buffer in buffers:",
        "            buffer[:] = self.letter * len(buffer)",
    )
    source = tmp_path / "fussy.py"
    source.write_text("\n".join(lines) + "\n")
    options = ("--size", "1M", "--option", "letter=q", "--option", "bad=512K")
    disk = connect(dom0, "--path", source, *options)
    dom0.wait_for_device(disk.device)
    assert queue(dom0, disk, "queue/logical_block_size") == "4096"
    assert read(dom0, disk, 0, 64 * 1024) == b"q" * 64 * 1024
    command = f"dd if=/dev/{disk.device} of=/dev/null iflag=direct bs=4096 count=1 skip=128"
    status, said = dom0.run(command)
    assert (status, "Input/output error" in said) == (1, True), said
    disk.wait_stderr("fussy.py:9: ValueError: a bad place")
    assert read(dom0, disk, 64 * 1024, 4096) == b"q" * 4096
    assert disk.disconnect() == 0, disk.describe()


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_read_only(
    dom0: Dom0, connect: Connect, image: Path, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """The guest is told, and does not even try to write."""
    before = digest(image)
    disk = connect(dom0, "--path", image, "--backend", "raw", "--read-only")
    dom0.wait_for_device(disk.device)
    assert disk.mode == "ro"
    assert queue(dom0, disk, "ro") == "1"
    assert write(dom0, disk, b"\xa5" * 4096, 0, tmp_path)[0] != 0, disk.describe()
    assert hashlib.sha256(read(dom0, disk, 0, SIZE)).hexdigest() == before
    assert disk.disconnect() == 0, disk.describe()
    assert before == digest(image)


@pytest.mark.parametrize(("offered", "used"), [(0, 11), (256, 32)])
def test_indirect_segments(
    offered: int,
    used: int,
    dom0: Dom0,
    connect: Connect,
    image: Path,
    xenstore_unchanged: None,
) -> None:
    """Linux takes what is offered, up to 32 unless its administrator says more."""
    disk = connect(dom0, "--path", image, "--indirect-segments", str(offered))
    dom0.wait_for_device(disk.device)
    assert queue(dom0, disk, "queue/max_segments") == str(used)
    assert read(dom0, disk, 0, SIZE) == image.read_bytes()
    assert disk.disconnect() == 0, disk.describe()
    assert total(disk, "reads") >= SIZE // 4096 // used


def test_names_and_free_slots(dom0: Dom0, connect: Connect, xenstore_unchanged: None) -> None:
    """Each way to name a device gives the one that Linux makes of it; without a name it is the
    first that is free, gaps included.
    """
    expected = {
        "d1": ("xvdb", 51728, "xvdb"),
        "sdc": ("sdc", 2080, "xvdc"),
        "0x10001000": ("xvdq", 268439552, "xvdq"),
    }
    named = [connect(dom0, "--size", "1M", "--vdev", name, wait=False) for name in expected]
    for disk, (vdev, number, device) in zip(named, expected.values()):
        disk.wait_connected()
        assert (disk.vdev, disk.number, disk.device) == (vdev, number, device)
        dom0.wait_for_device(device)
    automatic = []
    for name in ("xvda", "xvdd"):
        automatic.append(connect(dom0, "--size", "1M"))
        dom0.wait_for_device(name)
        assert automatic[-1].device == name

    shown = {row["vdev"]: row for row in listing("0")}
    assert {disk.vdev for disk in named + automatic} == set(shown)
    for disk in named + automatic:
        disk.interrupt()
    for disk in named + automatic:
        assert disk.wait() == 0, disk.describe()
        dom0.wait_gone(disk.device)


@pytest.mark.smoke
def test_what_is_said(dom0: Dom0, connect: Connect, image: Path, xenstore_unchanged: None) -> None:
    """``--json`` gives the facts, ``list --json`` gives them with counters that grow, and
    ``disconnect`` takes the disk away.
    """
    disk = connect(dom0, "--path", "disk.raw", "--backend", "raw", cwd=image.parent)
    dom0.wait_for_device(disk.device)
    facts = {
        "domid": 0,
        "domain": "Domain-0",
        "vdev": "xvda",
        "number": 51712,
        "device": "/dev/xvda",
        "size": SIZE,
        "backend": "raw",
        "path": str(image),
        "mode": "rw",
        "pid": disk.pid,
        "queue_pids": [],
    }
    assert disk.info == facts
    (before,) = listing("Domain-0")
    shared = ("domid", "vdev", "number", "backend", "path", "mode", "pid")
    assert {key: before[key] for key in shared} == {key: facts[key] for key in shared}
    assert (before["state"], before["frontend_state"], before["alive"]) == (
        "connected",
        "connected",
        True,
    )
    for _ in range(3):
        read(dom0, disk, 0, 4 * MIB)
        (after,) = listing()
        grown = {key: after["counters"][key] - before["counters"][key] for key in after["counters"]}
        if (grown["bytes_read"], after["counters"]["in_flight"]) == (4 * MIB, 0):
            break
        # Linux was still looking for partitions, or a batch is counted after its answers
        (before,) = listing()
    assert (grown["bytes_read"], grown["writes"], grown["errors"]) == (4 * MIB, 0, 0), grown
    assert grown["requests"] == grown["reads"] >= 32
    assert after["counters"]["in_flight"] == 0
    table = xen_disk("list").stdout.splitlines()
    assert table[0].split()[:3] == ["DOMAIN", "VDEV", "BACKEND"]
    assert table[1].split()[:6] == ["0", "xvda", "raw", "rw", "connected", str(disk.pid)]

    ended = xen_disk("disconnect", "0", "xvda")
    assert ended.returncode == 0, ended.stderr + disk.describe()
    assert disk.wait() == 0, disk.describe()
    assert disk.stdout.count("\n") == 1
    assert listing() == []
    dom0.wait_gone("xvda")


def test_line_for_a_person(dom0: Dom0, xenstore_unchanged: None) -> None:
    """Without ``--json``: one line on stdout; SIGTERM is as good as Ctrl-C."""
    before = xenstore_snapshot()
    command = [*PROGRAM, *patient(["connect", "0", "--size", "16M", "--quiet"])]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "xvda 51712 /dev/xvda 16 MiB discard rw\n"
            process.terminate()
            stdout, stderr = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise DiskError(f"SIGTERM did not end it: {xenstore_snapshot()}") from None
        finally:
            process.kill()
    assert (process.returncode, stdout) == (0, "")
    assert stderr.splitlines()[-1] == "xvda: unplugged"
    assert before == xenstore_snapshot()
    dom0.wait_gone("xvda")


def test_guest_still_uses_it(
    dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Today's Linux lets a disk go even while something has it open: that ends as well as any
    other, and who has it open gets errors or an end of file instead of hanging.
    """
    disk = connect(dom0, "--size", "16M")
    dom0.wait_for_device(disk.device)
    opened, gone = tmp_path / "opened", tmp_path / "gone"
    user = dom0.spawn(
        f"exec < /dev/{disk.device}; touch {opened}; until [ -e {gone} ]; do sleep 0.1; done; "
        "dd bs=1M 2>/dev/null | wc -c"
    )
    dom0.wait_until(f"[ -e {opened} ]", PATIENCE, "nothing has it open")
    assert disk.disconnect() == 0, disk.describe()
    dom0.wait_gone(disk.device)
    assert user.status() is None, user.output()
    gone.touch()
    assert user.wait()[1] == "0\n"
