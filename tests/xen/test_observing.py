"""What is seen of a guest at work, and recorded: ``top``, ``metrics``, ``record`` and the rest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable

from .disk import Disk, xen_disk
from .guest import Dom0, Guest
from .test_integrity import leave

Connect = Callable[..., Disk]

MIB = 1 << 20
RESULTS = os.environ.get("XEN_LAB_RESULTS")


def run(*words: str | Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = xen_disk(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def keep(name: str, text: str) -> None:
    """Keep what a command printed: the documents show it."""
    if RESULTS is not None:
        (Path(RESULTS) / name).write_text(text)


def shown(*words: str | Path) -> Any:
    """Run a command with ``--json``."""
    return json.loads(run(*words, "--json"))


def counted(guest: Guest) -> int:
    """Return how many requests ``list`` says that the guest's only disk has done."""
    (row,) = shown("list", guest.name)
    return int(row["counters"]["requests"])


def test_top_and_metrics_show_what_a_guest_does(
    pv_guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    """While fio runs in it; and nothing of the disk when that is gone."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 * MIB))
    disk = connect(pv_guest, "--path", image, "--backend", "raw")
    pv_guest.wait_for_device(disk.device)
    job = pv_guest.spawn(
        f"fio --name=load --filename=/dev/{disk.device} --rw=randrw --bsrange=4k-64k --iodepth=8 "
        "--ioengine=libaio --direct=1 --time_based --runtime=600"
    )
    while counted(pv_guest) < 200:
        assert job.status() is None, job.output() + disk.describe()

    (row,) = shown("top", pv_guest.name, "--once")
    assert (row["domain"], row["vdev"]) == (pv_guest.name, disk.vdev)
    assert (row["backend"], row["alive"], row["errors"]) == ("raw", True, 0)
    assert row["iops"] > 0
    assert row["bytes_per_second"] > 0
    assert 0 < row["latency_p50"] <= row["latency_p99"] <= row["latency_max"] < 60
    text = run("top", "--once", "--interval", "5")
    keep("top.txt", text)
    assert re.search(rf"^{pv_guest.name} +{disk.vdev} +raw ", text, re.MULTILINE), text

    before = counted(pv_guest)
    new = tmp_path / "xen-disk.prom"
    run("metrics", "-o", new)
    after = counted(pv_guest)
    text = new.read_text()
    keep("metrics.txt", text)
    labels = re.escape(f'backend="raw",domain="{pv_guest.name}",domid="{pv_guest.domid}"')
    values = re.findall(rf"^xen_disk_(\w+){{{labels}[^}}]*}} (\S+)$", text, re.MULTILINE)
    found = {name: float(value) for name, value in values}
    assert before <= found["requests_total"] <= after
    assert (found["up"], found["size_bytes"], found["errors_total"]) == (1, 16 * MIB, 0)
    assert found["read_bytes_total"] > 0 < found["request_duration_seconds_count"]

    job.kill()
    leave(pv_guest, disk)
    assert shown("top", pv_guest.name, "--once") == []
    assert pv_guest.name not in run("metrics")


def test_a_recording_begins_and_ends_while_the_guest_works(
    dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """What was asked between ``start`` and ``stop`` is in the trace, and nothing else."""
    image, trace = tmp_path / "disk.raw", tmp_path / "now.xdt"
    image.write_bytes(bytes(MIB))
    disk = connect(dom0, "--path", image, "--backend", "raw")
    dom0.wait_for_device(disk.device)

    def write(letter: str, seek: int) -> None:
        dom0.check(
            f"head -c 65536 /dev/zero | tr '\\0' {letter} | dd of=/dev/{disk.device} bs=64k "
            f"iflag=fullblock seek={seek} oflag=direct conv=notrunc,fsync 2>/dev/null"
        )

    write("a", 0)
    shutil.copy(image, tmp_path / "base.raw")
    said = [run("record", "Domain-0", disk.vdev, "start", trace, "--data")]
    write("b", 1)
    write("c", 2)
    said.append(run("record", "Domain-0", disk.vdev, "status"))
    assert shown("record", "Domain-0", disk.vdev, "status")["recording"]
    said.append(run("record", "Domain-0", disk.vdev, "stop"))
    keep("record.txt", "".join(said))
    after = hashlib.sha256(image.read_bytes()).digest()
    write("d", 3)
    leave(dom0, disk)

    facts = shown("trace", trace, "--summary")
    assert facts["operations"]["write"]["bytes"] == 2 * 65536
    keep("summary.txt", run("trace", trace, "--summary"))
    new = tmp_path / "new.raw"
    run("rewind", trace, "--base", tmp_path / "base.raw", "--at", "end", "-o", new)
    assert after == hashlib.sha256(new.read_bytes()).digest()
