"""``serve`` and Xen's own toolstack: disks by ``xl block-attach`` and by a guest's configuration.

libxl hands such disks to others from Xen 4.19 on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xen_disk_py.xenbus import toolstack

from .disk import GOLD, PROGRAM, block_nodes, left_over, xen_disk, xenstore_snapshot
from .guest import CAN_MOVE, PATIENCE, RESULTS, Guest, GuestError, sh

VERSION = toolstack.xen_version()
pytestmark = pytest.mark.skipif(
    VERSION is not None and VERSION < (4, 19),
    reason=f"libxl of Xen {VERSION} rejects backendtype=tap",
)

UNIT = Path("/etc/systemd/system/xen-disk-serve.service")
LINE = "vdev={},backendtype=tap,script=block-xen-disk,format=raw,access={},target={}"
MIB = 1 << 20


class Daemon:
    """A running ``serve`` with the capabilities that its unit leaves it, and its systemd."""

    def __init__(self, directory: Path) -> None:
        self.log = RESULTS / "serve.log"
        self._path = str(directory / "notify")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.listener.bind(self._path)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        names = re.findall(r"CAP_(\w+)", UNIT.read_text())
        bounds = ",".join(["-all", *(f"+{name.lower()}" for name in names)])
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["setpriv", f"--bounding-set={bounds}", "--no-new-privs", *PROGRAM, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": self._path},
            )
        self.wait_for("READY=1")

    def wait_for(self, text: str, timeout: float = PATIENCE) -> None:
        """Wait until systemd has been told that."""
        deadline = time.monotonic() + timeout
        heard: list[str] = []
        while True:
            left = max(0, deadline - time.monotonic())
            if not select.select([self.listener], [], [], left)[0]:
                raise AssertionError(f"never said {text}, but {heard}: {self.log.read_text()}")
            heard.append(self.listener.recv(1000).decode())
            if text in heard[-1]:
                return

    def stop(self) -> None:
        """End it, as systemd does."""
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(PATIENCE) == 0
        finally:
            self.process.kill()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Daemon]:
    """Return a running ``serve``, installed as it should be; nothing is left of it afterwards."""
    installed = xen_disk("install")
    assert installed.returncode == 0, installed.stderr
    before = xenstore_snapshot()
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.stop()
    daemon.listener.close()
    assert xen_disk("install", "--remove").returncode == 0
    assert left_over(before) == {}
    deadline = time.monotonic() + PATIENCE
    while sh("pgrep", "-af", r"xen_disk_py(/__main__\.py)? adopt", check=False):
        assert time.monotonic() < deadline, daemon.log.read_text()
        time.sleep(0.2)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "my disk.raw"
    path.write_bytes(os.urandom(8 * MIB))
    return path


def xl(*arguments: str, timeout: float = PATIENCE) -> tuple[int, str]:
    """Run xl; return its status and what it said: an error if libxl gives a disk up after 10 s."""
    done = subprocess.run(
        ["xl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout


def served() -> list[dict[str, object]]:
    """Return what ``list`` says."""
    rows = json.loads(xen_disk("list", "--json").stdout)
    assert isinstance(rows, list)
    return rows


@pytest.mark.smoke
def test_attach_and_detach(serve: Daemon, pv_guest: Guest, image: Path) -> None:
    """A persistent disk: listed, written, detached; what was written is in the image."""
    domid = str(pv_guest.domid)
    for _ in range(2):
        assert xl("block-attach", domid, LINE.format("xvdb", "rw", image)) == (0, "")
        pv_guest.wait_for_device("xvdb")
        fields = sh("xl", "block-list", domid).splitlines()[1].split()
        assert (fields[0], fields[3]) == ("51728", "4")
        (row,) = served()
        shown = {key: row[key] for key in ("vdev", "backend", "path", "mode", "alive")}
        assert shown == {
            "vdev": "xvdb",
            "backend": "raw",
            "path": str(image),
            "mode": "rw",
            "alive": True,
        }
        data = os.urandom(16).hex()
        pv_guest.check(f"printf {data} | dd of=/dev/xvdb bs=512 seek=7 conv=sync oflag=direct")
        assert xl("block-detach", domid, "xvdb") == (0, "")
        pv_guest.wait_gone("xvdb")
        serve.wait_for("STATUS=0 disks")
        assert block_nodes(pv_guest.domid) == {}
        assert image.read_bytes()[7 * 512 :].startswith(data.encode())


def test_read_only(serve: Daemon, pv_guest: Guest, image: Path) -> None:
    """``access=ro`` is all it takes."""
    domid = str(pv_guest.domid)
    assert xl("block-attach", domid, LINE.format("xvdb", "ro", image)) == (0, "")
    pv_guest.wait_for_device("xvdb")
    assert pv_guest.check("cat /sys/block/xvdb/ro").strip() == "1"
    assert xl("block-detach", domid, "xvdb") == (0, "")
    pv_guest.wait_gone("xvdb")


def test_a_line_with_filters(serve: Daemon, pv_guest: Guest, image: Path) -> None:
    """As docs/xl.md has them: each is there, in order, and does what it is told to."""
    domid = str(pv_guest.domid)
    filters = "filter=protect:range=1M-2M;mode=refuse,filter=error:operations=read;armed=no"
    line = LINE.format("xvdb", "rw", f"{image},backend=raw,{filters}")
    assert xl("block-attach", domid, line) == (0, "")
    pv_guest.wait_for_device("xvdb")
    shown = json.loads(xen_disk("filter", pv_guest.name, "xvdb", "list", "--json").stdout)
    assert [each["name"] for each in shown] == ["protect", "error"]
    write = "dd if=/dev/zero of=/dev/xvdb bs=64k count=1 oflag=direct seek="
    before = image.read_bytes()
    pv_guest.check(f"{write}0")
    assert pv_guest.run(f"{write}16")[0] != 0
    assert image.read_bytes() == bytes(1 << 16) + before[1 << 16 :]
    read = "dd if=/dev/xvdb of=/dev/null bs=64k count=1 iflag=direct"
    pv_guest.check(read)
    assert xen_disk("filter", pv_guest.name, "xvdb", "arm").returncode == 0
    assert pv_guest.run(read)[0] != 0
    assert xl("block-detach", domid, "xvdb") == (0, "")
    pv_guest.wait_gone("xvdb")


@pytest.mark.parametrize("allowed", [True, False])
def test_discards_are_for_the_line_to_allow(
    serve: Daemon, pv_guest: Guest, image: Path, allowed: bool
) -> None:
    """``no-discard`` keeps the image's blocks where they are."""
    domid = str(pv_guest.domid)
    access = "rw" if allowed else "rw,no-discard"
    assert xl("block-attach", domid, LINE.format("xvdb", access, image)) == (0, "")
    pv_guest.wait_for_device("xvdb")
    most = int(pv_guest.check("cat /sys/block/xvdb/queue/discard_max_bytes"))
    assert (most > 0) is allowed
    assert xl("block-detach", domid, "xvdb") == (0, "")
    pv_guest.wait_gone("xvdb")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("/nowhere/disk.raw", "script: /nowhere/disk.raw: "),
        ("/dev/null", "script: /dev/null: neither a file nor a block device"),
        ("/etc/hostname,colour=blue", "script: target=: there is no option colour=; known are"),
    ],
)
def test_a_disk_that_cannot_be_had(serve: Daemon, pv_guest: Guest, target: str, said: str) -> None:
    """``xl`` says why; and takes away again, without delay, what it has left in xenstore."""
    domid = str(pv_guest.domid)

    status, output = xl("block-attach", domid, LINE.format("xvdb", "rw", target))
    assert status != 0
    assert said in output
    assert xl("block-detach", domid, "xvdb") == (0, "")
    assert block_nodes(pv_guest.domid) == {}


