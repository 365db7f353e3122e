import pytest

from backends.blocks import read, write
from xen_disk_py.backends.discard import DiscardBackend
from xen_disk_py.errors import UsageError


def test_it_is_one_gib_unless_told_otherwise():
    assert 1 << 30 == DiscardBackend().size
    assert 512 == DiscardBackend(size=512).size


@pytest.mark.parametrize("size", [0, -512, 1, 513])
def test_a_size_that_is_not_made_of_sectors_is_refused(size):
    with pytest.raises(UsageError, match="--size"):
        DiscardBackend(size=size)


def test_zeros_are_read_and_never_what_was_in_the_buffer():
    disk = DiscardBackend()
    write(disk, 4096, b"x" * 8192)
    for size in (512, 1024, 3584, 4096):
        assert bytes(10752) == read(disk, 4096, 10752, size)


def test_it_takes_no_memory_and_accepts_discards():
    disk = DiscardBackend()
    write(disk, 0, b"x" * 4096)
    disk.discard(0, disk.size)
    disk.flush()
    assert disk.can_discard
    assert 0 == disk.memory
    assert not disk.keeps_data


def test_it_can_have_any_size():
    disk = DiscardBackend(size=512)
    assert [512, 512] == [disk.resize(None), disk.size]
    assert [1 << 50, 1 << 50] == [disk.resize(1 << 50), disk.size]
    assert [1 << 50, 1 << 50] == [disk.resize(None), disk.size]
