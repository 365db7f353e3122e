"""More filters of ours: what they change, and what not."""

import logging
import shutil
import struct
import subprocess

import pytest

from backends.blocks import buffers, read, write
from backends.filters.test_filters import OPERATIONS, Memory, do
from xen_disk_py.backends.conformance import BackendConformance
from xen_disk_py.backends.filters import rate as rate_module
from xen_disk_py.backends.filters import waiting as waiting_module
from xen_disk_py.backends.filters.partition import partitions
from xen_disk_py.backends.filters.rate import Bucket
from xen_disk_py.backends.loader import open_backend, wrap
from xen_disk_py.errors import DeviceError, ImageError, UsageError

MIB = 1 << 20


class OverAFile(BackendConformance):
    def open_disk(self, tmp_path):
        path = tmp_path / "disk"
        if not path.exists():
            path.write_bytes(bytes(2 * MIB))
        return open_backend("raw", {"path": str(path)}, [self.filter])


class TestOffset(OverAFile):
    filter = "offset:start=512K,size=1M"


class TestProtect(OverAFile):
    filter = "protect:range=3M-4M"


class TestRate(OverAFile):
    filter = "rate:bytes=1T,requests=1000000000"


class TestCorrupt(OverAFile):
    filter = "corrupt:rate=0.5,operations=read+write"


# protect


def test_what_is_protected_is_not_written(caplog):
    disk = wrap(Memory(), ["protect:range=4K-8K+64K-65K"])
    for offset, length in ((4096, 512), (0, 4608), (7680, 4096), (65536, 512), (3584, 8192)):
        with pytest.raises(OSError, match="write of what is protected"):
            disk.write(buffers(bytes(length)), offset)
        assert 0 == disk.write_nowait(buffers(bytes(length)), offset)
        with pytest.raises(OSError, match="discard of what is protected"):
            disk.discard(offset, length)
    assert not disk.source.calls
    for offset, length in ((0, 4096), (8192, 4096)):
        write(disk, offset, b"x" * length)
    read(disk, 4096, 4096)
    disk.flush()
    assert "write of 4608 bytes at 0, which are protected" in caplog.text


def test_what_is_watched_is_written_and_logged(caplog):
    disk = wrap(Memory(), ["protect:mode=watch"])
    with caplog.at_level(logging.WARNING):
        write(disk, 0, b"x" * 512)
        write(disk, 512, b"x" * 512)
    assert ["write of 512 bytes at 0, which are protected"] == caplog.messages
    assert b"x" * 1024 == disk.source.data[:1024]


# corrupt


def flipped(one, other):
    return sum(bin(a ^ b).count("1") for a, b in zip(one, other))


def test_a_read_has_one_bit_flipped_and_the_source_none():
    disk = wrap(Memory(), ["corrupt:rate=1"])
    found = read(disk, 0, 65536)
    assert 1 == flipped(found, bytes(65536))
    assert not any(disk.source.data)
    disk.write(buffers(b"x" * 4096), 0)
    assert b"x" * 4096 == disk.source.data[:4096]


def test_a_write_has_one_bit_flipped_and_the_guests_pages_none():
    disk = wrap(Memory(), ["corrupt:rate=1,operations=write"])
    pages = buffers(b"x" * 65536)
    disk.write(pages, 4096)
    assert b"x" * 65536 == b"".join(pages)
    assert 1 == flipped(disk.source.data[4096:69632], b"x" * 65536)
    assert bytes(disk.source.data[4096:69632]) == read(disk, 4096, 65536)


def test_bits_flip_as_often_as_asked_for_where_asked_for_and_the_same_again():
    found = []
    for _ in range(2):
        disk = wrap(Memory(), ["corrupt:rate=0.25,range=4K-8K,seed=3"])
        assert not any(any(read(disk, 0, 4096)) for _ in range(50))
        found.append([read(disk, 4096, 4096) for _ in range(400)])
    assert found[0] == found[1]
    assert 60 < sum(map(any, found[0])) < 140


# rate


def test_a_bucket_gives_out_so_much_a_second():
    bucket = Bucket(speed=100, burst=1)
    assert [0, 0, 0.5, 1.0] == [bucket.delay(50, now=10) for _ in range(4)]
    assert 0.5 == bucket.delay(50, now=11)
    assert [0, 0, 0.5] == [bucket.delay(50, now=100) for _ in range(3)]  # no more than one burst


def test_requests_wait_for_the_scarcer_share(monkeypatch):
    waited, clock = [], [1000.0]

    def sleep(seconds):
        waited.append(round(seconds, 6))
        clock[0] += seconds

    monkeypatch.setattr(waiting_module.time, "sleep", sleep)
    monkeypatch.setattr(rate_module.time, "monotonic", lambda: clock[0])
    disk = wrap(Memory(), ["rate:bytes=8K,requests=4,burst=0"])
    for length in (512, 4096, 512):
        read(disk, 0, length)
    assert [0.25, 0.5, 0.25] == waited
    for operation in OPERATIONS:
        do(disk, operation)
    assert 5 == len(waited)  # the read and the write of those


# offset, partition


