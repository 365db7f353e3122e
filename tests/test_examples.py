"""The examples, as a user runs them."""

from pathlib import Path

import pytest

from xen_disk_py.backends.loader import open_backend

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def open_example():
    def open_disk(name, **options):
        return open_backend(None, {"path": str(EXAMPLES / name), **options})

    return open_disk


def read(disk, offset, length):
    data = bytearray(length)
    views = [memoryview(data)[at : at + 1536] for at in range(0, length, 1536)]
    assert disk.read(views, offset) in (None, length)
    return bytes(data)


@pytest.mark.parametrize("name", ["address_disk.py", "counting_disk.py"])
def test_an_example_is_short(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 30


def test_every_sector_of_the_address_disk_holds_its_address(open_example):
    disk = open_example("address_disk.py", size=5 << 40)
    assert disk.read_only
    assert 5 << 40 == disk.size
    for offset in (0, 512, 4096, 1 << 32, disk.size - 8192):
        data = read(disk, offset, 8192)
        addresses = [int(data[at : at + 512]) for at in range(0, 8192, 512)]
        assert list(range(offset, offset + 8192, 512)) == addresses
        assert all(data[at + 511 : at + 512] == b"\n" for at in range(0, 8192, 512))


def test_the_counting_disk_tells_at_the_end_what_was_read(open_example, capsys):
    disk = open_example("counting_disk.py", size="3M")
    disk.write([memoryview(b"x" * 512)], 2 << 20)
    assert b"x" * 512 + bytes(512) == read(disk, 2 << 20, 1024)
    for _ in range(3):
        read(disk, 0, 4096)
    disk.close()
    assert "MiB 0: 3 reads\nMiB 2: 1 reads\n" == capsys.readouterr().err
