import fcntl
import os
import socket
import subprocess
import sys

import pytest
from blocks import buffers

from xen_disk_py.backends import image as image_module
from xen_disk_py.backends.image import Image, MappedImage, transfer_all
from xen_disk_py.errors import ImageError

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX if sys.argv[2] == "writer" else fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts another process that holds a lock on a file."""
    holders = []

    def start(path, kind):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        holders.append(holder)
        assert holder.stdout.readline() == b"held\n"
        return holder

    yield start
    for holder in holders:
        holder.communicate()


def test_an_image_tells_its_facts(image):
    with Image.open(image, writable=False) as opened:
        assert image == opened.path
        assert 1 << 20 == opened.size
        assert 512 == opened.sector_size
        assert opened.read_only
        assert not opened.is_block_device
        assert not os.get_inheritable(opened.fd)


def test_the_path_is_made_absolute(image, monkeypatch):
    monkeypatch.chdir(os.path.dirname(image))
    with Image.open("disk.img", writable=True) as opened:
        assert image == opened.path
        assert not opened.read_only


def test_a_reader_cannot_write(image):
    with Image.open(image, writable=False) as opened, pytest.raises(OSError, match="Bad file"):
        os.pwrite(opened.fd, b"x", 0)


def test_closing_twice_does_nothing(image):
    opened = Image.open(image, writable=True)
    opened.close()
    opened.close()


def refused(path, *, writable=False):
    """Open what cannot be opened; return the message. No descriptor is left behind."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImageError) as caught:
        Image.open(str(path), writable=writable)
    assert before == os.listdir("/proc/self/fd")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "gone.img")


def test_a_name_too_long_is_refused(tmp_path):
    assert "File name too long" in refused(tmp_path / ("x" * 300))


def test_a_folder_is_refused(tmp_path):
    assert "a folder" in refused(tmp_path)


def test_an_empty_file_is_refused(make_image):
    assert "empty" in refused(make_image(0))


@pytest.mark.parametrize("size", [1, 511, 513, 1000])
def test_a_size_that_is_not_made_of_sectors_is_refused(make_image, size):
    message = refused(make_image(size))
    assert f"{size} bytes" in message
    assert "truncate -s %512" in message


def test_the_remedy_for_an_odd_size_works(make_image):
    path = make_image(1000)
    subprocess.run(["truncate", "-s", "%512", path], check=True)
    with Image.open(path, writable=False) as opened:
        assert 1024 == opened.size


def test_a_pipe_is_refused_without_waiting_for_its_other_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a block device" in refused(tmp_path / "pipe")


def test_a_socket_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "neither a file nor a block device" in refused(tmp_path / "socket")


def test_a_character_device_is_refused():
    assert "neither a file nor a block device" in refused("/dev/zero")


@pytest.mark.parametrize(("mode", "writable"), [(0o000, False), (0o000, True), (0o444, True)])
def test_a_file_without_permission_is_refused(as_nobody, mode, writable):
    folder, dropped = as_nobody
    path = os.path.join(folder, "disk.img")
    with open(path, "wb") as file:
        file.truncate(512)
    os.chmod(path, mode)
    with dropped():
        message = refused(path, writable=writable)
    assert ("no permission to write" if writable else "no permission to read") in message
    assert writable == ("--read-only" in message)


def test_a_file_on_a_read_only_file_system_names_the_remedies(image, monkeypatch):
    def refuse(path, flags):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(image_module.os, "open", refuse)
    message = refused(image, writable=True)
    assert "--read-only" in message
    assert "--backend cow" in message


def test_many_readers_share_an_image(image):
    with Image.open(image, writable=False), Image.open(image, writable=False):
        pass


@pytest.mark.parametrize("holder_writes", [True, False])
def test_a_writer_wants_the_image_alone(image, holder_writes):
    with Image.open(image, writable=holder_writes):
        message = refused(image, writable=True)
    assert f"process {os.getpid()}" in message
    assert "needs its image alone" in message
    Image.open(image, writable=True).close()


def test_a_reader_is_refused_while_a_writer_has_the_image(image):
    with Image.open(image, writable=True):
        assert "being written by" in refused(image)


@pytest.mark.parametrize("kind", ["writer", "reader"])
def test_the_holder_of_a_lock_is_named_with_its_command(image, hold, kind):
    holder = hold(image, kind)
    message = refused(image, writable=True)
    assert f"in use by process {holder.pid} ({sys.executable} -c ?import fcntl" in message


