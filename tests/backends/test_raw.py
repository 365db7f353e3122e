import errno
import os
import resource
import signal
import subprocess

import pytest

from backends.blocks import buffers, is_cut_short, read, write
from xen_disk_py.backends import trim as trim_module
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.errors import ImageError


@pytest.fixture
def disk(image):
    disk = RawBackend(image)
    yield disk
    disk.close()


def content(path):
    with open(path, "rb") as file:
        return file.read()


def test_what_is_written_is_in_the_file(disk, image):
    before = content(image)
    write(disk, 512, b"x" * 8192)
    disk.flush()
    assert before[:512] + b"x" * 8192 + before[8704:] == content(image)


def test_more_buffers_than_one_system_call_takes(disk, image):
    data = os.urandom(1500 * 512)
    write(disk, 512, data, 512)
    assert data == read(disk, 512, len(data), 512)
    assert data == content(image)[512 : 512 + len(data)]


def test_a_transfer_is_as_short_as_the_systems(disk, monkeypatch):
    """Whoever asked for more asks for the rest; nothing of it is lost."""
    preadv, pwrite, pwritev = os.preadv, os.pwrite, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:512]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:512], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwritev(fd, [views[0][:512]], at))
    assert 512 == disk.write(buffers(b"x" * 9216), 4096)
    assert 512 == disk.read(buffers(bytes(9216)), 4096)
    write(disk, 4096, b"y" * 9216)
    assert b"y" * 9216 == read(disk, 4096, 9216)


def test_an_image_that_was_cut_short_ends_there(disk, image):
    os.truncate(image, 6144)
    assert 2048 == disk.read(buffers(bytes(4096)), 4096)
    assert 0 == disk.read(buffers(bytes(2048)), 6144)
    with pytest.raises(EOFError, match="2048 of 4096 bytes"):
        read(disk, 4096, 4096)


