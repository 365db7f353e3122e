"""What a guest wrote into an overlay: there the next time, copied out, put into the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import pytest

from .disk import Disk, xen_disk
from .guest import Guest, sh
from .test_integrity import digest, guest_digest, leave, mounted, mounted_in

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
