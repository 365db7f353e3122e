import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.blocks import buffers, is_cut_short, read, write
from xen_disk_py.backends import mmap as mmap_module
from xen_disk_py.backends.image import Image
from xen_disk_py.backends.mmap import MmapBackend
from xen_disk_py.errors import ImageError


def content(path):
    with open(path, "rb") as file:
        return file.read()


def test_what_is_written_is_in_the_file(image):
    before = content(image)
    disk = MmapBackend(image)
    write(disk, 512, b"x" * 8192)
    disk.flush()
    assert b"x" * 8192 == read(disk, 512, 8192)
    disk.close()
    assert before[:512] + b"x" * 8192 + before[8704:] == content(image)


@pytest.mark.parametrize("where", ["file", "device"])
def test_a_discard_frees_the_space_and_zeros_are_read(make_image, attach_loop, where):
    image = make_image(1 << 20)
    path = attach_loop(image) if where == "device" else image
    disk = MmapBackend(path)
    if not disk.can_discard:
        pytest.skip("this file system punches no holes")
    write(disk, 0, b"x" * (1 << 20))
    disk.flush()
    used = os.stat(image).st_blocks
    disk.discard(8192 + 512, 512 << 10)
    expected = b"x" * 8704 + bytes(512 << 10) + b"x" * ((1 << 20) - (512 << 10) - 8704)
    assert expected == read(disk, 0, 1 << 20)
    write(disk, 65536, b"y" * 512)
    disk.flush()
    disk.close()
    assert expected[:65536] + b"y" * 512 + expected[66048:] == content(path)
    assert os.stat(image).st_blocks < used


def test_a_read_only_disk_offers_no_discard(image):
    disk = MmapBackend(image, read_only=True)
    assert not disk.can_discard
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        disk.discard(0, 4096)
    disk.close()


def test_flush_syncs_the_mapping(image):
    class Memory:
        flushed = 0

        def flush(self):
            self.flushed += 1

    disk = MmapBackend(image)
    real, disk._mapped.memory = disk._mapped.memory, Memory()
    disk.flush()
    assert 1 == disk._mapped.memory.flushed
    disk._mapped.memory = real
    disk.close()


def test_a_read_only_disk_cannot_be_written(image):
    disk = MmapBackend(image, read_only=True)
    disk.flush()
    assert content(image)[512:1024] == read(disk, 512, 512)
    with pytest.raises(OSError, match="Read-only"):
        write(disk, 0, bytes(512))
    disk.close()


def test_an_image_that_was_cut_short_is_an_io_error(image):
    disk = MmapBackend(image)
    os.truncate(image, 8192)
    assert 8192 == len(read(disk, 0, 8192))
    assert 0 == disk.read(buffers(bytes(4096)), 8192)
    with pytest.raises(EOFError, match="8192 of 12288 bytes"):
        read(disk, 0, 12288)
    for call in (disk.write, disk.write_nowait):
        with pytest.raises(OSError, match="4096 bytes at 8192 of the image cannot be had"):
            call(buffers(bytes(4096)), 8192)
    disk.close()


def test_without_waiting(image):
    """Everything is in memory, but for a read of what was dropped from there."""
    disk = MmapBackend(image)
    assert 8192 == disk.write_nowait(buffers(b"x" * 8192), 512)
    assert b"x" * 8192 == content(image)[512:8704]
    found = buffers(bytes(8192))
    done = disk.read_nowait(found, 512)
    assert done == (0 if disk._image.nowait is None else 8192)
    assert b"x" * done == b"".join(found)[:done]
    disk.close()
    disk = MmapBackend(image)
    if disk._image.nowait:
        cold = buffers(bytes(1 << 20))
        assert is_cut_short(image, lambda: disk.read_nowait(cold, 0), 1 << 20)
    assert b"x" * 8192 == read(disk, 512, 8192)
    disk.close()


def test_a_read_only_disk_cannot_be_written_without_waiting_either(image):
    disk = MmapBackend(image, read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        disk.write_nowait(buffers(bytes(512)), 0)
    disk.close()


def test_writes_of_many_threads(image):
    """Disjoint sectors of the same pages: none is lost."""
    disk = MmapBackend(image)
    data = random.Random(3).randbytes(256 << 10)

    def run(number):
        for offset in range(number * 512, len(data), 16 * 512):
            write(disk, offset, data[offset : offset + 512])
            assert data[offset : offset + 512] == read(disk, offset, 512)

    with ThreadPoolExecutor(disk.threads) as pool:
        assert [None] * 16 == list(pool.map(run, range(16)))
    disk.close()
    assert data == content(image)[: len(data)]


def test_an_image_that_cannot_be_mapped_is_unlocked_again(image, monkeypatch):
    def refuse(opened):
        raise ImageError("no")

    monkeypatch.setattr(mmap_module, "MappedImage", refuse)
    with pytest.raises(ImageError, match="no"):
        MmapBackend(image)
    Image.open(image, writable=True).close()


def test_a_block_device_is_served(loop_device):
    disk = MmapBackend(loop_device)
    data = os.urandom(64 << 10)
    write(disk, disk.size - len(data), data)
    disk.flush()
    assert data == read(disk, disk.size - len(data), len(data))
    disk.close()


def test_any_sequence_of_sizes(image):
    """The file has the last size; what is inside is kept, and what was added is zeros."""
    dice = random.Random(7)
    model = bytearray(content(image))
    disk = MmapBackend(image)
    for _ in range(50):
        size = dice.randrange(1, 4096) * 512
        assert size == disk.resize(size) == disk.size == os.stat(image).st_size
        model = model[:size].ljust(size, b"\0")
        offset = dice.randrange(size // 512) * 512
        data = dice.randbytes(min(8192, size - offset))
        write(disk, offset, data)
        disk.flush()
        model[offset : offset + len(data)] = data
        assert model[offset - 512 * bool(offset) :] == read(
            disk, offset - 512 * bool(offset), size - offset + 512 * bool(offset)
        )
    disk.close()
    assert model == content(image)


def test_the_owner_of_the_image_makes_it_longer(image):
    disk = MmapBackend(image)
    os.truncate(image, 2 << 20)
    assert (2 << 20, 1 << 20) == (disk.resize(None), disk.size)
    assert 2 << 20 == disk.resize(2 << 20) == disk.size
    write(disk, (2 << 20) - 512, b"e" * 512)
    disk.close()
    assert b"e" * 512 == content(image)[-512:]


def test_a_longer_image_that_cannot_be_mapped(image, monkeypatch):
    """The disk stays as it was."""
    disk = MmapBackend(image)

    def refuse(opened):
        raise ImageError("no")

    with monkeypatch.context() as patched:
        patched.setattr(mmap_module, "MappedImage", refuse)
        with pytest.raises(ImageError, match="no"):
            disk.resize(2 << 20)
    assert 1 << 20 == disk.size
    write(disk, disk.size - 512, b"e" * 512)
    assert 2 << 20 == disk.resize(2 << 20) == disk.size
    write(disk, disk.size - 512, b"f" * 512)
    disk.close()
    assert (b"e" * 512, b"f" * 512) == (
        content(image)[(1 << 20) - 512 : 1 << 20],
        content(image)[-512:],
    )


def test_a_read_only_image_that_has_grown(image):
    disk = MmapBackend(image, read_only=True)
    os.truncate(image, 2 << 20)
    assert 2 << 20 == disk.resize(disk.resize(None)) == disk.size
    assert bytes(512) == read(disk, (2 << 20) - 512, 512)
    disk.close()
