"""``overlay``: what survives, and whatever kills the process or the host, nothing is torn."""

import contextlib
import errno
import hashlib
import os
import random
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import storage
from killing import at_every_effect
from overlays import with_header

from backends.blocks import buffers, read, write
from backends.child import conformance_command
from xen_disk_py.backends import newfile as newfile_module
from xen_disk_py.backends.image import Image
from xen_disk_py.backends.newfile import NewFile
from xen_disk_py.backends.overlay import epoch as epoch_module
from xen_disk_py.backends.overlay import file as file_module
from xen_disk_py.backends.overlay import header as header_module
from xen_disk_py.backends.overlay.backend import OverlayBackend
from xen_disk_py.backends.overlay.file import OverlayFile, image_path
from xen_disk_py.backends.overlay.header import Header
from xen_disk_py.backends.overlay.maintenance import rebase
from xen_disk_py.backends.raw import RawBackend
from xen_disk_py.datapath.durability import Durability
from xen_disk_py.datapath.statistics import Statistics
from xen_disk_py.errors import DeviceError, ImageError, UsageError
from xen_disk_py.host import identity, memory

BLOCK = 4096
SIZE = (1 << 20) + 512  # the last block is not whole


@pytest.fixture
def image(make_image):
    """An image that is, at the end, what it was."""
    path = make_image(SIZE)
    before = hashlib.sha256(Path(path).read_bytes()).digest()
    yield path
    assert before == hashlib.sha256(Path(path).read_bytes()).digest()


@pytest.fixture
def overlay(tmp_path):
    return str(tmp_path / "changes.overlay")


@pytest.fixture
def opened(image, overlay):
    """Opens the image with the overlay, or others; closes it at the end."""
    disks = []

    def open_disk(path=image, file=overlay, **options):
        disks.append(OverlayBackend(path, overlay=file, **options))
        return disks[-1]

    yield open_disk
    for disk in disks:
        disk.close()


@pytest.fixture
def boot(monkeypatch):
    """Starts the host anew, as far as boot ids tell."""
    boots = [0]

    def start():
        boots[0] += 1

    for module in (epoch_module, header_module):
        monkeypatch.setattr(module, "boot_id", lambda: f"{boots[0]:036}")
    return start


def kill(disk):
    """Leave everything as a process does that is killed: nothing is written any more."""
    for part in (disk._file.reader, disk._image):
        os.close(part.fd)
        part.fd = -1
    disk._file.fd = -1


def refusal(call):
    with pytest.raises((ImageError, UsageError)) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


# What survives


def test_changes_are_there_at_the_next_connection(opened, image):
    disk = opened()
    before = read(disk, 0, SIZE)
    assert Path(image).read_bytes() == before
    write(disk, 512, b"x" * 8192)
    after = before[:512] + b"x" * 8192 + before[8704:]
    assert after == read(disk, 0, SIZE)
    disk.close()
    assert after == read(opened(), 0, SIZE)


def test_two_overlays_of_one_image_have_their_own_changes_only(opened, overlay):
    one, two = opened(), opened(file=overlay + "2")
    before = read(one, 0, BLOCK)
    write(one, 0, b"1" * BLOCK)
    assert before == read(two, 0, BLOCK)
    write(two, 512, b"2" * 512)
    assert b"1" * BLOCK == read(one, 0, BLOCK)
    assert before[:512] + b"2" * 512 + before[1024:] == read(two, 0, BLOCK)


def test_a_new_file_is_sparse_private_and_alone(opened, overlay):
    opened()
    status = os.stat(overlay)
    assert 0o600 == stat.S_IMODE(status.st_mode)
    assert 64 << 10 >= status.st_blocks * 512
    assert 3 * BLOCK + SIZE == status.st_size
    assert ["changes.overlay", "disk.img"] == sorted(os.listdir(os.path.dirname(overlay)))