def test_a_disk_that_does_not_close_in_time(serve: Daemon, pv_guest: Guest, image: Path) -> None:
    """``xl`` says so after 10 s; the disk goes as soon as it can, and can be had again."""
    domid = str(pv_guest.domid)
    line = LINE.format("xvdb", "rw", image)
    assert xl("block-attach", domid, line) == (0, "")
    pv_guest.wait_for_device("xvdb")
    process = int(str(served()[0]["pid"]))
    os.kill(process, signal.SIGSTOP)
    try:
        status, said = xl("block-detach", domid, "xvdb")
        assert status != 0
        assert "unable to remove device" in said
    finally:
        os.kill(process, signal.SIGCONT)
    serve.wait_for("STATUS=0 disks")
    assert xl("block-detach", domid, "xvdb") == (0, "")  # the guest has it until its nodes go
    pv_guest.wait_gone("xvdb")
    assert block_nodes(pv_guest.domid) == {}
    assert xl("block-attach", domid, line) == (0, "")
    pv_guest.wait_for_device("xvdb")
    assert xl("block-detach", domid, "xvdb") == (0, "")
    pv_guest.wait_gone("xvdb")


def test_a_guest_whose_disk_cannot_be_had(serve: Daemon) -> None:
    """``xl create`` fails with the reason, and leaves nothing."""
    with pytest.raises(GuestError) as caught:
        Guest("pv", disks=[LINE.format("xvda", "rw", "/nowhere/disk.raw")])
    assert "script: /nowhere/disk.raw: " in str(caught.value)


