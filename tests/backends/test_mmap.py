import os

import pytest
from blocks import buffers, read, write

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
    with pytest.raises((TypeError, OSError)):
        write(disk, 0, bytes(512))
    disk.close()


def test_an_image_that_was_cut_short_is_an_io_error(image):
    disk = MmapBackend(image)
    if not disk._mapped._can_populate:
        pytest.skip("needs Linux 5.14")
    os.truncate(image, 8192)
    assert 8192 == len(read(disk, 0, 8192))
    with pytest.raises(OSError, match="cannot be read"):
        disk.read(buffers(bytes(4096)), 8192)
    with pytest.raises(OSError, match="cannot be written"):
        disk.write(buffers(bytes(4096)), 8192)
    disk.close()


def test_an_image_that_cannot_be_mapped_is_unlocked_again(image, monkeypatch):
    def refuse(opened, *, private):
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
