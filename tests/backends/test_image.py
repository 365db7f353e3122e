import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile

import pytest

from backends.blocks import buffers, drop_from_cache, is_cut_short
from xen_disk_py.backends import image as image_module
from xen_disk_py.backends import locks as locks_module
from xen_disk_py.backends.image import Image, MappedImage, open_file_or_disk, transfer_all
from xen_disk_py.errors import ImageError

LOCK = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX if sys.argv[2] == "writer" else fcntl.LOCK_SH)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock_elsewhere():
    """Starts another process that takes a lock on a file."""
    holders = []

    def start(path, kind):
        holder = subprocess.Popen(
            [sys.executable, "-c", LOCK, path, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        holders.append(holder)
        assert holder.stdout.readline() == b"locked\n"
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
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        Image.open(str(path), writable=writable)
    assert before >= set(os.listdir("/proc/self/fd"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "gone.img")
    assert "truncate" not in refused("https://host/disk.img")
    assert "nbdkit" in refused("https://host/disk.img")


def test_a_name_too_long_is_refused(tmp_path):
    assert os.strerror(errno.ENAMETOOLONG) in refused(tmp_path / ("x" * 300))


def test_a_directory_is_refused(tmp_path):
    assert "a directory" in refused(tmp_path)


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
    directory, dropped = as_nobody
    path = os.path.join(directory, "disk.img")
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
def test_the_holder_of_a_lock_is_named_with_its_command(image, lock_elsewhere, kind):
    holder = lock_elsewhere(image, kind)
    message = refused(image, writable=True)
    assert f"in use by process {holder.pid} ({sys.executable} -c ?import fcntl" in message


def test_all_holders_are_named(image, lock_elsewhere):
    pids = sorted([lock_elsewhere(image, "reader").pid, lock_elsewhere(image, "reader").pid])
    message = refused(image, writable=True)
    assert all(f"process {pid} (" in message for pid in pids)


def test_a_lock_ends_with_its_holder(image, lock_elsewhere):
    holder = lock_elsewhere(image, "writer")
    holder.kill()
    holder.communicate()
    Image.open(image, writable=True).close()


def test_a_holder_that_nothing_is_known_of_is_another_process(image, monkeypatch):
    monkeypatch.setattr(locks_module, "holders", lambda status: [])
    with Image.open(image, writable=True):
        assert "in use by another process" in refused(image, writable=True)


def test_a_file_system_without_locks_is_refused(image, monkeypatch):
    def flock(fd, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = refused(image)
    assert "cannot be locked: No locks available" in message
    assert "rpc.statd" in message


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
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
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


def test_larger_sectors_than_the_devices_own_can_be_asked_for(image, loop_device):
    for path in (image, loop_device):
        with Image.open(path, writable=False, sector_size=4096) as opened:
            assert 4096 == opened.sector_size


def test_a_size_that_is_not_made_of_large_sectors_is_refused_with_a_remedy(make_image):
    path = make_image(4096 + 512)
    with pytest.raises(ImageError, match="4608 bytes, is not a multiple of 4096") as caught:
        Image.open(path, writable=False, sector_size=4096)
    remedy = str(caught.value).rpartition("pad it with: ")[2]
    subprocess.run(remedy.split(), check=True)
    with Image.open(path, writable=False, sector_size=4096) as opened:
        assert 8192 == opened.size


def test_sectors_smaller_than_the_devices_own_can_be_asked_for(make_image, attach_loop):
    device = attach_loop(make_image(4 << 20), "--sector-size", "4096")
    with Image.open(device, writable=False) as opened:
        assert 4096 == opened.sector_size
    with Image.open(device, writable=True, sector_size=512) as opened:
        assert (512, 4096) == (opened.sector_size, opened.device_sector_size)


@pytest.mark.parametrize("how", ["losetup -r", "blockdev --setro"])
def test_a_read_only_device_is_refused_to_writers(image, attach_loop, how):
    if how == "losetup -r":
        device = attach_loop(image, "--read-only")
    else:
        device = attach_loop(image)
        subprocess.run([*how.split(), device], check=True)
    try:
        message = refused(device, writable=True)
        with Image.open(device, writable=False) as opened:
            assert 1 << 20 == opened.size
    finally:
        if how == "blockdev --setro":  # it would be so for the next image, too
            subprocess.run(["blockdev", "--setrw", device], check=True)
    assert f"{device}: read-only here: add --read-only, or use --backend cow" == message


@pytest.mark.parametrize("size", [512, 1536])
def test_what_is_stored_in_a_mapping_is_in_the_image(image, size):
    with Image.open(image, writable=True) as opened, MappedImage(opened) as mapped:
        before = os.pread(opened.fd, 1 << 20, 0)
        data = os.urandom(1100 * size)  # more buffers than one system call takes
        length = min(len(data), (1 << 20) - 512)
        assert length == mapped.store(buffers(data[:length], size), 512)
        expected = before[:512] + data[:length] + before[512 + length :]
        assert expected == os.pread(opened.fd, 1 << 20, 0)


def test_an_image_larger_than_the_memory_can_be_mapped(make_image):
    path = make_image(5 << 40, sparse=True)
    with Image.open(path, writable=True) as opened, MappedImage(opened) as mapped:
        assert 512 == mapped.store(buffers(b"x" * 512), (5 << 40) - 512)
        assert bytes(512) + b"x" * 512 == os.pread(opened.fd, 1024, (5 << 40) - 1024)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENODEV])
def test_what_cannot_be_mapped_is_refused(image, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(image_module.mmap, "mmap", refuse)
    with (
        Image.open(image, writable=True) as opened,
        pytest.raises(ImageError, match="1 MiB cannot be mapped") as caught,
    ):
        MappedImage(opened)
    assert os.strerror(number) in str(caught.value)
    assert "--backend raw" in str(caught.value)


def test_where_the_image_was_cut_short_is_an_error_and_not_a_signal(image):
    with Image.open(image, writable=True) as opened, MappedImage(opened) as mapped:
        mapped.store(buffers(b"w" * 512), 65536)
        os.ftruncate(opened.fd, 8192)
        for offset, length in ((8192, 4096), (4096, 8192), (65536, 512)):
            with pytest.raises(OSError, match=f"{length} bytes at {offset} of") as caught:
                mapped.store(buffers(bytes(length)), offset)
            assert errno.EIO == caught.value.errno
        assert 8192 == mapped.store(buffers(b"x" * 8192), 0)
        assert b"x" * 8192 == os.pread(opened.fd, 8193, 0)


def test_other_errors_of_a_copy_are_told_as_they_are(image):
    with Image.open(image, writable=True) as opened, MappedImage(opened) as mapped:
        bounce, mapped._bounce = mapped._bounce, -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            mapped.store(buffers(bytes(512)), 0)
        mapped._bounce = bounce


def test_a_mapping_leaves_nothing_open(image):
    before = set(os.listdir("/proc/self/fd"))
    with Image.open(image, writable=True) as opened:
        mapped = MappedImage(opened)
        mapped.close()
        mapped.close()
    assert before >= set(os.listdir("/proc/self/fd"))


# -- without waiting -------------------------------------------------------------------


def read_now(opened, offset, length):
    """Read without waiting; return how much that was, and it."""
    found = buffers(bytes(length))
    done = opened.read_nowait(found, offset)
    return done, b"".join(found)[:done]


def test_what_is_in_memory_is_read_without_waiting(image):
    with Image.open(image, writable=False) as opened:
        expected = os.pread(opened.fd, 1 << 20, 0)
        if opened.nowait is None:
            pytest.skip("this file system cannot tell what waits")
        assert (1 << 20, expected) == read_now(opened, 0, 1 << 20)
        assert (8192, expected[512:8704]) == read_now(opened, 512, 8192)
        assert (0, b"") == read_now(opened, 1 << 20, 512)


def test_what_is_not_in_memory_is_left_to_a_read_that_waits(image):
    with Image.open(image, writable=False) as opened:
        if not opened.nowait:
            pytest.skip("this file system does not tell what waits")
        reads = []

        def read():
            reads.append(read_now(opened, 0, 1 << 20))
            return reads[-1][0]

        assert is_cut_short(image, read, 1 << 20)
        done, found = reads[-1]
        expected = os.pread(opened.fd, 1 << 20, 0)
        assert expected[:done] == found
        assert (1 << 20, expected) == read_now(opened, 0, 1 << 20)


def test_in_a_file_system_in_memory_nothing_waits():
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs here")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        data = os.urandom(65536)
        file.write(data)
        file.flush()
        drop_from_cache(file.name)
        with Image.open(file.name, writable=False) as opened:
            assert "tmpfs" == image_module.file_system(opened.fd)
            assert (65536, data) == read_now(opened, 0, 65536)


@pytest.mark.parametrize(
    ("file_system", "expected"),
    [("tmpfs", 8192), ("ramfs", 8192), ("hugetlbfs", 8192), ("nfs4", 0), (None, 0)],
)
def test_a_file_system_that_does_not_know_what_waits(image, monkeypatch, file_system, expected):
    preadv = os.preadv

    def without_flags(fd, views, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", without_flags)
    monkeypatch.setattr(image_module, "file_system", lambda fd: file_system)
    with Image.open(image, writable=False) as opened:
        content = os.pread(opened.fd, 8192, 4096)
        assert (expected, content[:expected]) == read_now(opened, 4096, 8192)
        found = buffers(bytes(8192))
        assert 8192 == opened.read(found, 4096)
        assert content == b"".join(found)


@pytest.mark.parametrize("cached", [0, 4096])
def test_a_file_system_that_knows_what_waits(image, monkeypatch, cached):
    """Whether the beginning, which is asked for when the image is opened, is in memory or not."""
    preadv = os.preadv

    def page_cache(fd, views, offset, flags=0):
        if not flags:
            return preadv(fd, views, offset)
        assert os.RWF_NOWAIT == flags
        if offset >= cached:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return preadv(fd, views[:1], offset)

    monkeypatch.setattr(os, "preadv", page_cache)
    with Image.open(image, writable=False) as opened:
        content = os.pread(opened.fd, 8192, 0)
        assert (cached, content[:cached]) == read_now(opened, 0, 8192)
        assert (0, b"") == read_now(opened, 4096, 8192)
        found = buffers(bytes(8192))
        assert 8192 == opened.read(found, 0)
        assert content == b"".join(found)


MOUNTS = """\
21 1 0:19 / /proc rw,relatime - proc proc rw
24 1 {device} / /a\\040b rw,noatime master:1 propagate_from:2 - {kind} /dev/sda1 rw,discard
25 1 0:99 / / rw - ext4 /dev/sdb rw
"""


@pytest.mark.parametrize("kind", ["xfs", "tmpfs", "fuse.sshfs"])
def test_the_file_system_of_a_file(image, tmp_path, monkeypatch, kind):
    device = os.stat(image).st_dev
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(image_module, "open", lambda *a, **k: mounts.open(**k), raising=False)
    with open(image, "rb") as file:
        assert image_module.file_system(file.fileno()) is None  # no such table
        number = f"{os.major(device)}:{os.minor(device)}"
        for text, expected in (
            (MOUNTS.format(device=number, kind=kind), kind),
            (MOUNTS.format(device=f"{number}0", kind=kind), None),
            (f"24 1 {number} / / rw", None),
            ("nonsense\n", None),
            ("", None),
        ):
            mounts.write_text(text, encoding="utf-8")
            assert expected == image_module.file_system(file.fileno())


def test_an_image_reads_and_writes_as_many_buffers_as_one_system_call_takes(image):
    with Image.open(image, writable=True) as opened:
        data = os.urandom(1025 * 512)
        assert 1024 * 512 == opened.write(buffers(data, 512), 512)
        assert data[: 1024 * 512] == os.pread(opened.fd, 1024 * 512, 512)
        for read in (opened.read, opened.read_nowait):
            found = buffers(bytes(1025 * 512), 512)
            done = read(found, 512)
            assert 1024 * 512 == done or (read == opened.read_nowait and opened.nowait is None)
            assert data[:done] == b"".join(found)[:done]


def test_a_read_at_the_end_is_short_and_then_nothing(image):
    with Image.open(image, writable=False) as opened:
        os.truncate(image, 6144)
        assert 2048 == opened.read(buffers(bytes(4096)), 4096)
        assert 0 == opened.read(buffers(bytes(4096)), 6144)


def test_an_image_that_is_opened_once_more_stays_locked(image):
    with Image.open(image, writable=True) as opened:
        before = opened.fd
        opened.reopen()
        assert before != opened.fd
        assert not os.get_inheritable(opened.fd)
        assert opened.write([memoryview(b"new" + bytes(509))], 0) == 512
        assert "in use by" in refused(image, writable=True)
    Image.open(image, writable=True).close()


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_file_or_disk_is_not_even_opened(kind, tmp_path, monkeypatch):
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()
    real, opened = os.open, []

    def spy(path, flags, *rest, **named):
        if not flags & os.O_PATH:
            opened.append(path)
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(ImageError, match=r"it: (a directory|neither a file nor a block device)"):
        open_file_or_disk(str(path), os.O_RDONLY)
    assert [] == opened
