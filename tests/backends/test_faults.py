"""What goes wrong under an image, for every backend that has one: an I/O error, never the end."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
from long_run import LONG

from backends.blocks import read, write
from xen_disk_py.backends.loader import open_backend

BACKENDS = ("raw", "mmap", "cow")
PERSISTENT = ("raw", "mmap")

WORKER = """
import random, signal, sys
signal.alarm(100)
sys.path.insert(0, sys.argv[3])
from xen_disk_py.backends.loader import open_backend

disk = open_backend(sys.argv[1], {"path": sys.argv[2]})
dice = random.Random(1)
done = failed = 0
print("ready", flush=True)
most = int(sys.argv[4])
while done < most or failed < most // 10:
    pages = dice.choice((1, 1, 2, 32))
    offset = dice.randrange(0, disk.size - pages * 4096 + 1, 512)
    buffers = [memoryview(bytearray(4096)) for _ in range(pages)]
    try:
        if disk.can_discard and dice.random() < 0.1:
            disk.discard(offset, pages * 4096)
        if dice.choice((disk.read, disk.write))(buffers, offset) == pages * 4096:
            done += 1
        else:
            failed += 1
    except OSError:
        failed += 1
disk.close()
"""


def write_through(disk, offset, content):
    write(disk, offset, content)
    disk.flush()


@pytest.fixture
def opened():
    """Opens disks and closes them."""
    disks = []

    def open_disk(backend, path):
        disks.append(open_backend(backend, {"path": path}))
        return disks[-1]

    yield open_disk
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_is_cut_short_and_grows_all_the_time_kills_nobody(backend, make_image):
    path = make_image()
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-c", WORKER, backend, path, root, str(4000 if LONG else 1000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        assert b"ready\n" == worker.stdout.readline()
        while worker.poll() is None:
            for size in (0, 1 << 20, 4608, 1 << 20):
                os.truncate(path, size)
        assert (0, b"") == (worker.returncode, worker.stderr.read())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_is_removed_is_served_on(backend, opened, image):
    disk = opened(backend, image)
    before = read(disk, 0, disk.size)
    os.unlink(image)
    write(disk, 512, b"x" * 8192)
    disk.flush()
    assert before[:512] + b"x" * 8192 + before[8704:] == read(disk, 0, disk.size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_is_replaced_is_served_on(backend, opened, image, make_image):
    disk = opened(backend, image)
    before = read(disk, 0, 65536)
    os.rename(make_image(2 << 20, name="other.img"), image)
    assert before == read(disk, 0, 65536)


@pytest.fixture
def full_image(tmp_path):
    """An image that is a hole, on a file system with no room to fill it."""
    if os.geteuid():
        pytest.skip("a small file system needs root")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("nothing can be mounted here")
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
    yield str(path)
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("backend", PERSISTENT)
def test_a_full_file_system_is_an_error_and_what_was_written_stays(backend, opened, full_image):
    disk = opened(backend, full_image)
    done = 0
    error = None
    while error is None:
        try:
            write(disk, done, bytes([done >> 12]) * 4096)
            done += 4096
        except OSError as caught:
            error = caught
    assert (errno.ENOSPC if backend == "raw" else errno.EIO) == error.errno
    assert "space" in str(error)
    assert 0 < done <= 65536
    for offset in range(0, done, 4096):
        assert bytes([offset >> 12]) * 4096 == read(disk, offset, 4096)
    write(disk, 0, b"x" * done)
    assert b"x" * done == read(disk, 0, done)
    assert bytes(4096) == read(disk, disk.size - 4096, 4096)


@pytest.mark.parametrize("backend", PERSISTENT)
def test_a_device_that_fails_later_is_an_error_of_the_flush(backend, opened, full_image):
    made = subprocess.run(
        ["losetup", "--find", "--show", full_image], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        disk = opened(backend, device)
        write(disk, 0, b"x" * 4096)
        disk.flush()
        with pytest.raises(OSError, match=r"error|space"):
            write_through(disk, 0, b"y" * disk.size)  # far more than the file system takes
        disk.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_file_that_may_not_grow_is_an_error(opened, make_image):
    disk = opened("raw", make_image(1 << 20, sparse=True))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(disk, 65536, bytes(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    write(disk, 65536, bytes(4096))


@pytest.fixture
def failing_device(loop_device):
    """A device of 4 MiB whose second MiB cannot be read or written."""
    if shutil.which("dmsetup") is None:
        pytest.skip("a device that fails needs dmsetup")
    name = f"xen-disk-py-{uuid.uuid4()}"
    table = f"0 2048 linear {loop_device} 0\n2048 2048 error\n4096 4096 linear {loop_device} 4096"
    made = subprocess.run(
        ["dmsetup", "create", name], input=table, text=True, capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no device mapper here: {made.stderr.partition(chr(10))[0]}")
    subprocess.run(["dmsetup", "mknodes", name], check=True)
    yield f"/dev/mapper/{name}"
    subprocess.run(["dmsetup", "remove", "--retry", name], check=True, capture_output=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_place_on_a_device_is_an_error_there_and_only_there(backend, failing_device):
    disk = open_backend(backend, {"path": failing_device})
    try:
        with pytest.raises(OSError, match=r"error|ends"):
            read(disk, 1 << 20, 4096)
        with pytest.raises(OSError, match=r"error|cannot be written"):
            write_through(disk, (1 << 20) + 512, bytes(512))  # the page's rest is read first
        write(disk, 0, b"x" * 4096)
        write(disk, 2 << 20, b"y" * 4096)
        assert b"x" * 4096 == read(disk, 0, 4096)
        assert b"y" * 4096 == read(disk, 2 << 20, 4096)
    finally:
        disk.close()
