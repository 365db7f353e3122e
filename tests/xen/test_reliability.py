"""A process that dies, hangs, is replaced or has no storage: the guest waits, and knows of nothing.

The ordinary run kills a few times; with ``-m long`` a hundred times. How long the guest waits at
most is measured by fio in the guest, and printed (``-rP`` shows it).
"""

from __future__ import annotations

import json
import mmap
import os
import pwd
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest

from xen_disk_py.datapath.double_buffer import DoubleBuffer
from xen_disk_py.recovery import record
from xen_disk_py.recovery.facts import Facts
from xen_disk_py.xenbus.states import Address, State

from .disk import PROGRAM, Disk, block_nodes, mapped_grants, open_files, xen_disk
from .guest import PATIENCE, Guest, Job, no_errors, sh
from .test_failures import records
from .test_integrity import digest, guest_digest, leave, mounted_in
from .test_life import alive, wait_backend
from .test_resize import resize, wait_for_size

MIB = 1 << 20
SIZE = 16 * MIB

Connect = Callable[..., Disk]

ENDLESS = (
    sys.executable,
    "-c",
    "import sys; from xen_disk_py.recovery.supervisor import Supervisor as S; "
    "from xen_disk_py import cli; "
    "S.__init__.__kwdefaults__['delays'] = (0.0,) * 1000; sys.exit(cli.main(sys.argv[1:]))",
)
"""The program with a supervisor that never gives up."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an empty image of 16 MiB in memory."""
    path = tmp_path / "disk.raw"
    sh("truncate", "-s", str(SIZE), str(path))
    return path


@pytest.fixture(autouse=True)
def nothing_left(pv_guest: Guest, xenstore_unchanged: None) -> Iterator[None]:
    """See that no process, record, private file or node is left behind."""
    before = grants(), records(), private_files()
    yield
    processes = sh("pgrep", "-af", r"xen_disk_py(/__main__\.py)? connect", check=False)
    for line in processes.splitlines():
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert processes == ""
    assert (records(), private_files()) == before[1:]
    deadline = time.monotonic() + PATIENCE
    while grants() > before[0]:  # the kernel unmaps for a process when it comes to it
        assert time.monotonic() < deadline, f"{grants()} pages are mapped, {before[0]} were before"


def private_files() -> list[Path]:
    """List the overlays that live as long as their disks."""
    return sorted(Path("/dev/shm").glob("xen_disk_py-*"))


def grants() -> int:
    """Count the guests' pages that dom0 has mapped, by the word of the hypervisor."""
    sh("xl", "debug-keys", "g")
    text = sh("xl", "dmesg").rpartition("gnttab_usage_print_all [ key")[2]
    return sum(line.startswith("(XEN) [0x") for line in text.splitlines())


def worker(disk: Disk) -> int:
    """Return the process that serves a supervised disk, or is about to."""
    path = Path(f"/proc/{disk.pid}/task/{disk.pid}/children")
    while not path.read_text():
        assert disk.process.poll() is None, disk.describe()
        time.sleep(0.01)
    return int(path.read_text())


def taken_over(disk: Disk, times: int) -> None:
    """Wait until a successor has said for so many times that it serves."""
    deadline = time.monotonic() + PATIENCE
    while disk.stderr.count(" takes over\n") < times:
        assert disk.process.poll() is None, disk.describe()
        assert time.monotonic() < deadline, disk.describe()
        time.sleep(0.02)


def kill(disk: Disk, times: int, seed: int = 1) -> None:
    """Kill the worker again and again, each time a while after it has begun to serve."""
    chance = random.Random(seed)
    said = disk.stderr.count(" takes over\n")
    for number in range(1, times + 1):
        time.sleep(chance.uniform(0, 1.5))
        os.kill(worker(disk), signal.SIGKILL)
        taken_over(disk, said + number)


