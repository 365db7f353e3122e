import errno
import hashlib
import os
import random

import pytest
from blocks import read, write

from xen_disk_py.backends import cow as cow_module
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.image import PAGE, Image
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.errors import ImageError, UsageError

pytestmark = pytest.mark.skipif(PAGE != 4096, reason="the figures are of 4096-byte pages")


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@pytest.fixture
def open_cow(image):
    """Opens the image; at the end, it is what it was."""
    before = digest(image)
    disks = []

    def open_disk(**options):
        disks.append(CowBackend(image, **options))
        return disks[-1]

    yield open_disk
    for disk in disks:
        disk.close()
    assert before == digest(image)


def test_changes_are_read_and_gone_at_the_next_connection(open_cow):
    disk = open_cow()
    before = read(disk, 0, 16384)
    write(disk, 512, b"x" * 8192)
    assert before[:512] + b"x" * 8192 + before[8704:] == read(disk, 0, 16384)
    disk.flush()
    disk.close()
    assert before == read(open_cow(), 0, 16384)


def test_two_disks_of_one_image_see_their_own_writes_only(open_cow):
    one, two = open_cow(), open_cow()
    before = read(one, 0, 4096)
    write(one, 0, b"1" * 4096)
    assert before == read(two, 0, 4096)
    write(two, 512, b"2" * 512)
    assert b"1" * 4096 == read(one, 0, 4096)
    assert before[:512] + b"2" * 512 + before[1024:] == read(two, 0, 4096)


def test_a_writer_of_the_same_image_is_refused_while_it_is_connected(open_cow, image):
    open_cow()
    for writer in (RawBackend, MmapBackend):
        with pytest.raises(ImageError, match="in use by process"):
            writer(image)
        writer(image, read_only=True).close()


def test_it_is_refused_while_a_writer_has_the_image(image):
    with Image.open(image, writable=True), pytest.raises(ImageError, match="being written"):
        CowBackend(image)


def test_only_pages_really_written_are_counted(open_cow):
    disk = open_cow()
    assert 0 == disk.memory
    read(disk, 0, 1 << 20)
    assert 0 == disk.memory
    write(disk, 512, b"x" * 512)
    assert 4096 == disk.memory
    write(disk, 1024, b"x" * 512)
    assert 4096 == disk.memory
    write(disk, 3584, b"x" * 1024)
    assert 8192 == disk.memory
    write(disk, 0, b"x" * 65536)
    assert 65536 == disk.memory
    write(disk, disk.size - 512, b"x" * 512)
    assert 65536 + 4096 == disk.memory