def test_all_holders_are_named(image, hold):
    pids = sorted([hold(image, "reader").pid, hold(image, "reader").pid])
    message = refused(image, writable=True)
    assert all(f"process {pid} (" in message for pid in pids)


def test_a_lock_ends_with_its_holder(image, hold):
    holder = hold(image, "writer")
    holder.kill()
    holder.communicate()
    Image.open(image, writable=True).close()


def test_a_holder_that_nothing_is_known_of_is_another_process(image, monkeypatch):
    monkeypatch.setattr(image_module, "_holders", lambda status: [])
    with Image.open(image, writable=True):
        assert "in use by another process" in refused(image, writable=True)


def test_a_file_system_without_locks_is_refused(image, monkeypatch):
    def flock(fd, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "cannot be locked: No locks available" in refused(image)


def test_a_block_device_is_opened(loop_device):
    with Image.open(loop_device, writable=True) as opened:
        assert opened.is_block_device
        assert 4 << 20 == opened.size
        assert 512 == opened.sector_size


def test_a_block_device_has_one_writer(loop_device):
    with Image.open(loop_device, writable=True):
        message = refused(loop_device, writable=True)
    assert "in use" in message


def test_a_mounted_device_is_refused_to_writers(loop_device, tmp_path):
    made = subprocess.run(["mkfs.ext4", "-q", loop_device], capture_output=True, check=False)
    mounted = made.returncode == 0 and subprocess.run(
        ["mount", loop_device, str(tmp_path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        message = refused(loop_device, writable=True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "unmount or release it first" in message


def test_a_short_transfer_is_continued_until_all_is_done():
    data = os.urandom(64 * 1024)

    def trickle(fd, views, offset):
        """Transfers no more than 700 bytes."""
        done = 0
        for view in views:
            part = min(len(view), 700 - done)
            view[:part] = data[offset + done : offset + done + part]
            done += part
        return done

    views = buffers(bytes(20 * 1024), 1536)
    assert 20 * 1024 == transfer_all(trickle, -1, views, 512)
    assert data[512 : 512 + 20 * 1024] == b"".join(views)


def test_the_end_of_the_image_is_an_error():
    with pytest.raises(OSError, match="the image ends at 512"):
        transfer_all(lambda fd, views, offset: 0, -1, buffers(bytes(512)), 512)


def test_an_image_larger_than_the_memory_can_be_mapped(make_image):
    path = make_image(100 << 30, sparse=True)
    with Image.open(path, writable=False) as opened:
        with MappedImage(opened, private=True) as mapped:
            mapped.copy_in(buffers(b"x" * 512), (99 << 30) + 512)
            view = buffers(bytes(1024))
            mapped.copy_out(view, 99 << 30)
        assert bytes(512) + b"x" * 512 == b"".join(view)
        assert bytes(512) == os.pread(opened.fd, 512, (99 << 30) + 512)


@pytest.mark.parametrize("private", [True, False])
def test_what_cannot_be_mapped_is_refused(image, monkeypatch, private):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(image_module.mmap, "mmap", refuse)
    hint = "overcommit_memory" if private else "--backend raw"
    with (
        Image.open(image, writable=not private) as opened,
        pytest.raises(ImageError, match="1 MiB cannot be mapped") as caught,
    ):
        MappedImage(opened, private=private)
    assert hint in str(caught.value)


def test_an_image_cut_short_is_an_error_and_not_a_signal(image):
    with Image.open(image, writable=True) as opened, MappedImage(opened, private=False) as mapped:
        if not mapped._can_populate:
            pytest.skip("needs Linux 5.14")
        os.ftruncate(opened.fd, 4096)
        mapped.fault_in(0, 4096, write=True)
        for write in (False, True):
            with pytest.raises(OSError, match="4096 bytes at 8192 of the image cannot be"):
                mapped.fault_in(8192, 4096, write=write)


def test_an_old_kernel_is_asked_once(image, monkeypatch):
    monkeypatch.setattr(image_module, "_MADV_POPULATE_READ", 9999)
    with Image.open(image, writable=False) as opened, MappedImage(opened, private=True) as mapped:
        assert not mapped._can_populate
        mapped.fault_in(0, 4096, write=True)