def test_a_write_that_finds_no_room_is_short_and_then_raises(disk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6144, hard))
    try:
        assert 2048 == disk.write(buffers(b"z" * 8192), 4096)
        with pytest.raises(OSError, match="File too large"):
            write(disk, 4096, b"z" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert b"z" * 2048 == read(disk, 4096, 2048)


def test_without_waiting(image):
    """Everything is in memory, but for a read of what was dropped from there."""
    disk = RawBackend(image)
    assert 8192 == disk.write_nowait(buffers(b"x" * 8192), 512)
    assert b"x" * 8192 == content(image)[512:8704]
    found = buffers(bytes(8192))
    done = disk.read_nowait(found, 512)
    assert done == (0 if disk._image.nowait is None else 8192)
    assert b"x" * done == b"".join(found)[:done]
    if disk._image.nowait:
        cold = buffers(bytes(1 << 20))
        assert is_cut_short(image, lambda: disk.read_nowait(cold, 0), 1 << 20)
    assert b"x" * 8192 == read(disk, 512, 8192)
    disk.close()


def test_flush_syncs_the_data_of_the_file(disk, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    disk.flush()
    assert [disk._fd] == synced


def test_a_read_only_disk_neither_writes_nor_syncs_nor_discards(image, monkeypatch):
    before = content(image)
    monkeypatch.setattr(os, "fdatasync", None)
    disk = RawBackend(image, read_only=True)
    assert disk.read_only
    assert not disk.can_discard
    disk.flush()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        write(disk, 0, bytes(512))
    with pytest.raises(OSError, match=r"[Nn]ot supported"):
        disk.discard(0, 4096)
    disk.close()
    assert before == content(image)


def test_a_discard_frees_the_space_and_zeros_are_read(disk, image):
    if not disk.can_discard:
        pytest.skip("this file system punches no holes")
    before = content(image)
    os.fsync(disk._fd)
    used = os.stat(image).st_blocks
    disk.discard(4096 + 512, 512 << 10)
    assert before[:4608] + bytes(512 << 10) + before[4608 + (512 << 10) :] == content(image)
    assert os.stat(image).st_blocks < used


def test_asking_whether_it_can_discard_changes_nothing(image):
    before = content(image), os.stat(image).st_blocks
    RawBackend(image).close()
    assert before == (content(image), os.stat(image).st_blocks)


def test_a_file_system_that_punches_no_holes_offers_no_discard(image, monkeypatch):
    def refuse(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(trim_module, "punch_hole", refuse)
    disk = RawBackend(image)
    assert not disk.can_discard
    with pytest.raises(OSError, match=r"[Nn]ot supported") as caught:
        disk.discard(0, 4096)
    disk.close()
    assert errno.EOPNOTSUPP == caught.value.errno


def test_a_second_writer_is_refused(disk, image):
    with pytest.raises(ImageError, match="in use by process"):
        RawBackend(image)


def test_a_closed_disk_does_nothing_to_the_descriptor_that_came_after(image):
    disk = RawBackend(image)
    disk.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        disk.read(buffers(bytes(512)), 0)


def test_a_block_device_is_written_and_discarded(loop_device, monkeypatch):
    monkeypatch.setattr(trim_module, "_CHUNK", 64 << 10)
    disk = RawBackend(loop_device)
    try:
        data = os.urandom(256 << 10)
        write(disk, 512, data)
        disk.flush()
        assert data == read(disk, 512, len(data))
        assert disk.physical_sector_size % disk.sector_size == 0
        if not disk.can_discard:
            pytest.skip("this loop device discards nothing")
        disk.discard(4096, 200 << 10)
        assert data[:3584] == read(disk, 512, 3584)
        assert bytes(200 << 10) == read(disk, 4096, 200 << 10)  # so it is with loop devices
        rest = 4096 + (200 << 10) - 512
        assert data[rest:] == read(disk, rest + 512, len(data) - rest)
    finally:
        disk.close()


@pytest.mark.parametrize("backend", [RawBackend, MmapBackend])
def test_sectors_smaller_than_the_devices_own_are_served(make_image, attach_loop, backend):
    device = attach_loop(make_image(1 << 20), "--sector-size", "4096")
    before = content(device)
    disk = backend(device, sector_size=512)
    assert (512, 4096) == (disk.sector_size, disk.physical_sector_size)
    write(disk, 512, b"x" * 1024, 512)
    disk.flush()
    assert b"x" * 512 == read(disk, 1024, 512)
    if disk.can_discard:
        disk.discard(8192 - 512, 8192)  # whole sectors of the device: one
    disk.close()
    zeros = bytes(4096) if disk.can_discard else before[8192:12288]
    expected = before[:512] + b"x" * 1024 + before[1536:8192] + zeros + before[12288:]
    assert expected == content(device)


def test_a_read_only_block_device_offers_no_discard(loop_device):
    disk = RawBackend(loop_device, read_only=True)
    assert not disk.can_discard
    disk.close()


def test_a_file_is_made_longer_and_shorter(disk, image):
    before = content(image)
    assert [2 << 20] * 2 == [disk.resize(2 << 20), disk.size]
    write(disk, (2 << 20) - 512, b"e" * 512)
    assert before + bytes((1 << 20) - 512) + b"e" * 512 == content(image)
    assert [4096] * 2 == [disk.resize(4096), disk.size]
    assert before[:4096] == content(image)


def test_looking_at_the_size_changes_nothing(disk, image):
    os.truncate(image, 3 << 20)
    assert (3 << 20, 1 << 20) == (disk.resize(None), disk.size)
    assert [3 << 20] * 2 == [disk.resize(3 << 20), disk.size]
    assert 3 << 20 == os.stat(image).st_size


def test_a_read_only_image_grows_by_its_owner_only(image):
    disk = RawBackend(image, read_only=True)
    with pytest.raises(ImageError, match="truncate -s 2097152"):
        disk.resize(2 << 20)
    assert 1 << 20 == os.stat(image).st_size == disk.size
    os.truncate(image, 2 << 20)
    assert 2 << 20 == disk.resize(disk.resize(None)) == disk.size
    assert bytes(512) == read(disk, (2 << 20) - 512, 512)
    disk.close()


def test_a_file_that_cannot_be_that_long(disk, image):
    with pytest.raises(ImageError, match=r"cannot be made \d+ bytes long: "):
        disk.resize(1 << 62)
    assert 1 << 20 == disk.size == os.stat(image).st_size


def test_a_block_device_keeps_its_size(loop_device):
    disk = RawBackend(loop_device)
    try:
        for size in (2 << 20, 8 << 20):
            with pytest.raises(ImageError, match=f"lvresize -L {size}b"):
                disk.resize(size)
        assert 4 << 20 == disk.resize(disk.resize(None)) == disk.size
    finally:
        disk.close()


def test_a_block_device_that_has_grown(loop_device):
    disk = RawBackend(loop_device)
    try:
        name = os.path.basename(loop_device)
        with open(f"/sys/block/{name}/loop/backing_file", encoding="ascii") as file:
            os.truncate(file.read().strip(), 8 << 20)
        subprocess.run(["losetup", "--set-capacity", loop_device], check=True)
        assert 8 << 20 == disk.resize(disk.resize(None)) == disk.size
        write(disk, (8 << 20) - 512, b"e" * 512)
        assert b"e" * 512 == read(disk, (8 << 20) - 512, 512)
    finally:
        disk.close()