class Load:
    """Random reads and writes in a guest, 32 at once, each block with its checksum, verified."""

    def __init__(self, guest: Guest, disk: Disk, size: str = "4M") -> None:
        guest.wait_for_device(disk.device)
        self._guest = guest
        self._disk = disk
        once = (
            f"fio --name=load --filename=/dev/{disk.device} --rw=randrw --bsrange=4k-128k "
            f"--allow_file_create=0 --iodepth=32 --direct=1 --ioengine=libaio --size={size} "
            "--verify=crc32c --verify_fatal=1 --verify_backlog=64 --randseed=$n --minimal"
        )
        guest.check("rm -f /tmp/enough")
        loop = f"n=1; until [ -e /tmp/enough ]; do {once} || exit 1; n=$((n+1)); done"
        self._job: Job = guest.spawn(loop)
        field = f"$(awk '{{print $1 + $5}}' /sys/block/{disk.device}/stat)"
        guest.wait_until(f'[ "{field}" -gt 100 ]', PATIENCE, "the load does not flow")

    def end(self, timeout: float = 2 * PATIENCE) -> str:
        """Let it end, see that all was well; tell how long the slowest request took."""
        self._guest.check("touch /tmp/enough")
        status, output = self._job.wait(timeout)
        said = f"{output}\n{self._disk.describe()}\n{self._guest.dmesg()[-2000:]}"
        assert status == 0, said
        assert no_errors(self._guest), said
        rounds = [line.split(";") for line in output.splitlines() if line.startswith("3;fio")]
        assert rounds, said
        assert {fields[4] for fields in rounds} == {"0"}, said
        slowest = max(int(fields[at]) for fields in rounds for at in (14, 55)) / 1e6
        return f"{len(rounds)} rounds of fio, slowest request {slowest:.2f} s"


@pytest.fixture
def quiet_guest(pv_guest: Guest) -> Guest:
    """Return a guest with fio whose kernel's log is empty."""
    pv_guest.check("dmesg -c > /dev/null")
    return pv_guest


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_killed_under_load(quiet_guest: Guest, connect: Connect, image: Path) -> None:
    """Every request is answered, and every byte is right."""
    disk = connect(quiet_guest, "--supervise", "--path", image, "--backend", "raw")
    load = Load(quiet_guest, disk)
    kill(disk, 5)
    print(load.end())
    leave(quiet_guest, disk)