def test_boot_from_a_gold_image(serve: Daemon) -> None:
    """Two guests boot from one image by a line in their configurations, neither changes it.

    ``serve`` is started anew meanwhile; the guests do not notice.
    """
    digest = sh("sha256sum", str(GOLD))
    line = LINE.format("xvda", "rw", f"{GOLD},backend=cow,cow-limit=64M")
    with Guest("pv", cmdline="lab.root=xvda", disks=[line]) as guest:
        assert "/dev/xvda / ext4 rw" in guest.check("cat /proc/mounts")
        guest.check("echo from the guest > /new && rm /lab-root && sync")
        serve.stop()
        guest.check("echo 3 > /proc/sys/vm/drop_caches; cat /new /sbin/init > /dev/null")
        serve.start()
        with Guest("pv", cmdline="lab.root=xvda", disks=[line]) as second:
            second.check("ls /lab-root && ! ls /new")
            assert len(served()) == 2
            assert xl("destroy", str(second.domid)) == (0, "")  # it says so if a disk takes 10 s
        guest.check("echo 3 > /proc/sys/vm/drop_caches")
        assert guest.check("cat /new") == "from the guest\n"
        assert "I/O error" not in guest.dmesg()
        guest.shutdown()
        guest.wait_dead()
    serve.wait_for("STATUS=0 disks")
    assert digest == sh("sha256sum", str(GOLD)), "the gold image has changed"


@CAN_MOVE
def test_a_guest_that_is_saved_and_restored(serve: Daemon, image: Path, tmp_path: Path) -> None:
    """Its disk comes back by itself, with what it has mounted and had not written yet."""
    line = LINE.format("xvdb", "rw", image)
    with Guest("pv", disks=[line]) as guest:
        guest.wait_for_device("xvdb")
        guest.check("/opt/bin/mkfs.ext4 -q /dev/xvdb && mount /dev/xvdb /mnt")
        guest.check("dd if=/dev/urandom of=/mnt/stored bs=1M count=2 && sync")
        guest.check("dd if=/dev/urandom of=/mnt/late bs=64k count=16")
        sums = guest.check("cd /mnt && sha256sum stored late")
        (first,) = served()
        saved, domid = tmp_path / "saved", guest.domid
        guest.save(saved)
        serve.wait_for("STATUS=0 disks")
        assert block_nodes(domid) == {}

        guest.restore(saved)
        assert guest.domid != domid
        guest.unpause()
        guest.check("sync && echo 3 > /proc/sys/vm/drop_caches")
        assert guest.check("cd /mnt && sha256sum stored late") == sums
        (second,) = served()
        assert first["pid"] != second["pid"]
        guest.check("echo after > /mnt/after && umount /mnt")
        assert "I/O error" not in guest.dmesg()
        guest.shutdown()
        guest.wait_dead()
    serve.wait_for("STATUS=0 disks")
    sh("e2fsck", "-fn", str(image))
    assert sh("debugfs", "-R", "cat /after", str(image)).endswith("after\n")


def test_a_guest_that_reboots(serve: Daemon, image: Path, tmp_path: Path) -> None:
    """It finds its disks again: ``raw`` as it has left it, ``cow`` as it was in the beginning."""
    gold = tmp_path / "gold.raw"
    gold.write_bytes(image.read_bytes())
    lines = [
        LINE.format("xvdb", "rw", f"{image},backend=raw"),
        LINE.format("xvdc", "rw", f"{gold},backend=cow"),
    ]
    with Guest("pv", disks=lines, on_reboot="restart") as guest:
        for _ in range(2):
            domid = guest.domid
            for device in ("xvdb", "xvdc"):
                guest.wait_for_device(device)
                guest.check(f"dd if=/dev/urandom of=/dev/{device} bs=1M count=1 oflag=direct")
            written = image.read_bytes()
            guest.reboot()
            assert guest.domid != domid
            for device, content in (("xvdb", written), ("xvdc", gold.read_bytes())):
                guest.wait_for_device(device)
                read = guest.check(
                    f"dd if=/dev/{device} bs=1M iflag=direct 2>/dev/null | sha256sum"
                )
                assert read.split()[0] == hashlib.sha256(content).hexdigest(), device
            assert len(served()) == 2
    serve.wait_for("STATUS=0 disks")


@CAN_MOVE
def test_a_live_migration_whose_image_is_in_use(serve: Daemon, image: Path) -> None:
    """The other host, which is this one, cannot have the image: the guest stays where it is."""
    with Guest("pvh", disks=[LINE.format("xvdb", "rw", image)]) as guest:
        guest.wait_for_device("xvdb")
        guest.check("dd if=/dev/urandom of=/dev/xvdb bs=1M count=1 oflag=direct")
        content, domid = image.read_bytes(), guest.domid
        status, said = guest.migrate()
        assert status != 0, said
        assert "in use" in said, said
        assert guest.domid == domid
        read = guest.check("dd if=/dev/xvdb bs=1M iflag=direct 2>/dev/null | sha256sum")
        assert read.split()[0] == hashlib.sha256(content).hexdigest()
        guest.check("dd if=/dev/zero of=/dev/xvdb bs=1M count=1 oflag=direct")
        assert image.read_bytes()[:MIB] == bytes(MIB)
        assert len(served()) == 1
    serve.wait_for("STATUS=0 disks")


