"""Disks in VHD chains, in qcow2 and on NBD servers: guests boot from them, and live on when those
who serve them are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Callable

import pytest

from .disk import GOLD, Disk, boot_and_write, xen_disk
from .guest import PATIENCE, Dom0, Guest, no_errors, sh
from .test_integrity import digest, leave, mounted, mounted_in
from .test_reliability import ext4_load, kill, worker

Connect = Callable[..., Disk]
NewGuest = Callable[..., Guest]

MIB = 1 << 20


class Server:
    """An NBD server on a Unix socket, which can be killed and started again."""

    def __init__(self, image: Path, program: str) -> None:
        self.path = Path(f"/run/lab/{program}-{os.getpid()}.sock")
        self.uri = f"nbd+unix:///?socket={self.path}"
        self._command = {
            "nbdkit": ("nbdkit", "-f", "-U", str(self.path), "file", str(image)),
            "qemu-nbd": (
                *("qemu-nbd", "--persistent", "--shared=8", "--socket", str(self.path)),
                *("--format=raw", str(image)),
            ),
        }[program]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command)
        deadline = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.path))
                except OSError:
                    assert self._process.poll() is None, "the server has ended"
                    assert time.monotonic() < deadline, "the server does not answer"
                    time.sleep(0.05)
                else:
                    return

    def stop(self) -> None:
        """Have it hang: it still takes connections, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it as a crash would; what it has not flushed is gone with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None


@pytest.fixture
def serve() -> Iterator[Callable[[Path, str], Server]]:
    """Return a function that starts a server of an image: ``serve(image, "nbdkit")``."""
    with ExitStack() as stack:

        def start(image: Path, program: str) -> Server:
            server = Server(image, program)
            stack.callback(server.kill)
            server.start()
            return server

        yield start


