import errno
import hashlib
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.blocks import buffers, is_cut_short, read, write
from xen_disk_py.backends import cow as cow_module
from xen_disk_py.backends.cow import CowBackend
from xen_disk_py.backends.image import PAGE, Image
from xen_disk_py.backends.loader import open_backend
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.errors import DeviceError, ImageError, UsageError
from xen_disk_py.host import memory

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
    rest = private_dirty() - before
    assert written > rest + (400 << 10)


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


def test_the_limit_is_half_of_what_may_be_taken_by_default(open_cow, monkeypatch):
    monkeypatch.setattr(memory, "room", lambda: 1 << 20)
    assert 1 << 19 == open_cow().cow_limit


def test_all_disks_together_take_no_more_than_the_host_can_spare(open_cow, monkeypatch, caplog):
    disks = []
    monkeypatch.setattr(memory, "room", lambda: (1 << 20) - sum(disk.memory for disk in disks))
    disks += [open_cow(cow_limit=1 << 30) for _ in range(3)]
    written, refused = 0, {}
    while len(refused) < 3:
        for disk in disks:
            try:
                write(disk, written, b"x" * 4096)
            except OSError as error:
                refused[disk] = error.errno
        written += 4096
    assert {errno.ENOSPC} == set(refused.values())
    taken = sum(disk.memory for disk in disks)
    assert (1 << 20) - 4096 < taken <= (1 << 20) + 2 * (64 << 10)  # a step of each of the others
    write(disks[0], 0, b"y" * 4096)
    assert ["the memory that this host can spare" in line for line in caplog.messages] == [True] * 3
    disks[2].discard(0, disks[2].size)
    write(disks[0], 256 * 4096 - 4096, b"y" * 4096)
    assert b"y" * 4096 == read(disks[0], 256 * 4096 - 4096, 4096)