def test_a_part_is_a_disk_and_the_rest_is_spared():
    disk = wrap(Memory(), ["offset:start=4K,size=8K"])
    assert 8192 == disk.size
    write(disk, 0, b"a" * 512)
    write(disk, 7680, b"z" * 512)
    assert b"a" * 512 == disk.source.data[4096:4608]
    assert b"z" * 512 == disk.source.data[11776:12288]
    assert not any(disk.source.data[:4096])
    assert not any(disk.source.data[12288:])
    assert 8192 == disk.resize(None)
    with pytest.raises(DeviceError, match="keeps its size"):
        disk.resize(16384)


def test_the_rest_of_a_disk_is_a_part():
    assert MIB - 4096 == wrap(Memory(), ["offset:start=4K"]).size


def table(*entries):
    """Make a sector with an MBR: type, first sector, sectors."""
    packed = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries)
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


def with_sectors(**sectors):
    disk = Memory()
    for at, content in sectors.items():
        start = int(at[1:]) * 512
        disk.data[start : start + len(content)] = content
    return disk


def test_partitions_of_an_mbr_with_logical_ones():
    disk = with_sectors(
        s0=table((0x83, 8, 16), (0, 0, 0), (0x07, 100, 50), (0x05, 200, 1000)),
        s200=table((0x83, 8, 20), (0x05, 300, 100)),
        s500=table((0x82, 4, 30), (0, 0, 0)),
    )
    expected = {1: (8, 16), 3: (100, 50), 5: (208, 20), 6: (504, 30)}
    assert {number: (at * 512, size * 512) for number, (at, size) in expected.items()} == dict(
        partitions(disk)
    )
    part = wrap(disk, ["partition:number=6"])
    write(part, 0, b"x" * 512)
    assert b"x" * 512 == disk.data[504 * 512 : 505 * 512]
    with pytest.raises(UsageError, match="number=2: the disk has 1, 3, 5, 6"):
        wrap(disk, ["partition:number=2"])


@pytest.mark.parametrize(
    "sectors",
    [
        {"s0": table((0x05, 100, 10)), "s100": table((0x83, 1, 1), (0x05, 0, 1))},  # no next
        {"s0": table((0x05, 100, 10)), "s100": table((0x83, 1, 1), (0x05, 1 << 31, 1))},
        {"s0": table((0x05, (1 << 32) - 1, 10))},
    ],
)
def test_a_chain_that_leads_nowhere_ends(sectors):
    assert len(list(partitions(with_sectors(**sectors)))) <= 1


def test_a_chain_in_a_circle_ends():
    disk = with_sectors(
        s0=table((0x05, 100, 100)),
        s100=table((0x83, 1, 1), (0x05, 50, 1)),
        s150=table((0x83, 1, 1), (0x05, 50, 1)),
    )
    assert len(list(partitions(disk))) <= 128


@pytest.mark.parametrize(
    ("sectors", "said"),
    [
        ({}, "no partition table"),
        ({"s0": table((0xEE, 1, 1))}, "its GPT makes no sense"),
        ({"s0": table((0xEE, 1, 1)), "s1": b"EFI PART" + bytes(504)}, "its GPT makes no sense"),
        ({"s0": table((0x83, 8, 1 << 30))}, "partition 1 is not inside of the disk"),
    ],
)
def test_a_table_that_makes_no_sense(sectors, said):
    with pytest.raises(ImageError, match=said):
        wrap(with_sectors(**sectors), ["partition:number=1"])


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_partitions_that_parted_makes(tmp_path, label):
    if shutil.which("parted") is None:
        pytest.skip("no parted here")
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 * MIB))
    kind = "msdos" if label == "dos" else label
    steps = f"mklabel {kind} mkpart primary 2MiB 4MiB mkpart primary 5MiB 100%".split()
    subprocess.run(["parted", "-s", str(path), *steps], check=True, capture_output=True)
    disk = open_backend("raw", {"path": str(path)})
    found = dict(partitions(disk))
    disk.close()
    assert (2 * MIB, 2 * MIB) == found[1]
    assert 5 * MIB == found[2][0]
    assert {1, 2} == set(found)


def gpt(*entries, length=128):
    """Make sectors 1 to 3: first and last sector of each partition."""
    header = struct.pack("<8s64xQIII", b"EFI PART", 2, len(entries), length, 0)
    packed = b"".join(
        struct.pack("<16s16sQQ", b"t" * 16, b"g" * 16, *entry).ljust(length, b"\0")
        for entry in entries
    )
    return {"s0": table((0xEE, 1, 2047)), "s1": header, "s2": packed}


@pytest.mark.parametrize("length", [128, 256, 512])
def test_partitions_of_a_gpt(length):
    disk = with_sectors(**gpt((40, 49), (60, 60), (100, 199), length=length))
    expected = {1: (40, 10), 2: (60, 1), 3: (100, 100)}
    assert {number: (at * 512, size * 512) for number, (at, size) in expected.items()} == dict(
        partitions(disk)
    )


def test_a_gpt_whose_partition_is_backwards():
    with pytest.raises(ImageError, match="not inside of the disk"):
        wrap(with_sectors(**gpt((40, 20))), ["partition:number=1"])
