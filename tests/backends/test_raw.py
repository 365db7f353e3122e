import errno
import os
import resource
import signal

import pytest
from blocks import buffers, read, write

from xen_disk_py.backends import raw as raw_module
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


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_short_transfer_is_continued(disk, monkeypatch, call):
    whole = getattr(os, call)

    def short(fd, views, offset):
        return whole(fd, [views[0][:512]], offset)

    monkeypatch.setattr(os, call, short)
    write(disk, 4096, b"y" * 9216)
    assert b"y" * 9216 == read(disk, 4096, 9216)


def test_an_image_that_was_cut_short_is_an_io_error(disk, image):
    os.truncate(image, 6144)
    with pytest.raises(OSError, match="the image ends at 6144") as caught:
        read(disk, 4096, 4096)
    assert errno.EIO == caught.value.errno


def test_a_write_that_finds_no_room_raises(disk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6144, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(disk, 4096, b"z" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert 4096 == len(read(disk, 0, 4096))


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
    with pytest.raises(OSError, match="Bad file descriptor"):
        write(disk, 0, bytes(512))
    with pytest.raises(OSError, match="not supported"):
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

    monkeypatch.setattr(raw_module, "_punch_hole", refuse)
    disk = RawBackend(image)
    assert not disk.can_discard
    with pytest.raises(OSError, match="not supported") as caught:
        disk.discard(0, 4096)
    disk.close()
    assert errno.EOPNOTSUPP == caught.value.errno


def test_a_hole_that_cannot_be_punched_raises_with_its_errno():
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        raw_module._punch_hole(-1, 0, 4096)
    assert errno.EBADF == caught.value.errno


def test_a_second_writer_is_refused(disk, image):
    with pytest.raises(ImageError, match="in use by process"):
        RawBackend(image)


def test_a_closed_disk_does_nothing_to_the_descriptor_that_came_after(image):
    disk = RawBackend(image)
    disk.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.read(buffers(bytes(512)), 0)


def test_a_block_device_is_written_and_discarded(loop_device, monkeypatch):
    monkeypatch.setattr(raw_module, "_DISCARD_CHUNK", 64 << 10)
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


def test_a_read_only_block_device_offers_no_discard(loop_device):
    disk = RawBackend(loop_device, read_only=True)
    assert not disk.can_discard
    disk.close()