def test_whatever_happens_to_the_process_the_disk_is_as_a_bytearray(opened, image):
    dice = random.Random(1)
    disk, base = opened(), Path(image).read_bytes()
    model, allocated = bytearray(base), set()
    for step in range(1500):
        offset = dice.randrange(SIZE // 512) * 512
        length = min(dice.choice((1, 2, 7, 8, 9, 64, 300)) * 512, SIZE - offset)
        action = dice.choice(("write", "write", "read", "discard", "flush", "reopen", "kill"))
        if action == "write":
            content = dice.randbytes(length)
            write(disk, offset, content, size=dice.choice((512, 1536, 4096)))
            model[offset : offset + length] = content
            allocated |= set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))
        elif action == "read":
            assert model[offset : offset + length] == read(disk, offset, length, size=1536), step
        elif action == "discard":
            disk.discard(offset, length)
            end = offset + length
            last = -(-end // BLOCK) if end == SIZE else end // BLOCK
            for block in range(-(-offset // BLOCK), last):
                at = slice(block * BLOCK, (block + 1) * BLOCK)
                model[at] = base[at]
                allocated.discard(block)
        elif action == "flush":
            disk.flush()
        elif dice.random() < 0.3:
            disk.close() if action == "reopen" else kill(disk)
            disk = opened()
            assert model == read(disk, 0, SIZE), step
        assert len(allocated) == disk._file.used, step
        assert 0 == disk.memory
    assert model == read(disk, 0, SIZE)


def test_a_read_of_mixed_blocks_is_done_at_once(opened):
    disk = opened()
    before = read(disk, 0, 10 * BLOCK)
    write(disk, 3 * BLOCK, b"x" * BLOCK)
    write(disk, 7 * BLOCK, b"y" * BLOCK)
    expected = bytearray(before)
    expected[3 * BLOCK : 4 * BLOCK] = b"x" * BLOCK
    expected[7 * BLOCK : 8 * BLOCK] = b"y" * BLOCK
    got = buffers(bytes(9 * BLOCK), size=1536)
    assert 9 * BLOCK == disk.read(got, 512)
    assert expected[512 : 512 + 9 * BLOCK] == b"".join(got)


def test_more_buffers_than_one_system_call_takes(opened):
    disk = opened()
    content = random.Random(2).randbytes(1500 * 512)
    assert len(content) == disk.write(buffers(content, size=512), 512)
    assert content == read(disk, 512, len(content), size=512)


def test_closing_twice_does_no_harm(opened):
    disk = opened()
    disk.close()
    disk.close()


# A process that is killed


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (512, 512),  # in a block that is not allocated
        (2 * BLOCK + 512, 1024),  # in one that is
        (BLOCK + 1024, 3 * BLOCK),  # not allocated, allocated, not allocated, neither end whole
        (4 * BLOCK, 2 * BLOCK),
        (4 * BLOCK, BLOCK),  # one block that is not allocated, as a whole
        (15 * BLOCK, 512),  # the last one, which is not whole
    ],
)
def test_a_write_that_is_killed_anywhere_is_done_or_not(make_image, overlay, offset, length):
    size = 15 * BLOCK + 1024
    image = make_image(size)
    disk = OverlayBackend(image, overlay=overlay)
    write(disk, 2 * BLOCK, b"h" * BLOCK)
    disk.close()
    original = Path(overlay).read_bytes()
    old = bytearray(Path(image).read_bytes())
    old[2 * BLOCK : 3 * BLOCK] = b"h" * BLOCK
    new = bytearray(old)
    new[offset : offset + length] = b"n" * length
    outcomes = []

    def act(trace):
        disk = OverlayBackend(image, overlay=overlay)
        trace()
        write(disk, offset, b"n" * length)
        disk.flush()

    for _ in at_every_effect(act, effects=1):
        disk = OverlayBackend(image, overlay=overlay)
        content = read(disk, 0, size)
        disk.close()
        for start in range(0, size, BLOCK):
            block = slice(start, start + BLOCK)
            assert content[block] in (old[block], new[block])
        outcomes.append(content == new)
        Path(overlay).write_bytes(original)
    assert outcomes == sorted(outcomes)  # once done, it stays done
    assert {False, True} == set(outcomes)


def test_a_discard_that_is_killed_anywhere_is_done_or_not(make_image, overlay):
    image = make_image(16 * BLOCK)
    base = Path(image).read_bytes()
    disk = OverlayBackend(image, overlay=overlay)
    write(disk, BLOCK, b"h" * 4 * BLOCK)
    disk.close()
    original = Path(overlay).read_bytes()
    before = base[:BLOCK] + b"h" * 4 * BLOCK + base[5 * BLOCK :]
    outcomes = []

    def act(trace):
        disk = OverlayBackend(image, overlay=overlay)
        trace()
        disk.discard(0, 16 * BLOCK)
        disk.flush()

    for _ in at_every_effect(act, effects=4):
        disk = OverlayBackend(image, overlay=overlay)
        content = read(disk, 0, 16 * BLOCK)
        disk.close()
        assert content in (before, base)
        outcomes.append(content == base)
        Path(overlay).write_bytes(original)
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def test_an_overlay_that_is_killed_while_it_is_made_is_there_whole_or_not_at_all(image, overlay):
    def act(trace):
        trace()
        OverlayBackend(image, overlay=overlay).close()

    made = 0
    for _ in at_every_effect(act, effects=3):
        if os.path.exists(overlay):
            made += 1
            OverlayBackend(image, overlay=overlay).close()
            os.unlink(overlay)
    assert made  # the last one, at least


def test_an_overlay_that_is_killed_while_it_is_taken_up_after_a_crash(make_image, overlay):
    image = make_image(16 * BLOCK)
    disk = OverlayBackend(image, overlay=overlay)
    write(disk, 0, b"f" * BLOCK)
    disk.flush()
    flushed = read(disk, 0, 16 * BLOCK)
    write(disk, BLOCK, b"n" * 2 * BLOCK)
    kill(disk)
    crashed = bytearray(with_header(Path(overlay).read_bytes(), 36, b"0" * 36))  # another boot
    for block in (1, 2):  # marked, but the data is lost
        crashed[3 * BLOCK :][block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    Path(overlay).write_bytes(crashed)

    def act(trace):
        trace()
        OverlayBackend(image, overlay=overlay)

    for _ in at_every_effect(act, effects=3):
        disk = OverlayBackend(image, overlay=overlay)
        content = read(disk, 0, 16 * BLOCK)
        kill(disk)
        assert flushed == content
        Path(overlay).write_bytes(crashed)


# A host that crashes


def test_a_host_that_crashes_loses_nothing_that_was_flushed(
    boot, opened, make_image, overlay, monkeypatch
):
    """Of what was written later, each page is on storage or is not, in any order."""
    dice = random.Random(3)
    size = (120 << 10) + 512
    image = make_image(size, name="small.img")
    base = Path(image).read_bytes()
    real = os.fdatasync
    stored = [b""]
    syncs_left = [10**9]

    def fdatasync(fd):
        if not syncs_left[0]:
            raise OSError(errno.EIO, "the host is about to crash")
        syncs_left[0] -= 1
        real(fd)
        stored[0] = Path(overlay).read_bytes()

    monkeypatch.setattr(file_module.os, "fdatasync", fdatasync)
    disk = opened(image)
    stored[0] = Path(overlay).read_bytes()
    model = bytearray(base)
    allowed = [{base[at : at + 512]} for at in range(0, size, 512)]
    crashes = 0
    for _ in range(1200):
        offset = dice.randrange(180) * 512
        length = dice.choice((1, 5, 8, 16, 60)) * 512
        end = offset + length
        action = dice.choices(("write", "discard", "flush", "crash"), (10, 4, 3, 2))[0]
        if action == "write":
            content = b"".join(dice.randbytes(4) * 128 for _ in range(length // 512))
            write(disk, offset, content)
            model[offset:end] = content
            for at in range(offset, end, 512):
                allowed[at // 512].add(content[at - offset : at - offset + 512])
        elif action == "discard":
            disk.discard(offset, length)
            first, last = -(-offset // BLOCK) * BLOCK, end // BLOCK * BLOCK
            if first < last:
                model[first:last] = base[first:last]
            for at in range(first, last, 512):
                allowed[at // 512] |= {base[at : at + 512], bytes(512)}
        elif action == "flush":
            disk.flush()
            allowed = [{bytes(model[at : at + 512])} for at in range(0, size, 512)]
        else:
            if dice.random() < 0.5:  # in the middle of a flush
                syncs_left[0] = dice.randrange(2)
                try:
                    disk.flush()
                except OSError:
                    pass
                syncs_left[0] = 10**9
            kill(disk)
            cached = Path(overlay).read_bytes()
            starts = range(0, len(cached), BLOCK)
            mix = [dice.choice((cached, stored[0]))[at : at + BLOCK] for at in starts]
            stored[0] = b"".join(mix)
            Path(overlay).write_bytes(stored[0])
            boot()
            disk = opened(image)
            model = bytearray(read(disk, 0, size))
            for at in range(0, size, 512):
                assert bytes(model[at : at + 512]) in allowed[at // 512]
            allowed = [{*was, bytes(model[i * 512 :][:512])} for i, was in enumerate(allowed)]
            crashes += 1
    assert crashes > 50


def test_what_was_closed_is_there_after_a_new_start_of_the_host(boot, opened):
    disk = opened()
    write(disk, 512, b"x" * 8192)
    after = read(disk, 0, SIZE)
    disk.close()
    boot()
    assert after == read(opened(), 0, SIZE)


def test_what_was_not_flushed_is_not_trusted_after_a_crash(boot, opened, image):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    disk.flush()
    write(disk, 0, b"y" * BLOCK)
    write(disk, BLOCK, b"z" * BLOCK)
    kill(disk)
    boot()
    disk = opened()
    assert Path(image).read_bytes()[BLOCK:] == read(disk, BLOCK, SIZE - BLOCK)
    kill(disk)  # in the same boot now: the live map has become the durable one
    disk = opened()
    assert Path(image).read_bytes()[BLOCK:] == read(disk, BLOCK, SIZE - BLOCK)


def test_a_flush_marks_only_what_was_written_before_it_waited(boot, opened, image, monkeypatch):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    real = os.fdatasync
    waits = []

    def fdatasync(fd):
        real(fd)
        if not waits:
            write(disk, BLOCK, b"late" * 1024)
        waits.append(fd)

    monkeypatch.setattr(file_module.os, "fdatasync", fdatasync)
    disk.flush()
    assert 2 == len(waits)
    kill(disk)
    boot()
    disk = opened()
    expected = b"x" * BLOCK + Path(image).read_bytes()[BLOCK:]
    assert expected == read(disk, 0, SIZE)


def test_a_flush_waits_for_the_marks_of_one_under_way(opened, monkeypatch):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    real = os.fdatasync
    second = threading.Thread(target=disk.flush)
    overtaken = []

    def fdatasync(fd):
        real(fd)
        if second.ident is None:
            second.start()
            second.join(0.05)
            overtaken.append(not second.is_alive())

    monkeypatch.setattr(file_module.os, "fdatasync", fdatasync)
    disk.flush()
    second.join()
    assert [False] == overtaken


def test_a_flush_without_new_blocks_waits_once(opened, monkeypatch):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    disk.flush()
    waits = []
    monkeypatch.setattr(file_module.os, "fdatasync", waits.append)
    write(disk, 0, b"y" * BLOCK)
    disk.flush()
    assert 1 == len(waits)


# Storage that loses what it has taken


@pytest.fixture
def thin(tmp_path):
    """A directory on a file system whose device has less storage than it says, as if thin.

    Write-back fails, and the page cache then says that all is well.
    """
    with contextlib.ExitStack() as stack:
        yield storage.full_device(tmp_path, stack)


def test_a_flush_that_failed_does_not_succeed_the_next_time(opened, thin):
    disk = opened(file=str(thin.directory / "changes"))
    thin.fill()
    write(disk, 0, b"x" * (1 << 20))
    for _ in range(3):
        with pytest.raises(OSError):  # noqa: PT011 - whichever error the storage has
            disk.flush()


def test_what_a_failed_flush_left_behind_is_not_trusted(opened, thin, image):
    file = str(thin.directory / "changes")
    disk = opened(file=file)
    write(disk, 0, b"f" * BLOCK)
    disk.flush()
    thin.fill()
    write(disk, BLOCK, b"x" * ((1 << 20) - BLOCK))
    with pytest.raises(OSError):  # noqa: PT011 - whichever error the storage has
        disk.flush()
    disk.close()
    thin.make_room()
    storage.drop(file)
    disk = opened(file=file)
    assert b"f" * BLOCK + Path(image).read_bytes()[BLOCK:] == read(disk, 0, SIZE)


def test_what_a_process_before_had_not_flushed_cannot_be_written_again(opened, thin, image):
    file = str(thin.directory / "changes")
    disk = opened(file=file)
    disk.flush()
    thin.fill()
    write(disk, 0, b"x" * (1 << 20))
    kill(disk)
    disk = opened(file=file)  # takes over
    for _ in range(3):
        with pytest.raises(OSError):  # noqa: PT011 - whichever error the storage has
            disk.flush()
        thin.make_room()
        thin.fill()
    thin.make_room()
    with pytest.raises(OSError, match="an earlier flush failed"):
        disk.flush()
    disk.close()
    storage.drop(file)
    assert Path(image).read_bytes() == read(opened(file=file), 0, SIZE)


def test_a_flush_of_several_threads_is_good_for_none_if_it_failed(opened, thin):
    disk = opened(file=str(thin.directory / "changes"))
    thin.fill()
    write(disk, 0, b"x" * (1 << 20))
    with ThreadPoolExecutor(4) as pool:
        flushes = [pool.submit(disk.flush) for _ in range(8)]
    assert [True] * 8 == [isinstance(flush.exception(), OSError) for flush in flushes]


def test_what_is_written_again_after_a_failed_flush_is_flushed(opened, thin, image):
    """Also what was not the guest's: the rest of blocks of which it wrote a part."""
    file = str(thin.directory / "changes")
    disk = opened(file=file)
    expected = bytearray(Path(image).read_bytes())
    thin.fill()
    parts = [(at + 512 * (at // BLOCK % 7), 512) for at in range(0, 1 << 20, BLOCK)]
    for offset, length in parts:
        expected[offset : offset + length] = b"x" * length
        write(disk, offset, b"x" * length)
    with pytest.raises(OSError):  # noqa: PT011 - whichever error the storage has
        disk.flush()
    storage.drop(file)
    for offset, length in parts[:-1]:
        write(disk, offset, b"x" * length)
    thin.make_room()
    with pytest.raises(OSError, match="an earlier flush failed"):
        disk.flush()
    for _ in range(3):  # what was copied again meanwhile may have failed, too: told of once
        for offset, length in parts:
            write(disk, offset, b"x" * length)
        with contextlib.suppress(OSError):
            disk.flush()
            break
    else:
        pytest.fail("no flush succeeds")
    kill(disk)
    storage.drop(file)
    disk = opened(file=file)
    assert expected == read(disk, 0, SIZE)
    disk.flush()


def test_a_flush_that_is_retried_writes_everything_again(opened, thin, image):
    """As under ``--on-error hold``."""
    file = str(thin.directory / "changes")
    disk = opened(file=file)
    durability = Durability(disk, Statistics(), keeps=True)
    move = durability.writing(disk.write, may_wait=True)
    expected = bytearray(Path(image).read_bytes())
    thin.fill()
    for at in range(0, 1 << 20, 2 * BLOCK):
        expected[at + 512 : at + 1024] = b"x" * 512
        move([memoryview(b"x" * 512)], at + 512)
    with pytest.raises(OSError):  # noqa: PT011 - whichever error the storage has
        durability.flush()
    storage.drop(file)
    thin.make_room()
    for _ in range(3):
        with contextlib.suppress(OSError):
            durability.flush()
            break
    else:
        pytest.fail("no flush succeeds")
    kill(disk)
    storage.drop(file)
    assert expected == read(opened(file=file), 0, SIZE)


def test_blocks_that_were_discarded_need_not_be_written_again(opened, thin, image):
    disk = opened(file=str(thin.directory / "changes"))
    thin.fill()
    write(disk, 0, b"x" * (1 << 20))
    with pytest.raises(OSError):  # noqa: PT011 - whichever error the storage has
        disk.flush()
    thin.make_room()
    disk.discard(0, 1 << 20)
    for _ in range(3):  # of the file system's own data another error may come
        with contextlib.suppress(OSError):
            disk.flush()
            break
    else:
        pytest.fail("no flush succeeds")
    assert Path(image).read_bytes() == read(disk, 0, SIZE)


# A file system that loses its storage, and is mounted again in the same boot


def test_the_page_cache_of_another_mount_is_not_trusted(opened, tmp_path, image):
    with contextlib.ExitStack() as stack:
        mounted = storage.file_system(tmp_path, stack)
        file = str(mounted.directory / "changes")
        disk = opened(file=file)
        write(disk, 0, b"f" * BLOCK)
        disk.flush()
        for block in range(1, 100):
            write(disk, block * BLOCK + 512, b"x" * 512)
        kill(disk)
        storage.write_back(file, BLOCK, 2 * BLOCK)  # the live map, and none of the data
        mounted.shut_down()
        mounted.mount_again()
        disk = opened(file=file)
        assert b"f" * BLOCK + Path(image).read_bytes()[BLOCK:] == read(disk, 0, SIZE)
        disk.close()


def test_the_page_cache_is_trusted_by_another_mount_of_the_same_file_system(
    opened, tmp_path, image
):
    with contextlib.ExitStack() as stack:
        mounted = storage.file_system(tmp_path, stack)
        disk = opened(file=str(mounted.directory / "changes"))
        write(disk, 0, b"x" * BLOCK)
        kill(disk)
        disk = opened(file=str(mounted.bind(tmp_path / "bound") / "changes"))
        assert b"x" * BLOCK + Path(image).read_bytes()[BLOCK:] == read(disk, 0, SIZE)
        disk.close()


# Several threads


def test_threads_that_write_sectors_of_the_same_blocks_lose_nothing(opened, image):
    disk = opened()
    base = Path(image).read_bytes()
    blocks = 40
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def column(thread):
        for block in range(blocks):
            write(disk, block * BLOCK + thread * 512, bytes([thread + 1]) * 512)

    try:
        with ThreadPoolExecutor(7) as pool:
            list(pool.map(column, range(7)))
    finally:
        sys.setswitchinterval(before)
    expected = b"".join(
        b"".join(bytes([thread + 1]) * 512 for thread in range(7)) + base[at + 3584 : at + BLOCK]
        for at in range(0, blocks * BLOCK, BLOCK)
    )
    assert expected == read(disk, 0, blocks * BLOCK)


def test_writes_and_discards_at_once_leave_what_was_written_or_the_image(opened, image):
    disk = opened()
    base = Path(image).read_bytes()
    blocks = 8
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def column(thread):
        dice = random.Random(thread)
        for _ in range(400):
            block = dice.randrange(blocks)
            if thread == 7:
                disk.discard(block * BLOCK, BLOCK)
            else:
                write(disk, block * BLOCK + thread * 512, bytes([thread + 1]) * 512)

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(column, range(8)))
    finally:
        sys.setswitchinterval(before)
    content = read(disk, 0, blocks * BLOCK)
    for at in range(0, len(content), 512):
        thread = at // 512 % 8
        assert content[at : at + 512] in (bytes([thread + 1]) * 512, base[at : at + 512])
    assert disk._file.allocated[:blocks].count(1) == disk._file.used


def test_a_discard_between_the_look_and_the_write_is_noticed(opened, image):
    disk = opened()
    base = Path(image).read_bytes()
    write(disk, 0, b"x" * BLOCK)

    class Lock:  # a discard gets it first, once
        def __enter__(self):
            disk._file.lock = real
            disk.discard(0, BLOCK)
            real.acquire()

        def __exit__(self, *_):
            real.release()

    real, disk._file.lock = disk._file.lock, Lock()
    write(disk, 512, b"y" * 512)
    assert base[:512] + b"y" * 512 + base[1024:BLOCK] == read(disk, 0, BLOCK)


def test_a_discard_waits_for_a_write_under_way(opened):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    real = disk._file.write_first
    discard = threading.Thread(target=disk.discard, args=(0, 2 * BLOCK))
    overtaken = []

    def slow_write(*arguments):
        discard.start()
        discard.join(0.05)
        overtaken.append(not discard.is_alive())
        real(*arguments)

    disk._file.write_first = slow_write
    assert BLOCK == disk.write(buffers(b"y" * BLOCK), BLOCK)
    discard.join()
    assert [False] == overtaken


def test_nothing_waits_that_must_not(opened, monkeypatch):
    disk = opened()
    image = disk._image
    monkeypatch.setattr(image, "read_nowait", lambda *_: 0)
    assert 0 == disk.write_nowait(buffers(b"x" * 512), 512)  # the image's part is not there
    assert 0 == disk._file.used
    assert BLOCK == disk.write_nowait(buffers(b"x" * BLOCK), 0)  # needs none
    assert 512 == disk.write_nowait(buffers(b"y" * 512), 512)
    monkeypatch.setattr(image, "read_nowait", image.read)
    assert 512 == disk.write_nowait(buffers(b"z" * 512), BLOCK)


def test_what_can_be_read_without_waiting_ends_where_the_image_does(opened, monkeypatch):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    readers = (lambda *_: 0, disk._file.reader.read)
    monkeypatch.setattr(disk, "_readers_nowait", readers)
    got = buffers(bytes(2 * BLOCK))
    assert BLOCK == disk.read_nowait(got, 0)
    assert b"x" * BLOCK == got[0]
    assert 0 == disk.read_nowait(got, BLOCK)


# Limits and faults


def test_a_write_beyond_the_limit_changes_nothing_and_is_said_once(opened, caplog):
    disk = opened(cow_limit=4 * BLOCK)
    write(disk, 0, b"x" * 3 * BLOCK)
    before = read(disk, 0, SIZE)
    for _ in range(3):
        with pytest.raises(OSError, match="the overlay is full") as caught:
            write(disk, 2 * BLOCK, b"y" * 3 * BLOCK)
        assert errno.ENOSPC == caught.value.errno
    assert before == read(disk, 0, SIZE)
    (line,) = caplog.messages
    assert "--cow-limit" in line
    write(disk, 2 * BLOCK, b"y" * 2 * BLOCK)  # just fits
    write(disk, 0, b"z" * BLOCK)  # is allocated
    disk.discard(0, BLOCK)
    write(disk, 8 * BLOCK, b"z" * BLOCK)


def test_a_negative_limit_is_refused(opened, overlay):
    assert "--cow-limit" in refusal(lambda: opened(cow_limit=-1))
    assert not os.path.exists(overlay)


def test_a_write_that_fails_leaves_old_or_new_sectors(opened, image, monkeypatch):
    disk = opened()
    old = Path(image).read_bytes()[: 4 * BLOCK]
    real = os.pwritev
    for calls in range(2):
        left = [calls]

        def pwritev(*arguments, left=left):
            if not left[0]:
                raise OSError(errno.ENOSPC, "the file system is full")
            left[0] -= 1
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(file_module.os, "pwritev", pwritev)
            with pytest.raises(OSError, match="the file system is full"):
                disk.write(buffers(b"x" * 1024), 512)
        assert old == read(disk, 0, 4 * BLOCK)
    write(disk, 512, b"x" * 1024)
    assert old[:512] + b"x" * 1024 + old[1536:] == read(disk, 0, 4 * BLOCK)


@pytest.mark.parametrize("errors", [1, 2])
def test_a_block_that_cannot_be_written_or_marked_keeps_its_content(
    opened, image, monkeypatch, errors
):
    disk = opened()
    old = Path(image).read_bytes()[: 2 * BLOCK]
    write(disk, 0, b"a" * BLOCK)
    real, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) == errors:
            raise OSError(errno.ENOSPC, "the file system is full")
        return real(*arguments)

    def pwritev(*arguments):
        raise OSError(errno.ENOSPC, "the file system is full")

    with monkeypatch.context() as patch:
        patch.setattr(file_module.os, "pwrite", pwrite)
        patch.setattr(file_module.os, "pwritev", pwritev)
        with pytest.raises(OSError, match="the file system is full"):
            disk.write(buffers(b"x" * BLOCK), BLOCK)
    assert errors == len(calls)
    assert b"a" * BLOCK + old[BLOCK:] == read(disk, 0, 2 * BLOCK)
    assert 1 == disk._file.used
    write(disk, BLOCK, b"x" * BLOCK)
    assert b"a" * BLOCK + b"x" * BLOCK == read(disk, 0, 2 * BLOCK)
    assert 2 == disk._file.used


def test_a_block_that_is_written_in_part_at_first_is_written_whole(opened, monkeypatch):
    disk = opened()
    real = os.pwrite

    def pwrite(fd, data, offset):
        return real(fd, data[: -(-len(data) // 2)], offset) if len(data) > 1 else 0

    with monkeypatch.context() as patch:
        patch.setattr(file_module.os, "pwrite", pwrite)
        assert BLOCK == disk.write(buffers(b"x" * BLOCK), BLOCK)
        assert BLOCK == disk.write(buffers(b"y" * BLOCK), BLOCK)
    assert 1 == disk._file.used
    assert b"y" * BLOCK == read(disk, BLOCK, BLOCK)


@pytest.fixture
def small_directory(tmp_path):
    """A file system of 256 KiB."""
    if os.geteuid():
        pytest.skip("a small file system needs root")
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_file_system_fails_writes_and_nothing_else(boot, opened, image, small_directory):
    file = str(small_directory / "changes")
    disk = opened(file=file)
    model = bytearray(Path(image).read_bytes())
    errors = []
    for start in [*range(0, 1 << 20, 65536), *range(0, 1 << 20, 2 * BLOCK)]:
        try:
            write(disk, start, bytes([start % 251]) * 2 * BLOCK)
            model[start : start + 2 * BLOCK] = bytes([start % 251]) * 2 * BLOCK
        except OSError as error:
            errors.append(error.errno)
        disk.flush()
    assert 20 < len(errors)
    assert {errno.ENOSPC} == set(errors)
    assert 50 <= disk._file.used
    assert model == read(disk, 0, SIZE)
    kill(disk)
    boot()
    disk = opened(file=file)
    assert model == read(disk, 0, SIZE)
    disk.discard(0, SIZE)
    write(disk, 1 << 19, b"x" * 2 * BLOCK)  # there is space again


def test_a_discard_gives_space_back(opened, overlay):
    disk = opened()
    write(disk, 0, b"x" * (1 << 20))
    full = os.stat(overlay).st_blocks
    disk.discard(0, 1 << 20)
    assert full - os.stat(overlay).st_blocks >= 2000
    assert 0 == disk._file.used


def test_a_discard_works_where_no_space_can_be_given_back(opened, image, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(file_module, "punch_hole", refuse)
    disk = opened()
    write(disk, 0, b"x" * 2 * BLOCK)
    disk.discard(0, BLOCK)
    expected = Path(image).read_bytes()[:BLOCK] + b"x" * BLOCK
    assert expected == read(disk, 0, 2 * BLOCK)


def test_files_that_are_cut_short_give_errors_and_kill_nobody(make_image, overlay):
    image = make_image(SIZE, name="short.img")
    disk = OverlayBackend(image, overlay=overlay)
    write(disk, 4 * BLOCK, b"x" * BLOCK)
    os.truncate(image, BLOCK)
    assert b"x" * BLOCK == read(disk, 4 * BLOCK, BLOCK)
    for call in (disk.read, disk.write):
        assert 0 == call(buffers(bytes(512)), 8 * BLOCK + 512)
    os.truncate(overlay, 0)
    assert 0 == disk.read(buffers(bytes(BLOCK)), 4 * BLOCK)
    write(disk, 4 * BLOCK, b"y" * BLOCK)
    disk.flush()
    disk.close()


def test_its_size_stays(opened):
    disk = opened()
    for size in (None, 2 << 20):
        with pytest.raises(DeviceError, match=r"keeps its size: .*commit"):
            disk.resize(size)
    assert SIZE == disk.size


# Who may have it


def test_a_second_user_is_refused_and_told_who_has_it(opened):
    opened()
    assert f"in use by process {os.getpid()}" in refusal(opened)


def test_a_writer_of_the_image_is_refused_and_refuses(opened, image):
    disk = opened()
    assert "in use by process" in refusal(lambda: RawBackend(image))
    disk.close()
    with Image.open(image, writable=True):
        assert "being written" in refusal(opened)


def test_the_image_is_opened_for_reading_only(opened, image, as_nobody):
    directory, dropped = as_nobody
    os.chmod(directory, 0o777)
    copy = os.path.join(directory, "disk.img")
    Path(copy).write_bytes(Path(image).read_bytes())
    os.chmod(copy, 0o444)
    with dropped():
        disk = opened(copy, os.path.join(directory, "changes"))
        write(disk, 0, b"x" * 512)
        disk.close()


def test_the_image_itself_is_no_overlay(opened, image):
    assert "that is the image itself" in refusal(lambda: opened(file=image))


def test_a_link_to_nothing_is_not_followed_to_make_an_overlay(opened, overlay, tmp_path):
    os.symlink(tmp_path / "elsewhere", overlay)
    assert "cannot be opened: No such file" in refusal(opened)
    assert not os.path.lexists(tmp_path / "elsewhere")


@pytest.mark.parametrize("tmpfile", [True, False])
def test_one_that_somebody_makes_meanwhile_is_not_replaced(opened, overlay, monkeypatch, tmpfile):
    if not tmpfile:
        monkeypatch.setattr(newfile_module.os, "O_TMPFILE", os.O_DIRECTORY)  # no such thing
    real = os.link

    def link(source, target, **options):
        Path(target).write_text("theirs")
        real(source, target, **options)

    monkeypatch.setattr(newfile_module.os, "link", link)
    assert "cannot be made: File exists" in refusal(opened)
    assert "theirs" == Path(overlay).read_text()
    assert ["changes.overlay", "disk.img"] == sorted(os.listdir(os.path.dirname(overlay)))


def test_a_file_system_without_hard_links(opened, overlay, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, "no links")

    monkeypatch.setattr(newfile_module.os, "O_TMPFILE", os.O_DIRECTORY)
    monkeypatch.setattr(newfile_module.os, "link", link)
    opened()
    assert ["changes.overlay", "disk.img"] == sorted(os.listdir(os.path.dirname(overlay)))
    with NewFile(overlay) as new, pytest.raises(FileExistsError):
        new.put(overlay, replacing=False)


def test_a_directory_that_is_not_there(opened, tmp_path):
    said = refusal(lambda: opened(file=str(tmp_path / "no" / "file")))
    assert "cannot be made: there is no directory" in said


# Whose changes it has


def test_the_image_is_known_by_the_overlay(opened, image, overlay):
    opened().close()
    assert image == image_path(overlay)


def test_the_sector_size_stays(make_image, opened, overlay):
    image = make_image(1 << 20, name="even.img")
    opened(image, sector_size=4096).close()
    disk = opened(image)
    assert 4096 == disk.sector_size
    disk.close()
    opened(image, sector_size=4096).close()
    said = refusal(lambda: opened(image, sector_size=512))
    assert f"--sector-size 512: the overlay {overlay} was made with 4096" in said


def test_another_image_is_refused(opened, image, make_image):
    opened().close()
    other = make_image(SIZE, name="other.img")
    assert f"made for another image, {image}" in refusal(lambda: opened(other))


@pytest.mark.parametrize("how", ["touched", "longer", "replaced"])
def test_an_image_that_has_changed_is_refused(make_image, opened, how):
    image = make_image(1 << 20, name="changing.img")
    opened(image).close()
    status = os.stat(image)
    if how == "touched":
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif how == "longer":
        os.truncate(image, 2 << 20)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.rename(make_image(1 << 20, name="new.img"), image)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    said = refusal(lambda: opened(image))
    assert "changed or replaced since the overlay" in said
    assert "begin a new overlay" in said


def test_an_image_that_has_moved_is_known_again(make_image, opened, overlay, tmp_path):
    image = make_image(1 << 20, name="moving.img")
    opened(image).close()
    moved = str(tmp_path / "moved.img")
    os.rename(image, moved)
    opened(moved).close()
    assert moved == image_path(overlay)


def test_device_numbers_may_change_with_a_new_start_of_the_host(boot, opened, overlay):
    opened().close()
    with open(overlay, "r+b") as file:
        header = Header.parse(file.read(BLOCK), overlay)
        file.seek(0)
        file.write(header._replace(image={**header.image, "device": 12345}).pack())
    assert "changed or replaced" in refusal(opened)
    boot()
    opened().close()
    opened().close()


def test_a_file_that_has_the_inode_of_the_image_is_another_one(opened, tmp_path):
    """A file system gives the number of a file that was removed to the next one at once."""
    with contextlib.ExitStack() as stack:
        directory = storage.file_system(tmp_path, stack).directory
        path = directory / "disk.img"
        path.write_bytes(b"i" * 65536)
        opened(str(path)).close()
        before = os.stat(path)
        path.unlink()
        path.write_bytes(b"j" * 65536)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if os.stat(path).st_ino != before.st_ino:
            pytest.skip("this file system does not do that")
        assert "it is another one (born was" in refusal(lambda: opened(str(path)))


def test_another_block_device_is_refused_after_a_new_start_too(
    boot, opened, make_image, attach_loop, monkeypatch
):
    first, second = (
        attach_loop(make_image(1 << 20, name=name)) for name in ("first.img", "second.img")
    )
    opened(first).close()
    assert "made for another image" in refusal(lambda: opened(second))
    boot()
    monkeypatch.setattr(identity, "_boot", lambda: "another")
    assert "made for another image" in refusal(lambda: opened(second))
    opened(first).close()


def test_a_block_device_that_nothing_identifies_is_refused_after_a_new_start(
    boot, opened, make_image, attach_loop, monkeypatch, overlay
):
    device = attach_loop(make_image(1 << 20, name="first.img"))
    real = identity._of_device
    nameless = lambda number: [(n, v) for n, v in real(number) if n == "diskseq"]  # noqa: E731
    monkeypatch.setattr(identity, "_of_device", nameless)
    opened(device).close()
    opened(device).close()
    boot()
    monkeypatch.setattr(identity, "_boot", lambda: "another")
    said = refusal(lambda: opened(device))
    assert "it has no serial number, UUID or the like that tells whether it is the same" in said
    assert f"xen-disk rebase {overlay} {device} --force" in said
    rebase(overlay, device, force=True, progress=lambda *_: None)
    opened(device).close()


def test_an_overlay_of_version_1_is_taken_and_becomes_one_of_this(opened, image, overlay):
    disk = opened()
    write(disk, 512, b"x" * 512)
    kill(disk)
    expected = bytearray(Path(image).read_bytes())
    expected[512:1024] = b"x" * 512
    with open(overlay, "r+b") as file:
        page = bytearray(file.read(BLOCK))
        path = 98 + struct.unpack_from("<H", page, 96)[0]
        struct.pack_into("<I", page, 16, 1)
        page[path:] = bytes(BLOCK - path)
        file.seek(0)
        file.write(page)
    for _ in range(2):
        disk = opened()
        assert expected == read(disk, 0, SIZE)
        kill(disk)
    assert 3 == Path(overlay).read_bytes()[16]


def test_a_block_device(loop_device, opened, overlay):
    disk = opened(loop_device)
    write(disk, 512, b"x" * 512)
    after = read(disk, 0, 1 << 20)
    disk.close()
    assert after == read(opened(loop_device), 0, 1 << 20)


# Files that are none


def damaged(at, content):
    if at < BLOCK:
        return lambda data: with_header(data, at, content)
    return lambda data: data[:at] + content + data[at + len(content) :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "not an overlay"),
        (lambda data: data[:100], "not an overlay"),
        (lambda data: b"QFI\xfb" + data[4:], "not an overlay"),
        (damaged(16, b"\4"), "an overlay of version 4"),
        (damaged(20, b"\1"), "its header makes no sense"),  # the block
        (damaged(24, bytes(8)), "its header makes no sense"),  # the size
        (damaged(24, b"\1"), "its header makes no sense"),
        (damaged(32, b"\1\2"), "its header makes no sense"),  # the sector size
        (damaged(36, b"\xff"), "its header makes no sense"),  # the boot id
        (damaged(96, b"\xff\xff"), "its header makes no sense"),  # the length of the path
        (damaged(96, b"\3\0"), "its header makes no sense"),
        (damaged(98, b"relative"), "its header makes no sense"),
        (damaged(99, b"\0"), "its header makes no sense"),
        (damaged(2043, b"\1"), "its header makes no sense"),
        (lambda data: 2 * (data[:2000] + bytes(48)) + data[BLOCK:], "its header makes no sense"),
        (damaged(4096 + 7, b"\2"), "its map makes no sense"),
        (damaged(4096 + 257, b"\1"), "its map makes no sense"),  # a block beyond the end
        (lambda data: data[:-1], "perhaps cut short"),
        (lambda data: data[:5000], "perhaps cut short"),
        (lambda data: data + b"x", "perhaps cut short"),
        (damaged(24 + 5, b"\1"), "perhaps cut short"),  # an enormous size
    ],
)
def test_what_is_no_whole_overlay_is_refused_as_it_is(opened, overlay, change, said):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    disk.close()
    hostile = change(Path(overlay).read_bytes())
    Path(overlay).write_bytes(hostile)
    assert said in refusal(opened)
    assert hostile == Path(overlay).read_bytes()


def test_an_enormous_hole_is_refused(opened, overlay):
    opened().close()
    size = 1 << 42
    with open(overlay, "r+b") as file:
        page = file.read(BLOCK)
        file.seek(0)
        file.write(with_header(page, 24, struct.pack("<Q", size)))
        file.truncate(BLOCK + 2 * (size // BLOCK**2 * BLOCK) + size)
    assert "changed or replaced since" in refusal(opened)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file_is_refused(opened, overlay, kind):
    (os.mkdir if kind == "directory" else os.mkfifo)(overlay)
    assert overlay in refusal(opened)
    assert overlay in refusal(lambda: image_path(overlay))


def test_too_long_a_path_for_the_header(opened, image, monkeypatch, overlay):
    def header_of(*_):
        epoch = epoch_module.Epoch("b" * 36)
        return file_module.Header(SIZE, 512, epoch, (0, 0), 0, "/" + "p" * 4000)

    monkeypatch.setattr(file_module.Header, "of", header_of)
    assert "too long a path" in refusal(opened)
    assert ["disk.img"] == os.listdir(os.path.dirname(overlay))


def test_reading_only_it_leaves_the_file_as_it_is(boot, opened, overlay):
    disk = opened()
    write(disk, 0, b"x" * BLOCK)
    disk.flush()
    write(disk, BLOCK, b"x" * BLOCK)
    kill(disk)
    before = Path(overlay).read_bytes()
    with OverlayFile.open(overlay, writable=False, alone=False) as file:
        assert [(0, 2 * BLOCK, 1), (2 * BLOCK, SIZE, 0)] == list(file.extents(0, SIZE))
    boot()
    with OverlayFile.open(overlay, writable=False, alone=False) as file:
        assert [(0, BLOCK, 1), (BLOCK, SIZE, 0)] == list(file.extents(0, SIZE))
    assert before == Path(overlay).read_bytes()


def test_a_large_map_is_read_where_it_is_not_a_hole(make_image, opened):
    size = 1 << 40
    image = make_image(size, name="large.img", sparse=True)
    disk = opened(image)
    write(disk, size - BLOCK, b"x" * BLOCK)
    write(disk, size // 2, b"y" * BLOCK)
    kill(disk)
    disk = opened(image)
    assert b"x" * BLOCK == read(disk, size - BLOCK, BLOCK)
    assert b"y" * BLOCK == read(disk, size // 2, BLOCK)
    assert 2 == disk._file.used


def test_a_huge_discard_that_is_cut_short(make_image, opened):
    """In the parts that a queue makes of what Linux 7 sends; the successor does all of it again."""
    size, part = 1 << 40, 1 << 34
    places = 0, size // 2, size - BLOCK
    image = make_image(size, name="large.img", sparse=True)
    disk = opened(image)
    for place in places:
        write(disk, place, b"new " * (BLOCK // 4))
    for offset in range(0, size // 2, part):
        disk.discard(offset, part)
    kill(disk)
    disk = opened(image)
    assert [bytes(4), b"new ", b"new "] == [read(disk, place, BLOCK)[:4] for place in places]
    for offset in range(0, size, part):
        disk.discard(offset, part)
    kill(disk)
    disk = opened(image)
    assert 0 == disk._file.used
    assert [bytes(4)] * 3 == [read(disk, place, BLOCK)[:4] for place in places]


def test_it_is_opened_by_name(image, overlay, tmp_path):
    arguments = ["overlay", "--path", image, "--overlay", overlay, "--", "-q", "-k", "size"]
    status, output = conformance_command(*arguments, cwd=tmp_path)
    assert os.path.exists(overlay), output
    assert 0 == status, output


def test_an_overlay_in_memory_takes_what_the_host_can_spare(image, monkeypatch, caplog):
    """One in /dev/shm takes memory as a cow disk does."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        disks = []
        monkeypatch.setattr(
            memory, "room", lambda: (64 << 10) - sum(disk._file.used for disk in disks) * 4096
        )
        disks.append(OverlayBackend(image, overlay=f"{directory}/changes"))
        for offset in range(0, 64 << 10, 4096):
            write(disks[0], offset, b"x" * 4096)
        with pytest.raises(OSError, match=r"the overlay is full \(64 KiB\)") as caught:
            write(disks[0], 64 << 10, b"x" * 4096)
        assert errno.ENOSPC == caught.value.errno
        write(disks[0], 0, b"y" * 4096)
        (line,) = caplog.messages
        assert "the memory that this host can spare" in line
        disks[0].discard(0, 8192)
        write(disks[0], 64 << 10, b"x" * 4096)
        disks[0].close()