def test_memory_is_counted_like_a_set_of_pages(open_cow):
    disk = open_cow()
    dice = random.Random(1)
    pages = set()
    for _ in range(500):
        offset = dice.randrange(disk.size // 512) * 512
        length = min(dice.randint(1, 100) * 512, disk.size - offset)
        if dice.random() < 0.6:
            write(disk, offset, b"x" * length)
            pages |= set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
        else:
            disk.discard(offset, length)
            pages -= set(range(-(-offset // 4096), (offset + length) // 4096))
        assert len(pages) * 4096 == disk.memory


def test_the_system_agrees_about_the_memory(open_cow):
    def private_dirty():
        with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
            return next(int(line.split()[1]) for line in rollup if "Private_Dirty" in line) << 10

    disk = open_cow()
    read(disk, 0, disk.size)
    data = bytes(512 << 10)
    before = private_dirty()
    write(disk, 0, data)
    written = private_dirty() - before
    disk.discard(0, 512 << 10)
    left = private_dirty() - before
    assert written > left + (400 << 10)


def test_a_write_beyond_the_limit_changes_nothing_and_is_said_once(open_cow, caplog):
    disk = open_cow(cow_limit=16384)
    write(disk, 0, b"x" * 12288)
    before = read(disk, 0, 65536)
    for _ in range(3):
        with pytest.raises(OSError, match="copy-on-write memory is full") as caught:
            write(disk, 8192, b"y" * 12288)
        assert errno.ENOSPC == caught.value.errno
    assert before == read(disk, 0, 65536)
    assert 12288 == disk.memory
    (line,) = caplog.messages
    assert "--cow-limit" in line
    assert "16 KiB" in line


def test_at_the_limit_what_is_dirty_can_be_written_again(open_cow):
    disk = open_cow(cow_limit=16384)
    write(disk, 4096, b"x" * 16384)
    write(disk, 4096, b"y" * 16384)
    assert b"y" * 16384 == read(disk, 4096, 16384)
    with pytest.raises(OSError, match="full"):
        write(disk, 0, b"z" * 512)


def test_a_discard_makes_room_below_the_limit(open_cow):
    disk = open_cow(cow_limit=8192)
    write(disk, 0, b"x" * 8192)
    disk.discard(0, 4096)
    write(disk, 65536, b"y" * 4096)
    assert 8192 == disk.memory


@pytest.mark.parametrize("limit", [0, 4095])
def test_a_limit_below_one_page_allows_no_write(open_cow, limit):
    disk = open_cow(cow_limit=limit)
    with pytest.raises(OSError, match="full"):
        write(disk, 0, bytes(512))


def test_a_negative_limit_is_refused(image):
    with pytest.raises(UsageError, match="--cow-limit"):
        CowBackend(image, cow_limit=-1)


def test_the_limit_is_half_of_the_available_memory_by_default(open_cow, monkeypatch):
    assert 0 < cow_module._available_memory() < 1 << 60
    monkeypatch.setattr(cow_module, "_available_memory", lambda: 1 << 20)
    assert 1 << 19 == open_cow().cow_limit


def test_after_a_discard_the_images_own_content_is_read(open_cow):
    disk = open_cow()
    before = read(disk, 0, 65536)
    write(disk, 0, b"x" * 65536)
    disk.discard(512, 16384)
    assert b"x" * 4096 + before[4096:16384] + b"x" * 49152 == read(disk, 0, 65536)


def test_a_discard_to_the_end_gives_the_last_partial_page_back(make_image):
    disk = CowBackend(make_image(4096 + 512))
    write(disk, 0, b"x" * 4608)
    assert 8192 == disk.memory
    disk.discard(4096, 512)
    assert 4096 == disk.memory
    disk.discard(0, 4608)
    assert 0 == disk.memory
    disk.close()


def test_a_small_discard_gives_nothing_back(open_cow):
    disk = open_cow()
    write(disk, 0, b"x" * 8192)
    disk.discard(512, 4096)
    assert 8192 == disk.memory
    assert b"x" * 8192 == read(disk, 0, 8192)


def test_a_huge_image_costs_nothing_until_it_is_written(make_image):
    path = make_image(1 << 40, sparse=True)
    disk = CowBackend(path, cow_limit=1 << 20)
    fds = len(os.listdir("/proc/self/fd"))
    last = disk.size - 4608
    write(disk, last, b"x" * 4608)
    assert b"x" * 4608 == read(disk, last, 4608)
    assert bytes(512) == read(disk, last - 512, 512)
    assert 8192 == disk.memory
    disk.discard(0, disk.size)
    assert 0 == disk.memory
    assert bytes(4608) == read(disk, last, 4608)
    assert fds == len(os.listdir("/proc/self/fd"))
    disk.close()
    assert 0 == os.stat(path).st_blocks


def test_an_image_that_was_cut_short_is_an_io_error(make_image):
    path = make_image()
    disk = CowBackend(path)
    if not disk._mapped._can_populate:
        pytest.skip("needs Linux 5.14")
    write(disk, 0, b"x" * 512)
    os.truncate(path, 8192)
    with pytest.raises(OSError, match="the image ends at 8192"):
        read(disk, 8192, 4096)
    with pytest.raises(OSError, match="cannot be written"):
        write(disk, 8192, bytes(512))
    with pytest.raises(OSError, match="cannot be read"):
        read(disk, 0, 12288)
    assert b"x" * 512 == read(disk, 0, 512)
    disk.close()


def test_more_buffers_than_one_system_call_takes(open_cow):
    disk = open_cow()
    before = read(disk, 512, 1500 * 512, 512)
    assert before == read(disk, 512, 1500 * 512)
    write(disk, 512, before[::-1], 512)
    assert before[::-1] == read(disk, 512, 1500 * 512, 512)


def test_an_image_that_cannot_be_mapped_is_unlocked_again(image, monkeypatch):
    def refuse(opened, *, private):
        raise ImageError("no")

    monkeypatch.setattr(cow_module, "MappedImage", refuse)
    with pytest.raises(ImageError, match="no"):
        CowBackend(image)
    Image.open(image, writable=True).close()


def test_a_block_device_is_served(loop_device):
    disk = CowBackend(loop_device)
    before = read(disk, 0, 8192)
    write(disk, 512, b"x" * 4096)
    assert before[:512] + b"x" * 4096 + before[4608:] == read(disk, 0, 8192)
    disk.close()
    again = CowBackend(loop_device)
    assert before == read(again, 0, 8192)
    again.close()