FILL = """
import sys
sys.path.insert(0, sys.argv[2])
from xen_disk_py.backends.cow import CowBackend
sys.stdin.readline()
disk = CowBackend(sys.argv[1])
done = 0
try:
    for offset in range(0, disk.size, 65536):
        disk.write([memoryview(b"x" * 65536)], offset)
        done += 65536
except OSError as error:
    print(error.errno, done, flush=True)
else:
    print(0, done, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def group():
    """A control group of 256 MiB."""
    for root, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        try:  # not named by a process, whose number another has in a namespace of its own
            path = tempfile.mkdtemp(prefix="xen-disk-test-", dir=root)
        except OSError:
            continue
        try:
            fd = os.open(os.path.join(path, limit), os.O_WRONLY)  # none is there that is no group
            try:
                os.write(fd, str(256 << 20).encode())
            finally:
                os.close(fd)
        except OSError:
            os.rmdir(path)
            continue
        yield path
        for _ in range(1000):  # until the kernel has noticed that its processes have gone
            try:
                os.rmdir(path)
            except OSError:
                time.sleep(0.03)
            else:
                return
        raise AssertionError(f"{path} cannot be removed")
    pytest.skip("no control group for memory here")


def test_disks_in_a_control_group_are_full_before_they_are_killed(make_image, group):
    """Three of the default, each of which may take a half: none is killed."""
    image = make_image(1 << 30, sparse=True)
    root = os.path.abspath(os.path.join(os.path.dirname(cow_module.__file__), "..", ".."))
    workers = []
    try:
        for _ in range(3):
            command = [sys.executable, "-c", FILL, image, root]
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            workers.append(worker)
            with open(f"{group}/cgroup.procs", "w", encoding="ascii") as file:
                file.write(str(worker.pid))
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        said = [worker.stdout.readline().split() for worker in workers]
        assert [str(errno.ENOSPC)] * 3 == [words[0] for words in said]
        assert 64 << 20 < sum(int(words[1]) for words in said) < 256 << 20
    finally:
        ends = [(worker.communicate("\n"), worker.returncode) for worker in workers]
    assert [0, 0, 0] == [status for _, status in ends]


@pytest.mark.parametrize("backend", ["cow", "mmap", "raw"])
def test_holes_of_an_image_in_memory_stay_holes(backend):
    """On tmpfs one that is read through a mapping is allocated (in the image's file)."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(8 << 20)
        disk = open_backend(backend, {"path": file.name})
        for _ in range(2):
            assert bytes(8 << 20) == read(disk, 0, 8 << 20)
            assert 0 == os.stat(file.name).st_blocks
            if backend != "cow":
                break
            for offset in range(512, 8 << 20, 65536):
                write(disk, offset, bytes(512))
        disk.close()
        assert 0 == os.stat(file.name).st_blocks


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
    path = make_image(5 << 40, sparse=True)
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
    assert fds >= len(os.listdir("/proc/self/fd"))
    disk.close()
    assert 0 == os.stat(path).st_blocks


def test_an_image_that_was_cut_short_is_an_io_error(make_image):
    """What is not written has gone beyond its end; what is written stays."""
    path = make_image()
    disk = CowBackend(path)
    before = read(disk, 0, 8192)
    write(disk, 0, b"x" * 512)
    write(disk, 65536, b"y" * 512)
    os.truncate(path, 8192)
    with pytest.raises(EOFError, match="0 of 4096 bytes"):
        read(disk, 8192, 4096)
    with pytest.raises(EOFError, match="8192 of 12288 bytes"):
        read(disk, 0, 12288)
    assert b"y" * 512 == read(disk, 65536, 512)
    with pytest.raises(OSError, match="the image ends at 8192") as caught:
        disk.write(buffers(bytes(512)), 8192)
    assert errno.EIO == caught.value.errno
    assert 0 == disk.write_nowait(buffers(bytes(512)), 8192)
    assert 8192 == disk.memory
    assert b"x" * 512 + before[512:] == read(disk, 0, 8192)
    write(disk, 8192, b"z" * 4096)  # a whole page: nothing of it has to be read
    assert b"z" * 4096 == read(disk, 8192, 4096)
    os.truncate(path, disk.size)
    assert bytes(512) == read(disk, 65536 - 512, 512)
    assert b"y" * 512 == read(disk, 65536, 512)
    disk.close()


def test_without_waiting(open_cow, image):
    """What was written is in memory; of the rest, what the system has there."""
    disk = open_cow()
    if disk._image.nowait:
        cold = buffers(bytes(1 << 20))
        assert is_cut_short(image, lambda: disk.read_nowait(cold, 0), 1 << 20)
        assert 0 == disk.memory
    before = read(disk, 0, 16384)
    found = buffers(bytes(16384))
    done = disk.read_nowait(found, 0)
    assert done == (0 if disk._image.nowait is None else 16384)
    assert before[:done] == b"".join(found)[:done]
    assert 512 == disk.write_nowait(buffers(b"x" * 512), 4096)
    assert 4096 == disk.memory
    assert 16384 == disk.read_nowait(found, 0)
    assert before[:4096] + b"x" * 512 + before[4608:] == b"".join(found)


def test_many_threads_in_the_same_pages(open_cow):
    """Sixteen of them, each with sectors of its own: what each wrote it reads, and all is counted.

    Each also writes and discards a page of its own meanwhile.
    """
    disk = open_cow()
    shared = 16 * 4096
    model = bytearray(read(disk, 0, disk.size))
    image = bytes(model)

    def run(number):
        dice = random.Random(number)
        own = shared + number * 4096
        pages = set()
        for _ in range(100):
            offset = (dice.randrange(shared // 8192) * 16 + number) * 512
            if dice.random() < 0.5:
                model[offset : offset + 512] = dice.randbytes(512)
                write(disk, offset, model[offset : offset + 512])
                pages.add(offset // 4096)
            first = offset // 4096 * 4096  # the whole page, of which only this sector is ours
            at = offset - first
            assert model[offset : offset + 512] == read(disk, first, 4096)[at : at + 512]
            action = dice.random()
            if action < 0.3:
                model[own : own + 4096] = dice.randbytes(4096)
                write(disk, own, model[own : own + 4096])
                pages.add(own // 4096)
            elif action < 0.6:
                disk.discard(own, 4096)
                model[own : own + 4096] = image[own : own + 4096]
                pages.discard(own // 4096)
            assert model[own : own + 4096] == read(disk, own, 4096)
        return pages

    with ThreadPoolExecutor(disk.threads) as pool:
        pages = set().union(*pool.map(run, range(16)))
    assert 16 == disk.threads
    assert model == read(disk, 0, disk.size)
    assert len(pages) * 4096 == disk.memory


def test_many_threads_that_read_what_was_written(open_cow):
    """Each takes parts of one memory, thousands of times: none is taken away from another."""
    disk = open_cow()
    content = random.Random(1).randbytes(64 * 4096)
    write(disk, 0, content)
    start = threading.Barrier(8)

    def run(number):
        start.wait(30)
        for at in range(number, 5000):
            first = at % 64 * 4096
            assert content[first : first + 4096] == read(disk, first, 4096)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    disk.close()


def test_threads_share_the_limit(open_cow):
    """However they race, no more pages are written than it allows, and exactly so many."""
    disk = open_cow(cow_limit=32 * 4096)
    start = threading.Barrier(16)

    def run(number):
        start.wait()
        refused = 0
        for page in range(number, 256, 16):
            try:
                write(disk, page * 4096 + 512, b"x" * 512)
            except OSError:
                refused += 1
        return refused

    with ThreadPoolExecutor(16) as pool:
        assert 256 - 32 == sum(pool.map(run, range(16)))
    assert 32 * 4096 == disk.memory


def test_a_discard_amid_a_write_leaves_no_page_that_is_not_counted(open_cow, monkeypatch):
    """One of them is first: afterwards the whole page is written, and counted, or is not."""
    disk = open_cow()
    before = read(disk, 0, 4096)
    read_image = disk._image.read
    discard = threading.Thread(target=disk.discard, args=(0, 4096))

    def discarded_meanwhile(views, offset):
        discard.start()
        discard.join(0.05)  # it has its chance, and may have to wait for this write
        return read_image(views, offset)

    monkeypatch.setattr(disk._image, "read", discarded_meanwhile)
    write(disk, 0, b"x" * 512)
    discard.join()
    monkeypatch.undo()
    written = disk.memory // 4096
    assert (b"x" * 512 if written else before[:512]) + before[512:] == read(disk, 0, 4096)
    write(disk, 0, b"y" * 512)
    assert b"y" * 512 + before[512:] == read(disk, 0, 4096)
    assert 4096 == disk.memory


def test_more_buffers_than_one_system_call_takes(open_cow):
    disk = open_cow()
    before = read(disk, 512, 1500 * 512, 512)
    assert before == read(disk, 512, 1500 * 512)
    write(disk, 512, before[::-1], 512)
    assert before[::-1] == read(disk, 512, 1500 * 512, 512)


@pytest.mark.parametrize("what", ["changes", "map of pages"])
def test_where_there_is_no_room_for_changes_the_image_is_unlocked_again(image, monkeypatch, what):
    real = mmap.mmap

    def refuse(fd, length, **kwargs):
        if (length < 1 << 20) == (what == "map of pages"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fd, length, **kwargs)

    monkeypatch.setattr(cow_module.mmap, "mmap", refuse)
    with pytest.raises(ImageError, match="Cannot allocate memory"):
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


@pytest.mark.parametrize("size", [None, 1 << 20, 2 << 20])
def test_it_keeps_its_size(image, size):
    disk = CowBackend(image)
    with pytest.raises(DeviceError, match="keeps its size: disconnect it, change its image"):
        disk.resize(size)
    assert 1 << 20 == disk.size == os.stat(image).st_size
    disk.close()
