"""Filters that are set while Linux's blkfront uses the disk, by a process that is not root's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from .disk import Disk, xen_disk
from .guest import Dom0

MIB = 1 << 20

Connect = Callable[..., Disk]


def ask(disk: Disk, *arguments: str) -> list[dict[str, Any]]:
    """Run ``filter`` and return what it shows."""
    result = xen_disk("filter", disk.guest.name, disk.vdev, *arguments, "--json")
    assert (result.returncode, result.stderr) == (0, ""), result.stderr + disk.describe()
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_errors_and_a_power_cut_when_they_are_asked_for(
    dom0: Dom0, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 * MIB))
    filters = ("--filter=powercut:seed=3", "--filter=error:operations=read,armed=no")
    with connect(dom0, "--path", image, "--backend=raw", "--user=nobody", *filters) as disk:
        device = f"/dev/{disk.device}"
        read = f"dd if={device} of=/dev/null bs=4k count=1 iflag=direct"
        write = (
            f"tr '\\0' %s < /dev/zero | dd of={device} bs=64k count=1 oflag=direct iflag=fullblock"
        )
        dom0.check(read)
        ask(disk, "arm")
        assert dom0.run(read)[0]
        assert ask(disk, "disarm")[1]["counters"]["failed"] > 0
        dom0.check(read)

        dom0.check(write % "a" + " conv=fsync")
        dom0.check(write % "b")
        assert image.read_bytes()[:65536] == b"a" * 65536
        shown = ask(disk, "cut")[0]
        kept, lost = (shown["counters"][name] for name in ("kept", "lost"))
        assert kept + lost == 128
        content = image.read_bytes()[:65536]
        assert (kept * 512, lost * 512) == (content.count(b"b"), content.count(b"a"))
        assert dom0.run(read)[0]
        assert disk.disconnect() == 0, disk.describe()