@pytest.mark.timeout(900)
def test_queues_in_one_thread_are_killed_and_resized_under_load(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """Each processor has a ring, all served by one thread; it is killed, and again amid a resize.

    The successor ends that resize, and does the next. Beside a guest of four processors each of
    these steps takes minutes under emulation.
    """
    guest = new_guest("pv", fio=True, vcpus=2)
    guest.check("dmesg -c > /dev/null")
    disk = connect(
        guest,
        *("--supervise", "--watchdog", "0", "--path", image, "--backend", "raw", "--queues", "4"),
    )
    load = Load(guest, disk)
    assert 2 == sum(path.endswith("/event-channel") for path in block_nodes(guest.domid))
    kill(disk, 1)
    assert SIZE + MIB == resize(disk, str(SIZE + MIB))
    wait_for_size(guest, disk, SIZE + MIB)
    victim = worker(disk)
    os.kill(victim, signal.SIGSTOP)  # so that it has not answered before
    command = [*PROGRAM, "resize", guest.name, disk.vdev, str(2 * SIZE), "--timeout"]
    with subprocess.Popen([*command, str(PATIENCE)], stdout=subprocess.PIPE) as asked:
        while not any("/resize/" in path for path in block_nodes(guest.domid)):
            assert asked.poll() is None, disk.describe()
        os.kill(victim, signal.SIGKILL)
        said = asked.communicate(timeout=2 * PATIENCE)[0]
    expected = f"{disk.vdev} {disk.number} {disk.info['device']} 32 MiB\n"
    assert (0, expected) == (asked.returncode, said.decode()), disk.describe()
    wait_for_size(guest, disk, 2 * SIZE)
    taken_over(disk, 2)
    assert 3 * SIZE == resize(disk, str(3 * SIZE))
    wait_for_size(guest, disk, 3 * SIZE)
    print("2 kills, 3 resizes,", load.end())
    leave(guest, disk)


@pytest.mark.timeout(900)
def test_a_queue_s_process_is_killed_under_load(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """Each queue has a process, which alone has its pages; whichever is killed, all is right."""
    guest = new_guest("pv", fio=True, vcpus=2)
    guest.check("dmesg -c > /dev/null")
    disk = connect(
        guest,
        *("--supervise", "--user", "nobody", "--path", image, "--backend", "raw"),
        *("--queues", "2", "--queues-in", "processes"),
    )
    load = Load(guest, disk)
    chance = random.Random(int(time.time()))
    for number in range(3):
        time.sleep(chance.uniform(0, 1.5))
        main, queues = worker(disk), facts(disk)["queue_pids"]
        if not number:
            assert [True, True] == [mapped_grants(pid) > 1 for pid in queues]
            assert 0 == mapped_grants(main)
        os.kill([*queues, main][number], signal.SIGKILL)
        taken_over(disk, number + 1)
    print("3 kills,", load.end())
    assert 2 * SIZE == resize(disk, str(2 * SIZE))
    wait_for_size(guest, disk, 2 * SIZE)
    once = (
        f"fio --name=all --filename=/dev/{disk.device} --rw=randwrite --bs=64k --direct=1 "
        "--iodepth=16 --ioengine=libaio --numjobs=2 --offset_increment=50% --size=50% "
        "--allow_file_create=0 --verify=crc32c --minimal"
    )
    guest.check(once, timeout=2 * PATIENCE)
    leave(guest, disk)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("grants_by", ["auto", "copy"])
def test_killed_100_times(
    grants_by: str, quiet_guest: Guest, connect: Connect, image: Path
) -> None:
    """The same, a hundred times."""
    disk = connect(
        quiet_guest,
        *("--supervise", "--path", image, "--backend", "raw", "--grants", grants_by),
        program=ENDLESS,
    )
    load = Load(quiet_guest, disk)
    kill(disk, 100, seed=int(time.time()))
    print("100 kills,", load.end())
    leave(quiet_guest, disk)


@pytest.mark.long
def test_killed_under_load_pvh(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """A PVH guest notices as little."""
    guest = new_guest("pvh", fio=True, vcpus=1)
    disk = connect(guest, "--supervise", "--path", image, "--backend", "raw")
    load = Load(guest, disk)
    kill(disk, 5)
    print(load.end())
    leave(guest, disk)


def test_served_by_somebody_who_may_do_nothing(
    quiet_guest: Guest, connect: Connect, image: Path
) -> None:
    """Each successor gets at the image, the changes and Xen before it, too, is nobody."""
    image.chmod(0o600)
    disk = connect(quiet_guest, "--supervise", "--user", "nobody", "--path", image)
    load = Load(quiet_guest, disk, size="1M")
    kill(disk, 2)
    nobody = pwd.getpwnam("nobody").pw_uid
    (ids,) = re.findall(r"Uid:\t(.*)", Path(f"/proc/{worker(disk)}/status").read_text())
    assert ids.split() == [str(nobody)] * 4
    print(load.end())
    leave(quiet_guest, disk)


def forge(disk: Disk, path: Path) -> None:
    """Have a disk's record name another file, as its process, which has it open, could."""
    address = Address(0, disk.guest.domid, disk.number, "vbd3")
    name = record.path_of(record.DIRECTORY, address)
    with open(name, "r+b") as file:
        memory = memoryview(mmap.mmap(file.fileno(), record.HEAD))
        buffer = DoubleBuffer(memory[: record.FACTS_SIZE])
        told = Facts.parse(buffer.read() or b"")
        assert told is not None
        assert told.disk is not None
        disk_of_it = {**told.disk, "path": str(path)}
        buffer.write(told._replace(disk=disk_of_it, path=str(path)).encode())


def test_a_successor_opens_what_was_sealed(
    quiet_guest: Guest, connect: Connect, image: Path, tmp_path: Path
) -> None:
    """Whoever has got into the process that is nobody names another file: root does not open it."""
    secret = tmp_path / "secret.raw"
    for path in (image, secret):
        path.write_bytes(os.urandom(SIZE))
        path.chmod(0o600)
    before = digest(secret)
    disk = connect(
        quiet_guest, *("--supervise", "--user", "nobody", "--path", image, "--backend", "raw")
    )
    load = Load(quiet_guest, disk)
    for number in range(1, 3):
        victim = worker(disk)
        disk.process.send_signal(signal.SIGSTOP)
        os.kill(victim, signal.SIGSTOP)  # so that it does not write its record anew
        try:
            forge(disk, secret)
            assert facts(disk)["path"] == str(image)
        finally:
            os.kill(victim, signal.SIGKILL)
            disk.process.send_signal(signal.SIGCONT)
        taken_over(disk, number)
        opened = open_files(worker(disk)).values()
        assert str(image) in opened
        assert str(secret) not in opened
    print(load.end())
    assert guest_digest(quiet_guest, disk.device) == digest(image)
    assert before == digest(secret)
    leave(quiet_guest, disk)


def ext4_load(guest: Guest) -> Job:
    """Start to write files to /mnt, each with its checksum, until /tmp/enough is there."""
    guest.check("rm -f /tmp/enough")
    once = "dd if=/dev/urandom of=$f bs=64k count=3 && sync && sha256sum $f > $f.sum || exit 1"
    loop = f"n=0; until [ -e /tmp/enough ]; do f=$((n%30)); {once}; n=$((n+1)); done"
    job = guest.spawn(f"mkdir /mnt/d && cd /mnt/d && {loop}")
    guest.wait_until("[ -e /mnt/d/3.sum ]", PATIENCE, "no files")
    return job


@pytest.mark.parametrize("backend", ["cow", "raw"])
def test_ext4_survives(backend: str, quiet_guest: Guest, connect: Connect, image: Path) -> None:
    """A file system is clean and all files are whole; a gold image is what it was."""
    guest = quiet_guest
    sh("mkfs.ext4", "-q", str(image))
    before = digest(image)
    disk = connect(guest, "--supervise", "--path", image, "--backend", backend)
    device = f"/dev/{disk.device}"
    guest.wait_for_device(disk.device)
    guest.check(f"mount -t ext4 {device} /mnt")
    try:
        job = ext4_load(guest)
        kill(disk, 2)
        guest.check("touch /tmp/enough")
        status, output = job.wait()
        assert status == 0, output + disk.describe() + guest.dmesg()[-2000:]
    finally:
        guest.check("umount /mnt")
    guest.check(f"/opt/bin/e2fsck -fn {device}")
    with mounted_in(guest, device):
        sums = guest.check("cd /mnt/d && cat *.sum | sha256sum -c")
        assert sums.count(": OK\n") > 3, sums
    assert no_errors(guest), guest.dmesg()
    assert len(list(Path("/dev/shm").glob("xen_disk_py-*"))) == (backend == "cow")
    leave(guest, disk)
    if backend == "cow":
        assert before == digest(image), "the gold image has changed"
    else:
        sh("e2fsck", "-fn", str(image))


# -- hung, replaced, adopted -----------------------------------------------------------------------


def test_hung(quiet_guest: Guest, connect: Connect, image: Path) -> None:
    """A worker that stands still is killed, and another takes over."""
    disk = connect(
        quiet_guest,
        *("--supervise", "--path", image, "--backend", "raw", "--watchdog", "30"),
    )
    load = Load(quiet_guest, disk)
    os.kill(worker(disk), signal.SIGSTOP)
    disk.wait_stderr("gave no sign of life for 30 s; killing it")
    taken_over(disk, 1)
    print(load.end())
    leave(quiet_guest, disk)


def facts(disk: Disk) -> dict[str, Any]:
    """Return what ``list`` says of a disk."""
    rows = json.loads(xen_disk("list", disk.guest.name, "--json").stdout)
    (row,) = (row for row in rows if row["vdev"] == disk.vdev)
    assert isinstance(row, dict)
    return row


@pytest.mark.smoke
def test_upgraded(quiet_guest: Guest, connect: Connect, image: Path) -> None:
    """Another program takes the disk over, as the same process."""
    disk = connect(quiet_guest, "--path", image, "--backend", "raw")
    load = Load(quiet_guest, disk)
    done = xen_disk("upgrade", quiet_guest.name, disk.vdev, "--json")
    assert done.returncode == 0, f"{done.stderr}\n{disk.describe()}"
    told = json.loads(done.stdout)
    assert told["pid"] == disk.pid, told
    print(f"nobody served for {told['pause']:.2f} s")
    print(load.end())
    leave(quiet_guest, disk)


def test_adopted_by_one_of_two(quiet_guest: Guest, connect: Connect, image: Path) -> None:
    """Of two who want to take over a disk, one does; the other says why not."""
    disk = connect(quiet_guest, "--path", image, "--backend", "raw")
    load = Load(quiet_guest, disk)
    disk.kill()
    disk.wait()
    assert not facts(disk)["alive"]
    rivals = [connect(quiet_guest, disk.vdev, "--adopt", wait=False) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE
    while all(rival.process.poll() is None for rival in rivals):
        assert time.monotonic() < deadline, rivals[0].describe() + rivals[1].describe()
        time.sleep(0.02)
    loser, winner = sorted(rivals, key=lambda rival: rival.process.poll() is None)
    assert loser.wait() == 1, loser.describe()
    # it has looked before the other's claim, or after it
    assert re.search("lives and serves|that lives serves", loser.stderr), loser.describe()
    winner.wait_connected()
    assert winner.info["vdev"] == disk.vdev
    print(load.end())
    leave(quiet_guest, winner)


# -- the storage fails -----------------------------------------------------------------------------


@contextmanager
def full(directory: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Have an image of 12 MiB where there is room for 4; also return what makes room for all."""
    directory.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(directory))
    try:
        image = directory / "disk.raw"
        sh("truncate", "-s", "12M", str(image))
        yield image, lambda: print(sh("mount", "-o", "remount,size=32M", str(directory)))
    finally:
        sh("umount", "--lazy", str(directory))


def wait_held(disk: Disk) -> None:
    """Wait until ``list`` says that requests are queued for retry."""
    deadline = time.monotonic() + PATIENCE
    while not facts(disk)["held"]:
        assert time.monotonic() < deadline, disk.describe()


def test_held_until_there_is_room(quiet_guest: Guest, connect: Connect, tmp_path: Path) -> None:
    """Held, writes wait until a full file system has grown; a crash meanwhile changes nothing."""
    with full(tmp_path / "small") as (image, extend):
        disk = connect(
            quiet_guest,
            *("--supervise", "--path", image, "--backend", "raw", "--on-error", "hold"),
        )
        load = Load(quiet_guest, disk, "12M")
        wait_held(disk)
        kill(disk, 1)
        wait_held(disk)
        extend()
        print(load.end())
        row = facts(disk)
        assert (row["held"], row["counters"]["errors"]) == (0, 0)
        leave(quiet_guest, disk)


def test_reported_while_there_is_no_room(
    quiet_guest: Guest, connect: Connect, tmp_path: Path
) -> None:
    """Reported, the guest has errors, until there is room."""
    with full(tmp_path / "small") as (image, extend):
        disk = connect(quiet_guest, "--path", image, "--backend", "raw")
        quiet_guest.wait_for_device(disk.device)
        fill = f"dd if=/dev/zero of=/dev/{disk.device} bs=128k count=96 oflag=direct"
        status, output = quiet_guest.run(fill)
        assert status != 0, output
        assert not no_errors(quiet_guest)
        extend()
        quiet_guest.check(fill)
        leave(quiet_guest, disk)


# -- nobody serves ---------------------------------------------------------------------------------


def test_guest_destroyed_while_nobody_serves(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """A successor that comes too late cleans up, and ends well."""
    guest = new_guest("pv")
    disk = connect(guest, "--supervise", "--path", image, "--backend", "raw")
    disk.process.send_signal(signal.SIGSTOP)
    os.kill(worker(disk), signal.SIGKILL)
    guest.destroy()
    disk.process.send_signal(signal.SIGCONT)
    assert disk.wait() == 0, disk.describe()
    assert block_nodes(guest.domid) == {}


@pytest.mark.long
def test_guest_destroyed_before_it_is_adopted(
    new_guest: Callable[..., Guest], connect: Connect, image: Path
) -> None:
    """The same by hand."""
    guest = new_guest("pv")
    disk = connect(guest, "--path", image, "--backend", "raw")
    disk.kill()
    disk.wait()
    guest.destroy()
    late = xen_disk("connect", "--adopt", str(guest.domid), disk.vdev)
    assert late.returncode == 0, late
    assert block_nodes(guest.domid) == {}


@pytest.mark.long
def test_guest_paused_while_nobody_serves(
    quiet_guest: Guest, connect: Connect, image: Path
) -> None:
    """A successor does not need the guest; the guest finds done what it had asked for."""
    disk = connect(quiet_guest, "--supervise", "--path", image, "--backend", "raw")
    load = Load(quiet_guest, disk)
    quiet_guest.pause()
    try:
        kill(disk, 2)
    finally:
        quiet_guest.unpause()
    print(load.end())
    leave(quiet_guest, disk)


def test_driver_leaves_while_nobody_serves(
    quiet_guest: Guest, connect: Connect, image: Path
) -> None:
    """A driver that wants to close is answered by the successor, which stays for the next one."""
    disk = connect(quiet_guest, "--supervise", "--path", image, "--backend", "raw")
    quiet_guest.wait_for_device(disk.device)
    disk.process.send_signal(signal.SIGSTOP)
    os.kill(worker(disk), signal.SIGKILL)
    leaving = quiet_guest.spawn(f"echo vbd-{disk.number} > /sys/bus/xen/drivers/vbd/unbind")
    front = f"/local/domain/{quiet_guest.domid}/device/vbd/{disk.number}/state"
    deadline = time.monotonic() + PATIENCE
    while sh("xenstore-read", front).strip() == str(int(State.CONNECTED)):
        assert time.monotonic() < deadline, disk.describe()
        time.sleep(0.1)
    disk.process.send_signal(signal.SIGCONT)
    wait_backend(disk, State.CLOSED, PATIENCE)
    assert leaving.wait()[0] == 0
    alive(disk)
    leave(quiet_guest, disk)


def test_image_changes_while_nobody_serves(
    quiet_guest: Guest, connect: Connect, image: Path
) -> None:
    """Another file, or a shorter one, is not what the guest has: that is said, and repaired."""
    disk = connect(quiet_guest, "--path", image, "--backend", "raw")
    load = Load(quiet_guest, disk)
    disk.kill()
    disk.wait()

    def refused() -> str:
        late = xen_disk("connect", "--adopt", quiet_guest.name, disk.vdev)
        assert late.returncode == 1, late
        return late.stderr

    aside = image.rename(image.with_suffix(".aside"))
    image.write_bytes(bytes(SIZE))
    assert "is not what" in refused()
    aside.rename(image)
    sh("truncate", "-s", "12M", str(image))  # the load is in the first 4
    assert f"make it as long again ({SIZE} bytes)" in refused()
    sh("truncate", "-s", str(SIZE), str(image))
    again = connect(quiet_guest, disk.vdev, "--adopt")
    print(load.end())
    leave(quiet_guest, again)
