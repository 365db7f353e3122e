"""Our backends next to the kernel's and QEMU's: the same guest, the same boot, taken in turn.

``python -m tests.xen.lab run -- python3 -m tests.xen.compare`` prints, for each workload, the
medians and the median of the ratios round by round. Under emulation only ratios mean anything.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

from .disk import Disk
from .guest import Guest, sh

FOLDER = Path("/dev/shm")
MEBIBYTES = 100
SECONDS = 3
OURS = ("raw", "cow", "mmap")
PEERS = ("blkback", "qdisk")


def dd(guest: Guest, device: str, write: bool) -> float:
    """Return MB/s of 1 MiB direct transfers over the whole disk."""
    way = (
        f"if=/dev/zero of=/dev/{device} oflag=direct"
        if write
        else f"if=/dev/{device} of=/dev/null iflag=direct"
    )
    words = guest.check(
        f"cat /proc/uptime; dd {way} bs=1M count={MEBIBYTES} 2>/dev/null; cat /proc/uptime", 120
    ).split()
    return MEBIBYTES * 1.048576 / (float(words[2]) - float(words[0]))


def fio(guest: Guest, device: str, way: str, depth: int) -> float:
    """Return the IOPS of random 4 KiB direct transfers."""
    output = guest.check(
        f"fio --name=j --filename=/dev/{device} --rw={way} --bs=4k --iodepth={depth} --direct=1 "
        f"--ioengine=libaio --time_based --runtime={SECONDS} --output-format=json",
        120,
    )
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


WORKLOADS: dict[str, Callable[[Guest, str], float]] = {
    "1 MiB direct read, MB/s": lambda guest, device: dd(guest, device, write=False),
    "1 MiB direct write, MB/s": lambda guest, device: dd(guest, device, write=True),
    "4 KiB random read, depth 1, IOPS": lambda guest, device: fio(guest, device, "randread", 1),
    "4 KiB random read, depth 32, IOPS": lambda guest, device: fio(guest, device, "randread", 32),
    "4 KiB random write, depth 1, IOPS": lambda guest, device: fio(guest, device, "randwrite", 1),
    "4 KiB random write, depth 32, IOPS": lambda guest, device: fio(guest, device, "randwrite", 32),
}


def image(name: str) -> Path:
    """Make an image full of data, in memory."""
    path = FOLDER / f"{name}.raw"
    with path.open("wb") as file:
        for _ in range(MEBIBYTES):
            file.write(os.urandom(1 << 20))
    return path


def main(rounds: int, kind: str) -> None:
    """Measure and print."""
    with ExitStack() as stack:
        qdisk = image("qdisk")
        line = f"vdev=xvdq,access=rw,format=raw,backendtype=qdisk,target={qdisk}"
        guest = stack.enter_context(Guest(kind, fio=True, disks=[line]))
        devices = {"qdisk": "xvdq"}
        sh("modprobe", "-a", "xen-blkback", "loop")
        loop = sh("losetup", "--find", "--show", str(image("blkback"))).strip()
        stack.callback(subprocess.run, ["losetup", "-d", loop], check=False)
        phy = f"vdev=xvdp,access=rw,format=raw,backendtype=phy,target={loop}"
        sh("xl", "block-attach", str(guest.domid), phy)
        devices["blkback"] = "xvdp"
        for name in OURS:
            disk = stack.enter_context(Disk(guest, "--path", image(name), "--backend", name))
            devices[name] = disk.device
        for device in devices.values():
            guest.wait_for_device(device)
        print(f"{sh('uname', '-r').strip()}, {kind} guest, {rounds} rounds", flush=True)
        for title, workload in WORKLOADS.items():
            got: dict[str, list[float]] = {name: [] for name in devices}
            for _ in range(rounds):
                for name, device in devices.items():
                    got[name].append(workload(guest, device))
            print(title, flush=True)
            for name, values in got.items():
                text = f"  {name:8} {statistics.median(values):9.1f}"
                if name in OURS:
                    for peer in PEERS:
                        ratios = sorted(ours / theirs for ours, theirs in zip(values, got[peer]))
                        text += (
                            f"   {statistics.median(ratios):5.2f} of {peer}"
                            f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                        )
                print(text, flush=True)


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 3,
        sys.argv[2] if len(sys.argv) > 2 else "pv",
    )
