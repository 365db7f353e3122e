"""Device numbers and names, as xen-vbd-interface(7) has them."""

from __future__ import annotations

import itertools
import random

import pytest

from xen_disk_py.errors import DeviceError, UsageError
from xen_disk_py.xenbus.vdev import VirtualDevice, first_free, from_number, parse

KNOWN = [
    ("xvda", 51712),
    ("xvda1", 51713),
    ("xvdb", 51728),
    ("xvdb15", 51743),
    ("xvdp", 51952),
    ("xvdp15", 51967),
    ("xvdq", 268439552),
    ("xvdaa", 1 << 28 | 26 << 8),
    ("xvdtq37", 1 << 28 | 536 << 8 | 37),
    ("xvda16", 1 << 28 | 16),
    ("xvda255", 1 << 28 | 255),
    ("xvdbgqcv", 1 << 28 | ((1 << 20) - 1) << 8),  # the last disk there is
    ("sda", 2048),
    ("sda15", 2063),
    ("sdb1", 2065),
    ("sdp15", 2303),
    ("hda", 768),
    ("hda63", 831),
    ("hdb", 832),
    ("hdb1", 833),
    ("hdc", 5632),
    ("hdd63", 5759),
]


def whole_families():
    """Name every number that has a name, of the extended ones a sample."""
    yield from (202 << 8 | disk << 4 | part for disk in range(16) for part in range(16))
    yield from (8 << 8 | disk << 4 | part for disk in range(16) for part in range(16))
    for major, disk in itertools.product((3, 22), range(2)):
        yield from (major << 8 | disk << 6 | part for part in range(64))
    dice = random.Random(1)
    disks = [16, 25, 26, 701, 702, 703, 18277, 18278, 475253, 475254, (1 << 20) - 1]
    disks += [dice.randint(16, (1 << 20) - 1) for _ in range(1000)]
    yield from (1 << 28 | disk << 8 | dice.choice((0, 1, 16, 255)) for disk in disks)
    yield from (1 << 28 | disk << 8 | part for disk in range(16) for part in range(16, 256))


class TestNames:
    @pytest.mark.parametrize(("name", "number"), KNOWN)
    def test_a_known_name_has_its_number(self, name, number):
        expected = VirtualDevice(number, name)

        assert expected == parse(name) == parse(f"/dev/{name}") == from_number(number)
        assert name == str(expected)

    def test_each_number_reads_back_from_its_name(self):
        for number in whole_families():
            device = from_number(number)

            assert number == device.number == parse(device.name).number
            assert not device.name.isdigit()

    @pytest.mark.parametrize(("name", "number"), KNOWN)
    def test_a_number_is_read_in_any_base(self, name, number):
        for text in (str(number), hex(number), f"0X{number:X}", f"0{number:o}"):
            assert VirtualDevice(number, name) == parse(text)

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("d0", "xvda"),
            ("d0p0", "xvda"),
            ("d1p1", "xvdb1"),
            ("d16", "xvdq"),
            ("d536p37", "xvdtq37"),
            ("d1048575p255", "xvdbgqcv255"),
        ],
    )
    def test_a_disk_is_named_by_numbers_too(self, text, name):
        assert parse(name) == parse(text)
        assert name == parse(text).name

    @pytest.mark.parametrize("number", [1, 767, 256, 5760, 51711 - 256, 52000, 2304, (1 << 28) - 1])
    def test_a_number_of_no_family_is_its_own_name(self, number):
        assert VirtualDevice(number, str(number)) == from_number(number) == parse(str(number))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "xvd",
            "xvdA",
            "XVDA",
            "xvda-1",
            "xvda 1",
            "xvda\n",
            " xvda",
            "xvda1p1",
            "xvda256",
            "xvdbgqcw",
            "xvdzzzzzzzzzzzz",
            "xvda" + "9" * 5000,
            "vda",
            "nvme0n1",
            "sdq",
            "sda16",
            "hde",
            "hda64",
            "d",
            "dp1",
            "d1p",
            "d1p256",
            "d1048576",
            "d1p1p1",
            "d-1",
            "/dev/",
            "/dev/disk/xvda",
            "0",
            "00",
            "0x",
            "0x0",
            "-51712",
            "+51712",
            " 51712",
            "51712\n",
            "51_712",
            "0b1",
            "0o62000",
            "08",
            "1e3",
            "51712.0",
            "536870912",
            "0x20000000",
            "9" * 5000,
            "xvda١",
            "d١",
            "٥١٧١٢",
            "d²",
        ],
    )
    def test_nonsense_is_refused_by_name(self, text):
        with pytest.raises(UsageError, match="is no device name; use one like"):
            parse(text)

    @pytest.mark.parametrize("text", ["xvda0000000001", "d0000000001", "d1p0000000001"])
    def test_a_long_number_never_names_another_device(self, text):
        with pytest.raises(UsageError, match="is no device name"):
            parse(text)

    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("xvdb", "/dev/xvdb"),
            ("xvdtq37", "/dev/xvdtq37"),
            ("sdb1", "/dev/xvdb1"),
            ("hdc", "/dev/xvdc"),
            ("hdd63", "/dev/xvdd63"),
            ("52000", "/dev/52000"),
        ],
    )
    def test_a_linux_guest_finds_it_as_an_xvd(self, name, path):
        assert path == parse(name).guest_device


class TestFirstFree:
    def test_it_is_xvda_where_there_is_none(self):
        assert parse("xvda") == first_free(set())

    def test_gaps_are_filled_in_order(self):
        dice = random.Random(2)
        taken, given = set(), []
        names = ["xvda", "xvdb", "xvdd", "xvdp", "xvdq", "xvds"]
        taken.update(parse(name).number for name in names)
        for _ in range(40):
            device = first_free(taken)
            taken.add(device.number)
            given.append(device.name)

        expected = [from_number(202 << 8 | disk << 4).name for disk in range(16)]
        expected += [from_number(1 << 28 | disk << 8).name for disk in range(16, 46)]
        assert [name for name in expected if name not in names] == given

        back = dice.sample(given, 10)
        taken.difference_update(parse(name).number for name in back)
        again = []
        for _ in back:
            again.append(first_free(taken))
            taken.add(again[-1].number)
        assert sorted(parse(name) for name in back) == again

    @pytest.mark.parametrize("start", [0, 1, 15, 16, 700])
    def test_it_starts_where_told(self, start):
        assert parse(f"d{start}") == first_free(set(), start)
        assert parse(f"d{start + 1}") == first_free({parse(f"d{start}").number}, start)

    @pytest.mark.parametrize(
        "other", ["hda", "sda", "hda1", "sda3", "xvda1", "xvda16", "268435456"]
    )
    def test_what_linux_shows_as_the_same_disk_is_taken(self, other):
        assert parse("xvdb") == first_free({parse(other).number})

    def test_numbers_of_no_family_take_nothing(self):
        assert parse("xvda") == first_free({1, 52000})

    def test_the_last_disk_may_be_taken_too(self):
        last = (1 << 20) - 1

        assert parse(f"d{last}") == first_free({parse(f"d{last - 1}").number}, last - 1)
        with pytest.raises(DeviceError, match="all device numbers of this guest are taken"):
            first_free({parse(f"d{last}").number}, last)