def must(*arguments: str | Path) -> str:
    """Run a command of the product that must succeed; return what it says."""
    done = xen_disk(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_chain(directory: Path, base: str) -> Path:
    """Make a child of a child of the gold image, which is raw or a fixed VHD."""
    gold = directory / f"gold.{base}"
    if base == "raw":
        shutil.copy(GOLD, gold)
    else:
        options = "subformat=fixed,force_size=on"
        sh("qemu-img", "convert", "-O", "vpc", "-o", options, str(GOLD), str(gold))
    between, top = directory / "between.vhd", directory / "top.vhd"
    must("create", between, "--parent", gold, "--parent-format", base)
    must("create", top, "--parent", between)
    return top


def check_written(image: Path, place: Path) -> None:
    """See that a raw image has what the guest has written."""
    with mounted(image, place):
        assert (place / "new").read_text() == "from the guest\n"
        assert (place / "sbin/new").read_text() == "from the guest\n"
        assert not (place / "lab-root").exists()


@pytest.mark.parametrize("base", ["raw", "vhd"])
def test_a_guest_boots_from_a_vhd_chain(
    base: str, connect: Connect, new_guest: NewGuest, tmp_path: Path
) -> None:
    """A child of a child of a gold image: only the child is changed, and all of it is good."""
    top = make_chain(tmp_path, base)
    parents = [path for path in tmp_path.iterdir() if path != top]
    before = {path: digest(path) for path in parents}
    boot_and_write(new_guest, connect, "--path", top, "--format", "vhd")
    assert {path: digest(path) for path in parents} == before
    must("check", top)
    copy = tmp_path / "copy.raw"
    must("export", top, copy)
    check_written(copy, tmp_path / "there")


def test_a_guest_boots_from_qcow2(connect: Connect, new_guest: NewGuest, tmp_path: Path) -> None:
    """qemu-nbd has the image, and nobody when the guest has gone."""
    gold, image, copy = tmp_path / "gold.raw", tmp_path / "disk.qcow2", tmp_path / "copy.raw"
    shutil.copy(GOLD, gold)
    before = digest(gold)
    sh("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(gold), "-F", "raw", str(image))
    boot_and_write(new_guest, connect, "--path", image, "--format", "qcow2")
    assert sh("pgrep", "-x", "qemu-nbd", check=False) == ""
    assert digest(gold) == before
    sh("qemu-img", "check", "-f", "qcow2", str(image))
    sh("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(copy))
    check_written(copy, tmp_path / "there")


def test_a_guest_boots_over_nbd(
    connect: Connect,
    new_guest: NewGuest,
    tmp_path: Path,
    serve: Callable[[Path, str], Server],
) -> None:
    """nbdkit has the image."""
    image = tmp_path / "disk.raw"
    shutil.copy(GOLD, image)
    server = serve(image, "nbdkit")
    boot_and_write(new_guest, connect, "--path", server.uri)
    server.kill()
    check_written(image, tmp_path / "there")


# -- killed ----------------------------------------------------------------------------------------


def ext4_survives(guest: Guest, disk: Disk, harm: Callable[[], None]) -> None:
    """Write files with checksums while ``harm`` is done: all are whole, on a clean file system."""
    guest.check("dmesg -c > /dev/null")
    guest.wait_for_device(disk.device)
    device = f"/dev/{disk.device}"
    guest.check(f"/opt/bin/mkfs.ext4 -q {device} && mount -t ext4 {device} /mnt")
    try:
        job = ext4_load(guest)
        harm()
        written = guest.check("cat /mnt/d/*.sum | wc -l")
        guest.check("touch /tmp/enough")
        status, output = job.wait()
        assert status == 0, output + disk.describe() + guest.dmesg()[-2000:]
        assert int(written) > 3
    finally:
        guest.check("umount /mnt")
    assert no_errors(guest), guest.dmesg()[-2000:]
    guest.check(f"/opt/bin/e2fsck -fn {device}")
    with mounted_in(guest, device):
        sums = guest.check("cd /mnt/d && cat *.sum | sha256sum -c")
        assert sums.count(": OK\n") > 3, sums


def kill_qemu(disk: Disk) -> None:
    """Kill the qemu-nbd of a disk; return when another one serves."""
    said = disk.stderr.count("connected to the NBD server again")
    server = sh("pgrep", "-x", "-P", str(worker(disk)), "qemu-nbd").split()
    os.kill(int(server[0]), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while disk.stderr.count("connected to the NBD server again") == said:
        assert disk.process.poll() is None, disk.describe()
        assert time.monotonic() < deadline, disk.describe()
        time.sleep(0.05)


def test_ext4_in_a_vhd_chain_survives_a_kill(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """The process that serves a chain of three files is killed under load."""
    top = make_chain(tmp_path, "vhd")
    disk = connect(pv_guest, "--supervise", "--path", top, "--format", "vhd")
    ext4_survives(pv_guest, disk, lambda: kill(disk, 3))
    leave(pv_guest, disk)
    must("check", top)
    must("export", top, tmp_path / "copy.raw")
    sh("e2fsck", "-fn", str(tmp_path / "copy.raw"))


def test_ext4_in_qcow2_survives_kills(
    pv_guest: Guest, connect: Connect, tmp_path: Path, xenstore_unchanged: None
) -> None:
    """First qemu-nbd is killed under load, then we are, then qemu-nbd again."""
    image = tmp_path / "disk.qcow2"
    sh("qemu-img", "create", "-q", "-f", "qcow2", str(image), "64M")
    disk = connect(
        pv_guest, "--supervise", "--path", image, "--format", "qcow2", "--on-error", "hold"
    )

    def harm() -> None:
        kill_qemu(disk)
        kill(disk, 1)
        kill_qemu(disk)

    ext4_survives(pv_guest, disk, harm)
    leave(pv_guest, disk)
    with suppress(subprocess.TimeoutExpired):
        sh("pidwait", "-x", "qemu-nbd", timeout=30, check=False)
    sh("qemu-img", "check", "-f", "qcow2", str(image))
    sh("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(tmp_path / "copy.raw"))
    sh("e2fsck", "-fn", str(tmp_path / "copy.raw"))


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd"])
def test_ext4_over_nbd_survives_a_kill_of_the_server(
    program: str,
    pv_guest: Guest,
    connect: Connect,
    tmp_path: Path,
    serve: Callable[[Path, str], Server],
    xenstore_unchanged: None,
) -> None:
    """The guest waits until the server is there again, and then we are killed, too."""
    image = tmp_path / "disk.raw"
    sh("truncate", "-s", "64M", str(image))
    server = serve(image, program)
    disk = connect(pv_guest, "--supervise", "--path", server.uri, "--on-error", "hold")

    def harm() -> None:
        for _ in range(2):
            server.kill()
            disk.wait_stderr("the NBD server is away")
            server.start()
        kill(disk, 1)

    ext4_survives(pv_guest, disk, harm)
    leave(pv_guest, disk)
    server.kill()
    sh("e2fsck", "-fn", str(image))


def test_ext4_over_nbd_survives_a_server_that_hangs(
    pv_guest: Guest,
    connect: Connect,
    tmp_path: Path,
    serve: Callable[[Path, str], Server],
    xenstore_unchanged: None,
) -> None:
    """With ``timeout=`` it is given up, and the next one is asked; and then we are killed, too."""
    image = tmp_path / "disk.raw"
    sh("truncate", "-s", "64M", str(image))
    server = serve(image, "nbdkit")
    where = ("--path", server.uri, "--option", "timeout=5", "--on-error", "hold")
    disk = connect(pv_guest, "--supervise", *where)

    def harm() -> None:
        server.stop()
        disk.wait_stderr("it has not answered a request for 5 s")
        server.kill()
        server.start()
        kill(disk, 1)

    ext4_survives(pv_guest, disk, harm)
    leave(pv_guest, disk)
    server.kill()
    sh("e2fsck", "-fn", str(image))


# -- the README's table ----------------------------------------------------------------------------

ROWS = (
    "connect myvm",
    "connect myvm --path disk.raw",
    "connect myvm --path disk.raw --overlay changes",
    "connect myvm --path disk.raw --overlay changes.vhd",
    "connect myvm --path disk.raw --backend raw",
    "connect myvm --path nbd://storage/disk1",
    "connect myvm --path disk.raw --backend mmap",
    "connect myvm --path disk.vhd --format vhd",
    "connect myvm --path disk.qcow2 --format qcow2",
    "connect myvm --path ./mydisk.py",
    "connect myvm --path ./plugin.py file=disk.raw",
)
"""Its rows but for Ceph's, which tests/ceph runs."""

PROGRAM = """\
from xen_disk_py.backends import Backend

class Disk(Backend):
    size = 16 << 20

    def read(self, buffers, offset):
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def write(self, buffers, offset):
        pass
"""

PLUGIN = """\
import os
import nbdkit

API_VERSION = 2
name = None

def config(key, value):
    global name
    assert key == "file"
    name = os.path.abspath(value)

def open(readonly):
    return os.open(name, os.O_RDONLY if readonly else os.O_RDWR)

def get_size(h):
    return os.stat(h).st_size

def pread(h, buf, offset, flags):
    assert os.preadv(h, [buf], offset) == len(buf)

def pwrite(h, buf, offset, flags):
    assert os.pwritev(h, [buf], offset) == len(buf)

def flush(h, flags):
    os.fdatasync(h)

def close(h):
    os.close(h)
"""


def test_each_row_of_the_readme(
    dom0: Dom0,
    connect: Connect,
    tmp_path: Path,
    serve: Callable[[Path, str], Server],
    xenstore_unchanged: None,
) -> None:
    """With dom0 as the guest: it writes, reads, and leaves."""
    sh("truncate", "-s", "16M", str(tmp_path / "disk.raw"), str(tmp_path / "served.raw"))
    must("create", tmp_path / "disk.vhd", "--size", "16M")
    sh("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "disk.qcow2"), "16M")
    (tmp_path / "mydisk.py").write_text(PROGRAM)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    server = serve(tmp_path / "served.raw", "nbdkit")
    for row in ROWS:
        words = row.split()[2:]
        words = [server.uri if word.startswith("nbd:") else word for word in words]
        disk = connect(dom0, *words, cwd=tmp_path)
        dom0.wait_for_device(disk.device)
        device = f"/dev/{disk.device}"
        dom0.check(f"dd if=/dev/urandom of={device} bs=64k count=4 oflag=direct 2>/dev/null")
        dom0.check(f"dd if={device} of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null")
        leave(dom0, disk)
