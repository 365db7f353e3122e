"""The same storage by another way: with the real QEMU, loop devices, mounts and nodes."""

import contextlib
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import time

import pytest

from xen_disk_py.backends import locks, qemu_locks, sharing
from xen_disk_py.backends.image import Image
from xen_disk_py.errors import ImageError

PATIENCE = 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "_UDEV_SECONDS", 0.0)


def need(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True)


def refused(path, *, writable):
    """Open what cannot be opened, leaving nothing open; return the message."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        Image.open(path, writable=writable)
    assert before >= set(os.listdir("/proc/self/fd"))
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    return message


def guest_of(path, *, reads):
    """The command that starts a guest of QEMU with an image, its processor stopped."""
    need("qemu-system-x86_64")
    drive = f"file={path},format=raw,if=none,id=d,readonly={'on' if reads else 'off'}"
    plain = ["-M", "pc,accel=tcg", "-m", "16", "-nodefaults", "-S", "-display", "none"]
    disk = ["-drive", drive, "-device", "virtio-blk-pci,drive=d"]
    return ["qemu-system-x86_64", *plain, *disk, "-monitor", "stdio"]


@pytest.fixture
def start_guest():
    """Starts guests of QEMU, which end with the test."""
    running = []

    def start(path, *, reads):
        process = subprocess.Popen(
            guest_of(path, reads=reads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        process.stdin.write("info status\n")
        process.stdin.flush()
        while "VM status" not in process.stdout.readline():  # answered when all is open
            assert process.poll() is None
        return process

    yield start
    for process in running:
        leave(process)


def leave(process):
    if process.returncode is None:
        process.stdin.write("quit\n")
        process.communicate()


def until_locked(path):
    deadline = time.monotonic() + PATIENCE
    while not qemu_locks.holders(os.stat(path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("writable", [True, False])
def test_an_image_that_a_guest_of_qemu_writes_is_refused(image, start_guest, writable):
    process = start_guest(image, reads=False)
    message = refused(image, writable=writable)
    assert f"process {process.pid} (qemu-system-x86_64 " in message
    leave(process)
    Image.open(image, writable=writable).close()


def test_an_image_that_a_guest_of_qemu_reads_can_be_read_only(image, start_guest):
    process = start_guest(image, reads=True)
    Image.open(image, writable=False).close()
    assert f"process {process.pid} (qemu-system-x86_64 " in refused(image, writable=True)


def test_an_image_that_qemu_nbd_serves_is_refused(image, tmp_path):
    need("qemu-nbd")
    socket = str(tmp_path / "nbd")
    process = subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", socket, "-t", image])
    try:
        until_locked(image)
        message = refused(image, writable=True)
        assert f"process {process.pid} (qemu-nbd " in message
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("where", ["file", "device", "file behind the device"])
@pytest.mark.parametrize("writable", [True, False])
def test_qemu_is_refused_what_we_write_and_shares_what_we_read(image, attach_loop, writable, where):
    path = image if where == "file" else attach_loop(image)
    theirs = image if where == "file behind the device" else path

    def is_refused(command):
        done = subprocess.run(command, input="quit\n", capture_output=True, text=True, check=False)
        assert bool(done.returncode) == ("lock" in done.stderr), done.stderr
        return bool(done.returncode)

    need("qemu-io")
    reads, writes = guest_of(theirs, reads=True), guest_of(theirs, reads=False)
    tool = ["qemu-io", "-f", "raw", "-c", "write 0 4k", theirs]
    with Image.open(path, writable=writable):
        assert [writable, True, True] == [*map(is_refused, (reads, writes, tool))]
    assert [False, False, False] == [*map(is_refused, (reads, writes, tool))]


def test_locks_that_are_refused_leave_none_behind(image, start_guest):
    start_guest(image, reads=True)
    fd = os.open(image, os.O_RDWR)
    with pytest.raises(qemu_locks.Locked):
        qemu_locks.take(fd, writes=True, alone=True)
    assert os.getpid() not in qemu_locks.holders(os.stat(image))
    os.close(fd)


def test_who_has_none_is_told_without_a_look_into_each_process(image, monkeypatch):
    monkeypatch.setattr(qemu_locks, "_descriptors", lambda pid: pytest.fail(f"looked into {pid}"))
    assert [] == qemu_locks.holders(os.stat(image))


def test_an_image_behind_a_loop_device_is_refused_to_writers(image, attach_loop):
    device = attach_loop(image)
    message = refused(image, writable=True)
    assert f"attached to {device}, and a disk that writes needs its image alone" in message
    assert message.endswith(f": losetup -d {device}")


def test_readers_are_warned_of_a_loop_device_that_may_be_written(image, attach_loop, caplog):
    device = attach_loop(image)
    with caplog.at_level(logging.WARNING), Image.open(image, writable=False):
        (line,) = caplog.messages
    assert f"{image}: attached to {device}: what the guest reads may change" == line


def test_readers_share_an_image_with_a_loop_device_that_only_reads(image, attach_loop, caplog):
    attach_loop(image, "--read-only")
    with caplog.at_level(logging.WARNING), Image.open(image, writable=False):
        assert not caplog.messages
    assert "attached to" in refused(image, writable=True)


def test_another_name_of_a_file_behind_a_loop_device_is_refused(image, attach_loop, tmp_path):
    device = attach_loop(image)
    other = str(tmp_path / "hard link")
    os.link(image, other)
    os.rename(image, tmp_path / "renamed")
    assert f"attached to {device}" in refused(other, writable=True)
    os.unlink(tmp_path / "renamed")  # sysfs has no name of it any more that could be opened
    assert f"attached to {device}" in refused(other, writable=True)


def test_parts_of_a_file_that_do_not_overlap_can_be_written(make_image, attach_loop):
    image = make_image(2 << 20)
    first = attach_loop(image, "--sizelimit", "1M")
    second = attach_loop(image, "--offset", "1M")
    with Image.open(first, writable=True), Image.open(second, writable=True):
        refused(image, writable=True)
    third = attach_loop(image, "--offset", "512K", "--sizelimit", "1M")
    message = refused(third, writable=True)
    assert first in message or second in message


def test_a_loop_device_and_its_file_are_one(image, attach_loop):
    device = attach_loop(image)
    with Image.open(device, writable=True):
        assert f"process {os.getpid()}" in refused(image, writable=True)
        assert f"process {os.getpid()}" in refused(image, writable=False)
    with Image.open(device, writable=False):
        assert f"process {os.getpid()}" in refused(image, writable=True)


def test_a_file_that_is_written_is_not_served_through_a_loop_device(image, attach_loop):
    device = attach_loop(image)
    with sharing.forced(True), Image.open(image, writable=True):
        pass
    fd = os.open(image, os.O_RDWR)
    try:
        qemu_locks.take(fd, writes=True, alone=True)
        for writable in (True, False):
            assert f"{device} ({image}): " in refused(device, writable=writable)
    finally:
        os.close(fd)


@contextlib.contextmanager
def mounted(device, directory, *options):
    need("mkfs.ext4", "mount")
    done = subprocess.run(["mkfs.ext4", "-q", device], capture_output=True, check=False)
    if not done.returncode:
        command = ["mount", *options, device, str(directory)]
        done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode()}")
    try:
        yield
    finally:
        run("umount", "--lazy", str(directory))


@pytest.fixture
def mount_point(tmp_path):
    path = tmp_path / "mount point"
    path.mkdir()
    return path


@pytest.mark.parametrize("writable", [True, False])
def test_an_image_that_is_mounted_is_refused(make_image, attach_loop, mount_point, writable):
    image = make_image(4 << 20)
    device = attach_loop(image)
    with mounted(device, mount_point):
        message = refused(image, writable=writable)
        assert f"attached to {device} (mounted on {mount_point}), and " in message
        assert message.endswith(f": umount '{mount_point}'; losetup -d {device}")
        with sharing.forced(False):
            assert refused(image, writable=writable).endswith(
                f"; losetup -d {device}, or --force to use it all the same"
            )


@pytest.mark.parametrize("writable", [True, False])
def test_a_device_that_is_mounted_is_refused(make_image, attach_loop, mount_point, writable):
    device = attach_loop(make_image(4 << 20))
    with mounted(device, mount_point):
        assert f"mounted on {mount_point}" in refused(device, writable=writable)


def test_readers_share_what_is_mounted_read_only(make_image, attach_loop, mount_point, caplog):
    image = make_image(4 << 20)
    device = attach_loop(image)
    with mounted(device, mount_point, "-o", "ro"), caplog.at_level(logging.WARNING):
        Image.open(device, writable=False).close()
        assert not caplog.messages


def test_a_device_that_a_program_wants_alone_is_a_warning_to_readers(
    loop_device, monkeypatch, caplog
):
    monkeypatch.setattr(sharing, "_PROBE_PAUSE", 0)
    fd = os.open(loop_device, os.O_RDWR | os.O_EXCL)
    try:
        with caplog.at_level(logging.WARNING):
            Image.open(loop_device, writable=False).close()
    finally:
        os.close(fd)
    assert ["opened by a program that wants it alone" in line for line in caplog.messages] == [True]


def test_readers_of_a_device_do_not_see_each_other(loop_device, caplog):
    with caplog.at_level(logging.WARNING), Image.open(loop_device, writable=False):
        Image.open(loop_device, writable=False).close()
    assert not caplog.messages


@pytest.mark.parametrize("writable", [True, False])
def test_another_node_of_a_device_is_the_same_device(loop_device, tmp_path, writable):
    other = str(tmp_path / "node")
    os.mknod(other, 0o600 | stat.S_IFBLK, os.stat(loop_device).st_rdev)
    with Image.open(other, writable=True):
        refused(loop_device, writable=writable)
    with Image.open(loop_device, writable=True):
        refused(other, writable=writable)
    with Image.open(other, writable=False):
        assert f"process {os.getpid()}" in refused(loop_device, writable=True)


@pytest.mark.parametrize("what", ["device", "file"])
@pytest.mark.parametrize("writable", [True, False])
def test_what_is_mounted_in_another_namespace_is_refused(
    make_image, attach_loop, mount_point, writable, what
):
    need("unshare")
    image = make_image(4 << 20)
    device = attach_loop(image)
    run("mkfs.ext4", "-q", device)
    script = f"mount {device} '{mount_point}' && echo there && read line"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as other:
        if other.stdout.readline() != b"there\n":
            pytest.skip("no mount namespaces here")
        assert not os.path.ismount(mount_point)
        path = device if what == "device" else image
        message = refused(path, writable=writable)
        other.communicate(b"\n")
    assert f"mounted on {mount_point}" in message


def test_readers_are_refused_what_is_mounted_through_a_volume(make_image, attach_loop, mount_point):
    need("dmsetup")
    device = attach_loop(make_image(4 << 20))
    name = f"xen_disk_py-{os.getpid()}"
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}
    done = subprocess.run(
        ["dmsetup", "create", name, "--table", f"0 8192 linear {device} 0"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        pytest.skip(f"no device-mapper here: {done.stderr.strip()}")
    try:
        with mounted(f"/dev/mapper/{name}", mount_point):
            message = refused(device, writable=False)
            assert "a part of /dev/dm-" in message
            assert f", mounted on {mount_point}, and it may be written: umount" in message
    finally:
        subprocess.run(["dmsetup", "remove", name], check=True, env=environment)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (
            {
                "target/core/fileio_0/disk/enable": "1",
                "target/core/fileio_0/disk/info": "Status: ACTIVATED  Max Queue Depth: 128\n"
                "        TCM FILEIO ID: 0        File: {}  Size: 1048576  Mode: O_DSYNC Async: 0\n",
            },
            "LIO's fileio disk): targetcli /backstores/fileio delete disk",
        ),
        (
            {
                "target/core/iblock_1/two words/enable": "1",
                "target/core/iblock_1/two words/udev_path": "{}\n",
            },
            "LIO's iblock two words): targetcli /backstores/iblock delete 'two words'",
        ),
        (
            {
                "nvmet/subsystems/nqn/namespaces/1/enable": "1",
                "nvmet/subsystems/nqn/namespaces/1/device_path": "{}\n",
            },
            "NVMe target nqn): echo 0 > ",
        ),
        (
            {"usb_gadget/g1/functions/mass_storage.0/lun.0/file": "{}\n"},
            "USB gadget g1): end that first",
        ),
    ],
)
def test_what_the_kernel_exports_is_refused(image, tmp_path, monkeypatch, files, what):
    """A copy of what its drivers show; tests/xen asks a real one."""
    monkeypatch.setattr(sharing, "_CONFIGFS", str(tmp_path / "config"))
    for name, text in files.items():
        path = tmp_path / "config" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(image))
    for writable in (True, False):
        message = refused(image, writable=writable).replace(
            ", and a disk that writes needs its image alone", ""
        )
        assert f"exported by the kernel ({what}" in message.replace(", and it may be written", "")
    for name in files:
        if name.endswith("enable"):
            (tmp_path / "config" / name).write_text("0\n")
            Image.open(image, writable=True).close()


@pytest.mark.parametrize("writable", [True, False])
def test_swap_space_is_refused(make_image, writable):
    need("mkswap", "swapon")
    image = make_image(4 << 20)
    os.chmod(image, 0o600)
    run("mkswap", image)
    done = subprocess.run(["swapon", image], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no swap space here: {done.stderr.strip()}")
    try:
        assert "used as swap space" in refused(image, writable=writable)
    finally:
        run("swapoff", image)


def test_force_uses_it_all_the_same_with_a_warning(make_image, attach_loop, mount_point, caplog):
    image = make_image(4 << 20)
    device = attach_loop(image)
    with mounted(device, mount_point), caplog.at_level(logging.WARNING), sharing.forced(True):
        for path in (image, device):
            Image.open(path, writable=True).close()
    assert 2 == len(caplog.messages)
    for line in caplog.messages:
        assert f"mounted on {mount_point}" in line
        assert line.endswith("(used all the same: --force)")


def test_force_shares_what_another_of_us_writes(image, caplog):
    with Image.open(image, writable=True):
        with caplog.at_level(logging.WARNING), sharing.forced(True):
            Image.open(image, writable=True).close()
        refused(image, writable=True)
    assert all("(used all the same: --force)" in line for line in caplog.messages)


def test_the_storage_of_an_image_is_known_by_all_its_names(image, attach_loop, tmp_path):
    device = attach_loop(image)
    os.symlink(image, tmp_path / "link")
    with sharing.forced(True), Image.open(str(tmp_path / "link"), writable=True) as file:
        one = file.storage
    with Image.open(device, writable=False) as loop:
        other = loop.storage
    assert (str(tmp_path / "link"), True) == (one.path, one.writable)
    assert (device, False) == (other.path, other.writable)
    assert one.files == other.files
    assert one.devices == other.devices == {sharing.number_of(os.stat(device))}


def test_a_partition_and_its_disk_share_bytes(make_image, attach_loop, tmp_path):
    image = make_image(8 << 20, sparse=True)
    with open(image, "r+b") as file:  # an MBR: each entry's first sector, and how many
        file.seek(446)
        for first in (2048, 8192):
            file.write(struct.pack("<4xB3xII", 0x83, first, 4096))
        file.seek(510)
        file.write(b"\x55\xaa")
    device = attach_loop(image, "--partscan")
    name = os.path.basename(device)
    if not os.path.exists(f"/sys/block/{name}/{name}p2"):
        pytest.skip("no partitions of loop devices here")
    parts = []
    for part in (f"{name}p1", f"{name}p2"):
        with open(f"/sys/block/{name}/{part}/dev", encoding="ascii") as file:
            major, minor = map(int, file.read().split(":"))
        parts.append(str(tmp_path / part))
        os.mknod(parts[-1], 0o600 | stat.S_IFBLK, os.makedev(major, minor))
    with Image.open(parts[0], writable=True) as one, Image.open(parts[1], writable=True) as two:
        assert sharing.number_of(os.stat(device)) in one.storage.devices & two.storage.devices
        refused(device, writable=True)
        refused(image, writable=True)
    with Image.open(device, writable=True):
        refused(parts[0], writable=True)


def test_a_lock_of_qemu_is_found_by_its_bytes(image):
    """The same from a program that is no QEMU: what is documented is what is looked at."""
    code = (
        "import fcntl, os, struct, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "lock = struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 201, 1, 0)\n"
        "fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        assert f"process {process.pid}" in refused(image, writable=True)
        Image.open(image, writable=False).close()
    finally:
        process.communicate()
