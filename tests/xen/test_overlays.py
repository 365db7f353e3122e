"""What a guest wrote into an overlay: there the next time, copied out, put into the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import pytest

from .disk import Disk, xen_disk
from .guest import PATIENCE, Guest, sh
from .test_integrity import digest, guest_digest, leave, mounted, mounted_in
from .test_reliability import ext4_load

MIB = 1 << 20
SIZE = 32 * MIB

Connect = Callable[..., Disk]

WRITE_FILES = (
    "cd /mnt && mkdir {0} && for n in 1 2 3; do "
    "dd if=/dev/urandom of={0}/$n bs=64k count=20 2>/dev/null || exit 1; done && "
    "sha256sum {0}/* >> sums && sync"
)


@pytest.mark.smoke
def test_a_guests_files(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Written in two connections; dom0 reads the same in the exported and in the new image."""
    gold, overlay, copy = (tmp_path / name for name in ("gold.raw", "changes", "copy.raw"))
    sh("truncate", "-s", str(SIZE), str(gold))
    sh("mkfs.ext4", "-q", str(gold))
    before = digest(gold)
    seen = ""
    for directory in ("first", "second"):
        disk = connect(pv_guest, "--path", gold, "--overlay", overlay)
        pv_guest.wait_for_device(disk.device)
        if seen:
            assert guest_digest(pv_guest, disk.device) == seen
        with mounted_in(pv_guest, f"/dev/{disk.device}"):
            if directory == "second":
                pv_guest.check("cd /mnt && rm -r first/1 && sed -i '/first.1$/d' sums")
            pv_guest.check(WRITE_FILES.format(directory))
        seen = guest_digest(pv_guest, disk.device)
        leave(pv_guest, disk)
    assert digest(gold) == before

    said = xen_disk("diff", overlay, "--json")
    assert said.returncode == 0, said.stderr
    held = json.loads(said.stdout)["held"]
    assert (5 * 20 * 64) << 10 < held < SIZE  # the files that are left

    said = xen_disk("export", overlay, copy)
    assert said.returncode == 0, said.stderr
    assert digest(copy) == seen
    assert copy.stat().st_blocks * 512 < SIZE
    said = xen_disk("commit", overlay)
    assert said.returncode == 0, said.stderr
    assert digest(gold) == seen
    assert not overlay.exists()

    sh("e2fsck", "-fn", str(gold))
    with mounted(gold, tmp_path / "there") as place:
        sums = sh("sh", "-c", f"cd {place} && sha256sum -c sums").splitlines()
    assert len(sums) == 5
    assert all(line.endswith(": OK") for line in sums)

    disk = connect(pv_guest, "--path", gold)
    pv_guest.wait_for_device(disk.device)
    assert guest_digest(pv_guest, disk.device) == seen
    leave(pv_guest, disk)


PLACES = 61
STEP = 64  # blocks of 4096 bytes from one place to the next


def moment_of(content: bytes) -> int:
    """Return the number that was written last; all others must be those before it."""
    found = []
    for place in range(PLACES):
        block = content[place * STEP * 4096 :][:4096].rstrip(b"\0")
        found.append(int(block) if block else -1)
    last = max(found)
    for place, number in enumerate(found):
        assert number == max(-1, last - (last - place) % PLACES), (place, last, found)
    return last


@pytest.mark.parametrize("kind", ["overlay", "vhd"])
def test_an_export_while_the_guest_writes_is_one_instant(
    kind: str, pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Numbers that grow, written one after the other to places all over the disk: none is missing
    that was written before one that is there.
    """
    image, used = tmp_path / "gold.raw", tmp_path / f"used.{kind}"
    if kind == "vhd":
        assert xen_disk("create", used, "--size", "16M").returncode == 0
        disk = connect(pv_guest, "--path", used, "--format", "vhd")
    else:
        sh("truncate", "-s", "16M", str(image))
        disk = connect(pv_guest, "--path", image, "--overlay", used)
    pv_guest.wait_for_device(disk.device)
    pv_guest.check("rm -f /tmp/enough /tmp/n")
    write = (
        f"printf %d $n | dd of=/dev/{disk.device} bs=4096 seek=$((n % {PLACES} * {STEP})) "
        "conv=sync oflag=direct 2>/dev/null && echo $n > /tmp/n.new && mv /tmp/n.new /tmp/n"
    )
    loop = f"n=0; until [ -e /tmp/enough ]; do {write} || exit 1; n=$((n+1)); done"
    job = pv_guest.spawn(loop)

    def written(more: int) -> int:
        pv_guest.wait_until(f'[ "$(cat /tmp/n)" -ge {more} ]', PATIENCE, "it writes nothing")
        return int(pv_guest.check("cat /tmp/n"))

    written(PLACES)
    for copy in (tmp_path / "first", tmp_path / "second"):
        before = written(0)
        said = xen_disk("export", used, copy)
        assert said.returncode == 0, said.stderr
        # what is being written may be there, and has not been noted
        assert before <= moment_of(copy.read_bytes()) <= written(0) + 1
    last = written(0)
    assert written(last + 5) > last
    pv_guest.check("touch /tmp/enough")
    assert job.wait()[0] == 0
    leave(pv_guest, disk)


def test_an_export_of_a_mounted_file_system_is_one_instant(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """Its journal repairs the copy as after a power cut; each file that was synced is whole."""
    gold, overlay, copy = (tmp_path / name for name in ("gold.raw", "changes", "copy.raw"))
    sh("truncate", "-s", "64M", str(gold))
    sh("mkfs.ext4", "-q", str(gold))
    disk = connect(pv_guest, "--path", gold, "--overlay", overlay)
    pv_guest.wait_for_device(disk.device)
    with mounted_in(pv_guest, f"/dev/{disk.device}"):
        job = ext4_load(pv_guest)
        try:
            said = xen_disk("export", overlay, copy)
            assert said.returncode == 0, said.stderr
            assert job.status() is None, job.output()
        finally:
            pv_guest.check("touch /tmp/enough")
        assert job.wait()[0] == 0
    leave(pv_guest, disk)
    later = tmp_path / "later.raw"
    assert xen_disk("export", overlay, later).returncode == 0
    # What was being replaced has no right sum yet, nor has what was before that, when nobody had
    # synced its sum.
    for name, under_way in ((copy, 2), (later, 0)):
        sh("sh", "-c", f"e2fsck -fy {name} > /dev/null; [ $? -le 1 ] && e2fsck -fn {name}")
        with mounted(name, tmp_path / f"mounted {name.name}") as place:
            sums = [each.read_text()[:64] for each in sorted((place / "d").glob("*.sum"))]
            files = [
                digest(place / "d" / each.stem) for each in sorted((place / "d").glob("*.sum"))
            ]
        assert len(sums) > 2
        assert sum(one != other for one, other in zip(sums, files)) <= under_way, (sums, files)
