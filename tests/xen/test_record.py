"""A guest's requests in a trace, while it boots and works; and replayed elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Callable

from .disk import GOLD, Disk, wait_offered, xen_disk
from .guest import START_SECONDS, Guest, sh

RESULTS = os.environ.get("XEN_LAB_RESULTS")


def test_what_a_guest_wrote_is_made_again_from_its_trace(
    connect: Callable[..., Disk], new_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    """Its root is recorded from before its kernel starts; the copy ends up the same, all of it."""
    image, copy = tmp_path / "root.ext4", tmp_path / "copy.ext4"
    shutil.copyfile(GOLD, image)
    shutil.copyfile(GOLD, copy)
    trace, bare = tmp_path / "root.xdt", tmp_path / "bare.xdt"
    guest = new_guest("pv", paused=True, cmdline="lab.root=xvda")
    filters = ("--filter", f"record:file={trace},data=yes", "--filter", f"record:file={bare}")
    boot = ("--timeout", str(START_SECONDS))
    where = ("--path", image, "--backend", "raw", "--vdev", "xvda")
    disk = connect(guest, *where, *filters, *boot, wait=False)
    wait_offered(disk)
    guest.unpause()
    disk.wait_connected(START_SECONDS)
    guest.wait_ready()
    guest.check(
        "for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=/f$n bs=64k count=8 2>/dev/null && sync; "
        "done; echo 3 > /proc/sys/vm/drop_caches; cat /f* | sha256sum; rm /f2; sync"
    )
    guest.shutdown()
    guest.wait_dead()
    assert disk.wait() == 0, disk.describe()

    facts = json.loads(xen_disk("trace", trace, "--summary", "--json").stdout)
    assert facts["operations"]["read"]["requests"] > 50
    assert facts["operations"]["flush"]["requests"] > 5
    assert facts["operations"]["write"]["bytes"] > 6 * 8 * (64 << 10)
    replay = ("--backend", "raw", "--overwrite", "--compare", "--speed", "asap", "--json")
    verdict = json.loads(xen_disk("replay", trace, "--path", copy, *replay).stdout)
    assert verdict["passed"], verdict
    assert verdict["compared"] > 0
    sh("cmp", str(image), str(copy))
    assert json.loads(xen_disk("trace", bare, "--summary", "--json").stdout)["gaps"] == 0
    if RESULTS is not None:  # the pictures in docs/ are made of these
        shutil.copy(bare, RESULTS)
