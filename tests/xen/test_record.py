"""A guest's requests in a trace, while it boots and works; and replayed elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Callable

import pytest

from xen_disk_py.trace.format import GAP, RESUMED
from xen_disk_py.trace.reader import TraceReader

from .disk import GOLD, Disk, wait_offered, xen_disk
from .guest import START_SECONDS, Guest, sh
from .test_integrity import digest, leave
from .test_reliability import Load, kill

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


def test_a_disk_at_several_moments(
    pv_guest: Guest, connect: Callable[..., Disk], tmp_path: Path
) -> None:
    """As dom0 reads the image while the guest does nothing, so it is made of the trace later.

    The disk was empty, so the trace is all that it takes to try that elsewhere.
    """
    image, base, trace = tmp_path / "disk.raw", tmp_path / "base.raw", tmp_path / "guest.xdt"
    sh("truncate", "-s", "4M", str(image), str(base))
    record = f"record:file={trace},data=yes"
    disk = connect(pv_guest, "--path", image, "--backend", "raw", "--filter", record)
    pv_guest.wait_for_device(disk.device)
    device = f"/dev/{disk.device}"
    with TraceReader(str(trace)) as reader:
        clock = reader.header.clock
    lazy = "lazy_itable_init=0,lazy_journal_init=0"
    moments = []
    for step in (
        f"/opt/bin/mkfs.ext4 -q -b 1024 -E {lazy} {device} && sync",
        f"mount -t ext4 -o noatime {device} /mnt && seq 20000 > /mnt/a && sync",
        "cp /mnt/a /mnt/b && mkdir /mnt/d && seq 300 > /mnt/d/c && rm /mnt/a && sync",
        "umount /mnt",
    ):
        pv_guest.check(step)
        before, now = "", 0
        while before != digest(image):  # a write may be under way, whatever the guest was told
            before, now = digest(image), time.monotonic_ns()
            time.sleep(0.5)
        moments.append({"after": f"{(now - clock) // 1000}us", "sha256": before})
    leave(pv_guest, disk)
    assert digest(image) == moments[-1]["sha256"]
    assert len({each["sha256"] for each in moments}) == len(moments)
    for number, each in enumerate(moments):
        new = tmp_path / f"{number}.raw"
        where = ("--base", base, "--at", each["after"], "-o", new)
        done = xen_disk("rewind", trace, *where)
        assert done.returncode == 0, done.stderr
        assert digest(new) == each["sha256"], each
    if RESULTS is not None:  # what tests/trace/ has
        shutil.copy(trace, RESULTS)
        (Path(RESULTS) / "guest.json").write_text(json.dumps(moments, indent=1) + "\n")


@pytest.mark.timeout(900)
def test_a_recording_whose_process_is_killed_under_load(
    pv_guest: Guest, connect: Callable[..., Disk], tmp_path: Path
) -> None:
    """The guest notices nothing, and all that it wrote is in the trace, which three wrote."""
    image, base, trace = tmp_path / "disk.raw", tmp_path / "base.raw", tmp_path / "guest.xdt"
    sh("truncate", "-s", "4M", str(image), str(base))
    pv_guest.check("dmesg -c > /dev/null")
    disk = connect(pv_guest, "--supervise", "--path", image, "--backend", "raw")
    started = xen_disk("record", pv_guest.name, disk.vdev, "start", trace, "--data")
    assert started.returncode == 0, started.stderr
    load = Load(pv_guest, disk)
    kill(disk, 2)
    print("2 kills,", load.end())
    stopped = xen_disk("record", pv_guest.name, disk.vdev, "stop", "--json")
    assert stopped.returncode == 0, stopped.stderr
    facts = json.loads(stopped.stdout)
    assert (str(trace), 0) == (facts["path"], facts["lost"])
    leave(pv_guest, disk)
    with TraceReader(str(trace)) as reader:
        operations = [each.operation for each in reader.records()]
    assert (2, 0) == (operations.count(RESUMED), operations.count(GAP))
    new = tmp_path / "new.raw"
    done = xen_disk("rewind", trace, "--base", base, "--at", "end", "-o", new)
    assert done.returncode == 0, done.stderr
    assert digest(image) == digest(new)
