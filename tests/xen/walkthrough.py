"""The walkthrough of the README in a real guest, step by step; ``python -m tests.xen.lab demo``
runs it in dom0.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .disk import Disk
from .guest import Guest, sh

DIRECTORY = Path("/tmp/walkthrough")
IMAGE = DIRECTORY / "disk.raw"
STARTED = time.monotonic()


class Failure(Exception):
    """A step did not give what it promises."""


def say(text: str) -> None:
    """Print one line with the time since the start."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


def show(command: str, output: str = "", where: str = "dom0") -> None:
    """Print a command as a person would see it, with what it printed."""
    say(f"{where}# {command}")
    for line in output.splitlines():
        print(f"          {line}", flush=True)


def in_dom0(command: str) -> str:
    """Run and show a command in dom0."""
    output = sh("sh", "-c", command)
    show(command, output)
    return output


def in_guest(guest: Guest, command: str) -> str:
    """Run and show a command in the guest."""
    say(f"{guest.name}# {command}")
    output = guest.check(command)
    for line in output.splitlines():
        print(f"          {line}", flush=True)
    return output


def expect(truth: bool, text: str) -> None:
    """Say that something holds, or fail."""
    if not truth:
        raise Failure(f"not so: {text}")
    say(f"  ok: {text}")


def digest() -> str:
    """Return the SHA-256 of the image."""
    with IMAGE.open("rb") as image:
        total = hashlib.sha256()
        for block in iter(lambda: image.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


@contextmanager
def connected(guest: Guest) -> Iterator[Disk]:
    """Connect the image, and disconnect it with Ctrl-C."""
    show(f"python3 -m xen_disk_py connect {guest.name} --path {IMAGE} --json")
    with Disk(guest, "--path", IMAGE) as disk:
        for line in (disk.stdout + disk.stderr).splitlines():
            print(f"          {line}", flush=True)
        guest.wait_for_device(disk.device)
        expect(
            disk.size == IMAGE.stat().st_size,
            f"the guest has /dev/{disk.device}, {disk.size >> 20} MiB",
        )
        yield disk
        said = len(disk.stderr)
        say("dom0: Ctrl-C")
        status = disk.disconnect()
        for line in disk.stderr[said:].splitlines():
            print(f"          {line}", flush=True)
        expect(status == 0, "connect ended with status 0")
        guest.wait_gone(disk.device)
        expect(True, f"/dev/{disk.device} has left the guest")


def walk(guest: Guest) -> None:
    """Do it all in one guest."""
    before = digest()
    say(f"sha256 of disk.raw: {before}")
    with connected(guest) as disk:
        device = f"/dev/{disk.device}"
        start = guest.uptime()
        in_guest(guest, f"dd if={device} of=/dev/null bs=1M iflag=direct count=100")
        seconds = guest.uptime() - start
        say(f"  100 MiB in {seconds:.1f} s, {100 / seconds:.0f} MiB/s under emulation")
        in_guest(guest, f"mount {device} /mnt && ls /mnt")
        expect(
            "hello from the gold image\n" == in_guest(guest, "cat /mnt/hello"),
            "the image's file is there",
        )
        in_guest(guest, "echo changed > /mnt/hello; rm /mnt/numbers; seq 1 100000 > /mnt/new; sync")
        in_guest(guest, "echo 3 > /proc/sys/vm/drop_caches")
        read = in_guest(guest, "cat /mnt/hello; tail -n 1 /mnt/new; ls /mnt")
        expect(
            read.split()[:2] == ["changed", "100000"] and "numbers" not in read,
            "the changes read back",
        )
        in_guest(guest, "umount /mnt")
    expect(before == digest(), "sha256 of disk.raw is what it was")
    with connected(guest) as disk:
        in_guest(guest, f"mount /dev/{disk.device} /mnt")
        expect(
            "hello from the gold image\n" == in_guest(guest, "cat /mnt/hello"),
            "the original file is back",
        )
        expect("500\n" == in_guest(guest, "tail -n 1 /mnt/numbers"), "and so is the removed one")
        expect(guest.run("ls /mnt/new")[0] != 0, "the new one is gone")
        in_guest(guest, "umount /mnt")
    expect(before == digest(), "sha256 of disk.raw is what it was")


def make_image(size: str = "128M") -> None:
    """Make an image with a file system and two files in it."""
    DIRECTORY.mkdir(exist_ok=True)
    content = DIRECTORY / "content"
    content.mkdir(exist_ok=True)
    (content / "hello").write_text("hello from the gold image\n")
    (content / "numbers").write_text("".join(f"{number}\n" for number in range(1, 501)))
    in_dom0(f"rm -f {IMAGE}; mkfs.ext4 -q -d {content} {IMAGE} {size} && ls -l {IMAGE}")


def main(kinds: list[str]) -> int:
    """Walk through with a guest of each kind."""
    try:
        for kind in kinds or ["pv", "pvh"]:
            say(f"=== a {kind.upper()} guest ===")
            make_image()
            show("xl create guest.cfg")
            with Guest(kind, memory=256, name=f"my{kind}") as guest:
                show("xl list", sh("xl", "list"))
                walk(guest)
    except (Failure, OSError, subprocess.SubprocessError, RuntimeError) as error:
        say(f"FAILED: {error}")
        return 1
    say("all of it worked")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