@CAN_MOVE
def test_a_live_migration_with_a_disk_of_a_server(
    serve: Daemon, image: Path, tmp_path: Path
) -> None:
    """Both hosts reach it: the guest moves while it writes, and no byte is lost."""
    at = tmp_path / "server"
    command = ["qemu-nbd", "-f", "raw", "--shared=0", "--persistent", "-k", str(at), str(image)]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + PATIENCE
        while not at.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        line = LINE.format("xvdb", "rw", f"nbd+unix:///?socket={at}")
        with Guest("pvh", fio=True, disks=[line]) as guest:
            guest.wait_for_device("xvdb")
            guest.check("rm -f /tmp/enough")
            once = (
                "fio --name=load --filename=/dev/xvdb --rw=randrw --bsrange=4k-64k --iodepth=8 "
                "--allow_file_create=0 --direct=1 --ioengine=libaio --size=4M --randseed=$n "
                "--verify=crc32c --verify_fatal=1 --verify_backlog=64 --minimal"
            )
            loop = f"n=1; until [ -e /tmp/enough ]; do {once} || exit 1; n=$((n+1)); done"
            load, domid = guest.spawn(loop), guest.domid
            field = "$(awk '{print $1 + $5}' /sys/block/xvdb/stat)"
            guest.wait_until(f'[ "{field}" -gt 50 ]', PATIENCE, "the load does not flow")
            status, said = guest.migrate()
            assert status == 0, said
            assert guest.domid != domid
            before = int(guest.check(f"echo {field}"))
            guest.wait_until(f'[ "{field}" -gt {before + 50} ]', PATIENCE, "nothing flows now")
            guest.check("touch /tmp/enough")
            status, said = load.wait(2 * PATIENCE)
            assert status == 0, said + guest.dmesg()[-2000:]
            assert "I/O error" not in guest.dmesg()
            assert block_nodes(domid) == {}
            assert [row["domid"] for row in served()] == [guest.domid]
        serve.wait_for("STATUS=0 disks")
    finally:
        server.terminate()
        server.wait(PATIENCE)


def test_a_process_that_is_killed_is_followed(serve: Daemon, pv_guest: Guest, image: Path) -> None:
    """Where the disk outlives it: the guest waits a moment, and knows of nothing."""
    domid = str(pv_guest.domid)
    line = LINE.format("xvdb", "rw", f"{image},backend=raw")
    assert xl("block-attach", domid, line) == (0, "")
    pv_guest.wait_for_device("xvdb")
    first = int(str(served()[0]["pid"]))
    pv_guest.check("dmesg -c > /dev/null")  # the errors that other tests asked for
    writing = pv_guest.spawn("dd if=/dev/zero of=/dev/xvdb bs=4k oflag=direct count=2000")
    os.kill(first, signal.SIGKILL)
    assert writing.wait()[0] == 0
    pv_guest.check("dd if=/dev/xvdb of=/dev/null bs=64k iflag=direct")
    (disk,) = served()
    assert disk["alive"]
    assert disk["pid"] != first
    assert "I/O error" not in pv_guest.dmesg()
    assert xl("block-detach", domid, "xvdb") == (0, "")
    assert block_nodes(pv_guest.domid) == {}
    pv_guest.wait_gone("xvdb")


@pytest.mark.smoke
def test_a_process_that_is_killed(serve: Daemon, pv_guest: Guest, image: Path) -> None:
    """Its changes have died: that is reported, ``xl block-detach`` takes the disk away."""
    domid = str(pv_guest.domid)
    line = LINE.format("xvdb", "rw", f"{image},backend=cow")
    assert xl("block-attach", domid, line) == (0, "")
    pv_guest.wait_for_device("xvdb")
    os.kill(int(str(served()[0]["pid"])), signal.SIGKILL)
    serve.wait_for("STATUS=0 disks")
    assert "has died" in serve.log.read_text()
    reading = pv_guest.spawn("dd if=/dev/xvdb of=/dev/null bs=4k count=1 iflag=direct")
    assert xl("block-detach", domid, "xvdb") == (0, "")
    assert reading.wait()[0] != 0
    pv_guest.wait_gone("xvdb")
    assert block_nodes(pv_guest.domid) == {}
    assert xl("block-attach", domid, LINE.format("xvdb", "rw", image)) == (0, "")
    pv_guest.wait_for_device("xvdb")
    assert xl("block-detach", domid, "xvdb") == (0, "")
    pv_guest.wait_gone("xvdb")
